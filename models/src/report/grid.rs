//! Many small pictures in one file.

use image::RgbImage;
use kiln_tensor::{DType, Error, Result, Tensor};
use std::path::Path;

/// Pixels between pictures.
const GAP: u32 = 2;
/// Pictures are drawn at this many times their size, so that 28 pixels are seen on a modern screen.
const ZOOM: u32 = 3;

/// Writes `pictures` (N, C, H, W), C = 1 or 3, with values in [-1, 1], as a PNG of `columns` columns, row by row.
///
/// # Errors
/// If the shape is another one, or the file cannot be written. Values outside of the range are held to it.
pub fn save_grid(path: &Path, pictures: &Tensor, columns: usize) -> Result<()> {
    let [n, c, h, w] = pictures.dims_n("save_grid")?;
    if !(c == 1 || c == 3) || n == 0 || columns == 0 {
        return Err(Error::shape(
            "save_grid",
            format!("expected pictures (N, 1 or 3, H, W) in at least one column, got shape {}", pictures.shape()),
        ));
    }
    let values = pictures.detach().to_dtype(DType::F32)?.to_vec::<f32>()?;
    let extent = |count: usize, size: usize| {
        u32::try_from(size)
            .ok()
            .and_then(|s| u32::try_from(count).ok()?.checked_mul(s.checked_mul(ZOOM)?.checked_add(GAP)?)?.checked_add(GAP))
    };
    let size = extent(columns, w).zip(extent(n.div_ceil(columns), h)).filter(|(w, h)| u64::from(*w) * u64::from(*h) < 1 << 28);
    let (width, height) = size.ok_or_else(|| Error::shape("save_grid", format!("a grid of {} pictures is too large", pictures.shape())))?;
    let mut sheet = RgbImage::from_pixel(width, height, image::Rgb([40, 40, 40]));
    for (i, picture) in values.chunks_exact((c * h * w).max(1)).enumerate() {
        let left = GAP + (i % columns) as u32 * (w as u32 * ZOOM + GAP);
        let top = GAP + (i / columns) as u32 * (h as u32 * ZOOM + GAP);
        for y in 0..h as u32 * ZOOM {
            for x in 0..w as u32 * ZOOM {
                let at = (y / ZOOM) as usize * w + (x / ZOOM) as usize;
                let channel = |k: usize| ((picture[(k % c) * h * w + at] + 1.0) * 127.5).round().clamp(0.0, 255.0) as u8;
                sheet.put_pixel(left + x, top + y, image::Rgb([channel(0), channel(1), channel(2)]));
            }
        }
    }
    super::save_png("save_grid", path, &sheet)
}
