//! What the harness does not ask of attention: its dropout beside that of [`Tensor::dropout`], second derivatives of the kernel, odd inputs.

use kiln_autograd::{GradOptions, checkpoint, grad, grad_with};
use kiln_tensor::ops::attention::AttentionOptions;
use kiln_tensor::{DType, Generator, Result, Tensor};

/// A tracked tensor of normal numbers.
fn leaf(seed: u64, shape: &[usize], dtype: DType) -> Result<Tensor> {
    Generator::new(seed).randn(shape, DType::F32)?.to_dtype(dtype)?.detach().requires_grad_()
}

fn floats(x: &Tensor) -> Result<Vec<f32>> {
    x.to_dtype(DType::F32)?.to_vec()
}

/// The output and the gradients of q, k and v.
fn results(f: impl Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>, leaves: &[Tensor; 3]) -> Result<Vec<Vec<f32>>> {
    let [q, k, v] = leaves;
    let y = f(q, k, v)?;
    let weights = leaf(9, y.dims(), y.dtype())?.detach();
    let gradients = grad(&y.mul(&weights)?.sum(())?, &[q, k, v])?;
    std::iter::once(&y).chain(&gradients).map(floats).collect()
}

#[test]
fn dropout_is_that_of_the_weights() -> Result<()> {
    for (queries, keys, dtype, tolerance) in [(70, 333, DType::F32, 1e-5), (300, 128, DType::F32, 1e-5), (70, 333, DType::BF16, 3e-2)] {
        let leaves = [leaf(1, &[2, 3, queries, 24], dtype)?, leaf(2, &[2, 3, keys, 24], dtype)?, leaf(3, &[2, 3, keys, 20], dtype)?];
        let fused = results(
            |q, k, v| {
                let generator = Generator::new(5);
                generator.reserve(11);
                let options = AttentionOptions { dropout_p: 0.3, generator: Some(&generator), ..Default::default() };
                q.scaled_dot_product_attention(k, v, &options)
            },
            &leaves,
        )?;
        let unfused = results(
            |q, k, v| {
                let generator = Generator::new(5);
                generator.reserve(11);
                let weights = q.mul_scalar(1.0 / 24f64.sqrt())?.matmul(&k.transpose(-2, -1)?)?.softmax(-1)?;
                generator.dropout(&weights, 0.3)?.matmul(v)
            },
            &leaves,
        )?;
        for (i, (fused, unfused)) in fused.iter().zip(&unfused).enumerate() {
            let norm = unfused.iter().map(|x| x * x).sum::<f32>().sqrt();
            let error = fused.iter().zip(unfused).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt();
            assert!(error <= tolerance * norm, "{queries}x{keys} {dtype:?}: result {i} is off by {error:e} of {norm:e}");
        }
    }
    Ok(())
}

#[test]
fn no_dropout_draws_nothing_and_changes_no_bit() -> Result<()> {
    let leaves = [leaf(1, &[2, 70, 24], DType::F32)?, leaf(2, &[2, 90, 24], DType::F32)?, leaf(3, &[2, 90, 24], DType::F32)?];
    let generator = Generator::new(5);
    let before = generator.state().offset;
    let with = |options: AttentionOptions<'_>| results(|q, k, v| q.scaled_dot_product_attention(k, v, &options), &leaves);
    let none = with(AttentionOptions { dropout_p: 0.0, generator: Some(&generator), ..Default::default() })?;
    assert_eq!(none, with(AttentionOptions::default())?);
    assert_eq!(generator.state().offset, before);
    Ok(())
}

#[test]
fn dropout_keeps_its_share_of_the_weights() -> Result<()> {
    // Without scores all weights are equal, so an output is the share of the keys that are kept, over 1 − p.
    let (q, k, v) =
        (Tensor::zeros([8, 100, 4], DType::F32)?, Tensor::zeros([8, 500, 4], DType::F32)?, Tensor::ones([8, 500, 1], DType::F32)?);
    for p in [0.1, 0.5, 0.9] {
        let generator = Generator::new(1);
        let options = AttentionOptions { dropout_p: p, generator: Some(&generator), ..Default::default() };
        let y = floats(&q.scaled_dot_product_attention(&k, &v, &options)?)?;
        let n = (y.len() * 500) as f64;
        let mean = y.iter().map(|&y| y as f64).sum::<f64>() / y.len() as f64;
        // Five standard deviations.
        assert!((mean - 1.0).abs() < 5.0 * (p / (1.0 - p) / n).sqrt(), "{p}: {mean}");
        let variance = y.iter().map(|&y| (y as f64 - 1.0).powi(2)).sum::<f64>() / y.len() as f64;
        assert!((variance * 500.0 * (1.0 - p) / p - 1.0).abs() < 0.3, "{p}: {variance}");
    }
    Ok(())
}

