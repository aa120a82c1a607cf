//! What `config.json` says of a tower, and of both.

use super::{ClipModel, ClipTextModel, ClipVisionModel};
use crate::nn::Params;
use crate::pretrained::{Layout, Library, Pretrained};
use kiln_tensor::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The text tower's hyper-parameters, by the names of `config.json`. The default is that of CLIP ViT-B/32.
///
/// As a [`Pretrained`] it stands for `CLIPTextModel`, the tower without projection; [`WithProjection`] of it for
/// `CLIPTextModelWithProjection`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct ClipTextConfig {
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Width.
    pub hidden_size: usize,
    /// Width inside of the feed-forward part.
    pub intermediate_size: usize,
    /// Width of the embeddings that both towers share.
    pub projection_dim: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// The longest text.
    pub max_position_embeddings: usize,
    /// Activation inside of the feed-forward part: `quick_gelu`, `gelu`, ….
    pub hidden_act: String,
    /// ε of the norms.
    pub layer_norm_eps: f64,
    /// Dropout of the attention's weights.
    pub attention_dropout: f64,
    /// Factor of the first weights.
    pub initializer_factor: f64,
    /// The token of padding.
    pub pad_token_id: Option<i64>,
    /// The token that a text starts with.
    pub bos_token_id: Option<i64>,
    /// The token that ends a text, whose state stands for it. With 2, which old files say wrongly, it is the text's largest token.
    pub eos_token_id: Option<i64>,
    /// What else the file says.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Default for ClipTextConfig {
    fn default() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            projection_dim: 512,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: "quick_gelu".into(),
            layer_norm_eps: 1e-5,
            attention_dropout: 0.0,
            initializer_factor: 1.0,
            pad_token_id: Some(1),
            bos_token_id: Some(49406),
            eos_token_id: Some(49407),
            other: Map::new(),
        }
    }
}

/// The image tower's hyper-parameters, by the names of `config.json`. The default is that of CLIP ViT-B/32.
///
/// As a [`Pretrained`] it stands for `CLIPVisionModel`, the tower without projection; [`WithProjection`] of it for
/// `CLIPVisionModelWithProjection`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct ClipVisionConfig {
    /// Width.
    pub hidden_size: usize,
    /// Width inside of the feed-forward part.
    pub intermediate_size: usize,
    /// Width of the embeddings that both towers share.
    pub projection_dim: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Channels of a picture.
    pub num_channels: usize,
    /// Height and width of a picture.
    pub image_size: usize,
    /// Height and width of a patch; must divide `image_size`.
    pub patch_size: usize,
    /// Activation inside of the feed-forward part: `quick_gelu`, `gelu`, ….
    pub hidden_act: String,
    /// ε of the norms.
    pub layer_norm_eps: f64,
    /// Dropout of the attention's weights.
    pub attention_dropout: f64,
    /// Deviation of the first weights of the patches' kernel and of the positions.
    pub initializer_range: f64,
    /// Factor of the first weights.
    pub initializer_factor: f64,
    /// What else the file says.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Default for ClipVisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            projection_dim: 512,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 32,
            hidden_act: "quick_gelu".into(),
            layer_norm_eps: 1e-5,
            attention_dropout: 0.0,
            initializer_range: 0.02,
            initializer_factor: 1.0,
            other: Map::new(),
        }
    }
}

/// Both towers. The width that they share is this `projection_dim`, whatever theirs say.
///
/// Where a file also has a `text_config_dict` or `vision_config_dict`, as old ones do, it describes the tower, as in `transformers`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(from = "Written")]
pub struct ClipConfig {
    /// The text tower.
    pub text_config: ClipTextConfig,
    /// The image tower.
    pub vision_config: ClipVisionConfig,
    /// Width of the embeddings.
    pub projection_dim: usize,
    /// The logarithm of the factor of the similarities, at first: ln(1 / 0.07).
    pub logit_scale_init_value: f64,
    /// What else the file says.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Default for ClipConfig {
    fn default() -> Self {
        Self {
            text_config: ClipTextConfig::default(),
            vision_config: ClipVisionConfig::default(),
            projection_dim: 512,
            logit_scale_init_value: 2.6592,
            other: Map::new(),
        }
    }
}

