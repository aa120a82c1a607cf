//! What all optimisers share: parameter groups, the states of each parameter, and saving them. A method supplies the update.

use super::Optimizer;
use super::clip::expect_norm;
use super::state::{Reader, put_count, put_number};
use crate::nn::{Param, StateDict};
use kiln_autograd::no_grad;
use kiln_tensor::ops::optim::{self, Factor, FusedRule, Update, state_dtype};
use kiln_tensor::{Error, Result, Shape, Tensor, profile};
use std::collections::{BTreeMap, HashSet};

/// One hyper-parameter, to read and to write: in a state dictionary all are numbers.
pub enum Field<'a> {
    /// A real number.
    Number(&'a mut f64),
    /// A switch, saved as 0 or 1.
    Flag(&'a mut bool),
    /// A count.
    Count(&'a mut usize),
}

impl Field<'_> {
    fn get(&self) -> f64 {
        match self {
            Field::Number(x) => **x,
            Field::Flag(x) => **x as u8 as f64,
            Field::Count(x) => **x as f64,
        }
    }

    fn set(&mut self, name: &str, value: f64) -> Result<()> {
        match self {
            Field::Number(x) => **x = value,
            Field::Flag(x) if value == 0.0 || value == 1.0 => **x = value == 1.0,
            Field::Count(x) if value >= 0.0 && value.fract() == 0.0 && value < 2f64.powi(53) => **x = value as usize,
            _ => return Err(Error::format("load_state_dict", format!("{name} cannot be {value}"))),
        }
        Ok(())
    }
}

/// A parameter that takes part in a step.
pub struct Work<'a> {
    /// Its content.
    pub param: &'a mut Tensor,
    /// Its gradient.
    pub grad: Tensor,
    /// Its states, in the order of [`Method::states`].
    pub states: Vec<&'a mut Tensor>,
    /// The number of this step of this parameter, from 1.
    pub step: u64,
    /// What the gradient is to be multiplied by: 1 unless the method takes it ([`Method::TAKES_FACTOR`]).
    pub factor: Factor,
}

impl Work<'_> {
    /// Replaces the content by what `f` makes of content, gradient and states, in the states' dtype: for methods that are composed
    /// of tensor operations. An error, before anything changes, if the gradient or a state does not fit.
    pub fn replace(mut self, f: impl FnOnce(&Tensor, &Tensor, &mut [&mut Tensor]) -> Result<Tensor>) -> Result<()> {
        let (shape, dtype) = (*self.param.shape(), self.param.dtype());
        if *self.grad.shape() != shape || self.grad.dtype() != dtype {
            let message = format!("the parameter is {dtype} {shape}, its gradient {} {}", self.grad.dtype(), self.grad.shape());
            return Err(Error::shape("optimizer step", message));
        }
        let wide = state_dtype(dtype);
        if let Some(state) = self.states.iter().find(|s| s.dtype() != wide) {
            return Err(Error::dtype_mismatch("optimizer step", wide, state.dtype()));
        }
        if shape.numel() == 0 {
            return Ok(());
        }
        let new = f(&self.param.detach().to_dtype(wide)?, &self.grad.detach().to_dtype(wide)?, &mut self.states)?;
        *self.param = self.param.with_data(&new.to_dtype(dtype)?.contiguous()?)?;
        Ok(())
    }
}

