//! What profiles record of small programs: names, counts, costs, times that add up, threads, and nothing outside.

use kiln_autograd::{TensorExt, checkpoint, no_grad};
use kiln_models::classifier::DigitMlp;
use kiln_models::data::{ImageSet, Loader, LoaderOptions};
use kiln_models::nn::{Module, Params};
use kiln_models::optim::{AdamW, AdamWOptions, Optimizer};
use kiln_models::transformer::{CausalLm, Gpt2Config, Pass};
use kiln_tensor::profile::{Grouping, Kind, NAMELESS, Report, Row};
use kiln_tensor::{AttentionOptions, ConvOptions, DType, Profiler, Result, Tensor, fuse, manual_seed, profile, profile_scope};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A profile records all threads: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn row(report: &Report, name: &str) -> Row {
    let rows = report.rows();
    let found = rows.iter().find(|row| row.name == name).cloned();
    found.unwrap_or_else(|| panic!("no {name} among {:?}", rows.iter().map(|row| &row.name).collect::<Vec<_>>()))
}

fn calls(report: &Report) -> BTreeMap<String, u64> {
    report.rows().into_iter().map(|row| (row.name, row.calls)).collect()
}

struct Trained {
    losses: Vec<f32>,
    weights: Vec<Vec<f32>>,
}

/// Two steps of a perceptron.
fn train() -> Result<Trained> {
    manual_seed(3);
    let params = Params::new();
    let model = DigitMlp::new(&params, 10)?;
    let mut optimizer = AdamW::new(params.params(), AdamWOptions::default())?;
    let (x, y) = (Tensor::randn([16, 784], DType::F32)?, Tensor::randint(0, 10, [16])?);
    let mut losses = Vec::new();
    for _ in 0..2 {
        params.zero_grad();
        let loss = model.forward(&x)?.cross_entropy(&y)?;
        loss.backward()?;
        optimizer.step()?;
        losses.push(loss.item()?);
    }
    let weights = params.params().iter().map(|p| p.get().detach().to_vec()).collect::<Result<_>>()?;
    Ok(Trained { losses, weights })
}

/// Alignment trains without dropout, in evaluation mode: blocks are computed again there, too, and not where nothing is recorded.
#[test]
fn activation_checkpointing_does_not_depend_on_the_mode() -> Result<()> {
    let _alone = alone();
    let params = Params::seeded(1);
    let config = Gpt2Config { vocab_size: 11, n_positions: 8, n_embd: 8, n_layer: 2, n_head: 2, ..Gpt2Config::default() };
    let model = config.build(&params)?;
    params.eval();
    let tokens = Tensor::from_vec(vec![1i64, 2, 3, 4], [1, 4])?;
    let norms = |backward: bool| -> Result<u64> {
        let run = || model.forward(&tokens, Pass::default());
        let (done, report) = profile(|| if backward { run()?.square()?.mean(())?.backward() } else { no_grad(run).map(drop) });
        done?;
        Ok(calls(&report).get("layer_norm (recomputed)").copied().unwrap_or(0))
    };
    assert_eq!((norms(true)?, norms(false)?), (0, 0));
    model.set_activation_checkpointing(true);
    assert_eq!((norms(true)?, norms(false)?), (4, 0));
    Ok(())
}

#[test]
fn a_training_step_is_recorded_by_name_and_changes_no_bit() {
    let _alone = alone();
    let plain = train().unwrap();
    let (profiled, report) = profile(train);
    let profiled = profiled.unwrap();
    assert_eq!(plain.losses, profiled.losses);
    assert_eq!(plain.weights, profiled.weights);
    let calls = calls(&report);
    for (name, expected) in [("linear", 6), ("linear backward", 6), ("relu backward", 4), ("AdamW.step", 2), ("randn", 1), ("randint", 1)] {
        assert_eq!(calls.get(name), Some(&expected), "{name} in {calls:?}");
    }
    assert!(!calls.contains_key(NAMELESS), "{calls:?}");
    // The first layer's input wants no gradient: one product there, two in the others.
    let forward = 2 * 16 * (784 * 512 + 512 * 256 + 256 * 10);
    assert_eq!(row(&report, "linear").flop, 2 * forward);
    let backward = 2 * 16 * (784 * 512 + 2 * 512 * 256 + 2 * 256 * 10);
    let biases = 16 * (512 + 256 + 10);
    assert_eq!(row(&report, "linear backward").flop, 2 * (backward + biases));
    let parameters = 784 * 512 + 512 * 256 + 256 * 10 + 512 + 256 + 10;
    // A step reads and writes parameters and two states, and reads gradients; the first one makes the states.
    let steps = row(&report, "AdamW.step").bytes;
    assert!((2 * 7 * 4 * parameters..(2 * 7 + 2) * 4 * parameters + 64).contains(&steps), "{steps} bytes");
    assert!(report.peak_memory() >= 4 * 4 * parameters as usize, "weights, gradients and two states: {}", report.peak_memory());
}

