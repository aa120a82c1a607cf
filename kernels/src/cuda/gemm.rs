//! Matrix products on a GPU: `C = activation(alpha · A · B + bias) + residual`, batched, of any strides and any numeric element type.
//!
//! This file holds the arguments, their checks and the launches; [`plan`] chooses among the levels:
//!
//! - `gemm_hopper.cu`: f16 and bf16 on compute capability 9.0, by `wgmma` fed by the copy engine;
//! - `gemm_mma.cu`: f16, bf16, and f32 that need not be exact, on the tensor cores of 8.0 and later;
//! - `gemm_skinny.cu`: a product with few rows or columns, at the speed of memory;
//! - `gemm.cu`: all others.
//!
//! The level, its tiles and the parts that k is cut into (`gemm_reduce.cu` adds them in order) depend on shapes, strides, dtype, precision and the GPU's
//! capability only, so that a GPU model always gives the same bits.

mod plan;
#[cfg(test)]
mod tests;

use self::plan::{Factor, HopperTile, Level, Plan, Problem, TiledTile};
use super::compile::Source;
use super::copy::copy_into_strided;
use super::launch::{Kernel, Launch, TensorMap, TensorMapSpec, impl_arg};
use super::memory::{DevicePtr, Slice, SliceMut, Type};
use super::{CudaError, DeviceBuffer, Gpu};
use crate::cpu::gemm::MatmulPrecision;
use crate::pointwise::Row;

const TILED: Source = Source { name: "gemm", text: include_str!("gemm/gemm.cu") };
const SKINNY: Source = Source { name: "gemm_skinny", text: include_str!("gemm/gemm_skinny.cu") };
const MMA: Source = Source { name: "gemm_mma", text: include_str!("gemm/gemm_mma.cu") };
const HOPPER: Source = Source { name: "gemm_hopper", text: include_str!("gemm/gemm_hopper.cu") };
const REDUCE: Source = Source { name: "gemm_reduce", text: include_str!("gemm/gemm_reduce.cu") };

/// Multiplications from which on the tensor cores save more than a copy of a factor takes.
const PADDING_REPAYS: usize = 1 << 28;

/// A matrix in a GPU's memory: element `(i, j)` lies at `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    data: Slice<'a>,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A matrix over `data`, or `None` if its last element lies outside.
    pub fn new(data: Slice<'a>, rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> Option<Self> {
        let matrix = Self { data, rows, cols, row_stride, col_stride };
        (matrix.span()? <= data.len()).then_some(matrix)
    }

    /// A row-major matrix without gaps, or `None` if `data` is too short.
    pub fn row_major(data: Slice<'a>, rows: usize, cols: usize) -> Option<Self> {
        Self::new(data, rows, cols, cols, 1)
    }

    /// The transposed matrix over the same memory.
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    /// How many elements of data the matrix reaches over, if that is a number.
    fn span(&self) -> Option<usize> {
        if self.rows == 0 || self.cols == 0 {
            return Some(0);
        }
        (self.rows - 1).checked_mul(self.row_stride)?.checked_add((self.cols - 1).checked_mul(self.col_stride)?)?.checked_add(1)
    }
}

/// A copy of a matrix with lines of `line` elements, which are its rows or its columns.
struct Padded {
    buffer: DeviceBuffer,
    ty: Type,
    rows: usize,
    cols: usize,
    line: usize,
    by_rows: bool,
}

impl Padded {
    fn matrix(&self) -> Option<Matrix<'_>> {
        let data = Slice::new(&self.buffer, self.ty, 0, self.buffer.len() / self.ty.size())?;
        let (row_stride, col_stride) = if self.by_rows { (self.line, 1) } else { (1, self.line) };
        Matrix::new(data, self.rows, self.cols, row_stride, col_stride)
    }
}

