//! Reward and value models: a language model whose hidden states a linear head turns into numbers; and the training on preferences.

use super::batch::{PreferencePair, ROWS_AT_ONCE, TokenBatch, is_half, parts};
use super::learner::{Learner, TrainOptions};
use super::rollout::Completion;
use crate::align::reward::{PreferenceLoss, RewardLossOptions, reward_loss};
use crate::data::TokenSequence;
use crate::nn::{Init, Linear, Module, Params, StateDict};
use crate::transformer::{CausalConfig, CausalLm, Layout, LlamaKind, Pass, Pretrained};
use kiln_autograd::{TensorExt, no_grad};
use kiln_tensor::{DType, Error, Result, Tensor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::json;
use std::sync::Arc;

/// The deviation of a fresh head's weights: Hugging Face's `initializer_range`.
const HEAD_STD: f64 = 0.02;

/// A language model without its output matrix, and `score.weight` (1, C) in its place: one number at each token. Names are those of Hugging
/// Face's models for sequence classification with one label.
///
/// Source: Ouyang et al. 2022.
#[derive(Clone)]
pub struct RewardModel {
    backbone: Arc<dyn CausalLm>,
    score: Linear,
}

/// A value model is the same network, read at every token.
pub type ValueModel = RewardModel;

impl RewardModel {
    /// A head on `backbone`, in whose parameters it registers: fresh from N(0, 0.02²), or from the state dictionary that is being built from.
    ///
    /// ```
    /// # use kiln_models::align::RewardModel;
    /// # use kiln_models::nn::Params;
    /// # use kiln_models::transformer::Gpt2Config;
    /// # use std::sync::Arc;
    /// # fn main() -> kiln_tensor::Result<()> {
    /// let config = Gpt2Config { vocab_size: 7, n_positions: 8, n_embd: 16, n_layer: 1, n_head: 2, ..Gpt2Config::default() };
    /// let model = RewardModel::new(Arc::new(config.build(&Params::seeded(0))?))?;
    /// assert_eq!(model.score(&[vec![1, 2, 3], vec![4]])?.len(), 2);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// If the backbone has a head of that name already.
    pub fn new(backbone: Arc<dyn CausalLm>) -> Result<Self> {
        let width = backbone.shape().hidden_size;
        let score = Linear::with_init(&backbone.params().scope("score"), width, 1, Init::Normal { mean: 0.0, std: HEAD_STD }, None)?;
        Ok(Self { backbone, score })
    }

    /// All weights, those of the backbone and the head.
    pub fn params(&self) -> &Params {
        self.backbone.params()
    }

    /// The language model below.
    pub fn backbone(&self) -> &Arc<dyn CausalLm> {
        &self.backbone
    }

    /// The score at every place: tokens (B, T) → (B, T), in f32 or better.
    ///
    /// # Errors
    /// As [`CausalLm::hidden_states`].
    pub fn values(&self, tokens: &Tensor) -> Result<Tensor> {
        let values = self.score.forward(&self.backbone.hidden_states(tokens, Pass::default())?)?.squeeze(-1)?;
        if is_half(values.dtype()) { values.to_dtype(DType::F32) } else { Ok(values) }
    }

    /// The scores of whole texts, read at their last tokens, without gradient and dropout.
    ///
    /// # Errors
    /// If a text is empty or longer than the model's context.
    pub fn score(&self, texts: &[Vec<u32>]) -> Result<Vec<f64>> {
        let samples: Vec<TokenSequence> = texts.iter().map(|text| TokenSequence::new(text.clone())).collect();
        let part = |part: &[TokenSequence]| -> Result<Vec<f64>> {
            self.last(&self.batch(&part.iter().collect::<Vec<_>>())?)?.to_dtype(DType::F64)?.to_vec()
        };
        let scores = || samples.chunks(ROWS_AT_ONCE).map(part).collect::<Result<Vec<_>>>();
        Ok(self.params().evaluating(|| no_grad(scores))?.concat())
    }

    /// The scores of answers behind their prompts: what [`PpoTrainer::step`](super::PpoTrainer::step) and
    /// [`GrpoTrainer::step`](super::GrpoTrainer::step) ask for.
    ///
    /// # Errors
    /// As [`score`](Self::score).
    pub fn score_completions(&self, prompts: &[Vec<u32>], completions: &[Completion]) -> Result<Vec<f64>> {
        let texts: Vec<Vec<u32>> = prompts.iter().zip(completions).map(|(prompt, answer)| [&prompt[..], &answer.tokens].concat()).collect();
        self.score(&texts)
    }

    fn batch(&self, samples: &[&TokenSequence]) -> Result<TokenBatch> {
        TokenBatch::new("reward_model", &*self.backbone, samples, None)
    }

    /// The score at each text's last token, (B).
    fn last(&self, batch: &TokenBatch) -> Result<Tensor> {
        let values = self.values(&batch.tokens)?;
        let last = batch.lengths.iter().map(|&length| length.saturating_sub(1) as i64).collect();
        let last = Tensor::from_vec(last, [batch.lengths.len(), 1])?.to_device(values.device())?;
        values.gather(1, &last)?.squeeze(1)
    }
}

/// A reward model in Hugging Face's layout, that of sequence classification with one label, which TRL takes for a reward model:
/// [`save_pretrained`](crate::transformer::save_pretrained) and [`load_pretrained`](crate::transformer::load_pretrained) write and read it, and
/// [`load_for_tuning`](crate::transformer::load_for_tuning) puts a fresh head on a language model.
#[derive(Clone, PartialEq, Debug)]
pub struct RewardConfig(pub CausalConfig);

impl Serialize for RewardConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut fields = serde_json::to_value(&self.0).map_err(serde::ser::Error::custom)?;
        if let Some(fields) = fields.as_object_mut() {
            // How the reference writes that there is one label.
            fields.insert("id2label".into(), json!({"0": "LABEL_0"}));
            fields.insert("label2id".into(), json!({"LABEL_0": 0}));
        }
        fields.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for RewardConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        CausalConfig::deserialize(deserializer).map(Self)
    }
}

