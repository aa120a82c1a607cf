//! Products of rows that lie anywhere, in the order of a list: what a convolution reads for its taps.
//!
//! B is a panel as the rest of [`amx`](super) has it. A is read where it lies: for each step a list says where its first row is, and rows,
//! the lower tile, and the parts of the values are constant distances away from there.

use super::{Block, CHUNK, SIDE, Session};
use std::arch::asm;

/// Where SIDE rows of A lie, each of 64 bytes a step and part.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// What offsets are relative to.
    pub base: *const u8,
    /// Bytes from a row to the next.
    pub row: usize,
    /// Bytes from the first to the seventeenth row.
    pub half: usize,
    /// Bytes from a part to the next.
    pub part: usize,
    /// For each step the bytes from `base` to its first row.
    pub offsets: &'a [usize],
}

/// Tiles 4 and 5: a part of A's rows.
macro_rules! load_a {
    (0) => {
        "tileloadd tmm4, [{t} + {row}*1]\n lea {u}, [{t} + {half}]\n tileloadd tmm5, [{u} + {row}*1]"
    };
    (1) => {
        "lea {u}, [{t} + {part}]\n tileloadd tmm4, [{u} + {row}*1]\n add {u}, {half}\n tileloadd tmm5, [{u} + {row}*1]"
    };
    (2) => {
        "lea {u}, [{t} + {part}*2]\n tileloadd tmm4, [{u} + {row}*1]\n add {u}, {half}\n tileloadd tmm5, [{u} + {row}*1]"
    };
}

/// A function that sums over all steps; `$body` is a step, whose rows begin at `t`.
macro_rules! products {
    ($name:ident, $parts:literal, [$($body:expr),* $(,)?]) => {
        /// # Safety
        /// As for [`products`].
        unsafe fn $name(a: &Rows, b: *const u8, c: Block<f32>) {
            // SAFETY: the caller's contract: each step reads the rows of its offset and the chunks of B that it goes forward by; the block's
            // rows follow `c`, as many bytes apart as `c_row` says.
            unsafe {
                asm!(
                    "lea {u}, [{c} + {c_row}*8]",
                    "lea {u}, [{u} + {c_row}*8]",
                    "test {t:e}, {t:e}  /* {part} */",
                    "jz 3f",
                    "tileloadd tmm0, [{c} + {c_row}*1]",
                    "tileloadd tmm1, [{c} + {c_row}*1 + 64]",
                    "tileloadd tmm2, [{u} + {c_row}*1]",
                    "tileloadd tmm3, [{u} + {c_row}*1 + 64]",
                    "jmp 2f",
                    "3:",
                    "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                    "2:",
                    "mov {t}, [{offset}]",
                    "add {t}, {a}",
                    $($body,)*
                    "add {b}, {chunk}",
                    "add {offset}, 8",
                    "dec {steps}",
                    "jnz 2b",
                    "lea {u}, [{c} + {c_row}*8]",
                    "lea {u}, [{u} + {c_row}*8]",
                    "tilestored [{c} + {c_row}*1], tmm0",
                    "tilestored [{c} + {c_row}*1 + 64], tmm1",
                    "tilestored [{u} + {c_row}*1], tmm2",
                    "tilestored [{u} + {c_row}*1 + 64], tmm3",
                    t = inout(reg) usize::from(c.add) => _,
                    u = out(reg) _,
                    a = in(reg) a.base,
                    row = in(reg) a.row,
                    half = in(reg) a.half,
                    part = in(reg) a.part,
                    offset = inout(reg) a.offsets.as_ptr() => _,
                    steps = inout(reg) a.offsets.len() => _,
                    b = inout(reg) b => _,
                    b_row = in(reg) 4 * SIDE,
                    c = in(reg) c.first,
                    c_row = in(reg) size_of::<f32>() * c.row_stride,
                    chunk = const $parts * CHUNK,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                )
            }
        }
    };
}

products!(one_part, 1, [load_a!(0), load_b!(0), multiply!("tdpbf16ps")]);
products!(
    two_parts,
    2,
    [load_a!(0), load_b!(1), multiply!("tdpbf16ps"), load_b!(0), multiply!("tdpbf16ps"), load_a!(1), multiply!("tdpbf16ps")]
);
products!(
    three_parts,
    3,
    [
        load_a!(0),
        load_b!(2),
        multiply!("tdpbf16ps"),
        load_b!(1),
        multiply!("tdpbf16ps"),
        load_b!(0),
        multiply!("tdpbf16ps"),
        load_a!(2),
        multiply!("tdpbf16ps"),
        load_a!(1),
        multiply!("tdpbf16ps"),
        load_b!(1),
        multiply!("tdpbf16ps"),
    ]
);

/// The sums over all steps of the products of A's rows and B's columns that count, of values in `PARTS` parts: see
/// [`three_part_products`](super::three_part_products).
///
/// # Panics
/// Without a step, and for other than one to three parts.
///
/// # Safety
/// For each offset and part, 64 bytes must be readable of each of the SIDE rows of A, and a chunk of B; the block must be writable, and
/// initialised if it is added to, and lie apart from both.
pub unsafe fn products<const PARTS: usize>(_: &Session, a: &Rows, b: *const u8, c: Block<f32>) {
    assert!(!a.offsets.is_empty());
    // SAFETY: the session has configured the tiles; the rest is the caller's contract.
    unsafe {
        match PARTS {
            1 => one_part(a, b, c),
            2 => two_parts(a, b, c),
            3 => three_parts(a, b, c),
            _ => panic!("one to three parts"),
        }
    }
}
