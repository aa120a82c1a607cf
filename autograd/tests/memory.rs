//! What is freed when. Alone in its process, for the statistics are the process's.

use kiln_autograd::TensorExt;
use kiln_tensor::{DType, Result, Tensor, memory_stats};

#[test]
fn a_tensor_that_is_not_used_again_is_freed_at_once() -> Result<()> {
    const BYTES: usize = 8 << 20;
    let x = Tensor::ones([BYTES / 8], DType::F64)?;
    let before = memory_stats().in_use;
    let y = x.add(&x)?;
    assert!(memory_stats().in_use >= before + BYTES);
    drop(y);
    assert!(memory_stats().in_use < before + BYTES);
    // The backward pass frees what operations saved although `y` lives on.
    let x = x.requires_grad_()?;
    let y = x.exp()?.exp()?.exp()?.sum(())?;
    let held = memory_stats().in_use;
    y.backward()?;
    assert!(memory_stats().in_use + BYTES < held);
    Ok(())
}
