//! Memory of a GPU, and checked views of it: a view that exists lies inside of its buffer.

use super::alloc::Block;
use super::gpu::Gpu;
use super::launch::Arg;
use std::ffi::c_void;
use std::marker::PhantomData;

/// The types of elements that kernels know.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[allow(missing_docs)]
pub enum Type {
    F32,
    F64,
    F16,
    BF16,
    I64,
    I32,
    U8,
    /// One byte, 0 or 1.
    Bool,
}

impl Type {
    /// The type's name in kernel files.
    pub fn name(self) -> &'static str {
        match self {
            Type::F32 => "float",
            Type::F64 => "double",
            Type::F16 => "f16",
            Type::BF16 => "bf16",
            Type::I64 => "i64",
            Type::I32 => "i32",
            Type::U8 | Type::Bool => "u8",
        }
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Type::F64 | Type::I64 => 8,
            Type::F32 | Type::I32 => 4,
            Type::F16 | Type::BF16 => 2,
            Type::U8 | Type::Bool => 1,
        }
    }

    /// Whether this is a floating-point type.
    pub fn is_float(self) -> bool {
        matches!(self, Type::F32 | Type::F64 | Type::F16 | Type::BF16)
    }
}

/// An address on the GPU. Never read through by the host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct DevicePtr(pub(super) u64);

impl DevicePtr {
    /// No memory: for optional operands.
    pub const NULL: DevicePtr = DevicePtr(0);

    /// The address `bytes` further on.
    pub fn add_bytes(self, bytes: usize) -> Self {
        DevicePtr(self.0 + bytes as u64)
    }

    /// Whether the address is a multiple of `bytes`.
    pub fn is_aligned(self, bytes: u64) -> bool {
        self.0.is_multiple_of(bytes)
    }

    /// The address as a number.
    pub fn address(self) -> u64 {
        self.0
    }
}

/// Owned bytes on a GPU, with stale content at first. Dropping it puts the memory into the cache, for work that is queued later.
pub struct DeviceBuffer {
    pub(super) gpu: &'static Gpu,
    pub(super) block: Block,
    pub(super) bytes: usize,
}

impl DeviceBuffer {
    /// The GPU that holds the memory.
    pub fn gpu(&self) -> &'static Gpu {
        self.gpu
    }

    /// The address of the first byte, a multiple of 256.
    pub fn ptr(&self) -> DevicePtr {
        DevicePtr(self.block.address)
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        self.gpu.release(self.block);
    }
}

impl std::fmt::Debug for DeviceBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DeviceBuffer({} bytes on cuda:{})", self.bytes, self.gpu.ordinal())
    }
}

/// The address of element `offset`, if it and the `len` elements from there lie in the buffer.
fn checked(buffer: &DeviceBuffer, ty: Type, offset: usize, len: usize) -> Option<DevicePtr> {
    if len == 0 {
        // A view without elements may begin anywhere.
        return Some(buffer.ptr());
    }
    let end = offset.checked_add(len)?.checked_mul(ty.size())?;
    (end <= buffer.bytes).then(|| buffer.ptr().add_bytes(offset * ty.size()))
}

/// Contiguous elements on a GPU.
#[derive(Clone, Copy, Debug)]
pub struct Slice<'a> {
    ptr: DevicePtr,
    len: usize,
    ty: Type,
    buffer: PhantomData<&'a DeviceBuffer>,
}

impl<'a> Slice<'a> {
    /// `len` elements of `buffer` from element `offset` on: `None` if they leave it.
    pub fn new(buffer: &'a DeviceBuffer, ty: Type, offset: usize, len: usize) -> Option<Self> {
        Some(Self { ptr: checked(buffer, ty, offset, len)?, len, ty, buffer: PhantomData })
    }

    /// The address of the first element.
    pub fn ptr(&self) -> DevicePtr {
        self.ptr
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Type of the elements.
    pub fn ty(&self) -> Type {
        self.ty
    }

    /// The elements by extents and strides: `None` if the ranks differ or exceed 8, a product overflows, or the last element lies outside.
    pub fn view(self, shape: &'a [usize], strides: &'a [usize]) -> Option<View<'a>> {
        if shape.len() != strides.len() || shape.len() > 8 {
            return None;
        }
        shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
        if !shape.contains(&0) {
            let last = shape.iter().zip(strides).try_fold(0usize, |at, (&d, &s)| at.checked_add((d - 1).checked_mul(s)?))?;
            if last >= self.len {
                return None;
            }
        }
        Some(View { ptr: self.ptr, ty: self.ty, shape, strides, buffer: PhantomData })
    }
}

/// Contiguous elements on a GPU, to write.
#[derive(Debug)]
pub struct SliceMut<'a> {
    ptr: DevicePtr,
    len: usize,
    ty: Type,
    buffer: PhantomData<&'a mut DeviceBuffer>,
}

impl<'a> SliceMut<'a> {
    /// `len` elements of `buffer` from element `offset` on: `None` if they leave it.
    pub fn new(buffer: &'a mut DeviceBuffer, ty: Type, offset: usize, len: usize) -> Option<Self> {
        Some(Self { ptr: checked(buffer, ty, offset, len)?, len, ty, buffer: PhantomData })
    }

    /// The address of the first element.
    pub fn ptr(&self) -> DevicePtr {
        self.ptr
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Type of the elements.
    pub fn ty(&self) -> Type {
        self.ty
    }

    /// The same elements, to read.
    pub fn as_slice(&self) -> Slice<'_> {
        Slice { ptr: self.ptr, len: self.len, ty: self.ty, buffer: PhantomData }
    }

