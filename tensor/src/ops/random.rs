//! Random tensors, from an explicit [`Generator`] or the global one, and dropout.
//!
//! A draw is a pure function of the generator's state and the element's place in row-major order (see [`kiln_kernels::cpu::random`]), on any number of threads
//! and at any instruction-set level; a GPU draws the same (f64 normals to rounding). The functions on `Tensor` draw from [`Generator::global`].

use crate::device::default_device;
use crate::generator::GeneratorState;
use crate::graph::{Ctx, Grads, Op, record, refuse_tracked};
use crate::profile::{Cost, operation};
use crate::torch_cpu::{self, TorchCpu};
use crate::{DType, Device, Dims, Error, Generator, IntoShape, Layout, Result, Shape, Tensor, TensorOptions};
use kiln_kernels::cpu::random::{self, RandomFloat, Stream};
use kiln_kernels::cuda::random as gpu_random;
use kiln_kernels::element::{Bool, Element};

pub(super) fn stream(state: GeneratorState) -> Stream {
    Stream { seed: state.seed, offset: state.offset }
}

impl Generator {
    fn float(&self, op: &'static str, shape: Shape, options: TensorOptions, draw: Draw) -> Result<Tensor> {
        let _running = operation(op, &[], || Cost::NONE);
        if options.dtype.is_float()
            && let Some(drawn) = self.torch(|generator| torch_floats(generator, &shape, options.dtype, draw))
        {
            return drawn?.to_device(options.device);
        }
        for_float!(options.dtype, op, T => {
            let stream = stream(self.reserve(<T as RandomFloat>::groups(shape.numel())));
            if let Some(gpu) = options.device.gpu()? {
                return Tensor::build_on_gpu(gpu, Layout::contiguous(shape), options.dtype, |mut out| {
                    let drawn = match draw {
                        Draw::Uniform => gpu_random::uniform(gpu, stream, &mut out),
                        Draw::Normal => gpu_random::normal(gpu, stream, &mut out),
                    };
                    Ok(drawn?)
                });
            }
            Tensor::build::<T>(Device::Cpu, &shape, |out| {
                match draw {
                    Draw::Uniform => T::uniform(stream, out),
                    Draw::Normal => T::normal(stream, out),
                }
                Ok(())
            })
        })
    }

    /// Uniform numbers in [0, 1).
    pub fn rand(&self, shape: impl IntoShape, options: impl Into<TensorOptions>) -> Result<Tensor> {
        self.float("rand", shape.into_shape()?, options.into(), Draw::Uniform)
    }

    /// Standard normal numbers.
    pub fn randn(&self, shape: impl IntoShape, options: impl Into<TensorOptions>) -> Result<Tensor> {
        self.float("randn", shape.into_shape()?, options.into(), Draw::Normal)
    }

    /// Integers in `low..high`, as i64.
    pub fn randint(&self, low: i64, high: i64, shape: impl IntoShape) -> Result<Tensor> {
        self.integers(low, high, shape.into_shape()?)
    }

    fn integers(&self, low: i64, high: i64, shape: Shape) -> Result<Tensor> {
        let _running = operation("randint", &[], || Cost::NONE);
        if low >= high {
            return Err(Error::argument("randint", format!("the range {low}..{high} is empty")));
        }
        let range = high.wrapping_sub(low) as u64;
        let drawn = self.torch(|generator| {
            Tensor::build::<i64>(Device::Cpu, &shape, |out| {
                out.iter_mut().for_each(|x| *x = generator.integer(low, range));
                Ok(())
            })
        });
        if let Some(drawn) = drawn {
            return drawn?.to_device(default_device());
        }
        let stream = stream(self.reserve(random::groups_of_longs(shape.numel())));
        if let Some(gpu) = default_device().gpu()? {
            let out = Tensor::build_on_gpu(gpu, Layout::contiguous(shape), DType::I64, |mut out| {
                Ok(gpu_random::integers(gpu, stream, low, high.wrapping_sub(low) as u64, &mut out)?)
            })?;
            return Ok(out.within(low, high - 1));
        }
        Tensor::build::<i64>(Device::Cpu, &shape, |out| {
            random::integers(stream, low, high.wrapping_sub(low) as u64, out);
            Ok(())
        })
    }

