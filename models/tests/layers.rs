//! Every layer: names and shapes of its parameters, the shape of its output, modes, and that gradients reach every parameter.

use kiln_autograd::{TensorExt, checkpoint};
use kiln_models::nn::*;
use kiln_tensor::{Activation, DType, Quantization, QuantizedMatrix, Result, Tensor};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Names and shapes of all parameters and buffers.
fn inventory(params: &Params) -> Vec<String> {
    let entries = params.params().into_iter().map(|p| format!("{} {}", p.name(), p.shape()));
    entries.chain(params.buffers().into_iter().map(|b| format!("{} {}", b.name(), b.shape()))).collect()
}

/// Builds a layer, checks its inventory and the shape of its output, that a gradient of the right shape reaches every parameter, that
/// frozen parameters get none, and that a state dictionary makes another instance compute the same bits.
fn check<M: Module>(build: impl Fn(&Params) -> Result<M>, expected: &[&str], input: &Tensor, output: &[usize]) {
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        let options = ParamsOptions { dtype, generator: kiln_tensor::Generator::new(5), ..ParamsOptions::default() };
        let params = Params::with(options);
        let layer = build(&params).unwrap();
        assert_eq!(inventory(&params), expected);
        let x = if input.dtype().is_float() { input.to_dtype(dtype).unwrap() } else { input.clone() };
        let y = layer.forward(&x).unwrap();
        assert_eq!((y.dims(), y.dtype()), (output, dtype));
        y.square().unwrap().sum(()).unwrap().backward().unwrap();
        for param in params.params() {
            assert_eq!(*param.grad().unwrap_or_else(|| panic!("no gradient reaches {}", param.name())).shape(), param.shape());
        }
        params.zero_grad();
        if !params.params().is_empty() {
            params.freeze("*").unwrap();
            assert!(!layer.forward(&x).unwrap().is_tracked());
        }
        params.eval();
        let other = Params::with(ParamsOptions { dtype, ..ParamsOptions::default() });
        other.eval();
        let (twin, report) = other.build_from(params.state_dict(), LoadMode::Strict, &build).unwrap();
        assert!(report.is_complete());
        let bits = |m: &M| m.forward(&x).unwrap().detach().to_dtype(DType::F64).unwrap().to_vec::<f64>().unwrap();
        assert_eq!(bits(&layer), bits(&twin));
    }
}

fn ramp(shape: &[usize]) -> Tensor {
    let n: usize = shape.iter().product();
    Tensor::from_vec((0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 25.0).collect(), shape).unwrap()
}

#[test]
fn linear_and_embedding() {
    check(|p| Linear::new(p, 3, 4, true), &["weight [4, 3]", "bias [4]"], &ramp(&[2, 5, 3]), &[2, 5, 4]);
    check(|p| Linear::new(&p.scope("a"), 3, 4, false), &["a.weight [4, 3]"], &ramp(&[2, 3]), &[2, 4]);
    let indices = Tensor::from_vec(vec![2i64, 0, 1, 2], [2, 2]).unwrap();
    check(|p| Embedding::new(p, 3, 5), &["weight [3, 5]"], &indices, &[2, 2, 5]);
}

#[test]
fn linear_is_the_formula() {
    let params = Params::new();
    let layer = Linear::with_init(&params, 2, 1, Init::Constant(3.0), Some(Init::Constant(0.5))).unwrap();
    let x = Tensor::from_vec(vec![1f32, 2.], [1, 2]).unwrap();
    assert_eq!(layer.forward(&x).unwrap().to_vec::<f32>().unwrap(), [9.5]);
    layer.weight().unwrap().set(&Tensor::ones([1, 2], ()).unwrap()).unwrap();
    assert_eq!(layer.forward(&x).unwrap().to_vec::<f32>().unwrap(), [3.5]);
}

