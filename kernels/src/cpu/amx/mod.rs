//! AMX, Intel's matrix tiles: the token, a thread's use of them, and the loops that multiply panels.
//!
//! The compiler knows neither the instructions nor the registers: they stand in `asm!` blocks, each with a whole loop over K. A panel is a
//! row of chunks of [`CHUNK`] bytes, one for each step of K, or several in a row if values are split into parts:
//!
//! - A: [`SIDE`] rows of [`ENTRIES`] entries, that is two tiles one above the other;
//! - B: [`ENTRIES`] rows of [`SIDE`] entries, two tiles side by side (rows of a tile are two tiles apart).
//!
//! An entry has 32 bits: two bf16 or four i8 of neighbouring k, the first in the lowest bits. Two tiles of A by two of B make
//! SIDE × SIDE sums, which stay in registers for all of K.
//!
//! Source: Intel, *Architecture Instruction Set Extensions Programming Reference*, chapter 3. On processors without AMX the tests run these very blocks
//! under an `emulator` that handles the signals of unknown instructions.

#[cfg(test)]
mod emulator;

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Rows and columns of a block of C.
pub const SIDE: usize = 32;

/// Entries of K in a step.
pub const ENTRIES: usize = 16;

/// Bytes of a chunk: of one factor's values for one step.
pub const CHUNK: usize = 4 * SIDE * ENTRIES;

/// Token: the machine has AMX with bf16 and int8, and the operating system lets this process use it; AVX-512 comes with it.
#[derive(Clone, Copy, Debug)]
pub struct Amx(());

impl Amx {
    /// The token, if the machine and the operating system support the level. The first call asks the system for permission.
    pub fn detect() -> Option<Self> {
        static FOUND: OnceLock<bool> = OnceLock::new();
        FOUND.get_or_init(|| super::simd::Avx512::detect().is_some() && has_instructions() && is_permitted()).then_some(Amx(()))
    }
}

/// Whether the processor has the instructions and the system saves their registers.
fn has_instructions() -> bool {
    /// CPUID(7, 0).EDX: AMX-BF16, AMX-TILE, AMX-INT8.
    const FEATURES: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    /// XCR0: the tiles' configuration and data.
    const STATE: u64 = 0b11 << 17;
    const OSXSAVE: u32 = 1 << 27;
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    // SAFETY: OSXSAVE says that the instruction exists.
    let saved = unsafe { _xgetbv(0) };
    __cpuid_count(7, 0).edx & FEATURES == FEATURES && saved & STATE == STATE
}

#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call changes nothing but the size of this process's register area.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// Whether this process can run the instructions, be it under the emulator.
fn is_usable() -> bool {
    #[cfg(test)]
    if Amx::detect().is_none() {
        return emulator::install();
    }
    Amx::detect().is_some()
}

#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// All eight tiles: sixteen rows of 64 bytes.
static CONFIG: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// This thread's tiles, configured for as long as this lives. (Afterwards the system need not save them with the thread.)
#[derive(Debug)]
pub struct Session(PhantomData<*const ()>);

impl Session {
    /// Configures the tiles of this thread.
    ///
    /// # Panics
    /// If the machine has none.
    pub fn begin() -> Self {
        assert!(is_usable(), "tiles on a machine without AMX");
        // SAFETY: the instruction exists, and reads the 64 bytes of a valid configuration.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &CONFIG, options(nostack, readonly)) };
        Self(PhantomData)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // SAFETY: a session exists, so the instruction does; no other code of this thread uses tiles.
        unsafe { asm!("tilerelease", options(nostack)) };
    }
}

/// Sums of a block of C, row by row.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Sums<T>(pub [T; SIDE * SIDE]);

impl<T: Copy + Default> Default for Sums<T> {
    fn default() -> Self {
        Self([T::default(); SIDE * SIDE])
    }
}

impl<T> Sums<T> {
    /// All of them, to be written.
    pub fn block(&mut self) -> Block<T> {
        Block { first: self.0.as_mut_ptr(), row_stride: SIDE, add: false }
    }
}

/// Where a block of SIDE × SIDE sums lies, and whether they are added to what is there.
#[derive(Clone, Copy, Debug)]
pub struct Block<T> {
    /// The first sum.
    pub first: *mut T,
    /// Values from a row to the next.
    pub row_stride: usize,
    /// Whether sums begin with the values that are there: they must be initialised then.
    pub add: bool,
}