/// The arguments of a batched product: for each item `i` of the batch `C_i = activation(alpha · A_i · B_i + bias) + residual_i`, where `A_i` is the
/// matrix `a` moved by `a_offsets[i]` elements, and `B_i` is `b` moved by `b_offsets[i]`.
#[derive(Clone, Copy)]
pub struct Gemm<'a> {
    /// The left factor, M×K: shape and strides of each item.
    pub a: Matrix<'a>,
    /// The right factor, K×N.
    pub b: Matrix<'a>,
    /// Where each item's `a` begins, relative to the matrix.
    pub a_offsets: &'a [usize],
    /// Where each item's `b` begins, relative to the matrix.
    pub b_offsets: &'a [usize],
    /// Factor of the product (of integers: truncated).
    pub alpha: f64,
    /// A value per column of the factors' type, added to every row.
    pub bias: Option<Slice<'a>>,
    /// A function of the pointwise table without parameters, of floating-point numbers.
    pub activation: Option<&'static Row<1>>,
    /// A tensor of C's type and layout that is added in the end.
    pub residual: Option<Slice<'a>>,
    /// Adds what C holds in the end. Not together with a residual.
    pub accumulate: bool,
    /// How exact products of f32 must be.
    pub precision: MatmulPrecision,
}

impl<'a> Gemm<'a> {
    /// The plain product of two matrices.
    pub fn new(a: Matrix<'a>, b: Matrix<'a>) -> Self {
        Self::batched(a, &[0], b, &[0])
    }

    /// A product per pair of offsets.
    pub fn batched(a: Matrix<'a>, a_offsets: &'a [usize], b: Matrix<'a>, b_offsets: &'a [usize]) -> Self {
        let precision = MatmulPrecision::Highest;
        Self { a, b, a_offsets, b_offsets, alpha: 1.0, bias: None, activation: None, residual: None, accumulate: false, precision }
    }

    /// Computes into `out`, of the factors' type, or f32 if that is f16 or bf16: item `i` begins at `i · M · row_stride`, and its rows are `row_stride` elements
    /// apart (values between them are left alone).
    ///
    /// # Panics
    /// If the inner extents, the batches or the types differ, a bias is not N long, a residual is not as long as `out`, `row_stride < N`, `out` is too short, or
    /// an offset leads out of a factor's data.
    pub fn run(&self, gpu: &'static Gpu, out: &mut SliceMut<'_>, row_stride: usize) -> Result<(), CudaError> {
        let (m, n) = (self.a.rows, self.b.cols);
        self.check(out, row_stride);
        if self.a_offsets.is_empty() || m == 0 || n == 0 {
            return Ok(());
        }
        self.run_padded(gpu, out, row_stride, PADDING_REPAYS)
    }

    /// As [`run`](Self::run), with factors padded for products of at least `worth` multiplications.
    fn run_padded(&self, gpu: &'static Gpu, out: &mut SliceMut<'_>, row_stride: usize, worth: usize) -> Result<(), CudaError> {
        let (a, b) = (self.padded(gpu, self.a, worth)?, self.padded(gpu, self.b, worth)?);
        let a = a.as_ref().and_then(Padded::matrix).unwrap_or(self.a);
        let b = b.as_ref().and_then(Padded::matrix).unwrap_or(self.b);
        Gemm { a, b, ..*self }.run_as_it_is(gpu, out, row_stride)
    }

    fn run_as_it_is(&self, gpu: &'static Gpu, out: &mut SliceMut<'_>, row_stride: usize) -> Result<(), CudaError> {
        let problem = self.problem(out, row_stride);
        let plan = Plan::of(&problem, gpu.capability());
        self.launch(gpu, problem, plan, out)
    }

    /// A copy of a factor whose lines do not begin at multiples of 16 bytes, with lines that do, as the tensor cores' levels want them: the logits of
    /// a vocabulary of 50,257 are such a factor. `None` where the copy is not needed, or not worth it.
    fn padded(&self, gpu: &'static Gpu, factor: Matrix<'a>, worth: usize) -> Result<Option<Padded>, CudaError> {
        let (ty, unit) = (factor.data.ty(), 8);
        let half = matches!(ty, Type::F16 | Type::BF16);
        let large = self.a_offsets.len() == 1 && self.a.rows.saturating_mul(self.a.cols).saturating_mul(self.b.cols) >= worth;
        let by_rows = factor.col_stride == 1;
        let (lines, len, stride) =
            if by_rows { (factor.rows, factor.cols, factor.row_stride) } else { (factor.cols, factor.rows, factor.col_stride) };
        let in_lines = by_rows || factor.row_stride == 1;
        let even = stride.is_multiple_of(unit) && factor.data.ptr().is_aligned(16);
        if !half || !large || !in_lines || even || gpu.capability() < (8, 0) || self.a_offsets[0] != 0 || self.b_offsets[0] != 0 {
            return Ok(None);
        }
        let line = len.next_multiple_of(unit);
        let mut buffer = gpu.alloc(lines * line * ty.size())?;
        let (shape, strides) = ([lines, len], [stride, 1]);
        let Some(view) = factor.data.view(&shape, &strides) else { return Ok(None) };
        let Some(to) = SliceMut::new(&mut buffer, ty, 0, lines * line) else { return Ok(None) };
        copy_into_strided(gpu, view, to, 0, &[line, 1])?;
        Ok(Some(Padded { buffer, ty, rows: factor.rows, cols: factor.cols, line, by_rows }))
    }

