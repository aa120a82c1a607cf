//! Which instructions this machine has: detected once, forced lower by `KILN_ISA=scalar|avx2|avx512|amx|neon`.
//!
//! A kernel is written once over [`Simd`](super::simd::Simd) and handed to [`dispatch`], which instantiates it
//! under the right `#[target_feature]` and passes the token that proves that the instructions exist.

#[cfg(target_arch = "x86_64")]
use super::amx::Amx;
#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512};
use super::simd::{Scalar, Simd};
use std::sync::OnceLock;

/// An instruction-set level.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Isa {
    /// Portable code, one lane.
    Scalar,
    /// ARM's 128-bit vectors.
    Neon,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512, and matrix tiles for products.
    Amx,
}

impl Isa {
    /// The name that `KILN_ISA` understands.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Neon => "neon",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
        }
    }

    /// Whether this machine can run the level.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Avx512::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => Amx::detect().is_some(),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => true,
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// The levels that this machine can run, lowest first.
    pub fn available() -> impl Iterator<Item = Isa> {
        ALL.into_iter().filter(|isa| isa.is_available())
    }
}

/// Ways of a core's first data cache: how many lines of equal place in a page it holds.
pub(super) fn l1_ways() -> usize {
    static WAYS: OnceLock<usize> = OnceLock::new();
    *WAYS.get_or_init(|| detect_l1_ways().unwrap_or(8))
}

#[cfg(target_arch = "x86_64")]
fn detect_l1_ways() -> Option<usize> {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    /// The leaves that describe caches: Intel's and AMD's.
    const LEAVES: [u32; 2] = [4, 0x8000_001D];
    LEAVES.into_iter().filter(|&leaf| __cpuid(leaf & 0x8000_0000).eax >= leaf).map(|leaf| __cpuid_count(leaf, 0)).find_map(|cache| {
        let is_first_data_cache = cache.eax & 0x1F == 1 && cache.eax >> 5 & 7 == 1;
        is_first_data_cache.then_some((cache.ebx >> 22) as usize + 1)
    })
}

#[cfg(not(target_arch = "x86_64"))]
fn detect_l1_ways() -> Option<usize> {
    None
}

/// The family of an AMD processor: 0x19 are Zen 3 and 4, 0x1A is Zen 5.
#[cfg(target_arch = "x86_64")]
pub(super) fn amd_family() -> Option<u32> {
    use std::arch::x86_64::__cpuid;
    let vendor = __cpuid(0);
    let is_amd = [vendor.ebx, vendor.edx, vendor.ecx] == [*b"Auth", *b"enti", *b"cAMD"].map(u32::from_le_bytes);
    let version = __cpuid(1).eax;
    is_amd.then_some((version >> 8 & 0xF) + (version >> 20 & 0xFF))
}

#[cfg(not(target_arch = "x86_64"))]
fn amd_family() -> Option<u32> {
    None
}

/// Whether the hardware's prefetching goes on from row to row. Zen 4's does: asked for a page ahead, sums of rows take 1.2 to 1.4 times as long. (Zen
/// 3, of the same family, is taken to do the same.) Zen 5's was seen to wait for each line of rows that were not asked for.
pub(super) fn foresees_rows() -> bool {
    static FORESEES: OnceLock<bool> = OnceLock::new();
    *FORESEES.get_or_init(|| amd_family() == Some(0x19))
}

/// Lowest first.
const ALL: [Isa; 5] = [Isa::Scalar, Isa::Neon, Isa::Avx2, Isa::Avx512, Isa::Amx];

fn choose(forced: Option<&str>) -> Result<Isa, String> {
    let best = Isa::available().last().unwrap_or(Isa::Scalar);
    let Some(name) = forced else { return Ok(best) };
    match ALL.into_iter().find(|isa| isa.name() == name) {
        Some(isa) if isa.is_available() => Ok(isa),
        Some(_) => Err(format!("KILN_ISA={name}: this machine has no {name}; its best level is {}", best.name())),
        None => Err(format!("KILN_ISA={name}: expected scalar, neon, avx2, avx512 or amx")),
    }
}

/// A level with the token that proves it: [`dispatch`] is called for every small operation, and should not detect anew.
#[derive(Clone, Copy)]
enum Level {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// With what AMX machines have besides, if `true`.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512, Avx2, bool),
    #[cfg(target_arch = "aarch64")]
    Neon,
}

