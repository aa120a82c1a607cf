//! Kernel files through CUDA's own compiler on a machine without a GPU: what the emulator runs is then known to compile for GPUs, too.
//!
//! `KILN_CUDA_CHECK=sm_75,sm_90a` names the architectures, and NVRTC must be there. A file is tried from the capability on that the end of
//! its name asks for: `_mma` 8.0, `_hopper` 9.0 alone, and what is tuned for Hopper must keep all values in registers. Variants of the other
//! files differ in types and functions, not in instructions, and are tried for one architecture each, by turns. What passed is noted in the
//! folder of compiled kernels, and not tried again.

use super::compile::{cache_folder, digest};
use super::error::CudaError;
use super::nvrtc::nvrtc;

/// The architectures to try.
pub(super) fn architectures() -> Vec<String> {
    let list = std::env::var("KILN_CUDA_CHECK").unwrap_or_default();
    list.split(',').map(str::trim).filter(|arch| !arch.is_empty()).map(String::from).collect()
}

/// Whether files of this name are for the architecture (`sm_90a`), and whether they are tuned for it.
fn level(name: &str, arch: &str) -> (bool, bool) {
    let number: u32 = arch.chars().filter(char::is_ascii_digit).collect::<String>().parse().unwrap_or(0);
    match name {
        // Kernels with planted faults, for the emulator alone.
        "emulator_tests" => (false, false),
        name if name.ends_with("_hopper") => (arch == "sm_90a", true),
        name if name.ends_with("_mma") => (number >= 80, false),
        _ => (true, false),
    }
}

/// Whether files of this name have instructions of some architectures: those of tensor cores.
fn is_special(name: &str) -> bool {
    name.ends_with("_mma") || name.ends_with("_hopper")
}

/// Those of the architectures that a file of this name and text is tried for.
fn chosen<'a>(name: &str, text: &str, architectures: &'a [String]) -> &'a [String] {
    if is_special(name) || architectures.is_empty() {
        return architectures;
    }
    let turn = digest(&[text.as_bytes()]).bytes().map(usize::from).sum::<usize>() % architectures.len();
    &architectures[turn..=turn]
}

/// An error if the file does not compile for one of the [`architectures`], or spills there, or its products wait for each other.
pub(super) fn check(name: &str, text: &str, contract: bool) -> Result<(), CudaError> {
    for arch in chosen(name, text, &architectures()) {
        let (applies, tuned) = level(name, arch);
        if !applies {
            continue;
        }
        let passed = cache_folder().join(format!("{name}-{}.{arch}", &digest(&[&[u8::from(contract)], text.as_bytes()])[..32]));
        if passed.exists() {
            continue;
        }
        let (_, log) = nvrtc()?.compile(name, text, contract, arch)?;
        let spills = |line: &&str| line.contains("bytes spill stores") && !line.contains(" 0 bytes spill stores, 0 bytes spill loads");
        let serialized = |line: &&str| line.contains("wgmma") && line.contains("serializ");
        if let Some(line) = log.lines().find(|line| tuned && (spills(line) || serialized(line))) {
            return Err(CudaError::Compile { name: name.to_string(), log: format!("for {arch}: {}", line.trim()) });
        }
        // Without the note it is tried again.
        let _ = std::fs::write(&passed, []);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{chosen, level};

    #[test]
    fn variants_take_turns() {
        let all = ["sm_80", "sm_90a"].map(String::from);
        assert_eq!(chosen("gemm_mma", "", &all), &all);
        let seen: Vec<_> = (0..20).flat_map(|i| chosen("softmax", &format!("variant {i}"), &all)).collect();
        assert!(seen.len() == 20 && all.iter().all(|arch| seen.contains(&arch)));
        assert!(chosen("softmax", "", &[]).is_empty());
    }

    #[test]
    fn levels_follow_names() {
        assert_eq!(level("gemm_hopper", "sm_90a"), (true, true));
        assert_eq!(level("gemm_hopper", "sm_100"), (false, true));
        assert_eq!(level("gemm_mma", "sm_75"), (false, false));
        assert_eq!(level("attention_mma", "sm_89"), (true, false));
        assert_eq!(level("softmax", "sm_75"), (true, false));
    }
}
