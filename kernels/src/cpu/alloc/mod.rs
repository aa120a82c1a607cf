//! The caching allocator: 64-byte aligned blocks that are kept and reused, so that a training step asks the system
//! for nothing (and so takes no page faults) after the first.
//!
//! Every block comes from the system zeroed. A recycled block holds stale but initialised bytes, so a slice over it is
//! always sound for types that allow every bit pattern.
//!
//! A thread keeps the last few small blocks that it dropped to itself ([`Near`]), so that small operations take no lock. [`large`] ones share
//! their memory among sizes.

mod large;
mod system;

use std::alloc::Layout;
use std::cell::RefCell;
use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Alignment of every block: a cache line, and a full AVX-512 vector.
pub const ALIGN: usize = 64;

/// Blocks of about this size and more are mapped by themselves and backed by huge pages where the system grants them.
const LARGE: usize = 2 << 20;

/// The largest of the others: the size before it in their steps.
const MAX_SMALL: usize = LARGE - (LARGE >> (STEPS_LOG2 + 1));

/// What stands for a class in large blocks.
const LARGE_CLASS: usize = CLASSES;

/// Smaller sizes are rounded up to four steps per power of two: at most a fifth of a block is slack.
const STEPS_LOG2: u32 = 2;
const CLASSES: usize = (LARGE.ilog2() as usize) << STEPS_LOG2;

/// The classes of up to 64 KiB, whose blocks threads keep near: beyond, a lock is nothing beside the work.
const NEAR_CLASSES: usize = (16 << STEPS_LOG2) + 1;

/// Blocks of a class that a thread keeps: what a chain of operations has in flight.
const NEAR_BLOCKS: usize = 4;

static FREE: [Mutex<Vec<Block>>; CLASSES] = [const { Mutex::new(Vec::new()) }; CLASSES];
static FREE_LARGE: Mutex<large::Free> = Mutex::new(large::Free::new());
static HELD: AtomicUsize = AtomicUsize::new(0);
static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static SYSTEM_ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

/// What the allocator holds, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryStats {
    /// Taken from the system and not given back: in use, or cached for reuse.
    pub held: usize,
    /// In live buffers (rounded up to the block's size).
    pub in_use: usize,
    /// The most that was ever in use since the last [`reset_peak`].
    pub peak: usize,
    /// How many blocks were asked from the system so far.
    pub system_allocations: usize,
}

/// The current statistics.
pub fn memory_stats() -> MemoryStats {
    MemoryStats {
        held: HELD.load(Relaxed),
        in_use: IN_USE.load(Relaxed),
        peak: PEAK.load(Relaxed),
        system_allocations: SYSTEM_ALLOCATIONS.load(Relaxed),
    }
}

/// Makes the current use the new peak.
pub fn reset_peak() {
    PEAK.store(IN_USE.load(Relaxed), Relaxed);
}

/// Gives every cached block back to the system, but for the few small ones that other threads keep near.
pub fn empty_cache() {
    let _ = NEAR.try_with(|near| near.borrow_mut().empty());
    for class in &FREE {
        let blocks = std::mem::take(&mut *class.lock().unwrap_or_else(PoisonError::into_inner));
        for block in blocks {
            block.release();
        }
    }
    HELD.fetch_sub(lock_large().release(), Relaxed);
}

/// The system refused memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutOfMemory {
    /// Bytes asked for.
    pub requested: usize,
    /// Bytes in live buffers at that time.
    pub in_use: usize,
}

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "out of memory: {} bytes were asked for while {} are in use", self.requested, self.in_use)
    }
}

impl std::error::Error for OutOfMemory {}

struct Block {
    ptr: NonNull<u8>,
    size: usize,
    class: usize,
}

// SAFETY: a block is owned memory; nothing about it belongs to a thread.
unsafe impl Send for Block {}

impl Block {
    fn layout(size: usize) -> Option<Layout> {
        Layout::from_size_align(size, ALIGN).ok()
    }

    /// A block of the class and size from this thread's or everybody's cache.
    fn cached(class: usize, size: usize) -> Option<Self> {
        if class == LARGE_CLASS {
            return lock_large().take(size, HELD.load(Relaxed)).map(|ptr| Block { ptr, size, class });
        }
        let near = NEAR.try_with(|near| near.borrow_mut().take(class));
        near.ok().flatten().or_else(|| lock(class).pop())
    }