impl Level {
    /// The level of an ISA that this machine has.
    fn of(isa: Isa) -> Self {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Amx => match (Avx512::detect(), Avx2::detect()) {
                (Some(token), Some(narrower)) => Level::Avx512(token, narrower, isa == Isa::Amx),
                _ => Level::Scalar,
            },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::detect().map_or(Level::Scalar, Level::Avx2),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => Level::Neon,
            _ => Level::Scalar,
        }
    }
}

#[inline]
fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let forced = std::env::var("KILN_ISA").ok();
        Level::of(choose(forced.as_deref()).unwrap_or_else(|message| panic!("{message}")))
    })
}

/// The level that every kernel of this process uses.
///
/// # Panics
/// At the first call, if `KILN_ISA` names a level that does not exist or that this machine lacks: falling back in silence
/// would let a test run claim a level that it never touched.
#[inline]
pub fn isa() -> Isa {
    match level() {
        Level::Scalar => Isa::Scalar,
        #[cfg(target_arch = "x86_64")]
        Level::Avx2(_) => Isa::Avx2,
        #[cfg(target_arch = "x86_64")]
        Level::Avx512(_, _, tiles) => {
            if tiles {
                Isa::Amx
            } else {
                Isa::Avx512
            }
        }
        #[cfg(target_arch = "aarch64")]
        Level::Neon => Isa::Neon,
    }
}

/// A computation written once over any instruction set. `with_simd` must be `#[inline(always)]`, as must all that it
/// calls in its hot loops, so that it is compiled with the features of [`dispatch`]'s shims. What is called a tile at a time, from several places or for
/// several types, is better work of its own, run by [`Simd::call`]: it is compiled once.
pub trait WithSimd {
    /// What the computation returns.
    type Output;
    /// Runs with the instructions that `simd` stands for.
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output;
}

/// Runs `work` at the level of [`isa`]. Costs a nanosecond or two: call it once per task, not per tile.
#[inline]
pub fn dispatch<W: WithSimd>(work: W) -> W::Output {
    match level() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the token exists, so the machine has these features.
        Level::Avx512(token, ..) => unsafe { with_avx512(token, work) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2(token) => unsafe { with_avx2(token, work) },
        #[cfg(target_arch = "aarch64")]
        Level::Neon => work.with_simd(super::simd::Neon::new()),
        Level::Scalar => work.with_simd(Scalar),
    }
}

/// [`dispatch`] for work that is written without SIMD and not worth an instance a level.
#[inline]
pub fn dispatch_to_scalar<W: WithSimd>(work: W) -> W::Output {
    work.with_simd(Scalar)
}

/// [`dispatch`] for work that AVX-512 does no faster than AVX2, loops that the compiler vectorises: an instance less to build.
#[inline]
pub fn dispatch_without_avx512<W: WithSimd>(work: W) -> W::Output {
    match level() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the token exists, so the machine has these features.
        Level::Avx2(token) | Level::Avx512(_, token, _) => unsafe { with_avx2(token, work) },
        _ => work.with_simd(Scalar),
    }
}

/// [`dispatch`] for work that belongs to micro-kernels which only machines with AVX-512 have, and tests.
#[cfg(target_arch = "x86_64")]
#[inline]
pub fn dispatch_widest<W: WithSimd>(work: W) -> W::Output {
    match Avx512::detect() {
        // SAFETY: the token exists, so the machine has these features.
        Some(token) => unsafe { with_avx512(token, work) },
        None => work.with_simd(Scalar),
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
pub(super) fn with_avx512<W: WithSimd>(token: Avx512, work: W) -> W::Output {
    work.with_simd(token)
}

#[cfg(target_arch = "x86_64")]
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
pub(super) fn with_avx2<W: WithSimd>(token: Avx2, work: W) -> W::Output {
    work.with_simd(token)
}

/// Work with instructions that every machine has, as a function of its own.
#[inline(never)]
pub(super) fn with_baseline<W: WithSimd, S: Simd>(token: S, work: W) -> W::Output {
    work.with_simd(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_that_is_missing_or_unknown_is_an_error() {
        assert!(choose(Some("sse9")).unwrap_err().contains("expected scalar"));
        let missing = if cfg!(target_arch = "x86_64") { "neon" } else { "avx2" };
        assert!(choose(Some(missing)).unwrap_err().contains("best level"));
        assert_eq!(choose(Some("scalar")), Ok(Isa::Scalar));
    }
}
