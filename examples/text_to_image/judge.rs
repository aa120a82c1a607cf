//! The judge: a convolutional classifier that was trained on real pictures of all combinations in all styles. It draws nothing.

use crate::data::{Batch, ENDLESS, Pictures};
use crate::stage::{Stage, Training};
use crate::towers::load_parts;
use kiln::data::{Attributes, Combinations, Mnist, Style};
use kiln::nn::{Conv2d, ConvOptions, Linear, StateDict};
use kiln::optim::{Adam, AdamOptions, Schedule};
use kiln::prelude::*;
use kiln::{Activation, Result, Tensor, default_device};
use std::fmt;

/// Values of each label: size, colour, object, place and style.
const CLASSES: [usize; 5] = {
    let [size, colour, object, place] = Attributes::CLASSES;
    [size, colour, object, place, Style::ALL.len()]
};
const NAMES: [&str; 5] = ["size", "colour", "object", "place", "style"];
/// The learning rate at first.
const LR: f64 = 2e-3;
/// The largest standard deviation of the noise in the pictures that it learns from.
const NOISE: f64 = 0.2;
/// Pictures at a time in judging.
const CHUNK: usize = 250;

/// Three convolutions with pooling, a hidden layer, and logits of all labels side by side.
pub struct Judge {
    convs: [Conv2d; 3],
    hidden: Linear,
    head: Linear,
}

impl Judge {
    fn new(params: &Params) -> Result<Self> {
        let same = ConvOptions::<2>::new().with_padding(1);
        let conv = |i: usize, inputs, outputs| Conv2d::new(&params.scope("convs").index(i), inputs, outputs, 3, same);
        Ok(Self {
            convs: [conv(0, 3, 32)?, conv(1, 32, 64)?, conv(2, 64, 128)?],
            hidden: Linear::new(&params.scope("hidden"), 128 * (crate::SIDE / 8).pow(2), 256, true)?,
            head: Linear::new(&params.scope("head"), 256, CLASSES.iter().sum(), true)?,
        })
    }

    /// The logits of each label, each (B, classes).
    fn logits(&self, pictures: &Tensor) -> Result<Vec<Tensor>> {
        let mut x = pictures.clone();
        for conv in &self.convs {
            x = conv.forward_activated(&x, Activation::Relu)?.max_pool2d(2)?;
        }
        let all = self.head.forward(&self.hidden.forward_activated(&x.flatten(1, -1)?, Activation::Relu)?)?;
        let mut from = 0;
        let mut next = |classes: usize| {
            from += classes;
            all.narrow(1, from - classes, classes)
        };
        CLASSES.into_iter().map(&mut next).collect()
    }

    /// How many of `pictures` (N, 3, 32, 32) show what they were to show, in the style that they were to have.
    pub fn marks(&self, pictures: &Tensor, attributes: &[Attributes], style: Style) -> Result<Marks> {
        self.marks_by(pictures, attributes, |_| style)
    }

    fn marks_by(&self, pictures: &Tensor, attributes: &[Attributes], style: impl Fn(usize) -> Style) -> Result<Marks> {
        let (count, mut marks) = (pictures.dim(0)?, Marks::default());
        for start in (0..count).step_by(CHUNK) {
            let logits = no_grad(|| self.logits(&pictures.narrow(0, start, CHUNK.min(count - start))?))?;
            let found = logits.iter().map(|logits| logits.argmax(1)?.to_vec::<i64>()).collect::<Result<Vec<_>>>()?;
            for (i, shown) in attributes[start..(start + CHUNK).min(count)].iter().enumerate() {
                let wanted = labels(shown, style(start + i));
                let right: [bool; 5] = std::array::from_fn(|label| found[label][i] == wanted[label]);
                let [size, colour, object, place, _] = right;
                marks.add(right, colour && object && place, colour && object && place && size);
            }
        }
        marks.count = count;
        Ok(marks)
    }
}

fn labels(attributes: &Attributes, style: Style) -> [i64; 5] {
    let [size, colour, object, place] = attributes.labels();
    let style = Style::ALL.iter().position(|other| *other == style).unwrap_or(0);
    [size, colour, object, place, style].map(|label| label as i64)
}

