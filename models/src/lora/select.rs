//! Which layers an adapter changes, and with which rank and scale: `peft`'s rules on names.

use super::config::{Bias, LoraConfig, Modules};
use super::host::Host;
use crate::nn::{Param, Params, matches_whole};
use fancy_regex::Regex;
use kiln_tensor::{Error, Result};

/// The layers that `all-linear` leaves out: they turn hidden states into the output.
const HEADS: [&str; 5] = ["lm_head", "embed_out", "cls.predictions.decoder", "score", "classifier"];

/// What language models call their table of tokens.
const TOKEN_TABLES: [&str; 3] = ["wte", "embed_tokens", "shared"];

/// A layer that is to be adapted.
pub(super) struct Target {
    pub layer: Host,
    /// Its name below the model's scope.
    pub name: String,
    pub rank: usize,
    pub scale: f64,
}

/// A parameter of the base model that is trained along.
pub(super) struct Companion {
    pub param: Param,
    /// Its name in the adapter's file.
    pub saved_as: String,
}

/// [`Modules`] with the expression compiled.
enum Matcher {
    AllLinear,
    Whole(Regex),
    Names(Vec<String>),
}

impl Matcher {
    fn new(field: &str, modules: &Modules) -> Result<Self> {
        Ok(match modules {
            Modules::Pattern(pattern) if pattern.eq_ignore_ascii_case("all-linear") => Matcher::AllLinear,
            Modules::Pattern(pattern) => Matcher::Whole(compile(field, pattern, &format!("^(?:{pattern})$"))?),
            Modules::Names(names) => Matcher::Names(names.clone()),
        })
    }

    /// Whether it means the layer `host`, which is called `name` below the model's scope.
    fn matches(&self, host: &Host, name: &str) -> Result<bool> {
        match self {
            Matcher::AllLinear => Ok(host.is_linear() && !HEADS.contains(&name)),
            Matcher::Whole(regex) => is_match(regex, name),
            Matcher::Names(names) => Ok(names.iter().any(|entry| names_module(entry, name))),
        }
    }
}

/// Whether an entry of a list means the module `name`.
fn names_module(entry: &str, name: &str) -> bool {
    match name.strip_suffix(entry) {
        _ if entry.contains('*') => matches_whole(entry, name),
        Some(rest) => rest.is_empty() || rest.ends_with('.'),
        None => false,
    }
}

fn compile(field: &str, pattern: &str, whole: &str) -> Result<Regex> {
    Regex::new(whole).map_err(|e| Error::argument("lora", format!("{field}: `{pattern}` is no regular expression: {e}")))
}

/// An error if the expression takes too many steps.
fn is_match(regex: &Regex, name: &str) -> Result<bool> {
    regex.is_match(name).map_err(|e| Error::argument("lora", format!("`{regex}` on `{name}`: {e}")))
}