#[test]
fn costs_are_exact() -> Result<()> {
    let _alone = alone();
    let f32s = |shape: &[usize]| Tensor::randn(shape, DType::F32);
    let (a, b) = (f32s(&[3, 5, 7])?, f32s(&[3, 7, 11])?);
    let (x, w, bias) = (f32s(&[2, 6, 9, 8])?, f32s(&[4, 3, 3, 3])?, f32s(&[4])?);
    let w_t = f32s(&[6, 5, 2, 2])?;
    let (q, k) = (f32s(&[2, 3, 8, 4])?, f32s(&[2, 3, 6, 4])?);
    let chain = fuse(|[x, y]| (x * y).gelu() + 1.0)?;
    let (done, report) = profile(|| -> Result<()> {
        a.matmul(&b)?;
        x.conv2d(&w, Some(&bias), ConvOptions::new().padding(1).stride(2).groups(2))?;
        x.conv_transpose2d(&w_t, None, ConvOptions::new().stride(2))?;
        q.scaled_dot_product_attention(&k, &k, &AttentionOptions { causal: true, ..AttentionOptions::default() })?;
        a.add(&a)?;
        bias.expand([100, 4])?.exp()?;
        chain.call([&a, &a])?;
        x.sum(1)?;
        Ok(())
    });
    done?;
    let matmul = row(&report, "matmul");
    assert_eq!((matmul.flop, matmul.bytes), (2 * 3 * 5 * 7 * 11, 4 * (3 * 5 * 7 + 3 * 7 * 11 + 3 * 5 * 11)));
    let conv = row(&report, "conv2d");
    assert_eq!(conv.flop, 2 * (2 * 4 * 5 * 4) * (3 * 3 * 3));
    assert_eq!(conv.bytes, 4 * (2 * 6 * 9 * 8 + 4 * 27 + 4 + 2 * 4 * 5 * 4));
    assert_eq!(row(&report, "conv_transpose2d").flop, 2 * (2 * 6 * 9 * 8) * (5 * 2 * 2));
    let pairs = 1 + 2 + 3 + 4 + 5 + 6 + 6 + 6;
    assert_eq!(row(&report, "scaled_dot_product_attention").flop, 2 * 2 * 3 * pairs * (4 + 4));
    let add = row(&report, "add");
    assert_eq!((add.flop, add.bytes), (105, 4 * 2 * 105), "the same tensor twice is read once");
    assert_eq!(row(&report, "exp").bytes, 4 * (4 + 400), "a broadcast tensor is read once");
    assert_eq!(row(&report, "fuse").flop, 3 * 105);
    assert_eq!(row(&report, "sum").flop, 2 * 6 * 9 * 8);
    Ok(())
}

#[test]
fn times_add_up_and_rows_group() -> Result<()> {
    let _alone = alone();
    let (done, report) = profile(|| -> Result<()> {
        let _outer = profile_scope("outer");
        for n in [16, 16, 32] {
            let _inner = profile_scope(format!("size {n}"));
            let x = Tensor::randn([n, n], DType::F32)?.requires_grad_()?;
            // A transposed operand is copied by the softmax: an operation in an operation.
            x.matmul(&x)?.t()?.softmax(0)?.sum(())?.backward()?;
        }
        Ok(())
    });
    done?;
    let rows = report.rows();
    let inside: Duration = rows.iter().chain(&report.scopes()).map(|row| row.self_time).sum();
    assert!(inside <= report.wall(), "{inside:?} of {:?}", report.wall());
    assert!(rows.iter().all(|row| row.self_time <= row.total));
    let outer = report.scopes().into_iter().find(|row| row.name == "outer").unwrap();
    assert_eq!((outer.calls, outer.kind), (1, Kind::Scope));
    assert!(outer.total <= report.wall() && rows.iter().map(|row| row.self_time).sum::<Duration>() <= outer.total);
    assert_eq!(report.scopes().iter().map(|row| (row.name.as_str(), row.calls)).filter(|(name, _)| name.starts_with("size")).count(), 2);
    let by_shape = report.rows_by(Grouping { inputs: true, ..Grouping::default() });
    let mut products: Vec<(u64, usize)> =
        by_shape.iter().filter(|row| row.name == "matmul").map(|row| (row.calls, row.inputs[0].0[0])).collect();
    products.sort_unstable();
    assert_eq!(products, [(1, 32), (2, 16)]);
    let detailed = report.rows_by(Grouping { inside: true, ..Grouping::default() });
    assert!(detailed.iter().any(|row| row.name == "matmul backward / matmul" && row.calls == 6), "{detailed:?}");
    let text = report.to_string();
    assert!(
        text.starts_with("operation") && text.contains("matmul backward") && text.contains("\nscope") && text.contains("peaks measured"),
        "{text}"
    );
    assert!(report.table(Grouping { inputs: true, inside: true }).to_string().contains("[32, 32] f32, [32, 32] f32"));
    Ok(())
}

