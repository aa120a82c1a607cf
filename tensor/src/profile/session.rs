//! When profiles run: what they record goes to one log, of which each takes what began and ended in its time.

use super::report::Report;
use super::{Event, now};
use kiln_kernels::cpu::alloc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How many profiles are running. The one thing that an operation looks at.
static ACTIVE: AtomicUsize = AtomicUsize::new(0);

#[inline(always)]
pub(super) fn is_profiling() -> bool {
    ACTIVE.load(Relaxed) != 0
}

/// What the running profiles share.
struct Shared {
    events: Vec<Event>,
    /// Of each running profile its id, and the most memory in use before the allocator's count was last reset.
    peaks: Vec<(u64, usize)>,
    next_id: u64,
}

fn shared() -> MutexGuard<'static, Shared> {
    static SHARED: Mutex<Shared> = Mutex::new(Shared { events: Vec::new(), peaks: Vec::new(), next_id: 0 });
    SHARED.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Takes the allocator's peak over into the running profiles', and has it count anew.
    fn collect_peak(&mut self) {
        let peak = alloc::memory_stats().peak;
        alloc::reset_peak();
        self.peaks.iter_mut().for_each(|(_, most)| *most = peak.max(*most));
    }
}

pub(super) fn log(event: Event) {
    if is_profiling() {
        shared().events.push(event);
    }
}

/// Runs `f` and reports what ran meanwhile: on this thread and on all others.
///
/// Profiles nest, and may run on several threads at once: each reports all that began and ended in its own time, so what an inner one reports is in the
/// outer one's report, too. If `f` panics, the profile ends. Results are the same bits as without. The allocator's
/// [peak](crate::memory_stats) counts anew from here on.
///
/// ```
/// # use kiln_tensor::{Tensor, Result, profile::profile};
/// # fn main() -> Result<()> {
/// let a = Tensor::ones([64, 32], ())?;
/// let (product, report) = profile(|| a.matmul(&a.t()?));
/// assert_eq!(product?.dims(), [64, 64]);
/// let row = report.rows().into_iter().find(|row| row.name == "matmul").unwrap();
/// assert_eq!((row.calls, row.flop), (1, 2 * 64 * 32 * 64));
/// println!("{report}");
/// # Ok(()) }
/// ```
pub fn profile<R>(f: impl FnOnce() -> R) -> (R, Report) {
    let profiler = Profiler::start();
    let result = f();
    (result, profiler.stop())
}

/// A profile that runs from [`start`](Profiler::start) to [`stop`](Profiler::stop): [`profile`] where a closure does not fit. Dropping it ends it without
/// a report.
#[derive(Debug)]
#[must_use = "the profile ends when this is dropped"]
pub struct Profiler {
    id: u64,
    start: u64,
    /// Where the log stood.
    from: usize,
}

impl Profiler {
    /// Begins to record.
    pub fn start() -> Self {
        let mut shared = shared();
        shared.collect_peak();
        let id = shared.next_id;
        shared.next_id += 1;
        shared.peaks.push((id, 0));
        ACTIVE.fetch_add(1, Relaxed);
        Self { id, start: now(), from: shared.events.len() }
    }

    /// Ends the profile. What is still running on other threads is left out.
    pub fn stop(self) -> Report {
        let end = now();
        let mut shared = shared();
        shared.collect_peak();
        let peak = shared.peaks.iter().find(|(id, _)| *id == self.id).map_or(0, |(_, most)| *most);
        let events: Vec<Event> = shared.events[self.from..].iter().filter(|e| e.start >= self.start && e.end <= end).cloned().collect();
        drop(shared);
        Report::new(events, self.start, end, peak)
    }
}

impl Drop for Profiler {
    fn drop(&mut self) {
        let mut shared = shared();
        if let Some(own) = shared.peaks.iter().position(|(id, _)| *id == self.id) {
            shared.peaks.swap_remove(own);
        }
        if ACTIVE.fetch_sub(1, Relaxed) == 1 {
            shared.events = Vec::new();
        }
    }
}