/// Tiles 4 and 5: both of A's in a part of a step.
macro_rules! load_a {
    (0) => {
        "tileloadd tmm4, [{a} + {a_row}*1]\n tileloadd tmm5, [{a} + {a_row}*1 + 1024]"
    };
    (1) => {
        "tileloadd tmm4, [{a} + {a_row}*1 + 2048]\n tileloadd tmm5, [{a} + {a_row}*1 + 3072]"
    };
    (2) => {
        "tileloadd tmm4, [{a} + {a_row}*1 + 4096]\n tileloadd tmm5, [{a} + {a_row}*1 + 5120]"
    };
}

/// Tiles 6 and 7: both of B's.
macro_rules! load_b {
    (0) => {
        "tileloadd tmm6, [{b} + {b_row}*1]\n tileloadd tmm7, [{b} + {b_row}*1 + 64]"
    };
    (1) => {
        "tileloadd tmm6, [{b} + {b_row}*1 + 2048]\n tileloadd tmm7, [{b} + {b_row}*1 + 2112]"
    };
    (2) => {
        "tileloadd tmm6, [{b} + {b_row}*1 + 4096]\n tileloadd tmm7, [{b} + {b_row}*1 + 4160]"
    };
}

macro_rules! multiply {
    ($instruction:literal) => {
        concat!(
            $instruction,
            " tmm0, tmm4, tmm6\n ",
            $instruction,
            " tmm1, tmm4, tmm7\n ",
            $instruction,
            " tmm2, tmm5, tmm6\n ",
            $instruction,
            " tmm3, tmm5, tmm7"
        )
    };
}

// Below the macros that it shares.
pub mod gathered;