#[test]
fn convolutions() {
    let halve = ConvOptions::new().with_stride(2).with_padding(1);
    check(|p| Conv1d::new(p, 4, 6, 3, ()), &["weight [6, 4, 3]", "bias [6]"], &ramp(&[2, 4, 9]), &[2, 6, 7]);
    check(|p| Conv2d::new(p, 4, 6, [3, 1], ()), &["weight [6, 4, 3, 1]", "bias [6]"], &ramp(&[2, 4, 5, 5]), &[2, 6, 3, 5]);
    let grouped = ConvOptions::<2> { groups: 2, bias: false, ..halve };
    check(|p| Conv2d::new(p, 4, 6, 4, grouped), &["weight [6, 2, 4, 4]"], &ramp(&[2, 4, 8, 6]), &[2, 6, 4, 3]);
    check(|p| Conv3d::new(p, 1, 2, 2, ()), &["weight [2, 1, 2, 2, 2]", "bias [2]"], &ramp(&[1, 1, 3, 3, 3]), &[1, 2, 2, 2, 2]);
}

#[test]
fn transposed_convolutions() {
    let double = ConvOptions::<2>::new().with_stride(2).with_padding(1);
    check(|p| ConvTranspose2d::new(p, 4, 6, 4, double), &["weight [4, 6, 4, 4]", "bias [6]"], &ramp(&[2, 4, 3, 4]), &[2, 6, 6, 8]);
    let odd = double.with_output_padding(1).with_groups(2).with_bias(false);
    check(|p| ConvTranspose2d::new(p, 4, 6, 3, odd), &["weight [4, 3, 3, 3]"], &ramp(&[2, 4, 3, 4]), &[2, 6, 6, 8]);
    check(|p| ConvTranspose1d::new(p, 2, 3, 2, ()), &["weight [2, 3, 2]", "bias [3]"], &ramp(&[1, 2, 4]), &[1, 3, 5]);
    check(|p| ConvTranspose3d::new(p, 1, 1, 2, ()), &["weight [1, 1, 2, 2, 2]", "bias [1]"], &ramp(&[1, 1, 2, 2, 2]), &[1, 1, 3, 3, 3]);
}

#[test]
fn impossible_layers_are_errors() {
    let params = Params::new();
    assert!(Conv2d::new(&params, 3, 4, 3, ConvOptions::new().with_groups(2)).is_err());
    assert!(Conv2d::new(&params, 3, 4, 3, ConvOptions::new().with_groups(0)).is_err());
    assert!(Conv2d::new(&params, 3, 4, 3, ConvOptions::new().with_output_padding(1)).is_err());
    assert!(Conv::<4>::new(&params, 3, 4, 3, ()).is_err());
    assert!(Dropout::new(&params, 1.5).is_err() && Dropout::new(&params, f64::NAN).is_err());
    assert!(inventory(&params).is_empty());
}

#[test]
fn default_weights_have_pytorchs_bounds() {
    let params = Params::seeded(1);
    let layer = Conv2d::new(&params, 16, 32, 3, ()).unwrap();
    let bound = 1.0 / (16.0 * 9.0f32).sqrt();
    for param in [layer.weight(), layer.bias().unwrap()] {
        let values = param.get().to_vec::<f32>().unwrap();
        let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
        assert!(largest <= bound && largest > 0.9 * bound, "{}: {largest} {bound}", param.name());
    }
}

#[test]
fn dropout_keeps_the_mean_and_stops_in_evaluation() {
    let params = Params::seeded(2);
    let layer = Dropout::new(&params, 0.25).unwrap();
    let x = Tensor::ones([100, 100], ()).unwrap();
    let y = layer.forward(&x).unwrap().to_vec::<f32>().unwrap();
    let dropped = y.iter().filter(|&&v| v == 0.0).count();
    assert!(y.iter().all(|&v| v == 0.0 || (v - 4.0 / 3.0).abs() < 1e-6));
    // 10,000 draws: the standard deviation of the count is 43.
    assert!((2300..2700).contains(&dropped), "{dropped}");
    params.eval();
    assert_eq!(layer.forward(&x).unwrap().to_vec::<f32>().unwrap(), vec![1f32; 10_000]);
}