    /// The numbers `0..n` in random order, as i64.
    pub fn randperm(&self, n: usize) -> Result<Tensor> {
        let _running = operation("randperm", &[], || Cost::NONE);
        let shape = Shape::new(&[n])?;
        let drawn = self.torch(|generator| {
            Tensor::build::<i64>(Device::Cpu, &shape, |out| {
                generator.permutation(out);
                Ok(())
            })
        });
        if let Some(drawn) = drawn {
            return drawn?.to_device(default_device());
        }
        let stream = stream(self.reserve(random::groups_of_longs(n)));
        if let Some(gpu) = default_device().gpu()? {
            let out = Tensor::build_on_gpu(gpu, Layout::contiguous(shape), DType::I64, |mut out| {
                Ok(gpu_random::permutation(gpu, stream, &mut out)?)
            })?;
            return Ok(out.within(0, n as i64 - 1));
        }
        Tensor::build::<i64>(Device::Cpu, &shape, |out| {
            random::permutation(stream, out);
            Ok(())
        })
    }

    /// Ones with probability `probabilities[i]`, else zeros, in its dtype. Untracked.
    pub fn bernoulli(&self, probabilities: &Tensor) -> Result<Tensor> {
        let _running = operation("bernoulli", &[probabilities], || Cost::NONE);
        refuse_tracked("bernoulli", &[probabilities])?;
        self.counters("bernoulli", 0)?;
        let p = probabilities.detach().contiguous()?;
        let uniform = self.rand(p.shape(), (DType::F32, p.device()))?;
        if p.device() != Device::Cpu {
            return drawn_on_gpu(&uniform, &p);
        }
        let uniform = uniform.as_slice::<f32>()?;
        for_float!(p.dtype(), "bernoulli", T => {
            let p = p.as_slice::<T>()?;
            if let Some(p) = p.iter().map(|p| Element::to_f64(*p)).find(|p| !(0.0..=1.0).contains(p)) {
                return Err(Error::argument("bernoulli", format!("{p} is not a probability")));
            }
            Tensor::build::<T>(Device::Cpu, probabilities.shape(), |out| {
                for ((o, p), &u) in out.iter_mut().zip(p).zip(uniform) {
                    *o = <T as Element>::from_f64(((u as f64) < Element::to_f64(*p)) as u8 as f64);
                }
                Ok(())
            })
        })
    }

    /// Booleans that are true with probability `p`.
    pub fn rand_bool(&self, p: f64, shape: impl IntoShape) -> Result<Tensor> {
        self.booleans(p, shape.into_shape()?)
    }

    fn booleans(&self, p: f64, shape: Shape) -> Result<Tensor> {
        let _running = operation("rand_bool", &[], || Cost::NONE);
        check_probability("rand_bool", p)?;
        let stream = stream(self.counters("rand_bool", random::groups_of_words(shape.numel()))?);
        if let Some(gpu) = default_device().gpu()? {
            return Tensor::build_on_gpu(gpu, Layout::contiguous(shape), DType::Bool, |mut out| {
                Ok(gpu_random::bernoulli(gpu, stream, p, &mut out)?)
            });
        }
        Tensor::build::<Bool>(Device::Cpu, &shape, |out| {
            random::bernoulli(stream, p, out);
            Ok(())
        })
    }

    /// `x` with each element zero with probability `p`, and multiplied by `1 / (1 − p)` otherwise. No mask is stored: the backward pass
    /// draws it again.
    pub fn dropout(&self, x: &Tensor, p: f64) -> Result<Tensor> {
        check_probability("dropout", p)?;
        let stream = stream(self.counters("dropout", random::groups_of_words(x.numel()))?);
        dropped(x, stream, p)
    }
}