/// How many pictures are right.
#[derive(Clone, Copy, Default)]
pub struct Marks {
    each: [usize; 5],
    three: usize,
    four: usize,
    count: usize,
}

impl Marks {
    fn add(&mut self, right: [bool; 5], three: bool, four: bool) {
        self.each.iter_mut().zip(right).for_each(|(sum, right)| *sum += usize::from(right));
        self.three += usize::from(three);
        self.four += usize::from(four);
    }
}

impl fmt::Display for Marks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |part: usize| 100.0 * part as f64 / self.count.max(1) as f64;
        write!(f, "colour, object and place {:.1} %, with size {:.1} %; each:", percent(self.three), percent(self.four))?;
        NAMES.iter().zip(self.each).try_for_each(|(name, part)| write!(f, " {name} {:.1} %", percent(part)))
    }
}

struct Judging {
    judge: Judge,
    params: Params,
    optimizer: Adam,
    schedule: Schedule,
    steps: u64,
}

impl Training for Judging {
    const COLUMNS: &'static [&'static str] = &["loss"];

    fn steps(&self) -> u64 {
        self.steps
    }

    fn step(&mut self, batch: &Batch) -> Result<Vec<f64>> {
        self.optimizer.set_lr(LR * self.schedule.factor(self.steps))?;
        self.params.zero_grad();
        let wanted: Vec<_> = batch.attributes.iter().zip(&batch.styles).map(|(shown, &style)| labels(shown, style)).collect();
        let mut loss = Tensor::zeros((), DType::F32)?.to_device(default_device())?;
        // Noise of another strength in each picture: what it is to judge has not been drawn with its pixels' precision.
        let (noise, count) = (Generator::new(self.steps), batch.pictures.dim(0)?);
        let strength = noise.rand([count, 1, 1, 1], ())?.mul_scalar(NOISE)?;
        let pictures = batch.pictures.add(&noise.randn(batch.pictures.dims(), ())?.mul(&strength)?)?;
        for (label, logits) in self.judge.logits(&pictures)?.iter().enumerate() {
            let own: Vec<i64> = wanted.iter().map(|labels| labels[label]).collect();
            let own = Tensor::from_vec(own, wanted.len())?.to_device(default_device())?;
            loss = loss.add(&logits.cross_entropy(&own)?)?;
        }
        loss.backward()?;
        self.optimizer.step()?;
        self.steps += 1;
        Ok(vec![loss.item_f64()?])
    }

    fn state_dict(&self) -> Result<StateDict> {
        let mut state = StateDict::new();
        state.extend(self.params.state_dict().into_iter().map(|(name, x)| (format!("model.{name}"), x)));
        state.extend(self.optimizer.state_dict()?.into_iter().map(|(name, x)| (format!("optimizer.{name}"), x)));
        state.insert("steps".into(), Tensor::from_vec(vec![self.steps as i64], 1)?);
        Ok(state)
    }

    fn load_state_dict(&mut self, state: &StateDict) -> Result<()> {
        self.steps = load_parts(state, &self.params, &mut self.optimizer)?;
        Ok(())
    }
}

/// Trains a judge, or takes the one that was trained, and says how good it is on `exam` real pictures; `None` if Ctrl-C stopped it.
pub fn train(stage: &Stage, mnist: &Mnist, exam: usize) -> Result<Option<Judge>> {
    let params = Params::seeded(stage.seed);
    let judge = Judge::new(&params)?;
    let optimizer = Adam::new(params.params(), AdamOptions { lr: LR, ..AdamOptions::default() })?;
    let mut training = Judging { judge, params, optimizer, schedule: Schedule::cosine(stage.total, 0.02), steps: 0 };
    let pictures = Pictures::new(&mnist.train, &Style::ALL, Combinations::All, ENDLESS, stage.seed.wrapping_add(3))?;
    if !stage.train(&mut training, pictures)? {
        return Ok(None);
    }
    let judge = training.judge;
    let real = Pictures::new(&mnist.test, &Style::ALL, Combinations::All, exam, stage.seed.wrapping_add(4))?.first(exam)?;
    let marks = judge.marks_by(&real.pictures, &real.attributes, |i| real.styles[i])?;
    println!("the judge on {exam} real pictures of digits it never saw: {marks}");
    Ok(Some(judge))
}