#[test]
fn channel_dropout_drops_whole_channels() {
    let params = Params::seeded(2);
    let layer = ChannelDropout::new(&params, 0.5).unwrap();
    let y = layer.forward(&Tensor::ones([8, 16, 3, 3], ()).unwrap()).unwrap().to_vec::<f32>().unwrap();
    let channels: Vec<&[f32]> = y.chunks(9).collect();
    assert!(channels.iter().all(|c| c.iter().all(|&v| v == c[0] && (v == 0.0 || v == 2.0))));
    assert!(channels.iter().any(|c| c[0] == 0.0) && channels.iter().any(|c| c[0] == 2.0));
    assert!(layer.forward(&Tensor::ones([3], ()).unwrap()).is_err());
}

#[test]
fn functions_as_modules() {
    let x = ramp(&[2, 4, 6, 6]);
    let same: [Box<dyn Module>; 13] = [
        Box::new(Relu),
        Box::new(Gelu),
        Box::new(GeluTanh),
        Box::new(Silu),
        Box::new(Mish),
        Box::new(Hardswish),
        Box::new(Softplus),
        Box::new(Tanh),
        Box::new(Sigmoid),
        Box::new(Identity),
        Box::new(LeakyRelu::default()),
        Box::new(Elu::default()),
        Box::new(Softmax(-1)),
    ];
    for module in &same {
        assert_eq!(module.forward(&x).unwrap().dims(), x.dims());
    }
    let resized: [(Box<dyn Module>, &[usize]); 6] = [
        (Box::new(MaxPool2d::new(2)), &[2, 4, 3, 3]),
        (Box::new(AvgPool2d::new(3)), &[2, 4, 2, 2]),
        (Box::new(AdaptiveAvgPool2d::new(1)), &[2, 4, 1, 1]),
        (Box::new(Upsample::new(2, kiln_tensor::ops::upsample::Interpolation::Nearest)), &[2, 4, 12, 12]),
        (Box::new(Flatten::default()), &[2, 144]),
        (Box::new(|x: &Tensor| x.narrow(1, 0, 1)), &[2, 1, 6, 6]),
    ];
    for (module, expected) in &resized {
        assert_eq!(module.forward(&x).unwrap().dims(), *expected);
    }
    assert_eq!(LeakyRelu::default().forward(&Tensor::full([1], -1.0, ()).unwrap()).unwrap().to_vec::<f32>().unwrap(), [-0.01]);
}

#[test]
fn a_sequence_names_its_layers_by_place() {
    let build = |p: &Params| Sequential::new(p).push(|p| Linear::new(p, 3, 4, true))?.then(Tanh).push(|p| Linear::new(p, 4, 2, false));
    check(build, &["0.weight [4, 3]", "0.bias [4]", "2.weight [2, 4]"], &ramp(&[5, 3]), &[5, 2]);
    let params = Params::new();
    let nested = |p: &Params| -> Result<Sequential> {
        let inner = build(&p.scope("body"))?;
        Ok(Sequential::new(p).then(inner))
    };
    nested(&params).unwrap();
    assert_eq!(inventory(&params)[2], "body.2.weight [2, 4]");
    assert_eq!(Sequential::new(&params).forward(&ramp(&[2])).unwrap().dims(), [2]);
}

