//! Fused chains, and the sums that end them, against the operations that they stand for: bit for bit, forward and gradients, and second derivatives.

use kiln_autograd::{TensorExt, gradcheck, gradgradcheck};
use kiln_tensor::graph::Source;
use kiln_tensor::ops::loss::Reduction;
use kiln_tensor::{Activation, DType, Dims, Expr, Fused, Generator, Result, Tensor, autocast, fuse};

type Composed = fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;
type Traced = fn([Expr; 3]) -> Expr;

/// Functions of x, of a bias that broadcasts, and of y, traced and composed.
fn cases() -> Vec<(&'static str, Traced, Composed)> {
    vec![
        ("bias, gelu, residual", |[x, b, y]| y + (x + b).gelu(), |x, b, y| y.add(&x.add(b)?.gelu()?)),
        ("uses again", |[x, b, y]| (&x * &b) + (&x * &y) + x * 3.0, |x, b, y| x.mul(b)?.add(&x.mul(y)?)?.add(&x.mul_scalar(3.0)?)),
        ("squares", |[x, b, y]| (&x + &b) * (x + b) - y.square(), |x, b, y| x.add(b)?.mul(&x.add(b)?)?.sub(&y.square()?)),
        ("quotients", |[x, b, y]| (x + b) / (y.exp() + 0.5), |x, b, y| x.add(b)?.div(&y.exp()?.add_scalar(0.5)?)),
        (
            "numbers",
            |[x, b, y]| (1.0 - (x + b)) / 3.0 * (2.0 / (y.square() + 1.0)) - 0.25,
            |x, b, y| {
                let right = y.square()?.add_scalar(1.0)?.rdiv_scalar(2.0)?;
                x.add(b)?.rsub_scalar(1.0)?.div_scalar(3.0)?.mul(&right)?.sub_scalar(0.25)
            },
        ),
        (
            "gates",
            |[x, b, y]| (&x + &b).sigmoid() * (x + b).tanh() + y.silu().relu(),
            |x, b, y| x.add(b)?.sigmoid()?.mul(&x.add(b)?.tanh()?)?.add(&y.silu()?.relu()?),
        ),
        (
            "elementary",
            |[x, b, y]| ((x * b).abs() + 1.0).log().sqrt() * y.sin() - y.cos().erf(),
            |x, b, y| x.mul(b)?.abs()?.add_scalar(1.0)?.log()?.sqrt()?.mul(&y.sin()?)?.sub(&y.cos()?.erf()?),
        ),
        (
            "roots",
            |[x, b, y]| ((x + b).square() + 1.0).rsqrt() + (y.square() + 2.0).recip() - y.expm1(),
            |x, b, y| {
                let left = x.add(b)?.square()?.add_scalar(1.0)?.rsqrt()?;
                left.add(&y.square()?.add_scalar(2.0)?.recip()?)?.sub(&y.expm1()?)
            },
        ),
        (
            "activations",
            |[x, b, y]| (x + b).leaky_relu(0.1) + y.elu(0.7).mish() - (-y).gelu_tanh().hardswish().clamp(-0.5, 0.8),
            |x, b, y| {
                let right = y.neg()?.gelu_tanh()?.hardswish()?.clamp(-0.5, 0.8)?;
                x.add(b)?.leaky_relu(0.1)?.add(&y.elu(0.7)?.mish()?)?.sub(&right)
            },
        ),
        ("logs", |[x, b, y]| (x * b).square().log1p() - y, |x, b, y| x.mul(b)?.square()?.log1p()?.sub(y)),
    ]
}

fn inputs(dtype: DType) -> Result<[Tensor; 3]> {
    // Tests run side by side, so none can rely on the global generator.
    let generator = Generator::new(3);
    let make = |shape: &[usize]| generator.randn(shape, ())?.to_dtype(dtype);
    Ok([make(&[37, 65])?, make(&[65])?, make(&[65, 37])?.t()?])
}

