//! Loss scaling, for gradients in f16.

use super::clip::{expect_norm, for_each_grad, grad_norm};
use super::group::unless;
use super::state::{Reader, put_count, put_number};
use super::{Factor, Optimizer};
use crate::nn::{Param, StateDict};
use kiln_tensor::ops::optim::scale_;
use kiln_tensor::{Error, Result, Tensor};

/// Hyper-parameters of a [`GradScaler`].
#[derive(Clone, Copy, Debug)]
pub struct GradScalerOptions {
    /// The first factor.
    pub init_scale: f64,
    /// What the factor is multiplied by after `growth_interval` good steps in a row.
    pub growth_factor: f64,
    /// What it is multiplied by after a step whose gradients overflowed.
    pub backoff_factor: f64,
    /// Good steps before the factor grows.
    pub growth_interval: u64,
}

impl Default for GradScalerOptions {
    fn default() -> Self {
        Self { init_scale: 65536.0, growth_factor: 2.0, backoff_factor: 0.5, growth_interval: 2000 }
    }
}

/// Keeps gradients that pass through f16 away from zero: the loss is multiplied by a large factor, the gradients by its inverse before the
/// step. A factor so large that gradients overflow costs a step, which is left out, and is made smaller by [`update`](Self::update).
/// Several optimisers may share one factor, each with its own parameters: all step, then the factor is updated.
///
/// bf16 has f32's range and needs none of this.
///
/// Source: Micikevicius et al., *Mixed Precision Training*, 2018, section 3.2; names and defaults are PyTorch's.
///
/// ```
/// # use kiln_models::nn::Param;
/// # use kiln_models::optim::{GradScaler, GradScalerOptions, Optimizer, Sgd, SgdOptions};
/// # use kiln_autograd::TensorExt;
/// # use kiln_tensor::{DType, Result, Tensor, autocast};
/// # fn main() -> Result<()> {
/// let (x, w) = (Tensor::ones([2, 3], ())?, Param::new("w", &Tensor::ones([1, 3], ())?)?);
/// let params = [w.clone()];
/// let mut optimizer = Sgd::new(params.clone(), SgdOptions { lr: 0.1, ..Default::default() })?;
/// let mut scaler = GradScaler::new(GradScalerOptions::default())?;
/// for _ in 0..3 {
///     optimizer.zero_grad();
///     let loss = autocast(DType::F16, || x.linear(&w.get(), None)?.mean(()))??;
///     scaler.scale(&loss)?.backward()?;
///     scaler.step(&mut optimizer, &params)?;
///     scaler.update()?;
/// }
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct GradScaler {
    options: GradScalerOptions,
    scale: f64,
    /// Good steps since the factor changed.
    good_steps: u64,
    /// The parameters whose gradients were looked at since the factor was updated.
    seen: Vec<Seen>,
}

/// The parameters of one optimiser between two updates of the factor.
#[derive(Clone, Debug)]
struct Seen {
    params: Vec<Param>,
    /// Whether their gradients were finite.
    finite: bool,
    /// Whether they are unscaled in place.
    unscaled: bool,
    stepped: bool,
}

impl Seen {
    fn is_of(&self, params: &[Param]) -> bool {
        self.params.len() == params.len() && self.params.iter().zip(params).all(|(a, b)| a.is_same(b))
    }

    fn shares(&self, params: &[Param]) -> bool {
        params.iter().any(|param| self.params.iter().any(|own| own.is_same(param)))
    }
}

/// Complains about a factor that is not a positive number.
fn unless_scale(name: &str, value: f64) -> Option<String> {
    unless(value > 0.0 && value.is_finite(), name, value, "a positive number")
}

impl GradScaler {
    /// A scaler that has seen no step.
    ///
    /// # Errors
    /// If a factor or the interval is out of its domain.
    pub fn new(options: GradScalerOptions) -> Result<Self> {
        let GradScalerOptions { init_scale, growth_factor, backoff_factor, growth_interval } = options;
        let invalid = unless_scale("init_scale", init_scale)
            .or(unless(growth_factor >= 1.0 && growth_factor.is_finite(), "growth_factor", growth_factor, "a number from 1 on"))
            .or(unless(backoff_factor > 0.0 && backoff_factor <= 1.0, "backoff_factor", backoff_factor, "a value in (0, 1]"))
            .or(unless(growth_interval > 0, "growth_interval", growth_interval as f64, "at least 1"));
        match invalid {
            Some(message) => Err(Error::argument("GradScaler", message)),
            None => Ok(Self { options, scale: init_scale, good_steps: 0, seen: Vec::new() }),
        }
    }

    /// The factor of the next loss.
    pub fn current_scale(&self) -> f64 {
        self.scale
    }

    /// The loss times the factor, in f32 if it is of a half type: the scaled loss may be beyond f16.
    pub fn scale(&self, loss: &Tensor) -> Result<Tensor> {
        let wide = kiln_tensor::ops::optim::state_dtype(loss.dtype());
        loss.to_dtype(wide)?.mul_scalar(self.scale)
    }

