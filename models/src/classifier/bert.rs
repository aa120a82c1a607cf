//! Training of a BERT, to fill hidden tokens in or to classify texts: one optimiser step a batch, and all the state that continues it
//! bit for bit.

use crate::align::TrainOptions;
use crate::align::learner::Learner;
use crate::data::{IGNORE_INDEX, LabelledBatch, MaskedBatch};
use crate::nn::{Params, StateDict};
use crate::transformer::{BertForMaskedLm, BertForSequenceClassification};
use kiln_autograd::{TensorExt, no_grad};
use kiln_tensor::{CrossEntropyOptions, DType, Error, Reduction, Result, Tensor, profile_scope};

/// A model that learns from batches of a kind.
pub trait BertTask {
    /// What it learns from.
    type Batch;

    /// The scope of its weights.
    fn params(&self) -> &Params;

    /// The logits of all predictions of a batch, (N, classes), and their targets, i64 (N), [`IGNORE_INDEX`] where nothing is to be learned.
    ///
    /// # Errors
    /// If the batch does not fit the model.
    fn predict(&self, batch: &Self::Batch) -> Result<(Tensor, Tensor)>;
}

impl BertTask for BertForMaskedLm {
    type Batch = MaskedBatch;

    fn params(&self) -> &Params {
        self.params()
    }

    fn predict(&self, batch: &MaskedBatch) -> Result<(Tensor, Tensor)> {
        let logits = self.forward(&batch.inputs, Some(&batch.key_mask), None)?; // (B, T, V)
        Ok((logits.flatten(0, 1)?, batch.targets.flatten(0, 1)?))
    }
}

impl BertTask for BertForSequenceClassification {
    type Batch = LabelledBatch;

    fn params(&self) -> &Params {
        self.params()
    }

    fn predict(&self, batch: &LabelledBatch) -> Result<(Tensor, Tensor)> {
        Ok((self.forward(&batch.inputs, Some(&batch.key_mask), None)?, batch.labels.clone()))
    }
}

/// What a step of a [`BertTrainer`] did.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct BertStep {
    /// Mean loss of its predictions, in nats.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// The learning rate.
    pub lr: f64,
}

/// What a model makes of texts that it does not learn from.
#[derive(Clone, PartialEq, Debug)]
pub struct Evaluation {
    /// Mean loss, in nats.
    pub loss: f64,
    /// The likeliest class of each prediction that counts, in order.
    pub predictions: Vec<i64>,
    /// The true ones.
    pub targets: Vec<i64>,
}

impl Evaluation {
    /// The share of predictions that are true.
    pub fn accuracy(&self) -> f64 {
        let hits = self.predictions.iter().zip(&self.targets).filter(|(a, b)| a == b).count();
        hits as f64 / self.targets.len() as f64
    }
}

/// A BERT with its optimiser: AdamW, the schedule and clipping of [`TrainOptions`].
///
/// ```
/// # use kiln_models::align::{TrainOptions, linear_decay};
/// # use kiln_models::classifier::BertTrainer;
/// # use kiln_models::data::{Dataset, LabelledSequences, Rng};
/// # use kiln_models::nn::Params;
/// # use kiln_models::transformer::BertConfig;
/// # use kiln_tensor::Result;
/// # fn main() -> Result<()> {
/// let config = BertConfig { vocab_size: 9, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32, ..BertConfig::default() };
/// let options = TrainOptions { schedule: linear_decay(30, 3), ..TrainOptions::new(1e-2) };
/// let mut trainer = BertTrainer::new(config.sequence_classifier(&Params::seeded(0))?, &options)?;
/// let batch = LabelledSequences::new(vec![vec![2, 7, 3], vec![2, 8, 5, 3]], vec![0, 1], 0)?.batch(&[0, 1], &mut Rng::new(0))?;
/// for _ in 0..30 {
///     trainer.step(&batch)?;
/// }
/// assert_eq!(trainer.evaluate(&[batch])?.predictions, [0, 1]);
/// # Ok(()) }
/// ```
pub struct BertTrainer<M> {
    model: M,
    options: TrainOptions,
    learner: Learner,
}