#[test]
fn normalisations() {
    let pair = ["weight [4]", "bias [4]"];
    let tracked = ["weight [4]", "bias [4]", "running_mean [4]", "running_var [4]", "num_batches_tracked []"];
    check(|p| BatchNorm1d::new(p, 4), &tracked, &ramp(&[6, 4]), &[6, 4]);
    check(|p| BatchNorm1d::new(p, 4), &tracked, &ramp(&[3, 4, 5]), &[3, 4, 5]);
    check(|p| BatchNorm2d::new(p, 4), &tracked, &ramp(&[2, 4, 3, 5]), &[2, 4, 3, 5]);
    check(|p| BatchNorm3d::new(p, 4), &tracked, &ramp(&[2, 4, 3, 2, 2]), &[2, 4, 3, 2, 2]);
    check(|p| LayerNorm::new(p, 4), &pair, &ramp(&[2, 3, 4]), &[2, 3, 4]);
    check(|p| LayerNorm::with_options(p, [3, 4], 1e-6, true, false), &["weight [3, 4]"], &ramp(&[2, 3, 4]), &[2, 3, 4]);
    check(|p| RmsNorm::new(p, 4, 1e-6), &["weight [4]"], &ramp(&[2, 3, 4]), &[2, 3, 4]);
    check(|p| GroupNorm::new(p, 2, 4), &pair, &ramp(&[2, 4, 3, 3]), &[2, 4, 3, 3]);
    check(|p| InstanceNorm::new(p, 4, true), &pair, &ramp(&[2, 4, 3, 3]), &[2, 4, 3, 3]);
    assert!(GroupNorm::new(&Params::new(), 3, 4).is_err());
    let params = Params::new();
    let layer = BatchNorm2d::new(&params, 4).unwrap();
    for wrong in [ramp(&[2, 4, 3]), ramp(&[2, 3, 3, 3]), ramp(&[1, 4, 1, 1])] {
        assert!(layer.forward(&wrong).is_err());
    }
    assert_eq!(params.named("weight").unwrap().get().to_vec::<f32>().unwrap(), [1.0; 4]);
}

/// Mean and unbiased variance.
fn moments(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    (mean, values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0))
}

/// Running statistics of one channel after `batches`, and how many were counted.
fn running(momentum: Option<f64>, batches: &[Tensor]) -> (f64, f64, i64) {
    let params = Params::with(ParamsOptions { dtype: DType::F64, ..ParamsOptions::default() });
    let layer = BatchNorm1d::with_options(&params, 1, BatchNormOptions { momentum, ..BatchNormOptions::default() }).unwrap();
    for batch in batches {
        layer.forward(batch).unwrap();
    }
    params.eval();
    let before = params.state_dict();
    layer.forward(&batches[0]).unwrap();
    let after = params.state_dict();
    let value = |state: &StateDict, name: &str| state[name].item_f64().unwrap();
    assert_eq!(value(&before, "running_mean"), value(&after, "running_mean"));
    (value(&after, "running_mean"), value(&after, "running_var"), value(&after, "num_batches_tracked") as i64)
}

#[test]
fn running_statistics_follow_the_momentum_and_the_unbiased_variance() {
    let batches: Vec<Vec<f64>> = vec![vec![1.0, 2.0, 4.0], vec![-3.0, 0.0, 5.0, 6.0]];
    let tensors: Vec<Tensor> = batches.iter().map(|b| Tensor::from_vec(b.clone(), [b.len(), 1]).unwrap()).collect();
    let [(m0, v0), (m1, v1)] = [moments(&batches[0]), moments(&batches[1])];
    let (mean, var, count) = running(Some(0.1), &tensors);
    assert!((mean - (0.9 * 0.1 * m0 + 0.1 * m1)).abs() < 1e-12 && count == 2);
    assert!((var - (0.9 * (0.9 + 0.1 * v0) + 0.1 * v1)).abs() < 1e-12);
    // Without momentum: the plain average.
    let (mean, var, _) = running(None, &tensors);
    assert!((mean - (m0 + m1) / 2.0).abs() < 1e-12 && (var - (v0 + v1) / 2.0).abs() < 1e-12);
}

#[test]
fn batch_norm_without_statistics_uses_the_batch_in_evaluation_too() {
    let params = Params::new();
    let options = BatchNormOptions { affine: false, track_running_stats: false, ..BatchNormOptions::default() };
    let layer = BatchNorm2d::with_options(&params, 3, options).unwrap();
    assert!(inventory(&params).is_empty());
    let x = ramp(&[2, 3, 2, 2]);
    let training = layer.forward(&x).unwrap().to_vec::<f32>().unwrap();
    params.eval();
    assert_eq!(layer.forward(&x).unwrap().to_vec::<f32>().unwrap(), training);
}

