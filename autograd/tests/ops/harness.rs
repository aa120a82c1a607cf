//! What every case goes through. See the head of `main.rs`.

use crate::reference::Array;
use kiln_autograd::{GradOptions, enable_grad, grad_with, gradcheck, gradgradcheck};
use kiln_tensor::profile::{Grouping, NAMELESS, profile};
use kiln_tensor::{DType, Device, Result, Tensor, default_device, forbid_host, set_default_device};

type Function = Box<dyn Fn(&[Tensor]) -> Result<Tensor> + Send + Sync>;
type Reference = Box<dyn Fn(&[Array]) -> Array + Send + Sync>;

/// Which dtypes the inputs are tried in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DTypes {
    /// f64, f32, f16, bf16, with gradients.
    Floats,
    /// The floats, and i64, i32, u8 (values truncated; forward only).
    Numbers,
    /// All eight (bool: non-zero).
    All,
    /// i64, i32, u8 only (values truncated; forward only).
    Integers,
}

/// An operation, sample inputs, and what is expected of it.
pub struct Case {
    pub names: Vec<&'static str>,
    label: String,
    f: Function,
    reference: Reference,
    samples: Vec<Vec<Vec<usize>>>,
    large: Option<Vec<Vec<usize>>>,
    domains: Vec<(f64, f64)>,
    dtypes: DTypes,
    differentiable: bool,
    distinct: bool,
    specials: bool,
    tolerance: f64,
}

/// A case of the operation `name` (as it is called on `Tensor`): the function under test, and the same thing on plain f64 arrays.
pub fn case(
    name: &'static str,
    f: impl Fn(&[Tensor]) -> Result<Tensor> + Send + Sync + 'static,
    reference: impl Fn(&[Array]) -> Array + Send + Sync + 'static,
) -> Case {
    Case {
        names: vec![name],
        label: name.to_string(),
        f: Box::new(f),
        reference: Box::new(reference),
        samples: Vec::new(),
        large: None,
        domains: Vec::new(),
        dtypes: DTypes::Floats,
        differentiable: true,
        distinct: false,
        specials: false,
        tolerance: 1.0,
    }
}

