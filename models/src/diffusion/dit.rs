//! The diffusion transformer: patches of a noisy picture as a sequence, through blocks that time and class scale, shift and gate.
//!
//! Source: Peebles and Xie, *Scalable Diffusion Models with Transformers*, 2023; names of `diffusers`' `DiTTransformer2DModel`.

use super::blocks::{Attention, AttentionShape, TimestepEmbedding, timestep_waves};
use crate::nn::{Conv2d, ConvOptions, Dropout, Embedding, Init, LayerNorm, Linear, Module, Params};
use crate::pretrained::{Layout, Library, Pretrained};
use kiln_tensor::{Activation, DType, Device, Error, Result, Tensor};
use serde::{Deserialize, Serialize};
use std::sync::{Mutex, PoisonError};

/// Width of the sines that a timestep becomes.
const WAVES: usize = 256;
/// ε of the norms whose scale and shift come from time and class.
const MODULATED_EPS: f64 = 1e-6;

/// The hyper-parameters, by the names of `config.json`. The default is that of `diffusers`: DiT-XL/2 on latents of four channels, without the
/// learned variance of the published weights (`out_channels: 8`).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct DitConfig {
    /// Heads.
    pub num_attention_heads: usize,
    /// Width of a head; that of the model is `num_attention_heads` times this, and a multiple of 4.
    pub attention_head_dim: usize,
    /// Channels of the picture.
    pub in_channels: usize,
    /// Channels of the output; as many as of the input if absent. Twice as many if the model tells the variance too.
    pub out_channels: Option<usize>,
    /// Blocks.
    pub num_layers: usize,
    /// Dropout of what each part of a block adds.
    pub dropout: f64,
    /// Not used; files say it.
    pub norm_num_groups: usize,
    /// Whether query, key and value have biases.
    pub attention_bias: bool,
    /// Height and width that the model is trained with: the scale of its positions.
    pub sample_size: usize,
    /// Height and width of a patch.
    pub patch_size: usize,
    /// The activation inside of the feed-forward parts: `gelu-approximate` or `gelu`.
    pub activation_fn: String,
    /// Classes. The table has a row more, for no class.
    pub num_embeds_ada_norm: usize,
    /// Whether the scores are computed in f32: they always are.
    pub upcast_attention: bool,
    /// `ada_norm_zero`.
    pub norm_type: String,
    /// Whether the norm before a feed-forward part has a scale and a shift of its own.
    pub norm_elementwise_affine: bool,
    /// ε of that norm.
    pub norm_eps: f64,
    /// What else the file says.
    #[serde(flatten)]
    pub other: serde_json::Map<String, serde_json::Value>,
}

impl Default for DitConfig {
    fn default() -> Self {
        Self {
            num_attention_heads: 16,
            attention_head_dim: 72,
            in_channels: 4,
            out_channels: None,
            num_layers: 28,
            dropout: 0.0,
            norm_num_groups: 32,
            attention_bias: true,
            sample_size: 32,
            patch_size: 2,
            activation_fn: "gelu-approximate".into(),
            num_embeds_ada_norm: 1000,
            upcast_attention: false,
            norm_type: "ada_norm_zero".into(),
            norm_elementwise_affine: false,
            norm_eps: 1e-5,
            other: serde_json::Map::new(),
        }
    }
}

/// What a [`DitConfig`] says, checked.
#[derive(Clone, Copy)]
struct Plan {
    width: usize,
    heads: usize,
    head_width: usize,
    outputs: usize,
    activation: Activation,
}

