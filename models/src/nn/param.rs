//! Named, shared cells that hold a tensor: [`Param`] with a gradient, [`Buffer`] without.

use kiln_tensor::{DType, Error, Result, Shape, Tensor};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

struct Cell {
    name: String,
    tensor: Mutex<Tensor>,
    frozen: AtomicBool,
}

impl Cell {
    fn lock(&self) -> MutexGuard<'_, Tensor> {
        self.tensor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An error unless `new` may take the place of `old`.
    fn expect_like(&self, op: &str, shape: Shape, dtype: DType, new: &Tensor) -> Result<()> {
        if shape == *new.shape() && dtype == new.dtype() {
            return Ok(());
        }
        Err(Error::shape(op, format!("`{}` is {dtype} {shape}, the new content is {} {}", self.name, new.dtype(), new.shape())))
    }

    fn set(&self, tensor: &Tensor) -> Result<()> {
        let content = tensor.detach().contiguous()?;
        let mut held = self.lock();
        self.expect_like("set", *held.shape(), held.dtype(), &content)?;
        *held = if held.is_leaf() { held.with_data(&content)? } else { content };
        Ok(())
    }
}

/// A trainable tensor with a name. Clones share one content, so a layer, an optimiser and a checkpoint writer see the same weights.
///
/// The content is a leaf of the graph, and stays the same leaf (with its gradient and hooks) while optimisers replace its data.
///
/// ```
/// # use kiln_models::nn::{Init, Params};
/// # use kiln_tensor::Result;
/// # fn main() -> Result<()> {
/// let w = Params::new().scope("layer").param("weight", [2, 3], Init::Ones)?;
/// assert_eq!(w.name(), "layer.weight");
/// assert!(w.get().is_leaf() && w.grad().is_none());
/// w.freeze();
/// assert!(!w.get().is_tracked());
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Param(Arc<Cell>);

impl Param {
    /// A parameter called `name` that starts with the data of `tensor`. An error if its dtype is not a float.
    pub fn new(name: impl Into<String>, tensor: &Tensor) -> Result<Self> {
        Self::of_content(name, tensor.detach().contiguous()?)
    }

    /// A parameter that holds `content` as it lies: contiguous, or of a model that is not going to be.
    pub(super) fn of_content(name: impl Into<String>, content: Tensor) -> Result<Self> {
        let leaf = content.detach().requires_grad_()?;
        Ok(Self(Arc::new(Cell { name: name.into(), tensor: Mutex::new(leaf), frozen: AtomicBool::new(false) })))
    }

    /// The full dotted name, e.g. `encoder.0.weight`.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The content: a leaf of the graph, or untracked while the parameter is frozen.
    ///
    /// Whoever keeps it keeps the old values: the next update then works on a copy.
    pub fn get(&self) -> Tensor {
        let tensor = self.0.lock();
        if self.is_frozen() { tensor.detach() } else { tensor.clone() }
    }

    /// Replaces the content by the data of `tensor`: of the same shape and dtype, or it is an error. The gradient stays.
    pub fn set(&self, tensor: &Tensor) -> Result<()> {
        self.0.set(tensor)
    }

    /// The extents.
    pub fn shape(&self) -> Shape {
        *self.0.lock().shape()
    }

    /// The dtype.
    pub fn dtype(&self) -> DType {
        self.0.lock().dtype()
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.0.lock().numel()
    }

    /// The gradient that backward passes accumulated; `None` if there is none.
    pub fn grad(&self) -> Option<Tensor> {
        self.0.lock().grad()
    }

    /// Replaces the accumulated gradient (what clipping does): of the parameter's shape and dtype, or it is an error.
    pub fn set_grad(&self, grad: Option<Tensor>) -> Result<()> {
        let held = self.0.lock();
        if let Some(grad) = &grad {
            self.0.expect_like("set_grad", *held.shape(), held.dtype(), grad)?;
        }
        if let Some(leaf) = held.leaf() {
            leaf.set_grad(grad.map(|g| g.detach()));
        }
        Ok(())
    }

    /// Forgets the accumulated gradient.
    pub fn zero_grad(&self) {
        self.0.lock().zero_grad();
    }

    /// Stops tracking: from now on the layers see a constant, and no gradient arrives.
    pub fn freeze(&self) {
        self.0.frozen.store(true, Relaxed);
    }

    /// Tracks again.
    pub fn unfreeze(&self) {
        self.0.frozen.store(false, Relaxed);
    }

    /// Whether the parameter is frozen.
    pub fn is_frozen(&self) -> bool {
        self.0.frozen.load(Relaxed)
    }

