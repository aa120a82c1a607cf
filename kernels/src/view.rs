//! Checked views of strided memory. Construction proves that every index stays inside the slice,
//! so kernels may walk a view without further checks.

/// Elements of `T` in row-major logical order: index `(i0, i1, …)` lies at `offset + Σ i_d · strides[d]`.
/// A stride of 0 repeats (broadcasting).
#[derive(Clone, Copy, Debug)]
pub struct StridedView<'a, T> {
    data: &'a [T],
    offset: usize,
    shape: &'a [usize],
    strides: &'a [usize],
}

impl<'a, T> StridedView<'a, T> {
    /// A view of `data`, or `None` if the ranks differ, a product overflows, or the last element lies outside of `data`.
    pub fn new(data: &'a [T], offset: usize, shape: &'a [usize], strides: &'a [usize]) -> Option<Self> {
        if shape.len() != strides.len() {
            return None;
        }
        shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
        if !shape.contains(&0) {
            let last = shape.iter().zip(strides).try_fold(offset, |at, (&d, &s)| at.checked_add((d - 1).checked_mul(s)?))?;
            if last >= data.len() {
                return None;
            }
        }
        Some(Self { data, offset, shape, strides })
    }

    /// The whole underlying slice.
    pub fn data(&self) -> &'a [T] {
        self.data
    }

    /// Where the first element lies in [`data`](Self::data).
    pub fn offset(&self) -> usize {
        self.offset
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

    /// The elements as one slice, if they lie in row-major order without gaps.
    pub fn as_contiguous(&self) -> Option<&'a [T]> {
        let n = self.numel();
        if n == 0 {
            return Some(&[]);
        }
        let mut expected = 1;
        for (&d, &s) in self.shape.iter().zip(self.strides).rev() {
            if d != 1 && s != expected {
                return None;
            }
            expected *= d;
        }
        Some(&self.data[self.offset..self.offset + n])
    }
}

/// A matrix in memory: element `(i, j)` lies at `data[i * row_stride + j * col_stride]`.
/// Transposition swaps the strides, so it is free.
#[derive(Clone, Copy, Debug)]
pub struct MatView<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T> MatView<'a, T> {
    /// A view of `data`, or `None` if its last element lies outside of it.
    pub fn new(data: &'a [T], rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> Option<Self> {
        if rows > 0 && cols > 0 {
            let last = (rows - 1).checked_mul(row_stride)?.checked_add((cols - 1).checked_mul(col_stride)?)?;
            if last >= data.len() {
                return None;
            }
        }
        Some(Self { data, rows, cols, row_stride, col_stride })
    }

    /// A row-major matrix without gaps, or `None` if `data` is too short.
    pub fn row_major(data: &'a [T], rows: usize, cols: usize) -> Option<Self> {
        Self::new(data, rows, cols, cols, 1)
    }

    /// The transposed matrix over the same memory.
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Distance in elements between neighbouring rows.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// Distance in elements between neighbouring columns.
    pub fn col_stride(&self) -> usize {
        self.col_stride
    }

    /// The underlying slice; element (0, 0) is its first.
    pub fn data(&self) -> &'a [T] {
        self.data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_outside_of_the_slice_are_refused() {
        let data = [0f32; 6];
        assert!(StridedView::new(&data, 0, &[2, 3], &[3, 1]).is_some());
        assert!(StridedView::new(&data, 1, &[2, 3], &[3, 1]).is_none());
        assert!(StridedView::new(&data, 0, &[usize::MAX, 2], &[1, 1]).is_none());
        assert!(StridedView::new(&data, 9, &[0, 3], &[3, 1]).is_some());
        assert!(MatView::new(&data, 2, 3, usize::MAX, 1).is_none());
    }

    #[test]
    fn contiguity_ignores_the_strides_of_single_elements() {
        let data = [0f32; 6];
        assert!(StridedView::new(&data, 0, &[1, 6], &[77, 1]).unwrap().as_contiguous().is_some());
        assert!(StridedView::new(&data, 0, &[3, 2], &[1, 3]).unwrap().as_contiguous().is_none());
    }
}
