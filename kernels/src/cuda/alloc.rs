//! The caching allocator of a GPU: blocks are kept and handed out again, so that a training step asks the driver for nothing after the
//! first. All work is queued on one stream, so a block that is free on the host may be reused at once: what still reads it runs before.

use std::collections::HashSet;

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
    /// Of each pool, the free addresses by [`class_index`] of their size. There is one pool unless a graph was captured.
    free: Vec<(u64, Vec<Class>)>,
    /// Pools of graphs that are gone. What comes back of them belongs to all.
    gone: HashSet<u64>,
    pub(super) stats: MemoryStats,
}

/// Free blocks of one size.
#[derive(Clone, Debug, Default)]
struct Class {
    size: usize,
    addresses: Vec<u64>,
}

/// Sizes are rounded up to eight steps per power of two: at most an eighth of a block is slack.
const STEPS_LOG2: u32 = 3;

/// The size of the block that a request gets.
pub(super) fn class_of(bytes: usize) -> Option<usize> {
    let bytes = bytes.max(1);
    let step = ((1usize << bytes.ilog2()) >> STEPS_LOG2).max(ALIGN);
    let size = bytes.checked_add(step - 1)? & !(step - 1);
    (size <= isize::MAX as usize).then_some(size)
}

/// The number of a size that [`class_of`] gave.
fn class_index(size: usize) -> usize {
    let log2 = size.ilog2();
    ((log2 as usize) << STEPS_LOG2) + ((size - (1 << log2)) >> (log2 - STEPS_LOG2))
}

impl Cache {
    /// A free block of this class and pool.
    pub(super) fn take(&mut self, size: usize, pool: u64) -> Option<Block> {
        let (_, classes) = self.free.iter_mut().find(|(of, _)| *of == pool)?;
        let address = classes.get_mut(class_index(size))?.addresses.pop()?;
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
        let owner = if self.gone.contains(&block.pool) { 0 } else { block.pool };
        let pool = self.free.iter().position(|(of, _)| *of == owner).unwrap_or_else(|| {
            self.free.push((owner, Vec::new()));
            self.free.len() - 1
        });
        let (classes, index) = (&mut self.free[pool].1, class_index(block.size));
        if classes.len() <= index {
            classes.resize(index + 1, Class::default());
        }
        classes[index].size = block.size;
        classes[index].addresses.push(block.address);
    }

    /// Removes the free blocks of a pool, to be given back to the driver. A graph's pool is at its end.
    pub(super) fn drain(&mut self, pool: u64) -> Vec<u64> {
        if pool != 0 {
            self.gone.insert(pool);
        }
        let Some(pool) = self.free.iter().position(|(of, _)| *of == pool) else { return Vec::new() };
        let (_, classes) = self.free.swap_remove(pool);
        self.stats.held -= classes.iter().map(|class| class.size * class.addresses.len()).sum::<usize>();
        classes.into_iter().flat_map(|class| class.addresses).collect()
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
        // A tensor that outlives its graph.
        let block = cache.adopt(8192, 256, 2);
        assert_eq!(cache.drain(2), []);
        cache.give(block);
        assert_eq!(cache.drain(0), [8192]);
    }
}