    fn check(&self, out: &SliceMut<'_>, row_stride: usize) {
        let (m, k, n) = (self.a.rows, self.a.cols, self.b.cols);
        let (ty, batch) = (self.a.data.ty(), self.a_offsets.len());
        assert_eq!(k, self.b.rows, "inner extents");
        assert!(ty == self.b.data.ty() && ty != Type::Bool, "types of the factors");
        assert!(out.ty() == ty || (out.ty() == Type::F32 && matches!(ty, Type::F16 | Type::BF16)), "type of C");
        assert_eq!(batch, self.b_offsets.len(), "batches");
        assert!(self.bias.is_none_or(|bias| bias.len() == n && bias.ty() == ty), "bias");
        assert!(self.residual.is_none_or(|r| r.len() == out.len() && r.ty() == out.ty() && !self.accumulate), "residual");
        assert!(self.activation.is_none_or(|row| ty.is_float() && row.names == "[x]" && !row.cuda.contains("p[")), "activation");
        assert!(row_stride >= n, "rows of C overlap");
        if batch > 0 && m > 0 && n > 0 {
            let needed = batch.checked_mul(m).and_then(|rows| (rows - 1).checked_mul(row_stride)).and_then(|at| at.checked_add(n));
            assert!(needed.is_some_and(|needed| out.len() >= needed), "C is too short");
            for (matrix, offsets) in [(self.a, self.a_offsets), (self.b, self.b_offsets)] {
                let furthest = offsets.iter().copied().max().unwrap_or(0);
                let end = matrix.span().and_then(|span| furthest.checked_add(span));
                assert!(k == 0 || end.is_some_and(|end| end <= matrix.data.len()), "a factor leaves its data");
            }
        }
    }

