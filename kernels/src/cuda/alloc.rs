//! The caching allocator of a GPU: blocks are kept and handed out again, so that a training step asks the driver for nothing after the
//! first. All work is queued on one stream, so a block that is free on the host may be reused at once: what still reads it runs before.

use std::collections::HashMap;

/// A block's address must suit vector accesses and tensor maps.
const ALIGN: usize = 256;

/// A piece of a GPU's memory, of its class's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) address: u64,
    pub(super) size: usize,
    /// The captured graph whose replays use this block, or 0.
    pub(super) pool: u64,
}

/// What the allocator of a GPU holds, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MemoryStats {
    /// Taken from the driver: in use, or cached.
    pub held: usize,
    /// In live buffers (rounded up to the block's size).
    pub in_use: usize,
    /// The most that was ever in use since the last [`reset_peak`](super::Gpu::reset_peak).
    pub peak: usize,
    /// How many blocks were asked from the driver so far.
    pub driver_allocations: usize,
}

/// The free blocks, and the count of the others.
#[derive(Debug, Default)]
pub(super) struct Cache {
    /// By pool and size.
    free: HashMap<(u64, usize), Vec<u64>>,
    pub(super) stats: MemoryStats,
}

/// Sizes are rounded up to eight steps per power of two: at most an eighth of a block is slack.
pub(super) fn class_of(bytes: usize) -> Option<usize> {
    let step = (1usize << (usize::BITS - 1 - bytes.max(1).leading_zeros())) / 8;
    let step = step.max(ALIGN);
    let size = bytes.max(1).checked_add(step - 1)? / step * step;
    (size <= isize::MAX as usize).then_some(size)
}

impl Cache {
    /// A free block of this class and pool.
    pub(super) fn take(&mut self, size: usize, pool: u64) -> Option<Block> {
        let address = self.free.get_mut(&(pool, size))?.pop()?;
        self.count_use(size);
        Some(Block { address, size, pool })
    }

    /// Counts a new block of the driver's.
    pub(super) fn adopt(&mut self, address: u64, size: usize, pool: u64) -> Block {
        self.stats.held += size;
        self.stats.driver_allocations += 1;
        self.count_use(size);
        Block { address, size, pool }
    }

    fn count_use(&mut self, size: usize) {
        self.stats.in_use += size;
        self.stats.peak = self.stats.peak.max(self.stats.in_use);
    }

    /// Takes a block back.
    pub(super) fn give(&mut self, block: Block) {
        self.stats.in_use -= block.size;
        self.free.entry((block.pool, block.size)).or_default().push(block.address);
    }

    /// Removes the free blocks of a pool, to be given back to the driver.
    pub(super) fn drain(&mut self, pool: u64) -> Vec<u64> {
        let mut drained = Vec::new();
        self.free.retain(|&(of, size), addresses| {
            if of == pool {
                self.stats.held -= size * addresses.len();
                drained.append(addresses);
            }
            of != pool
        });
        drained
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_hold_their_requests() {
        for bytes in (0..5000).chain([1 << 20, (1 << 20) + 1, 3_000_000, 5 << 30]) {
            let size = class_of(bytes).unwrap();
            assert!(size >= bytes && size.is_multiple_of(ALIGN) && (bytes < 4096 || size <= bytes + bytes / 8 + ALIGN), "{bytes}: {size}");
            assert_eq!(class_of(size), Some(size), "{bytes}");
        }
        assert_eq!(class_of(usize::MAX), None);
    }

    #[test]
    fn blocks_return_to_their_pool() {
        let mut cache = Cache::default();
        let block = cache.adopt(4096, 256, 1);
        assert_eq!((cache.stats.held, cache.stats.in_use, cache.stats.peak), (256, 256, 256));
        cache.give(block);
        assert_eq!(cache.take(256, 0), None);
        assert_eq!(cache.take(256, 1), Some(block));
        cache.give(block);
        assert_eq!(cache.drain(1), [4096]);
        assert_eq!((cache.stats.held, cache.stats.in_use), (0, 0));
    }
}