    /// Whether both are the same cell.
    pub fn is_same(&self, other: &Param) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Converts the content to another float dtype. The accumulated gradient is dropped.
    pub fn to_dtype(&self, dtype: DType) -> Result<()> {
        let mut held = self.0.lock();
        if held.dtype() != dtype {
            *held = held.detach().to_dtype(dtype)?.requires_grad_()?;
        }
        Ok(())
    }

    /// Changes the content by `f`, which gets it and the accumulated gradient, if there is one:
    /// [`Tensor::as_slice_mut`] works in place unless a live graph or another holder needs the old values.
    ///
    /// `f` must leave the shape and the dtype as they are (an error otherwise), and must not use this parameter's methods:
    /// the cell is locked.
    pub fn update<R>(&self, f: impl FnOnce(&mut Tensor, Option<&Tensor>) -> Result<R>) -> Result<R> {
        let grad = self.grad();
        Self::update_all(&[self], |tensors| match tensors {
            [tensor] => f(tensor, grad.as_ref()),
            _ => Err(Error::graph("update", "one parameter expected")),
        })
    }

    /// [`update`](Param::update) of several parameters at once, for optimisers that work on all of them in one pass: `f` gets
    /// their contents in the order of `params`. An error if one parameter is named twice.
    pub fn update_all<R>(params: &[&Param], f: impl FnOnce(&mut [Tensor]) -> Result<R>) -> Result<R> {
        // Locked in the order of addresses, so that two threads with overlapping lists cannot wait for each other.
        let mut order: Vec<usize> = (0..params.len()).collect();
        order.sort_by_key(|&i| Arc::as_ptr(&params[i].0));
        if let Some(twice) = order.windows(2).find(|w| params[w[0]].is_same(params[w[1]])) {
            return Err(Error::argument("update_all", format!("parameter `{}` is listed twice", params[twice[0]].name())));
        }
        let empty = Tensor::zeros((), ())?;
        let mut cells: Vec<(usize, MutexGuard<'_, Tensor>)> = order.iter().map(|&i| (i, params[i].0.lock())).collect();
        cells.sort_by_key(|(i, _)| *i);
        // Moved out, not cloned: a second handle would force every update to work on a copy.
        let tensors = cells.iter_mut().map(|(_, cell)| std::mem::replace(&mut **cell, empty.clone())).collect();
        let mut taken = Taken { tensors, cells };
        let before: Vec<(Shape, DType)> = taken.tensors.iter().map(|t| (*t.shape(), t.dtype())).collect();
        let result = f(&mut taken.tensors);
        let mut misfit = Ok(());
        for ((param, tensor), (shape, dtype)) in params.iter().zip(&mut taken.tensors).zip(before) {
            misfit = misfit.and(param.0.expect_like("update", shape, dtype, tensor));
            if !tensor.is_leaf() {
                *tensor = tensor.detach().requires_grad_()?;
            }
        }
        misfit?;
        result
    }
}

/// Contents taken out of their cells; dropping puts them back, after a panic of the update too.
struct Taken<'a> {
    tensors: Vec<Tensor>,
    cells: Vec<(usize, MutexGuard<'a, Tensor>)>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        for ((_, cell), tensor) in self.cells.iter_mut().zip(self.tensors.drain(..)) {
            **cell = tensor;
        }
    }
}

impl fmt::Debug for Param {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let frozen = if self.is_frozen() { ", frozen" } else { "" };
        write!(f, "Param({}: {} {}{frozen})", self.name(), self.dtype(), self.shape())
    }
}

/// A tensor with a name that is saved with the model but not trained, such as running statistics. Clones share one content.
#[derive(Clone)]
pub struct Buffer(Arc<Cell>);

impl Buffer {
    /// A buffer called `name` that starts with the data of `tensor`.
    pub fn new(name: impl Into<String>, tensor: &Tensor) -> Result<Self> {
        Ok(Self::of_content(name, tensor.detach().contiguous()?))
    }

    /// A buffer that holds `content` as it lies.
    pub(super) fn of_content(name: impl Into<String>, content: Tensor) -> Self {
        Self(Arc::new(Cell { name: name.into(), tensor: Mutex::new(content), frozen: AtomicBool::new(true) }))
    }

    /// The full dotted name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The content, untracked.
    pub fn get(&self) -> Tensor {
        self.0.lock().clone()
    }

    /// Replaces the content by the data of `tensor`: of the same shape and dtype, or it is an error.
    pub fn set(&self, tensor: &Tensor) -> Result<()> {
        self.0.set(tensor)
    }

