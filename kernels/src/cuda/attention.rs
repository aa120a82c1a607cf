//! Scaled dot-product attention without the matrix of scores, forward ([`forward`]) and backward ([`backward`]): `attention.cu` for anything,
//! `attention_mma.cu` on tensor cores, `attention_hopper.cu` on Hopper. Each result has one writer, so bits do not change from run to run.
//! Memory beside inputs and outputs grows with the rows of Q only.

use super::compile::Source;
use super::launch::{Launch, Module, TensorMap, TensorMapSpec, impl_arg};
use super::memory::{DevicePtr, Slice, SliceMut, Strided, Type, View};
use super::random::KernelStream;
use super::{Arg, CudaError, Gpu};
use crate::cpu::random::{Dropout, Stream, threshold};

const PORTABLE: Source = Source { name: "attention", text: include_str!("attention/attention.cu") };
const MMA: Source = Source { name: "attention_mma", text: include_str!("attention/attention_mma.cu") };
const HOPPER: Source = Source { name: "attention_hopper", text: include_str!("attention/attention_hopper.cu") };

/// The widest keys and values that there are kernels for.
pub const MAX_WIDTH: usize = 256;

/// Which keys a query looks at, an L×S matrix a query head.
#[derive(Clone, Copy, Debug)]
pub enum Mask<'a> {
    /// Bools, true where it may.
    Open(View<'a>),
    /// Added to the scores; of the type of the queries.
    Bias(View<'a>),
}

/// The inputs. The last two dimensions of a view are a matrix's rows and columns; those before them, in row-major order, number the heads.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// Queries, L×E.
    pub q: View<'a>,
    /// Keys, S×E. If there are fewer than query heads, as many neighbouring query heads share each.
    pub k: View<'a>,
    /// Values, S×V, as many as keys.
    pub v: View<'a>,
    /// Besides `causal`; both must allow a key.
    pub mask: Option<Mask<'a>>,
    /// Query i looks at the keys 0 to i only.
    pub causal: bool,
    /// Factor of the scores.
    pub scale: f64,
    /// Applied to the weights: they are elements in row-major order, `[heads][L][S]`.
    pub dropout: Option<Dropout>,
}

/// What the forward pass gave, and the gradient of its output.
#[derive(Clone, Copy, Debug)]
pub struct Gradients<'a> {
    /// The output.
    pub out: Slice<'a>,
    /// Its gradient.
    pub grad: Slice<'a>,
    /// The logarithms of the sums of exponentials.
    pub lse: Slice<'a>,
}

/// `Extents` of `attention.cuh`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Extents {
    heads: i64,
    group: i64,
    queries: i64,
    keys: i64,
    width: i64,
    value_width: i64,
    scale: f64,
    dropout: KernelStream,
    kept: f64,
    threshold: u32,
    causal: i32,
    mask: i32,
}

/// `Matrices` of `attention.cuh`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Matrices {
    begins: Strided,
    row_stride: i64,
    col_stride: i64,
}

impl_arg!(Extents, Matrices);

/// Rows and columns of a view's matrices, and their number.
fn matrix_extents(view: &View<'_>) -> (usize, usize, usize) {
    let (lead, matrix) = view.shape().split_at(view.shape().len().saturating_sub(2));
    assert!(matrix.len() == 2, "matrices have two dimensions");
    (matrix[0], matrix[1], lead.iter().product())
}

fn matrices(view: &View<'_>) -> Matrices {
    let at = view.shape().len() - 2;
    let (lead, matrix) = view.strides().split_at(at);
    Matrices { begins: Strided::new(&view.shape()[..at], lead), row_stride: matrix[0] as i64, col_stride: matrix[1] as i64 }
}

/// A family of kernels, each faster than the last, and choosier.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Level {
    /// Any dtype and strides.
    Portable,
    /// f16 and bf16 in rows of aligned 16 bytes, on tensor cores from compute capability 8.0 on.
    Mma,
    /// The same on Hopper, without a mask and dropout, heads at no more than two strides.
    Hopper,
}

