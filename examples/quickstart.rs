//! Kiln in sixty lines: tensors, gradients, a model, an optimiser, saving. `cargo run --example quickstart`

use clap::Parser;
use kiln::nn::{Linear, LoadMode};
use kiln::optim::{Adam, AdamOptions};
use kiln::prelude::*;
use kiln::{Result, io, set_default_device};
use std::path::PathBuf;

/// Learns a spiral's two arms apart, and saves the model.
#[derive(Parser)]
struct Args {
    /// Device to run on: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Folder for the saved model.
    #[arg(long, default_value = "out/quickstart")]
    out: PathBuf,
}

/// A model is a struct of layers and a forward function; names and first weights come from the scope.
struct Net {
    hidden: [Linear; 2],
    head: Linear,
}

impl Net {
    fn new(params: &Params) -> Result<Self> {
        let hidden = [Linear::new(&params.scope("hidden0"), 2, 32, true)?, Linear::new(&params.scope("hidden1"), 32, 32, true)?];
        Ok(Self { hidden, head: Linear::new(&params.scope("head"), 32, 2, true)? })
    }
}

impl Module for Net {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.hidden.iter().try_fold(x.clone(), |h, layer| layer.forward(&h)?.tanh())?;
        self.head.forward(&h)
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    set_default_device(args.device);
    // Tensors: every operation returns a Result, operators included.
    let a = Tensor::from_vec(vec![1f32, 2., 3., 4.], [2, 2])?;
    println!("a·a + 1 =\n{}", (a.matmul(&a)? + 1.0f64)?);
    // Gradients: d/dx Σ x³ = 3x², and once more for 6x.
    let x = Tensor::from_vec(vec![1f32, 2.], 2)?.requires_grad_()?;
    x.powf(3.0)?.sum(())?.backward()?;
    println!("gradient of Σ x³: {}", x.grad().unwrap_or(x));
    // Data: two arms of a spiral.
    let t = Tensor::linspace(0.5, 6.0, 200, DType::F32)?;
    let arm = |sign: f64| Tensor::stack(&[(t.cos()? * &t)?.mul_scalar(sign)?, (t.sin()? * &t)?.mul_scalar(sign)?], 1);
    let points = Tensor::cat(&[arm(1.0)?, arm(-1.0)?], 0)?;
    let labels = Tensor::from_vec((0..400).map(|i| i / 200).collect::<Vec<i64>>(), 400)?;
    // Training.
    let params = Params::seeded(1);
    let net = Net::new(&params)?;
    let mut optimizer = Adam::new(params.params(), AdamOptions { lr: 0.01, ..Default::default() })?;
    for step in 0..=300 {
        let loss = net.forward(&points)?.cross_entropy(&labels)?;
        params.zero_grad();
        loss.backward()?;
        optimizer.step()?;
        if step % 100 == 0 {
            println!("step {step}: loss {:.4}", loss.item::<f32>()?);
        }
    }
    // Saving and loading.
    std::fs::create_dir_all(&args.out).map_err(|e| kiln::Error::io("quickstart", args.out.display(), e))?;
    let path = args.out.join("model.safetensors");
    io::safetensors::save(&path, &params.state_dict(), &Default::default())?;
    params.load_state_dict(&io::safetensors::load(&path)?, LoadMode::Strict)?;
    let hits = net.forward(&points)?.argmax(1)?.eq(&labels)?.to_dtype(DType::F32)?.mean(())?;
    println!("accuracy of the model read back from {}: {:.1} %", path.display(), 100.0 * hits.item::<f32>()?);
    Ok(())
}