/// A function that sums over all steps of a panel; `$body` is a step.
macro_rules! products {
    ($(#[$doc:meta])* $name:ident, $sum:ty, $parts:literal, [$($body:expr),* $(,)?]) => {
        $(#[$doc])*
        ///
        /// # Panics
        /// Without a step.
        ///
        /// # Safety
        /// Both panels must be readable for their chunks, and the block writable apart from them.
        pub unsafe fn $name(_: &Session, a: *const u8, b: *const u8, steps: usize, c: Block<$sum>) {
            assert!(steps > 0);
            // SAFETY: the session has configured the tiles; the caller vouches for the panels, of which each step reads the chunks that it
            // goes forward by, and for the block, of which sixteen rows follow `c` and sixteen `lower`.
            unsafe {
                asm!(
                    "test {add:e}, {add:e}",
                    "jz 3f",
                    "tileloadd tmm0, [{c} + {c_row}*1]",
                    "tileloadd tmm1, [{c} + {c_row}*1 + 64]",
                    "tileloadd tmm2, [{lower} + {c_row}*1]",
                    "tileloadd tmm3, [{lower} + {c_row}*1 + 64]",
                    "jmp 2f",
                    "3:",
                    "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                    "2:",
                    $($body,)*
                    "add {a}, {chunk}",
                    "add {b}, {chunk}",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{c} + {c_row}*1], tmm0",
                    "tilestored [{c} + {c_row}*1 + 64], tmm1",
                    "tilestored [{lower} + {c_row}*1], tmm2",
                    "tilestored [{lower} + {c_row}*1 + 64], tmm3",
                    a = inout(reg) a => _,
                    b = inout(reg) b => _,
                    steps = inout(reg) steps => _,
                    add = in(reg) c.add as u32,
                    c = in(reg) c.first,
                    lower = in(reg) c.first.wrapping_add(SIDE / 2 * c.row_stride),
                    c_row = in(reg) size_of::<$sum>() * c.row_stride,
                    a_row = in(reg) 4 * ENTRIES,
                    b_row = in(reg) 4 * SIDE,
                    chunk = const $parts * CHUNK,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                )
            }
        }
    };
}

products!(
    /// Products of bf16.
    bf16_products, f32, 1, [load_a!(0), load_b!(0), multiply!("tdpbf16ps")]
);
products!(
    /// Products of values in two parts, the high one first: all but low · low.
    two_part_products, f32, 2, [
        load_a!(0), load_b!(1), multiply!("tdpbf16ps"),
        load_b!(0), multiply!("tdpbf16ps"),
        load_a!(1), multiply!("tdpbf16ps"),
    ]
);
products!(
    /// Products of values in three parts, the highest first: high · low, high · middle, high · high, low · high, middle · high and
    /// middle · middle.
    three_part_products, f32, 3, [
        load_a!(0), load_b!(2), multiply!("tdpbf16ps"),
        load_b!(1), multiply!("tdpbf16ps"),
        load_b!(0), multiply!("tdpbf16ps"),
        load_a!(2), multiply!("tdpbf16ps"),
        load_a!(1), multiply!("tdpbf16ps"),
        load_b!(1), multiply!("tdpbf16ps"),
    ]
);
products!(
    /// Products of i8; sums wrap around.
    i8_products, i32, 1, [load_a!(0), load_b!(0), multiply!("tdpbssd")]
);

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    /// Values of `a` and `b` in panels, for `steps` steps; returns the panels and a function of the term (part, lane, k).
    fn panel(parts: usize, steps: usize, of_a: bool, value: impl Fn(usize, usize, usize) -> u16) -> Vec<u16> {
        let mut panel = vec![0; steps * parts * CHUNK / 2];
        for (part, lane, k) in (0..parts * SIDE * steps * 32).map(|i| (i % parts, i / parts % SIDE, i / parts / SIDE)) {
            let (step, entry, half) = (k / 32, k % 32 / 2, k % 2);
            let word = if of_a { lane * ENTRIES + entry } else { entry * SIDE + lane };
            panel[((step * parts + part) * SIDE * ENTRIES + word) * 2 + half] = value(part, lane, k);
        }
        panel
    }

    #[test]
    fn blocks_multiply_their_parts() {
        type Products = unsafe fn(&Session, *const u8, *const u8, usize, Block<f32>);
        type Pairs = &'static [(usize, usize)];
        let cases: [(usize, Products, Pairs); 3] = [
            (1, bf16_products, &[(0, 0)]),
            (2, two_part_products, &[(0, 0), (0, 1), (1, 0)]),
            (3, three_part_products, &[(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0)]),
        ];
        // Small integers, so that sums are exact in any order.
        let x = |part: usize, lane: usize, k: usize| ((lane * 7 + k * 3 + part * 5) % 11) as f32 - 5.0;
        let y = |part: usize, lane: usize, k: usize| ((lane * 5 + k * 2 + part * 3) % 13) as f32 - 6.0;
        for (parts, products, pairs) in cases {
            for steps in [1, 3] {
                let a = panel(parts, steps, true, |p, l, k| bf16::from_f32(x(p, l, k)).to_bits());
                let b = panel(parts, steps, false, |p, l, k| bf16::from_f32(y(p, l, k)).to_bits());
                let mut sums = Sums::default();
                // SAFETY: the panels have all chunks of their steps.
                unsafe { products(&Session::begin(), a.as_ptr().cast(), b.as_ptr().cast(), steps, sums.block()) };
                let mut wide = [1f32; 40 * SIDE];
                let block = Block { first: wide.as_mut_ptr(), row_stride: 40, add: true };
                // SAFETY: as above, and the block lies in `wide`.
                unsafe { products(&Session::begin(), a.as_ptr().cast(), b.as_ptr().cast(), steps, block) };
                for (i, &sum) in sums.0.iter().enumerate() {
                    let (row, col) = (i / SIDE, i % SIDE);
                    let term = |k: usize| pairs.iter().map(|&(p, q)| x(p, row, k) * y(q, col, k)).sum::<f32>();
                    assert_eq!(sum, (0..32 * steps).map(term).sum::<f32>(), "{parts} parts, {row}, {col}");
                    assert_eq!(wide[row * 40 + col], sum + 1.0, "{parts} parts, {row}, {col}, added");
                }
                assert!(wide.chunks(40).all(|row| row[SIDE..] == [1.0; 8]), "between the rows");
            }
        }
    }

    #[test]
    fn blocks_of_i8_are_exact() {
        let bytes: Vec<i8> = (0..2 * CHUNK).map(|i| (i * 89 % 256) as u8 as i8).collect();
        let mut sums = Sums::default();
        // SAFETY: both panels have two chunks.
        unsafe { i8_products(&Session::begin(), bytes.as_ptr().cast(), bytes.as_ptr().cast(), 2, sums.block()) };
        for (i, &sum) in sums.0.iter().enumerate() {
            let (row, col) = (i / SIDE, i % SIDE);
            let term = |k: usize| {
                let (step, entry, byte) = (k / 64, k % 64 / 4, k % 4);
                let a = bytes[step * CHUNK + (row * ENTRIES + entry) * 4 + byte] as i32;
                a * bytes[step * CHUNK + (entry * SIDE + col) * 4 + byte] as i32
            };
            assert_eq!(sum, (0..128).map(term).sum::<i32>(), "{row}, {col}");
        }
    }
}
