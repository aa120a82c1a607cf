//! Values and gradients of PyTorch, case by case: `fixtures/torch.safetensors`, made by `fixtures/make.py`.
//!
//! In f64 both must agree to rounding; the same case in f32 to f32's. A fixture without a function here, or the reverse, fails.

use kiln_autograd::{GradOptions, grad_with};
use kiln_tensor::*;
use safetensors::SafeTensors;
use std::collections::{BTreeMap, BTreeSet};

type Function = Box<dyn Fn(&[Tensor]) -> Result<Tensor>>;

/// The functions under test, by the names of the fixture.
fn functions() -> BTreeMap<&'static str, Function> {
    let mut all = BTreeMap::new();
    let mut add = |name: &'static str, f: Function| assert!(all.insert(name, f).is_none(), "{name} twice");
    macro_rules! case {
        ($($name:literal => $f:expr;)*) => { $( {
            let f: fn(&[Tensor]) -> Result<Tensor> = $f;
            add($name, Box::new(f));
        } )* };
    }
    case! {
        "unary.neg" => |x| x[0].neg();
        "unary.abs" => |x| x[0].abs();
        "unary.sign" => |x| x[0].sign();
        "unary.exp" => |x| x[0].exp();
        "unary.expm1" => |x| x[0].expm1();
        "unary.square" => |x| x[0].square();
        "unary.sin" => |x| x[0].sin();
        "unary.cos" => |x| x[0].cos();
        "unary.tanh" => |x| x[0].tanh();
        "unary.sigmoid" => |x| x[0].sigmoid();
        "unary.erf" => |x| x[0].erf();
        "unary.relu" => |x| x[0].relu();
        "unary.floor" => |x| x[0].floor();
        "unary.ceil" => |x| x[0].ceil();
        "unary.round" => |x| x[0].round();
        "unary.log" => |x| x[0].log();
        "unary.log1p" => |x| x[0].log1p();
        "unary.sqrt" => |x| x[0].sqrt();
        "unary.rsqrt" => |x| x[0].rsqrt();
        "unary.recip" => |x| x[0].recip();
        "unary.leaky_relu" => |x| x[0].leaky_relu(0.2);
        "unary.elu" => |x| x[0].elu(1.5);
        "unary.gelu" => |x| x[0].gelu();
        "unary.gelu_tanh" => |x| x[0].gelu_tanh();
        "unary.silu" => |x| x[0].silu();
        "unary.softplus" => |x| x[0].softplus();
        "unary.mish" => |x| x[0].mish();
        "unary.hardswish" => |x| x[0].hardswish();
        "unary.clamp" => |x| x[0].clamp(-0.5, 1.0);
        "unary.powf_3" => |x| x[0].powf(3.0);
        "unary.powf_half" => |x| x[0].powf(0.5);
        "binary.add" => |x| x[0].add(&x[1]);
        "binary.sub" => |x| x[0].sub(&x[1]);
        "binary.mul" => |x| x[0].mul(&x[1]);
        "binary.maximum" => |x| x[0].maximum(&x[1]);
        "binary.minimum" => |x| x[0].minimum(&x[1]);
        "binary.atan2" => |x| x[0].atan2(&x[1]);
        "binary.div" => |x| x[0].div(&x[1]);
        "binary.rem" => |x| x[0].rem(&x[1]);
        "binary.pow" => |x| x[0].pow(&x[1]);
        "binary.lerp" => |x| x[0].lerp(&x[1], &x[2]);
        "binary.where" => |x| x[0].where_cond(&x[1], &x[2]);
        "binary.masked_fill" => |x| x[0].masked_fill(&x[1], 0.5);
        "reduce.sum_all" => |x| x[0].sum(());
        "reduce.sum_02" => |x| x[0].sum([0, 2]);
        "reduce.mean_1" => |x| x[0].mean(1);
        "reduce.mean_keepdim" => |x| x[0].mean_keepdim([1, 2]);
        "reduce.prod_1" => |x| x[0].prod(1);
        "reduce.max_all" => |x| x[0].max(());
        "reduce.max_1" => |x| Ok(x[0].max_dim(1)?.0);
        "reduce.min_2" => |x| Ok(x[0].min_dim(2)?.0);
        "reduce.argmax_1" => |x| x[0].argmax(1);
        "reduce.argmin_2" => |x| x[0].argmin(2);
        "reduce.var_1" => |x| x[0].var(1, 1.0);
        "reduce.var_biased" => |x| x[0].var([0, 2], 0.0);
        "reduce.std_2" => |x| x[0].std(2, 1.0);
        "reduce.norm_1" => |x| x[0].norm(1.0, 1);
        "reduce.norm_2" => |x| x[0].norm(2.0, 1);
        "reduce.norm_3" => |x| x[0].norm(3.0, 2);
        "reduce.norm_inf" => |x| x[0].norm(f64::INFINITY, 1);
        "reduce.logsumexp" => |x| x[0].logsumexp(2);
        "reduce.cumsum_1" => |x| x[0].cumsum(1);
        "move.reshape" => |x| x[0].reshape([6, 10]);
        "move.permute" => |x| x[0].permute(&[2, 0, 1]);
        "move.expand" => |x| x[0].expand([2, 3, 4]);
        "move.slice_step" => |x| x[0].slice(1, 1, 4, 2)?.slice(2, 0, 5, 3);
        "move.narrow" => |x| x[0].narrow(1, 1, 2);
        "move.cat" => |x| Tensor::cat(x, 1);
        "move.stack" => |x| Tensor::stack(x, 1);
        "move.chunk" => |x| Ok(x[0].chunk(3, 2)?[1].clone());
        "move.pad_constant" => |x| x[0].pad(&[1, 2, 0, 1], PadMode::Constant(0.5));
        "move.pad_reflect" => |x| x[0].pad(&[1, 2], PadMode::Reflect);
        "move.pad_replicate" => |x| x[0].pad(&[1, 2], PadMode::Replicate);
        "move.flip" => |x| x[0].flip([0, 2]);
        "move.roll" => |x| x[0].roll(1, 0)?.roll(-2, 2);
        "move.repeat" => |x| x[0].repeat(&[2, 1, 3]);
        "move.tril" => |x| x[0].tril(1);
        "move.triu" => |x| x[0].triu(-1);
        "move.unfold" => |x| x[0].unfold(1, 3, 2);
        "move.diagonal" => |x| x[0].diagonal(1, 0, 1);
        "index.gather" => |x| x[0].gather(0, &x[1]);
        "index.scatter" => |x| x[0].scatter(0, &x[1], &x[2]);
        "index.scatter_add" => |x| x[0].scatter_add(0, &x[1], &x[2]);
        "index.index_select" => |x| x[0].index_select(1, &x[1]);
        "index.index_add" => |x| x[0].index_add(0, &x[1], &x[2]);
        "index.masked_select" => |x| x[0].masked_select(&x[1]);
        "index.embedding" => |x| x[1].embedding(&x[0]);
        "index.sort" => |x| Ok(x[0].sort(1, false)?.0);
        "index.sort_descending" => |x| Ok(x[0].sort(0, true)?.0);
        "index.argsort" => |x| x[0].argsort(1, false);
        "index.topk" => |x| Ok(x[0].topk(2, 1, true)?.0);
        "index.one_hot" => |x| x[0].one_hot(5);
        "index.nonzero" => |x| x[0].nonzero();
        "product.matmul" => |x| x[0].matmul(&x[1]);
        "product.matmul_vec" => |x| x[0].matmul(&x[1]);
        "product.vec_matmul" => |x| x[0].matmul(&x[1]);
        "product.dot" => |x| x[0].dot(&x[1]);
        "product.bmm" => |x| x[0].bmm(&x[1]);
        "product.matmul_broadcast" => |x| x[0].matmul(&x[1]);
        "product.linear" => |x| x[0].linear(&x[1], Some(&x[2]));
        "product.einsum_bij_bjk" => |x| Tensor::einsum("bij,bjk->bik", &[&x[0], &x[1]]);
        "product.einsum_ij_ij" => |x| Tensor::einsum("ij,ij->i", &[&x[0], &x[1]]);
        "product.einsum_bhqd_bhkd" => |x| Tensor::einsum("bhqd,bhkd->bhqk", &[&x[0], &x[1]]);
        "product.einsum_ij" => |x| Tensor::einsum("ij->ji", &[&x[0]]);
        "product.outer" => |x| x[0].outer(&x[1]);
        "conv.conv1d" => |x| x[0].conv1d(&x[1], Some(&x[2]), conv().stride(2).padding(1));
        "conv.conv2d" => |x| x[0].conv2d(&x[1], Some(&x[2]), ());
        "conv.conv2d_stride" => |x| x[0].conv2d(&x[1], None, conv().stride(2).padding(1));
        "conv.conv2d_dilation" => |x| x[0].conv2d(&x[1], None, conv().padding(2).dilation(2));
        "conv.conv2d_groups" => |x| x[0].conv2d(&x[1], Some(&x[2]), conv().padding(1).groups(2));
        "conv.conv2d_depthwise" => |x| x[0].conv2d(&x[1], None, conv().padding(1).groups(4));
        "conv.conv3d" => |x| x[0].conv3d(&x[1], None, conv().padding(1));
        "conv.conv_transpose1d" => |x| x[0].conv_transpose1d(&x[1], None, conv().stride(2).padding(1));
        "conv.conv_transpose2d" => |x| x[0].conv_transpose2d(&x[1], Some(&x[2]), conv().stride(2).padding(1));
        "conv.conv_transpose2d_output_padding" =>
            |x| x[0].conv_transpose2d(&x[1], None, conv().stride(2).padding(1).output_padding(1).groups(2));
        "conv.conv_transpose3d" => |x| x[0].conv_transpose3d(&x[1], None, conv().stride(2));
        "pool.max_pool2d" => |x| x[0].max_pool2d(2);
        "pool.max_pool2d_overlap" => |x| x[0].max_pool2d(PoolOptions::new(3).stride(2).padding(1));
        "pool.avg_pool2d" => |x| x[0].avg_pool2d(2);
        "pool.avg_pool2d_padded" => |x| x[0].avg_pool2d(PoolOptions::new(3).stride(2).padding(1));
        "pool.avg_pool2d_no_pad_count" => |x| x[0].avg_pool2d(PoolOptions::new(3).stride(2).padding(1).count_include_pad(false));
        "pool.max_pool1d" => |x| x[0].max_pool1d(2);
        "pool.avg_pool1d" => |x| x[0].avg_pool1d(2);
        "pool.adaptive_avg_pool2d" => |x| x[0].adaptive_avg_pool2d([3, 2]);
        "pool.adaptive_max_pool2d" => |x| x[0].adaptive_max_pool2d([3, 2]);
        "pool.upsample_nearest" => |x| x[0].upsample_nearest(2);
        "pool.upsample_bilinear" => |x| x[0].interpolate([5, 7], Interpolation::Linear { align_corners: false });
        "pool.upsample_bilinear_align" => |x| x[0].interpolate([5, 7], Interpolation::Linear { align_corners: true });
        "norm.layer_norm" => |x| x[0].layer_norm([6], Some(&x[1]), Some(&x[2]), 1e-5);
        "norm.layer_norm_2d" => |x| x[0].layer_norm([3, 4], None, None, 1e-5);
        "norm.rms_norm" => |x| x[0].rms_norm([6], Some(&x[1]), 1e-6);
        "norm.batch_norm_train" => |x| Ok(x[0].batch_norm(Some(&x[1]), Some(&x[2]), 1e-5)?.output);
        "norm.batch_norm_eval" => |x| x[0].batch_norm_eval(&x[1], &x[2], Some(&x[3]), Some(&x[4]), 1e-5);
        "norm.group_norm" => |x| x[0].group_norm(2, Some(&x[1]), Some(&x[2]), 1e-5);
        "norm.instance_norm" => |x| x[0].instance_norm(Some(&x[1]), Some(&x[2]), 1e-5);
        "softmax.softmax" => |x| x[0].softmax(-1);
        "softmax.softmax_0" => |x| x[0].softmax(0);
        "softmax.log_softmax" => |x| x[0].log_softmax(-1);
        "attention.plain" => |x| x[0].scaled_dot_product_attention(&x[1], &x[2], &AttentionOptions::default());
        "attention.causal" => |x| x[0].scaled_dot_product_attention(&x[1], &x[2], &AttentionOptions { causal: true, ..Default::default() });
        "attention.scale" => |x| x[0].scaled_dot_product_attention(&x[1], &x[2], &AttentionOptions { scale: Some(0.3), ..Default::default() });
        "attention.mask_additive" => |x| x[0].scaled_dot_product_attention(&x[1], &x[2], &AttentionOptions { mask: Some(&x[3]), ..Default::default() });
        "attention.mask_bool" => |x| x[0].scaled_dot_product_attention(&x[1], &x[2], &AttentionOptions { mask: Some(&x[3]), ..Default::default() });
        "attention.causal_more_keys" => |x| x[0].scaled_dot_product_attention(&x[1], &x[2], &AttentionOptions { causal: true, ..Default::default() });
        "attention.causal_more_queries" => |x| x[0].scaled_dot_product_attention(&x[1], &x[2], &AttentionOptions { causal: true, ..Default::default() });
        "attention.grouped" =>
            |x| x[0].scaled_dot_product_attention(&x[1], &x[2], &AttentionOptions { causal: true, enable_gqa: true, ..Default::default() });
        "loss.mse" => |x| x[0].mse_loss(&x[1]);
        "loss.mse_sum" => |x| x[0].mse_loss_with(&x[1], Reduction::Sum);
        "loss.mse_none" => |x| x[0].mse_loss_with(&x[1], Reduction::None);
        "loss.l1" => |x| x[0].l1_loss(&x[1]);
        "loss.smooth_l1" => |x| x[0].smooth_l1_loss_with(&x[1], 0.7, Reduction::Mean);
        "loss.cross_entropy" => |x| x[0].cross_entropy(&x[1]);
        "loss.cross_entropy_ignore" => |x| x[0].cross_entropy_with(&x[1], &CrossEntropyOptions { ignore_index: 4, ..Default::default() });
        "loss.cross_entropy_smooth" =>
            |x| x[0].cross_entropy_with(&x[1], &CrossEntropyOptions { label_smoothing: 0.1, ..Default::default() });
        "loss.cross_entropy_weight" =>
            |x| x[0].cross_entropy_with(&x[1], &CrossEntropyOptions { weight: Some(&x[2].detach()), ..Default::default() });
        "loss.cross_entropy_all" => |x| x[0].cross_entropy_with(&x[1], &CrossEntropyOptions {
            weight: Some(&x[2].detach()), ignore_index: 4, label_smoothing: 0.2, ..Default::default()
        });
        "loss.cross_entropy_sum" =>
            |x| x[0].cross_entropy_with(&x[1], &CrossEntropyOptions { reduction: Reduction::Sum, ..Default::default() });
        "loss.cross_entropy_2d" => |x| x[0].cross_entropy(&x[1]);
        "loss.nll" => |x| x[0].nll_loss(&x[1]);
        "loss.bce" => |x| x[0].bce(&x[1]);
        "loss.bce_with_logits" => |x| x[0].bce_with_logits(&x[1]);
        "loss.bce_with_logits_pos_weight" =>
            |x| x[0].bce_with_logits_with(&x[1], &BceOptions { pos_weight: Some(&x[2].detach()), ..Default::default() });
        "loss.kl_div" => |x| x[0].kl_div_with(&x[1], &KlDivOptions { reduction: Reduction::Sum, ..Default::default() })?.div_scalar(3.0);
        "loss.hinge_embedding" => |x| x[0].hinge_embedding_loss(&x[1].detach());
        "loss.cosine_similarity" => |x| x[0].cosine_similarity(&x[1], 1, 1e-8);
        "loss.triplet" => |x| x[0].triplet_margin_loss(&x[1], &x[2]);
    }
    all
}