/// Ones where the uniform lies below the probability, as the host's loop compares them: in f64. The check of the probabilities waits for the GPU.
fn drawn_on_gpu(uniform: &Tensor, p: &Tensor) -> Result<Tensor> {
    let wide = p.to_dtype(DType::F64)?;
    if p.numel() > 0 {
        // Either is NaN if a probability is.
        for extreme in [wide.min(Dims::All)?, wide.max(Dims::All)?] {
            check_probability("bernoulli", extreme.item::<f64>()?)?;
        }
    }
    uniform.to_dtype(DType::F64)?.lt(&wide)?.to_dtype(p.dtype())
}

/// What PyTorch draws in a dtype, on the host. But for f64, and for normals that come in pairs, it computes in f32 and rounds; a uniform
/// number that would round to 1 becomes 0.
fn torch_floats(generator: &mut TorchCpu, shape: &Shape, dtype: DType, draw: Draw) -> Result<Tensor> {
    let drawn = Tensor::build::<f64>(Device::Cpu, shape, |out| {
        match draw {
            Draw::Uniform => generator.fill_uniform(out, dtype),
            Draw::Normal => generator.fill_normal(out, dtype),
        }
        Ok(())
    })?;
    match draw {
        Draw::Uniform => {
            let rounded = drawn.to_dtype(dtype)?;
            rounded.masked_fill(&rounded.ge_scalar(1.0)?, 0.0)
        }
        Draw::Normal if dtype == DType::F64 || shape.numel() < torch_cpu::BLOCK => drawn.to_dtype(dtype),
        Draw::Normal => drawn.to_dtype(DType::F32)?.to_dtype(dtype),
    }
}

#[derive(Clone, Copy)]
enum Draw {
    Uniform,
    Normal,
}

fn check_probability(op: &str, p: f64) -> Result<()> {
    if (0.0..=1.0).contains(&p) { Ok(()) } else { Err(Error::argument(op, format!("{p} is not a probability"))) }
}

/// Dropout is linear: its gradient is the same dropout.
struct Dropout {
    stream: Stream,
    p: f64,
}

impl Op for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some(dropped(grad, self.stream, self.p)?)])
    }
}

/// Dropout from a place of the stream that has been reserved.
pub(super) fn dropped(x: &Tensor, stream: Stream, p: f64) -> Result<Tensor> {
    let _running = operation("dropout", &[x], || Cost::per_element(1));
    let dense = x.detach().contiguous()?;
    let out = match x.gpu()? {
        Some(gpu) if x.dtype().is_float() => Tensor::build_on_gpu(gpu, Layout::contiguous(*x.shape()), x.dtype(), |mut out| {
            Ok(gpu_random::dropout(gpu, stream, p, dense.gpu_slice()?, &mut out)?)
        }),
        _ => for_float!(x.dtype(), "dropout", T => Tensor::build::<T>(x.device(), x.shape(), |out| {
            random::dropout(stream, p, dense.as_slice::<T>()?, out);
            Ok(())
        })),
    }?;
    record("dropout", out, &[x], |_| Dropout { stream, p })
}

impl Tensor {
    /// Uniform numbers in [0, 1).
    ///
    /// ```
    /// # use kiln_tensor::{Tensor, manual_seed, Result};
    /// # fn main() -> Result<()> {
    /// manual_seed(7);
    /// let a = Tensor::rand([2, 3], ())?.to_vec::<f32>()?;
    /// manual_seed(7);
    /// assert_eq!(a, Tensor::rand([2, 3], ())?.to_vec::<f32>()?);
    /// # Ok(()) }
    /// ```
    pub fn rand(shape: impl IntoShape, options: impl Into<TensorOptions>) -> Result<Tensor> {
        Generator::global().rand(shape, options)
    }

    /// Standard normal numbers.
    pub fn randn(shape: impl IntoShape, options: impl Into<TensorOptions>) -> Result<Tensor> {
        Generator::global().randn(shape, options)
    }

