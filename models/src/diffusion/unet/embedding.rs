//! The conditions of the whole image, the time above all, as one vector.

use crate::diffusion::blocks::{TimestepEmbedding, timestep_waves};
use crate::nn::{Embedding, Linear, Module, Params};
use kiln_tensor::{DType, Error, Result, Tensor};

/// Sines and cosines as a network takes them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waves {
    pub width: usize,
    pub flip: bool,
    pub shift: f64,
}

impl Waves {
    /// Timesteps (N) → (N, width), in the dtype of `like`.
    pub fn of(self, timesteps: &Tensor, like: &Tensor) -> Result<Tensor> {
        timestep_waves(timesteps, self.width, self.flip, self.shift)?.to_dtype(like.dtype())
    }
}

/// Timesteps of one number, or one for each sample, as (B).
pub(super) fn expand_timesteps(timesteps: &Tensor, batch: usize) -> Result<Tensor> {
    if timesteps.dims() == [batch] {
        return Ok(timesteps.clone());
    }
    if timesteps.rank() > 1 || timesteps.numel() != 1 {
        return Err(Error::shape("unet", format!("the timesteps {} must be ({batch}), one for each sample", timesteps.shape())));
    }
    timesteps.reshape([1])?.expand([batch])
}

/// The embedding of the time. Named `linear_1`, `linear_2`, and `cond_proj` of a condition that is added to the waves.
pub(super) struct TimeEmbedding {
    waves: Waves,
    layers: TimestepEmbedding,
    cond_proj: Option<Linear>,
}

impl TimeEmbedding {
    pub fn new(params: &Params, waves: Waves, width: usize, cond_width: Option<usize>) -> Result<Self> {
        let cond = |inputs| Linear::new(&params.scope("cond_proj"), inputs, waves.width, false);
        Ok(Self { waves, layers: TimestepEmbedding::new(params, waves.width, width)?, cond_proj: cond_width.map(cond).transpose()? })
    }

    /// Of the timesteps (B) of `sample`, and a condition (B, cond_width): (B, width).
    pub fn forward(&self, timesteps: &Tensor, cond: Option<&Tensor>, sample: &Tensor) -> Result<Tensor> {
        let batch = sample.dim(0)?;
        let waves = self.waves.of(&expand_timesteps(timesteps, batch)?, sample)?;
        let waves = match (&self.cond_proj, cond) {
            (_, None) => waves,
            (Some(projection), Some(cond)) => {
                expect_shape("timestep_cond", cond, &[batch, projection.inputs()])?;
                waves.add(&projection.forward(cond)?)?
            }
            (None, Some(_)) => {
                return Err(Error::argument("unet", "timestep_cond is given, but the model has no time_cond_proj_dim"));
            }
        };
        self.layers.forward(&waves)
    }
}

/// An error unless `x` has these extents.
pub(super) fn expect_shape(what: &str, x: &Tensor, dims: &[usize]) -> Result<()> {
    if x.dims() == dims {
        return Ok(());
    }
    let expected = dims.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    Err(Error::shape("unet", format!("{what} {} must be [{expected}]", x.shape())))
}

/// How a class becomes a vector that is added to that of the time.
pub(super) enum ClassEmbedding {
    /// No classes.
    None,
    /// A row of a table.
    Table { table: Embedding, classes: usize },
    /// As a timestep.
    Timestep { waves: Waves, layers: TimestepEmbedding },
    /// It is a vector already.
    Identity { width: usize },
    /// It is a vector of another width.
    Projection { inputs: usize, layers: TimestepEmbedding },
}

/// What a configuration says of classes.
pub(super) struct ClassPlan<'a> {
    pub kind: Option<&'a str>,
    pub num_classes: Option<usize>,
    /// Width of a vector to project, where the network knows such.
    pub projected: Option<usize>,
    pub waves: Waves,
    pub width: usize,
}

impl ClassEmbedding {
    pub fn new(params: &Params, plan: &ClassPlan<'_>) -> Result<Self> {
        let &ClassPlan { kind, num_classes, projected, waves, width } = plan;
        Ok(match (kind, num_classes) {
            (None, None) => ClassEmbedding::None,
            (None, Some(classes)) => ClassEmbedding::Table { table: Embedding::new(params, classes, width)?, classes },
            (Some("timestep"), _) => ClassEmbedding::Timestep { waves, layers: TimestepEmbedding::new(params, waves.width, width)? },
            (Some("identity"), _) => ClassEmbedding::Identity { width },
            (Some("projection"), _) => {
                let missing = || Error::format("unet", "class_embed_type `projection` needs projection_class_embeddings_input_dim");
                let inputs = projected.ok_or_else(missing)?;
                ClassEmbedding::Projection { inputs, layers: TimestepEmbedding::new(params, inputs, width)? }
            }
            (Some(other), _) => {
                let known = "null, `timestep`, `identity` or `projection`";
                return Err(Error::format("unet", format!("class_embed_type `{other}` is not supported; it must be {known}")));
            }
        })
    }

    /// `time` (B, width) with the vectors of the classes of `labels`.
    pub fn add_to(&self, time: Tensor, labels: Option<&Tensor>) -> Result<Tensor> {
        let labels = match (self, labels) {
            (ClassEmbedding::None, None) => return Ok(time),
            (ClassEmbedding::None, Some(_)) => {
                return Err(Error::argument(
                    "unet",
                    "class_labels are given, but the model has no classes (num_class_embeds, class_embed_type)",
                ));
            }
            (_, None) => return Err(Error::argument("unet", "the model is conditioned by class: class_labels are missing")),
            (_, Some(labels)) => labels,
        };
        let batch = time.dim(0)?;
        let embedded = match self {
            ClassEmbedding::None => return Ok(time),
            ClassEmbedding::Table { table, classes } => {
                if labels.dtype() != DType::I64 {
                    return Err(Error::unsupported_dtype("unet", labels.dtype(), "class_labels of i64"));
                }
                expect_shape("class_labels", labels, &[batch])?;
                let outside = |e: Error| Error::index("unet", format!("class_labels must lie in 0..{classes}")).with_source(e);
                table.forward(labels).map_err(outside)?
            }
            ClassEmbedding::Timestep { waves, layers } => {
                expect_shape("class_labels", labels, &[batch])?;
                layers.forward(&waves.of(labels, &time)?)?
            }
            ClassEmbedding::Identity { width } => {
                expect_shape("class_labels", labels, &[batch, *width])?;
                labels.clone()
            }
            ClassEmbedding::Projection { inputs, layers } => {
                expect_shape("class_labels", labels, &[batch, *inputs])?;
                layers.forward(labels)?
            }
        };
        time.add(&embedded)
    }
}