    /// Keeps the block for reuse: near, if there is room.
    fn keep(self) {
        if self.class == LARGE_CLASS {
            return lock_large().put(self.ptr, self.size);
        }
        let mut block = Some(self);
        // If the thread is ending, what it kept near may be gone.
        let _ = NEAR.try_with(|near| near.borrow_mut().put(&mut block));
        if let Some(block) = block {
            lock(block.class).push(block);
        }
    }

    fn from_system(class: usize, size: usize) -> Option<Self> {
        let ptr = if class == LARGE_CLASS {
            system::map(size)?
        } else {
            // SAFETY: the size is not zero (classes start at ALIGN).
            NonNull::new(unsafe { std::alloc::alloc_zeroed(Self::layout(size)?) })?
        };
        HELD.fetch_add(size, Relaxed);
        SYSTEM_ALLOCATIONS.fetch_add(1, Relaxed);
        Some(Block { ptr, size, class })
    }

    /// Gives a block of the small classes back.
    fn release(self) {
        HELD.fetch_sub(self.size, Relaxed);
        if let Some(layout) = Self::layout(self.size) {
            // SAFETY: the block came from `alloc_zeroed` with this very layout.
            unsafe { std::alloc::dealloc(self.ptr.as_ptr(), layout) }
        }
    }
}

fn lock_large() -> MutexGuard<'static, large::Free> {
    FREE_LARGE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Everybody's free blocks of a class.
fn lock(class: usize) -> MutexGuard<'static, Vec<Block>> {
    FREE[class].lock().unwrap_or_else(PoisonError::into_inner)
}

/// A thread's own free blocks of the small classes.
struct Near([[Option<Block>; NEAR_BLOCKS]; NEAR_CLASSES]);

thread_local! {
    static NEAR: RefCell<Near> = const { RefCell::new(Near([const { [const { None }; NEAR_BLOCKS] }; NEAR_CLASSES])) };
}

impl Near {
    fn take(&mut self, class: usize) -> Option<Block> {
        self.0.get_mut(class)?.iter_mut().find_map(Option::take)
    }

    /// Takes the block, if it is a small one and there is room.
    fn put(&mut self, block: &mut Option<Block>) {
        let places = block.as_ref().and_then(|block| self.0.get_mut(block.class));
        if let Some(place) = places.and_then(|places| places.iter_mut().find(|place| place.is_none())) {
            *place = block.take();
        }
    }

    /// Moves all blocks to everybody's.
    fn empty(&mut self) {
        for block in self.0.iter_mut().flatten().filter_map(Option::take) {
            lock(block.class).push(block);
        }
    }
}

impl Drop for Near {
    fn drop(&mut self) {
        self.empty();
    }
}

/// The size class of a request: its index and its block size.
fn class_of(bytes: usize) -> Option<(usize, usize)> {
    if bytes > MAX_SMALL {
        return large::size_of(bytes).map(|size| (LARGE_CLASS, size));
    }
    let bytes = bytes.max(ALIGN);
    // The step is a quarter of the power of two at or below `bytes`, but at least a cache line.
    let step = ((1usize << bytes.ilog2()) >> STEPS_LOG2).max(ALIGN);
    let size = (bytes + step - 1) & !(step - 1);
    let log2 = size.ilog2();
    let index = ((log2 as usize) << STEPS_LOG2) + ((size - (1usize << log2)) >> (log2 - STEPS_LOG2));
    Some((index, size))
}

/// Owned, aligned, initialised bytes. Dropping it puts the memory into the cache.
pub struct Buffer {
    block: Option<Block>,
    len: usize,
}