    /// Integers in `low..high`, as i64.
    pub fn randint(low: i64, high: i64, shape: impl IntoShape) -> Result<Tensor> {
        Generator::global().randint(low, high, shape)
    }

    /// The numbers `0..n` in random order, as i64.
    pub fn randperm(n: usize) -> Result<Tensor> {
        Generator::global().randperm(n)
    }

    /// Uniform numbers in [0, 1), in this tensor's shape and dtype.
    pub fn rand_like(&self) -> Result<Tensor> {
        Tensor::rand(self.shape(), self)
    }

    /// Standard normal numbers, in this tensor's shape and dtype.
    pub fn randn_like(&self) -> Result<Tensor> {
        Tensor::randn(self.shape(), self)
    }

    /// Ones with the probabilities that this tensor holds, else zeros, in its dtype. Untracked.
    pub fn bernoulli(&self) -> Result<Tensor> {
        Generator::global().bernoulli(self)
    }

    /// In training, each element is zeroed with probability `p` and multiplied by `1 / (1 − p)` otherwise (Srivastava et al., 2014); the tensor
    /// itself if not in training. No mask is stored: the backward pass draws it again.
    pub fn dropout(&self, p: f64, training: bool) -> Result<Tensor> {
        check_probability("dropout", p)?;
        if !training || p == 0.0 {
            return Ok(self.clone());
        }
        Generator::global().dropout(self, p)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generator_continues_and_replays() {
        let g = Generator::new(5);
        let first: Vec<f32> = g.randn([100], ()).unwrap().to_vec().unwrap();
        let state = g.state();
        let second: Vec<f32> = g.randn([100], ()).unwrap().to_vec().unwrap();
        assert_ne!(first, second);
        g.set_state(state);
        assert_eq!(g.randn([100], ()).unwrap().to_vec::<f32>().unwrap(), second);
        g.manual_seed(5);
        assert_eq!(g.randn([100], ()).unwrap().to_vec::<f32>().unwrap(), first);
    }

    #[test]
    fn draws_do_not_overlap() {
        let g = Generator::new(5);
        let whole: Vec<f32> = g.rand([256], ()).unwrap().to_vec().unwrap();
        g.manual_seed(5);
        let parts: Vec<f32> = [64, 128, 64].iter().flat_map(|&n| g.rand([n], ()).unwrap().to_vec::<f32>().unwrap()).collect();
        assert_eq!(whole, parts);
    }

    #[test]
    fn arguments_are_checked() {
        let g = Generator::new(0);
        assert!(g.randint(3, 3, [2]).is_err());
        assert!(g.rand([2], DType::I64).is_err());
        assert!(g.rand_bool(1.5, [2]).is_err());
        assert!(g.dropout(&Tensor::ones([2], ()).unwrap(), f64::NAN).is_err());
        assert!(g.bernoulli(&Tensor::full([2], 1.5, ()).unwrap()).is_err());
        assert!(g.randint(i64::MIN, i64::MAX, [2]).is_ok());
    }

    #[test]
    fn every_distribution_keeps_to_its_range() {
        let g = Generator::new(1);
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            let u: Vec<f64> = g.rand([1000], dtype).unwrap().to_dtype(DType::F64).unwrap().to_vec().unwrap();
            assert!(u.iter().all(|u| (0.0..1.0).contains(u)));
        }
        assert!(g.randint(-2, 3, [1000]).unwrap().to_vec::<i64>().unwrap().iter().all(|x| (-2..3).contains(x)));
        let mut order = g.randperm(100).unwrap().to_vec::<i64>().unwrap();
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
        let share = g.rand_bool(0.25, [10_000]).unwrap().to_vec::<bool>().unwrap().iter().filter(|&&b| b).count();
        assert!((2300..2700).contains(&share));
        let p = Tensor::from_vec(vec![0f32, 1.0, 0.0, 1.0], [4]).unwrap();
        assert_eq!(g.bernoulli(&p).unwrap().to_vec::<f32>().unwrap(), [0.0, 1.0, 0.0, 1.0]);
    }
}
