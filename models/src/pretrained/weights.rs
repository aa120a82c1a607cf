//! The weights of a folder: one safetensors file, or shards with an index, plain or of a variant such as `fp16`.

use super::json::{read_json, write_json};
use super::layout::Library;
use crate::nn::StateDict;
use kiln_tensor::io::safetensors::{self, SafetensorsFile};
use kiln_tensor::{Error, ErrorKind, Result};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Where a folder's weights are.
enum Source {
    Single(PathBuf),
    Index(PathBuf),
}

/// Every tensor of the folder, by the names of its files. Without a `variant` the plain files are read, else those of one that is there:
/// `fp16` or `bf16` before others.
pub(super) fn read_weights(folder: &Path, library: Library, variant: Option<&str>) -> Result<StateDict> {
    match find(folder, library, variant)? {
        Source::Single(path) => safetensors::load(path),
        Source::Index(path) => read_shards(folder, &path),
    }
}

fn find(folder: &Path, library: Library, variant: Option<&str>) -> Result<Source> {
    let stem = library.stem();
    if let Some(variant) = variant {
        let missing = || Error::new(ErrorKind::Io, "load", format!("{} holds no {stem}.{variant}.safetensors", folder.display()));
        return of_variant(folder, stem, variant).ok_or_else(missing);
    }
    let (single, index) = (folder.join(format!("{stem}.safetensors")), folder.join(format!("{stem}.safetensors.index.json")));
    if single.exists() {
        return Ok(Source::Single(single));
    }
    if index.exists() {
        return Ok(Source::Index(index));
    }
    let known = ["fp16", "bf16"].map(str::to_owned).into_iter().chain(variants(folder, stem)?);
    let found = known.into_iter().find_map(|variant| of_variant(folder, stem, &variant));
    found.ok_or_else(|| {
        let (single, index) = (format!("{stem}.safetensors"), format!("{stem}.safetensors.index.json"));
        let message = format!("{} holds neither {single} nor {index}; other formats must be converted to safetensors", folder.display());
        Error::new(ErrorKind::Io, "load", message)
    })
}

/// The files of a variant. Indices have been named in two ways.
fn of_variant(folder: &Path, stem: &str, variant: &str) -> Option<Source> {
    let single = folder.join(format!("{stem}.{variant}.safetensors"));
    let names = [format!("{stem}.safetensors.index.{variant}.json"), format!("{stem}.{variant}.safetensors.index.json")];
    let index = || names.into_iter().map(|name| folder.join(name)).find(|path| path.exists()).map(Source::Index);
    if single.exists() { Some(Source::Single(single)) } else { index() }
}

/// The variants that the folder has, by name.
fn variants(folder: &Path, stem: &str) -> Result<BTreeSet<String>> {
    let entries = std::fs::read_dir(folder).map_err(|e| Error::io("load", folder.display(), e))?;
    let variant = |name: &str| {
        let rest = name.strip_prefix(stem)?;
        let middle = |start: &str, end: &str| rest.strip_prefix(start)?.strip_suffix(end).map(str::to_owned);
        let found = middle(".safetensors.index.", ".json").or_else(|| middle(".", ".safetensors.index.json"));
        found.or_else(|| middle(".", ".safetensors")).filter(|found| !found.contains(['.', '-']))
    };
    Ok(entries.flatten().filter_map(|entry| variant(entry.file_name().to_str()?)).collect())
}

fn read_shards(folder: &Path, index: &Path) -> Result<StateDict> {
    let Index { weight_map } = read_json(index)?;
    let mut state = StateDict::new();
    for shard in weight_map.values().collect::<BTreeSet<_>>() {
        if shard.is_empty() || shard.contains(['/', '\\', ':']) || shard.starts_with('.') {
            return Err(Error::format("load", format!("{}: `{shard}` is no name of a file beside it", index.display())));
        }
        let file = SafetensorsFile::open(folder.join(shard))?;
        for name in file.names().into_iter().filter(|name| weight_map.get(name) == Some(shard)) {
            state.insert(name.clone(), file.tensor(&name)?);
        }
    }
    if let Some((name, shard)) = weight_map.iter().find(|(name, _)| !state.contains_key(*name)) {
        return Err(Error::format("load", format!("{}: `{name}` is not in {shard}", index.display())));
    }
    Ok(state)
}

/// Writes the tensors in one file, or in shards of at most `max_shard_bytes` each with their index.
pub(super) fn write_weights(folder: &Path, state: &StateDict, library: Library, max_shard_bytes: u64) -> Result<()> {
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let stem = library.stem();
    let single = folder.join(format!("{stem}.safetensors"));
    let shards = into_shards(state, max_shard_bytes);
    if let [all] = &shards[..] {
        let tensors = all.iter().map(|&name| (name, &state[name]));
        return safetensors::save(single, tensors, &metadata);
    }
    let mut weight_map = Map::new();
    for (i, names) in shards.iter().enumerate() {
        let file = format!("{stem}-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        safetensors::save(folder.join(&file), names.iter().map(|&name| (name, &state[name])), &metadata)?;
        weight_map.extend(names.iter().map(|&name| (name.to_owned(), Value::from(file.as_str()))));
    }
    let total: usize = state.values().map(|tensor| tensor.numel() * tensor.dtype().size()).sum();
    write_json(
        &folder.join(format!("{stem}.safetensors.index.json")),
        &json!({"metadata": {"total_size": total}, "weight_map": weight_map}),
    )?;
    // A single file of an earlier save would be read instead.
    match std::fs::remove_file(&single) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("save", single.display(), e)),
        _ => Ok(()),
    }
}

/// The names in order, cut where a shard is full.
fn into_shards(state: &StateDict, max_bytes: u64) -> Vec<Vec<&str>> {
    let (mut shards, mut filled) = (vec![Vec::new()], 0);
    for (name, tensor) in state {
        let bytes = (tensor.numel() * tensor.dtype().size()) as u64;
        if filled > 0 && filled + bytes > max_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(last) = shards.last_mut() {
            last.push(name.as_str());
        }
    }
    shards
}
