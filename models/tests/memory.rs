//! Training steps live in the memory of the first ones, but for small change. One test alone in its process, for the counts are the process's.

use kiln_models::gan::{GanLoss, GanTrainer, GanTrainerOptions};
use kiln_tensor::{DType, Generator, Result, memory_stats};

/// Pages that the system has mapped for this process so far, where it tells.
fn page_faults() -> usize {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name, which may hold spaces: state is field 3, minor faults field 10.
    let fields = stat.rsplit(')').next().unwrap_or_default();
    fields.split_whitespace().nth(7).and_then(|n| n.parse().ok()).unwrap_or(0)
}

#[test]
fn steps_after_the_first_ask_the_system_for_next_to_no_memory() -> Result<()> {
    const STEPS: usize = 60;
    /// Which thread runs which task changes from step to step, and the stack and small allocations of each must have been touched.
    const WARM_UP: usize = 40;
    let mut trainer = GanTrainer::new(GanTrainerOptions::new(GanLoss::Bce, None, 1))?;
    let real = Generator::new(3).randn([32, 1, 28, 28], DType::F32)?.tanh()?;
    let mut run = |steps: usize| -> Result<(usize, usize)> {
        let before = (memory_stats().system_allocations, page_faults());
        (0..steps).try_for_each(|_| trainer.step(&real, None).map(drop))?;
        Ok((memory_stats().system_allocations - before.0, page_faults() - before.1))
    };
    let (warm_up, _) = run(WARM_UP)?;
    assert!(warm_up > 0, "the allocator counts what it asks for");
    let (allocations, faults) = run(STEPS)?;
    // A step takes hundreds of buffers. Threads keep their last small ones, and a task that another thread runs this time may find none there.
    assert!(allocations < STEPS / 2, "{allocations} allocations from the system in {STEPS} steps");
    // The step's own memory is some thousand pages; fewer than one page a step is the small change of the threads' stacks.
    assert!(faults < STEPS, "{faults} page faults in {STEPS} steps");
    Ok(())
}