/// The bits of a result and of the gradients of all inputs for a gradient that varies.
fn bits(f: impl Fn(&[Tensor; 3]) -> Result<Tensor>, dtype: DType) -> Result<Vec<Vec<u64>>> {
    let leaves = inputs(dtype)?.map(|x| x.requires_grad_());
    let [x, b, y] = leaves;
    let leaves = [x?, b?, y?];
    let out = f(&leaves)?;
    let weight = Tensor::linspace(-1.0, 2.0, out.numel(), DType::F32)?.reshape(out.shape())?.to_dtype(dtype)?;
    out.mul(&weight)?.sum(())?.backward()?;
    let all = std::iter::once(Ok(out.detach())).chain(leaves.iter().map(|x| x.grad().map_or_else(|| x.zeros_like(), Ok)));
    all.map(|t| Ok(t?.to_dtype(DType::F64)?.to_vec::<f64>()?.into_iter().map(f64::to_bits).collect())).collect()
}

#[test]
fn results_and_gradients_are_those_of_the_operations() -> Result<()> {
    for (name, traced, composed) in cases() {
        let fused = fuse(traced)?;
        for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
            let one = bits(|[x, b, y]| fused.call([x, b, y]), dtype)?;
            let other = bits(|[x, b, y]| composed(x, b, y), dtype)?;
            for (i, what) in ["result", "gradient of x", "gradient of b", "gradient of y"].iter().enumerate() {
                assert!(one[i] == other[i], "{name}, {dtype}: {what} differs");
            }
        }
    }
    Ok(())
}

/// The dimensions of a matrix that sums go over.
fn all_dims() -> [Dims; 5] {
    [().into(), 0.into(), (-1).into(), [0, 1].into(), [1, 0].into()]
}

#[test]
fn sums_and_means_are_those_of_the_results() -> Result<()> {
    for (name, traced, composed) in cases() {
        let fused = fuse(traced)?;
        for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
            for dims in all_dims() {
                let check = |total: &str, one: Vec<Vec<u64>>, other: Vec<Vec<u64>>| {
                    for (i, what) in ["result", "gradient of x", "gradient of b", "gradient of y"].iter().enumerate() {
                        assert!(one[i] == other[i], "{name}, {dtype}, {total} over {dims:?}: {what} differs");
                    }
                };
                let sum = bits(|[x, b, y]| fused.sum([x, b, y], dims.clone()), dtype)?;
                check("sum", sum, bits(|[x, b, y]| composed(x, b, y)?.sum(dims.clone()), dtype)?);
                let mean = bits(|[x, b, y]| fused.mean([x, b, y], dims.clone()), dtype)?;
                check("mean", mean, bits(|[x, b, y]| composed(x, b, y)?.mean(dims.clone()), dtype)?);
            }
        }
    }
    Ok(())
}

#[test]
fn sums_of_any_size_and_layout_are_those_of_the_results() -> Result<()> {
    let fused = fuse(|[x, b, y]| y + (&x + b).tanh() * x)?;
    let composed = |x: &Tensor, b: &Tensor, y: &Tensor| y.add(&x.add(b)?.tanh()?.mul(x)?);
    let generator = Generator::new(5);
    let randn = |shape: &[usize]| generator.randn(shape, ());
    // Several parts of one output, rows longer than a tile, wide columns, channels in the middle and last, and gaps.
    let inputs = [
        [randn(&[300_001])?, randn(&[1])?, randn(&[300_001])?],
        [randn(&[3, 150_007])?, randn(&[150_007])?, randn(&[3, 150_007])?],
        [randn(&[37, 5001])?, randn(&[37, 1])?, randn(&[5001, 37])?.t()?],
        [randn(&[1300, 1500])?, randn(&[1500])?, randn(&[1300, 1500])?],
        [randn(&[20_000, 17])?, randn(&[17])?, randn(&[20_000, 17])?],
        [randn(&[6, 19, 12, 10])?, randn(&[19, 1, 1])?, randn(&[6, 19, 12, 10])?],
        [randn(&[6, 12, 10, 19])?.permute(&[0, 3, 1, 2])?, randn(&[19, 1, 1])?, randn(&[6, 19, 12, 10])?],
        [randn(&[50, 400])?.narrow(1, 3, 333)?, randn(&[333])?, randn(&[100, 333])?.slice(0, 0, 100, 2)?],
    ];
    for [x, b, y] in &inputs {
        for dtype in [DType::F32, DType::F64, DType::BF16] {
            let (x, b, y) = (x.to_dtype(dtype)?, b.to_dtype(dtype)?, y.to_dtype(dtype)?);
            let results = composed(&x, &b, &y)?;
            let rank = x.rank() as isize;
            let dims: Vec<Dims> = vec![().into(), 0.into(), (-1).into(), (0..rank).filter(|&d| d != 1).collect::<Vec<_>>().into()];
            for dims in dims {
                let want = results.sum(dims.clone())?.to_dtype(DType::F64)?.to_vec::<f64>()?;
                for threads in [1, 2, 7] {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    let got = pool.install(|| fused.sum([&x, &b, &y], dims.clone()))?;
                    assert!(got.to_dtype(DType::F64)?.to_vec::<f64>()? == want, "{dtype} {} over {dims:?}, {threads} threads", x.shape());
                }
            }
        }
    }
    Ok(())
}

