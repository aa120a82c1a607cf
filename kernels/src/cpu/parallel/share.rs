//! The hand-over of work: the caller runs tasks at once, and threads of the current rayon pool join in when they come.
//!
//! A thread outside of a pool that used rayon's own iterators would sleep until two others had woken up, done everything and woken it again:
//! tens of microseconds, more than most small operations take. Here nobody waits for a thread to wake. Helpers that have finished look for
//! the next job for a while ([`LINGER`]) before they go back to rayon, so that the operations of a training step find them awake.
//!
//! The caller takes the tasks of its own share first, helpers those behind it, both in ascending order: as one operation follows another, a
//! thread finds in its cache what it wrote itself (fetching it from another core's would cost more than the second thread gains on sizes that
//! fit a cache), and each walks through memory as the hardware expects. Who is done goes on with the far end of the others' tasks.

use std::any::Any;
use std::cell::Cell;
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a helper looks for another job: longer than the gaps between the operations of a training step.
const LINGER: Duration = Duration::from_micros(100);

/// Looks at [`POSTS`] between two offers of the processor to others.
const LOOKS: usize = 64;

/// How long a thread that has called helpers waits before it calls more: by then they are awake, or their pool has no thread to spare.
const WAKING: Duration = Duration::from_micros(50);

/// The latest job.
static LATEST: Mutex<Option<Arc<Job>>> = Mutex::new(None);

/// How many jobs were posted in [`LATEST`]: what helpers look at.
static POSTS: AtomicUsize = AtomicUsize::new(0);

/// How many helpers are at work or looking for it.
static AWAKE: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Whether this thread is a helper further up its stack.
    static SERVES: Cell<bool> = const { Cell::new(false) };
    /// When this thread last called helpers.
    static CALLED: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Set in [`Job::state`] once the caller has returned or is about to.
const CLOSED: usize = 1 << (usize::BITS - 1);

/// Who takes which task when.
#[derive(Clone, Copy)]
struct Order {
    count: usize,
    /// How many tasks are the caller's share: the first ones.
    own: usize,
}

impl Order {
    /// The `i`th task of the caller: those of its share, and then the others from the last one down.
    fn of_caller(self, i: usize) -> usize {
        if i < self.own { i } else { self.count - 1 - (i - self.own) }
    }

    /// The `i`th task of all helpers: those behind the caller's share, and then the share's from its last one down.
    fn of_helpers(self, i: usize) -> usize {
        if i < self.count - self.own { self.own + i } else { self.count - 1 - i }
    }
}

/// Tasks `0..count` of one call of [`share`].
struct Job {
    /// Borrowed from the caller; valid while the job is open or has helpers.
    f: *const (dyn Fn(usize) + Sync),
    order: Order,
    /// How many tasks were taken.
    taken: AtomicUsize,
    /// How many of them by helpers.
    helped: AtomicUsize,
    /// How many helpers may still join.
    places: AtomicUsize,
    /// How many helpers are at work, and [`CLOSED`].
    state: AtomicUsize,
    /// What the first task that panicked said.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `f` may be called from any thread, and `Job::help` shows that it is alive; the rest is Send and Sync by itself.
unsafe impl Send for Job {}
// SAFETY: as above.
unsafe impl Sync for Job {}

/// A poisoned lock is as good as any: no code panics while it holds one.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Job {
    /// Takes tasks until none is left, as the one `CALLER` or as a helper.
    ///
    /// # Safety
    /// `f` must be alive.
    unsafe fn work<const CALLER: bool>(&self) {
        // SAFETY: the caller's contract.
        let f = unsafe { &*self.f };
        let tasks = || {
            let mut called = 0;
            // Whoever is counted among the first `count` has a task: one order is the other's reverse, and both together take no more than that.
            while self.taken.fetch_add(1, Ordering::Relaxed) < self.order.count {
                if CALLER {
                    f(self.order.of_caller(called));
                    called += 1;
                } else {
                    f(self.order.of_helpers(self.helped.fetch_add(1, Ordering::Relaxed)));
                }
            }
        };
        if let Err(payload) = catch_unwind(AssertUnwindSafe(tasks)) {
            self.taken.store(self.order.count, Ordering::Relaxed);
            lock(&self.panic).get_or_insert(payload);
        }
    }

