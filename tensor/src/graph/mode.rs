//! Whether operations are recorded, checked, or run for a second time: settings of the thread.

use crate::{Error, ErrorKind, Result, Tensor};
use kiln_kernels::element::Element;
use std::cell::Cell;
use std::marker::PhantomData;
use std::thread::LocalKey;

/// What [`record`](super::record) does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RecordMode {
    /// Records everything.
    On,
    /// Records nothing.
    Off,
    /// Records edges only and saves no tensor: finds what a computation depends on, at no cost in memory (`checkpoint`).
    EdgesOnly,
}

thread_local! {
    static MODE: Cell<RecordMode> = const { Cell::new(RecordMode::On) };
    static ANOMALY: Cell<bool> = const { Cell::new(false) };
    static RECOMPUTING: Cell<bool> = const { Cell::new(false) };
}

/// The thread's mode.
pub fn record_mode() -> RecordMode {
    MODE.get()
}

/// Whether operations on tracked tensors are recorded.
pub fn is_grad_enabled() -> bool {
    MODE.get() != RecordMode::Off
}

/// Sets the thread's mode until the guard is dropped.
#[must_use = "the mode ends when the guard is dropped"]
pub fn set_record_mode(mode: RecordMode) -> GradModeGuard {
    GradModeGuard { before: MODE.replace(mode), _not_send: PhantomData }
}

/// Restores the mode from before when dropped.
pub struct GradModeGuard {
    before: RecordMode,
    // The mode belongs to the thread, so the guard must stay there.
    _not_send: PhantomData<*const ()>,
}

impl Drop for GradModeGuard {
    fn drop(&mut self) {
        MODE.set(self.before);
    }
}

/// Sets a switch of the thread for the time of `f`, also if `f` panics.
fn scoped<R>(switch: &'static LocalKey<Cell<bool>>, on: bool, f: impl FnOnce() -> R) -> R {
    struct Restore(&'static LocalKey<Cell<bool>>, bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            self.0.set(self.1);
        }
    }
    let _restore = Restore(switch, switch.replace(on));
    f()
}

/// Runs `f` as the second run of something that was computed before: see [`is_recomputing`].
pub fn recomputing<R>(f: impl FnOnce() -> R) -> R {
    scoped(&RECOMPUTING, true, f)
}

/// Whether the thread computes again what it has computed before (`checkpoint`, in the backward pass). A layer that keeps count of
/// what it sees, such as batch norm, must not count then.
pub fn is_recomputing() -> bool {
    RECOMPUTING.get()
}

/// Runs `f` with anomaly mode on or off in this thread. When on, each operation checks its output, each derivative rule its
/// gradients: the first value that is not finite is an error that names the operation. Slow; for debugging.
pub fn anomaly_mode<R>(on: bool, f: impl FnOnce() -> R) -> R {
    scoped(&ANOMALY, on, f)
}

/// Whether anomaly mode is on in this thread.
pub fn is_anomaly_mode() -> bool {
    ANOMALY.get()
}

/// An error if `out` holds a value that is not finite; it says whether the inputs were finite.
pub(super) fn check_finite(name: &'static str, out: &Tensor, inputs: &[&Tensor]) -> Result<()> {
    let Some(value) = first_non_finite(out)? else { return Ok(()) };
    let mut from_input = false;
    for input in inputs {
        from_input |= first_non_finite(input)?.is_some();
    }
    let blame = if from_input { "an input was not finite already" } else { "all inputs were finite" };
    Err(Error::new(ErrorKind::Graph, name, format!("anomaly: the result of shape {} holds {value}; {blame}", out.shape())))
}

/// The first value of a float tensor that is not finite.
pub fn first_non_finite(t: &Tensor) -> Result<Option<f64>> {
    if !t.dtype().is_float() {
        return Ok(None);
    }
    let t = t.detach();
    for_float!(t.dtype(), "anomaly", T => {
        let values: Vec<T> = t.to_vec()?;
        Ok(values.into_iter().map(Element::to_f64).find(|v| !v.is_finite()))
    })
}