impl<M: BertTask> BertTrainer<M> {
    /// A trainer of the model's parameters that are not frozen.
    ///
    /// # Errors
    /// If an option is out of its domain, asks for accumulation (which a step of one batch has none of), or all parameters are frozen.
    pub fn new(model: M, options: &TrainOptions) -> Result<Self> {
        if options.gradient_accumulation_steps != 1 {
            return Err(Error::argument("bert_trainer", "gradient_accumulation_steps must be 1: a step takes one batch"));
        }
        let learner = Learner::new("bert_trainer", model.params(), options)?;
        Ok(Self { model, options: options.clone(), learner })
    }

    /// The model.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// The model alone.
    pub fn into_model(self) -> M {
        self.model
    }

    /// Steps so far.
    pub fn steps(&self) -> u64 {
        self.learner.steps()
    }

    /// The mean loss, of the predictions that count.
    fn loss(&self, batch: &M::Batch, reduction: Reduction) -> Result<(Tensor, Tensor, Tensor)> {
        let (logits, targets) = self.options.autocast(|| self.model.predict(batch))?;
        let options = CrossEntropyOptions { ignore_index: IGNORE_INDEX, reduction, ..CrossEntropyOptions::default() };
        let loss = logits.to_dtype(DType::F32)?.cross_entropy_with(&targets, &options)?;
        Ok((loss, logits, targets))
    }

    /// One step from the mean loss of `batch`.
    ///
    /// # Errors
    /// If the batch has nothing to learn, or the loss or gradient is not finite.
    pub fn step(&mut self, batch: &M::Batch) -> Result<BertStep> {
        self.learner.begin()?;
        let forward = profile_scope("forward");
        let (loss, ..) = self.loss(batch, Reduction::Mean)?;
        drop(forward);
        let backward = profile_scope("backward");
        loss.backward()?;
        drop(backward);
        let loss = loss.item_f64()?;
        let _scope = profile_scope("optimizer");
        let update = self.learner.finish(loss)?;
        Ok(BertStep { loss, grad_norm: update.grad_norm, lr: update.lr })
    }

    /// Loss and predictions of `batches`, without dropout and gradient.
    ///
    /// # Errors
    /// If a batch does not fit the model, or no prediction counts.
    pub fn evaluate(&self, batches: &[M::Batch]) -> Result<Evaluation> {
        let (mut sum, mut predictions, mut targets) = (0.0, Vec::new(), Vec::new());
        self.model.params().evaluating(|| {
            no_grad(|| -> Result<()> {
                for batch in batches {
                    let (loss, logits, truth) = self.loss(batch, Reduction::Sum)?;
                    sum += loss.item_f64()?;
                    let pairs = logits.argmax(1)?.to_vec::<i64>()?.into_iter().zip(truth.to_vec::<i64>()?);
                    let (named, truth): (Vec<i64>, Vec<i64>) = pairs.filter(|(_, truth)| *truth != IGNORE_INDEX).unzip();
                    predictions.extend(named);
                    targets.extend(truth);
                }
                Ok(())
            })
        })?;
        if targets.is_empty() {
            return Err(Error::argument("bert_trainer", "there is no prediction to evaluate"));
        }
        Ok(Evaluation { loss: sum / targets.len() as f64, predictions, targets })
    }

