//! The second stage: CLIP's towers learn what captions mean. The text tower's states are what the U-Net will look at.

use crate::data::{Batch, Pictures};
use crate::stage::{Stage, Training};
use kiln::clip::{ClipConfig, ClipModel, ClipTextConfig, ClipVisionConfig, contrastive_loss, recall_at};
use kiln::data::{CaptionedPictures, ImageSet};
use kiln::nn::{LoadMode, StateDict};
use kiln::optim::{AdamW, AdamWOptions, Schedule};
use kiln::prelude::*;
use kiln::pretrained::save_pretrained;
use kiln::text::WordTokenizer;
use kiln::{Error, Result, Tensor};
use std::path::Path;

/// Width of both towers.
pub const WIDTH: usize = 96;
/// Width of the space that both share.
const SHARED: usize = 64;
/// Pictures of a batch that differ in one attribute only.
const ALIKE: usize = 8;
/// The learning rate at its height.
const LR: f64 = 1e-3;

struct Contrasting {
    model: ClipModel,
    params: Params,
    optimizer: AdamW,
    schedule: Schedule,
    steps: u64,
}

impl Training for Contrasting {
    const COLUMNS: &'static [&'static str] = &["loss", "recall"];

    fn steps(&self) -> u64 {
        self.steps
    }

    fn step(&mut self, batch: &Batch) -> Result<Vec<f64>> {
        self.optimizer.set_lr(LR * self.schedule.factor(self.steps))?;
        self.params.zero_grad();
        let logits = self.model.forward(&batch.tokens, None, &batch.pictures)?.logits_per_text;
        let loss = contrastive_loss(&logits)?;
        loss.backward()?;
        self.optimizer.step_clipped(1.0)?;
        self.model.clamp_logit_scale()?;
        self.steps += 1;
        let recall = recall_at(&logits.detach(), 1, |a, b| batch.attributes[a] == batch.attributes[b])?;
        Ok(vec![loss.item_f64()?, recall])
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

/// Restores `model.…` and `optimizer.…`, and returns the number of `steps`.
pub fn load_parts(state: &StateDict, params: &Params, optimizer: &mut impl Optimizer) -> Result<u64> {
    let part = |prefix: &str| -> StateDict {
        state.iter().filter_map(|(name, x)| Some((name.strip_prefix(prefix)?.to_owned(), x.clone()))).collect()
    };
    let steps = state.get("steps").ok_or_else(|| Error::format("resume", "the checkpoint holds no `steps`"))?.item::<i64>()?;
    params.load_state_dict(&part("model."), LoadMode::Strict)?;
    optimizer.load_state_dict(&part("optimizer."))?;
    Ok(steps as u64)
}

fn config() -> Result<ClipConfig> {
    let text_config = ClipTextConfig {
        vocab_size: CaptionedPictures::tokenizer()?.vocab_size(),
        hidden_size: WIDTH,
        intermediate_size: 4 * WIDTH,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        max_position_embeddings: CaptionedPictures::TEXT_LENGTH,
        projection_dim: SHARED,
        hidden_act: "gelu".into(),
        pad_token_id: Some(WordTokenizer::PAD.into()),
        bos_token_id: Some(WordTokenizer::BOS.into()),
        eos_token_id: Some(WordTokenizer::EOS.into()),
        ..ClipTextConfig::default()
    };
    let vision_config = ClipVisionConfig {
        hidden_size: WIDTH,
        intermediate_size: 4 * WIDTH,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        image_size: crate::SIDE,
        patch_size: 4,
        projection_dim: SHARED,
        hidden_act: "gelu".into(),
        ..ClipVisionConfig::default()
    };
    Ok(ClipConfig { text_config, vision_config, projection_dim: SHARED, ..ClipConfig::default() })
}

/// Trains both towers and saves that of texts in `folder`; `false` if Ctrl-C stopped it.
pub fn train(stage: &Stage, digits: &ImageSet, folder: &Path) -> Result<bool> {
    let (config, params) = (config()?, Params::seeded(stage.seed));
    let model = ClipModel::new(&config, &params)?;
    let optimizer = AdamW::new(params.params(), AdamWOptions { lr: LR, weight_decay: 0.01, ..AdamWOptions::default() })?;
    let schedule = Schedule::cosine(stage.total, 0.02).with_warmup(100.min(stage.total / 4));
    let mut training = Contrasting { model, params, optimizer, schedule, steps: 0 };
    if !stage.train(&mut training, Pictures::alike(digits, ALIKE, stage.seed)?)? {
        return Ok(false);
    }
    // The tower by itself, as a pipeline's folder has it.
    let of_text = training.params.state_dict().into_iter().filter(|(name, _)| name.starts_with("text_model.")).collect();
    let tower = Params::new();
    tower.build_from(of_text, LoadMode::Strict, |params| kiln::clip::ClipTextModel::new(&config.text_config, None, params))?;
    save_pretrained(folder.join("text_encoder"), &config.text_config, &tower, u64::MAX)?;
    Ok(true)
}
