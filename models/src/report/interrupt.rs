//! Ctrl-C, for programs that save before they end.

use kiln_tensor::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// A flag that Ctrl-C raises; a second Ctrl-C ends the program at once.
///
/// # Errors
/// If something handles Ctrl-C already.
pub fn stop_on_ctrl_c() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let raised = flag.clone();
    ctrlc::set_handler(move || {
        if raised.swap(true, Relaxed) {
            std::process::exit(130);
        }
    })
    .map_err(|e| Error::argument("ctrl-c", e.to_string()))?;
    Ok(flag)
}