impl Pretrained for RewardConfig {
    type Model = RewardModel;

    fn layout(&self) -> Layout {
        let architecture = match &self.0 {
            CausalConfig::Gpt2(_) => "GPT2ForSequenceClassification",
            CausalConfig::Opt(_) => "OPTForSequenceClassification",
            CausalConfig::Llama(config) => match config.model_type {
                LlamaKind::Llama => "LlamaForSequenceClassification",
                LlamaKind::Mistral => "MistralForSequenceClassification",
                LlamaKind::Qwen2 => "Qwen2ForSequenceClassification",
                LlamaKind::Qwen3 => "Qwen3ForSequenceClassification",
            },
        };
        Layout { architecture, heads: &["score.", "lm_head."], tied: &[], ..self.0.layout() }
    }

    fn model_type(&self) -> &'static str {
        self.0.model_type()
    }

    fn build_model(&self, params: &Params) -> Result<RewardModel> {
        // Tied, the model has no matrix for logits, which a file of this layout lacks.
        let mut config = self.0.clone();
        match &mut config {
            CausalConfig::Gpt2(config) => config.tie_word_embeddings = true,
            CausalConfig::Opt(config) => config.tie_word_embeddings = true,
            CausalConfig::Llama(config) => config.tie_word_embeddings = true,
        }
        RewardModel::new(Arc::new(config.build_model(params)?))
    }

    fn fresh_head(&self, body: &StateDict, params: &Params) -> Result<StateDict> {
        // The width that a tensor confirms: that of the last norm.
        let norms = ["transformer.ln_f.weight", "model.decoder.final_layer_norm.weight", "model.norm.weight"];
        let Some(norm) = norms.iter().find_map(|name| body.get(*name)) else {
            return Err(Error::format("reward_model", "the file has no norm at its end, whose width the head would have"));
        };
        let head = params.generator().randn([1, norm.numel()], params.options())?.mul_scalar(HEAD_STD)?;
        Ok(StateDict::from([("score.weight".to_owned(), head)]))
    }
}

/// How a [`RewardTrainer`] trains.
#[derive(Clone, Debug)]
pub struct RewardOptions {
    /// How weights are trained.
    pub train: TrainOptions,
    /// The weight of the term that keeps the scores around zero; none, or 0.01.
    pub center_rewards_coefficient: Option<f64>,
}

impl Default for RewardOptions {
    /// TRL's: a rate of 1e-4, no dropout, no centring.
    fn default() -> Self {
        Self { train: TrainOptions { disable_dropout: true, ..TrainOptions::new(1e-4) }, center_rewards_coefficient: None }
    }
}