impl DitConfig {
    fn plan(&self) -> Result<Plan> {
        let wrong = |message: String| Err(Error::argument("dit", message));
        let Self { num_attention_heads: heads, attention_head_dim: head_width, patch_size, sample_size, .. } = *self;
        // Eight times the width is the largest extent of a weight.
        let width = heads.checked_mul(head_width).filter(|width| width.checked_mul(8).is_some() && *width > 0 && width % 4 == 0);
        let Some(width) = width else {
            return wrong(format!("{heads} heads of {head_width} elements give no width that is a multiple of 4"));
        };
        if patch_size == 0 || sample_size < patch_size {
            return wrong(format!("sample_size = {sample_size} has no patch of patch_size = {patch_size}"));
        }
        let out_channels = self.out_channels.unwrap_or(self.in_channels);
        let Some(outputs) = patch_size.checked_mul(patch_size).and_then(|area| area.checked_mul(out_channels)).filter(|&n| n > 0) else {
            return wrong(format!("a patch of {patch_size}×{patch_size} of {out_channels} channels is none"));
        };
        let activation = match self.activation_fn.as_str() {
            "gelu-approximate" => Activation::GeluTanh,
            "gelu" => Activation::Gelu,
            other => return wrong(format!("activation_fn `{other}` is not one of gelu-approximate, gelu")),
        };
        if self.norm_type != "ada_norm_zero" {
            return wrong(format!("norm_type `{}` is not ada_norm_zero", self.norm_type));
        }
        if self.num_layers == 0 || self.num_embeds_ada_norm == usize::MAX {
            return wrong(format!("num_layers = {}, num_embeds_ada_norm = {}", self.num_layers, self.num_embeds_ada_norm));
        }
        Ok(Plan { width, heads, head_width, outputs, activation })
    }
}

impl Pretrained for DitConfig {
    type Model = Dit;

    fn layout(&self) -> Layout {
        Layout::new(Library::Diffusers, "DiTTransformer2DModel")
    }

    fn build_model(&self, params: &Params) -> Result<Dit> {
        Dit::new(params, self)
    }
}

/// linear_2(silu(linear_1(waves(t)))) + row of the class: `timestep_embedder`, `class_embedder.embedding_table`.
struct ConditionEmbedding {
    timestep_embedder: TimestepEmbedding,
    class_embedder: Embedding,
}

impl ConditionEmbedding {
    fn new(params: &Params, width: usize, classes: usize) -> Result<Self> {
        let table = params.scope("class_embedder").scope("embedding_table");
        Ok(Self {
            timestep_embedder: TimestepEmbedding::new(&params.scope("timestep_embedder"), WAVES, width)?,
            class_embedder: Embedding::with_init(&table, classes + 1, width, Init::Normal { mean: 0.0, std: 0.02 })?,
        })
    }

    /// The waves (B, 256) and labels (B) → (B, C).
    fn forward(&self, waves: &Tensor, labels: &Tensor) -> Result<Tensor> {
        self.timestep_embedder.forward(waves)?.add(&self.class_embedder.forward(labels)?)
    }
}

/// A projection of the condition that starts at zero, so that a block starts as the identity and the model's output as zero.
fn zero_linear(params: &Params, inputs: usize, outputs: usize) -> Result<Linear> {
    Linear::with_init(params, inputs, outputs, Init::Zeros, Some(Init::Zeros))
}

/// `count` parts (B, 1, C) of a projection of silu(condition).
fn modulation<const N: usize>(projection: &Linear, condition: &Tensor) -> Result<[Tensor; N]> {
    let parts = projection.forward(&condition.silu()?)?.unsqueeze(1)?.chunk(N, -1)?;
    <[Tensor; N]>::try_from(parts).map_err(|_| Error::shape("dit", "the projection of the condition has another width"))
}

/// x · (1 + scale) + shift
fn modulate(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
    x.mul(&scale.add_scalar(1.0)?)?.add(shift)
}

/// x + gate₁ · attention(modulated norm(x)), and then + gate₂ · feed-forward(modulated norm(x)): an adaLN-Zero block. Named `norm1.emb`,
/// `norm1.linear`, `attn1`, `norm3` (where it has weights), `ff.net.0.proj`, `ff.net.2`.
struct Block {
    embedding: ConditionEmbedding,
    linear: Linear,
    attention: Attention,
    norm3: LayerNorm,
    up: Linear,
    down: Linear,
    dropout: Dropout,
    plan: Plan,
}

