//! The engine's promises: no gradient lost, memory given back, no recursion, the same numbers when run again.

use kiln_autograd::{
    GradOptions, TensorExt, anomaly_mode, checkpoint, grad, grad_with, gradcheck, gradgradcheck, hessian, hvp, jacobian, jvp, no_grad, vjp,
};
use kiln_tensor::ops::optim::scale_;
use kiln_tensor::{DType, Generator, Result, Tensor};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

fn leaf(values: &[f64]) -> Tensor {
    Tensor::from_slice(values, values.len()).unwrap().requires_grad_().unwrap()
}

fn values(t: &Tensor) -> Vec<f64> {
    t.to_vec().unwrap()
}

#[test]
fn backward_accumulates_into_leaves() -> Result<()> {
    let x = leaf(&[1., 2., 3.]);
    for _ in 0..2 {
        x.mul(&x)?.sum(())?.backward()?;
    }
    assert_eq!(values(&x.grad().unwrap()), [4., 8., 12.]);
    x.zero_grad();
    assert!(x.grad().is_none());
    Ok(())
}

#[test]
fn a_broadcast_operand_gets_the_sum() -> Result<()> {
    let (x, b) = (Tensor::ones([2, 3], DType::F64)?.requires_grad_()?, leaf(&[1., 2., 3.]));
    x.mul(&b)?.add(&b)?.sum(())?.backward()?;
    assert_eq!(values(&b.grad().unwrap()), [4., 4., 4.]);
    assert_eq!(x.grad().unwrap().dims(), [2, 3]);
    Ok(())
}

#[test]
fn grad_reaches_intermediate_tensors_and_touches_no_leaf() -> Result<()> {
    let x = leaf(&[1., 2.]);
    let y = x.exp()?;
    let z = y.mul(&y)?.sum(())?;
    let g = grad_with(&[&z], &[None], &[&y, &x], GradOptions { retain_graph: true, ..Default::default() })?;
    assert_eq!(values(&g[0]), [2. * 1f64.exp(), 2. * 2f64.exp()]);
    assert!((values(&g[1])[0] - 2. * 2f64.exp()).abs() < 1e-12);
    assert!(x.grad().is_none());
    let unused = leaf(&[5.]);
    assert_eq!(values(&grad(&z, &[&unused])?[0]), [0.]);
    Ok(())
}

#[test]
fn derivatives_of_derivatives() -> Result<()> {
    let x = leaf(&[0.3, -0.7]);
    let f = |xs: &[Tensor]| xs[0].mul(&xs[0])?.exp()?.mul(&xs[0]);
    gradcheck(f, &[x.detach()])?;
    gradgradcheck(f, &[x.detach()])?;
    // f(x) = Σ x³: the Hessian is diag(6x).
    let cube = |x: &Tensor| x.mul(x)?.mul(x)?.sum(());
    assert_eq!(values(&hessian(cube, &leaf(&[1., 2.]).detach())?), [6., 0., 0., 12.]);
    let (y, product) = hvp(cube, &leaf(&[1., 2.]).detach(), &leaf(&[1., 10.]).detach())?;
    assert_eq!((values(&y), values(&product)), (vec![9.], vec![6., 120.]));
    Ok(())
}

#[test]
fn products_with_the_jacobian() -> Result<()> {
    let (x, w) = (leaf(&[1., 2.]).detach(), leaf(&[3., 4.]).detach());
    let f = |xs: &[Tensor]| xs[0].mul(&xs[0])?.mul(&xs[1]);
    let (y, products) = vjp(f, &[&x, &w], &leaf(&[1., 1.]).detach())?;
    assert_eq!((values(&y), values(&products[0]), values(&products[1])), (vec![3., 16.], vec![6., 16.], vec![1., 4.]));
    let (_, tangent) = jvp(f, &[&x, &w], &[&leaf(&[1., 0.]).detach(), &leaf(&[0., 1.]).detach()])?;
    assert_eq!(values(&tangent), [6., 4.]);
    let matrix = jacobian(|x| x.mul(x), &x)?;
    assert_eq!((matrix.dims(), values(&matrix)), (&[2usize, 2][..], vec![2., 0., 0., 4.]));
    Ok(())
}

#[test]
fn misuse_is_named() -> Result<()> {
    let x = leaf(&[1., 2.]);
    assert!(x.exp()?.backward().unwrap_err().to_string().contains("only a scalar"));
    assert!(x.detach().sum(())?.backward().unwrap_err().to_string().contains("not tracked"));
    let y = x.mul(&x)?.sum(())?;
    y.backward()?;
    assert!(y.backward().unwrap_err().to_string().contains("retain_graph"));
    assert!(Tensor::ones([2], DType::I64)?.requires_grad_().is_err());
    assert!(no_grad(|| x.exp())?.backward().is_err());
    Ok(())
}

