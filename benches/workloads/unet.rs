//! A diffusion U-Net of 28×28 pixels to time: the model of `benches/compare/torch_bench.py` (channels c, 2c, 2c).

use crate::Bench;
use kiln::nn::{Conv2d, ConvOptions, GroupNorm, Linear};
use kiln::ops::upsample::Interpolation;
use kiln::optim::{AdamW, AdamWOptions};
use kiln::prelude::*;
use kiln::{Activation, AttentionOptions, Result, autocast};

fn conv(params: &Params, inputs: usize, outputs: usize, kernel: usize, stride: usize) -> Result<Conv2d> {
    Conv2d::new(params, inputs, outputs, kernel, ConvOptions::new().with_stride(stride).with_padding(kernel / 2))
}

struct Residual {
    norms: [GroupNorm; 2],
    convs: [Conv2d; 2],
    time: Linear,
    skip: Option<Conv2d>,
}

impl Residual {
    fn new(params: &Params, inputs: usize, outputs: usize, time: usize) -> Result<Self> {
        let skip = || conv(&params.scope("skip"), inputs, outputs, 1, 1);
        Ok(Self {
            norms: [GroupNorm::new(&params.scope("norm0"), 8, inputs)?, GroupNorm::new(&params.scope("norm1"), 8, outputs)?],
            convs: [conv(&params.scope("conv0"), inputs, outputs, 3, 1)?, conv(&params.scope("conv1"), outputs, outputs, 3, 1)?],
            time: Linear::new(&params.scope("time"), time, outputs, true)?,
            skip: if inputs == outputs { None } else { Some(skip()?) },
        })
    }

    fn forward(&self, x: &Tensor, time: &Tensor) -> Result<Tensor> {
        let t = self.time.forward(&time.silu()?)?.unsqueeze(-1)?.unsqueeze(-1)?;
        let h = self.convs[0].forward(&self.norms[0].forward_activated(x, Activation::Silu)?)?.add(&t)?;
        let h = self.convs[1].forward(&self.norms[1].forward_activated(&h, Activation::Silu)?)?;
        match &self.skip {
            Some(skip) => skip.forward(x)?.add(&h),
            None => x.add(&h),
        }
    }
}

struct SelfAttention {
    norm: GroupNorm,
    qkv: Conv2d,
    out: Conv2d,
}

impl SelfAttention {
    fn new(params: &Params, channels: usize) -> Result<Self> {
        Ok(Self {
            norm: GroupNorm::new(&params.scope("norm"), 8, channels)?,
            qkv: conv(&params.scope("qkv"), channels, 3 * channels, 1, 1)?,
            out: conv(&params.scope("out"), channels, channels, 1, 1)?,
        })
    }
}

impl Module for SelfAttention {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [b, c, h, w] = x.dims_n("attention")?;
        let parts = self.qkv.forward(&self.norm.forward(x)?)?.chunk(3, 1)?;
        // (B, 4, H·W, C/4)
        let heads = |x: &Tensor| x.reshape([b, 4, c / 4, h * w])?.transpose(-1, -2);
        let y = heads(&parts[0])?.scaled_dot_product_attention(&heads(&parts[1])?, &heads(&parts[2])?, &AttentionOptions::default())?;
        x.add(&self.out.forward(&y.transpose(-1, -2)?.reshape([b, c, h, w])?)?)
    }
}

struct UNet {
    time: [Linear; 2],
    first: Conv2d,
    down: [Residual; 3],
    shrink: [Conv2d; 2],
    middle: [Residual; 2],
    attention: [SelfAttention; 3],
    up: [Residual; 3],
    grow: [Conv2d; 2],
    norm: GroupNorm,
    last: Conv2d,
    channels: usize,
}

