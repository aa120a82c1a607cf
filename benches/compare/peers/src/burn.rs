//! burn on its fastest backend for processors, flex.

use crate::{Bench, CONVOLUTIONS, LINEAR, Result, SQUARE};
use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig, ConvTranspose2d, ConvTranspose2dConfig};
use burn::nn::loss::{BinaryCrossEntropyLossConfig, CrossEntropyLossConfig};
use burn::nn::{BatchNorm, BatchNormConfig, LayerNormConfig, Linear, LinearConfig, PaddingConfig2d};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::activation::{gelu, leaky_relu, relu, softmax, tanh};
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{DType, Device, Distribution, Int, Tensor};

fn normal<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

pub fn run(bench: &Bench) -> Result<()> {
    let device = Device::flex();
    products(bench, &device)?;
    memory_bound(bench, &device)?;
    let tracking = Device::flex().autodiff();
    convolutions(bench, &device, &tracking)?;
    attention_passes(bench, &device, &tracking)?;
    train_mlp(bench, &tracking)?;
    train_dcgan(bench, &tracking)
}

fn products(bench: &Bench, device: &Device) -> Result<()> {
    for (dtype, tag) in [(DType::F32, "f32"), (DType::BF16, "bf16")] {
        for n in SQUARE {
            let (x, y) = (normal([n, n], device).cast(dtype), normal([n, n], device).cast(dtype));
            bench.run(&format!("gemm_{tag}_{n}"), || Ok(x.clone().matmul(y.clone())))?;
        }
        for [m, k, n] in LINEAR {
            let (x, w) = (normal([m, k], device).cast(dtype), normal([k, n], device).cast(dtype));
            bench.run(&format!("linear_{tag}_{m}x{k}x{n}"), || Ok(burn::tensor::module::linear(x.clone(), w.clone(), None)))?;
        }
        let (x, y) = (normal([96, 256, 64], device).cast(dtype), normal([96, 64, 256], device).cast(dtype));
        bench.run(&format!("bmm_{tag}_96x256x64x256"), || Ok(x.clone().matmul(y.clone())))?;
    }
    Ok(())
}

fn memory_bound(bench: &Bench, device: &Device) -> Result<()> {
    let (x, y) = (normal([4096, 1024], device), normal([4096, 1024], device));
    let bias: Tensor<1> = normal([1024], device);
    let norm = LayerNormConfig::new(1024).init(device);
    bench.run("add_4M", || Ok(x.clone() + y.clone()))?;
    bench.run("gelu_4M", || Ok(gelu(x.clone())))?;
    bench.run("exp_4M", || Ok(x.clone().exp()))?;
    bench.run("softmax_4096x1024", || Ok(softmax(x.clone(), 1)))?;
    bench.run("layernorm_4096x1024", || Ok(norm.forward(x.clone())))?;
    bench.run("sum_last_4096x1024", || Ok(x.clone().sum_dim(1)))?;
    bench.run("sum_first_4096x1024", || Ok(x.clone().sum_dim(0)))?;
    bench.run("bias_gelu_residual_4M", || Ok(y.clone() + gelu(x.clone() + bias.clone().unsqueeze())))?;
    bench.run("randn_4M", || Ok(normal([4096, 1024], device)))?;
    let s: Tensor<1> = normal([64], device);
    bench.run("add_64", || Ok(s.clone() + s.clone()))
}

fn convolutions(bench: &Bench, device: &Device, tracking: &Device) -> Result<()> {
    for (tag, [n, ci, co, size, k, stride]) in CONVOLUTIONS {
        if !bench.wants(&format!("conv_fwd_{tag} conv_fwdbwd_{tag}")) {
            continue;
        }
        let pad = usize::from(k > 1);
        let config = Conv2dConfig::new([ci, co], [k, k]).with_stride([stride, stride]);
        let config = config.with_padding(PaddingConfig2d::Explicit(pad, pad, pad, pad));
        let (layer, x): (Conv2d, Tensor<4>) = (config.init(device), normal([n, ci, size, size], device));
        bench.run(&format!("conv_fwd_{tag}"), || Ok(layer.forward(x.clone())))?;
        let (layer, leaf) = (config.init(tracking), normal([n, ci, size, size], tracking).require_grad());
        bench.run(&format!("conv_fwdbwd_{tag}"), || Ok(layer.forward(leaf.clone()).sum().backward()))?;
    }
    Ok(())
}

fn attention_passes(bench: &Bench, device: &Device, tracking: &Device) -> Result<()> {
    let shape = [4, 8, 1024, 64];
    let causal = || AttentionModuleOptions { is_causal: true, ..Default::default() };
    for (dtype, tag) in [(DType::F32, "f32"), (DType::BF16, "bf16")] {
        let leaf = |device: &Device| -> Tensor<4> { normal(shape, device).cast(dtype) };
        let name = |pass: &str| format!("attn_causal_{pass}_{tag}_4x8x1024x64");
        if bench.wants(&name("fwd")) {
            let [q, k, v] = [leaf(device), leaf(device), leaf(device)];
            bench.run(&name("fwd"), || Ok(attention(q.clone(), k.clone(), v.clone(), None, None, causal())))?;
        }
        if bench.wants(&name("fwdbwd")) {
            let [q, k, v] = [leaf(tracking), leaf(tracking), leaf(tracking)].map(Tensor::require_grad);
            bench.run(&name("fwdbwd"), || Ok(attention(q.clone(), k.clone(), v.clone(), None, None, causal()).sum().backward()))?;
        }
    }
    Ok(())
}

