//! The exponential moving average of parameters and buffers: a smoother model to evaluate and sample with.

use super::state::{Reader, put_count, put_number};
use crate::nn::{Buffer, Param, StateDict};
use kiln_autograd::no_grad;
use kiln_tensor::ops::optim::{self, Average, Update, state_dtype};
use kiln_tensor::{DType, Error, Result, Shape, Tensor, profile};

/// A moving average of parameters (Polyak and Juditsky, 1992): after each step of the optimiser `a ← a + (1 − d)(p − a)`.
///
/// With warm-up the decay of update t (from 0) is `d = min(decay, (1 + t) / (10 + t))`, so that the first, random weights are soon
/// forgotten. Averages of f16 and bf16 parameters are kept in f32.
pub struct Ema {
    decay: f64,
    warmup: bool,
    updates: u64,
    members: Vec<Member>,
    averages: Vec<Tensor>,
    /// The trained weights, while the members hold the averages.
    trained: Option<Vec<Tensor>>,
}

impl Ema {
    /// Averages that begin with the current values of `params`. `decay` must be in [0, 1].
    pub fn new(params: impl IntoIterator<Item = Param>, decay: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&decay) {
            return Err(Error::argument("Ema", format!("decay = {decay}, expected a value in [0, 1]")));
        }
        let mut ema = Self { decay, warmup: false, updates: 0, members: Vec::new(), averages: Vec::new(), trained: None };
        params.into_iter().try_for_each(|p| ema.push(Member::Param(p)))?;
        Ok(ema)
    }

    /// Averages the floating-point ones of `buffers` too, from their current values: running statistics that fit the averaged weights.
    pub fn with_buffers(mut self, buffers: impl IntoIterator<Item = Buffer>) -> Result<Self> {
        buffers.into_iter().filter(|b| b.dtype().is_float()).try_for_each(|b| self.push(Member::Buffer(b)))?;
        Ok(self)
    }

    fn push(&mut self, member: Member) -> Result<()> {
        self.averages.push(in_state_dtype(&member.get())?.copy()?);
        self.members.push(member);
        Ok(())
    }

    /// With warm-up of the decay.
    pub fn with_warmup(mut self) -> Self {
        self.warmup = true;
        self
    }

    /// The decay that the next update will use.
    pub fn current_decay(&self) -> f64 {
        let t = self.updates as f64;
        if self.warmup { self.decay.min((1.0 + t) / (10.0 + t)) } else { self.decay }
    }

    /// Number of updates so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Takes the parameters' current values into the averages; call it after each step of the optimiser.
    /// An error while the averages are swapped in.
    pub fn update(&mut self) -> Result<()> {
        let _running = profile::composite(|| "Ema.update".into());
        if self.trained.is_some() {
            return Err(Error::argument("Ema", "the parameters hold the averages; call swap_out() first"));
        }
        let rule = Average { weight: 1.0 - self.current_decay() };
        let values = self.members.iter().map(|m| in_state_dtype(&m.get())).collect::<Result<Vec<_>>>()?;
        let updates = self.averages.iter_mut().zip(values).map(|(param, grad)| Update { param, grad, states: [] });
        optim::step(&rule, updates.collect())?;
        self.updates += 1;
        Ok(())
    }

    /// The averages: of the parameters in their order, then of the buffers.
    pub fn averages(&self) -> &[Tensor] {
        &self.averages
    }

    /// Puts the averages into the parameters. An error if they are there already.
    pub fn swap_in(&mut self) -> Result<()> {
        if self.trained.is_some() {
            return Err(Error::argument("Ema", "the averages are swapped in already"));
        }
        // Handles, not copies: the parameters get other storage below.
        let trained: Vec<Tensor> = self.members.iter().map(Member::get).collect();
        let averages = self.averages.iter().zip(&trained).map(|(a, t)| a.to_dtype(t.dtype())).collect::<Result<Vec<_>>>()?;
        set_all(&self.members, &averages)?;
        self.trained = Some(trained);
        Ok(())
    }

    /// Puts the trained weights back. An error if the averages are not swapped in.
    pub fn swap_out(&mut self) -> Result<()> {
        let trained = self.trained.take().ok_or_else(|| Error::argument("Ema", "the averages are not swapped in"))?;
        set_all(&self.members, &trained)
    }

    /// Runs `f` without recording while the parameters hold the averages, and puts the trained weights back after it, after an
    /// error too.
    pub fn evaluate<R>(&mut self, f: impl FnOnce() -> Result<R>) -> Result<R> {
        self.swap_in()?;
        let result = no_grad(f);
        self.swap_out()?;
        result
    }

    /// Decay, number of updates, and `average.<name of parameter or buffer>`.
    pub fn state_dict(&self) -> Result<StateDict> {
        let mut dict = StateDict::new();
        put_number(&mut dict, "decay", self.decay)?;
        put_number(&mut dict, "warmup", self.warmup as u8 as f64)?;
        put_count(&mut dict, "updates", self.updates)?;
        for (member, average) in self.members.iter().zip(&self.averages) {
            dict.insert(format!("average.{}", member.name()), average.clone());
        }
        Ok(dict)
    }

    /// Restores what [`state_dict`](Self::state_dict) gave; an error, and no change, if it does not fit or the averages are swapped in.
    pub fn load_state_dict(&mut self, dict: &StateDict) -> Result<()> {
        if self.trained.is_some() {
            return Err(Error::argument("Ema", "the parameters hold the averages; call swap_out() first"));
        }
        let reader = Reader::new(dict);
        let (decay, warmup, updates) = (reader.number("decay")?, reader.number("warmup")? != 0.0, reader.count("updates")?);
        if !(0.0..=1.0).contains(&decay) {
            return Err(Error::format("load_state_dict", format!("decay = {decay}, expected a value in [0, 1]")));
        }
        let average = |m: &Member| reader.tensor(&format!("average.{}", m.name()), &m.shape(), state_dtype(m.dtype()))?.contiguous();
        let moved = |(m, now): (&Member, &Tensor)| average(m)?.to_device(now.device());
        let averages = self.members.iter().zip(&self.averages).map(moved).collect::<Result<_>>()?;
        reader.finish()?;
        (self.decay, self.warmup, self.updates, self.averages) = (decay, warmup, updates, averages);
        Ok(())
    }
}

fn in_state_dtype(tensor: &Tensor) -> Result<Tensor> {
    tensor.detach().to_dtype(state_dtype(tensor.dtype()))
}

fn set_all(members: &[Member], tensors: &[Tensor]) -> Result<()> {
    members.iter().zip(tensors).try_for_each(|(member, tensor)| member.set(tensor))
}

/// What is averaged.
enum Member {
    Param(Param),
    Buffer(Buffer),
}

impl Member {
    fn name(&self) -> &str {
        match self {
            Member::Param(p) => p.name(),
            Member::Buffer(b) => b.name(),
        }
    }

    fn shape(&self) -> Shape {
        match self {
            Member::Param(p) => p.shape(),
            Member::Buffer(b) => b.shape(),
        }
    }

    fn dtype(&self) -> DType {
        match self {
            Member::Param(p) => p.dtype(),
            Member::Buffer(b) => b.dtype(),
        }
    }

    /// The content, untracked.
    fn get(&self) -> Tensor {
        match self {
            Member::Param(p) => p.get().detach(),
            Member::Buffer(b) => b.get(),
        }
    }

    fn set(&self, tensor: &Tensor) -> Result<()> {
        match self {
            Member::Param(p) => p.set(tensor),
            Member::Buffer(b) => b.set(tensor),
        }
    }
}