impl Case {
    /// What distinguishes this case from others of the operation, for messages.
    pub fn label(mut self, label: &str) -> Self {
        self.label = format!("{} ({label})", self.label);
        self
    }
    /// Other public functions that this case covers.
    pub fn also(mut self, names: &[&'static str]) -> Self {
        self.names.extend(names);
        self
    }
    /// A sample: the shapes of the inputs. Give several: odd extents, broadcasting, empty. Small: each element costs gradcheck two calls.
    pub fn sample(mut self, shapes: &[&[usize]]) -> Self {
        self.samples.push(shapes.iter().map(|s| s.to_vec()).collect());
        self
    }
    /// Shapes large enough for the kernel to use threads and to leave its tiles: results must have the same bits on 1, 2 and 7
    /// threads, and other memory layouts must give the same results. f32 only; no reference.
    pub fn large(mut self, shapes: &[&[usize]]) -> Self {
        self.large = Some(shapes.iter().map(|s| s.to_vec()).collect());
        self
    }
    /// The ranges that the inputs' values are drawn from (the last one is used for further inputs). Default: -2 to 2. Keep
    /// clear of kinks and poles: gradcheck steps by 1e-6 and f16 rounds.
    pub fn domain(mut self, domains: &[(f64, f64)]) -> Self {
        self.domains = domains.to_vec();
        self
    }
    /// The dtypes to try.
    pub fn dtypes(mut self, dtypes: DTypes) -> Self {
        self.dtypes = dtypes;
        self
    }
    /// Results carry no gradient (comparisons, indices).
    pub fn not_differentiable(mut self) -> Self {
        self.differentiable = false;
        self
    }
    /// All elements of an input differ by at least a thousandth of the range (maxima, sorting).
    pub fn distinct(mut self) -> Self {
        self.distinct = true;
        self
    }
    /// Also compares forward on ±0, ±∞, NaN, denormals and the ends of the range, in f32 (pointwise operations).
    pub fn specials(mut self) -> Self {
        self.specials = true;
        self
    }
    /// Factor on the tolerances, with a reason in a comment beside it.
    pub fn tolerance(mut self, factor: f64) -> Self {
        self.tolerance = factor;
        self
    }

    /// Runs every check; panics with the case's label at the first that fails. On a GPU, an operation that the host would have to
    /// compute fails.
    pub fn run(&self) {
        use_test_device();
        if default_device() == Device::Cpu { self.run_here() } else { forbid_host(|| self.run_here()) }
    }

    fn run_here(&self) {
        assert!(!self.samples.is_empty(), "{}: no samples", self.label);
        for (i, shapes) in self.samples.iter().enumerate() {
            let inputs: Vec<Array> = shapes.iter().enumerate().map(|(j, s)| self.values(s, j, (i * 16 + j) as u64)).collect();
            let label = format!("{} {shapes:?}", self.label);
            self.check_sample(&label, &inputs).unwrap_or_else(|e| panic!("{label}: {e:?}"));
        }
        if self.specials {
            self.check_specials().unwrap_or_else(|e| panic!("{}: special values: {e:?}", self.label));
        }
        if let Some(shapes) = &self.large {
            self.check_large(shapes).unwrap_or_else(|e| panic!("{}: large: {e:?}", self.label));
        }
    }

    fn values(&self, shape: &[usize], input: usize, seed: u64) -> Array {
        let (lo, hi) = self.domains.get(input).or(self.domains.last()).copied().unwrap_or((-2.0, 2.0));
        let n: usize = shape.iter().product();
        let mut random = SplitMix(seed);
        let data = if self.distinct && n > 1 {
            let mut ranks: Vec<usize> = (0..n).collect();
            for i in (1..n).rev() {
                ranks.swap(i, (random.next() % (i as u64 + 1)) as usize);
            }
            ranks.into_iter().map(|r| lo + (hi - lo) * (r as f64 + 0.25) / n as f64).collect()
        } else {
            (0..n).map(|_| lo + (hi - lo) * random.uniform()).collect()
        };
        Array::new(shape, data)
    }

    fn check_sample(&self, label: &str, inputs: &[Array]) -> Result<()> {
        for dtype in self.tried_dtypes() {
            let tensors = inputs.iter().map(|a| tensor(a, dtype)).collect::<Result<Vec<_>>>()?;
            let rounded = tensors.iter().map(array).collect::<Result<Vec<_>>>()?;
            let expected = (self.reference)(&rounded);
            let out = self.named(|| (self.f)(&tensors))?;
            close(&format!("{label} {dtype}: forward"), &array(&out)?, &expected, dtype, self.tolerance);
            if dtype.is_float() && self.differentiable {
                let precise = rounded.iter().map(|a| tensor(a, DType::F64)).collect::<Result<Vec<_>>>()?;
                let expected = self.gradients(&precise)?;
                compare_all(
                    &format!("{label} {dtype}: gradient"),
                    &self.named(|| self.gradients(&tensors))?,
                    &expected,
                    dtype,
                    self.tolerance,
                )?;
            }
            if matches!(dtype, DType::F32 | DType::F64) {
                self.check_layouts(label, &tensors, &expected, dtype)?;
            }
        }
        if self.differentiable {
            let precise = inputs.iter().map(|a| tensor(a, DType::F64)).collect::<Result<Vec<_>>>()?;
            gradcheck(&self.f, &precise)?;
            gradgradcheck(&self.f, &precise)?;
        }
        Ok(())
    }

    /// Runs `f` in a profile, in which everything must have a name.
    fn named<R>(&self, f: impl FnOnce() -> Result<R>) -> Result<R> {
        let (result, report) = profile(f);
        let rows = report.of_this_thread().rows_by(Grouping { inside: true, ..Grouping::default() });
        let nameless = rows.into_iter().find(|row| row.name.contains(NAMELESS));
        assert!(nameless.is_none(), "{}: it lacks a profile::operation: {nameless:?}", self.label);
        result
    }

    fn tried_dtypes(&self) -> Vec<DType> {
        let mut dtypes = vec![DType::F64, DType::F32, DType::F16, DType::BF16];
        match self.dtypes {
            DTypes::Floats => {}
            DTypes::Integers => dtypes = vec![DType::I64, DType::I32, DType::U8],
            DTypes::Numbers => dtypes.extend([DType::I64, DType::I32, DType::U8]),
            DTypes::All => dtypes.extend([DType::I64, DType::I32, DType::U8, DType::Bool]),
        }
        dtypes
    }

    /// The gradients of the inputs, for a fixed weight on each output element.
    fn gradients(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        enable_grad(|| {
            let leaves = inputs.iter().map(Tensor::requires_grad_).collect::<Result<Vec<_>>>()?;
            let y = (self.f)(&leaves)?;
            assert!(y.is_tracked(), "{}: the gradient was lost: a tracked input gave an untracked result", self.label);
            let weights: Vec<f64> = (0..y.numel()).map(|i| if i % 3 == 1 { -0.75 } else { 0.5 + (i % 5) as f64 * 0.25 }).collect();
            let weights = Tensor::from_vec(weights, y.shape())?.to_dtype(y.dtype())?;
            grad_with(&[&y], &[Some(&weights)], &leaves.iter().collect::<Vec<_>>(), GradOptions::default())
        })
    }

    /// The same values in other memory layouts must give the same results, gradients included.
    fn check_layouts(&self, label: &str, inputs: &[Tensor], expected: &Array, dtype: DType) -> Result<()> {
        let gradients = if self.differentiable { Some(self.gradients(inputs)?) } else { None };
        for kind in [Odd::Transposed, Odd::Strided, Odd::ChannelsLast] {
            let odd = inputs.iter().map(|x| kind.of(x)).collect::<Result<Vec<_>>>()?;
            let label = format!("{label} {dtype} {kind:?}");
            close(&format!("{label}: forward"), &array(&(self.f)(&odd)?)?, expected, dtype, self.tolerance);
            if let Some(gradients) = &gradients {
                compare_all(&format!("{label}: gradient"), &self.gradients(&odd)?, gradients, dtype, self.tolerance)?;
            }
        }
        // Repeated elements: the first input's leading dimension expanded from one row.
        if let Some(first) = inputs.first()
            && first.rank() > 0
            && first.dims()[0] > 1
            && !self.distinct
        {
            let values = array(first)?;
            let row = Array::from_fn(&values.shape, |i| values.at(&[&[0], &i[1..]].concat()));
            let mut one = first.shape().to_vec();
            one[0] = 1;
            let expanded = tensor(&Array::new(&one, row.data[..one.iter().product()].to_vec()), dtype)?.expand(first.shape())?;
            let plain: Vec<Tensor> = [tensor(&row, dtype)?].into_iter().chain(inputs[1..].iter().cloned()).collect();
            let odd: Vec<Tensor> = [expanded].into_iter().chain(inputs[1..].iter().cloned()).collect();
            close(
                &format!("{label} {dtype} broadcast: forward"),
                &array(&(self.f)(&odd)?)?,
                &array(&(self.f)(&plain)?)?,
                dtype,
                self.tolerance,
            );
            if self.differentiable {
                compare_all(
                    &format!("{label} {dtype} broadcast: gradient"),
                    &self.gradients(&odd)?,
                    &self.gradients(&plain)?,
                    dtype,
                    self.tolerance,
                )?;
            }
        }
        Ok(())
    }

    fn check_specials(&self) -> Result<()> {
        let values: Vec<f64> = [0.0, 1.0, 0.5, 2.0, f32::INFINITY, f32::NAN, f32::MIN_POSITIVE, 1e-40, f32::MAX, 88.8, 1e-20, 1e20, 3.5]
            .iter()
            .flat_map(|&x| [x as f64, -x as f64])
            .collect();
        let n = values.len();
        let arity = self.samples[0].len();
        let inputs: Vec<Array> = match arity {
            1 => vec![Array::new(&[n], values)],
            _ => (0..arity).map(|k| Array::from_fn(&[n, n], |i| values[if k == 0 { i[0] } else { i[1] }])).collect(),
        };
        let tensors = inputs.iter().map(|a| tensor(a, DType::F32)).collect::<Result<Vec<_>>>()?;
        let out = array(&(self.f)(&tensors)?)?;
        let expected = (self.reference)(&inputs.iter().map(|a| a.map(|x| x as f32 as f64)).collect::<Vec<_>>());
        for (i, (&a, &e)) in out.data.iter().zip(&expected.data).enumerate() {
            let e = e as f32 as f64;
            let args: Vec<f64> = inputs.iter().map(|x| x.data[i]).collect();
            let same = (a.is_nan() && e.is_nan()) || a == e || (a - e).abs() <= 1e-6 * self.tolerance * e.abs() + 1e-44;
            assert!(same, "{} of {args:?}: {a:e}, expected {e:e}", self.label);
            assert!(a != 0.0 || e != 0.0 || a.is_sign_negative() == e.is_sign_negative(), "{} of {args:?}: the sign of zero", self.label);
        }
        Ok(())
    }

    fn check_large(&self, shapes: &[Vec<usize>]) -> Result<()> {
        let inputs =
            shapes.iter().enumerate().map(|(j, s)| tensor(&self.values(s, j, 99 + j as u64), DType::F32)).collect::<Result<Vec<_>>>()?;
        self.check_threads(&inputs)?;
        self.check_layouts(&format!("{} {shapes:?}", self.label), &inputs, &array(&(self.f)(&inputs)?)?, DType::F32)
    }

    fn check_threads(&self, inputs: &[Tensor]) -> Result<()> {
        // A GPU does not know of the host's threads: there it is the same work twice.
        let counts: &[usize] = if default_device() == Device::Cpu { &[1, 2, 7] } else { &[1, 7] };
        let results = counts.iter().map(|&threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| -> Result<Vec<Vec<f64>>> {
                let mut all = vec![array(&(self.f)(inputs)?)?.data];
                if self.differentiable {
                    for g in self.gradients(inputs)? {
                        all.push(array(&g)?.data);
                    }
                }
                Ok(all)
            })
        });
        let results = results.collect::<Result<Vec<_>>>()?;
        for (threads, other) in counts.iter().zip(&results).skip(1) {
            for (i, (a, b)) in results[0].iter().zip(other).enumerate() {
                let differs = a.iter().zip(b).position(|(a, b)| a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan()));
                assert!(differs.is_none() && a.len() == b.len(), "{}: result {i} differs on {threads} threads at {differs:?}", self.label);
            }
        }
        Ok(())
    }
}