#[test]
fn sums_of_little_and_of_what_has_no_pass() -> Result<()> {
    let fused = fuse(|[x, y]| (x - y).square())?;
    let x = Tensor::zeros([0, 3], DType::F32)?;
    assert_eq!(fused.sum([&x, &x], 0)?.to_vec::<f32>()?, [0.0; 3]);
    assert!(fused.mean([&x, &x], ())?.item::<f32>()?.is_nan());
    assert_eq!(fused.mean([&x, &x], 1)?.dims(), [0]);
    let x = Tensor::arange(0.0, 12.0, 1.0, DType::I64)?.reshape([3, 4])?;
    let y = Tensor::ones([4], DType::I64)?;
    assert_eq!(fused.sum([&x, &y], 0)?.to_vec::<i64>()?, x.sub(&y)?.square()?.sum(0)?.to_vec::<i64>()?);
    assert!(fused.mean([&x, &y], 0).is_err() && fused.sum([&x, &y], 2).is_err());
    let half = Tensor::randn([5, 7], DType::F32)?.to_dtype(DType::BF16)?;
    let sums = autocast(DType::BF16, || fused.sum([&half, &half.neg()?], -1))??;
    let want = half.sub(&half.neg()?)?.square()?.to_dtype(DType::F32)?.sum(-1)?;
    assert_eq!((sums.dtype(), sums.to_vec::<f32>()?), (DType::F32, want.to_vec::<f32>()?));
    assert_eq!(fuse(|[x]| x)?.sum([&half], ())?.to_vec::<kiln_tensor::bf16>()?, half.sum(())?.to_vec::<kiln_tensor::bf16>()?);
    Ok(())
}

#[test]
fn a_loss_is_one_node() -> Result<()> {
    let (x, t) = (Tensor::rand([6, 5], ())?.requires_grad_()?, Tensor::rand([6, 5], ())?);
    let losses = [
        x.mse_loss(&t)?,
        x.l1_loss(&t)?,
        x.huber_loss(&t)?,
        x.smooth_l1_loss_with(&t, 0.5, Reduction::Sum)?,
        x.bce_with_logits(&t)?,
        x.bce(&t)?,
        x.kl_div(&t)?,
    ];
    for (i, loss) in losses.iter().enumerate() {
        let Some(Source::Node(node)) = loss.source() else { panic!("loss {i} is not tracked") };
        assert_eq!((node.name(), node.inputs().iter().flatten().count()), ("fuse", 1), "loss {i}");
        loss.backward()?;
    }
    Ok(())
}

#[test]
fn a_chain_is_one_node() -> Result<()> {
    for (name, traced, _) in cases() {
        let [x, b, y] = inputs(DType::F32)?;
        let out = fuse(traced)?.call([&x.requires_grad_()?, &b, &y])?;
        assert!(matches!(out.source(), Some(Source::Node(node)) if node.name() == "fuse"), "{name}");
    }
    Ok(())
}