impl Attention<'_> {
    /// # Panics
    /// If the inputs do not fit together.
    fn extents(&self) -> Extents {
        let ((queries, width, heads), (keys, k_width, key_heads)) = (matrix_extents(&self.q), matrix_extents(&self.k));
        let (v_rows, value_width, v_heads) = matrix_extents(&self.v);
        assert!(key_heads == v_heads && heads.checked_rem(key_heads).unwrap_or(heads) == 0, "heads");
        assert!(width == k_width && keys == v_rows, "extents of queries, keys and values");
        assert!(self.q.ty() == self.k.ty() && self.q.ty() == self.v.ty() && self.q.ty().is_float(), "one float type");
        assert!(width <= MAX_WIDTH && value_width <= MAX_WIDTH, "width");
        let (mask, view, ty) = match &self.mask {
            None => (0, None, Type::Bool),
            Some(Mask::Open(view)) => (1, Some(view), Type::Bool),
            Some(Mask::Bias(view)) => (2, Some(view), self.q.ty()),
        };
        assert!(view.is_none_or(|view| matrix_extents(view) == (queries, keys, heads) && view.ty() == ty), "mask");
        let Dropout { stream, p } = self.dropout.unwrap_or(Dropout { stream: Stream { seed: 0, offset: 0 }, p: 0.0 });
        Extents {
            heads: heads as i64,
            group: (heads / key_heads.max(1)) as i64,
            queries: queries as i64,
            keys: keys as i64,
            width: width as i64,
            value_width: value_width as i64,
            scale: self.scale,
            dropout: stream.into(),
            kept: 1.0 / (1.0 - p),
            threshold: threshold(p),
            causal: self.causal.into(),
            mask,
        }
    }

    /// The type of sums.
    fn compute(&self) -> Type {
        if self.q.ty() == Type::F64 { Type::F64 } else { Type::F32 }
    }

    /// The fastest level for these inputs.
    pub fn level(&self, gpu: &Gpu) -> Level {
        let x = self.extents();
        let whole = |view: &View<'_>| {
            let m = matrices(view);
            let rank = m.begins.rank();
            let even = m.row_stride % 8 == 0 || matrix_extents(view).0 == 1;
            view.ptr().is_aligned(16) && m.col_stride == 1 && even && m.begins.strides()[..rank].iter().all(|s| s % 8 == 0)
        };
        let inputs = [self.q, self.k, self.v];
        let packed = x.width % 8 == 0 && x.value_width % 8 == 0 && inputs.iter().all(whole);
        // Blocks of queries and keys are counted in 32 bits.
        let small = x.queries.max(x.keys) <= 1 << 30 && x.heads * (x.queries.max(x.keys) / 64 + 1) <= 1 << 31;
        let half = matches!(self.q.ty(), Type::F16 | Type::BF16);
        // Scores are scaled after the largest has been found among them.
        let ordered = self.scale > 0.0 && self.scale.is_finite();
        if gpu.capability() < (8, 0) || !(half && packed && small && ordered) {
            return Level::Portable;
        }
        let mapped = |view: &View<'_>| {
            let m = matrices(view);
            m.begins.rank() <= 2 && m.begins.strides()[..m.begins.rank()].iter().all(|&s| s > 0) && m.row_stride > 0
        };
        // Nothing has no tensor map.
        let some = x.keys > 0 && x.width > 0 && x.value_width > 0;
        if gpu.capability() == (9, 0) && some && self.mask.is_none() && self.dropout.is_none() && inputs.iter().all(mapped) {
            Level::Hopper
        } else {
            Level::Mma
        }
    }

    fn mask_args(&self) -> (DevicePtr, Matrices) {
        match &self.mask {
            Some(Mask::Open(view) | Mask::Bias(view)) => (view.ptr(), matrices(view)),
            None => (DevicePtr::NULL, Matrices::default()),
        }
    }
}