/// Each thread's gradient arrives, however they meet.
#[test]
fn threads_share_a_leaf() -> Result<()> {
    let w = leaf(&[1.0; 64]);
    const ROUNDS: usize = 200;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (1..=4)
            .map(|factor| {
                let w = &w;
                scope.spawn(move || (0..ROUNDS).try_for_each(|_| w.mul_scalar(factor as f64)?.sum(())?.backward()))
            })
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no thread panics"))
    })?;
    assert_eq!(values(&w.grad().unwrap()), [10.0 * ROUNDS as f64; 64]);
    Ok(())
}

/// A checkpoint's own walk passes gradients on to the weights and inputs that it found: their hooks see the whole, once.
#[test]
fn hooks_run_once_under_a_checkpoint() -> Result<()> {
    let (w, x) = (leaf(&[2.0, 3.0]), leaf(&[5.0, 7.0]));
    let calls = Arc::new(AtomicUsize::new(0));
    for tensor in [&w, &x] {
        let calls = calls.clone();
        tensor.register_hook(move |g| {
            calls.fetch_add(1, Relaxed);
            g.mul_scalar(0.5).map(Some)
        })?;
    }
    let weight = w.clone();
    let y = checkpoint(move |xs| xs[0].mul(&weight), &[&x])?;
    y.add(&w)?.sum(())?.backward()?;
    assert_eq!(calls.load(Relaxed), 2);
    assert_eq!((values(&w.grad().unwrap()), values(&x.grad().unwrap())), (vec![3.0, 4.0], vec![1.0, 1.5]));
    Ok(())
}

/// Weights that a function uses stay reachable through its derivatives, although its input is no part of a graph.
#[test]
fn transforms_keep_what_depends_on_weights() -> Result<()> {
    let (w, x) = (leaf(&[2.0, 3.0]), Tensor::from_slice(&[1.0, 2.0], 2)?);
    let f = |xs: &[Tensor]| xs[0].square()?.mul(&w);
    let (y, dy) = jvp(f, &[&x], &[&x.ones_like()?])?;
    assert!(y.is_tracked() && dy.is_tracked());
    dy.sum(())?.backward()?;
    assert_eq!(values(&w.grad().unwrap()), [2.0, 4.0]);
    w.zero_grad();
    hvp(|x| x.square()?.mul(&w)?.sum(()), &x, &x.ones_like()?)?.1.sum(())?.backward()?;
    assert_eq!(values(&w.grad().unwrap()), [2.0, 2.0]);
    w.zero_grad();
    jacobian(|x| x.square()?.mul(&w), &x)?.sum(())?.backward()?;
    assert_eq!(values(&w.grad().unwrap()), [2.0, 4.0]);
    // A vector that is learnt, too; and without either nothing stays.
    let v = leaf(&[1.0, 1.0]);
    vjp(|xs| xs[0].square(), &[&x], &v)?.1[0].sum(())?.backward()?;
    assert_eq!(values(&v.grad().unwrap()), [2.0, 4.0]);
    let (y, products) = vjp(|xs| xs[0].square(), &[&x], &v.detach())?;
    assert!(!y.is_tracked() && !products[0].is_tracked() && !jacobian(|x| x.square(), &x)?.is_tracked());
    Ok(())
}

#[test]
fn a_derivative_that_differences_cannot_see_fails_the_check() {
    let x = Tensor::from_slice(&[1e-6], 1).unwrap();
    assert!(gradcheck(|x| x[0].recip(), &[x]).is_err());
}

#[test]
fn a_hook_must_return_a_gradient_like_the_one_it_got() -> Result<()> {
    for (other, named) in [(Tensor::zeros((), DType::F64)?, "f64 []"), (Tensor::zeros([2], DType::F32)?, "f32 [2]")] {
        let x = leaf(&[1.0, 2.0]);
        let y = x.softmax(0)?;
        y.register_hook(move |_| Ok(Some(other.clone())))?;
        let error = y.select(0, 0)?.backward().unwrap_err().to_string();
        assert!(error.contains("hook") && error.contains(named), "{error}");
        assert!(x.grad().is_none());
    }
    Ok(())
}

/// What an operation made has a place in the graph that would be wrong for other elements.
#[test]
fn writing_over_a_recorded_result_is_an_error() -> Result<()> {
    let x = leaf(&[1.0, 2.0]);
    let mut y = x.mul_scalar(2.0)?;
    assert!(scale_(&mut y, 3.0).unwrap_err().to_string().contains("no_grad"));
    assert!(y.as_slice_mut::<f64>().unwrap_err().to_string().contains("no_grad"));
    no_grad(|| scale_(&mut y, 3.0))?;
    assert_eq!(values(&y), [6.0, 12.0]);
    let mut leaf = x;
    scale_(&mut leaf, 3.0)?;
    assert_eq!(values(&leaf), [3.0, 6.0]);
    assert!(leaf.with_gaps().unwrap_err().to_string().contains("with_gaps"));
    Ok(())
}

