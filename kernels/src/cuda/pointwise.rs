//! Runs the rows of the pointwise table, and chains of them, on a GPU: see `pointwise.cu`.
//!
//! A row is compiled when it is first used for a type; a chain becomes one kernel, whose every step is rounded to the type and contracted with
//! no other, so that its result is bit for bit that of the rows one by one.

use super::compile::{expand_text, number};
use super::launch::{Arg, Kernel, Launch};
use super::memory::{DevicePtr, SliceMut, Strided, Type, View};
use super::{CudaError, Gpu};
use crate::cpu::pointwise::chain::{Chain, Function, MAX_OPERANDS, Place};
use crate::pointwise::relation::{RELATIONS, RelationRow};
use crate::pointwise::{Params, Row, backward::BACKWARD, binary::BINARY, binary::TERNARY, unary::UNARY};
use std::ffi::c_void;
use std::fmt::Write as _;

const TEXT: &str = include_str!("pointwise.cu");

/// As in `pointwise.cu`.
const THREADS: usize = 256;
const UNROLL: usize = 2;

/// An operand of a pointwise function.
#[derive(Clone, Copy, Debug)]
pub enum Operand<'a> {
    /// Elements in memory, of the output's shape (broadcast by strides of 0).
    View(View<'a>),
    /// One number for all elements.
    Scalar(f64),
    /// What the output holds at the start: the function works in place.
    Output,
}

/// Where results go: dense memory, and the strides that the output's dimensions have in it.
#[derive(Debug)]
pub struct Output<'a> {
    /// As many elements as the shape has.
    pub data: SliceMut<'a>,
    /// Extents.
    pub shape: &'a [usize],
    /// A permutation of a row-major layout without gaps.
    pub strides: &'a [usize],
}

/// `Operands` of `pointwise.cu`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Operands<const N: usize> {
    data: [DevicePtr; N],
    number: [f64; N],
    strides: [[i64; 8]; N],
    is_strided: [u8; N],
    params: Params,
    shape: [i64; 8],
    rank: i32,
    width: i32,
    numel: i64,
}

// SAFETY: the layout is that of `Operands` in pointwise.cu with OPERANDS = N.
unsafe impl<const N: usize> Arg for Operands<N> {
    fn as_ptr(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }
}

/// `Results` of `pointwise.cu`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Results<const M: usize>([DevicePtr; M]);

// SAFETY: the layout is that of `Results` in pointwise.cu with RESULTS = M.
unsafe impl<const M: usize> Arg for Results<M> {
    fn as_ptr(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }
}

/// Numbers of a layout's dimensions, on the stack: launches are many.
type Few = [usize; 8];

/// Dense results: where the first lies, if it does, their type and extents, and a permutation of a row-major layout without gaps.
#[derive(Clone, Copy)]
struct Dense<'a> {
    ptr: DevicePtr,
    /// All addresses, or-ed: what they are aligned to.
    addresses: u64,
    ty: Type,
    shape: &'a [usize],
    strides: &'a [usize],
}

