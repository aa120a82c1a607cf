//! Kernel files on their way to machine code: headers expanded, compiled once, kept on disk under a hash of all that matters.

use super::backend::Backend;
use super::error::CudaError;
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A kernel file.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) name: &'static str,
    pub(crate) text: &'static str,
}

/// The value of a macro: a number up to 32, or a power of two up to 1024.
pub(super) fn number(n: usize) -> &'static str {
    const SMALL: [&str; 33] = [
        "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15", "16", "17", "18", "19", "20", "21", "22",
        "23", "24", "25", "26", "27", "28", "29", "30", "31", "32",
    ];
    match n {
        64 => "64",
        128 => "128",
        256 => "256",
        512 => "512",
        1024 => "1024",
        _ => SMALL[n],
    }
}

/// What kernel files may include, and the parts of the emulator's runtime.
const HEADERS: &[(&str, &str)] = &[
    ("attention.cuh", include_str!("attention/attention.cuh")),
    ("kiln.cuh", include_str!("kiln.cuh")),
    ("math.cuh", include_str!("math.cuh")),
    ("elements.cuh", include_str!("elements.cuh")),
    ("operands.cuh", include_str!("operands.cuh")),
    ("philox.cuh", include_str!("philox.cuh")),
    ("ptx.cuh", include_str!("ptx.cuh")),
    ("softmax.cuh", include_str!("softmax.cuh")),
    ("emulate.cuh", include_str!("emulator/emulate.cuh")),
    ("axis_maps.cuh", include_str!("axis_maps.cuh")),
    ("conv_geometry.cuh", include_str!("conv/geometry.cuh")),
    ("conv_tile.cuh", include_str!("conv/tile.cuh")),
    ("emulate_abi.cuh", include_str!("emulator/emulate_abi.cuh")),
    ("emulate_state.hpp", include_str!("emulator/emulate_state.hpp")),
    ("emulate_check.hpp", include_str!("emulator/emulate_check.hpp")),
    ("emulate_fibers.cpp", include_str!("emulator/emulate_fibers.cpp")),
    ("emulate_async.cpp", include_str!("emulator/emulate_async.cpp")),
    ("emulate_matrix.cpp", include_str!("emulator/emulate_matrix.cpp")),
    ("emulate_check.cpp", include_str!("emulator/emulate_check.cpp")),
    ("gemm.cuh", include_str!("gemm/gemm.cuh")),
];

/// The file's text, each header in the place of its first inclusion, macros first.
pub(super) fn expand(source: &Source, defines: &[(&str, &str)]) -> String {
    expand_file(&format!("{}.cu", source.name), source.text, defines)
}

/// As [`expand`], of a text that a program wrote. The macro `T` becomes a type of that name (`kiln.cuh`), which templates may use for their own.
pub(crate) fn expand_text(text: &str, defines: &[(&str, &str)]) -> String {
    expand_file("generated.cu", text, defines)
}

/// As [`expand`], of a file of this name.
pub(super) fn expand_file(file: &str, text: &str, defines: &[(&str, &str)]) -> String {
    let mut out = String::with_capacity(64 << 10);
    for (name, value) in defines {
        let name = if *name == "T" { "KILN_T" } else { name };
        let _ = writeln!(out, "#define {name} {value}");
    }
    include(file, text, &mut out, &mut Vec::new());
    out
}

/// Appends a text with its headers; compilers and the emulator's messages name its own lines.
fn include(file: &str, text: &str, out: &mut String, seen: &mut Vec<&'static str>) {
    let _ = writeln!(out, "#line 1 \"{file}\"");
    for (number, line) in text.lines().enumerate() {
        let header = line.trim().strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"'));
        let header = header.and_then(|wanted| HEADERS.iter().find(|(name, _)| *name == wanted));
        match header {
            Some((name, _)) if seen.contains(name) => out.push('\n'),
            Some((name, text)) => {
                seen.push(name);
                include(name, text, out, seen);
                let _ = writeln!(out, "#line {} \"{file}\"", number + 2);
            }
            None if line.trim() == "#pragma once" => out.push('\n'),
            None => {
                out.push_str(line);
                out.push('\n');
            }
        }
    }
}

