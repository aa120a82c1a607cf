//! The list of operations: a file a room of `tensor/src/ops/`, each with a `cases()` that [`all`] gathers.

mod attention;
mod conv;
mod index;
mod loss;
mod movement;
mod norm;
mod pointwise;
mod pool;
mod product;
mod quantized;
mod reduce;
mod rotary;

use crate::harness::Case;

/// Public functions of the rooms that need no case, each with the reason.
pub const EXCUSED: &[(&str, &str)] = &[
    ("rand", "random: tensor/src/ops/random.rs and the kernel test what can be said of it"),
    ("randn", "random, as rand"),
    ("randint", "random, as rand"),
    ("randperm", "random, as rand"),
    ("rand_like", "random, as rand"),
    ("randn_like", "random, as rand"),
    ("rand_bool", "random, as rand"),
    ("bernoulli", "random, as rand"),
    ("quantize", "makes a constant: tensor/tests/quantized.rs, as for the rest of a quantised matrix"),
    ("from_blocks", "as quantize"),
    ("shape", "as quantize"),
    ("kind", "as quantize"),
    ("nbytes", "as quantize"),
    ("as_bytes", "as quantize"),
    ("to_tensor", "as quantize"),
    ("from_tensor", "as quantize"),
    ("dequantize", "as quantize"),
    ("select_rows", "as quantize"),
    ("rows", "as quantize"),
    ("number", "the factor of an optimiser's step: no operation"),
    ("to_dtype", "the harness itself converts every sample with it; cast.rs has its own test"),
];

/// Every case.
pub fn all() -> Vec<Case> {
    [
        attention::cases(),
        conv::cases(),
        index::cases(),
        loss::cases(),
        movement::cases(),
        norm::cases(),
        pointwise::cases(),
        pool::cases(),
        product::cases(),
        quantized::cases(),
        reduce::cases(),
        rotary::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// One test a room, so that they run side by side and a failure names its room.
macro_rules! rooms {
    ($($room:ident),*) => { $(
        #[test]
        fn $room() {
            $room::cases().iter().for_each(Case::run);
        }
    )* };
}
rooms!(attention, conv, index, loss, movement, norm, pointwise, pool, product, quantized, reduce, rotary);