#[test]
fn integers_and_small_steps_take_the_operations() -> Result<()> {
    let fused = fuse(|[x, b]| x * (&b * 2.0 + 1.0) + b)?;
    let x = Tensor::arange(0.0, 12.0, 1.0, DType::I64)?.reshape([3, 4])?;
    let b = Tensor::arange(0.0, 4.0, 1.0, DType::I64)?;
    assert_eq!(fused.call([&x, &b])?.to_vec::<i64>()?, x.mul(&b.mul_scalar(2.0)?.add_scalar(1.0)?)?.add(&b)?.to_vec::<i64>()?);
    let (x, b) = (Tensor::randn([300, 40], ())?.requires_grad_()?, Tensor::randn(40, ())?.requires_grad_()?);
    fused.call([&x, &b])?.sum(())?.backward()?;
    let (x2, b2) = (x.detach().requires_grad_()?, b.detach().requires_grad_()?);
    x2.mul(&b2.mul_scalar(2.0)?.add_scalar(1.0)?)?.add(&b2)?.sum(())?.backward()?;
    for (one, other) in [(x, x2), (b, b2)] {
        assert_eq!(one.grad().unwrap().to_vec::<f32>()?, other.grad().unwrap().to_vec::<f32>()?);
    }
    Ok(())
}

#[test]
fn gradients_twice() -> Result<()> {
    for (name, traced, _) in cases() {
        let fused = fuse(traced)?;
        let [x, b, y] = inputs(DType::F64)?;
        let small = [x.narrow(0, 0, 3)?.narrow(1, 0, 4)?, b.narrow(0, 0, 4)?, y.narrow(0, 0, 3)?.narrow(1, 0, 4)?];
        let f = |t: &[Tensor]| fused.call([&t[0], &t[1], &t[2]]);
        gradcheck(f, &small).unwrap_or_else(|e| panic!("{name}: {e}"));
        gradgradcheck(f, &small).unwrap_or_else(|e| panic!("{name}, second order: {e}"));
        let f = |t: &[Tensor]| fused.mean([&t[0], &t[1], &t[2]], 0);
        gradcheck(f, &small).unwrap_or_else(|e| panic!("mean of {name}: {e}"));
        gradgradcheck(f, &small).unwrap_or_else(|e| panic!("mean of {name}, second order: {e}"));
    }
    Ok(())
}

#[test]
fn only_what_is_wanted_is_computed_and_saved() -> Result<()> {
    let fused: Fused<2> = fuse(|[x, y]| x.exp() + y)?;
    let (x, y) = (Tensor::randn([4], ())?, Tensor::randn([4], ())?.requires_grad_()?);
    fused.call([&x, &y])?.sum(())?.backward()?;
    assert_eq!(y.grad().unwrap().to_vec::<f32>()?, [1.0; 4]);
    assert!(x.grad().is_none());
    Ok(())
}

#[test]
fn mistakes_are_errors() -> Result<()> {
    let fused = fuse(|[x, y]| x + y)?;
    let (a, b) = (Tensor::zeros([2, 3], DType::F32)?, Tensor::zeros([4], DType::F32)?);
    assert!(fused.call([&a, &b]).unwrap_err().to_string().contains("[2, 3]"));
    assert!(fused.call([&a, &a.to_dtype(DType::F64)?]).is_err());
    let mut other = None;
    fuse(|[x]| {
        other = Some(x.clone());
        x.exp()
    })?;
    let other = other.unwrap();
    assert!(fuse(|[x]| x + &other).is_err());
    assert!(fuse(|[_x]| other.exp()).is_err());
    Ok(())
}

#[test]
fn empty_tensors_and_a_function_that_does_nothing() -> Result<()> {
    let x = Tensor::zeros([0, 3], DType::F32)?;
    assert_eq!(fuse(|[x]| x.exp() * 2.0)?.call([&x])?.dims(), [0, 3]);
    let x = Tensor::randn([3], ())?;
    assert_eq!(fuse(|[x]| x)?.call([&x])?.to_vec::<f32>()?, x.to_vec::<f32>()?);
    Ok(())
}

