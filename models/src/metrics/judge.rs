//! A judge of generated digits: a small convolutional classifier that was trained on real ones.

use super::{FeatureStatistics, frechet_distance};
use crate::classifier::DigitCnn;
use crate::data::{Dataset, ImageSet, Loader, LoaderOptions, Rng, Scale};
use crate::nn::{Module, Params};
use crate::optim::{Adam, AdamOptions, Optimizer};
use kiln_autograd::{TensorExt, no_grad};
use kiln_tensor::{Result, Tensor};
use std::fmt;

/// Pictures at a time in evaluation.
const CHUNK: usize = 500;

/// A classifier of digits in [-1, 1], and the statistics of real digits in its features.
pub struct DigitJudge {
    model: DigitCnn,
    real: FeatureStatistics,
    accuracy: f64,
}

impl DigitJudge {
    /// Trains the classifier for `epochs` epochs (Adam, 1e-3, batches of 128) and measures it on `test`.
    pub fn train(train: &ImageSet, test: &ImageSet, epochs: u64, seed: u64) -> Result<Self> {
        let params = Params::seeded(seed);
        let model = DigitCnn::new(&params, 10)?;
        let mut optimizer = Adam::new(params.params(), AdamOptions::default())?;
        let images = train.clone().with_scale(Scale::Signed);
        let mut loader = Loader::new(images, LoaderOptions { seed, ..LoaderOptions::default() })?;
        for _ in 0..epochs {
            for batch in &mut loader {
                let batch = batch?;
                params.zero_grad();
                model.forward(&batch.images)?.cross_entropy(&batch.labels)?.backward()?;
                optimizer.step()?;
            }
        }
        params.eval();
        let (pictures, labels) = whole(test)?;
        let (features, logits) = evaluate(&model, &pictures)?;
        let hits = logits.argmax(1)?.to_vec::<i64>()?.iter().zip(&labels).filter(|(a, b)| a == b).count();
        let real = if test.len() >= 10 * DigitCnn::FEATURES { features } else { evaluate(&model, &whole(train)?.0)?.0 };
        Ok(Self { model, real: FeatureStatistics::of(&real)?, accuracy: hits as f64 / labels.len().max(1) as f64 })
    }

    /// The share of test digits that the classifier names correctly.
    pub fn accuracy(&self) -> f64 {
        self.accuracy
    }

    /// Judges pictures (N, 1, 28, 28) in [-1, 1].
    pub fn judge(&self, pictures: &Tensor) -> Result<Verdict> {
        let (features, logits) = evaluate(&self.model, pictures)?;
        let probabilities = logits.softmax(-1)?;
        let mut shares = [0.0; 10];
        for class in probabilities.argmax(1)?.to_vec::<i64>()? {
            shares[class as usize] += 1.0 / pictures.dim(0)? as f64;
        }
        let confidence = probabilities.max_dim(1)?.0.mean(())?.item_f64()?;
        let distance = frechet_distance(&self.real, &FeatureStatistics::of(&features)?)?;
        Ok(Verdict { shares, confidence, distance })
    }

    /// The share of pictures that the classifier takes for the digit they were meant to be.
    pub fn agreement(&self, pictures: &Tensor, labels: &[i64]) -> Result<f64> {
        let classes = evaluate(&self.model, pictures)?.1.argmax(1)?.to_vec::<i64>()?;
        Ok(classes.iter().zip(labels).filter(|(a, b)| a == b).count() as f64 / labels.len().max(1) as f64)
    }
}

/// All pictures of a set as one tensor, and their labels.
fn whole(set: &ImageSet) -> Result<(Tensor, Vec<i64>)> {
    let all: Vec<usize> = (0..set.len()).collect();
    let batch = set.clone().with_scale(Scale::Signed).batch(&all, &mut Rng::new(0))?;
    Ok((batch.images, batch.labels.to_vec()?))
}

/// Features and logits, in chunks.
fn evaluate(model: &DigitCnn, pictures: &Tensor) -> Result<(Tensor, Tensor)> {
    let n = pictures.dim(0)?;
    let (mut features, mut logits) = (Vec::new(), Vec::new());
    no_grad(|| -> Result<()> {
        for start in (0..n).step_by(CHUNK) {
            let part = model.features(&pictures.narrow(0, start, CHUNK.min(n - start))?)?;
            logits.push(model.head(&part)?);
            features.push(part);
        }
        Ok(())
    })?;
    Ok((Tensor::cat(&features.iter().collect::<Vec<_>>(), 0)?, Tensor::cat(&logits.iter().collect::<Vec<_>>(), 0)?))
}

/// What a judge says of a set of pictures.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Verdict {
    /// The share of pictures taken for each digit.
    pub shares: [f64; 10],
    /// The mean probability of the digit that each picture was taken for.
    pub confidence: f64,
    /// The Fréchet distance to real digits in the classifier's features.
    pub distance: f64,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "shares of the digits 0 to 9 (%):")?;
        for share in self.shares {
            write!(f, " {:.1}", 100.0 * share)?;
        }
        write!(f, "; mean confidence {:.3}; Fréchet distance {:.2}", self.confidence, self.distance)
    }
}