    /// The product as the kernels see it: checked, not empty, the batch as regular as it can be.
    fn problem(&self, out: &SliceMut<'_>, row_stride: usize) -> Problem {
        let ty = self.a.data.ty();
        let factor = |matrix: &Matrix<'_>, offsets: &[usize]| Factor {
            ptr: matrix.data.ptr().add_bytes(offsets[0] * ty.size()),
            stride: matrix.row_stride as i64,
            k_stride: matrix.col_stride as i64,
            ..Factor::default()
        };
        let mut problem = Problem {
            m: self.a.rows,
            n: self.b.cols,
            k: self.a.cols,
            batch: self.a_offsets.len(),
            batch_inner: self.a_offsets.len(),
            a: factor(&self.a, self.a_offsets),
            b: factor(&self.b.t(), self.b_offsets),
            by_offsets: false,
            ty,
            out_ty: out.ty(),
            out: out.ptr(),
            row_stride,
            precision: self.precision,
        };
        problem.arrange_batch(self.a_offsets, self.b_offsets);
        problem.merge_batch();
        problem.settle_strides();
        problem
    }

    fn launch(&self, gpu: &'static Gpu, problem: Problem, plan: Plan, out: &mut SliceMut<'_>) -> Result<(), CudaError> {
        let (p, ty) = (&problem, problem.ty);
        // The type of the sums is f32 for halves, f64 and i64 for those, and else of four bytes.
        let partial = if plan.splits > 1 { p.batch * p.m * p.n * plan.splits * ty.size().max(4) } else { 0 };
        let workspace = gpu.alloc(partial)?;
        let offsets = if p.by_offsets { Some([upload(gpu, self.a_offsets)?, upload(gpu, self.b_offsets)?]) } else { None };
        let at = |i: usize| offsets.as_ref().map_or(DevicePtr::NULL, |o| o[i].ptr());
        let matrix = |f: &Factor, row: i64, col: i64, offsets: DevicePtr| MatrixArg {
            data: f.ptr,
            row,
            col,
            outer: f.outer,
            inner: f.inner,
            offsets,
        };
        let item = (p.m * p.row_stride) as i64;
        let residual = if self.accumulate { Some(out.ptr()) } else { self.residual.map(|r| r.ptr()) };
        let args = GemmArgs {
            m: p.m as i64,
            n: p.n as i64,
            k: p.k as i64,
            batch: p.batch as i64,
            batch_inner: p.batch_inner as i64,
            a: matrix(&p.a, p.a.stride, p.a.k_stride, at(0)),
            b: matrix(&p.b, p.b.k_stride, p.b.stride, at(1)),
            c: out.ptr(),
            c_row: p.row_stride as i64,
            c_batch: item,
            epilogue: EpilogueArg {
                bias: self.bias.map_or(DevicePtr::NULL, |bias| bias.ptr()),
                residual: residual.unwrap_or(DevicePtr::NULL),
                residual_row: p.row_stride as i64,
                residual_batch: item,
            },
            partial: workspace.ptr(),
            splits: plan.splits as i64,
            alpha: self.alpha,
        };
        let mut defines = Defines::new(ty, p.out_ty);
        if plan.splits == 1 {
            self.define_epilogue(&mut defines);
        }
        let units = |tile_m: usize, tile_n: usize| p.m.div_ceil(tile_m) * p.n.div_ceil(tile_n) * p.batch * plan.splits;
        match plan.level {
            Level::Hopper(tile) => launch_hopper(gpu, p, tile, &args, defines)?,
            Level::Mma(tile) => {
                defines
                    .number("PARTIAL", (plan.splits > 1) as usize)
                    .number("A_MN", !p.a.along_k() as usize)
                    .number("B_MN", !p.b.along_k() as usize);
                defines.number("TF32_TERMS", if p.precision == MatmulPrecision::Medium { 1 } else { 3 }).number("GROUP", 8);
                defines
                    .number("BLOCK_M", tile.m)
                    .number("BLOCK_N", tile.n)
                    .number("WARP_M", tile.warp_m)
                    .number("WARP_N", tile.warp_n)
                    .number("STAGES", tile.stages);
                let threads = (tile.m / tile.warp_m * (tile.n / tile.warp_n) * 32) as u32;
                let launch = Launch::blocks(units(tile.m, tile.n), threads).with_shared((tile.stages * (tile.m + tile.n) * 128) as u32);
                run(gpu, &MMA, "gemm_mma", &defines, launch, &args)?;
            }
            Level::Skinny(skinny) => {
                defines.number("PARTIAL", (plan.splits > 1) as usize).number("SWAP", skinny.swap as usize).number("FEW", skinny.few);
                defines
                    .number("ALONG_K", skinny.along_k as usize)
                    .number("VECTOR", skinny.vector)
                    .number("FEW_ALONG_K", skinny.few_along_k as usize);
                run(gpu, &SKINNY, "gemm_skinny", &defines, Launch::blocks(skinny.blocks(p, plan.splits), 256), &args)?;
            }
            Level::Tiled(TiledTile { m, n, k, thread }) => {
                defines.number("PARTIAL", (plan.splits > 1) as usize).number("TILE_M", m).number("TILE_N", n).number("TILE_K", k);
                defines.number("THREAD_M", thread).number("THREAD_N", thread);
                defines.number("A_ALONG_K", p.a.prefers_k() as usize).number("B_ALONG_K", p.b.prefers_k() as usize);
                let most = 4.min(16 / ty.size());
                defines.number("A_VECTOR", p.vector(&p.a, most)).number("B_VECTOR", p.vector(&p.b, most));
                let threads = (m / thread * (n / thread)) as u32;
                run(gpu, &TILED, "gemm_tiled", &defines, Launch::blocks(units(m, n), threads), &args)?;
            }
        }
        if plan.splits > 1 {
            let mut defines = Defines::new(ty, p.out_ty);
            self.define_epilogue(&mut defines);
            run(gpu, &REDUCE, "gemm_reduce", &defines, Launch::over(p.batch * p.m * p.n, 256), &args)?;
        }
        Ok(())
    }

    fn define_epilogue(&self, defines: &mut Defines) {
        defines
            .number("HAS_BIAS", self.bias.is_some() as usize)
            .number("HAS_RESIDUAL", (self.residual.is_some() || self.accumulate) as usize);
        if let Some(row) = self.activation {
            defines.text("ACTIVATION", row.cuda);
        }
        defines.plain = self.bias.is_none() && self.residual.is_none() && !self.accumulate && self.activation.is_none();
    }
}