#[test]
fn gradients_of_all_operands_are_those_of_each_alone() -> Result<()> {
    let fused = fuse(|[x, y, z]| x.silu() * &y + (y * z.tanh()))?;
    for dtype in [DType::F32, DType::BF16] {
        let [x, b, y] = inputs(dtype)?;
        let z = b.expand([37, 65])?.contiguous()?;
        let gradients = |tracked: [bool; 3]| -> Result<Vec<Option<Vec<f64>>>> {
            let leaf = |t: &Tensor, tracked: bool| if tracked { t.requires_grad_() } else { Ok(t.clone()) };
            let leaves = [leaf(&x, tracked[0])?, leaf(&y, tracked[1])?, leaf(&z, tracked[2])?];
            fused.call(leaves.each_ref())?.sum(())?.backward()?;
            leaves.iter().map(|x| x.grad().map(|g| g.to_dtype(DType::F64)?.to_vec()).transpose()).collect()
        };
        let all = gradients([true; 3])?;
        for i in 0..3 {
            let one = gradients(std::array::from_fn(|k| k == i))?;
            assert!(one[i].is_some() && one[i] == all[i], "{dtype}: operand {i}");
        }
    }
    Ok(())
}

#[test]
fn activations_in_the_pass_of_another_operation_are_those_of_their_own() -> Result<()> {
    type Pair = [fn(&[Tensor; 3], Activation) -> Result<Tensor>; 2];
    let linear: Pair = [
        |[x, w, b], f| x.flatten(1, -1)?.linear_activation(w, Some(b), f),
        |[x, w, b], f| x.flatten(1, -1)?.linear(w, Some(b))?.activate(f),
    ];
    let batch: Pair = [
        |[x, w, b], f| Ok(x.batch_norm_activation(Some(&w.select(1, 0)?), Some(b), 1e-5, f)?.output),
        |[x, w, b], f| x.batch_norm(Some(&w.select(1, 0)?), Some(b), 1e-5)?.output.activate(f),
    ];
    let group: Pair = [
        |[x, w, b], f| x.group_norm_activation(2, Some(&w.select(1, 0)?), Some(b), 1e-5, f),
        |[x, w, b], f| x.group_norm(2, Some(&w.select(1, 0)?), Some(b), 1e-5)?.activate(f),
    ];
    let generator = Generator::new(5);
    for (name, pair) in [("linear", linear), ("batch_norm", batch), ("group_norm", group)] {
        for activation in [Activation::Relu, Activation::LeakyRelu(0.2), Activation::Gelu, Activation::GeluTanh, Activation::Silu] {
            for (dtype, order) in [(DType::F32, [0, 1, 2]), (DType::F32, [0, 2, 1]), (DType::F64, [0, 1, 2]), (DType::BF16, [0, 2, 1])] {
                let inputs = [&[7, 6, 35][..], &[6, 210], &[6]];
                let inputs = inputs.iter().map(|&shape| generator.randn(shape, ())?.to_dtype(dtype)).collect::<Result<Vec<_>>>()?;
                let bits = |f: fn(&[Tensor; 3], Activation) -> Result<Tensor>| -> Result<Vec<Vec<u64>>> {
                    let leaves =
                        [inputs[0].to_memory_order(&order)?.requires_grad_()?, inputs[1].requires_grad_()?, inputs[2].requires_grad_()?];
                    let out = f(&leaves, activation)?;
                    let weight = Tensor::linspace(-1.0, 2.0, out.numel(), DType::F32)?.reshape(out.shape())?.to_dtype(dtype)?;
                    out.mul(&weight)?.sum(())?.backward()?;
                    let all = std::iter::once(Ok(out.detach())).chain(leaves.iter().map(|x| x.grad().map_or_else(|| x.zeros_like(), Ok)));
                    all.map(|t| Ok(t?.to_dtype(DType::F64)?.to_vec::<f64>()?.into_iter().map(f64::to_bits).collect())).collect()
                };
                assert!(bits(pair[0])? == bits(pair[1])?, "{name}, {activation:?}, {dtype} {order:?}");
            }
        }
    }
    Ok(())
}