#[test]
fn a_checkpoint_drops_the_same_weights() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        let leaves = [leaf(1, &[2, 40, 8], dtype)?, leaf(2, &[2, 40, 8], dtype)?, leaf(3, &[2, 40, 8], dtype)?];
        let attend = |generator: Generator| {
            move |x: &[Tensor]| {
                let options = AttentionOptions { dropout_p: 0.5, generator: Some(&generator), ..Default::default() };
                x[0].scaled_dot_product_attention(&x[1], &x[2], &options)
            }
        };
        let plain = results(|q, k, v| attend(Generator::new(5))(&[q.clone(), k.clone(), v.clone()]), &leaves)?;
        let again = results(|q, k, v| checkpoint(attend(Generator::new(5)), &[q, k, v]), &leaves)?;
        assert_eq!(plain, again);
    }
    Ok(())
}

#[test]
fn dropout_of_no_probability_is_refused() -> Result<()> {
    let x = Tensor::ones([2, 4], DType::F32)?;
    for dropout_p in [-0.1, 1.0, f64::NAN] {
        let error = x.scaled_dot_product_attention(&x, &x, &AttentionOptions { dropout_p, ..Default::default() });
        assert!(error.is_err_and(|e| e.to_string().contains("dropout_p")));
    }
    Ok(())
}

/// The fused kernel of f32 has no second derivative of its own: its rule is then taken from the composed form.
#[test]
fn fused_attention_has_second_derivatives() {
    let second = |dtype: DType, dropout_p: f64| -> Result<Vec<f64>> {
        let value = |salt: usize| {
            let values = (0..2 * 4 * 3).map(|i| ((i * 37 + salt * 11) % 23) as f64 / 11.0 - 1.0).collect::<Vec<_>>();
            Tensor::from_vec(values, [2, 4, 3])?.to_dtype(dtype)?.requires_grad_()
        };
        let (q, k, v) = (value(1)?, value(2)?, value(3)?);
        let generator = Generator::new(3);
        let options = AttentionOptions { causal: true, enable_gqa: true, dropout_p, generator: Some(&generator), ..Default::default() };
        let y = q.scaled_dot_product_attention(&k, &v, &options)?.square()?.sum(())?;
        let first = grad_with(&[&y], &[None], &[&q, &k, &v], GradOptions { create_graph: true, ..Default::default() })?;
        let size = first.iter().try_fold(Tensor::zeros([], dtype)?, |sum, g| sum.add(&g.square()?.sum(())?))?;
        let second = grad_with(&[&size], &[None], &[&q, &k, &v], GradOptions::default())?;
        Ok(second.iter().map(|g| g.to_dtype(DType::F64)?.to_vec::<f64>()).collect::<Result<Vec<_>>>()?.concat())
    };
    for dropout_p in [0.0, 0.3] {
        let (single, double) = (second(DType::F32, dropout_p).unwrap(), second(DType::F64, dropout_p).unwrap());
        assert!(double.iter().any(|x| x.abs() > 0.1));
        assert!(single.iter().zip(&double).all(|(a, b)| (a - b).abs() < 1e-4), "{single:?} {double:?}");
    }
}

#[test]
fn odd_attention_inputs_are_results_or_errors() -> Result<()> {
    let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32);
    // Keys of no width: all scores are empty sums, so the values are averaged.
    let options = AttentionOptions { scale: Some(1.0), ..Default::default() };
    let y = ones(&[2, 0])?.scaled_dot_product_attention(&ones(&[3, 0])?, &ones(&[3, 4])?, &options)?;
    assert!(y.to_vec::<f32>()?.iter().all(|x| (x - 1.0).abs() < 1e-6));
    let y = ones(&[2, 4])?.scaled_dot_product_attention(&ones(&[0, 4])?, &ones(&[0, 3])?, &options)?;
    assert_eq!(y.to_vec::<f32>()?, [0.0; 6]);
    // A mask of ones and zeros must not be taken for a bias.
    let mask = Tensor::ones([2, 3], DType::I64)?;
    let options = AttentionOptions { mask: Some(&mask), ..Default::default() };
    let result = ones(&[2, 4])?.scaled_dot_product_attention(&ones(&[3, 4])?, &ones(&[3, 4])?, &options);
    assert!(result.is_err_and(|e| e.to_string().contains("mask")));
    let options = AttentionOptions { enable_gqa: true, ..Default::default() };
    assert!(ones(&[3, 2, 4])?.scaled_dot_product_attention(&ones(&[2, 2, 4])?, &ones(&[2, 2, 4])?, &options).is_err());
    Ok(())
}