/// Makes the harness's tensors on the GPU where `KILN_TEST_DEVICE=cuda`.
fn use_test_device() {
    if std::env::var("KILN_TEST_DEVICE").is_ok_and(|device| device == "cuda") {
        set_default_device(Device::cuda(0).unwrap_or_else(|e| panic!("KILN_TEST_DEVICE: {e}")));
    }
}

/// Memory layouts that the same values can have.
#[derive(Clone, Copy, Debug)]
enum Odd {
    /// The dimensions in memory in reverse order.
    Transposed,
    /// Every second element of a larger block, at an offset.
    Strided,
    /// Dimension 1 fastest.
    ChannelsLast,
}

impl Odd {
    fn of(self, x: &Tensor) -> Result<Tensor> {
        let rank = x.rank();
        if rank == 0 {
            return Ok(x.clone());
        }
        match self {
            Odd::Transposed => x.to_memory_order(&(0..rank).rev().collect::<Vec<_>>()),
            Odd::ChannelsLast if rank >= 3 => x.to_memory_order(&[&[0], &(2..rank).collect::<Vec<_>>()[..], &[1]].concat()),
            Odd::ChannelsLast => Ok(x.clone()),
            Odd::Strided => x.with_gaps(),
        }
    }
}

/// `a` in `dtype`: rounded, truncated, or non-zero.
pub fn tensor(a: &Array, dtype: DType) -> Result<Tensor> {
    Tensor::from_vec(a.data.clone(), a.shape.as_slice())?.to_dtype(dtype)
}