impl Extents {
    fn widest(&self) -> usize {
        self.width.max(self.value_width) as usize
    }

    /// Blocks that have `rows` queries, or keys, of a head each.
    fn query_blocks(&self, rows: usize) -> usize {
        self.heads as usize * (self.queries as usize).div_ceil(rows)
    }

    fn key_blocks(&self, rows: usize) -> usize {
        (self.heads / self.group) as usize * (self.keys as usize).div_ceil(rows)
    }
}

/// A kernel file with macros that are numbers.
fn module(gpu: &'static Gpu, source: &'static Source, ty: Type, macros: &[(&str, usize)]) -> Result<Module, CudaError> {
    let values: Vec<String> = macros.iter().map(|(_, value)| value.to_string()).collect();
    let mut defines = vec![("T", ty.name())];
    defines.extend(macros.iter().zip(&values).map(|((name, _), value)| (*name, value.as_str())));
    gpu.module(source, &defines)
}

/// `out = dropout(softmax(scale · Q·Kᵀ + mask)) · V`, head after head without gaps, L×V each, and `lse` (f64 for f64, else f32), L a head, the logarithm
/// of the sum of the exponentials of a query's scores. A query that looks at no key gives zeros, and ∞ in `lse`.
///
/// # Panics
/// If inputs and outputs do not fit together.
pub fn forward(gpu: &'static Gpu, attention: &Attention<'_>, out: SliceMut<'_>, lse: SliceMut<'_>) -> Result<(), CudaError> {
    let level = if out.ptr().is_aligned(16) { attention.level(gpu) } else { Level::Portable };
    forward_at(level, gpu, attention, out, lse)
}

fn forward_at(level: Level, gpu: &'static Gpu, attention: &Attention<'_>, out: SliceMut<'_>, lse: SliceMut<'_>) -> Result<(), CudaError> {
    let x = attention.extents();
    let rows = (x.heads * x.queries) as usize;
    assert!(out.len() == rows * x.value_width as usize && out.ty() == attention.q.ty(), "output");
    assert!(lse.len() == rows && lse.ty() == attention.compute(), "sums of exponentials");
    if rows == 0 {
        return Ok(());
    }
    match level {
        Level::Portable => forward_portable(gpu, attention, &x, &out, &lse),
        Level::Mma => forward_mma(gpu, attention, &x, &out, &lse),
        Level::Hopper => forward_hopper(gpu, attention, &x, &out, &lse),
    }
}

/// Writes the gradients of all queries, keys and values, head after head without gaps.
///
/// # Panics
/// If inputs and outputs do not fit together.
pub fn backward(
    gpu: &'static Gpu,
    attention: &Attention<'_>,
    given: Gradients<'_>,
    dq: SliceMut<'_>,
    dk: SliceMut<'_>,
    dv: SliceMut<'_>,
) -> Result<(), CudaError> {
    let level = match () {
        () if ![given.out.ptr(), given.grad.ptr(), dq.ptr(), dk.ptr(), dv.ptr()].iter().all(|ptr| ptr.is_aligned(16)) => Level::Portable,
        () if attention.extents().widest() > hopper::BACKWARD_WIDTH => Level::Mma,
        () => Level::Hopper,
    };
    backward_at(attention.level(gpu).min(level), gpu, attention, given, dq, dk, dv)
}