#[derive(Module, Debug)]
struct Mlp {
    layers: [Linear; 3],
}

fn train_mlp(bench: &Bench, device: &Device) -> Result<()> {
    if !bench.wants("train_mlp_mnist_b128") {
        return Ok(());
    }
    let mut model = Mlp { layers: [(784, 512), (512, 256), (256, 10)].map(|(i, o)| LinearConfig::new(i, o).init(device)) };
    let mut optimizer = AdamConfig::new().with_epsilon(1e-8).init();
    let cross_entropy = CrossEntropyLossConfig::new().init(device);
    let x = normal([128, 784], device);
    let y: Tensor<1, Int> = Tensor::random([128], Distribution::Uniform(0.0, 10.0), device);
    bench.run("train_mlp_mnist_b128", || {
        let h = relu(model.layers[0].forward(x.clone()));
        let h = relu(model.layers[1].forward(h));
        let loss = cross_entropy.forward(model.layers[2].forward(h), y.clone());
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(1e-3, model.clone(), gradients);
        Ok(())
    })
}

#[derive(Module, Debug)]
struct Generator {
    fc: Linear,
    b0: BatchNorm,
    c1: ConvTranspose2d,
    b1: BatchNorm,
    c2: ConvTranspose2d,
}

impl Generator {
    fn new(device: &Device) -> Self {
        let up = |channels| ConvTranspose2dConfig::new(channels, [4, 4]).with_stride([2, 2]).with_padding([1, 1]);
        Self {
            fc: LinearConfig::new(100, 7 * 7 * 128).with_bias(false).init(device),
            b0: BatchNormConfig::new(128).init(device),
            c1: up([128, 64]).with_bias(false).init(device),
            b1: BatchNormConfig::new(64).init(device),
            c2: up([64, 1]).init(device),
        }
    }

    fn forward(&self, z: Tensor<2>) -> Tensor<4> {
        let batch = z.dims()[0];
        let h = relu(self.b0.forward::<4>(self.fc.forward(z).reshape([batch, 128, 7, 7])));
        let h = relu(self.b1.forward::<4>(self.c1.forward(h)));
        tanh(self.c2.forward(h))
    }
}

#[derive(Module, Debug)]
struct Discriminator {
    c1: Conv2d,
    c2: Conv2d,
    b2: BatchNorm,
    fc: Linear,
}

impl Discriminator {
    fn new(device: &Device) -> Self {
        let down = |channels| Conv2dConfig::new(channels, [4, 4]).with_stride([2, 2]).with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1));
        Self {
            c1: down([1, 64]).init(device),
            c2: down([64, 128]).with_bias(false).init(device),
            b2: BatchNormConfig::new(128).init(device),
            fc: LinearConfig::new(7 * 7 * 128, 1).init(device),
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<2> {
        let h = leaky_relu(self.c1.forward(x), 0.2);
        let h = leaky_relu(self.b2.forward::<4>(self.c2.forward(h)), 0.2);
        self.fc.forward(h.flatten(1, 3))
    }
}

fn train_dcgan(bench: &Bench, device: &Device) -> Result<()> {
    if !bench.wants("train_dcgan28_b128") {
        return Ok(());
    }
    let (mut generator, mut discriminator) = (Generator::new(device), Discriminator::new(device));
    let adam = || AdamConfig::new().with_beta_1(0.5).with_epsilon(1e-8).init();
    let (mut g_optimizer, mut d_optimizer) = (adam(), adam());
    let bce = BinaryCrossEntropyLossConfig::new().with_logits(true).init(device);
    let real: Tensor<4> = Tensor::random([128, 1, 28, 28], Distribution::Uniform(-1.0, 1.0), device);
    let (one, zero): (Tensor<2, Int>, Tensor<2, Int>) = (Tensor::ones([128, 1], device), Tensor::zeros([128, 1], device));
    bench.run("train_dcgan28_b128", || {
        let fake = generator.forward(normal([128, 100], device));
        let loss = bce.forward(discriminator.forward(real.clone()), one.clone())
            + bce.forward(discriminator.forward(fake.clone().detach()), zero.clone());
        let gradients = GradientsParams::from_grads(loss.backward(), &discriminator);
        discriminator = d_optimizer.step(2e-4, discriminator.clone(), gradients);
        let loss = bce.forward(discriminator.forward(fake), one.clone());
        let gradients = GradientsParams::from_grads(loss.backward(), &generator);
        generator = g_optimizer.step(2e-4, generator.clone(), gradients);
        Ok(())
    })
}
