//! Whole training steps.

use crate::Bench;
use kiln::Result;
use kiln::classifier::DigitMlp;
use kiln::gan::{GanLoss, GanTrainer, GanTrainerOptions};
use kiln::optim::{Adam, AdamOptions};
use kiln::prelude::*;

pub fn run(bench: &Bench) -> Result<()> {
    if bench.wants("train_mlp_mnist_b128") {
        let params = Params::new();
        let model = DigitMlp::new(&params, 10)?;
        let mut optimizer = Adam::new(params.params(), AdamOptions::default())?;
        let (x, y) = (Tensor::randn([128, 784], DType::F32)?, Tensor::randint(0, 10, [128])?);
        bench.run("train_mlp_mnist_b128", || {
            params.zero_grad();
            model.forward(&x)?.cross_entropy(&y)?.backward()?;
            optimizer.step()
        })?;
    }
    if bench.wants("train_dcgan28_b128") {
        let mut trainer = GanTrainer::new(GanTrainerOptions::new(GanLoss::Bce, None, 0))?;
        let real = Tensor::rand([128, 1, 28, 28], DType::F32)?.mul_scalar(2.0)?.add_scalar(-1.0)?;
        bench.run("train_dcgan28_b128", || trainer.step(&real, None))?;
    }
    Ok(())
}
