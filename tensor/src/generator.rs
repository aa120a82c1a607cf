//! Where randomness comes from: counters. A draw of `n` numbers is a pure function of (seed, offset); a [`Generator`]
//! only hands out offsets.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// The state of a generator: enough to draw the same numbers again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GeneratorState {
    /// The key of the counter-based generator.
    pub seed: u64,
    /// The next group of counters that was not handed out. A group is 16 counters, which give 64 words of 32 bits
    /// (see [`kiln_kernels::cpu::random`]).
    pub offset: u64,
}

/// A source of random numbers. Clones share one state.
#[derive(Clone, Debug)]
pub struct Generator(Arc<Mutex<GeneratorState>>);

impl Generator {
    /// A generator that starts at the beginning of the stream of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(GeneratorState { seed, offset: 0 })))
    }

    /// The generator that operations use when none is given.
    pub fn global() -> &'static Generator {
        static GLOBAL: OnceLock<Generator> = OnceLock::new();
        GLOBAL.get_or_init(|| Generator::new(0))
    }

    /// The state, to save.
    pub fn state(&self) -> GeneratorState {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Continues from a saved state.
    pub fn set_state(&self, state: GeneratorState) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// Restarts the stream with a new seed.
    pub fn manual_seed(&self, seed: u64) {
        self.set_state(GeneratorState { seed, offset: 0 });
    }

    /// Takes `groups` groups of counters out of the stream and returns the state that they start at.
    pub fn reserve(&self, groups: u64) -> GeneratorState {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let start = *state;
        DRAWS.with_borrow_mut(|draws| {
            if let Some(draws) = draws
                && !draws.iter().any(|(g, _)| Arc::ptr_eq(&g.0, &self.0))
            {
                draws.push((self.clone(), start));
            }
        });
        state.offset = state.offset.wrapping_add(groups);
        start
    }
}

/// Seeds the global generator: what follows draws the same numbers every time.
pub fn manual_seed(seed: u64) {
    Generator::global().manual_seed(seed);
}

thread_local! {
    /// The generators that were drawn from since recording began, each with its state before the first draw.
    static DRAWS: RefCell<Option<Vec<(Generator, GeneratorState)>>> = const { RefCell::new(None) };
}

/// Which generators a computation drew from, and their states before it: to run it again with the same numbers.
#[derive(Clone, Debug, Default)]
pub struct DrawLog(Vec<(Generator, GeneratorState)>);

impl DrawLog {
    /// Runs `f` and notes what it draws from in this thread.
    pub fn record<R>(f: impl FnOnce() -> R) -> (R, DrawLog) {
        struct Restore(Option<Vec<(Generator, GeneratorState)>>);
        impl Drop for Restore {
            fn drop(&mut self) {
                // An enclosing recording must see these draws too.
                let outer = self.0.take();
                let inner = DRAWS.replace(outer);
                for (generator, state) in inner.into_iter().flatten() {
                    DRAWS.with_borrow_mut(|draws| {
                        if let Some(draws) = draws
                            && !draws.iter().any(|(g, _)| Arc::ptr_eq(&g.0, &generator.0))
                        {
                            draws.push((generator, state));
                        }
                    });
                }
            }
        }
        let _restore = Restore(DRAWS.replace(Some(Vec::new())));
        let result = f();
        let log = DRAWS.with_borrow(|draws| DrawLog(draws.clone().unwrap_or_default()));
        (result, log)
    }

    /// Runs `f` with every noted generator set back to its state before the recorded run; afterwards they continue from where they are now.
    pub fn replay<R>(&self, f: impl FnOnce() -> R) -> R {
        struct Restore(Vec<(Generator, GeneratorState)>);
        impl Drop for Restore {
            fn drop(&mut self) {
                for (generator, state) in &self.0 {
                    generator.set_state(*state);
                }
            }
        }
        let _restore = Restore(self.0.iter().map(|(g, _)| (g.clone(), g.state())).collect());
        for (generator, state) in &self.0 {
            generator.set_state(*state);
        }
        f()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replay_draws_from_the_same_place_and_leaves_no_trace() {
        let g = Generator::new(7);
        g.reserve(5);
        let (inner, log) = DrawLog::record(|| (g.reserve(3), g.reserve(2)));
        assert_eq!(g.reserve(1).offset, 10);
        assert_eq!(log.replay(|| (g.reserve(3), g.reserve(2))), inner);
        assert_eq!(g.state().offset, 11);
    }
}