/// A [`ClipConfig`] as files have it.
#[derive(Deserialize)]
#[serde(default)]
struct Written {
    text_config: ClipTextConfig,
    text_config_dict: Option<ClipTextConfig>,
    vision_config: ClipVisionConfig,
    vision_config_dict: Option<ClipVisionConfig>,
    projection_dim: usize,
    logit_scale_init_value: f64,
    #[serde(flatten)]
    other: Map<String, Value>,
}

impl Default for Written {
    fn default() -> Self {
        let ClipConfig { text_config, vision_config, projection_dim, logit_scale_init_value, other } = ClipConfig::default();
        Self { text_config, text_config_dict: None, vision_config, vision_config_dict: None, projection_dim, logit_scale_init_value, other }
    }
}

impl From<Written> for ClipConfig {
    fn from(written: Written) -> Self {
        let Written { mut text_config, text_config_dict, mut vision_config, vision_config_dict, .. } = written;
        let Written { projection_dim, logit_scale_init_value, other, .. } = written;
        // What the dictionary leaves out has the defaults, too; only what has no field here is kept.
        if let Some(mut config) = text_config_dict {
            text_config.other.append(&mut config.other);
            text_config = ClipTextConfig { other: text_config.other, ..config };
        }
        if let Some(mut config) = vision_config_dict {
            vision_config.other.append(&mut config.other);
            vision_config = ClipVisionConfig { other: vision_config.other, ..config };
        }
        Self { text_config, vision_config, projection_dim, logit_scale_init_value, other }
    }
}

/// The configuration of a tower with its projection: what [`load_pretrained`](crate::transformer::load_pretrained) is told to make of a
/// folder.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WithProjection<C>(pub C);

/// Buffers that older files hold.
const IGNORED: &[&str] = &["embeddings.position_ids"];

const TEXT: Layout =
    Layout { prefix: "text_model.", heads: &["text_projection."], ignored: IGNORED, ..Layout::new(Library::Transformers, "CLIPTextModel") };

const VISION: Layout = Layout { architecture: "CLIPVisionModel", prefix: "vision_model.", heads: &["visual_projection."], ..TEXT };

impl Pretrained for ClipTextConfig {
    type Model = ClipTextModel;

    fn layout(&self) -> Layout {
        // A file of the tower with projection serves as well.
        Layout { ignored: &["embeddings.position_ids", "text_projection.weight"], ..TEXT }
    }

    fn model_type(&self) -> &'static str {
        "clip_text_model"
    }

    fn build_model(&self, params: &Params) -> Result<ClipTextModel> {
        ClipTextModel::new(self, None, params)
    }
}

impl Pretrained for WithProjection<ClipTextConfig> {
    type Model = ClipTextModel;

    fn layout(&self) -> Layout {
        Layout { architecture: "CLIPTextModelWithProjection", ..TEXT }
    }

    fn model_type(&self) -> &'static str {
        "clip_text_model"
    }

    fn build_model(&self, params: &Params) -> Result<ClipTextModel> {
        ClipTextModel::new(&self.0, Some(self.0.projection_dim), params)
    }
}

impl Pretrained for ClipVisionConfig {
    type Model = ClipVisionModel;

    fn layout(&self) -> Layout {
        Layout { ignored: &["embeddings.position_ids", "visual_projection.weight"], ..VISION }
    }

    fn model_type(&self) -> &'static str {
        "clip_vision_model"
    }

    fn build_model(&self, params: &Params) -> Result<ClipVisionModel> {
        ClipVisionModel::new(self, None, params)
    }
}

impl Pretrained for WithProjection<ClipVisionConfig> {
    type Model = ClipVisionModel;

    fn layout(&self) -> Layout {
        Layout { architecture: "CLIPVisionModelWithProjection", ..VISION }
    }

    fn model_type(&self) -> &'static str {
        "clip_vision_model"
    }

    fn build_model(&self, params: &Params) -> Result<ClipVisionModel> {
        ClipVisionModel::new(&self.0, Some(self.0.projection_dim), params)
    }
}

impl Pretrained for ClipConfig {
    type Model = ClipModel;

    fn layout(&self) -> Layout {
        Layout { architecture: "CLIPModel", ignored: IGNORED, ..Layout::default() }
    }

    fn model_type(&self) -> &'static str {
        "clip"
    }

    fn build_model(&self, params: &Params) -> Result<ClipModel> {
        ClipModel::new(self, params)
    }
}
