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
    /// # Errors
    /// If `f` fails, or queues what cannot be recorded.
    pub fn capture<R, E: From<CudaError>>(&'static self, f: impl FnOnce() -> Result<R, E>) -> Result<(Graph, R), E> {
        static POOLS: AtomicU64 = AtomicU64::new(1);
        let pool = POOLS.fetch_add(1, Relaxed);
        self.make_current()?;
        self.backend().begin_capture()?;
        let before = self.set_pool(pool);
        let result = f();
        self.set_pool(before);
        let handle = self.backend().end_capture();
        let result = result?;
        Ok((Graph { gpu: self, handle: handle?, pool }, result))
    }

    /// The point in the queue after all that was queued until now.
    pub fn event(&'static self) -> Result<Event, CudaError> {
        self.make_current()?;
        Ok(Event { gpu: self, handle: self.backend().event()? })
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
