//! Mixed precision: which operation runs in which dtype, gradients in f32, checkpoints, and loss scaling.

use kiln_autograd::{TensorExt, checkpoint};
use kiln_models::nn::Param;
use kiln_models::optim::{Adam, AdamOptions, GradScaler, GradScalerOptions, Optimizer, Sgd, SgdOptions};
use kiln_tensor::{AttentionOptions, ConvOptions, DType, Generator, Result, Tensor, autocast, autocast_dtype, fuse, with_autocast};

fn randn(seed: u64, shape: &[usize]) -> Result<Tensor> {
    Generator::new(seed).randn(shape, ())
}

#[test]
fn operations_run_in_their_dtypes() -> Result<()> {
    let (x, w, b) = (randn(1, &[4, 8])?, randn(2, &[8, 8])?, randn(3, &[8])?);
    let image = randn(4, &[2, 3, 6, 6])?;
    let kernel = randn(5, &[4, 3, 3, 3])?;
    let half = x.to_dtype(DType::BF16)?;
    autocast(DType::BF16, || -> Result<()> {
        let q = x.reshape([1, 4, 8])?;
        let products = [
            x.matmul(&w)?,
            x.linear(&w, Some(&b))?,
            half.matmul(&w)?,
            image.conv2d(&kernel, None, ConvOptions::new())?,
            q.scaled_dot_product_attention(&q, &q, &AttentionOptions::default())?,
        ];
        assert!(products.iter().all(|t| t.dtype() == DType::BF16));
        let product = &products[0];
        let raised = [
            product.softmax(-1)?,
            product.log_softmax(-1)?,
            product.layer_norm(8, None, None, 1e-5)?,
            product.rms_norm(8, Some(&b), 1e-5)?,
            product.group_norm(2, None, None, 1e-5)?,
            product.batch_norm(None, None, 1e-5)?.output,
            product.sum(())?,
            product.mean_keepdim(0)?,
            product.var(0, 1.0)?,
            product.norm(2.0, ())?,
            product.logsumexp(0)?,
            product.cumsum(0)?,
            product.exp()?,
            product.abs()?.add_scalar(1.0)?.log()?,
            product.mse_loss(&x)?,
            product.bce_with_logits(&x.sigmoid()?)?,
            product.cross_entropy(&Tensor::from_vec(vec![0i64, 1, 2, 3], 4)?)?,
            product.add(&x)?,
            x.mul(product)?,
            Tensor::cat(&[product, &x], 0)?,
            fuse(|[a, b]| a * b)?.call([product, &x])?,
        ];
        for (i, t) in raised.iter().enumerate() {
            assert_eq!(t.dtype(), DType::F32, "operation {i}");
        }
        assert_eq!(product.relu()?.dtype(), DType::BF16);
        assert_eq!(product.add(product)?.dtype(), DType::BF16);
        let double = x.to_dtype(DType::F64)?;
        assert_eq!(double.matmul(&double.t()?)?.dtype(), DType::F64);
        assert_eq!(with_autocast(None, || x.matmul(&w))?.dtype(), DType::F32);
        Ok(())
    })??;
    assert_eq!(x.matmul(&w)?.dtype(), DType::F32);
    assert!(half.matmul(&w).is_err(), "outside of a scope nothing is cast");
    assert!(autocast(DType::F32, || ()).is_err());
    let unwound = std::panic::catch_unwind(|| autocast(DType::F16, || panic!("out of the scope")));
    assert!(unwound.is_err() && autocast_dtype().is_none());
    Ok(())
}

/// Two layers; the loss of a batch.
fn loss(x: &Tensor, target: &Tensor, params: &[Param]) -> Result<Tensor> {
    let hidden = x.linear(&params[0].get(), Some(&params[1].get()))?.relu()?;
    hidden.linear(&params[2].get(), None)?.mse_loss(target)
}

fn network() -> Result<Vec<Param>> {
    let param = |name: &str, seed, shape: &[usize], scale| Param::new(name, &randn(seed, shape)?.mul_scalar(scale)?);
    Ok(vec![param("w1", 1, &[32, 8], 0.3)?, param("b1", 2, &[32], 0.1)?, param("w2", 3, &[4, 32], 0.2)?])
}

fn train(dtype: Option<DType>, steps: usize) -> Result<(f64, f64)> {
    let params = network()?;
    let (x, target) = (randn(7, &[64, 8])?, randn(8, &[64, 4])?.mul_scalar(0.5)?);
    let mut optimizer = Adam::new(params.clone(), AdamOptions { lr: 0.01, ..Default::default() })?;
    let mut scaler = GradScaler::new(GradScalerOptions::default())?;
    let mut losses = Vec::new();
    for _ in 0..steps {
        optimizer.zero_grad();
        let loss = with_autocast(dtype, || loss(&x, &target, &params))?;
        losses.push(loss.item_f64()?);
        if dtype == Some(DType::F16) {
            scaler.scale(&loss)?.backward()?;
            scaler.step(&mut optimizer, &params)?;
            scaler.update()?;
        } else {
            loss.backward()?;
            optimizer.step()?;
        }
        assert!(params.iter().all(|p| p.grad().is_some_and(|g| g.dtype() == DType::F32)));
    }
    Ok((losses[0], losses[steps - 1]))
}