/// Where compiled kernels are kept: `KILN_CACHE`, else the user's cache folder.
pub(super) fn cache_folder() -> PathBuf {
    let from = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let user = || from("XDG_CACHE_HOME").or_else(|| from("HOME").map(|home| home.join(".cache")));
    from("KILN_CACHE")
        .or_else(|| user().map(|cache| cache.join("kiln")))
        .unwrap_or_else(|| std::env::temp_dir().join("kiln"))
        .join("kernels")
}

/// SHA-256 in hexadecimal, of the parts and where each ends.
pub(super) fn digest(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Whether the file is as it was when its digest was written beside it.
fn is_whole(file: &Path, sum: &Path) -> bool {
    matches!((fs::read(file), fs::read_to_string(sum)), (Ok(code), Ok(sum)) if digest(&[&code]) == sum)
}

/// Loads the machine code of an expanded kernel file, compiling it unless a whole copy is on disk.
pub(super) fn load(backend: &dyn Backend, name: &str, contract: bool, text: &str) -> Result<u64, CudaError> {
    backend.load(name, &build(backend, name, contract, text)?)
}

/// The file with the machine code of an expanded kernel file, compiled unless a whole copy is on disk.
pub(super) fn build(backend: &dyn Backend, name: &str, contract: bool, text: &str) -> Result<PathBuf, CudaError> {
    let key = digest(&[backend.target()?.as_bytes(), &[u8::from(contract)], text.as_bytes()]);
    let folder = cache_folder();
    let (file, sum) = (folder.join(format!("{name}-{}.bin", &key[..32])), folder.join(format!("{name}-{}.sum", &key[..32])));
    if is_whole(&file, &sum) {
        return Ok(file);
    }
    let failed = |what: &Path, e: std::io::Error| {
        CudaError::Unavailable(format!(
            "the cache of compiled kernels, {}: {e}; set KILN_CACHE to a folder that can be written",
            what.display()
        ))
    };
    fs::create_dir_all(&folder).map_err(|e| failed(&folder, e))?;
    // Written beside its place and moved there, so that another process or thread never sees half of it.
    static COMPILED: AtomicU64 = AtomicU64::new(0);
    let own = format!("{}-{}", std::process::id(), COMPILED.fetch_add(1, Relaxed));
    let fresh = folder.join(format!("{name}-{}.{own}", &key[..32]));
    backend.compile(name, text, contract, &fresh)?;
    let code = fs::read(&fresh).map_err(|e| failed(&fresh, e))?;
    let fresh_sum = fresh.with_extension(format!("{own}.sum"));
    fs::write(&fresh_sum, digest(&[&code])).map_err(|e| failed(&fresh_sum, e))?;
    fs::rename(&fresh, &file).map_err(|e| failed(&file, e))?;
    fs::rename(&fresh_sum, &sum).map_err(|e| failed(&sum, e))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_expanded_once() {
        let text = expand_text("#include \"kiln.cuh\"\n#include \"kiln.cuh\"\nint x;", &[("T", "float")]);
        assert!(text.starts_with("#define KILN_T float\n") && text.ends_with("int x;\n"));
        assert_eq!(text.matches("typedef long long i64;").count(), 1);
        assert!(!text.contains("#include \""), "a header is missing from the list");
    }

    #[test]
    fn a_changed_file_is_noticed() {
        let folder = std::env::temp_dir().join(format!("kiln-compile-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (file, sum) = (folder.join("a.bin"), folder.join("a.sum"));
        fs::write(&file, b"code").unwrap();
        fs::write(&sum, digest(&[b"code"])).unwrap();
        assert!(is_whole(&file, &sum));
        fs::write(&file, b"cod").unwrap();
        assert!(!is_whole(&file, &sum));
        fs::remove_dir_all(&folder).unwrap();
    }
}
