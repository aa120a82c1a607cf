//! Classifiers: of 28 × 28 digits a perceptron, and a small convolutional network whose features also judge generators; of texts the
//! training of a BERT, and naive Bayes to compare it with.

mod bag_of_words;
mod bert;

pub use bag_of_words::NaiveBayes;
pub use bert::{BertStep, BertTask, BertTrainer, Evaluation};

use crate::nn::{Conv2d, ConvOptions, Dropout, Linear, Module, Params};
use kiln_tensor::{Activation, Result, Tensor};

/// 784 → 512 → 256 → classes with ReLU between.
pub struct DigitMlp {
    l1: Linear,
    l2: Linear,
    l3: Linear,
}

impl DigitMlp {
    /// A classifier whose weights come from `params`.
    pub fn new(params: &Params, classes: usize) -> Result<Self> {
        Ok(Self {
            l1: Linear::new(&params.scope("l1"), 784, 512, true)?,
            l2: Linear::new(&params.scope("l2"), 512, 256, true)?,
            l3: Linear::new(&params.scope("l3"), 256, classes, true)?,
        })
    }
}

impl Module for DigitMlp {
    /// Logits (B, classes) of pictures (B, 1, 28, 28), or of anything of 784 elements a sample.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.l1.forward_activated(&x.flatten(1, -1)?, Activation::Relu)?;
        self.l3.forward(&self.l2.forward_activated(&h, Activation::Relu)?)
    }
}

/// Two 3 × 3 convolutions with pooling, and two linear layers.
pub struct DigitCnn {
    c1: Conv2d,
    c2: Conv2d,
    f1: Linear,
    dropout: Dropout,
    f2: Linear,
}

impl DigitCnn {
    /// Length of the vectors that [`features`](DigitCnn::features) returns.
    pub const FEATURES: usize = 128;

    /// A classifier whose weights come from `params`.
    pub fn new(params: &Params, classes: usize) -> Result<Self> {
        let same = ConvOptions::<2>::new().with_padding(1);
        Ok(Self {
            c1: Conv2d::new(&params.scope("c1"), 1, 32, 3, same)?,
            c2: Conv2d::new(&params.scope("c2"), 32, 64, 3, same)?,
            f1: Linear::new(&params.scope("f1"), 64 * 7 * 7, Self::FEATURES, true)?,
            dropout: Dropout::new(&params.scope("dropout"), 0.3)?,
            f2: Linear::new(&params.scope("f2"), Self::FEATURES, classes, true)?,
        })
    }

    /// The last hidden layer (B, 128): what a Fréchet distance between sets of pictures is measured in.
    pub fn features(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.c1.forward(x)?.relu()?.max_pool2d(2)?; // (B, 32, 14, 14)
        let h = self.c2.forward(&h)?.relu()?.max_pool2d(2)?; // (B, 64, 7, 7)
        self.f1.forward_activated(&h.flatten(1, -1)?, Activation::Relu)
    }

    /// Logits (B, classes) from features.
    pub fn head(&self, features: &Tensor) -> Result<Tensor> {
        self.f2.forward(&self.dropout.forward(features)?)
    }
}

impl Module for DigitCnn {
    /// Logits (B, classes) of pictures (B, 1, 28, 28).
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.head(&self.features(x)?)
    }
}