fn backward_at(
    level: Level,
    gpu: &'static Gpu,
    attention: &Attention<'_>,
    given: Gradients<'_>,
    dq: SliceMut<'_>,
    dk: SliceMut<'_>,
    dv: SliceMut<'_>,
) -> Result<(), CudaError> {
    let x = attention.extents();
    let (rows, key_rows) = ((x.heads * x.queries) as usize, (x.heads / x.group.max(1) * x.keys) as usize);
    let (width, value_width) = (x.width as usize, x.value_width as usize);
    assert!(
        given.out.len() == rows * value_width && given.grad.len() == given.out.len() && given.lse.len() == rows,
        "what the forward pass gave"
    );
    assert!(dq.len() == rows * width && dk.len() == key_rows * width && dv.len() == key_rows * value_width, "gradients");
    let types = [given.out.ty(), given.grad.ty(), dq.ty(), dk.ty(), dv.ty()];
    assert!(types.iter().all(|&ty| ty == attention.q.ty()) && given.lse.ty() == attention.compute(), "types");
    let mut to = [dq, dk, dv];
    if given.out.is_empty() || to[1].is_empty() {
        return to.iter_mut().try_for_each(|to| gpu.zero(to));
    }
    match level {
        Level::Portable => backward_portable(gpu, attention, &x, &given, &to),
        Level::Mma => backward_mma(gpu, attention, &x, &given, &to),
        Level::Hopper => backward_hopper(gpu, attention, &x, &given, &to),
    }
}

// SAFETY of all launches below: views lie inside of their buffers, the lengths of slices were checked against the extents, and the kernels touch
// rows, columns and heads of these extents only.

/// Tiles of `attention.cu`, in sixteens of rows.
struct Portable {
    module: Module,
    /// Bytes of a value in shared memory.
    size: usize,
    width: usize,
    rows: usize,
    grad_rows: usize,
}

impl Portable {
    const GRAD_STEP: usize = 2;

    fn new(gpu: &'static Gpu, a: &Attention<'_>, x: &Extents) -> Result<Self, CudaError> {
        let size = a.compute().size();
        let width = x.widest().next_power_of_two().max(32);
        // A thread's sums are that many for each sixteen columns; registers hold 64 of eight bytes at most.
        let (rows, grad_rows) = (16 / size, if width > 128 { 8 } else { 16 } / size);
        let macros = [
            ("WIDTH", width),
            ("DROPOUT", a.dropout.is_some().into()),
            ("ROWS", rows),
            ("STEP", rows),
            ("GRAD_ROWS", grad_rows),
            ("GRAD_STEP", Self::GRAD_STEP),
        ];
        Ok(Self { module: module(gpu, &PORTABLE, a.q.ty(), &macros)?, size, width, rows, grad_rows })
    }

    /// `blocks` blocks, with room for `tiles` tiles of weights.
    fn launch(&self, blocks: usize, rows: usize, step: usize, tiles: usize) -> Launch {
        let stage = (16 * (rows + step) * 20).max(16 * self.width);
        Launch::blocks(blocks, 256).with_shared(((stage + tiles * 16 * rows * (16 * step + 4)) * self.size) as u32)
    }
}

fn forward_portable(gpu: &'static Gpu, a: &Attention<'_>, x: &Extents, out: &SliceMut<'_>, lse: &SliceMut<'_>) -> Result<(), CudaError> {
    let tiles = Portable::new(gpu, a, x)?;
    let launch = tiles.launch(x.query_blocks(16 * tiles.rows), tiles.rows, tiles.rows, 1);
    let (mask, mask_at) = a.mask_args();
    let args: [&dyn Arg; 11] =
        [&a.q.ptr(), &matrices(&a.q), &a.k.ptr(), &matrices(&a.k), &a.v.ptr(), &matrices(&a.v), &mask, &mask_at, &out.ptr(), &lse.ptr(), x];
    // SAFETY: see above.
    unsafe { tiles.module.kernel("attention_forward")?.launch(launch, &args) }
}