impl<'a> Dense<'a> {
    fn of<const M: usize>(outs: &[Output<'a>; M]) -> Self {
        let out = &outs[0];
        let addresses = outs.iter().fold(0, |all, out| all | out.data.ptr().address());
        let dense = Self { ptr: out.data.ptr(), addresses, ty: out.data.ty(), shape: out.shape, strides: out.strides };
        let fits = |o: &Output<'_>| o.data.len() == dense.numel() && o.shape == out.shape && o.strides == out.strides;
        assert!(outs.iter().all(fits), "outputs have as many elements as their one shape, and one order of memory");
        dense
    }

    fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// The dimensions of more than one element in the order of the memory, slowest first, and how many they are.
    fn memory_order(&self) -> (Few, usize) {
        let (mut order, mut rank) = ([0; 8], 0);
        for d in (0..self.shape.len()).filter(|&d| self.shape[d] != 1) {
            order[rank] = d;
            rank += 1;
        }
        order[..rank].sort_by_key(|&d| std::cmp::Reverse(self.strides[d]));
        (order, rank)
    }
}

impl<const N: usize> Operands<N> {
    /// What the kernel needs to know of the operands, all seen in the order of the output's memory. `sizes` are those of the operands' elements.
    fn new(params: Params, operands: [Operand<'_>; N], sizes: [usize; N], out: &Dense<'_>) -> Self {
        assert!(out.shape.len() <= 8, "at most eight dimensions");
        let (order, rank) = out.memory_order();
        let ordered = |of: &[usize]| {
            let mut few: Few = [0; 8];
            few.iter_mut().zip(&order[..rank]).for_each(|(to, &d)| *to = of[d]);
            few
        };
        let (shape, dense) = (ordered(out.shape), ordered(out.strides));
        let mut strides = [dense; N];
        let mut this = Self {
            data: [DevicePtr::NULL; N],
            number: [0.0; N],
            strides: [[0; 8]; N],
            is_strided: [0; N],
            params,
            shape: [0; 8],
            rank: 0,
            width: 1,
            numel: out.numel() as i64,
        };
        for (k, operand) in operands.iter().enumerate() {
            match operand {
                Operand::Scalar(x) => this.number[k] = *x,
                Operand::Output => this.data[k] = out.ptr,
                Operand::View(view) => {
                    assert!(view.shape() == out.shape, "a view has the output's shape");
                    this.data[k] = view.ptr();
                    strides[k] = ordered(view.strides());
                    this.is_strided[k] = u8::from(strides[k] != dense);
                }
            }
        }
        for (k, merged) in Strided::together(&shape[..rank], strides.each_ref().map(|s| &s[..rank])).into_iter().enumerate() {
            (this.rank, this.shape, this.strides[k]) = (merged.rank() as i32, merged.shape(), merged.strides());
        }
        let wide = 16 / out_size(&sizes);
        if this.is_wide(wide, &sizes) && out.addresses.is_multiple_of(16.min((wide * out.ty.size()) as u64)) {
            this.width = wide as i32;
        }
        this
    }

    /// Whether every operand gives `wide` elements, from a multiple of `wide` on, by one access.
    fn is_wide(&self, wide: usize, sizes: &[usize; N]) -> bool {
        let inner = (self.rank as usize).saturating_sub(1);
        (0..N).all(|k| {
            let strides = &self.strides[k][..self.rank as usize];
            let aligned = self.data[k].is_aligned(16.min((wide * sizes[k]) as u64));
            match (self.data[k] == DevicePtr::NULL, self.is_strided[k] == 1) {
                (true, _) => true,
                (false, false) => aligned,
                _ if strides.iter().all(|&s| s == 0) => true,
                _ if self.shape[inner] % wide as i64 != 0 => false,
                _ => strides[inner] == 0 || (strides[inner] == 1 && aligned && strides[..inner].iter().all(|s| s % wide as i64 == 0)),
            }
        })
    }

    fn launch<const M: usize>(&self, kernel: Kernel, outs: [Output<'_>; M]) -> Result<(), CudaError> {
        let per_block = if self.width == 1 { THREADS } else { THREADS * UNROLL * self.width as usize };
        let launch = Launch::blocks((self.numel as usize).div_ceil(per_block), THREADS as u32);
        let results = Results(outs.map(|out| out.data.ptr()));
        // SAFETY: the kernel takes these operands and M pointers to as many results as the shape has (asserted in `new`); views lie inside of
        // their buffers, and each thread reads them at indices of the shape.
        unsafe { kernel.launch(launch, &[self, &results]) }
    }
}

/// Runs a kernel that takes [`Operands`] and as many results.
fn run<const N: usize, const M: usize>(
    kernel: Kernel,
    params: Params,
    operands: [Operand<'_>; N],
    sizes: [usize; N],
    outs: [Output<'_>; M],
) -> Result<(), CudaError> {
    Operands::new(params, operands, sizes, &Dense::of(&outs)).launch(kernel, outs)
}

/// The size of the type T that the kernel is compiled for: that of the last operand (the first may be a mask).
fn out_size<const N: usize>(sizes: &[usize; N]) -> usize {
    sizes.last().copied().unwrap_or(1)
}

/// A row as text.
struct Expression {
    name: &'static str,
    names: &'static str,
    cuda: &'static str,
    has_int: bool,
}

impl<const N: usize> From<&Row<N>> for Expression {
    fn from(row: &Row<N>) -> Self {
        Self { name: row.name, names: row.names, cuda: row.cuda, has_int: row.has_int() }
    }
}

/// Every row of this many operands.
fn family(operands: usize) -> Vec<Expression> {
    match operands {
        1 => UNARY.iter().map(|&row| row.into()).collect(),
        2 => BINARY.iter().chain(BACKWARD).map(|&row| row.into()).collect(),
        _ => TERNARY.iter().map(|&row| row.into()).collect(),
    }
}

impl Expression {
    /// The function `row_NAME` of the compute type.
    fn function(&self) -> String {
        let mut text = format!("__device__ __forceinline__ A row_{}(const A* v, const A* p) {{\n", self.name);
        for (k, name) in self.names.trim_matches(['[', ']']).split(',').map(str::trim).enumerate() {
            let _ = writeln!(text, "    const A {name} = v[{k}];");
        }
        let _ = writeln!(text, "    return A({});\n}}", self.cuda);
        text
    }

    /// The function and a kernel of its name that runs it.
    fn kernel(&self, operands: usize) -> String {
        let name = self.name;
        let function = self.function();
        format!(
            "{function}__device__ __forceinline__ T rounded_{name}(const A* v, const A* p) {{\n    return narrow<T>(row_{name}(v, p));\n}}\n\
             KILN_POINTWISE(kernel_{name}, {operands}, T, T, rounded_{name})\n"
        )
    }
}

/// The kernel `kernel_NAME` of a module that is found by `key` and has this text appended to `pointwise.cu`.
fn kernel(
    gpu: &'static Gpu,
    key: &[&str],
    ty: Type,
    operands: usize,
    name: &str,
    text: impl FnOnce() -> String,
) -> Result<Kernel, CudaError> {
    let module = gpu.module_of(key.iter().copied(), "pointwise", false, || {
        expand_text(&format!("{TEXT}\n{}", text()), &[("T", ty.name()), ("OPERANDS", number(operands))])
    })?;
    module.kernel_of(&["kernel_", name])
}

/// `out = row(operands…)`, element by element; f16 and bf16 are computed in f32 and rounded once.
///
/// # Panics
/// If a view has another shape than the output, or if the output's slice is not as long as its shape says.
pub fn apply<const N: usize>(
    gpu: &'static Gpu,
    row: &Row<N>,
    params: Params,
    operands: [Operand<'_>; N],
    out: Output<'_>,
) -> Result<(), CudaError> {
    let ty = out.data.ty();
    if out.data.is_empty() {
        return Ok(());
    }
    // The emulator's compiler is slow to start, so it gets every row at once.
    let key = [if gpu.is_emulated() { "rows" } else { row.name }, " ", ty.name(), " ", number(N)];
    let kernel = kernel(gpu, &key, ty, N, row.name, || {
        let rows = if gpu.is_emulated() { family(N) } else { vec![row.into()] };
        rows.iter().filter(|row| ty.is_float() || row.has_int).map(|row| row.kernel(N)).collect()
    })?;
    run(kernel, params, operands, [ty.size(); N], [out])
}

/// `out = a R b`, element by element, of operands of type `ty`.
///
/// # Panics
/// As [`apply`] does.
pub fn relate(gpu: &'static Gpu, row: &RelationRow, ty: Type, operands: [Operand<'_>; 2], out: Output<'_>) -> Result<(), CudaError> {
    if out.data.is_empty() {
        return Ok(());
    }
    let text = |row: &RelationRow| {
        let (name, cuda) = (row.name, row.cuda);
        format!(
            "__device__ __forceinline__ u8 holds_{name}(const A* v, const A* p) {{\n    const A a = v[0], b = v[1];\n    return ({cuda}) ? 1 : 0;\n}}\n\
             KILN_POINTWISE(kernel_{name}, 2, T, u8, holds_{name})\n"
        )
    };
    let kernel = kernel(gpu, &["relations ", ty.name()], ty, 2, row.name, || RELATIONS.iter().map(|&row| text(row)).collect())?;
    run(kernel, [0.0; 2], operands, [ty.size(); 2], [out])
}

/// `out = condition ? a : b`, element by element.
///
/// # Panics
/// As [`apply`] does.
pub fn select(gpu: &'static Gpu, condition: View<'_>, a: Operand<'_>, b: Operand<'_>, out: Output<'_>) -> Result<(), CudaError> {
    if out.data.is_empty() {
        return Ok(());
    }
    let ty = out.data.ty();
    let kernel = kernel(gpu, &["select ", ty.name()], ty, 3, "select", || {
        "__device__ __forceinline__ T selected(const A* v, const A* p) {\n    return narrow<T>(v[0] != 0 ? v[1] : v[2]);\n}\n\
         KILN_POINTWISE(kernel_select, 3, u8, T, selected)\n"
            .into()
    })?;
    run(kernel, [0.0; 2], [Operand::View(condition), a, b], [1, ty.size(), ty.size()], [out])
}

/// `out = x` converted to another type: the numbers themselves; floats to integers truncate and saturate (NaN gives 0), integers to narrower
/// ones wrap, everything but 0 is true.
///
/// # Panics
/// As [`apply`] does.
pub fn cast(gpu: &'static Gpu, x: View<'_>, out: Output<'_>) -> Result<(), CudaError> {
    if out.data.is_empty() {
        return Ok(());
    }
    let (from, to) = (x.ty(), out.data.ty());
    let is_bool = to == Type::Bool;
    let key = ["cast ", from.name(), " ", to.name(), if is_bool { " truth" } else { "" }];
    let kernel = kernel(gpu, &key, from, 1, "cast", || {
        let to_name = to.name();
        let value = if is_bool { "u8(v[0] != 0)".into() } else { format!("narrow<{to_name}>(math::convert<Compute<{to_name}>>(v[0]))") };
        format!(
            "__device__ __forceinline__ {to_name} converted(const A* v, const A* p) {{\n    return {value};\n}}\n\
             KILN_POINTWISE(kernel_cast, 1, T, {to_name}, converted)\n"
        )
    })?;
    run(kernel, [0.0; 2], [Operand::View(x)], [from.size()], [out])
}

/// A number as kernel files read it, to the last bit.
fn literal(x: f64) -> String {
    if x.is_finite() { format!("A({x:e})") } else { format!("A(__longlong_as_double(0x{:x}ULL))", x.to_bits()) }
}

/// The function `chained` that a chain stands for.
fn chain_text(chain: &Chain) -> String {
    let mut functions: Vec<&str> = Vec::new();
    let (mut text, mut body) = (String::new(), String::new());
    let mut slots = [0; 16];
    for (i, step) in chain.steps().iter().enumerate() {
        let (expression, used) = match step.function {
            Function::One(row) => (Expression::from(row), 1),
            Function::Two(row) => (Expression::from(row), 2),
        };
        if !functions.contains(&expression.name) {
            functions.push(expression.name);
            text += &expression.function();
        }
        let args: Vec<String> = step.args[..used]
            .iter()
            .map(|arg| match *arg {
                Place::Operand(k) => format!("v[{k}]"),
                Place::Slot(slot) => format!("s{}", slots[slot]),
                Place::Scalar(x) => literal(x),
            })
            .collect();
        let [p0, p1] = step.params.map(literal);
        let _ = writeln!(
            body,
            "    const A v{i}[] = {{{}}}, p{i}[] = {{{p0}, {p1}}};\n    const A s{i} = widen<T>(narrow<T>(row_{}(v{i}, p{i})));",
            args.join(", "),
            expression.name
        );
        if let Some(result) = step.result {
            let _ = writeln!(body, "    results[{result}] = narrow<T>(s{i});");
        }
        slots[step.to] = i;
    }
    let _ = writeln!(text, "__device__ __forceinline__ void chained(const A* v, const A* p, T* results) {{\n{body}}}");
    text
}

/// Writes each of the chain's results to its output, element by element.
///
/// # Panics
/// As [`apply`] does, and if there are more than [`MAX_OPERANDS`] operands, or not as many outputs as results, of one shape and order of memory.
pub fn apply_chain<const M: usize>(
    gpu: &'static Gpu,
    chain: &Chain,
    operands: &[Operand<'_>],
    outs: [Output<'_>; M],
) -> Result<(), CudaError> {
    assert_eq!(M, chain.results(), "an output for each result");
    if outs[0].data.is_empty() {
        return Ok(());
    }
    let ty = outs[0].data.ty();
    let all = padded(operands);
    let kernel_text = format!("KILN_POINTWISE_RESULTS(kernel_chain, {}, T, T, {M}, chained)\n", operands.len());
    let text = chain_text(chain) + &kernel_text;
    let kernel = kernel(gpu, &[ty.name(), " ", &text], ty, MAX_OPERANDS, "chain", || text.clone())?;
    run(kernel, [0.0; 2], all, [ty.size(); MAX_OPERANDS], outs)
}

fn padded<'a>(operands: &[Operand<'a>]) -> [Operand<'a>; MAX_OPERANDS] {
    let mut all = [Operand::Scalar(0.0); MAX_OPERANDS];
    all[..operands.len()].copy_from_slice(operands);
    all
}

/// The results of a chain that are never in memory as a whole: a reduction makes them as it reads them. It takes them for elements of a dense tensor.
#[derive(Debug)]
pub struct ChainResults<'a> {
    operands: Operands<MAX_OPERANDS>,
    text: String,
    ty: Type,
    shape: &'a [usize],
    strides: &'a [usize],
}

impl<'a> ChainResults<'a> {
    /// The results of `chain` over these operands of type `ty`; `strides` are a permutation of a row-major layout without gaps.
    ///
    /// # Panics
    /// If the chain has several results, a view has another shape, an operand is the output, of which there is none, or there are more than [`MAX_OPERANDS`] operands.
    pub fn new(chain: &Chain, operands: &[Operand<'_>], ty: Type, shape: &'a [usize], strides: &'a [usize]) -> Self {
        assert_eq!(chain.results(), 1, "one result is reduced");
        assert!(!operands.iter().any(|o| matches!(o, Operand::Output)), "results that are not in memory cannot be read");
        let text = format!("{}constexpr int CHAINED = {};\n", chain_text(chain), operands.len());
        let nowhere = Dense { ptr: DevicePtr::NULL, addresses: 0, ty, shape, strides };
        let operands = Operands::new([0.0; 2], padded(operands), [ty.size(); MAX_OPERANDS], &nowhere);
        Self { operands, text, ty, shape, strides }
    }

    pub(super) fn ty(&self) -> Type {
        self.ty
    }
    pub(super) fn shape(&self) -> &'a [usize] {
        self.shape
    }
    pub(super) fn strides(&self) -> &'a [usize] {
        self.strides
    }
    /// Whether operands are read by 16 bytes.
    pub(super) fn is_wide(&self) -> bool {
        self.operands.width > 1
    }
    /// The kernel's argument.
    pub(super) fn arg(&self) -> &dyn Arg {
        &self.operands
    }
    /// The function `chained`, and of how many operands it is.
    pub(super) fn text(&self) -> &str {
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Values, device};
    use super::*;

    #[test]
    fn rows_run_over_dense_broadcast_and_strided_operands() {
        let Some(gpu) = device() else { return };
        let (rows, cols) = (37, 132);
        for ty in [Type::F32, Type::F64, Type::F16, Type::BF16, Type::I64, Type::I32, Type::U8] {
            let a: Vec<f64> = (0..rows * cols).map(|i| (i % 50) as f64).collect();
            let b: Vec<f64> = (0..rows * cols).map(|i| (i % 7) as f64).collect();
            let (x, y) = (Values::new(gpu, ty, &a), Values::new(gpu, ty, &b));
            for (strides, at) in [([cols, 1], 0usize), ([0, 1], 0), ([1, rows], 0), ([0, 0], 3)] {
                let (shape, dense) = ([rows, cols], [cols, 1]);
                let mut out = Values::unwritten(gpu, ty, rows * cols);
                let operands = [
                    Operand::View(View::new(x.buffer(), ty, 0, &shape, &dense).unwrap()),
                    Operand::View(View::new(y.buffer(), ty, at, &shape, &strides).unwrap()),
                ];
                apply(
                    gpu,
                    crate::pointwise::binary::Add::ROW,
                    [0.0; 2],
                    operands,
                    Output { data: out.slice_mut(), shape: &shape, strides: &dense },
                )
                .unwrap();
                let expected: Vec<f64> = (0..rows * cols).map(|i| a[i] + b[at + i / cols * strides[0] + i % cols * strides[1]]).collect();
                assert_eq!(out.read(), expected, "{ty:?} {strides:?}");
            }
        }
    }
}
