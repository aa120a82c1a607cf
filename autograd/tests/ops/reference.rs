//! The plain f64 arrays that references are written with: obviously right, never fast.

/// A row-major array of f64.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    pub shape: Vec<usize>,
    pub data: Vec<f64>,
}

impl Array {
    pub fn new(shape: &[usize], data: Vec<f64>) -> Self {
        assert_eq!(shape.iter().product::<usize>(), data.len());
        Self { shape: shape.to_vec(), data }
    }

    pub fn scalar(x: f64) -> Self {
        Self::new(&[], vec![x])
    }

    /// The array whose element at each index is `f(index)`.
    pub fn from_fn(shape: &[usize], mut f: impl FnMut(&[usize]) -> f64) -> Self {
        let data = indices(shape).map(|i| f(&i)).collect();
        Self::new(shape, data)
    }

    pub fn at(&self, index: &[usize]) -> f64 {
        assert_eq!(index.len(), self.shape.len());
        let mut at = 0;
        for (&i, &d) in index.iter().zip(&self.shape) {
            assert!(i < d, "{index:?} in {:?}", self.shape);
            at = at * d + i;
        }
        self.data[at]
    }

    /// The element at `index` after broadcasting: missing leading dimensions and extents of 1 repeat.
    pub fn at_broadcast(&self, index: &[usize]) -> f64 {
        let lead = index.len() - self.shape.len();
        let own: Vec<usize> = index[lead..].iter().zip(&self.shape).map(|(&i, &d)| if d == 1 { 0 } else { i }).collect();
        self.at(&own)
    }

    pub fn map(&self, f: impl Fn(f64) -> f64) -> Self {
        Self::new(&self.shape, self.data.iter().map(|&x| f(x)).collect())
    }

    /// Element by element, broadcasting.
    pub fn zip(&self, other: &Array, f: impl Fn(f64, f64) -> f64) -> Self {
        let rank = self.shape.len().max(other.shape.len());
        let extent = |a: &Array, d: usize| if d + a.shape.len() < rank { 1 } else { a.shape[d + a.shape.len() - rank] };
        let shape: Vec<usize> = (0..rank).map(|d| if extent(self, d) == 1 { extent(other, d) } else { extent(self, d) }).collect();
        Self::from_fn(&shape, |i| f(self.at_broadcast(i), other.at_broadcast(i)))
    }

    /// Folds the values along `dims` (given in row-major order) to one; the dimensions stay with extent 1.
    pub fn fold_keepdim(&self, dims: &[usize], f: impl Fn(&[f64]) -> f64) -> Self {
        let kept: Vec<usize> = self.shape.iter().enumerate().map(|(d, &n)| if dims.contains(&d) { 1 } else { n }).collect();
        Self::from_fn(&kept, |out| {
            let values: Vec<f64> = indices(&self.shape)
                .filter(|i| i.iter().zip(out).enumerate().all(|(d, (i, o))| dims.contains(&d) || i == o))
                .map(|i| self.at(&i))
                .collect();
            f(&values)
        })
    }

    /// [`fold_keepdim`](Array::fold_keepdim) without the folded dimensions.
    pub fn fold(&self, dims: &[usize], f: impl Fn(&[f64]) -> f64) -> Self {
        let kept: Vec<usize> = self.shape.iter().enumerate().filter(|(d, _)| !dims.contains(d)).map(|(_, &n)| n).collect();
        let folded = self.fold_keepdim(dims, f);
        Self::new(&kept, folded.data)
    }

    pub fn reshape(&self, shape: &[usize]) -> Self {
        Self::new(shape, self.data.clone())
    }

    pub fn permute(&self, order: &[usize]) -> Self {
        let shape: Vec<usize> = order.iter().map(|&d| self.shape[d]).collect();
        Self::from_fn(&shape, |i| {
            let mut from = vec![0; i.len()];
            for (to, &d) in order.iter().enumerate() {
                from[d] = i[to];
            }
            self.at(&from)
        })
    }

    pub fn sum(&self) -> f64 {
        self.data.iter().sum()
    }
}

/// Every index of a shape, in row-major order.
pub fn indices(shape: &[usize]) -> impl Iterator<Item = Vec<usize>> + use<> {
    let shape = shape.to_vec();
    let n: usize = shape.iter().product();
    (0..n).map(move |mut i| {
        let mut index = vec![0; shape.len()];
        for d in (0..shape.len()).rev() {
            index[d] = i % shape[d];
            i /= shape[d];
        }
        index
    })
}
