//! What training programs show: grids of pictures, curves, tables of metrics, progress bars. Everything is drawn without
//! system libraries or fonts.

mod grid;
mod interrupt;
mod metrics;
mod plot;
mod progress;

pub use grid::{save_captioned_grid, save_grid};
pub use interrupt::stop_on_ctrl_c;
pub use metrics::MetricsCsv;
pub use plot::{Cloud, Curve, plot_clouds, plot_curves};
pub use progress::Progress;

use image::{ImageFormat, RgbImage};
use kiln_tensor::{Error, Result};
use std::path::Path;

/// Makes the folder that `path` will be written to.
fn make_parent(op: &str, path: &Path) -> Result<()> {
    match path.parent() {
        Some(folder) => std::fs::create_dir_all(folder).map_err(|e| Error::io(op, folder.display(), e)),
        None => Ok(()),
    }
}

fn save_png(op: &str, path: &Path, pixels: &RgbImage) -> Result<()> {
    make_parent(op, path)?;
    pixels.save_with_format(path, ImageFormat::Png).map_err(|e| Error::format(op, format!("{}: {e}", path.display())))
}
