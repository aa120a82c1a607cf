//! Work that is recorded once and queued again at the cost of one call, and points in the queue to measure time between.

use super::error::CudaError;
use super::gpu::Gpu;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Recorded work of a GPU: the same kernels on the same memory, each time it is replayed.
pub struct Graph {
    gpu: &'static Gpu,
    handle: u64,
    pool: u64,
}

impl Gpu {
    /// Records what `f` queues, without running it. Memory that `f` takes stays the graph's: tensors that it returns hold new values
    /// after each replay. No other thread may use the GPU meanwhile, and `f` must not copy from or to the host.
    ///
    /// A replay is the same work: its random numbers are those of the first run, and an optimiser's step keeps its number. It reads and writes
    /// the memory that `f` did, so the tensors that `f` used must live as long as the graph, as they are. Of a tensor that a replay writes, a
    /// copy that the host holds since it was printed, saved or read as a slice stays the old one.
    ///
    /// # Errors
    /// If `f` fails, or queues what cannot be recorded.
    pub fn capture<R, E: From<CudaError>>(&'static self, f: impl FnOnce() -> Result<R, E>) -> Result<(Graph, R), E> {
        static POOLS: AtomicU64 = AtomicU64::new(1);
        self.make_current()?;
        self.backend().begin_capture()?;
        let pool = POOLS.fetch_add(1, Relaxed);
        let mut recording = Recording { gpu: self, pool, before: self.set_pool(pool), is_over: false };
        let result = f();
        // A graph of what failed is dropped, and its memory with it.
        let graph = recording.end();
        let result = result?;
        Ok((graph?, result))
    }

    /// The point in the queue after all that was queued until now.
    pub fn event(&'static self) -> Result<Event, CudaError> {
        self.make_current()?;
        Ok(Event { gpu: self, handle: self.backend().event()? })
    }
}

/// A capture that is going on; dropped by a panic, it ends and leaves nothing behind.
struct Recording {
    gpu: &'static Gpu,
    pool: u64,
    before: u64,
    is_over: bool,
}

impl Recording {
    fn end(&mut self) -> Result<Graph, CudaError> {
        self.is_over = true;
        self.gpu.set_pool(self.before);
        match self.gpu.backend().end_capture() {
            Ok(handle) => Ok(Graph { gpu: self.gpu, handle, pool: self.pool }),
            Err(error) => {
                let _ = self.gpu.free_pool(self.pool);
                Err(error)
            }
        }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if !self.is_over {
            let _ = self.end();
        }
    }
}

impl Graph {
    /// Queues the recorded work once more.
    pub fn replay(&self) -> Result<(), CudaError> {
        self.gpu.make_current()?;
        self.gpu.backend().replay(self.handle)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // Replays may still be queued; what fails here has failed there already.
        let _ = self.gpu.synchronize();
        self.gpu.backend().drop_graph(self.handle);
        let _ = self.gpu.free_pool(self.pool);
    }
}

/// A point in a GPU's queue.
#[derive(Debug)]
pub struct Event {
    gpu: &'static Gpu,
    handle: u64,
}

impl Event {
    /// Milliseconds of GPU time from this point to a later one; waits until that one is reached.
    pub fn elapsed_ms(&self, later: &Event) -> Result<f32, CudaError> {
        self.gpu.make_current()?;
        self.gpu.backend().elapsed_ms(self.handle, later.handle)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        self.gpu.backend().drop_event(self.handle);
    }
}