    /// Takes tasks if there is a place for another helper, and any task left.
    fn help(&self) {
        let leave = |places: usize| places.checked_sub(1);
        if self.taken.load(Ordering::Relaxed) >= self.order.count
            || self.places.fetch_update(Ordering::Relaxed, Ordering::Relaxed, leave).is_err()
        {
            return;
        }
        let enter = |state: usize| (state & CLOSED == 0).then_some(state + 1);
        if self.state.fetch_update(Ordering::Acquire, Ordering::Relaxed, enter).is_ok() {
            // SAFETY: the job was open as this helper came in, so its caller waits for it to leave before `f` goes.
            unsafe { self.work::<false>() };
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits until no helper is at work; none comes in any more.
    fn close(&self) {
        self.state.fetch_or(CLOSED, Ordering::Relaxed);
        let mut looks = 0usize;
        while self.state.load(Ordering::Acquire) != CLOSED {
            looks += 1;
            // A helper that has lost its processor needs one to come to an end.
            if looks.is_multiple_of(1 << 10) { std::thread::yield_now() } else { spin_loop() }
        }
    }
}

/// Calls `f(i)` for each `i < count` on this thread and on others of the current pool. A panic of a task goes on in the caller.
pub(super) fn share(count: usize, f: &(dyn Fn(usize) + Sync)) {
    let helpers = super::threads().min(count).saturating_sub(1);
    // SAFETY: only the lifetime changes. `close` returns after the last use of `f`, and nothing between here and there can unwind.
    let f = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(f) };
    let job = Arc::new(Job {
        f,
        order: Order { count, own: count / (helpers + 1) },
        taken: AtomicUsize::new(0),
        helped: AtomicUsize::new(0),
        places: AtomicUsize::new(helpers),
        state: AtomicUsize::new(0),
        panic: Mutex::new(None),
    });
    *lock(&LATEST) = Some(job.clone());
    POSTS.fetch_add(1, Ordering::Release);
    // A caller that is a helper further up its stack does not look for jobs now.
    call_helpers(helpers.saturating_sub(AWAKE.load(Ordering::Relaxed).saturating_sub(usize::from(SERVES.get()))));
    // SAFETY: `f` is borrowed until this function returns.
    unsafe { job.work::<true>() };
    job.close();
    if let Some(payload) = lock(&job.panic).take() {
        resume_unwind(payload);
    }
}

/// Asks the current pool for `count` more helpers.
fn call_helpers(count: usize) {
    if count == 0 || CALLED.get().is_some_and(|at| at.elapsed() < WAKING) {
        return;
    }
    CALLED.set(Some(Instant::now()));
    (0..count).for_each(|_| rayon::spawn(serve));
}

/// Helps with the latest job and those that are posted soon after; meanwhile, does what else the pool has to do.
fn serve() {
    if SERVES.replace(true) {
        return;
    }
    AWAKE.fetch_add(1, Ordering::Relaxed);
    let mut seen = None;
    let mut since = Instant::now();
    while since.elapsed() < LINGER {
        for _ in 0..LOOKS {
            let posts = POSTS.load(Ordering::Acquire);
            if seen != Some(posts) {
                seen = Some(posts);
                let job = lock(&LATEST).clone();
                if let Some(job) = job {
                    job.help();
                }
                since = Instant::now();
            }
            spin_loop();
        }
        if rayon::yield_now() != Some(rayon::Yield::Executed) {
            std::thread::yield_now();
        }
    }
    AWAKE.fetch_sub(1, Ordering::Relaxed);
    SERVES.set(false);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn one_order_is_the_others_reverse() {
        for count in 1..20 {
            for own in 0..=count {
                let order = Order { count, own };
                let callers: Vec<usize> = (0..count).map(|i| order.of_caller(i)).collect();
                let helpers: Vec<usize> = (0..count).rev().map(|i| order.of_helpers(i)).collect();
                assert_eq!(callers, helpers, "{own} of {count}");
                let mut sorted = callers;
                sorted.sort_unstable();
                assert!(sorted.into_iter().eq(0..count));
            }
        }
    }

    #[test]
    fn every_task_runs_once() {
        for threads in [2, 7] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for count in [1, 2, 3, 100, 10_000] {
                for _ in 0..20 {
                    let runs: Vec<AtomicU32> = (0..count).map(|_| AtomicU32::new(0)).collect();
                    let task = |i: usize| {
                        runs[i].fetch_add(1, Ordering::Relaxed);
                    };
                    pool.install(|| share(count, &task));
                    share(count, &task);
                    assert!(runs.iter().all(|n| n.load(Ordering::Relaxed) == 2));
                }
            }
        }
    }

    #[test]
    fn tasks_may_share_work_themselves() {
        let total = AtomicU32::new(0);
        share(50, &|_| {
            share(50, &|_| {
                total.fetch_add(1, Ordering::Relaxed);
            })
        });
        assert_eq!(total.into_inner(), 2500);
    }

    #[test]
    fn callers_on_many_threads_get_their_own_results() {
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for count in 1..300 {
                        let sum = AtomicUsize::new(0);
                        share(count, &|i| {
                            sum.fetch_add(i, Ordering::Relaxed);
                        });
                        assert_eq!(sum.into_inner(), count * (count - 1) / 2);
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_leaves_the_pool_usable() {
        for _ in 0..20 {
            let caught = catch_unwind(|| share(100, &|i| assert!(i != 60, "task 60")));
            let message = caught.unwrap_err();
            assert_eq!(message.downcast_ref::<&str>(), Some(&"task 60"));
        }
        let sum = AtomicUsize::new(0);
        share(10, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }
}