/// The value of the first pattern that the end of `name`, from a dot on, matches.
fn first_match<T: Copy>(field: &str, patterns: &[(String, T)], name: &str) -> Result<Option<T>> {
    for (pattern, value) in patterns {
        if is_match(&compile(field, pattern, &format!(r"^(.*\.)?({pattern})$"))?, name)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

impl LoraConfig {
    /// The rank of the adapter in the layer `name`.
    ///
    /// # Errors
    /// If a pattern is no regular expression.
    pub fn rank(&self, name: &str) -> Result<usize> {
        Ok(first_match("rank_pattern", &self.rank_pattern, name)?.unwrap_or(self.r))
    }

    /// What the update of the layer `name` is multiplied by: α/r, or α/√r with [`use_rslora`](Self::use_rslora).
    ///
    /// # Errors
    /// As [`rank`](Self::rank).
    pub fn scale(&self, name: &str) -> Result<f64> {
        let alpha = first_match("alpha_pattern", &self.alpha_pattern, name)?.unwrap_or(self.lora_alpha);
        let rank = self.rank(name)? as f64;
        Ok(alpha / if self.use_rslora { rank.sqrt() } else { rank })
    }

    /// The entry of `modules_to_save` by which the module `name` is, or lies in, one of those that are trained in full.
    fn saved_by(&self, name: &str) -> Option<&String> {
        let mut ends = name.match_indices('.').map(|(i, _)| i).chain([name.len()]);
        ends.find_map(|end| self.modules_to_save.iter().flatten().find(|key| name[..end].ends_with(key.as_str())))
    }

    /// Whether the module `name` is trained in full.
    fn saves(&self, name: &str) -> bool {
        self.saved_by(name).is_some()
    }

    /// The layers below `params` to adapt.
    ///
    /// # Errors
    /// If there is none, a name means a layer of another kind, or a pattern is no regular expression.
    pub(super) fn targets(&self, params: &Params) -> Result<Vec<Target>> {
        self.check()?;
        let included = Matcher::new("target_modules", &self.target_modules)?;
        let excluded = self.exclude_modules.as_ref().map(|modules| Matcher::new("exclude_modules", modules)).transpose()?;
        let mut targets = Vec::new();
        for layer in Host::all(params) {
            let name = below(params, layer.name()).to_owned();
            let out = excluded.as_ref().map_or(Ok(false), |excluded| excluded.matches(&layer, &name))?;
            if !name.is_empty() && !out && !self.saves(&name) && included.matches(&layer, &name)? {
                let (rank, scale) = (self.rank(&name)?, self.scale(&name)?);
                targets.push(Target { layer, name, rank, scale });
            }
        }
        self.expect_layers(params)?;
        if targets.is_empty() {
            let some: Vec<String> = Host::all(params).iter().take(8).map(|layer| below(params, layer.name()).to_owned()).collect();
            let message = format!("target_modules {:?} matches no layer; there are {}, …", self.target_modules, some.join(", "));
            return Err(Error::argument("lora", message));
        }
        Ok(targets)
    }

    /// An error if an entry of a list means what has a weight but cannot be adapted: it would stay as it is, in silence.
    fn expect_layers(&self, params: &Params) -> Result<()> {
        self.expect_head(params)?;
        self.expect_untied(params)?;
        let Modules::Names(entries) = &self.target_modules else { return Ok(()) };
        let layers = Host::all(params);
        for param in params.params() {
            let Some(module) = param.name().strip_suffix(".weight") else { continue };
            let name = below(params, module);
            let exact = |entry: &&String| !entry.contains('*') && names_module(entry, name);
            if let Some(entry) = entries.iter().find(exact)
                && !layers.iter().any(|layer| layer.name() == module)
            {
                return Err(Error::argument(
                    "lora",
                    format!("target_modules: `{entry}` means `{name}`, which is no Linear, Embedding or Conv2d layer"),
                ));
            }
        }
        Ok(())
    }

    /// An error if the output is meant in a model that uses its embedding for it.
    fn expect_head(&self, params: &Params) -> Result<()> {
        let targets = match &self.target_modules {
            Modules::Names(entries) => entries.as_slice(),
            _ => &[],
        };
        if params.linears().iter().any(|layer| below(params, layer.name()) == OUTPUT_HEAD) {
            return Ok(());
        }
        for (field, entries) in [("target_modules", targets), ("modules_to_save", self.modules_to_save.as_deref().unwrap_or_default())] {
            if entries.iter().any(|entry| entry == OUTPUT_HEAD) {
                return Err(Error::argument(
                    "lora",
                    format!(
                        "{field}: there is no `{OUTPUT_HEAD}`; if the output is tied to the embedding, as in GPT-2, leave it out or untie it"
                    ),
                ));
            }
        }
        Ok(())
    }

    /// An error if a table of tokens is to be trained in full that gives the logits, too: `peft` leaves the output as it was, and here both
    /// are one weight.
    fn expect_untied(&self, params: &Params) -> Result<()> {
        if params.linears().iter().any(|layer| HEADS.contains(&below(params, layer.name()))) {
            return Ok(());
        }
        for layer in params.embeddings() {
            let name = below(params, layer.name());
            let is_table = name.rsplit('.').next().is_some_and(|last| TOKEN_TABLES.contains(&last));
            if let Some(entry) = self.saved_by(name).filter(|_| is_table) {
                return Err(Error::argument(
                    "lora",
                    format!(
                        "modules_to_save: `{entry}` means `{name}`, which is tied to the output; untie it, or put it in target_modules"
                    ),
                ));
            }
        }
        Ok(())
    }

    /// The parameters below `params` that are trained beside the matrices of `targets`.
    ///
    /// # Errors
    /// If a module to save has buffers: an adapter's file holds parameters.
    pub(super) fn companions(&self, params: &Params, targets: &[Target]) -> Result<Vec<Companion>> {
        let module = |name: &str| name.rsplit_once('.').map_or(String::new(), |(module, _)| module.to_owned());
        if let Some(buffer) = params.buffers().iter().find(|buffer| self.saves(&module(below(params, buffer.name())))) {
            return Err(Error::argument("lora", format!("modules_to_save: `{}` is a buffer; only parameters are saved", buffer.name())));
        }
        let mut companions = Vec::new();
        for param in params.params() {
            let name = below(params, param.name()).to_owned();
            let adapted = targets.iter().any(|target| target.layer.bias().is_some_and(|bias| bias.is_same(&param)));
            let is_bias = name == "bias" || name.ends_with(".bias");
            let trained = match self.bias {
                Bias::None => false,
                Bias::All => is_bias,
                Bias::LoraOnly => adapted,
            };
            if trained || self.saves(&module(&name)) {
                let name = if adapted { format!("{}.base_layer.bias", module(&name)) } else { name };
                companions.push(Companion { param, saved_as: format!("{PREFIX}.{name}") });
            }
        }
        Ok(companions)
    }
}

/// The layer that language models have for their output, unless it is tied.
const OUTPUT_HEAD: &str = "lm_head";

/// The scope of everything in an adapter's file.
pub(super) const PREFIX: &str = "base_model.model";

/// A full name as seen from the scope of the model.
pub(super) fn below<'a>(params: &Params, name: &'a str) -> &'a str {
    let rest = name.strip_prefix(params.name()).unwrap_or(name);
    rest.strip_prefix('.').unwrap_or(rest)
}