/// The hyper-parameters of an optimisation method, and what they do.
pub trait Method: Clone + Send + Sync + 'static {
    /// The method's name, for errors.
    const NAME: &'static str;

    /// Whether [`update`](Self::update) heeds [`Work::factor`]. Otherwise gradients are multiplied before it sees them.
    const TAKES_FACTOR: bool = false;

    /// Every hyper-parameter by name, `lr` among them.
    fn fields(&mut self) -> Vec<(&'static str, Field<'_>)>;

    /// The first hyper-parameter that is out of its domain, as text: `None` if all are fine.
    fn invalid(&self) -> Option<String>;

    /// Name and shape of the states of a parameter of `shape`; they begin with zeros, in [`state_dtype`].
    fn states(&self, shape: &Shape) -> Vec<(&'static str, Shape)>;

    /// Updates parameters and states.
    fn update(&self, work: Vec<Work<'_>>) -> Result<()>;
}

/// "`name` = value, expected domain", if `value` is not in its domain.
pub(super) fn unless(fits: bool, name: &str, value: f64, domain: &str) -> Option<String> {
    (!fits).then(|| format!("{name} = {value}, expected {domain}"))
}

/// Complains about a value that is negative, infinite or NaN.
pub(super) fn unless_positive(name: &str, value: f64) -> Option<String> {
    unless(value >= 0.0 && value.is_finite(), name, value, "a finite value ≥ 0")
}

/// Complains about a decay rate outside of [0, 1).
pub(super) fn unless_decay(name: &str, value: f64) -> Option<String> {
    unless((0.0..1.0).contains(&value), name, value, "a value in [0, 1)")
}

/// One fused pass over all parameters, whose factor is one, or one for each step number where these differ.
pub(super) fn fused<const N: usize, R: FusedRule<N>>(work: Vec<Work<'_>>, rule: impl Fn(u64) -> R) -> Result<()> {
    let mut by_step: BTreeMap<u64, Vec<Update<'_, N>>> = BTreeMap::new();
    let factor = work.first().map(|w| w.factor.clone()).unwrap_or_default();
    for Work { param, grad, states, step, .. } in work {
        let states = states.try_into().map_err(|_| Error::argument("optimizer step", "the rule has another number of states"))?;
        by_step.entry(step).or_default().push(Update { param, grad, states });
    }
    by_step.into_iter().try_for_each(|(step, updates)| optim::step_scaled(&rule(step), updates, &factor))
}

/// The states of a parameter that has taken steps.
#[derive(Clone)]
struct State {
    step: u64,
    tensors: Vec<(&'static str, Tensor)>,
}

impl State {
    /// States of the given layout: those of `old` that are in it, zeros for the others.
    fn new(layout: &[(&'static str, Shape)], param: &Param, old: Option<State>) -> Result<Self> {
        let (step, mut old) = old.map_or((0, Vec::new()), |s| (s.step, s.tensors));
        let mut tensors = Vec::with_capacity(layout.len());
        for &(name, shape) in layout {
            let tensor = match old.iter().position(|(n, t)| *n == name && *t.shape() == shape) {
                Some(i) => old.swap_remove(i).1,
                None => Tensor::zeros(shape, state_dtype(param.dtype()))?.to_device(param.get().device())?,
            };
            tensors.push((name, tensor));
        }
        Ok(Self { step, tensors })
    }

    fn fits(&self, layout: &[(&'static str, Shape)]) -> bool {
        self.tensors.iter().map(|(name, tensor)| (*name, *tensor.shape())).eq(layout.iter().copied())
    }

    fn save(&self, param: &Param, dict: &mut StateDict) -> Result<()> {
        put_count(dict, format!("state.{}.step", param.name()), self.step)?;
        for (name, tensor) in &self.tensors {
            dict.insert(format!("state.{}.{name}", param.name()), tensor.clone());
        }
        Ok(())
    }

    /// `None` if the parameter had taken no step.
    fn load(param: &Param, layout: &[(&'static str, Shape)], reader: &Reader<'_>) -> Result<Option<Self>> {
        let prefix = format!("state.{}", param.name());
        if !reader.contains(&format!("{prefix}.step")) {
            return Ok(None);
        }
        let step = reader.count(&format!("{prefix}.step"))?;
        let tensor = |&(name, shape): &(&'static str, Shape)| -> Result<_> {
            Ok((
                name,
                reader
                    .tensor(&format!("{prefix}.{name}"), &shape, state_dtype(param.dtype()))?
                    .to_device(param.get().device())?
                    .contiguous()?,
            ))
        };
        Ok(Some(Self { step, tensors: layout.iter().map(tensor).collect::<Result<_>>()? }))
    }
}

struct Group<M> {
    options: M,
    params: Vec<Param>,
    states: Vec<Option<State>>,
}

/// An optimiser: a [`Method`] over groups of parameters, each group with its own hyper-parameters.
pub struct GroupOptimizer<M> {
    groups: Vec<Group<M>>,
}

impl<M: Method> GroupOptimizer<M> {
    /// An optimiser of one group. An error if a hyper-parameter is out of its domain, or two parameters have one name.
    pub fn new(params: impl IntoIterator<Item = Param>, options: M) -> Result<Self> {
        let mut optimizer = Self { groups: Vec::new() };
        optimizer.add_group(params, options)?;
        Ok(optimizer)
    }

    /// Adds a group of parameters with hyper-parameters of its own. Errors are those of [`new`](Self::new).
    pub fn add_group(&mut self, params: impl IntoIterator<Item = Param>, options: M) -> Result<()> {
        validate(&options)?;
        let params: Vec<Param> = params.into_iter().collect();
        let mut names: HashSet<&str> = self.groups.iter().flat_map(|g| &g.params).map(Param::name).collect();
        if let Some(twice) = params.iter().find(|p| !names.insert(p.name())) {
            let message = format!("two parameters are called `{}`: a state dictionary could not tell them apart", twice.name());
            return Err(Error::argument(M::NAME, message));
        }
        let states = vec![None; params.len()];
        self.groups.push(Group { options, params, states });
        Ok(())
    }

    /// The hyper-parameters of each group.
    pub fn options(&self) -> impl Iterator<Item = &M> {
        self.groups.iter().map(|g| &g.options)
    }

    /// Changes the hyper-parameters of group `index`; an error, and no change, if the result is out of its domain or there is no such
    /// group. A state that the old ones did not need begins with zeros.
    pub fn set_options(&mut self, index: usize, change: impl FnOnce(&mut M)) -> Result<()> {
        let groups = self.groups.len();
        let group = self.groups.get_mut(index).ok_or_else(|| Error::index(M::NAME, format!("group {index} of {groups}")))?;
        let mut options = group.options.clone();
        change(&mut options);
        validate(&options)?;
        group.options = options;
        Ok(())
    }

    /// The parameters of all groups, in their order.
    pub fn params(&self) -> impl Iterator<Item = &Param> {
        self.groups.iter().flat_map(|g| &g.params)
    }
}

impl<M: Method + Default> GroupOptimizer<M> {
    /// One group with the method's default hyper-parameters and this learning rate.
    pub fn with_lr(params: impl IntoIterator<Item = Param>, lr: f64) -> Result<Self> {
        let mut options = M::default();
        set_lr(&mut options, lr);
        Self::new(params, options)
    }
}

fn validate<M: Method>(options: &M) -> Result<()> {
    options.invalid().map_or(Ok(()), |message| Err(Error::argument(M::NAME, message)))
}

fn lr<M: Method>(options: &M) -> f64 {
    options.clone().fields().iter().find(|(name, _)| *name == "lr").map_or(0.0, |(_, field)| field.get())
}

fn set_lr<M: Method>(options: &mut M, lr: f64) {
    for (name, field) in options.fields() {
        if let ("lr", Field::Number(x)) = (name, field) {
            *x = lr;
        }
    }
}

impl<M: Method> Group<M> {
    /// The parameters that take part in a step, by index, with their gradients.
    fn active(&self) -> impl Iterator<Item = (usize, Tensor)> {
        self.params.iter().enumerate().filter(|(_, p)| !p.is_frozen()).filter_map(|(i, p)| Some((i, p.grad()?)))
    }

    fn step(&mut self, factor: &Factor) -> Result<()> {
        let (indices, mut grads): (Vec<usize>, Vec<Tensor>) = self.active().unzip();
        let params: Vec<&Param> = indices.iter().map(|&i| &self.params[i]).collect();
        for &i in &indices {
            let layout = self.options.states(&self.params[i].shape());
            if !self.states[i].as_ref().is_some_and(|s| s.fits(&layout)) {
                self.states[i] = Some(State::new(&layout, &self.params[i], self.states[i].take())?);
            }
        }
        let mut states: Vec<&mut State> =
            self.states.iter_mut().enumerate().filter(|(i, _)| indices.binary_search(i).is_ok()).filter_map(|(_, s)| s.as_mut()).collect();
        let mut factor = factor.clone();
        if !M::TAKES_FACTOR {
            let number = std::mem::take(&mut factor).number()?;
            if number.is_nan() {
                states.iter_mut().for_each(|s| s.step += 1);
                return Ok(());
            }
            if number != 1.0 {
                no_grad(|| grads.iter_mut().try_for_each(|grad| grad.mul_scalar(number).map(|scaled| *grad = scaled)))?;
            }
        }
        Param::update_all(&params, |tensors| {
            let work = tensors.iter_mut().zip(grads).zip(&mut states).map(|((param, grad), state)| Work {
                param,
                grad,
                step: state.step + 1,
                states: state.tensors.iter_mut().map(|(_, t)| t).collect(),
                factor: factor.clone(),
            });
            no_grad(|| self.options.update(work.collect()))
        })?;
        states.iter_mut().for_each(|s| s.step += 1);
        Ok(())
    }
}

impl<M: Method> Optimizer for GroupOptimizer<M> {
    fn step_scaled(&mut self, factor: &Factor) -> Result<()> {
        let _running = profile::composite(|| format!("{}.step", M::NAME).into());
        self.groups.iter_mut().try_for_each(|group| group.step(factor))
    }

    fn step_clipped(&mut self, max_norm: f64) -> Result<Tensor> {
        expect_norm("step_clipped", max_norm)?;
        let grads: Vec<Tensor> = self.groups.iter().flat_map(|group| group.active().map(|(_, grad)| grad)).collect();
        let (norm, factor) = optim::clip_factor(&grads, max_norm)?;
        self.step_scaled(&factor)?;
        Ok(norm)
    }

    fn zero_grad(&self) {
        self.params().for_each(Param::zero_grad);
    }

    fn lrs(&self) -> Vec<f64> {
        self.options().map(lr).collect()
    }

    fn set_lrs(&mut self, lrs: &[f64]) -> Result<()> {
        let mut options: Vec<M> = self.options().cloned().collect();
        if options.len() != lrs.len() {
            return Err(Error::argument(M::NAME, format!("{} learning rates for {} groups", lrs.len(), options.len())));
        }
        for (options, &lr) in options.iter_mut().zip(lrs) {
            set_lr(options, lr);
            validate(options)?;
        }
        self.groups.iter_mut().zip(options).for_each(|(group, options)| group.options = options);
        Ok(())
    }

    fn state_dict(&self) -> Result<StateDict> {
        let mut dict = StateDict::new();
        for (i, group) in self.groups.iter().enumerate() {
            for (name, field) in group.options.clone().fields() {
                put_number(&mut dict, format!("group.{i}.{name}"), field.get())?;
            }
            for (param, state) in group.params.iter().zip(&group.states) {
                state.iter().try_for_each(|s| s.save(param, &mut dict))?;
            }
        }
        Ok(dict)
    }

    fn load_state_dict(&mut self, dict: &StateDict) -> Result<()> {
        let reader = Reader::new(dict);
        let mut loaded = Vec::with_capacity(self.groups.len());
        for (i, group) in self.groups.iter().enumerate() {
            let mut options = group.options.clone();
            for (name, mut field) in options.fields() {
                let name = format!("group.{i}.{name}");
                field.set(&name, reader.number(&name)?)?;
            }
            validate(&options)?;
            let states = group.params.iter().map(|p| State::load(p, &options.states(&p.shape()), &reader)).collect::<Result<Vec<_>>>()?;
            loaded.push((options, states));
        }
        reader.finish()?;
        for (group, (options, states)) in self.groups.iter_mut().zip(loaded) {
            (group.options, group.states) = (options, states);
        }
        Ok(())
    }
}
