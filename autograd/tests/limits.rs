//! Derivatives and losses where a function ends or the range of a dtype does, and sizes that no memory holds.

use kiln_autograd::{GradOptions, TensorExt, grad_with};
use kiln_tensor::ops::loss::{BceOptions, CrossEntropyOptions};
use kiln_tensor::ops::movement::PadMode;
use kiln_tensor::{AttentionOptions, ConvOptions, DType, Result, Tensor, autocast};

fn leaf(values: &[f64], dtype: DType) -> Result<Tensor> {
    Tensor::from_slice(values, values.len())?.to_dtype(dtype)?.requires_grad_()
}

fn values(x: &Tensor) -> Result<Vec<f64>> {
    x.detach().to_dtype(DType::F64)?.to_vec()
}

/// PyTorch's values, but for the slope of −ln x at 1, which is −1 (PyTorch: 0).
#[test]
fn bce_has_finite_derivatives_where_a_probability_is_0_or_1() -> Result<()> {
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        let x = leaf(&[1.0, 0.0, 1.0, 0.0, 0.5], dtype)?;
        let target = Tensor::from_slice(&[1.0, 1.0, 0.0, 0.0, 1.0], 5)?.to_dtype(dtype)?;
        let loss = x.bce_with(&target, &BceOptions { reduction: kiln_tensor::ops::loss::Reduction::None, ..Default::default() })?;
        let found = values(&loss)?;
        assert_eq!(found[..4], [0.0, 100.0, 100.0, 0.0]);
        loss.sum(())?.backward()?;
        for (found, expected) in values(&x.grad().unwrap())?.into_iter().zip([-1.0, -1e12, 1e12, 1.0, -2.0]) {
            assert!((found - expected).abs() <= 0.01 * expected.abs(), "{dtype}: {found} for {expected}");
        }
        let again = grad_with(&[&x.bce(&target)?], &[None], &[&x], GradOptions { create_graph: true, ..Default::default() })?;
        assert!(values(&again[0])?.iter().all(|g| g.is_finite()));
    }
    // Through a sigmoid that is 1, as in PyTorch.
    let x = leaf(&[40.0, -200.0], DType::F32)?;
    x.sigmoid()?.bce(&Tensor::from_slice(&[1.0f32, 0.0], 2)?)?.backward()?;
    assert_eq!(values(&x.grad().unwrap())?, [0.0, 0.0]);
    Ok(())
}

/// With `create_graph` rules are composed of operations: what lies between may be out of the range of f16, the result is not.
#[test]
fn recorded_gradients_of_f16_are_those_of_the_kernels() -> Result<()> {
    type Function = fn(&Tensor) -> Result<Tensor>;
    let functions: [(&str, Function); 3] = [
        ("layer_norm", |x| x.layer_norm([3], None, None, 1e-5)),
        ("rms_norm", |x| x.rms_norm([3], None, 1e-5)),
        ("gelu_tanh", |x| x.gelu_tanh()),
    ];
    for (name, f) in functions {
        let gradient = |create_graph: bool| -> Result<Vec<f64>> {
            let x = leaf(&[0.0, 300.0, 1000.0], DType::F16)?;
            let weight = Tensor::from_slice(&[1.0, 0.0, 0.5], 3)?.to_dtype(DType::F16)?;
            let options = GradOptions { create_graph, ..Default::default() };
            values(&grad_with(&[&f(&x)?], &[Some(&weight)], &[&x], options)?[0])
        };
        let (recorded, fused) = (gradient(true)?, gradient(false)?);
        assert!(fused.iter().any(|g| *g != 0.0), "{name}");
        for (recorded, fused) in recorded.iter().zip(&fused) {
            assert!((recorded - fused).abs() <= 2e-3 * fused.abs() + 1e-7, "{name}: {recorded} for {fused}");
        }
    }
    Ok(())
}

#[test]
fn what_loses_a_maximum_gets_zero_whatever_comes_back() -> Result<()> {
    let (a, b) = (leaf(&[-1.0, f64::NAN, 2.0], DType::F64)?, leaf(&[0.0, 1.0, 2.0], DType::F64)?);
    a.maximum(&b)?.log()?.sum(())?.backward()?;
    let (of_a, of_b) = (values(&a.grad().unwrap())?, values(&b.grad().unwrap())?);
    assert_eq!((of_a[0], of_b[0]), (0.0, f64::INFINITY));
    assert!(of_a[1].is_nan() && of_b[1].is_nan());
    assert_eq!((of_a[2], of_b[2]), (0.25, 0.25));
    // Both get the gradient where one is NaN, as in PyTorch.
    let (a, b) = (leaf(&[f64::NAN], DType::F64)?, leaf(&[1.0], DType::F64)?);
    a.minimum(&b)?.sum(())?.backward()?;
    assert_eq!((values(&a.grad().unwrap())?, values(&b.grad().unwrap())?), (vec![1.0], vec![1.0]));
    Ok(())
}