impl UNet {
    fn new(params: &Params, c: usize) -> Result<Self> {
        let t = 4 * c;
        let at = |name: &str, i: usize| params.scope(name).index(i);
        let residual = |name: &str, i, inputs, outputs| Residual::new(&at(name, i), inputs, outputs, t);
        Ok(Self {
            time: [Linear::new(&at("time", 0), c, t, true)?, Linear::new(&at("time", 1), t, t, true)?],
            first: conv(&params.scope("first"), 1, c, 3, 1)?,
            down: [residual("down", 0, c, c)?, residual("down", 1, c, 2 * c)?, residual("down", 2, 2 * c, 2 * c)?],
            shrink: [conv(&at("shrink", 0), c, c, 3, 2)?, conv(&at("shrink", 1), 2 * c, 2 * c, 3, 2)?],
            middle: [residual("middle", 0, 2 * c, 2 * c)?, residual("middle", 1, 2 * c, 2 * c)?],
            attention: [
                SelfAttention::new(&at("attention", 0), 2 * c)?,
                SelfAttention::new(&at("attention", 1), 2 * c)?,
                SelfAttention::new(&at("attention", 2), 2 * c)?,
            ],
            up: [residual("up", 0, 4 * c, 2 * c)?, residual("up", 1, 4 * c, 2 * c)?, residual("up", 2, 2 * c, c)?],
            grow: [conv(&at("grow", 0), 2 * c, 2 * c, 3, 1)?, conv(&at("grow", 1), 2 * c, c, 3, 1)?],
            norm: GroupNorm::new(&params.scope("norm"), 8, c)?,
            last: conv(&params.scope("last"), c, 1, 3, 1)?,
            channels: c,
        })
    }

    /// The embedding (B, 4c) of steps (B).
    fn embed(&self, steps: &Tensor) -> Result<Tensor> {
        let half = self.channels / 2;
        let frequencies = Tensor::arange(0.0, half as f64, 1.0, ())?.mul_scalar(-(1e4f64.ln()) / half as f64)?.exp()?;
        let angles = steps.unsqueeze(-1)?.mul(&frequencies)?;
        let waves = Tensor::cat(&[angles.sin()?, angles.cos()?], -1)?;
        self.time[1].forward(&self.time[0].forward(&waves)?.silu()?)
    }

    fn forward(&self, x: &Tensor, steps: &Tensor) -> Result<Tensor> {
        let t = self.embed(steps)?;
        let twice = |x: &Tensor| x.interpolate([2 * x.dim(-2)?, 2 * x.dim(-1)?], Interpolation::Nearest);
        let h1 = self.down[0].forward(&self.first.forward(x)?, &t)?;
        let h2 = self.attention[0].forward(&self.down[1].forward(&self.shrink[0].forward(&h1)?, &t)?)?;
        let h3 = self.down[2].forward(&self.shrink[1].forward(&h2)?, &t)?;
        let m = self.attention[1].forward(&self.middle[0].forward(&h3, &t)?)?;
        let m = self.middle[1].forward(&m, &t)?;
        let u = twice(&self.up[0].forward(&Tensor::cat(&[&m, &h3], 1)?, &t)?)?;
        let u = self.up[1].forward(&Tensor::cat(&[&self.grow[0].forward(&u)?, &h2], 1)?, &t)?;
        let u = self.grow[1].forward(&twice(&self.attention[2].forward(&u)?)?)?;
        let u = self.up[2].forward(&Tensor::cat(&[&u, &h1], 1)?, &t)?;
        self.last.forward(&self.norm.forward(&u)?.silu()?)
    }
}

pub fn run(bench: &Bench) -> Result<()> {
    for (train, infer, half) in
        [("train_unet28_c64_b32", "infer_unet28_c64_b32", false), ("train_unet28_bf16_c64_b32", "infer_unet28_bf16_c64_b32", true)]
    {
        if bench.wants(&format!("{train} {infer}")) {
            step(bench, train, infer, half)?;
        }
    }
    Ok(())
}

fn step(bench: &Bench, train: &str, infer: &str, half: bool) -> Result<()> {
    let params = Params::new();
    let model = UNet::new(&params, 64)?;
    let mut optimizer = AdamW::new(params.params(), AdamWOptions { lr: 2e-4, ..AdamWOptions::default() })?;
    let x = Tensor::randn([32, 1, 28, 28], DType::F32)?;
    let steps = || Tensor::randint(0, 1000, [32])?.to_dtype(DType::F32);
    let forward = |x: &Tensor| {
        let steps = steps()?;
        if half { autocast(DType::BF16, || model.forward(x, &steps))? } else { model.forward(x, &steps) }
    };
    bench.run(train, || {
        params.zero_grad();
        let noise = x.randn_like()?;
        forward(&x.add(&noise)?)?.to_dtype(DType::F32)?.mse_loss(&noise)?.backward()?;
        optimizer.step()
    })?;
    bench.run(infer, || no_grad(|| forward(&x)))
}