    /// Everything that the next step depends on.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn state_dict(&self) -> Result<StateDict> {
        self.learner.state_dict()
    }

    /// Continues from a saved state.
    ///
    /// # Errors
    /// If a tensor is missing or unexpected, or has another shape: then the state is of another model.
    pub fn load_state_dict(&mut self, state: &StateDict) -> Result<()> {
        self.learner.load_state_dict(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::align::linear_decay;
    use crate::data::{Dataset, LabelledSequences, MaskOptions, MaskedSequences, Rng};
    use crate::transformer::BertConfig;

    fn config() -> BertConfig {
        BertConfig {
            vocab_size: 12,
            hidden_size: 16,
            num_hidden_layers: 1,
            num_attention_heads: 2,
            intermediate_size: 32,
            ..BertConfig::default()
        }
    }

    fn options(steps: u64) -> TrainOptions {
        TrainOptions { schedule: linear_decay(steps, 2), ..TrainOptions::new(1e-2) }
    }

    /// Texts of class 1 hold the token 5 before the token 6, those of class 0 behind it.
    fn texts() -> (Vec<Vec<u32>>, Vec<i64>) {
        let text = |i: u32| {
            let (first, second) = if i.is_multiple_of(2) { (6, 5) } else { (5, 6) };
            let mut text = vec![2, 7 + i % 3, first, 8, second, 9];
            text.truncate(if i.is_multiple_of(3) { 5 } else { 6 });
            [text, vec![3]].concat()
        };
        ((0..12).map(text).collect(), (0..12).map(|i| i % 2).collect())
    }

    fn batch<D: Dataset>(data: &D, step: u64) -> D::Batch {
        let all: Vec<usize> = (0..data.len()).collect();
        data.batch(&all, &mut Rng::new(step)).unwrap()
    }

    /// Six steps in one go, and the same with a stop after three: every tensor has the same bits.
    fn resumes<M: BertTask>(build: impl Fn() -> M, data: impl Dataset<Batch = M::Batch>) {
        let trainer = || BertTrainer::new(build(), &options(6)).unwrap();
        let advance = |trainer: &mut BertTrainer<M>, steps: std::ops::Range<u64>| {
            steps.for_each(|step| assert!(trainer.step(&batch(&data, step)).unwrap().loss.is_finite()));
        };
        let (mut whole, mut stopped, mut resumed) = (trainer(), trainer(), trainer());
        advance(&mut whole, 0..6);
        advance(&mut stopped, 0..3);
        // An evaluation draws nothing.
        stopped.evaluate(&[batch(&data, 0)]).unwrap();
        resumed.load_state_dict(&stopped.state_dict().unwrap()).unwrap();
        advance(&mut resumed, 3..6);
        let bits = |trainer: &BertTrainer<M>| -> Vec<(String, Vec<u64>)> {
            let bits = |x: &Tensor| x.to_dtype(DType::F64).unwrap().to_vec::<f64>().unwrap().into_iter().map(f64::to_bits).collect();
            trainer.state_dict().unwrap().into_iter().map(|(name, x)| (name, bits(&x))).collect()
        };
        assert!(whole.steps() == 6 && bits(&whole) == bits(&resumed) && bits(&whole) != bits(&stopped));
    }

    fn masked() -> MaskedSequences {
        MaskedSequences::new(texts().0, MaskOptions::bert(1, 0, vec![0, 1, 2, 3], 12)).unwrap()
    }

    #[test]
    fn a_stopped_training_resumes_to_the_same_bits() {
        resumes(|| config().masked_lm(&Params::seeded(1)).unwrap(), masked());
        let (tokens, labels) = texts();
        let data = LabelledSequences::new(tokens, labels, 0).unwrap();
        resumes(|| config().sequence_classifier(&Params::seeded(1)).unwrap(), data);
    }

    #[test]
    fn the_order_of_words_is_learned() {
        let (tokens, labels) = texts();
        let data = LabelledSequences::new(tokens, labels.clone(), 0).unwrap();
        for bf16 in [false, true] {
            let model = config().sequence_classifier(&Params::seeded(1)).unwrap();
            let mut trainer = BertTrainer::new(model, &TrainOptions { bf16, ..options(120) }).unwrap();
            let first = trainer.evaluate(&[batch(&data, 0)]).unwrap();
            (0..120).for_each(|step| assert!(trainer.step(&batch(&data, step)).is_ok()));
            let last = trainer.evaluate(&[batch(&data, 0)]).unwrap();
            assert!(first.loss > 0.5 && last.loss < 0.1 && last.accuracy() == 1.0, "{bf16}: {} {}", first.loss, last.loss);
            assert!(last.targets == labels && last.predictions == labels && trainer.model().params().mode().is_training());
        }
    }

    #[test]
    fn what_teaches_nothing_is_an_error() {
        let model = || config().masked_lm(&Params::seeded(1)).unwrap();
        let mut trainer = BertTrainer::new(model(), &options(6)).unwrap();
        let mut nothing = batch(&masked(), 0);
        nothing.targets = Tensor::full(*nothing.targets.shape(), IGNORE_INDEX as f64, DType::I64).unwrap();
        assert!(trainer.step(&nothing).is_err() && trainer.evaluate(&[nothing]).is_err() && trainer.evaluate(&[]).is_err());
        assert!(BertTrainer::new(model(), &TrainOptions { gradient_accumulation_steps: 2, ..options(6) }).is_err());
    }
}