impl Block {
    fn new(params: &Params, config: &DitConfig, plan: Plan) -> Result<Self> {
        let Plan { width, heads, head_width, .. } = plan;
        let (norm1, net) = (params.scope("norm1"), params.scope("ff").scope("net"));
        let affine = config.norm_elementwise_affine;
        let shape = AttentionShape { width, context_width: width, heads, head_width, bias: config.attention_bias };
        Ok(Self {
            embedding: ConditionEmbedding::new(&norm1.scope("emb"), width, config.num_embeds_ada_norm)?,
            linear: zero_linear(&norm1.scope("linear"), width, 6 * width)?,
            attention: Attention::new(&params.scope("attn1"), shape)?,
            norm3: LayerNorm::with_options(&params.scope("norm3"), width, config.norm_eps, affine, affine)?,
            up: Linear::new(&net.index(0).scope("proj"), width, 4 * width, true)?,
            down: Linear::new(&net.index(2), 4 * width, width, true)?,
            dropout: Dropout::new(params, config.dropout)?,
            plan,
        })
    }

    /// (B, T, C) → (B, T, C)
    fn forward(&self, x: &Tensor, waves: &Tensor, labels: &Tensor) -> Result<Tensor> {
        let condition = self.embedding.forward(waves, labels)?;
        let [shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp] = modulation(&self.linear, &condition)?;
        let h = modulate(&x.layer_norm(self.plan.width, None, None, MODULATED_EPS)?, &shift_msa, &scale_msa)?;
        let x = self.dropout.forward(&self.attention.forward(&h, None)?)?.mul(&gate_msa)?.add(x)?;
        let h = modulate(&self.norm3.forward(&x)?, &shift_mlp, &scale_mlp)?;
        let h = self.dropout.forward(&self.up.forward_activated(&h, self.plan.activation)?)?; // (B, T, 4C)
        self.down.forward(&h)?.mul(&gate_mlp)?.add(&x)
    }
}

/// A positional table and what it was made for: rows, columns, dtype and device.
type Positions = ([usize; 2], DType, Device, Tensor);

/// The network: a noisy picture (B, in_channels, H, W), its timesteps and classes, to (B, out_channels, H, W).
///
/// ```
/// # use kiln_models::diffusion::{Dit, DitConfig};
/// # use kiln_models::nn::Params;
/// # use kiln_tensor::{Generator, Result, Tensor};
/// # fn main() -> Result<()> {
/// let config = DitConfig {
///     num_attention_heads: 2, attention_head_dim: 16, in_channels: 1, num_layers: 2, sample_size: 28, patch_size: 4, num_embeds_ada_norm: 10,
///     ..DitConfig::default()
/// };
/// let dit = Dit::new(&Params::seeded(0), &config)?;
/// let (x, t) = (Generator::new(1).randn([3, 1, 28, 28], ())?, Tensor::from_vec(vec![0f32, 500., 999.], 3)?);
/// assert_eq!(dit.forward(&x, &t, None)?.dims(), x.dims());
/// # Ok(()) }
/// ```
pub struct Dit {
    proj: Conv2d,
    blocks: Vec<Block>,
    proj_out_1: Linear,
    proj_out_2: Linear,
    plan: Plan,
    config: DitConfig,
    /// The latest: a run of steps has pictures of one size.
    positions: Mutex<Option<Positions>>,
}

impl Dit {
    /// A model of the weights of `params`.
    ///
    /// # Errors
    /// If the configuration is contradictory or asks for something that is not there.
    pub fn new(params: &Params, config: &DitConfig) -> Result<Self> {
        let plan = config.plan()?;
        let list = params.scope("transformer_blocks");
        let patches = ConvOptions::new().with_stride(config.patch_size);
        let proj = params.scope("pos_embed").scope("proj");
        Ok(Self {
            proj: Conv2d::new(&proj, config.in_channels, plan.width, config.patch_size, patches)?,
            blocks: (0..config.num_layers).map(|i| Block::new(&list.index(i), config, plan)).collect::<Result<_>>()?,
            proj_out_1: zero_linear(&params.scope("proj_out_1"), plan.width, 2 * plan.width)?,
            proj_out_2: zero_linear(&params.scope("proj_out_2"), plan.width, plan.outputs)?,
            plan,
            config: config.clone(),
            positions: Mutex::default(),
        })
    }

    /// The configuration that it was made of.
    pub fn config(&self) -> &DitConfig {
        &self.config
    }

    /// The label that stands for no class.
    pub fn null_label(&self) -> i64 {
        self.config.num_embeds_ada_norm as i64
    }