#[test]
fn hooks_see_and_replace_complete_gradients() -> Result<()> {
    let x = leaf(&[1., 2.]);
    let y = x.mul(&x)?;
    let calls = Arc::new(AtomicUsize::new(0));
    let seen = calls.clone();
    y.register_hook(move |g| {
        seen.fetch_add(1, Relaxed);
        Ok(Some(g.add(g)?))
    })?;
    y.add(&y)?.sum(())?.backward()?;
    assert_eq!(calls.load(Relaxed), 1);
    assert_eq!(values(&x.grad().unwrap()), [8., 16.]);
    Ok(())
}

#[test]
fn a_long_chain_is_walked_and_dropped_without_recursion() -> Result<()> {
    std::thread::Builder::new()
        .stack_size(256 << 10)
        .spawn(|| -> Result<()> {
            for walked in [false, true] {
                let x = leaf(&[1.]);
                let mut y = x.mul(&x)?;
                for _ in 0..100_000 {
                    y = y.add(&x)?.mul(&leaf(&[1.]))?;
                }
                if walked {
                    y.sum(())?.backward()?;
                    assert_eq!(values(&x.grad().unwrap()), [100_002.]);
                }
                drop(y);
            }
            Ok(())
        })
        .unwrap()
        .join()
        .unwrap()
}

#[test]
fn checkpoint_gives_the_same_gradients_to_inputs_and_captures() -> Result<()> {
    let (x, w) = (leaf(&[0.1, 0.2]), leaf(&[0.3, 0.4]));
    let outer = x.mul(&x)?;
    let plain = outer.mul(&w)?.exp()?.mul(&x)?.sum(())?;
    let expected = grad(&plain, &[&x, &w])?;
    let (outer, x2, w2) = (x.mul(&x)?, x.clone(), w.clone());
    let captured = outer.clone();
    let y = checkpoint(move |xs| captured.mul(&w2)?.exp()?.mul(&xs[0]), &[&x2])?;
    let g = grad(&y.sum(())?, &[&x, &w])?;
    for (g, e) in g.iter().zip(&expected) {
        assert_eq!(values(g), values(e));
    }
    // A second derivative through a checkpoint.
    let f = |xs: &[Tensor]| checkpoint(|xs| xs[0].mul(&xs[0])?.exp(), &[&xs[0]]);
    gradcheck(f, &[x.detach()])?;
    gradgradcheck(f, &[x.detach()])
}

#[test]
fn checkpoint_draws_the_same_random_numbers() -> Result<()> {
    let g = Generator::new(1);
    let x = leaf(&[1., 2.]);
    let inner = g.clone();
    let noise = move |xs: &[Tensor]| xs[0].mul(&Tensor::scalar(inner.reserve(1).offset as f64, DType::F64)?);
    g.reserve(41);
    let y = checkpoint(noise, &[&x])?;
    g.reserve(100);
    assert_eq!(values(&y), [41., 82.]);
    y.sum(())?.backward()?;
    assert_eq!(values(&x.grad().unwrap()), [41., 41.]);
    assert_eq!(g.state().offset, 142);
    Ok(())
}

#[test]
fn anomalies_are_reported_with_their_operation() -> Result<()> {
    let x = leaf(&[1000.]);
    assert!(x.exp().is_ok());
    let error = anomaly_mode(true, || x.exp()).unwrap_err().to_string();
    assert!(error.starts_with("exp: anomaly: the result of shape [1] holds inf; all inputs were finite"), "{error}");
    Ok(())
}

/// Halves with few targets are convolved as they are: result and gradients are those of f32, rounded.
#[test]
fn a_convolution_of_halves_with_few_targets_rounds_once() -> Result<()> {
    let generator = Generator::new(3);
    for dtype in [DType::BF16, DType::F16] {
        let draw = |shape: &[usize], scale: f64| generator.randn(shape, DType::F32)?.mul_scalar(scale)?.to_dtype(dtype);
        let (x, w, bias) = (draw(&[1, 160, 4, 5], 1.0)?, draw(&[128, 160, 3, 3], 0.03)?, draw(&[128], 1.0)?);
        let run = |dtype: DType| -> Result<Vec<Tensor>> {
            let leaves = [&x, &w, &bias].map(|t| t.to_dtype(dtype).and_then(|t| t.requires_grad_()));
            let [x, w, bias] = leaves;
            let (x, w, bias) = (x?, w?, bias?);
            let y = x.conv2d(&w, Some(&bias), kiln_tensor::ops::conv::ConvOptions::new().padding(1))?;
            assert_eq!(y.dtype(), dtype);
            let mut out = vec![y.detach()];
            out.extend(grad(&y.square()?.sum(())?, &[&x, &w, &bias])?);
            Ok(out)
        };
        for (half, full) in run(dtype)?.iter().zip(run(DType::F32)?) {
            assert_eq!(half.dtype(), dtype);
            let error = half.to_dtype(DType::F32)?.sub(&full)?.abs()?.max(())?.item_f64()?;
            let largest = full.abs()?.max(())?.item_f64()?;
            assert!(error <= 0.006 * largest, "{dtype}: {error} of {largest}");
        }
    }
    Ok(())
}