#[test]
fn training_follows_that_in_f32() -> Result<()> {
    let (first, last) = train(None, 60)?;
    assert!(last < 0.5 * first);
    for dtype in [DType::BF16, DType::F16] {
        let (half_first, half_last) = train(Some(dtype), 60)?;
        assert!((half_first - first).abs() < 0.01 * first, "{dtype}: {half_first}, f32 {first}");
        assert!((half_last - last).abs() < 0.1 * last, "{dtype}: {half_last}, f32 {last}");
    }
    Ok(())
}

#[test]
fn a_checkpoint_runs_again_in_its_scope() -> Result<()> {
    let gradients = |with_checkpoint: bool| -> Result<Vec<Vec<f32>>> {
        let params = network()?;
        let (x, target) = (randn(7, &[16, 8])?, randn(8, &[16, 4])?);
        let loss = autocast(DType::BF16, || {
            if !with_checkpoint {
                return loss(&x, &target, &params);
            }
            let params = params.clone();
            checkpoint(move |t| loss(&t[0], &t[1], &params), &[&x, &target])
        })??;
        loss.backward()?;
        params.iter().map(|p| p.grad().unwrap().to_vec()).collect()
    };
    assert_eq!(gradients(true)?, gradients(false)?);
    Ok(())
}

/// A generator's and a discriminator's, say, of one backward pass: both are divided by the factor that it was scaled by.
#[test]
fn optimisers_share_a_scaler() -> Result<()> {
    let params = ["a", "b"].map(|name| [Param::new(name, &Tensor::ones([1], ()).unwrap()).unwrap()]);
    let mut optimizers = params.clone().map(|params| Sgd::new(params, SgdOptions { lr: 0.5, ..Default::default() }).unwrap());
    let mut scaler = GradScaler::new(GradScalerOptions { init_scale: 8.0, growth_interval: 1, ..Default::default() })?;
    assert!(scaler.update().is_err(), "there was no step");
    scaler.scale(&params[0][0].get().add(&params[1][0].get())?.sum(())?)?.backward()?;
    assert!(scaler.unscale(&params[0])? && scaler.unscale(&params[1])? && scaler.unscale(&params[0])?);
    assert!(scaler.update().is_err() && scaler.unscale(&params[0])?, "that they are unscaled is not forgotten");
    for own in &params {
        assert_eq!(own[0].grad().unwrap().to_vec::<f32>()?, [1.0]);
    }
    for (optimizer, own) in optimizers.iter_mut().zip(&params) {
        assert!(scaler.step(optimizer, own)?);
        assert_eq!(own[0].get().to_vec::<f32>()?, [0.5]);
    }
    assert!(scaler.step(&mut optimizers[0], &params[0]).unwrap_err().to_string().contains("update()"));
    assert!(scaler.unscale(&params.concat()).unwrap_err().to_string().contains("together"));
    assert_eq!(scaler.current_scale(), 8.0);
    scaler.update()?;
    assert_eq!(scaler.current_scale(), 16.0);
    // One overflow costs its own step only, and the factor.
    params[0][0].set_grad(Some(Tensor::full([1], f64::INFINITY, ())?))?;
    params[1][0].set_grad(Some(Tensor::full([1], 16.0, ())?))?;
    assert!(!scaler.step(&mut optimizers[0], &params[0])? && scaler.step(&mut optimizers[1], &params[1])?);
    assert_eq!((params[0][0].get().to_vec::<f32>()?, params[1][0].get().to_vec::<f32>()?), (vec![0.5], vec![0.0]));
    scaler.update()?;
    assert_eq!(scaler.current_scale(), 8.0);
    Ok(())
}

#[test]
fn gradients_that_overflow_cost_a_step() -> Result<()> {
    let w = Param::new("w", &Tensor::ones([1], ())?)?;
    let params = [w.clone()];
    let mut optimizer = Sgd::new(params.clone(), SgdOptions { lr: 0.5, ..Default::default() })?;
    let options = GradScalerOptions { init_scale: 2f64.powi(20), growth_interval: 2, ..Default::default() };
    let mut scaler = GradScaler::new(options)?;
    let mut taken = Vec::new();
    for _ in 0..8 {
        optimizer.zero_grad();
        // The gradient passes through f16, whose largest number is 65504.
        let loss = w.get().to_dtype(DType::F16)?.to_dtype(DType::F32)?.sum(())?;
        scaler.scale(&loss)?.backward()?;
        let before = w.get().to_vec::<f32>()?[0];
        let step = scaler.step(&mut optimizer, &params)?;
        scaler.update()?;
        assert_eq!(w.get().to_vec::<f32>()?[0], if step { before - 0.5 } else { before });
        taken.push(step);
    }
    // 2²⁰ to 2¹⁶ overflow; 2¹⁵ holds, grows after two steps, and overflows again.
    assert_eq!(taken, [false, false, false, false, false, true, true, false]);
    assert_eq!(scaler.current_scale(), 2f64.powi(15));
    let mut other = GradScaler::new(options)?;
    other.load_state_dict(&scaler.state_dict()?)?;
    assert_eq!(other.current_scale(), scaler.current_scale());
    let mut broken = scaler.state_dict()?;
    broken.remove("scale");
    assert!(other.load_state_dict(&broken).is_err());
    assert!(GradScaler::new(GradScalerOptions { backoff_factor: 0.0, ..options }).is_err());
    Ok(())
}
