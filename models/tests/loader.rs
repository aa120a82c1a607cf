//! The loader's promises: order, batches, exact resumption, errors, shutdown.

use kiln_models::data::{Dataset, Loader, LoaderOptions, LoaderState, Rng};
use kiln_tensor::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Batches of (sample numbers, one augmentation draw); can fail, panic and count its calls.
#[derive(Clone, Default)]
struct Numbers {
    len: usize,
    fail_at: Option<usize>,
    panic_at: Option<usize>,
    calls: Arc<AtomicUsize>,
}

impl Dataset for Numbers {
    type Batch = (Vec<usize>, u64);

    fn len(&self) -> usize {
        self.len
    }

    fn batch(&self, indices: &[usize], rng: &mut Rng) -> Result<Self::Batch> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        if self.fail_at.is_some_and(|i| indices.contains(&i)) {
            return Err(Error::argument("numbers", "no such sample"));
        }
        assert!(!self.panic_at.is_some_and(|i| indices.contains(&i)), "a broken data set");
        Ok((indices.to_vec(), rng.next_u64()))
    }
}

fn numbers(len: usize) -> Numbers {
    Numbers { len, ..Default::default() }
}

fn options(batch_size: usize, prefetch: usize) -> LoaderOptions {
    LoaderOptions { batch_size, prefetch, seed: 5, ..Default::default() }
}

fn epoch(loader: &mut Loader<Numbers>) -> Vec<(Vec<usize>, u64)> {
    loader.map(|batch| batch.unwrap()).collect()
}

#[test]
fn each_epoch_is_a_permutation_of_its_own_whatever_the_prefetch() {
    let mut reference = None;
    for prefetch in [0, 1, 2, 7] {
        let mut loader = Loader::new(numbers(103), options(10, prefetch)).unwrap();
        let epochs: Vec<_> = (0..3).map(|_| epoch(&mut loader)).collect();
        for batches in &epochs {
            assert_eq!(batches.len(), 11);
            let mut all: Vec<usize> = batches.iter().flat_map(|b| b.0.clone()).collect();
            all.sort_unstable();
            assert_eq!(all, (0..103).collect::<Vec<_>>());
        }
        assert_ne!(epochs[0], epochs[1]);
        assert_eq!(*reference.get_or_insert_with(|| epochs.clone()), epochs);
    }
}

#[test]
fn drop_last_and_order_without_shuffling() {
    let plain = LoaderOptions { shuffle: false, drop_last: true, ..options(4, 2) };
    let mut loader = Loader::new(numbers(10), plain).unwrap();
    assert_eq!(loader.batches(), 2);
    let batches: Vec<_> = epoch(&mut loader).into_iter().map(|b| b.0).collect();
    assert_eq!(batches, [[0, 1, 2, 3], [4, 5, 6, 7]]);
    let mut empty = Loader::new(numbers(0), options(4, 2)).unwrap();
    assert!(empty.next().is_none() && empty.next().is_none());
    assert!(Loader::new(numbers(1), options(0, 0)).is_err());
}

#[test]
fn resumes_at_every_batch_exactly() {
    for prefetch in [0, 3] {
        let mut whole = Loader::new(numbers(25), options(4, prefetch)).unwrap();
        let all: Vec<_> = (0..2).map(|_| epoch(&mut whole)).collect();
        for stop in 0..=7 {
            let mut first = Loader::new(numbers(25), options(4, prefetch)).unwrap();
            let head: Vec<_> = first.by_ref().take(stop).map(|b| b.unwrap()).collect();
            let state = first.state();
            drop(first);
            let mut second = Loader::new(numbers(25), options(4, prefetch)).unwrap();
            second.resume(state).unwrap();
            let tail = epoch(&mut second);
            assert_eq!([head, tail].concat(), all[0], "stopped after {stop}");
            assert_eq!(epoch(&mut second), all[1]);
        }
    }
}

#[test]
fn resume_goes_back_and_refuses_what_does_not_fit() {
    let mut loader = Loader::new(numbers(25), options(4, 2)).unwrap();
    let start = loader.state();
    let first = epoch(&mut loader);
    loader.resume(start).unwrap();
    assert_eq!(epoch(&mut loader), first);
    for wrong in [
        LoaderState { seed: 6, ..start },
        LoaderState { samples: 26, ..start },
        LoaderState { batch_size: 5, ..start },
        LoaderState { batch: 8, ..start },
        LoaderState { batch: u64::MAX, ..start },
    ] {
        assert!(loader.resume(wrong).is_err(), "{wrong:?}");
    }
    loader.resume(LoaderState { epoch: u64::MAX, batch: 7, ..start }).unwrap();
    assert!(loader.next().is_none());
}

#[test]
fn errors_and_panics_arrive_in_their_place() {
    for prefetch in [0, 2] {
        let broken = Numbers { fail_at: Some(5), panic_at: Some(9), ..numbers(12) };
        let mut loader = Loader::new(broken, LoaderOptions { shuffle: false, ..options(4, prefetch) }).unwrap();
        assert!(loader.next().unwrap().is_ok());
        assert_eq!(loader.next().unwrap().unwrap_err().to_string(), "numbers: no such sample");
        let panic = loader.next().unwrap().unwrap_err().to_string();
        assert_eq!(panic, "loader: the data set panicked at batch 2 of epoch 0: a broken data set");
        assert!(loader.next().is_none());
        assert!(loader.next().unwrap().is_ok());
    }
}

#[test]
fn the_queue_is_bounded_and_an_early_drop_ends_the_thread() {
    let data = numbers(1_000_000);
    let mut loader = Loader::new(data.clone(), options(1, 4)).unwrap();
    loader.next().unwrap().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert!(data.calls.load(Ordering::SeqCst) <= 1 + 4, "{} batches made for one taken", data.calls.load(Ordering::SeqCst));
    drop(loader);
    // The thread's data set is gone with the thread: only ours is left.
    assert_eq!(Arc::strong_count(&data.calls), 1);
}