    /// What the model makes of `x` (B, in_channels, H, W) at `timesteps` (B), any number type: (B, out_channels, H, W). `labels` is i64 (B);
    /// `None` is [`null_label`](Dit::null_label) for all. Dropping labels in training is the trainer's part.
    ///
    /// # Errors
    /// If H or W is no multiple of `patch_size`, shapes do not fit each other, or a label is out of range.
    pub fn forward(&self, x: &Tensor, timesteps: &Tensor, labels: Option<&Tensor>) -> Result<Tensor> {
        let [batch, channels, height, width] = x.dims_n("dit")?;
        let patch = self.config.patch_size;
        if channels != self.config.in_channels || !height.is_multiple_of(patch) || !width.is_multiple_of(patch) || height * width == 0 {
            let expected = format!("{} channels, and a height and width that are multiples of {patch}", self.config.in_channels);
            return Err(Error::shape("dit", format!("the picture is {}, expected {expected}", x.shape())));
        }
        let none = || Tensor::full([batch], self.null_label() as f64, (DType::I64, x.device()));
        let labels = labels.map_or_else(none, |labels| Ok(labels.clone()))?;
        for (name, given) in [("timesteps", timesteps), ("labels", &labels)] {
            if given.dims() != [batch] {
                return Err(Error::shape("dit", format!("{name} are {}, expected one for each of {batch} pictures", given.shape())));
            }
        }
        let waves = timestep_waves(timesteps, WAVES, true, 1.0)?.to_dtype(x.dtype())?;
        let grid = [height / patch, width / patch];
        let mut h = self.proj.forward(x)?.flatten(2, 3)?.transpose(1, 2)?; // (B, T, C)
        h = h.add(&self.positions(grid, h.dtype(), h.device())?)?;
        for block in &self.blocks {
            h = block.forward(&h, &waves, &labels)?;
        }
        let [first, ..] = &self.blocks[..] else { return Err(Error::argument("dit", "the model has no block")) };
        let [shift, scale] = modulation(&self.proj_out_1, &first.embedding.forward(&waves, &labels)?)?;
        let h = modulate(&h.layer_norm(self.plan.width, None, None, MODULATED_EPS)?, &shift, &scale)?;
        self.to_picture(&self.proj_out_2.forward(&h)?, grid)
    }

    /// (B, T, p·p·C) → (B, C, H, W)
    fn to_picture(&self, patches: &Tensor, [rows, columns]: [usize; 2]) -> Result<Tensor> {
        let (batch, p) = (patches.dim(0)?, self.config.patch_size);
        let channels = self.plan.outputs / (p * p);
        let split = patches.reshape([batch, rows, columns, p, p, channels])?.permute(&[0, 5, 1, 3, 2, 4])?;
        split.reshape([batch, channels, rows * p, columns * p])
    }

    /// The positions (T, C) of a grid of patches: of each the sines and cosines of its column, then those of its row, both scaled to the grid
    /// that the model is trained with.
    fn positions(&self, grid: [usize; 2], dtype: DType, device: Device) -> Result<Tensor> {
        let mut kept = self.positions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, its_dtype, its_device, table)) = &*kept
            && (*of, *its_dtype, *its_device) == (grid, dtype, device)
        {
            return Ok(table.clone());
        }
        let table = position_table(grid, self.config.sample_size / self.config.patch_size, self.plan.width)?;
        let table = table.to_dtype(dtype)?.to_device(device)?;
        *kept = Some((grid, dtype, device, table.clone()));
        Ok(table)
    }
}

/// Sines and cosines (rows · columns, width) of places on a grid that is scaled to `base` rows and columns.
fn position_table([rows, columns]: [usize; 2], base: usize, width: usize) -> Result<Tensor> {
    let quarter = width / 4;
    // f32 as in the reference: positions are rounded before they are multiplied.
    let place = |i: usize, extent: usize| f64::from(i as f32 / (extent as f64 / base as f64) as f32);
    let mut values = Vec::with_capacity(rows * columns * width);
    for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))) {
        for at in [place(column, columns), place(row, rows)] {
            let angle = |i: usize| at / 1e4f64.powf(i as f64 / quarter as f64);
            values.extend((0..quarter).map(|i| angle(i).sin() as f32));
            values.extend((0..quarter).map(|i| angle(i).cos() as f32));
        }
    }
    Tensor::from_vec(values, [rows * columns, width])
}