/// Offsets on the GPU, relative to the first one, which a factor's pointer already has in it.
fn upload(gpu: &'static Gpu, offsets: &[usize]) -> Result<DeviceBuffer, CudaError> {
    let bytes: Vec<u8> = offsets.iter().flat_map(|&o| (o as i64 - offsets[0] as i64).to_ne_bytes()).collect();
    gpu.upload(&bytes)
}

/// The macros of a kernel.
struct Defines {
    list: Vec<(&'static str, String)>,
    /// Nothing but alpha follows a sum.
    plain: bool,
}

impl Defines {
    fn new(ty: Type, out: Type) -> Self {
        Self { list: vec![("T", ty.name().into()), ("OUT", out.name().into())], plain: true }
    }

    fn text(&mut self, name: &'static str, value: &str) -> &mut Self {
        self.list.push((name, value.into()));
        self
    }

    fn number(&mut self, name: &'static str, value: usize) -> &mut Self {
        self.text(name, &value.to_string())
    }

    fn kernel(&self, gpu: &'static Gpu, source: &'static Source, name: &str) -> Result<Kernel, CudaError> {
        let list: Vec<(&str, &str)> = self.list.iter().map(|(name, value)| (*name, value.as_str())).collect();
        gpu.module(source, &list)?.kernel(name)
    }
}

fn run(
    gpu: &'static Gpu,
    source: &'static Source,
    name: &str,
    defines: &Defines,
    launch: Launch,
    args: &GemmArgs,
) -> Result<(), CudaError> {
    let kernel = defines.kernel(gpu, source, name)?;
    // SAFETY: the structs are those of gemm.cuh and gemm_hopper.cu, `Gemm::check` found every element that they lead to inside of its slice, and the
    // workspace was made for this plan; kernels touch indices of the extents only.
    unsafe { kernel.launch(launch, &[args]) }
}

fn launch_hopper(gpu: &'static Gpu, p: &Problem, tile: HopperTile, args: &GemmArgs, mut defines: Defines) -> Result<(), CudaError> {
    let (left, right) = if tile.swap { ((&p.b, p.n), (&p.a, p.m)) } else { ((&p.a, p.m), (&p.b, p.n)) };
    defines
        .number("A_MN", !left.0.along_k() as usize)
        .number("B_MN", !right.0.along_k() as usize)
        .number("BLOCK_M", tile.m)
        .number("BLOCK_N", tile.n);
    defines
        .number("STAGES", tile.stages)
        .number("CLUSTER", tile.cluster)
        .number("PINGPONG", tile.pingpong as usize)
        .number("SWAP", tile.swap as usize);
    let by_tma = defines.plain && p.out_by_tma() && tile.n.is_multiple_of(64) && !tile.swap && tile.parts == 1;
    defines.number("PARTS", tile.parts).text("STORE", if by_tma { "STORE_TMA" } else { "STORE_STAGED" });
    let kernel = defines.kernel(gpu, &HOPPER, "gemm_hopper")?;
    let map_a = factor_map(gpu, p, left.0, left.1, tile.m)?;
    let map_b = factor_map(gpu, p, right.0, right.1, tile.n / tile.cluster)?;
    let size = p.out_ty.size() as u64;
    let row = p.row_stride as u64 * size;
    let map_c = if by_tma {
        gpu.tensor_map(&TensorMapSpec {
            ptr: p.out,
            ty: p.out_ty,
            dims: &[p.n as u64, p.m as u64, p.batch as u64],
            strides: &[row, row * p.m as u64],
            tile: &[64, 16, 1],
            swizzle: 128,
        })?
    } else {
        map_a
    };
    let moves = |stride: i64, extent: usize| (stride != 0 && extent > 1) as i32;
    let (inner, outer) = (p.batch_inner, p.batch / p.batch_inner);
    let shape = HopperShape {
        m: left.1 as i32,
        n: right.1 as i32,
        k: p.k as i32,
        batch_outer: outer as i32,
        batch_inner: inner as i32,
        a_outer: moves(left.0.outer, outer),
        a_inner: moves(left.0.inner, inner),
        b_outer: moves(right.0.outer, outer),
        b_inner: moves(right.0.inner, inner),
        group: tile.group as i32,
        alpha: args.alpha as f32,
    };
    let vectors = row.is_multiple_of(16) && args.c.is_aligned(16) && args.epilogue.residual.is_aligned(16);
    let out = HopperOut { c: args.c, row_stride: args.c_row, batch_stride: args.c_batch, vectors: vectors as i64 };
    let units = left.1.div_ceil(tile.m * tile.cluster) * right.1.div_ceil(tile.n) * p.batch;
    let blocks = tile.cluster * tile.parts;
    // Blocks stay and take tiles in turn, but those that share one.
    let clusters = if tile.parts > 1 { units } else { units.min((gpu.multiprocessors() as usize / blocks).max(1)) };
    let launch = Launch::blocks(clusters * blocks, 384).with_shared(tile.shared_bytes());
    // SAFETY: as in `run`.
    unsafe { kernel.launch(launch, &[&map_a, &map_b, &map_c, &shape, &out, &args.epilogue]) }
}

// A factor's map: `rows` by k, or k by `rows` where those are contiguous; tiles of 64 elements of the contiguous dimension.
fn factor_map(gpu: &'static Gpu, p: &Problem, factor: &Factor, rows: usize, tile_rows: usize) -> Result<TensorMap, CudaError> {
    let size = p.ty.size() as u64;
    let (inner, lines, line, tile) = if factor.along_k() {
        (p.k, rows, factor.stride, [64, tile_rows as u32, 1, 1])
    } else {
        (rows, p.k, factor.k_stride, [64, 64, 1, 1])
    };
    // The distance of what there is one of may be anything, but the copy engine wants a multiple of 16 bytes.
    let line = if lines == 1 { (inner as u64 * size).next_multiple_of(16) } else { line as u64 * size };
    let dims_of = |stride: i64, extent: usize| {
        if stride == 0 || extent == 1 { (1, line * lines as u64) } else { (extent as u64, stride as u64 * size) }
    };
    let (batch_inner, inner_stride) = dims_of(factor.inner, p.batch_inner);
    let (batch_outer, outer_stride) = dims_of(factor.outer, p.batch / p.batch_inner);
    gpu.tensor_map(&TensorMapSpec {
        ptr: factor.ptr,
        ty: p.ty,
        dims: &[inner as u64, lines as u64, batch_inner, batch_outer],
        strides: &[line, inner_stride, outer_stride],
        tile: &tile,
        swizzle: 128,
    })
}

/// `GemmMatrix` of `gemm.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct MatrixArg {
    data: DevicePtr,
    row: i64,
    col: i64,
    outer: i64,
    inner: i64,
    offsets: DevicePtr,
}

/// `GemmEpilogue` of `gemm.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct EpilogueArg {
    bias: DevicePtr,
    residual: DevicePtr,
    residual_row: i64,
    residual_batch: i64,
}

/// `GemmArgs` of `gemm.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct GemmArgs {
    m: i64,
    n: i64,
    k: i64,
    batch: i64,
    batch_inner: i64,
    a: MatrixArg,
    b: MatrixArg,
    c: DevicePtr,
    c_row: i64,
    c_batch: i64,
    epilogue: EpilogueArg,
    partial: DevicePtr,
    splits: i64,
    alpha: f64,
}

/// `HopperShape` of `gemm_hopper.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct HopperShape {
    m: i32,
    n: i32,
    k: i32,
    batch_outer: i32,
    batch_inner: i32,
    a_outer: i32,
    a_inner: i32,
    b_outer: i32,
    b_inner: i32,
    group: i32,
    alpha: f32,
}

/// `HopperOut` of `gemm_hopper.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct HopperOut {
    c: DevicePtr,
    row_stride: i64,
    batch_stride: i64,
    vectors: i64,
}

impl_arg!(EpilogueArg, GemmArgs, HopperShape, HopperOut);