#[test]
fn a_product_of_many_factors_has_gradients_beside_a_zero() -> Result<()> {
    let n = 100_000;
    let mut factors = vec![1.0; n];
    (factors[7], factors[70_001]) = (0.0, 3.0);
    let x = leaf(&factors, DType::F32)?;
    x.prod(())?.backward()?;
    let found = values(&x.grad().unwrap())?;
    assert_eq!((found[7], found.iter().filter(|g| **g != 0.0).count()), (3.0, 1));
    Ok(())
}

#[test]
fn a_mean_of_f16_losses_is_in_range_where_their_sum_is_not() -> Result<()> {
    let x = Tensor::from_slice(&[20.0f32, 0.0], [1, 2])?.expand([4000, 2])?.to_dtype(DType::F16)?.requires_grad_()?;
    let target = Tensor::ones([4000], DType::I64)?;
    let loss = x.cross_entropy(&target)?;
    assert_eq!((loss.dtype(), loss.item_f64()?), (DType::F16, 20.0));
    loss.backward()?;
    assert!(values(&x.grad().unwrap())?.iter().all(|g| g.is_finite()));
    Ok(())
}

#[test]
fn numbers_are_compared_in_the_dtype_of_the_tensor() -> Result<()> {
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        let x = Tensor::full([1], 0.1, dtype)?;
        let truth = |x: Tensor| x.item::<bool>();
        assert_eq!([truth(x.eq_scalar(0.1)?)?, truth(x.gt_scalar(0.1)?)?, truth(x.lt_scalar(0.1)?)?], [true, false, false], "{dtype}");
    }
    Ok(())
}

#[test]
fn losses_and_powers_are_computed_in_f32_under_autocast() -> Result<()> {
    let x = Tensor::full([2], 300.0, DType::F16)?;
    autocast(DType::F16, || -> Result<()> {
        assert_eq!(x.powf(2.0)?.to_vec::<f32>()?, [90_000.0; 2]);
        let half = Tensor::full([2], 0.5, DType::F16)?;
        for loss in [half.bce(&half)?, half.kl_div(&half)?, half.hinge_embedding_loss(&half)?, x.cosine_similarity(&x, 0, 1e-8)?] {
            assert_eq!(loss.dtype(), DType::F32);
            assert!(loss.item_f64()?.is_finite());
        }
        // Weights in the half type rise with what they weigh.
        let bce = BceOptions { weight: Some(&half), pos_weight: Some(&half), ..Default::default() };
        let (rows, classes) = (half.reshape([1, 2])?, CrossEntropyOptions { weight: Some(&half), ..Default::default() });
        let losses = [
            half.bce_with(&half, &BceOptions { weight: Some(&half), ..Default::default() })?,
            half.bce_with_logits_with(&half, &bce)?,
            rows.cross_entropy_with(&rows, &classes)?,
            rows.cross_entropy_with(&Tensor::ones([1], DType::I64)?, &classes)?,
        ];
        assert!(losses.iter().all(|loss| loss.dtype() == DType::F32));
        Ok(())
    })?
}

/// A weight that is learnt would lose its gradient in silence.
#[test]
fn class_weights_of_integer_targets_are_constants() -> Result<()> {
    let weight = leaf(&[1.0, 2.0], DType::F32)?;
    let (x, target) = (Tensor::zeros([3, 2], DType::F32)?, Tensor::zeros([3], DType::I64)?);
    let with = |weight: &Tensor| x.cross_entropy_with(&target, &CrossEntropyOptions { weight: Some(weight), ..Default::default() });
    assert!(with(&weight).unwrap_err().to_string().contains("class weights"));
    with(&weight.detach()).map(drop)
}

