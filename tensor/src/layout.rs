//! How a tensor's logical elements lie in its storage.

use crate::{Error, Result, Shape};

/// Shape, strides (in elements; 0 repeats) and the offset of the first element.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Layout {
    shape: Shape,
    strides: Shape,
    offset: usize,
}

impl Layout {
    /// Row-major without gaps.
    pub fn contiguous(shape: Shape) -> Self {
        Self { shape, strides: shape.contiguous_strides(), offset: 0 }
    }

    /// Extents.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Distance in elements between neighbours of each dimension.
    pub fn strides(&self) -> &[usize] {
        self.strides.dims()
    }

    /// Index of the first element in the storage.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.numel()
    }

    /// Whether the elements lie in row-major order without gaps.
    pub fn is_contiguous(&self) -> bool {
        if self.shape.contains(&0) {
            return true;
        }
        let mut expected = 1;
        for (&d, &s) in self.shape.iter().zip(self.strides()).rev() {
            if d != 1 && s != expected {
                return false;
            }
            expected *= d;
        }
        true
    }

    /// The dimensions from the slowest to the fastest in memory. Ties keep their order, so that the row-major layout of
    /// a shape with extents of 1 is the identity.
    pub fn memory_order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.shape.rank()).collect();
        order.sort_by(|&a, &b| self.strides[b].cmp(&self.strides[a]));
        order
    }

    /// Whether the elements fill one block of memory without gaps or overlap, in some order of the dimensions.
    pub fn is_dense(&self) -> bool {
        if self.is_contiguous() {
            return true;
        }
        let order: Vec<usize> = self.memory_order().into_iter().filter(|&d| self.shape[d] != 1).collect();
        let mut expected = 1;
        for &d in order.iter().rev() {
            if self.strides[d] != expected {
                return false;
            }
            expected *= self.shape[d];
        }
        true
    }

    /// This layout with offset 0, if it is [dense](Self::is_dense).
    pub(crate) fn as_dense(&self) -> Option<Layout> {
        if self.is_contiguous() {
            return Some(Layout::contiguous(self.shape));
        }
        self.is_dense().then_some(Layout { offset: 0, ..*self })
    }

    /// A gapless layout of the same shape, in the same order of dimensions if this one is dense, else row-major:
    /// what a pointwise result of a tensor with this layout should have.
    pub fn dense_like(&self) -> Layout {
        self.as_dense().unwrap_or_else(|| Layout::contiguous(self.shape))
    }

    /// Whether both have the same elements at the same distances from their first.
    pub(crate) fn lies_like(&self, other: &Layout) -> bool {
        self.shape == other.shape && self.strides == other.strides
    }

    /// A gapless layout of `shape` whose dimensions lie in memory in the order `order`, slowest first
    /// (`[0, 2, 3, 1]` for channels-last pictures).
    pub(crate) fn with_memory_order(shape: Shape, order: &[usize]) -> Layout {
        let mut strides = shape;
        let mut step = 1;
        for &d in order.iter().rev() {
            strides.dims_mut()[d] = step;
            step *= shape[d].max(1);
        }
        Layout { shape, strides, offset: 0 }
    }

    /// The same layout from another element of the storage on.
    pub(crate) fn starting_at(self, offset: usize) -> Layout {
        Layout { offset, ..self }
    }

    /// The layout broadcast to `shape` (new or repeated dimensions get stride 0).
    pub fn broadcast_to(&self, op: &str, shape: &Shape) -> Result<Layout> {
        let mut strides = Shape::from_checked(&[0; crate::MAX_RANK][..shape.rank()]);
        let lead = shape.rank().checked_sub(self.shape.rank()).ok_or_else(|| Error::broadcast(op, &self.shape, shape))?;
        for d in 0..self.shape.rank() {
            strides.dims_mut()[lead + d] = match (self.shape[d], shape[lead + d]) {
                (from, to) if from == to => self.strides[d],
                (1, _) => 0,
                _ => return Err(Error::broadcast(op, &self.shape, shape)),
            };
        }
        Ok(Layout { shape: *shape, strides, offset: self.offset })
    }

    /// The layout with its dimensions in the order `order` (a permutation).
    pub fn permute(&self, order: &[usize]) -> Layout {
        let mut out = *self;
        for (to, &from) in order.iter().enumerate() {
            out.shape.dims_mut()[to] = self.shape[from];
            out.strides.dims_mut()[to] = self.strides[from];
        }
        out
    }

    /// Every `step`th element of `start..start + step * (len - 1) + 1` in dimension `dim`, which must lie inside.
    pub fn slice(&self, dim: usize, start: usize, len: usize, step: usize) -> Layout {
        let mut out = *self;
        if len > 0 {
            out.offset += start * self.strides[dim];
        }
        out.shape.dims_mut()[dim] = len;
        out.strides.dims_mut()[dim] = self.strides[dim].saturating_mul(step);
        out
    }

    /// The diagonal of dimensions `rows` and `cols` as a new last dimension in place of both, from column `offset` on (from row `-offset` if
    /// negative); empty if that lies outside.
    pub(crate) fn diagonal(&self, offset: isize, rows: usize, cols: usize) -> Layout {
        let skip = offset.unsigned_abs();
        let (row, col) = if offset < 0 { (skip, 0) } else { (0, skip) };
        let len = self.shape[rows].saturating_sub(row).min(self.shape[cols].saturating_sub(col));
        let kept = (0..self.shape.rank()).filter(|&d| d != rows && d != cols);
        let (mut shape, mut strides): (Vec<usize>, Vec<usize>) = kept.map(|d| (self.shape[d], self.strides[d])).unzip();
        shape.push(len);
        strides.push(self.strides[rows].saturating_add(self.strides[cols]));
        let start = if len > 0 { row * self.strides[rows] + col * self.strides[cols] } else { 0 };
        Layout { shape: Shape::from_checked(&shape), strides: Shape::from_checked(&strides), offset: self.offset + start }
    }

    /// Windows of `size` elements, `step` apart, along `dim` (which must hold at least one): they take its place, their elements are a new last dimension.
    pub(crate) fn windows(&self, dim: usize, size: usize, step: usize) -> Result<Layout> {
        let count = (self.shape[dim] - size) / step + 1;
        let mut out = self.slice(dim, 0, count, step);
        let at = self.shape.rank();
        out.shape = out.shape.with_inserted(at, size)?;
        let strides: Vec<usize> = out.strides().iter().copied().chain([self.strides[dim]]).collect();
        out.strides = Shape::from_checked(&strides);
        Ok(out)
    }

    /// The same memory seen with another shape of as many elements, or `None` if that takes a copy.
    pub fn reshape(&self, shape: &Shape) -> Option<Layout> {
        if self.numel() == 0 || self.is_contiguous() {
            return Some(Layout { shape: *shape, strides: shape.contiguous_strides(), offset: self.offset });
        }
        let (old, old_strides): (Vec<usize>, Vec<usize>) =
            self.shape.iter().copied().zip(self.strides().iter().copied()).filter(|&(d, _)| d != 1).unzip();
        // Match the shortest runs of old and new dimensions with equal products: each old run must be one evenly
        // strided block, which the new run then cuts in its own way.
        let mut strides = *shape;
        let (mut i, mut n) = (0, 0);
        while n < shape.rank() {
            let (old_start, new_start) = (i, n);
            let mut new_run = shape[n];
            n += 1;
            let mut old_run = 1;
            while old_run != new_run || (n < shape.rank() && shape[n] == 1) {
                if old_run < new_run {
                    old_run *= old[i];
                    i += 1;
                } else {
                    new_run *= shape[n];
                    n += 1;
                }
            }
            if (old_start + 1..i).any(|d| old_strides[d - 1] != old[d] * old_strides[d]) {
                return None;
            }
            let mut step = if i > old_start { old_strides[i - 1] } else { 0 };
            for d in (new_start..n).rev() {
                strides.dims_mut()[d] = step;
                step *= shape[d];
            }
        }
        Some(Layout { shape: *shape, strides, offset: self.offset })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(shape: &[usize], strides: &[usize]) -> Layout {
        Layout { shape: Shape::new(shape).unwrap(), strides: Shape::from_checked(strides), offset: 0 }
    }

    /// The storage index of every logical element, in order.
    fn walk(l: &Layout) -> Vec<usize> {
        (0..l.numel())
            .map(|mut i| {
                let mut at = l.offset();
                for d in (0..l.shape().rank()).rev() {
                    at += i % l.shape()[d] * l.strides()[d];
                    i /= l.shape()[d];
                }
                at
            })
            .collect()
    }

    #[test]
    fn channels_last_is_dense_and_kept() {
        let l = Layout::with_memory_order(Shape::new(&[2, 3, 4, 5]).unwrap(), &[0, 2, 3, 1]);
        assert_eq!(l.strides(), [60, 1, 15, 3]);
        assert!(l.is_dense() && !l.is_contiguous());
        assert_eq!(l.dense_like(), l);
        assert!(!layout(&[2, 3], &[4, 1]).is_dense());
        assert!(!layout(&[2, 3], &[0, 1]).is_dense());
    }

    #[test]
    fn a_reshape_without_copy_addresses_the_same_elements() {
        let cases: [(&[usize], &[usize]); 8] = [
            (&[2, 3, 4], &[12, 4, 1]),
            (&[4, 6], &[1, 4]),
            (&[2, 3, 4], &[24, 8, 2]),
            (&[2, 6, 4], &[48, 4, 1]),
            (&[4, 6], &[0, 1]),
            (&[1, 24], &[7, 1]),
            (&[6, 1, 4], &[8, 3, 1]),
            (&[24, 1], &[3, 0]),
        ];
        let shapes: [&[usize]; 9] = [&[24], &[2, 12], &[12, 2], &[4, 6], &[6, 4], &[2, 3, 4], &[1, 24, 1], &[2, 2, 6], &[3, 8]];
        for (shape, strides) in cases {
            let l = layout(shape, strides);
            for new in shapes {
                if new.iter().product::<usize>() != l.numel() {
                    continue;
                }
                if let Some(r) = l.reshape(&Shape::new(new).unwrap()) {
                    assert_eq!(walk(&r), walk(&l), "{shape:?} {strides:?} -> {new:?}");
                }
            }
        }
        assert!(layout(&[4, 6], &[1, 4]).reshape(&Shape::new(&[24]).unwrap()).is_none());
        assert!(layout(&[2, 3, 4], &[24, 8, 2]).reshape(&Shape::new(&[24]).unwrap()).is_some());
        assert!(layout(&[6, 4], &[8, 1]).reshape(&Shape::new(&[2, 3, 4]).unwrap()).is_some());
        assert!(layout(&[6, 4], &[8, 1]).reshape(&Shape::new(&[2, 3, 2, 2]).unwrap()).is_some());
    }
}