fn backward_portable(
    gpu: &'static Gpu,
    a: &Attention<'_>,
    x: &Extents,
    given: &Gradients<'_>,
    to: &[SliceMut<'_>; 3],
) -> Result<(), CudaError> {
    let tiles = Portable::new(gpu, a, x)?;
    let rows = tiles.grad_rows;
    let queries = tiles.launch(x.query_blocks(16 * rows), rows, Portable::GRAD_STEP, 1);
    let keys = tiles.launch(x.key_blocks(16 * rows), rows, Portable::GRAD_STEP, 2);
    let along = gpu.alloc(given.lse.len() * given.lse.ty().size())?;
    let launch = Launch::over(given.lse.len() * 32, 256);
    // SAFETY: see above; `along` holds one value a query.
    unsafe {
        let args: [&dyn Arg; 5] = [&given.out.ptr(), &given.grad.ptr(), &along.ptr(), &(x.heads * x.queries), &x.value_width];
        tiles.module.kernel("attention_along")?.launch(launch, &args)?;
        backward_strided(
            &tiles.module,
            ["attention_backward_queries", "attention_backward_keys"],
            [queries, keys],
            a,
            x,
            given,
            &along.ptr(),
            to,
        )
    }
}

/// Launches the two kernels of the backward pass that take strided inputs.
///
/// # Safety
/// `along` holds one value a query, and the grids fit the kernels.
#[allow(clippy::too_many_arguments)]
unsafe fn backward_strided(
    module: &Module,
    kernels: [&str; 2],
    launches: [Launch; 2],
    a: &Attention<'_>,
    x: &Extents,
    given: &Gradients<'_>,
    along: &DevicePtr,
    [dq, dk, dv]: &[SliceMut<'_>; 3],
) -> Result<(), CudaError> {
    let (mask, mask_at) = a.mask_args();
    let (q, k, v) = (a.q.ptr(), a.k.ptr(), a.v.ptr());
    let (q_at, k_at, v_at) = (matrices(&a.q), matrices(&a.k), matrices(&a.v));
    let (grad, lse) = (given.grad.ptr(), given.lse.ptr());
    let (dq, dk, dv) = (dq.ptr(), dk.ptr(), dv.ptr());
    // SAFETY: the caller's.
    unsafe {
        module.kernel(kernels[0])?.launch(launches[0], &[&q, &q_at, &k, &k_at, &v, &v_at, &mask, &mask_at, &grad, &lse, along, &dq, x])?;
        module.kernel(kernels[1])?.launch(launches[1], &[&q, &q_at, &k, &k_at, &v, &v_at, &mask, &mask_at, &grad, &lse, along, &dk, &dv, x])
    }
}

/// Rows of a padded head, of 16-bit elements: what `HEAD` of the tensor cores' kernels can be.
fn padded_head(width: usize) -> usize {
    width.next_power_of_two().max(64)
}

fn forward_mma(gpu: &'static Gpu, a: &Attention<'_>, x: &Extents, out: &SliceMut<'_>, lse: &SliceMut<'_>) -> Result<(), CudaError> {
    let head = padded_head(x.widest());
    // What 255 registers hold.
    let (row_tiles, step) = (if head > 128 { 1 } else { 2 }, if head > 64 { 32 } else { 64 });
    let (warps, rows) = (4, 64 * row_tiles);
    let macros = [
        ("HEAD", head),
        ("MASK", x.mask as usize),
        ("DROPOUT", a.dropout.is_some().into()),
        ("BACKWARD", 0),
        ("WARPS", warps),
        ("ROW_TILES", row_tiles),
        ("STEP", step),
    ];
    let module = module(gpu, &MMA, a.q.ty(), &macros)?;
    let launch = Launch::blocks(x.query_blocks(rows), 32 * warps as u32).with_shared(((rows + 4 * step) * head * 2) as u32);
    let (mask, mask_at) = a.mask_args();
    let args: [&dyn Arg; 11] =
        [&a.q.ptr(), &matrices(&a.q), &a.k.ptr(), &matrices(&a.k), &a.v.ptr(), &matrices(&a.v), &mask, &mask_at, &out.ptr(), &lse.ptr(), x];
    // SAFETY: see above.
    unsafe { module.kernel("attention_forward_mma")?.launch(launch, &args) }
}

fn backward_mma(gpu: &'static Gpu, a: &Attention<'_>, x: &Extents, given: &Gradients<'_>, to: &[SliceMut<'_>; 3]) -> Result<(), CudaError> {
    let head = padded_head(x.widest());
    // What 255 registers and 96 KiB of shared memory (sm_86 and sm_89 have 99) hold.
    let (warps, step) = match head {
        64 => (8, 64),
        128 => (8, 32),
        _ => (4, 16),
    };
    let rows = 16 * warps;
    let macros = [
        ("HEAD", head),
        ("MASK", x.mask as usize),
        ("DROPOUT", a.dropout.is_some().into()),
        ("BACKWARD", 1),
        ("WARPS", warps),
        ("STEP", step),
    ];
    let module = module(gpu, &MMA, a.q.ty(), &macros)?;
    let along = gpu.alloc(given.lse.len() * 4)?;
    let lanes = (head / 8).min(32);
    let shared = ((2 * rows + 4 * step) * head * 2) as u32;
    let [queries, keys] =
        [x.query_blocks(rows), x.key_blocks(rows)].map(|blocks| Launch::blocks(blocks, 32 * warps as u32).with_shared(shared));
    // SAFETY: see above; `along` holds one value a query.
    unsafe {
        let args: [&dyn Arg; 5] = [&given.out.ptr(), &given.grad.ptr(), &along.ptr(), &(x.heads * x.queries), &x.value_width];
        module.kernel("attention_along_mma")?.launch(Launch::blocks((given.lse.len() * lanes).div_ceil(256), 256), &args)?;
        let kernels = ["attention_backward_queries_mma", "attention_backward_keys_mma"];
        backward_strided(&module, kernels, [queries, keys], a, x, given, &along.ptr(), to)
    }
}

mod hopper {
    //! Tiles of `attention_hopper.cu`: what registers and 227 KiB of shared memory hold.

    /// The widest heads whose gradients fit registers.
    pub(super) const BACKWARD_WIDTH: usize = 128;
    /// Stages of a ring of tiles.
    pub(super) const STAGES: usize = 2;
    /// Bytes of barriers, and of what a tile is.
    pub(super) const BARRIERS: usize = 8 * (4 + 4 * STAGES);
    /// Backward: keys of a block and queries of a step, and the same turned round.
    pub(super) const KEY_ROWS: usize = 128;
    pub(super) const QUERY_ROWS: usize = 128;
    pub(super) const QUERY_STEP: usize = 128;
    /// Half of Hopper's second-level cache: keys and values of heads that are in work together.
    pub(super) const CACHE: usize = 24 << 20;

    /// A step of fewer queries wastes less where a causal block's edge runs through it.
    pub(super) fn key_step(head: usize, causal: bool) -> usize {
        match (head, causal) {
            (64, _) => 128,
            (_, true) => 64,
            (_, false) => 80,
        }
    }

    /// Forward: queries of a tile and keys of a step.
    pub(super) fn forward_tile(head: usize, causal: bool) -> (usize, usize) {
        match (head, causal) {
            (64, _) => (192, 128),
            (128, true) => (128, 128),
            (128, false) => (128, 176),
            _ => (128, 80),
        }
    }
}

/// Matrices as the copy engine sees them.
#[derive(Clone, Copy)]
struct Mapped {
    ptr: DevicePtr,
    ty: Type,
    rows: usize,
    width: usize,
    matrices: Matrices,
}

impl Mapped {
    fn of(view: &View<'_>) -> Self {
        let (rows, width, _) = matrix_extents(view);
        Self { ptr: view.ptr(), ty: view.ty(), rows, width, matrices: matrices(view) }
    }

    /// `heads` row-major matrices without gaps.
    fn dense(slice: Slice<'_>, heads: usize, rows: usize, width: usize) -> Self {
        let matrices = Matrices { begins: Strided::new(&[heads], &[rows * width]), row_stride: width as i64, col_stride: 1 };
        Self { ptr: slice.ptr(), ty: slice.ty(), rows, width, matrices }
    }

    /// Their dimensions of heads, the inner one first. There are at most two.
    fn heads(&self) -> [(i64, i64); 2] {
        let begins = &self.matrices.begins;
        let (shape, strides, rank) = (begins.shape(), begins.strides(), begins.rank());
        [1, 2].map(|back| if back <= rank { (shape[rank - back], strides[rank - back]) } else { (1, self.row() * self.rows as i64) })
    }

    /// The distance of rows. If there is but one, any that the engine takes.
    fn row(&self) -> i64 {
        if self.rows > 1 { self.matrices.row_stride } else { self.width.next_multiple_of(8) as i64 }
    }

    /// The map for tiles of `rows` rows by 64 columns.
    fn map(&self, gpu: &Gpu, rows: usize) -> Result<TensorMap, CudaError> {
        let [(inner, inner_stride), (batch, batch_stride)] = self.heads();
        gpu.tensor_map(&TensorMapSpec {
            ptr: self.ptr,
            ty: self.ty,
            dims: &[self.width as u64, self.rows as u64, inner as u64, batch as u64],
            strides: &[self.row(), inner_stride, batch_stride].map(|stride| stride as u64 * 2),
            tile: &[64, rows as u32, 1, 1],
            swizzle: 128,
        })
    }

    fn inner(&self) -> i32 {
        self.heads()[0].0 as i32
    }
}

fn forward_hopper(gpu: &'static Gpu, a: &Attention<'_>, x: &Extents, out: &SliceMut<'_>, lse: &SliceMut<'_>) -> Result<(), CudaError> {
    let head = padded_head(x.widest());
    let (rows, step) = hopper::forward_tile(head, a.causal);
    let macros = [
        ("HEAD", head),
        ("CAUSAL", a.causal.into()),
        ("BACKWARD", 0),
        ("STAGES", hopper::STAGES),
        ("ROWS", rows),
        ("STEP", step),
        ("PINGPONG", (head <= 128).into()),
    ];
    let module = module(gpu, &HOPPER, a.q.ty(), &macros)?;
    let [q, k, v] = [&a.q, &a.k, &a.v].map(Mapped::of);
    let (inner, key_inner, value_inner) = (q.inner(), k.inner(), v.inner());
    let (q, k, v) = (q.map(gpu, rows)?, k.map(gpu, step)?, v.map(gpu, step)?);
    let blocks = x.query_blocks(rows).min(gpu.multiprocessors() as usize);
    let shared = (rows + 2 * hopper::STAGES * step) * head * 2 + hopper::BARRIERS;
    let launch = Launch::blocks(blocks, 128 * (rows as u32 / 64 + 1)).with_shared(shared as u32);
    let head_bytes = (x.keys * (x.width + x.value_width)) as usize * 2;
    let section = ((hopper::CACHE / head_bytes).max(1) * x.group as usize).min(x.heads as usize) as u32;
    let mut taken = gpu.alloc(4)?;
    if let Some(mut taken) = SliceMut::new(&mut taken, Type::I32, 0, 1).filter(|_| x.query_blocks(rows) > blocks) {
        gpu.zero(&mut taken)?;
    }
    let args: [&dyn Arg; 11] = [&q, &k, &v, &inner, &key_inner, &value_inner, &section, &taken.ptr(), &out.ptr(), &lse.ptr(), x];
    // SAFETY: see above.
    unsafe { module.kernel("attention_forward_hopper")?.launch(launch, &args) }
}

fn backward_hopper(
    gpu: &'static Gpu,
    a: &Attention<'_>,
    x: &Extents,
    given: &Gradients<'_>,
    to: &[SliceMut<'_>; 3],
) -> Result<(), CudaError> {
    use hopper::{KEY_ROWS, QUERY_ROWS, QUERY_STEP, STAGES};
    let head = padded_head(x.widest());
    let key_step = hopper::key_step(head, a.causal);
    let macros = [
        ("HEAD", head),
        ("CAUSAL", a.causal.into()),
        ("BACKWARD", 1),
        ("STAGES", STAGES),
        ("KEY_ROWS", KEY_ROWS),
        ("KEY_STEP", key_step),
        ("QUERY_ROWS", QUERY_ROWS),
        ("QUERY_STEP", QUERY_STEP),
    ];
    let module = module(gpu, &HOPPER, a.q.ty(), &macros)?;
    // Whole blocks and whole steps of queries.
    let padded = (x.queries as usize).next_multiple_of(QUERY_ROWS).max((x.queries as usize).next_multiple_of(key_step));
    let (heads, values) = (x.heads as usize, x.heads as usize * padded);
    let (shift, mean) = (gpu.alloc(values * 4)?, gpu.alloc(values * 4)?);
    let (shift, mean) = (shift.ptr(), mean.ptr());
    let [q, k, v] = [&a.q, &a.k, &a.v].map(Mapped::of);
    let grad = Mapped::dense(given.grad, heads, x.queries as usize, x.value_width as usize);
    let [inner, key_inner, value_inner, grad_inner] = [&q, &k, &v, &grad].map(Mapped::inner);
    let shared = |rows: usize, step: usize| ((2 * rows + 2 * STAGES * step) * head * 2 + hopper::BARRIERS) as u32;
    let [dq, dk, dv] = to;
    // SAFETY: see above; `shift` and `mean` hold `padded` values a head, which covers whole blocks and steps of queries.
    unsafe {
        let args: [&dyn Arg; 7] = [&given.out.ptr(), &given.grad.ptr(), &given.lse.ptr(), &shift, &mean, &(padded as i64), x];
        module.kernel("attention_along_hopper")?.launch(Launch::blocks((values * head / 8).div_ceil(256), 256), &args)?;

        let launch = Launch::blocks(x.key_blocks(KEY_ROWS), 128 * (KEY_ROWS as u32 / 64 + 1))
            .with_shared(shared(KEY_ROWS, key_step) + (STAGES * key_step * 8) as u32);
        let maps = [q.map(gpu, key_step)?, k.map(gpu, KEY_ROWS)?, v.map(gpu, KEY_ROWS)?, grad.map(gpu, key_step)?];
        let [q_map, k_map, v_map, grad_map] = &maps;
        let args: [&dyn Arg; 14] = [
            q_map,
            k_map,
            v_map,
            grad_map,
            &inner,
            &key_inner,
            &value_inner,
            &grad_inner,
            &shift,
            &mean,
            &(padded as i64),
            &dk.ptr(),
            &dv.ptr(),
            x,
        ];
        module.kernel("attention_backward_keys_hopper")?.launch(launch, &args)?;

        let launch =
            Launch::blocks(x.query_blocks(QUERY_ROWS), 128 * (QUERY_ROWS as u32 / 64 + 1)).with_shared(shared(QUERY_ROWS, QUERY_STEP));
        let maps = [q.map(gpu, QUERY_ROWS)?, k.map(gpu, QUERY_STEP)?, v.map(gpu, QUERY_STEP)?, grad.map(gpu, QUERY_ROWS)?];
        let [q_map, k_map, v_map, grad_map] = &maps;
        let args: [&dyn Arg; 13] =
            [q_map, k_map, v_map, grad_map, &inner, &key_inner, &value_inner, &grad_inner, &shift, &mean, &(padded as i64), &dq.ptr(), x];
        module.kernel("attention_backward_queries_hopper")?.launch(launch, &args)
    }
}

#[cfg(test)]
mod tests;
