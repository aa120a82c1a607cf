//! candle, on the processor.

use crate::{Bench, CONVOLUTIONS, LINEAR, Result, SQUARE};
use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::{
    AdamW, BatchNorm, Conv2d, Conv2dConfig, ConvTranspose2d, ConvTranspose2dConfig, Linear, Module, ModuleT, Optimizer, ParamsAdamW,
    VarBuilder, VarMap, ops,
};

const CPU: Device = Device::Cpu;

fn normal(shape: &[usize], dtype: DType) -> Result<Tensor> {
    Ok(Tensor::randn(0f32, 1f32, shape, &CPU)?.to_dtype(dtype)?)
}

pub fn run(bench: &Bench) -> Result<()> {
    products(bench)?;
    memory_bound(bench)?;
    convolutions(bench)?;
    attention(bench)?;
    train_mlp(bench)?;
    train_dcgan(bench)
}

fn products(bench: &Bench) -> Result<()> {
    for (dtype, tag) in [(DType::F32, "f32"), (DType::BF16, "bf16")] {
        for n in SQUARE {
            let (x, y) = (normal(&[n, n], dtype)?, normal(&[n, n], dtype)?);
            bench.run(&format!("gemm_{tag}_{n}"), || Ok(x.matmul(&y)?))?;
        }
        for [m, k, n] in LINEAR {
            let (x, layer) = (normal(&[m, k], dtype)?, Linear::new(normal(&[n, k], dtype)?, None));
            bench.run(&format!("linear_{tag}_{m}x{k}x{n}"), || Ok(layer.forward(&x)?))?;
        }
        let (x, y) = (normal(&[96, 256, 64], dtype)?, normal(&[96, 64, 256], dtype)?);
        bench.run(&format!("bmm_{tag}_96x256x64x256"), || Ok(x.matmul(&y)?))?;
    }
    Ok(())
}

fn memory_bound(bench: &Bench) -> Result<()> {
    let normal = |shape: &[usize]| normal(shape, DType::F32);
    let (x, y, w, b) = (normal(&[4096, 1024])?, normal(&[4096, 1024])?, normal(&[1024])?, normal(&[1024])?);
    bench.run("add_4M", || Ok((&x + &y)?))?;
    bench.run("gelu_4M", || Ok(x.gelu_erf()?))?;
    bench.run("exp_4M", || Ok(x.exp()?))?;
    bench.run("softmax_4096x1024", || Ok(ops::softmax_last_dim(&x)?))?;
    bench.run("layernorm_4096x1024", || Ok(ops::layer_norm(&x, &w, &b, 1e-5)?))?;
    bench.run("sum_last_4096x1024", || Ok(x.sum(1)?))?;
    bench.run("sum_first_4096x1024", || Ok(x.sum(0)?))?;
    bench.run("transpose_copy_4096x1024", || Ok(x.t()?.contiguous()?))?;
    bench.run("bias_gelu_residual_4M", || Ok((&y + x.broadcast_add(&b)?.gelu_erf()?)?))?;
    bench.run("randn_4M", || normal(&[4096, 1024]))?;
    let s = normal(&[64])?;
    bench.run("add_64", || Ok((&s + &s)?))
}

fn convolutions(bench: &Bench) -> Result<()> {
    for (tag, [n, ci, co, size, k, stride]) in CONVOLUTIONS {
        if !bench.wants(&format!("conv_fwd_{tag} conv_fwdbwd_{tag}")) {
            continue;
        }
        let config = Conv2dConfig { stride, padding: usize::from(k > 1), ..Conv2dConfig::default() };
        let (x, w, b) = (
            Var::from_tensor(&normal(&[n, ci, size, size], DType::F32)?)?,
            Var::from_tensor(&normal(&[co, ci, k, k], DType::F32)?)?,
            Var::from_tensor(&normal(&[co], DType::F32)?)?,
        );
        let untracked = Conv2d::new(w.detach(), Some(b.detach()), config);
        let data = x.detach();
        bench.run(&format!("conv_fwd_{tag}"), || Ok(untracked.forward(&data)?))?;
        let layer = Conv2d::new(w.as_tensor().clone(), Some(b.as_tensor().clone()), config);
        bench.run(&format!("conv_fwdbwd_{tag}"), || Ok(layer.forward(&x)?.sum_all()?.backward()?))?;
    }
    Ok(())
}

/// candle's fused attention runs on Metal only: this is the composition that its models use.
fn attention(bench: &Bench) -> Result<()> {
    let (b, h, t, d) = (4, 8, 1024, 64);
    let mask: Vec<f32> = (0..t * t).map(|i| if i % t > i / t { f32::NEG_INFINITY } else { 0.0 }).collect();
    for (dtype, tag) in [(DType::F32, "f32"), (DType::BF16, "bf16")] {
        let name = |pass: &str| format!("attn_causal_{pass}_{tag}_4x8x1024x64");
        if !bench.wants(&format!("{} {}", name("fwd"), name("fwdbwd"))) {
            continue;
        }
        let mask = Tensor::from_slice(&mask, (1, 1, t, t), &CPU)?.to_dtype(dtype)?;
        let leaf = || -> Result<Var> { Ok(Var::from_tensor(&normal(&[b, h, t, d], dtype)?)?) };
        let (q, k, v) = (leaf()?, leaf()?, leaf()?);
        let attend = |q: &Tensor, k: &Tensor, v: &Tensor, fused: bool| -> Result<Tensor> {
            let scores = (q.matmul(&k.transpose(2, 3)?)? * (1.0 / (d as f64).sqrt()))?.broadcast_add(&mask)?;
            // Its fused softmax has no gradient.
            let weights = if fused { ops::softmax_last_dim(&scores)? } else { ops::softmax(&scores, D::Minus1)? };
            Ok(weights.matmul(v)?)
        };
        let data = (q.detach(), k.detach(), v.detach());
        bench.run(&name("fwd"), || attend(&data.0, &data.1, &data.2, true))?;
        bench.run(&name("fwdbwd"), || Ok(attend(&q, &k, &v, false)?.sum_all()?.backward()?))?;
    }
    Ok(())
}

