//! The one test harness of operations. `cases/` lists them, a file a room; `harness` is what each case goes through:
//!
//! - forward in f64 against a plain scalar reference, then in every other dtype against the reference at the rounded inputs;
//! - gradients in every float dtype against those in f64, which `gradcheck` and `gradgradcheck` hold against differences;
//! - the same results from transposed, strided, broadcast and channels-last inputs;
//! - the same bits on 1, 2 and 7 threads;
//! - special values where the case says so.
//!
//! Run it at each level: `KILN_ISA=scalar|avx2|avx512 cargo test -p kiln-autograd --test ops`; on a GPU with `KILN_TEST_DEVICE=cuda`, and with
//! `KILN_CUDA=emulate` beside it on the emulator of one. There an operation fails that the host would compute.

mod cases;
mod harness;
mod reference;

/// Every public function of `tensor/src/ops/` is the subject of a case, or is excused here with a reason.
#[test]
fn every_operation_is_listed() {
    let listed = cases::all().into_iter().flat_map(|case| case.names).collect::<std::collections::BTreeSet<_>>();
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tensor/src/ops");
    let missing: Vec<String> = harness::public_functions(&root)
        .into_iter()
        .filter(|name| !listed.contains(name.as_str()) && !cases::EXCUSED.iter().any(|(n, _)| n == name))
        .collect();
    assert!(missing.is_empty(), "operations without a case in autograd/tests/ops/cases: {missing:?}");
}