#[test]
fn nothing_is_recorded_outside_nor_after_a_panic() {
    let _alone = alone();
    let x = Tensor::ones([4], DType::F32).unwrap();
    x.exp().unwrap();
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        profile(|| {
            let _scope = profile_scope("doomed");
            x.exp().unwrap();
            panic!("on purpose");
        })
    }));
    assert!(panicked.is_err());
    x.exp().unwrap();
    let ((), report) = profile(|| {
        x.sin().unwrap();
    });
    assert_eq!(calls(&report), BTreeMap::from([("sin".to_owned(), 1)]));
    assert!(report.scopes().is_empty());
    let ((), empty) = profile(|| ());
    assert!(empty.rows().is_empty());
    drop(Profiler::start());
    // A scope that outlives its profile, and one that began before.
    let profiler = Profiler::start();
    let late = profile_scope("late");
    let _ = profiler.stop();
    let profiler = Profiler::start();
    x.cos().unwrap();
    drop(late);
    assert_eq!(calls(&profiler.stop()), BTreeMap::from([("cos".to_owned(), 1)]));
}

#[test]
fn profiles_nest_and_see_all_threads() {
    let _alone = alone();
    let x = Tensor::ones([4], DType::F32).unwrap();
    let (inner, outer) = profile(|| {
        x.exp().unwrap();
        let ((), inner) = profile(|| {
            let threads: Vec<_> = (0..3)
                .map(|_| {
                    std::thread::spawn({
                        let x = x.clone();
                        move || x.sin().unwrap()
                    })
                })
                .collect();
            threads.into_iter().for_each(|thread| assert!(thread.join().is_ok()));
        });
        x.cos().unwrap();
        inner
    });
    assert_eq!(calls(&inner), BTreeMap::from([("sin".to_owned(), 3)]));
    assert_eq!(calls(&outer), BTreeMap::from([("cos".to_owned(), 1), ("exp".to_owned(), 1), ("sin".to_owned(), 3)]));
    assert!(outer.peak_memory() >= inner.peak_memory());
    // Guards may end in any order.
    let ((), report) = profile(|| {
        let (first, second) = (profile_scope("first"), profile_scope("second"));
        drop(first);
        x.exp().unwrap();
        drop(second);
    });
    assert_eq!((report.scopes().len(), calls(&report).len()), (1, 1));
}

#[test]
fn checkpoints_loaders_and_updates_in_place_appear() -> Result<()> {
    let _alone = alone();
    let weight = Tensor::randn([4, 4], DType::F32)?.requires_grad_()?;
    let x = Tensor::randn([2, 4], DType::F32)?;
    let (done, report) = profile(|| -> Result<()> {
        let w = weight.clone();
        checkpoint(move |x| x[0].linear(&w, None)?.tanh(), &[&x])?.sum(())?.backward()?;
        // The leaf has a gradient already.
        weight.square()?.sum(())?.backward()
    });
    done?;
    let names = calls(&report);
    for name in ["linear", "linear (recomputed)", "tanh (recomputed)", "checkpoint backward", "linear backward", "accumulate_grad"] {
        assert_eq!(names.get(name), Some(&1), "{name} in {names:?}");
    }
    let digits = ImageSet::new(vec![0; 10 * 4], (0..10).collect(), [1, 2, 2])?;
    let mut loader = Loader::new(digits, LoaderOptions { batch_size: 5, ..LoaderOptions::default() })?;
    let (batches, report) = profile(|| loader.by_ref().count());
    assert_eq!(batches, 2);
    assert_eq!(row(&report, "Loader.next").calls, 2);
    let (sum, report) = profile(|| no_grad(|| Tensor::ones([3], DType::F32)? + 1.0));
    assert_eq!(sum?.to_vec::<f32>()?, [2.0; 3]);
    let add = row(&report, "add");
    assert_eq!((add.calls, add.flop, add.bytes), (1, 3, 24), "in place, read and written");
    Ok(())
}

#[test]
fn a_trace_is_json_that_viewers_load() -> Result<()> {
    let _alone = alone();
    let (done, report) = profile(|| {
        let _scope = profile_scope("part \"one\"");
        Tensor::ones([2, 3], DType::F32)?.exp()
    });
    done?;
    let folder = std::env::temp_dir().join(format!("kiln-profile-{}", std::process::id()));
    let path = folder.join("trace.json");
    report.write_chrome_trace(&path)?;
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_dir_all(folder).unwrap();
    let trace: serde_json::Value = serde_json::from_str(&text).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let spans: Vec<_> = events.iter().filter(|e| e["ph"] == "X").collect();
    let names: Vec<&str> = spans.iter().map(|e| e["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["part \"one\"", "full", "exp"]);
    for span in &spans {
        assert!(
            span["ts"].as_f64().unwrap() >= 0.0 && span["dur"].as_f64().unwrap() >= 0.0 && span["pid"].is_u64() && span["tid"].is_u64()
        );
    }
    assert_eq!(spans[2]["args"]["inputs"][0], "[2, 3] f32");
    assert!(spans[0]["ts"].as_f64() <= spans[1]["ts"].as_f64());
    assert!(events.iter().any(|e| e["ph"] == "M" && e["name"] == "thread_name"));
    Ok(())
}
