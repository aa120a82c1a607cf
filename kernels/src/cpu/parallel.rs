//! Work shared among the threads of the current rayon pool, so that a caller's `ThreadPool::install` decides how many.
//!
//! How work is cut may depend on shapes and dtypes only, never on the number of threads: then no result does either.

mod share;

/// Below this estimate of serial time, in nanoseconds, work is not shared: a helper that sleeps would come too late for it, and one that is
/// awake would save little.
pub const MIN_PARALLEL_NS: usize = 10_000;

/// Number of threads that the current pool offers.
pub fn threads() -> usize {
    rayon::current_num_threads()
}

/// Makes the global pool one of `count` threads: the pool of every call from outside of a pool. Works once, before any
/// kernel has run; `false` if it is too late.
pub fn set_threads(count: usize) -> bool {
    rayon::ThreadPoolBuilder::new().num_threads(count).build_global().is_ok()
}

/// Calls `f(i)` for each `i < count`: on the pool if all calls together are estimated at [`MIN_PARALLEL_NS`] or more, in order otherwise.
pub fn for_each(count: usize, estimated_ns: usize, f: impl Fn(usize) + Sync) {
    // Behind a pointer, so that the machinery and the work are compiled once, and not for every kernel and both ways.
    for_each_by_pointer(count, estimated_ns, &f);
}

fn for_each_by_pointer(count: usize, estimated_ns: usize, f: &(dyn Fn(usize) + Sync)) {
    if is_serial(count, estimated_ns) {
        (0..count).for_each(f);
    } else {
        share::share(count, f);
    }
}

/// Cuts `out` into chunks of `chunk` elements (the last may be shorter) and calls `f(index, chunk)` for each, as [`for_each`] does.
pub fn for_each_chunk<T: Send>(out: &mut [T], chunk: usize, estimated_ns: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    let (chunk, len) = (chunk.max(1), out.len());
    let shared = SharedMut::new(out);
    for_each(len.div_ceil(chunk), estimated_ns, |i| {
        let start = i * chunk;
        // SAFETY: the chunk lies inside of `out`, which is borrowed until all are done, and each is given to one call only.
        f(i, unsafe { std::slice::from_raw_parts_mut(shared.get().add(start), chunk.min(len - start)) });
    });
}

fn is_serial(count: usize, estimated_ns: usize) -> bool {
    count < 2 || estimated_ns < MIN_PARALLEL_NS || threads() == 1
}

/// A pointer that may cross threads. The kernel that makes one must give each task its own, disjoint part of the memory.
#[derive(Debug)]
pub struct SharedMut<T>(*mut T);

// Not derived: a derive would ask it of `T` too.
impl<T> Clone for SharedMut<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for SharedMut<T> {}

// SAFETY: the pointer itself is plain data; each use is an `unsafe` block that must show that the parts are disjoint.
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    /// Shares the memory of `slice`, which stays borrowed by the caller for as long as tasks run.
    pub fn new(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr())
    }

    /// The address of the first element.
    #[inline(always)]
    pub fn get(self) -> *mut T {
        self.0
    }

    /// The address of an element further on.
    ///
    /// # Safety
    /// It must lie in the shared memory.
    pub unsafe fn add(self, count: usize) -> Self {
        // SAFETY: the caller's contract.
        Self(unsafe { self.0.add(count) })
    }

    /// The same address for elements of another type.
    pub fn cast<U>(self) -> SharedMut<U> {
        SharedMut(self.0.cast())
    }
}