fn adam(variables: &VarMap, lr: f64, beta1: f64) -> Result<AdamW> {
    Ok(AdamW::new(variables.all_vars(), ParamsAdamW { lr, beta1, weight_decay: 0.0, ..ParamsAdamW::default() })?)
}

fn train_mlp(bench: &Bench) -> Result<()> {
    if !bench.wants("train_mlp_mnist_b128") {
        return Ok(());
    }
    let variables = VarMap::new();
    let vb = VarBuilder::from_varmap(&variables, DType::F32, &CPU);
    let layers =
        [candle_nn::linear(784, 512, vb.pp("0"))?, candle_nn::linear(512, 256, vb.pp("2"))?, candle_nn::linear(256, 10, vb.pp("4"))?];
    let mut optimizer = adam(&variables, 1e-3, 0.9)?;
    let x = normal(&[128, 784], DType::F32)?;
    let y = Tensor::from_iter((0..128u32).map(|i| i % 10), &CPU)?;
    bench.run("train_mlp_mnist_b128", || {
        let h = layers[0].forward(&x)?.relu()?;
        let h = layers[1].forward(&h)?.relu()?;
        let loss = candle_nn::loss::cross_entropy(&layers[2].forward(&h)?, &y)?;
        Ok(optimizer.backward_step(&loss)?)
    })
}

struct Generator {
    fc: Linear,
    b0: BatchNorm,
    c1: ConvTranspose2d,
    b1: BatchNorm,
    c2: ConvTranspose2d,
}

impl Generator {
    fn new(vb: VarBuilder) -> Result<Self> {
        let config = ConvTranspose2dConfig { stride: 2, padding: 1, ..ConvTranspose2dConfig::default() };
        Ok(Self {
            fc: candle_nn::linear_no_bias(100, 7 * 7 * 128, vb.pp("fc"))?,
            b0: candle_nn::batch_norm(128, 1e-5, vb.pp("b0"))?,
            c1: candle_nn::conv_transpose2d_no_bias(128, 64, 4, config, vb.pp("c1"))?,
            b1: candle_nn::batch_norm(64, 1e-5, vb.pp("b1"))?,
            c2: candle_nn::conv_transpose2d(64, 1, 4, config, vb.pp("c2"))?,
        })
    }

    fn forward(&self, z: &Tensor) -> Result<Tensor> {
        let h = self.b0.forward_t(&self.fc.forward(z)?.reshape(((), 128, 7, 7))?, true)?.relu()?;
        let h = self.b1.forward_t(&self.c1.forward(&h)?, true)?.relu()?;
        Ok(self.c2.forward(&h)?.tanh()?)
    }
}

struct Discriminator {
    c1: Conv2d,
    c2: Conv2d,
    b2: BatchNorm,
    fc: Linear,
}

impl Discriminator {
    fn new(vb: VarBuilder) -> Result<Self> {
        let config = Conv2dConfig { stride: 2, padding: 1, ..Conv2dConfig::default() };
        Ok(Self {
            c1: candle_nn::conv2d(1, 64, 4, config, vb.pp("c1"))?,
            c2: candle_nn::conv2d_no_bias(64, 128, 4, config, vb.pp("c2"))?,
            b2: candle_nn::batch_norm(128, 1e-5, vb.pp("b2"))?,
            fc: candle_nn::linear(7 * 7 * 128, 1, vb.pp("fc"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = ops::leaky_relu(&self.c1.forward(x)?, 0.2)?;
        let h = ops::leaky_relu(&self.b2.forward_t(&self.c2.forward(&h)?, true)?, 0.2)?;
        Ok(self.fc.forward(&h.flatten_from(1)?)?)
    }
}

fn train_dcgan(bench: &Bench) -> Result<()> {
    if !bench.wants("train_dcgan28_b128") {
        return Ok(());
    }
    let (g_variables, d_variables) = (VarMap::new(), VarMap::new());
    let generator = Generator::new(VarBuilder::from_varmap(&g_variables, DType::F32, &CPU))?;
    let discriminator = Discriminator::new(VarBuilder::from_varmap(&d_variables, DType::F32, &CPU))?;
    let (mut g_optimizer, mut d_optimizer) = (adam(&g_variables, 2e-4, 0.5)?, adam(&d_variables, 2e-4, 0.5)?);
    let real = (Tensor::rand(0f32, 1f32, (128, 1, 28, 28), &CPU)? * 2.0)?.affine(1.0, -1.0)?;
    let (one, zero) = (Tensor::ones((128, 1), DType::F32, &CPU)?, Tensor::zeros((128, 1), DType::F32, &CPU)?);
    let bce = candle_nn::loss::binary_cross_entropy_with_logit;
    bench.run("train_dcgan28_b128", || {
        let fake = generator.forward(&normal(&[128, 100], DType::F32)?)?;
        let loss = (bce(&discriminator.forward(&real)?, &one)? + bce(&discriminator.forward(&fake.detach())?, &zero)?)?;
        d_optimizer.backward_step(&loss)?;
        Ok(g_optimizer.backward_step(&bce(&discriminator.forward(&fake)?, &one)?)?)
    })
}