/// The sequence of `layers`, twice forward and backward, with the segment checkpointed or not: all gradients, buffers, and the next draw.
fn two_steps(layers: impl Fn(&Params) -> Result<Sequential>, checkpointed: bool) -> Vec<Vec<f64>> {
    let params = Params::with(ParamsOptions { generator: kiln_tensor::Generator::new(11), ..ParamsOptions::default() });
    let model = std::sync::Arc::new(layers(&params).unwrap());
    let x = ramp(&[4, 6]).requires_grad_().unwrap();
    for _ in 0..2 {
        let segment = model.clone();
        let y = if checkpointed { checkpoint(move |x| segment.forward(&x[0]), &[&x]) } else { model.forward(&x) };
        y.unwrap().square().unwrap().sum(()).unwrap().backward().unwrap();
    }
    let next_draw = params.generator().rand([3], ()).unwrap();
    let grads = params.params().into_iter().map(|p| p.grad().unwrap());
    let buffers = params.buffers().into_iter().map(|b| b.get());
    let traced = grads.chain(buffers).chain([x.grad().unwrap(), next_draw]);
    traced.map(|t| t.to_dtype(DType::F64).unwrap().to_vec::<f64>().unwrap()).collect()
}

#[test]
fn a_checkpointed_segment_leaves_the_same_bits_behind() {
    let dropout = |p: &Params| Sequential::new(p).push(|p| Linear::new(p, 6, 8, true))?.push(|p| Dropout::new(p, 0.5));
    assert_eq!(two_steps(dropout, true), two_steps(dropout, false));
    // Running statistics count each batch once, though the segment runs twice.
    let norm = |p: &Params| Sequential::new(p).push(|p| BatchNorm1d::new(p, 6))?.push(|p| Linear::new(p, 6, 2, true));
    assert_eq!(two_steps(norm, true), two_steps(norm, false));
}

/// Twice the layer's own output, while it is on.
struct Doubled(AtomicBool);

impl Adapter<Linear> for Doubled {
    fn is_active(&self) -> bool {
        self.0.load(Relaxed)
    }

    fn forward(&self, layer: &Linear, x: &Tensor) -> Result<Tensor> {
        layer.base(x)?.mul_scalar(2.0)
    }
}

#[test]
fn an_adapter_changes_every_holders_layer() {
    let params = Params::seeded(2);
    let layer = Linear::new(&params.scope("net").index(0), 3, 4, true).unwrap();
    Linear::new(&params.scope("network"), 4, 2, false).unwrap();
    let names = |params: &Params| params.linears().iter().map(|l| l.name().to_owned()).collect::<Vec<_>>();
    assert_eq!(names(&params), ["net.0", "network"]);
    assert_eq!(names(&params.scope("net")), ["net.0"]);
    assert_eq!(names(&params.scope("net").index(0)), ["net.0"]);
    assert_eq!(params.linears_matching("net*").unwrap().len(), 2);
    assert!(params.linears_matching("head").unwrap_err().to_string().contains("net.0, network"));

    let x = ramp(&[2, 3]);
    let values = |y: Result<Tensor>| y.unwrap().to_vec::<f32>().unwrap();
    let plain = values(layer.forward(&x));
    let activated = values(layer.forward_activated(&x, Activation::Gelu));
    let adapter = Arc::new(Doubled(AtomicBool::new(true)));
    assert!(params.linear_named("net.0").unwrap().set_adapter(Some(adapter.clone())).is_none());
    let doubled: Vec<f32> = plain.iter().map(|v| 2.0 * v).collect();
    assert_eq!(values(layer.forward(&x)), doubled);
    assert_eq!(values(layer.forward_activated(&x, Activation::Gelu)), values(layer.forward(&x).unwrap().gelu()));
    adapter.0.store(false, Relaxed);
    assert_eq!(values(layer.forward_activated(&x, Activation::Gelu)), activated);
    adapter.0.store(true, Relaxed);
    assert!(layer.adapter().is_some() && layer.set_adapter(None).is_some());
    assert_eq!(values(layer.forward(&x)), plain);
}

