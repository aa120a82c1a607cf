//! Where randomness comes from: counters. A draw of `n` numbers is a pure function of (seed, offset); a [`Generator`]
//! only hands out offsets. A generator of PyTorch's kind ([`Generator::torch_cpu`]) draws one after the other, on the host.

use crate::torch_cpu::TorchCpu;
use crate::{Error, Result};
use std::cell::RefCell;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// The state of a generator: enough to draw the same numbers again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GeneratorState {
    /// The key of the counter-based generator. Of PyTorch's kind: the seed in the low 32 bits, above it whether a normal is left over.
    pub seed: u64,
    /// The next group of counters that was not handed out. A group is 16 counters, which give 64 words of 32 bits
    /// (see [`kiln_kernels::cpu::random`]). Of PyTorch's kind: the words of 32 bits that were drawn.
    pub offset: u64,
}

#[derive(Debug)]
enum Source {
    Counters(GeneratorState),
    TorchCpu(Box<TorchCpu>),
}

impl Source {
    fn state(&self) -> GeneratorState {
        match self {
            Self::Counters(state) => *state,
            Self::TorchCpu(generator) => generator.state(),
        }
    }
}

/// A source of random numbers. Clones share one state.
#[derive(Clone, Debug)]
pub struct Generator(Arc<Mutex<Source>>);

impl Generator {
    /// A generator that starts at the beginning of the stream of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(Source::Counters(GeneratorState { seed, offset: 0 }))))
    }

    /// PyTorch's generator on the CPU: draws what `torch.Generator().manual_seed(seed)` gives to `torch.rand` and `torch.randn` (of every float
    /// dtype, normals to rounding), `torch.randint` and `torch.randperm`, one after the other, whatever the device of the result. Seeds
    /// that agree in their low 32 bits are the same, as in PyTorch. Dropout and Bernoulli draws, which PyTorch makes in other ways on other
    /// machines, are errors.
    ///
    /// ```
    /// # use kiln_tensor::{DType, Generator, Result};
    /// # fn main() -> Result<()> {
    /// let latents = Generator::torch_cpu(0).randn([1, 4, 8, 8], DType::F32)?;
    /// assert!((latents.to_vec::<f32>()?[0] - -1.1258).abs() < 1e-4); // torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0))
    /// # Ok(()) }
    /// ```
    pub fn torch_cpu(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(Source::TorchCpu(Box::new(TorchCpu::new(seed))))))
    }

    /// The generator that operations use when none is given.
    pub fn global() -> &'static Generator {
        static GLOBAL: OnceLock<Generator> = OnceLock::new();
        GLOBAL.get_or_init(|| Generator::new(0))
    }

    fn source(&self) -> MutexGuard<'_, Source> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, to save.
    pub fn state(&self) -> GeneratorState {
        self.source().state()
    }

    /// Continues from a state that a generator of the same kind saved. PyTorch's kind goes there word by word: seconds for 10⁹ numbers.
    pub fn set_state(&self, state: GeneratorState) {
        match &mut *self.source() {
            Source::Counters(here) => *here = state,
            Source::TorchCpu(generator) => **generator = TorchCpu::at(state),
        }
    }

    /// Restarts the stream with a new seed.
    pub fn manual_seed(&self, seed: u64) {
        match &mut *self.source() {
            Source::Counters(here) => *here = GeneratorState { seed, offset: 0 },
            Source::TorchCpu(generator) => **generator = TorchCpu::new(seed),
        }
    }

    /// Takes `groups` groups of counters out of the stream and returns the state that they start at. PyTorch's kind gives that many words.
    pub fn reserve(&self, groups: u64) -> GeneratorState {
        let mut source = self.source();
        let start = source.state();
        self.note(start);
        match &mut *source {
            Source::Counters(state) => state.offset = state.offset.wrapping_add(groups),
            Source::TorchCpu(generator) => generator.skip(groups),
        }
        start
    }

    /// [`reserve`](Self::reserve) for an operation that draws by counters.
    ///
    /// # Errors
    /// If the generator is of PyTorch's kind.
    pub(crate) fn counters(&self, op: &str, groups: u64) -> Result<GeneratorState> {
        if matches!(&*self.source(), Source::TorchCpu(_)) {
            let message = "not drawn from a generator of PyTorch's kind (Generator::torch_cpu); use Generator::new";
            return Err(Error::argument(op, message));
        }
        Ok(self.reserve(groups))
    }

    /// What `draw` draws, if the generator is of PyTorch's kind.
    pub(crate) fn torch<R>(&self, draw: impl FnOnce(&mut TorchCpu) -> R) -> Option<R> {
        let mut source = self.source();
        let start = source.state();
        match &mut *source {
            Source::Counters(_) => None,
            Source::TorchCpu(generator) => {
                self.note(start);
                Some(draw(generator))
            }
        }
    }

    /// Tells a recording of this thread that something is drawn from here.
    fn note(&self, start: GeneratorState) {
        DRAWS.with_borrow_mut(|draws| {
            if let Some(draws) = draws
                && !draws.iter().any(|(g, _)| Arc::ptr_eq(&g.0, &self.0))
            {
                draws.push((self.clone(), start));
            }
        });
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

    #[test]
    fn so_does_one_of_pytorchs_kind() {
        let g = Generator::torch_cpu(7);
        let draw = |count: usize| g.randn([count], ()).unwrap().to_vec::<f32>().unwrap();
        draw(3);
        let (inner, log) = DrawLog::record(|| (draw(2), draw(20)));
        let after = (draw(1), g.state());
        assert_eq!(log.replay(|| (draw(2), draw(20))), inner);
        assert_eq!(g.state(), after.1);
    }
}