    /// The same elements, borrowed for a shorter time.
    pub fn reborrow(&mut self) -> SliceMut<'_> {
        SliceMut { ptr: self.ptr, len: self.len, ty: self.ty, buffer: PhantomData }
    }
}

/// Elements of a GPU's buffer by extents and strides. A stride of 0 repeats.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    ptr: DevicePtr,
    ty: Type,
    shape: &'a [usize],
    strides: &'a [usize],
    buffer: PhantomData<&'a DeviceBuffer>,
}

impl<'a> View<'a> {
    /// A view of `buffer`: `None` if the ranks differ or exceed 8, a product overflows, or the last element lies outside.
    pub fn new(buffer: &'a DeviceBuffer, ty: Type, offset: usize, shape: &'a [usize], strides: &'a [usize]) -> Option<Self> {
        if shape.len() != strides.len() || shape.len() > 8 {
            return None;
        }
        shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
        let ptr = if shape.contains(&0) {
            buffer.ptr()
        } else {
            let last = shape.iter().zip(strides).try_fold(offset, |at, (&d, &s)| at.checked_add((d - 1).checked_mul(s)?))?;
            checked(buffer, ty, last, 1)?;
            buffer.ptr().add_bytes(offset * ty.size())
        };
        Some(Self { ptr, ty, shape, strides, buffer: PhantomData })
    }

    /// The address of the first element.
    pub fn ptr(&self) -> DevicePtr {
        self.ptr
    }

    /// Type of the elements.
    pub fn ty(&self) -> Type {
        self.ty
    }

    /// Extent of each dimension.
    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }

    /// Distance in elements between neighbours of each dimension.
    pub fn strides(&self) -> &'a [usize] {
        self.strides
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// The layout as kernels take it.
    pub fn strided(&self) -> Strided {
        Strided::new(self.shape, self.strides)
    }

    /// The elements as a slice, if they lie in row-major order without gaps.
    pub fn as_contiguous(&self) -> Option<Slice<'a>> {
        let mut expected = 1;
        for (&d, &s) in self.shape.iter().zip(self.strides).rev() {
            if d != 1 && s != expected && self.numel() > 0 {
                return None;
            }
            expected *= d;
        }
        Some(Slice { ptr: self.ptr, len: self.numel(), ty: self.ty, buffer: PhantomData })
    }
}

/// A layout as kernels take it: `Strided` of `kiln.cuh`. Neighbouring dimensions that lie in memory like one are merged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Strided {
    rank: i32,
    shape: [i64; 8],
    strides: [i64; 8],
}

impl Strided {
    /// The layout of these extents and strides (at most eight), with what can be merged, merged.
    pub fn new(shape: &[usize], strides: &[usize]) -> Self {
        let [merged] = Self::together(shape, [strides]);
        merged
    }

    /// Layouts of one shape, merged alike, so that one walk serves all of them.
    pub fn together<const N: usize>(shape: &[usize], strides: [&[usize]; N]) -> [Self; N] {
        assert!(shape.len() <= 8 && strides.iter().all(|s| s.len() == shape.len()), "at most eight dimensions, as many strides");
        let mut out = [Self::default(); N];
        for (d, &extent) in shape.iter().enumerate() {
            if extent == 1 {
                continue;
            }
            let last = out.first().map_or(0, |o| o.rank as usize);
            let merges = last > 0 && (0..N).all(|k| out[k].strides[last - 1] == (extent * strides[k][d]) as i64);
            for (o, s) in out.iter_mut().zip(&strides) {
                let at = if merges { last - 1 } else { last };
                o.shape[at] = if merges { o.shape[at] * extent as i64 } else { extent as i64 };
                o.strides[at] = s[d] as i64;
                o.rank = at as i32 + 1;
            }
        }
        out
    }

    /// The number of dimensions that are left.
    pub fn rank(&self) -> usize {
        self.rank as usize
    }

    /// The extents, 0 beyond the rank.
    pub fn shape(&self) -> [i64; 8] {
        self.shape
    }

    /// The distances, 0 beyond the rank.
    pub fn strides(&self) -> [i64; 8] {
        self.strides
    }

    /// Whether the elements follow one another.
    pub fn is_contiguous(&self) -> bool {
        self.rank == 0 || (self.rank == 1 && self.strides[0] == 1)
    }
}

// SAFETY: the layout is that of `Strided` in kiln.cuh.
unsafe impl Arg for Strided {
    fn as_ptr(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dimensions_merge_where_memory_allows() {
        let dense = Strided::new(&[2, 3, 4], &[12, 4, 1]);
        assert_eq!((dense.rank(), dense.shape[0], dense.strides[0]), (1, 24, 1));
        assert!(dense.is_contiguous() && Strided::new(&[], &[]).is_contiguous());
        let gaps = Strided::new(&[2, 3, 4], &[24, 4, 1]);
        assert_eq!((gaps.rank(), &gaps.shape[..2], &gaps.strides[..2]), (2, &[2, 12][..], &[24, 1][..]));
        let [a, b] = Strided::together(&[2, 1, 3, 4], [&[12, 99, 4, 1], &[0, 7, 4, 1]]);
        assert_eq!((a.rank(), b.rank(), b.strides[0]), (2, 2, 0));
    }
}