fn conv() -> ConvOptions {
    ConvOptions::new()
}

struct Fixture {
    inputs: Vec<Tensor>,
    output: Tensor,
    weight: Option<Tensor>,
    gradients: BTreeMap<usize, Tensor>,
}

fn read() -> BTreeMap<String, Fixture> {
    let bytes = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/torch.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |name: &str| -> Option<Tensor> {
        let view = file.tensor(name).ok()?;
        let data = view.data();
        let shape = view.shape();
        Some(match view.dtype() {
            safetensors::Dtype::F64 => {
                Tensor::from_vec(data.chunks(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(), shape).unwrap()
            }
            safetensors::Dtype::I64 => {
                Tensor::from_vec(data.chunks(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect(), shape).unwrap()
            }
            safetensors::Dtype::U8 => Tensor::from_vec(data.iter().map(|&b| b != 0).collect::<Vec<bool>>(), shape).unwrap(),
            other => panic!("{name}: {other:?}"),
        })
    };
    let cases: BTreeSet<&str> = file.names().into_iter().filter_map(|n| n.split('/').next()).collect();
    let fixture = |case: &str| Fixture {
        inputs: (0..).map_while(|i| tensor(&format!("{case}/in{i}"))).collect(),
        output: tensor(&format!("{case}/out")).unwrap(),
        weight: tensor(&format!("{case}/w")),
        gradients: (0..8).filter_map(|i| Some((i, tensor(&format!("{case}/g{i}"))?))).collect(),
    };
    cases.into_iter().map(|case| (case.to_string(), fixture(case))).collect()
}

fn close(what: &str, actual: &Tensor, expected: &Tensor, tolerance: f64) {
    assert_eq!(actual.shape(), expected.shape(), "{what}: shape");
    let values = |t: &Tensor| t.detach().to_dtype(DType::F64).unwrap().to_vec::<f64>().unwrap();
    let (actual, expected) = (values(actual), values(expected));
    let scale = expected.iter().fold(0f64, |m, x| m.max(x.abs()));
    for (i, (a, e)) in actual.iter().zip(&expected).enumerate() {
        assert!((a - e).abs() <= tolerance * (scale + 1e-3), "{what}: element {i} is {a}, PyTorch has {e}");
    }
}

fn check(name: &str, f: &Function, fixture: &Fixture, dtype: DType, tolerance: f64) -> Result<()> {
    let prepare = |x: &Tensor| if x.dtype().is_float() { x.to_dtype(dtype)?.requires_grad_() } else { Ok(x.clone()) };
    let inputs = fixture.inputs.iter().map(prepare).collect::<Result<Vec<_>>>()?;
    let output = f(&inputs)?;
    close(&format!("{name} in {dtype}"), &output, &fixture.output, tolerance);
    let Some(weight) = &fixture.weight else { return Ok(()) };
    let wanted: Vec<(&usize, &Tensor)> = fixture.gradients.iter().collect();
    let leaves: Vec<&Tensor> = wanted.iter().map(|(i, _)| &inputs[**i]).collect();
    let found = grad_with(&[&output], &[Some(&weight.to_dtype(dtype)?)], &leaves, GradOptions::default())?;
    for ((i, expected), found) in wanted.into_iter().zip(&found) {
        close(&format!("{name} in {dtype}: gradient of input {i}"), found, expected, tolerance * 4.0);
    }
    Ok(())
}

#[test]
fn values_and_gradients_are_those_of_pytorch() {
    let (functions, fixtures) = (functions(), read());
    let names = |it: &mut dyn Iterator<Item = String>| it.collect::<BTreeSet<_>>();
    assert_eq!(names(&mut functions.keys().map(|s| s.to_string())), names(&mut fixtures.keys().cloned()));
    assert!(fixtures.len() >= 150);
    for (name, fixture) in &fixtures {
        let f = &functions[name.as_str()];
        check(name, f, fixture, DType::F64, 1e-10).unwrap_or_else(|e| panic!("{name}: {e:?}"));
        check(name, f, fixture, DType::F32, 2e-5).unwrap_or_else(|e| panic!("{name}: {e:?}"));
    }
}
