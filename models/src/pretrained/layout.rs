//! What a configuration says of its folder, and the names and layouts of tensors there and here.

use crate::nn::{Params, StateDict};
use kiln_tensor::{Error, Result, Tensor};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Whose conventions a folder follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Library {
    /// `model_type` and `architectures` in `config.json`, weights in `model.safetensors`.
    #[default]
    Transformers,
    /// `_class_name` in `config.json`, weights in `diffusion_pytorch_model.safetensors`.
    Diffusers,
}

impl Library {
    /// What the names of files of weights start with.
    pub(crate) fn stem(self) -> &'static str {
        match self {
            Library::Transformers => "model",
            Library::Diffusers => "diffusion_pytorch_model",
        }
    }
}

/// How the tensors of an architecture lie in a file.
#[derive(Clone, Copy, Default)]
pub struct Layout {
    /// Whose names files and fields have.
    pub library: Library,
    /// The class that `architectures` or `_class_name` names.
    pub architecture: &'static str,
    /// What names start with that a file of the bare model (without head) lacks, with its dot.
    pub prefix: &'static str,
    /// Scopes of the head, which that does not concern, with their dots.
    pub heads: &'static [&'static str],
    /// Ends of the names of matrices that lie there as (inputs, outputs).
    pub transposed: &'static [&'static str],
    /// Ends of names that hold no weights.
    pub ignored: &'static [&'static str],
    /// Names that repeat other tensors, with the names of those.
    pub tied: &'static [(&'static str, &'static str)],
    /// Turns the tensors of an older file into those that today's has, before all else.
    pub modernise: Option<fn(StateDict) -> Result<StateDict>>,
}

impl Layout {
    /// The layout of a model whose file has just the names and shapes that it has here.
    pub const fn new(library: Library, architecture: &'static str) -> Self {
        Self { library, architecture, prefix: "", heads: &[], transposed: &[], ignored: &[], tied: &[], modernise: None }
    }
}

/// A configuration that knows its model and how the file names it.
pub trait Pretrained: Serialize + DeserializeOwned {
    /// The model.
    type Model;

    /// The layout of its weights.
    fn layout(&self) -> Layout;

    /// `model_type` of the configuration; nothing where there is none, as with `diffusers`.
    fn model_type(&self) -> &'static str {
        ""
    }

    /// The model, of the weights of `params`.
    ///
    /// # Errors
    /// If the extents do not fit each other, or the weights do not fit them.
    fn build_model(&self, params: &Params) -> Result<Self::Model>;

    /// Told that a file holds a tensor `name` that is not the one it is [tied](Layout::tied) to: the model gets one of its own, as the
    /// reference gives it. It is an error where a model cannot.
    ///
    /// # Errors
    /// If the model has no tensor of its own there.
    fn untie(&mut self, name: &str) -> Result<()> {
        cannot_untie(name)
    }

    /// The first weights of the head, for a file of the model with another or without, whose tensors are `body`: see [`load_for_tuning`].
    ///
    /// # Errors
    /// If the configuration does not fit the file.
    fn fresh_head(&self, body: &StateDict, params: &Params) -> Result<StateDict> {
        let _ = (body, params);
        Ok(StateDict::new())
    }
}

pub(crate) fn cannot_untie(name: &str) -> Result<()> {
    Err(Error::format("load", format!("`{name}` differs from the tensor that it should repeat, and the model has no other")))
}

/// Whether one of `ends` ends `name`, in whole components: `attn.bias` ends `h.0.attn.bias`, but not `h.0.attn.c_attn.bias`.
fn ends_with(name: &str, ends: &[&str]) -> bool {
    ends.iter().any(|end| name.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')))
}

/// A file's tensors as the model names and lays them.
pub(super) fn from_file(state: StateDict, layout: &Layout) -> Result<StateDict> {
    let state = match layout.modernise {
        Some(modernise) => modernise(state)?,
        None => state,
    };
    let is_bare = !state.keys().any(|name| name.starts_with(layout.prefix));
    let mut out = StateDict::new();
    for (name, tensor) in state {
        let belongs_to_head = layout.heads.iter().any(|head| name.starts_with(head));
        let mut name = if is_bare && !belongs_to_head { format!("{}{name}", layout.prefix) } else { name };
        for (old, new) in [(".gamma", ".weight"), (".beta", ".bias")] {
            // Norms of the first TensorFlow conversions.
            if let Some(stem) = name.strip_suffix(old) {
                name = format!("{stem}{new}");
            }
        }
        if ends_with(&name, layout.ignored) {
            continue;
        }
        let is_transposed = tensor.rank() == 2 && ends_with(&name, layout.transposed);
        out.insert(name, if is_transposed { tensor.t()? } else { tensor });
    }
    Ok(out)
}

/// The inverse of [`from_file`].
pub(super) fn to_file(state: StateDict, layout: &Layout) -> Result<StateDict> {
    let lay = |(name, tensor): (String, Tensor)| {
        let is_transposed = tensor.rank() == 2 && ends_with(&name, layout.transposed);
        let tensor = if is_transposed { tensor.t()?.contiguous()? } else { tensor };
        Ok((name, tensor))
    };
    state.into_iter().map(lay).collect()
}
