//! Large blocks from the system and back.

use std::ptr::NonNull;

/// Whether any whole pages can be given back, whichever blocks they came in.
pub(super) const RANGES: bool = cfg!(unix);

/// `size` zeroed bytes, backed by huge pages where the system grants them.
#[cfg(unix)]
pub(super) fn map(size: usize) -> Option<NonNull<u8>> {
    // SAFETY: an anonymous private mapping at an address of the system's choice touches no existing memory.
    let ptr = unsafe {
        libc::mmap(std::ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    };
    if ptr == libc::MAP_FAILED {
        return None;
    }
    #[cfg(target_os = "linux")]
    // SAFETY: the range was mapped above; the advice changes no contents, and its failure is harmless.
    unsafe {
        libc::madvise(ptr, size, libc::MADV_HUGEPAGE);
    }
    NonNull::new(ptr.cast())
}

#[cfg(unix)]
pub(super) fn unmap(ptr: NonNull<u8>, size: usize) {
    // SAFETY: the range is whole pages that `map` returned, and its only owner gives it up.
    unsafe {
        libc::munmap(ptr.as_ptr().cast(), size);
    }
}

#[cfg(not(unix))]
fn layout(size: usize) -> Option<std::alloc::Layout> {
    std::alloc::Layout::from_size_align(size, super::ALIGN).ok()
}

#[cfg(not(unix))]
pub(super) fn map(size: usize) -> Option<NonNull<u8>> {
    // SAFETY: the size is not zero.
    NonNull::new(unsafe { std::alloc::alloc_zeroed(layout(size)?) })
}

#[cfg(not(unix))]
pub(super) fn unmap(ptr: NonNull<u8>, size: usize) {
    if let Some(layout) = layout(size) {
        // SAFETY: the block came from `map` with this very size.
        unsafe { std::alloc::dealloc(ptr.as_ptr(), layout) }
    }
}
