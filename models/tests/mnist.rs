//! MNIST as a program meets it: real if `KILN_DATA` names it, generated otherwise.

use kiln_models::data::{Dataset, Loader, LoaderOptions, Mnist, Origin, Scale, Source};

#[test]
fn opens_and_batches_whatever_is_there() {
    let source = match std::env::var_os("KILN_DATA") {
        Some(_) => Source::Offline,
        None => Source::Generated { seed: 1, train: 2_000, test: 500 },
    };
    let mnist = Mnist::open(source.clone()).unwrap();
    println!("{mnist}");
    if source == Source::Offline {
        assert!(matches!(mnist.origin, Origin::Environment(_)), "KILN_DATA is set and holds no MNIST: {mnist}");
    }
    assert!(mnist.train.len() >= 2_000 && mnist.test.len() >= 500);
    for set in [&mnist.train, &mnist.test] {
        let mut counts = [0; 10];
        set.labels().iter().for_each(|&label| counts[usize::from(label)] += 1);
        // In the published test images the rarest digit, 5, has 8.9 %, and less in a tenth of them.
        assert!(counts.iter().all(|&count| count * 15 > set.len()), "{counts:?}");
    }
    let mut loader = Loader::new(mnist.train.with_scale(Scale::Signed), LoaderOptions::default()).unwrap();
    let batch = loader.next().unwrap().unwrap();
    assert_eq!((batch.images.dims(), batch.labels.dims()), (&[128, 1, 28, 28][..], &[128][..]));
    let pixels = batch.images.to_vec::<f32>().unwrap();
    assert!(pixels.iter().all(|p| (-1.0..=1.0).contains(p)) && pixels.contains(&-1.0));
}