    /// The extents.
    pub fn shape(&self) -> Shape {
        *self.0.lock().shape()
    }

    /// The dtype.
    pub fn dtype(&self) -> DType {
        self.0.lock().dtype()
    }

    /// Converts the content to another dtype.
    pub fn to_dtype(&self, dtype: DType) -> Result<()> {
        let mut held = self.0.lock();
        *held = held.to_dtype(dtype)?;
        Ok(())
    }

    /// Replaces the content by what `f` makes of it, as one step: no other thread's update comes between. `f` must keep shape and
    /// dtype and must not use this buffer's methods: the cell is locked.
    pub fn update(&self, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<()> {
        let mut held = self.0.lock();
        let new = f(&held)?.detach().contiguous()?;
        self.0.expect_like("update", *held.shape(), held.dtype(), &new)?;
        *held = new;
        Ok(())
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({}: {} {})", self.name(), self.dtype(), self.shape())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_autograd::TensorExt;

    fn ones(name: &str) -> Param {
        Param::new(name, &Tensor::ones([3], ()).unwrap()).unwrap()
    }

    fn double(tensor: &mut Tensor) -> Result<()> {
        tensor.as_slice_mut::<f32>()?.iter_mut().for_each(|x| *x *= 2.0);
        Ok(())
    }

    #[test]
    fn an_update_works_in_place_and_keeps_leaf_and_gradient() {
        let w = ones("w");
        w.get().mul(&w.get()).unwrap().sum(()).unwrap().backward().unwrap();
        let (address, leaf) = (w.get().storage_address(), w.get().leaf().unwrap().clone());
        w.update(|t, g| {
            assert_eq!(g.unwrap().to_vec::<f32>()?, [2.0; 3]);
            double(t)
        })
        .unwrap();
        assert_eq!(w.get().to_vec::<f32>().unwrap(), [2.0; 3]);
        assert_eq!(w.get().storage_address(), address);
        assert!(Arc::ptr_eq(w.get().leaf().unwrap(), &leaf));
        assert!(w.grad().is_some());
        w.set(&Tensor::zeros([3], ()).unwrap()).unwrap();
        assert!(Arc::ptr_eq(w.get().leaf().unwrap(), &leaf));
        w.zero_grad();
        assert!(w.grad().is_none());
    }

    #[test]
    fn holders_of_the_old_content_never_see_an_update() {
        let (w, v) = (ones("w"), ones("v"));
        let old = w.get();
        let product = old.mul(&v.get()).unwrap();
        Param::update_all(&[&v, &w], |tensors| tensors.iter_mut().try_for_each(double)).unwrap();
        assert_eq!(old.to_vec::<f32>().unwrap(), [1.0; 3]);
        assert_eq!(w.get().to_vec::<f32>().unwrap(), [2.0; 3]);
        product.sum(()).unwrap().backward().unwrap();
        // The graph saved the factors as they were.
        assert_eq!(w.grad().unwrap().to_vec::<f32>().unwrap(), [1.0; 3]);
        assert_eq!(v.grad().unwrap().to_vec::<f32>().unwrap(), [1.0; 3]);
    }

    #[test]
    fn misuse_is_an_error_and_loses_nothing() {
        let w = ones("w");
        assert!(Param::update_all(&[&w, &w.clone()], |_| Ok(())).unwrap_err().to_string().contains("`w` is listed twice"));
        assert!(w.set(&Tensor::ones([4], ()).unwrap()).is_err());
        assert!(w.set_grad(Some(Tensor::ones([4], ()).unwrap())).is_err());
        assert!(w.update(|_, _| Err::<(), _>(Error::argument("test", "no"))).is_err());
        assert_eq!(w.get().to_vec::<f32>().unwrap(), [1.0; 3]);
        let panic = std::panic::catch_unwind(|| w.update(|_, _| -> Result<()> { panic!("on purpose") }));
        assert!(panic.is_err());
        assert_eq!(w.get().to_vec::<f32>().unwrap(), [1.0; 3]);
        assert!(Param::new("i", &Tensor::zeros([1], DType::I64).unwrap()).is_err());
    }

    #[test]
    fn a_frozen_parameter_is_a_constant() {
        let (w, v) = (ones("w"), ones("v"));
        w.freeze();
        w.get().mul(&v.get()).unwrap().sum(()).unwrap().backward().unwrap();
        assert!(w.grad().is_none() && v.grad().is_some());
        w.unfreeze();
        assert!(w.get().is_leaf());
    }
}