    /// What is known of these parameters.
    fn known(&self, params: &[Param]) -> Result<Option<usize>> {
        let place = self.seen.iter().position(|seen| seen.is_of(params));
        if place.is_none() && self.seen.iter().any(|seen| seen.shares(params)) {
            let message = "some of these parameters were unscaled or stepped together with others; give each optimiser's as one list";
            return Err(Error::argument("GradScaler", message));
        }
        if place.is_some_and(|place| self.seen[place].stepped) {
            return Err(Error::argument(
                "GradScaler",
                "these parameters have had their step; call update() after the steps of an iteration",
            ));
        }
        Ok(place)
    }

    /// Divides the gradients by the factor in place, to look at them or change them between the backward pass and [`step`](Self::step).
    /// Returns whether all are finite. Called again, it changes nothing.
    ///
    /// # Errors
    /// If only some of the parameters were unscaled before, or they have had their step.
    pub fn unscale(&mut self, params: &[Param]) -> Result<bool> {
        if let Some(place) = self.known(params)? {
            return Ok(self.seen[place].finite);
        }
        let inverse = 1.0 / self.scale;
        for_each_grad(params, |grad| scale_(grad, inverse))?;
        let finite = grad_norm(params)?.is_finite();
        self.seen.push(Seen { params: params.to_vec(), finite, unscaled: true, stepped: false });
        Ok(finite)
    }

    /// A step of the optimiser with unscaled gradients, unless some are not finite. Returns whether the step was taken.
    /// [`update`](Self::update) belongs behind the steps of an iteration.
    ///
    /// The update divides by the factor as it reads the gradients, which stay scaled themselves, unless [`unscale`](Self::unscale) was called.
    ///
    /// # Errors
    /// Those of the optimiser; if the parameters have had their step since the last update.
    pub fn step(&mut self, optimizer: &mut dyn Optimizer, params: &[Param]) -> Result<bool> {
        self.step_clipped(optimizer, params, f64::INFINITY)
    }

    /// [`step`](Self::step) with the unscaled gradients clipped as by [`clip_grad_norm`](super::clip_grad_norm), in the same pass.
    ///
    /// # Errors
    /// As [`step`](Self::step), and if `max_norm` is negative or NaN.
    pub fn step_clipped(&mut self, optimizer: &mut dyn Optimizer, params: &[Param], max_norm: f64) -> Result<bool> {
        expect_norm("step_clipped", max_norm)?;
        let place = self.known(params)?.unwrap_or_else(|| {
            self.seen.push(Seen { params: params.to_vec(), finite: true, unscaled: false, stepped: false });
            self.seen.len() - 1
        });
        let seen = &mut self.seen[place];
        let inverse = if seen.unscaled { 1.0 } else { 1.0 / self.scale };
        let norm = if seen.finite { inverse * grad_norm(params)? } else { f64::NAN };
        seen.finite = norm.is_finite();
        if seen.finite {
            optimizer.step_scaled(&Factor::Number(inverse * (max_norm / (norm + 1e-6)).min(1.0)))?;
        }
        // Only now: after an error the gradients stay as they are.
        seen.stepped = true;
        Ok(seen.finite)
    }

    /// Adapts the factor to the steps since the last call: smaller if gradients of one were not finite, larger after enough good ones.
    ///
    /// # Errors
    /// If there was none.
    pub fn update(&mut self) -> Result<()> {
        if !self.seen.iter().any(|seen| seen.stepped) {
            return Err(Error::argument("GradScaler", "update() without a step since the last one"));
        }
        let overflowed = self.seen.iter().any(|seen| !seen.finite);
        self.seen.clear();
        if overflowed {
            // Never zero, whose inverse would be infinite.
            self.scale = (self.scale * self.options.backoff_factor).max(f64::from(f32::MIN_POSITIVE));
            self.good_steps = 0;
            return Ok(());
        }
        self.good_steps += 1;
        if self.good_steps == self.options.growth_interval {
            self.scale = (self.scale * self.options.growth_factor).min(f64::from(f32::MAX));
            self.good_steps = 0;
        }
        Ok(())
    }

    /// What the next steps depend on: `scale` and `good_steps`.
    pub fn state_dict(&self) -> Result<StateDict> {
        let mut dict = StateDict::new();
        put_number(&mut dict, "scale", self.scale)?;
        put_count(&mut dict, "good_steps", self.good_steps)?;
        Ok(dict)
    }

    /// Restores what [`state_dict`](Self::state_dict) gave.
    ///
    /// # Errors
    /// A missing or unexpected name, or a factor that is not positive. Then nothing has changed.
    pub fn load_state_dict(&mut self, dict: &StateDict) -> Result<()> {
        let reader = Reader::new(dict);
        let (scale, good_steps) = (reader.number("scale")?, reader.count("good_steps")?);
        reader.finish()?;
        if let Some(message) = unless_scale("scale", scale) {
            return Err(Error::argument("GradScaler", message));
        }
        (self.scale, self.good_steps, self.seen) = (scale, good_steps, Vec::new());
        Ok(())
    }
}
