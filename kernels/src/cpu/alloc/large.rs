//! Large blocks: those of the sizes that were dropped last wait as they are, because what a loop asks for next is as a rule what it has just
//! dropped, and is still in the caches. When no block of a size is left, those that wait are joined into ranges of addresses, and blocks are cut
//! from those: memory is held for the most that was in use at once, not for the most of each size. What is joined first is about as large as
//! what is asked for, and a few of the largest blocks stay whole ([`WHOLE`]): once a small part of one has a longer life than the rest, it is
//! of no use to those who come back for all of it.

use super::{LARGE, system};
use std::collections::BTreeMap;
use std::ptr::NonNull;

/// Blocks that wait and have this many bytes, such as gradients of a vocabulary's weights, are not cut up for smaller ones, as long as they are
/// at most a [`SPARE`]th of all memory that is held.
const WHOLE: usize = 64 << 20;
const SPARE: usize = 4;

/// Free memory that is the system's no more.
pub(super) struct Free {
    /// By size, the last dropped at the end.
    waiting: BTreeMap<usize, Vec<Start>>,
    /// The size of each range, by its first address; no two touch.
    ranges: BTreeMap<Start, usize>,
}

/// A block's or a range's first byte.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Start(NonNull<u8>);

// SAFETY: an address of memory that the holder owns; nothing about it belongs to a thread.
unsafe impl Send for Start {}

/// Sizes are rounded up to this: a 32nd of the power of two below at most, so that a loop over slightly different sizes finds blocks again,
/// in whole pages.
fn granule(bytes: usize) -> usize {
    ((1usize << bytes.ilog2()) >> if system::RANGES { 5 } else { 2 }).max(LARGE >> 5)
}

/// The size of the block for `bytes`, which are more than the small classes hold; `None` for sizes that no machine has.
pub(super) fn size_of(bytes: usize) -> Option<usize> {
    let size = bytes.checked_next_multiple_of(granule(bytes))?;
    (size <= isize::MAX as usize).then_some(size)
}

impl Free {
    pub(super) const fn new() -> Self {
        Self { waiting: BTreeMap::new(), ranges: BTreeMap::new() }
    }

    /// A free block of exactly `size` bytes, of stale content; `held` bytes are not the system's, in use or not.
    pub(super) fn take(&mut self, size: usize, held: usize) -> Option<NonNull<u8>> {
        if let Some(block) = self.waiting.get_mut(&size).and_then(Vec::pop) {
            return Some(block.0);
        }
        if !system::RANGES {
            return None;
        }
        self.cut(size)
            .or_else(|| {
                self.join(2 * size);
                self.cut(size)
            })
            .or_else(|| {
                let whole: usize = self.waiting.range(WHOLE..).map(|(size, blocks)| size * blocks.len()).sum();
                self.join(if whole <= held / SPARE { (WHOLE - 1).max(2 * size) } else { usize::MAX });
                self.cut(size)
            })
    }

    /// Keeps a block of `size` bytes.
    pub(super) fn put(&mut self, block: NonNull<u8>, size: usize) {
        self.waiting.entry(size).or_default().push(Start(block));
    }

    /// Gives everything back to the system; how many bytes that was.
    pub(super) fn release(&mut self) -> usize {
        let waiting = std::mem::take(&mut self.waiting).into_iter().flat_map(|(size, blocks)| blocks.into_iter().map(move |b| (b, size)));
        let ranges = std::mem::take(&mut self.ranges);
        waiting.chain(ranges).fold(0, |sum, (start, size)| {
            system::unmap(start.0, size);
            sum + size
        })
    }

    /// The front of the smallest range that has `size` bytes.
    fn cut(&mut self, size: usize) -> Option<NonNull<u8>> {
        let fitting = self.ranges.iter().filter(|(_, range)| **range >= size);
        let (&start, &range) = fitting.min_by_key(|(_, range)| **range)?;
        self.ranges.remove(&start);
        if range > size {
            // SAFETY: the range has more than `size` bytes.
            self.ranges.insert(Start(unsafe { start.0.add(size) }), range - size);
        }
        Some(start.0)
    }

    /// Turns the blocks that wait and have at most so many bytes into ranges, joined with those that they touch. That two mappings of the system
    /// touch does not matter: it takes back any whole pages.
    fn join(&mut self, most: usize) {
        let larger = self.waiting.split_off(&most.saturating_add(1));
        for (size, blocks) in std::mem::replace(&mut self.waiting, larger) {
            self.ranges.extend(blocks.into_iter().map(|start| (start, size)));
        }
        let mut joined: BTreeMap<Start, usize> = BTreeMap::new();
        for (start, size) in std::mem::take(&mut self.ranges) {
            match joined.last_entry() {
                Some(mut last) if last.key().0.addr().get() + *last.get() == start.0.addr().get() => *last.get_mut() += size,
                _ => drop(joined.insert(start, size)),
            }
        }
        self.ranges = joined;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Addresses that nobody reads.
    fn at(address: usize) -> NonNull<u8> {
        NonNull::new(std::ptr::without_provenance_mut(address)).unwrap()
    }

    #[test]
    fn a_block_of_the_same_size_comes_back_first() {
        let mut free = Free::new();
        free.put(at(1000), 10);
        free.put(at(2000), 10);
        free.put(at(3000), 5);
        assert_eq!([free.take(10, 0), free.take(5, 0), free.take(10, 0)], [Some(at(2000)), Some(at(3000)), Some(at(1000))]);
        assert_eq!(free.take(10, 0), None);
    }

    #[test]
    #[cfg(unix)]
    fn blocks_that_touch_serve_larger_and_smaller_ones() {
        let mut free = Free::new();
        for (start, size) in [(1000, 10), (1010, 20), (2000, 5), (1030, 10)] {
            free.put(at(start), size);
        }
        // The smaller of two ranges that fit, and what is left of it.
        assert_eq!(free.take(4, 0), Some(at(2000)));
        assert_eq!(free.take(35, 0), Some(at(1000)));
        assert_eq!([free.take(6, 0), free.take(5, 0), free.take(1, 0)], [None, Some(at(1035)), Some(at(2004))]);
        assert!(free.waiting.values().all(Vec::is_empty) && free.ranges.is_empty());
    }

    #[test]
    #[cfg(unix)]
    fn a_few_of_the_largest_blocks_stay_whole() {
        for (held, is_cut) in [(8 * WHOLE, false), (3 * WHOLE, true)] {
            let mut free = Free::new();
            free.put(at(1 << 40), WHOLE);
            assert_eq!(free.take(1 << 20, held).is_some(), is_cut);
            assert_eq!(free.take(WHOLE, held).is_some(), !is_cut);
        }
        // To those who ask for at least half of them they are given.
        let mut free = Free::new();
        free.put(at(1 << 40), WHOLE);
        assert_eq!(free.take(WHOLE / 2, 8 * WHOLE), Some(at(1 << 40)));
    }
}