/// What a step did.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct RewardMetrics {
    /// The loss.
    pub loss: f64,
    /// The share of pairs whose chosen text scores higher.
    pub accuracy: f64,
    /// The mean lead of chosen texts.
    pub margin: f64,
    /// The gradient's norm before clipping.
    pub grad_norm: f64,
    /// The learning rate.
    pub lr: f64,
}

/// Trains a [`RewardModel`] on preferences: [`reward_loss`].
pub struct RewardTrainer {
    model: RewardModel,
    options: RewardOptions,
    learner: Learner,
}

impl RewardTrainer {
    /// A trainer of the model's parameters that are not frozen.
    ///
    /// # Errors
    /// If all are frozen, or an option is out of its range.
    pub fn new(model: RewardModel, options: RewardOptions) -> Result<Self> {
        let learner = Learner::new("reward", model.params(), &options.train)?;
        Ok(Self { model, options, learner })
    }

    /// The model.
    pub fn model(&self) -> &RewardModel {
        &self.model
    }

    /// Steps so far.
    pub fn steps(&self) -> u64 {
        self.learner.steps()
    }

    /// One step on a batch. Masks and references of the pairs are not read.
    ///
    /// # Errors
    /// If there are no pairs, some have a margin and others none, a text is empty or longer than the model's context, or the
    /// loss is not finite.
    pub fn step(&mut self, pairs: &[PreferencePair]) -> Result<RewardMetrics> {
        expect_pairs(pairs)?;
        self.learner.begin()?;
        let (mut loss, mut accuracy, mut margin) = (0.0, 0.0, 0.0);
        for part in parts(pairs, self.options.train.gradient_accumulation_steps) {
            let share = part.len() as f64 / pairs.len() as f64;
            let out = self.loss(part)?;
            let part_loss = out.loss.mul_scalar(share)?;
            loss += part_loss.item_f64()?;
            accuracy += share * out.accuracy()?;
            margin += share * out.margin()?;
            part_loss.backward()?;
        }
        let update = self.learner.finish(loss)?;
        Ok(RewardMetrics { loss, accuracy, margin, grad_norm: update.grad_norm, lr: update.lr })
    }

    /// The share of pairs whose chosen text scores higher, without dropout and gradient.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn evaluate(&self, pairs: &[PreferencePair]) -> Result<f64> {
        expect_pairs(pairs)?;
        let mut accuracy = 0.0;
        for part in parts(pairs, self.options.train.gradient_accumulation_steps) {
            let out = self.model.params().evaluating(|| no_grad(|| self.loss(part)))?;
            accuracy += out.accuracy()? * part.len() as f64 / pairs.len() as f64;
        }
        Ok(accuracy)
    }

    fn loss(&self, pairs: &[PreferencePair]) -> Result<PreferenceLoss> {
        let samples: Vec<&TokenSequence> = pairs.iter().map(|pair| &pair.chosen).chain(pairs.iter().map(|pair| &pair.rejected)).collect();
        let batch = self.model.batch(&samples)?;
        let scores = self.options.train.autocast(|| self.model.last(&batch))?;
        let margins: Vec<f64> = pairs.iter().filter_map(|pair| pair.margin).collect();
        let margin = match margins.len() {
            0 => None,
            n if n == pairs.len() => Some(Tensor::from_vec(margins, n)?.to_dtype(scores.dtype())?.to_device(scores.device())?),
            n => return Err(Error::argument("reward", format!("{n} of {} pairs have a margin; give it for all or for none", pairs.len()))),
        };
        let options = RewardLossOptions { margin: margin.as_ref(), center_rewards_coefficient: self.options.center_rewards_coefficient };
        reward_loss(&scores.narrow(0, 0, pairs.len())?, &scores.narrow(0, pairs.len(), pairs.len())?, &options)
    }

    /// Everything that the next step depends on: weights, optimiser, generator.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn state_dict(&self) -> Result<StateDict> {
        self.learner.state_dict()
    }

    /// Continues from a saved state.
    ///
    /// # Errors
    /// If a tensor is missing or unexpected, or has another shape.
    pub fn load_state_dict(&mut self, state: &StateDict) -> Result<()> {
        self.learner.load_state_dict(state)
    }
}

fn expect_pairs(pairs: &[PreferencePair]) -> Result<()> {
    if pairs.is_empty() { Err(Error::argument("reward", "there are no pairs in the batch")) } else { Ok(()) }
}
