//! The networks of Stable Diffusion 1.5 at 256×256 pixels, with random weights: one call of the U-Net (860 M parameters), and one decoding of the
//! autoencoder.

use crate::Bench;
use kiln::Result;
use kiln::diffusion::unet::{UNet2dConditionConfig, UNet2dConditionModel, UNetConditions};
use kiln::nn::ParamsOptions;
use kiln::prelude::*;
use kiln::vae::{AutoencoderKlConfig, CoderBlock};

fn scope(dtype: DType) -> Params {
    Params::with(ParamsOptions { dtype, ..ParamsOptions::default() })
}

fn unet(bench: &Bench, name: &str, dtype: DType) -> Result<()> {
    if !bench.wants(name) {
        return Ok(());
    }
    let config = UNet2dConditionConfig { cross_attention_dim: 768.into(), ..UNet2dConditionConfig::default() };
    let model = UNet2dConditionModel::new(&scope(dtype), &config)?;
    let (latent, text) = (Tensor::randn([1, 4, 32, 32], dtype)?, Tensor::randn([1, 77, 768], dtype)?);
    let step = Tensor::from_vec(vec![500f32], 1)?;
    bench.run(name, || no_grad(|| model.forward(&latent, &step, &text, &UNetConditions::default())))
}

fn decode(bench: &Bench, name: &str) -> Result<()> {
    if !bench.wants(name) {
        return Ok(());
    }
    let config = AutoencoderKlConfig {
        down_block_types: vec![CoderBlock::Plain; 4],
        up_block_types: vec![CoderBlock::Plain; 4],
        block_out_channels: vec![128, 256, 512, 512],
        layers_per_block: 2,
        sample_size: 512,
        ..AutoencoderKlConfig::default()
    };
    let model = config.build(&Params::new())?;
    let latent = Tensor::randn([1, 4, 32, 32], DType::F32)?;
    bench.run(name, || no_grad(|| model.decode(&latent)))
}

pub fn run(bench: &Bench) -> Result<()> {
    unet(bench, "sd15_unet_256_f32", DType::F32)?;
    unet(bench, "sd15_unet_256_bf16", DType::BF16)?;
    decode(bench, "sd15_vae_decode_256")
}