// SAFETY: shared access only reads plain bytes; writing takes `&mut`.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `len` bytes of unspecified, initialised content.
    pub fn new(len: usize) -> Result<Self, OutOfMemory> {
        let out_of_memory = || OutOfMemory { requested: len, in_use: IN_USE.load(Relaxed) };
        if len == 0 {
            return Ok(Self { block: None, len });
        }
        let (class, size) = class_of(len).ok_or_else(out_of_memory)?;
        let block = match Block::cached(class, size).or_else(|| Block::from_system(class, size)) {
            Some(block) => block,
            None => {
                empty_cache();
                Block::from_system(class, size).ok_or_else(out_of_memory)?
            }
        };
        let in_use = IN_USE.fetch_add(block.size, Relaxed) + block.size;
        // Looked at first: as a rule it is no peak, and the write would be an exchange.
        if in_use > PEAK.load(Relaxed) {
            PEAK.fetch_max(in_use, Relaxed);
        }
        Ok(Self { block: Some(block), len })
    }

    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> Result<Self, OutOfMemory> {
        let mut buffer = Self::new(len)?;
        buffer.as_bytes_mut().fill(0);
        Ok(buffer)
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn ptr(&self) -> *mut u8 {
        self.block.as_ref().map_or(std::ptr::without_provenance_mut(ALIGN), |b| b.ptr.as_ptr())
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes are owned by this buffer.
        unsafe { std::slice::from_raw_parts(self.ptr(), self.len) }
    }

    /// The bytes, to write.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the access unique.
        unsafe { std::slice::from_raw_parts_mut(self.ptr(), self.len) }
    }

    /// The bytes as elements; a remainder shorter than an element is left out.
    pub fn as_slice<T: crate::element::Element>(&self) -> &[T] {
        // SAFETY: the memory is initialised and 64-byte aligned, and every bit pattern is a valid `Element`.
        unsafe { std::slice::from_raw_parts(self.ptr().cast(), self.len / size_of::<T>()) }
    }

    /// The bytes as elements, to write.
    pub fn as_slice_mut<T: crate::element::Element>(&mut self) -> &mut [T] {
        // SAFETY: as above, and `&mut self` makes the access unique.
        unsafe { std::slice::from_raw_parts_mut(self.ptr().cast(), self.len / size_of::<T>()) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            IN_USE.fetch_sub(block.size, Relaxed);
            block.keep();
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer").field("len", &self.len).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_holds_its_requests_and_wastes_at_most_a_quarter() {
        for bytes in (1..5000).chain([1 << 20, (1 << 20) + 1, 3_000_000, 5 << 30]) {
            let (index, size) = class_of(bytes).unwrap();
            assert!(size >= bytes && size % ALIGN == 0, "{bytes}");
            assert!(bytes < 512 || size <= bytes + bytes / 4, "{bytes} in a block of {size}");
            assert_eq!(class_of(size).unwrap().1, size, "{bytes}: a block's own size must stay as large as its class");
            let (next_index, next_size) = class_of(size).unwrap();
            assert!(next_index == index && next_size == size, "{bytes}");
        }
    }

    #[test]
    fn memory_is_reused_and_counted() {
        // A size that no other test uses.
        let len = 7 << 20;
        let first = Buffer::zeroed(len).unwrap();
        assert!(first.as_bytes().iter().all(|&b| b == 0));
        assert_eq!(first.as_slice::<f32>().len(), len / 4);
        let address = first.as_bytes().as_ptr();
        assert_eq!(address as usize % ALIGN, 0);
        let before = memory_stats();
        assert!(before.in_use >= len && before.peak >= before.in_use && before.held >= before.in_use);
        drop(first);
        let second = Buffer::new(len).unwrap();
        assert_eq!(second.as_bytes().as_ptr(), address);
    }

    #[test]
    fn small_blocks_stay_near_and_outlive_their_thread() {
        // A class that no other test uses.
        let len = 40 << 10;
        let addresses = |buffers: &[Buffer]| buffers.iter().map(|b| b.as_bytes().as_ptr() as usize).collect::<Vec<_>>();
        let near = std::thread::spawn(move || {
            let first: Vec<Buffer> = (0..NEAR_BLOCKS).map(|_| Buffer::new(len).unwrap()).collect();
            let before = addresses(&first);
            drop(first);
            let mut again: Vec<Buffer> = (0..NEAR_BLOCKS).map(|_| Buffer::new(len).unwrap()).collect();
            let mut after = addresses(&again);
            after.sort_unstable();
            assert!(before.iter().all(|address| after.binary_search(address).is_ok()));
            // More than fit near.
            again.extend((0..NEAR_BLOCKS).map(|_| Buffer::new(len).unwrap()));
            addresses(&again)
        });
        let mut known = near.join().unwrap();
        known.sort_unstable();
        let again: Vec<Buffer> = (0..2 * NEAR_BLOCKS).map(|_| Buffer::new(len).unwrap()).collect();
        assert!(addresses(&again).iter().all(|address| known.binary_search(address).is_ok()));
    }

    #[test]
    fn absurd_requests_are_errors() {
        assert!(Buffer::new(usize::MAX).is_err());
        assert!(Buffer::new(isize::MAX as usize - 100).is_err());
        assert_eq!(Buffer::new(0).unwrap().as_slice::<f64>(), &[] as &[f64]);
    }
}