/// Three layers.
fn three(params: &Params) -> Result<[Linear; 3]> {
    let at = |name| params.scope(name);
    Ok([Linear::new(&at("a"), 64, 128, true)?, Linear::new(&at("b"), 128, 64, false)?, Linear::new(&at("c"), 3, 2, true)?])
}

#[test]
fn quantised_weights_leave_the_parameters_and_are_saved_as_they_are() {
    let params = Params::seeded(4);
    let [a, b, c] = three(&params).unwrap();
    let x = ramp(&[3, 64]);
    let run = |[a, b, _]: &[Linear; 3]| b.forward(&a.forward_activated(&x, Activation::Gelu).unwrap()).unwrap().to_vec::<f32>().unwrap();
    let exact = run(&[a.clone(), b.clone(), b.clone()]);
    let int4 = Quantization::Int4 { group: 64 };
    // All or nothing: what is not finite has no code.
    c.weight().unwrap().set(&Tensor::full([2, 3], f64::NAN, ()).unwrap()).unwrap();
    assert!(params.quantize_linears("*", int4).unwrap_err().to_string().contains("`c.weight`"));
    assert!(a.weight().is_some());
    assert_eq!(params.quantize_linears_if(|layer| layer.name() != "c", int4).unwrap(), 2);
    assert_eq!(params.quantize_linears("a", int4).unwrap(), 0);
    assert_eq!(inventory(&params), ["a.bias [128]", "c.weight [2, 3]", "c.bias [2]"]);
    let quantised = run(&[a.clone(), b.clone(), b.clone()]);
    let largest = exact.iter().fold(0f32, |l, x| l.max(x.abs()));
    assert!(exact.iter().zip(&quantised).all(|(e, q)| (e - q).abs() < 0.1 * largest) && exact != quantised);

    let state = params.state_dict();
    assert_eq!(state["a.weight"].dtype(), DType::U8);
    let fresh = Params::seeded(5);
    let (layers, _) = fresh.build_from(state.clone(), LoadMode::Strict, three).unwrap();
    assert_eq!((run(&layers), inventory(&fresh)), (quantised.clone(), inventory(&params)));
    let other = Params::seeded(6);
    let layers = three(&other).unwrap();
    let error = other.load_state_dict(&state, LoadMode::Strict).unwrap_err().to_string();
    assert!(error.contains("a.weight (expected f32 [128, 64], found u8"), "{error}");
    other.quantize_linears_if(|layer| layer.name() != "c", int4).unwrap();
    other.load_state_dict(&state, LoadMode::Strict).unwrap();
    assert_eq!(run(&layers), quantised);

    // A matrix of other extents may have as many bytes, and junk has none that mean anything.
    let narrow = QuantizedMatrix::quantize(&Tensor::ones([128, 63], ()).unwrap(), int4).unwrap();
    for (wrong, message) in
        [(narrow.to_tensor().unwrap(), "is [128, 64], not [128, 63]"), (state["a.weight"].zeros_like().unwrap(), "`a.weight`")]
    {
        let state = StateDict::from_iter(state.clone().into_iter().chain([("a.weight".to_owned(), wrong)]));
        let error = other.load_state_dict(&state, LoadMode::Strict).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
        assert!(Params::seeded(5).build_from(state, LoadMode::Strict, three).is_err());
        assert_eq!(run(&layers), quantised);
    }

    assert_eq!(other.dequantize_linears("*", DType::F32).unwrap(), 2);
    let dense = layers[0].weight().unwrap();
    assert!(dense.is_frozen() && other.named("a.weight").unwrap().is_same(&dense));
    assert_eq!(dense.get().to_vec::<f32>().unwrap(), a.weight_values().unwrap().to_vec::<f32>().unwrap());
    let matrix = QuantizedMatrix::quantize(&Tensor::ones([4, 64], ()).unwrap(), int4).unwrap();
    assert!(other.set_quantized(&layers[0], matrix).unwrap_err().to_string().contains("`a.weight` is [128, 64], not [4, 64]"));
}