#[test]
fn sizes_beyond_all_memory_are_errors() -> Result<()> {
    let one = Tensor::zeros([1], DType::Bool)?;
    let vast = one.expand([1usize << 62])?;
    assert!(Tensor::cat(&[&vast; 4], 0).is_err());
    let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0], 3)?;
    assert!(x.pad(&[isize::MIN, isize::MAX], PadMode::Constant(0.0)).is_err());
    assert!(x.pad(&[-4, 4], PadMode::Constant(0.0)).is_err());
    assert_eq!(x.pad(&[-1, 1], PadMode::Constant(0.0))?.to_vec::<f32>()?, [2.0, 3.0, 0.0]);
    assert!(Tensor::zeros([1, 1], DType::F32)?.expand([1usize << 61, 1])?.max_dim(1).is_err());
    assert!(format!("{}", Tensor::zeros([1usize << 60, 0], DType::F32)?).len() < 100);
    assert_eq!(x.i(..usize::MAX)?.to_vec::<f32>()?, [1.0, 2.0, 3.0]);
    assert!(x.i(usize::MAX).is_err() && x.sum(usize::MAX).is_err() && x.reshape([usize::MAX]).is_err());
    for dim in [-3, 2, isize::MIN] {
        assert!(Tensor::stack(&[&x, &x], dim).unwrap_err().to_string().contains("dimension"));
    }
    assert_eq!(Tensor::stack(&[&x, &x], -2)?.dims(), [2, 3]);
    Ok(())
}

/// What Hugging Face's masks hold: the least number of the dtype, or −10⁹. A query whose keys all have it looks at all of them alike.
#[test]
fn attention_under_a_mask_of_large_numbers_is_even_and_so_are_its_gradients() -> Result<()> {
    for (dtype, least) in
        [(DType::F32, f64::from(f32::MIN)), (DType::F32, -1e9), (DType::F32, -1e7), (DType::BF16, -1e9), (DType::F64, -1e9)]
    {
        for keys in [2, 4, 100] {
            let [q, k] = [[1, 1, 3, 8], [1, 1, keys, 8]].map(|shape| Tensor::zeros(shape, dtype).and_then(|x| x.requires_grad_()));
            let values: Vec<f64> = (0..keys).map(|i| i as f64).collect();
            let v = Tensor::from_vec(values, [1, 1, keys, 1])?.to_dtype(dtype)?.requires_grad_()?;
            let mask = Tensor::full([3, keys], least, dtype)?;
            let out = q?.scaled_dot_product_attention(&k?, &v, &AttentionOptions { mask: Some(&mask), ..Default::default() })?;
            let mean = (keys - 1) as f64 / 2.0;
            assert!(self::values(&out)?.iter().all(|x| (x - mean).abs() <= 0.01 * mean), "{dtype} {least} {keys}: {out}");
            out.sum(())?.backward()?;
            let expected = 3.0 / keys as f64;
            for g in self::values(&v.grad().unwrap())? {
                assert!((g - expected).abs() <= 0.01 * expected, "{dtype} {least} {keys}: {g} for {expected}");
            }
        }
    }
    Ok(())
}

#[test]
fn sums_of_long_rows_round_as_those_of_short_ones() -> Result<()> {
    let n = 1 << 22;
    let x = Tensor::full([n], 0.1, DType::F32)?;
    let expected = f64::from(0.1f32) * f64::from(0.1f32) * n as f64;
    assert!((x.dot(&x)?.item_f64()? - expected).abs() <= 1e-3 * expected);
    // A weight of one output: its gradient is a row times a tall matrix.
    let (row, tall) = (x.reshape([1, n])?, Tensor::full([n, 3], 0.1, DType::F32)?);
    assert!(values(&row.matmul(&tall)?)?.iter().all(|y| (y - expected).abs() <= 1e-3 * expected));
    // A depthwise convolution's gradient of its weight.
    let image = Tensor::full([1, 2, 1024, 1024], 0.1, DType::F32)?;
    let weight = Tensor::ones([2, 1, 1, 1], DType::F32)?.requires_grad_()?;
    let options = ConvOptions::default().groups(2);
    image.conv2d(&weight, None, options)?.mul(&image)?.sum(())?.backward()?;
    let expected = expected / 4.0;
    assert!(values(&weight.grad().unwrap())?.iter().all(|g| (g - expected).abs() <= 1e-3 * expected));
    Ok(())
}

/// Beside numbers so large that they are reduced in another way, too.
#[test]
fn a_sine_does_not_depend_on_its_neighbours() -> Result<()> {
    let far: Vec<f32> = (0..2000).map(|i| (i as f32 + 0.5) * std::f32::consts::FRAC_PI_2).flat_map(|x| [x, 70_000.0 + x]).collect();
    let both = Tensor::from_slice(&far, far.len())?;
    for function in [Tensor::sin, Tensor::cos] {
        let together = function(&both)?.to_vec::<f32>()?;
        for (i, &x) in far.iter().enumerate().step_by(2) {
            let alone = function(&Tensor::from_slice(&[x], 1)?)?.to_vec::<f32>()?[0];
            assert_eq!(alone.to_bits(), together[i].to_bits(), "{x}");
        }
    }
    Ok(())
}