/// The values of a tensor of any dtype.
pub fn array(t: &Tensor) -> Result<Array> {
    Ok(Array::new(t.dims(), t.detach().to_dtype(DType::F64)?.to_vec()?))
}

/// Relative and absolute tolerance: some units in the last place of the dtype, against the largest magnitude at hand.
fn close(label: &str, actual: &Array, expected: &Array, dtype: DType, factor: f64) {
    assert_eq!(actual.shape, expected.shape, "{label}: shape");
    let unit = match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 4e-6,
        DType::F16 => 4e-3,
        DType::BF16 => 3e-2,
        _ => 0.0,
    } * factor;
    let scale = expected.data.iter().filter(|x| x.is_finite()).fold(0.0f64, |m, x| m.max(x.abs())).min(1e3);
    for (i, (&a, &e)) in actual.data.iter().zip(&expected.data).enumerate() {
        let same = a == e || (a.is_nan() && e.is_nan()) || (a - e).abs() <= unit * (e.abs() + 0.1 * scale);
        assert!(same, "{label}: element {i} is {a:e}, expected {e:e}");
    }
}

fn compare_all(label: &str, actual: &[Tensor], expected: &[Tensor], dtype: DType, factor: f64) -> Result<()> {
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        // Backward sums of rounded terms: a little more room than forward.
        close(&format!("{label} of input {i}"), &array(a)?, &array(e)?, dtype, 4.0 * factor);
    }
    Ok(())
}

struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// The names of the public methods in the sources under `root`.
pub fn public_functions(root: &std::path::Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(root).unwrap().map(|e| e.unwrap().path()) {
        if entry.is_dir() {
            names.extend(public_functions(&entry));
        } else if entry.extension().is_some_and(|e| e == "rs") {
            let text = std::fs::read_to_string(&entry).unwrap();
            let name = |line: &str| line.strip_prefix("    pub fn ").map(|rest| rest.split(['(', '<']).next().unwrap_or("").to_string());
            names.extend(text.lines().filter_map(name));
        }
    }
    names
}
