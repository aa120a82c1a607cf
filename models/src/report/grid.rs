//! Many small pictures in one file.

use image::RgbImage;
use kiln_tensor::{DType, Error, Result, Tensor};
use std::path::Path;

/// Pixels between pictures.
const GAP: u32 = 2;
/// Pictures are drawn at this many times their size, so that 28 pixels are seen on a modern screen.
const ZOOM: u32 = 3;

/// Height of a line of text above a row, and of its letters.
const LINE: (u32, u32) = (20, 15);
/// The sheet's own colour.
const GROUND: image::Rgb<u8> = image::Rgb([40, 40, 40]);

/// Writes `pictures` (N, C, H, W), C = 1 or 3, with values in [-1, 1], as a PNG of `columns` columns, row by row.
///
/// # Errors
/// If the shape is another one, or the file cannot be written. Values outside of the range are held to it.
pub fn save_grid(path: &Path, pictures: &Tensor, columns: usize) -> Result<()> {
    super::save_png("save_grid", path, &sheet("save_grid", pictures, columns, 0)?)
}

/// As [`save_grid`], with a line of text above each row: what the pictures in it were to show. Rows beyond `lines` have none; text that
/// is wider than the grid is cut.
///
/// # Errors
/// As [`save_grid`].
pub fn save_captioned_grid<S: AsRef<str>>(path: &Path, pictures: &Tensor, columns: usize, lines: &[S]) -> Result<()> {
    const OP: &str = "save_captioned_grid";
    let mut sheet = sheet(OP, pictures, columns, LINE.0)?;
    let height = pictures.dim(2)? as u32 * ZOOM + GAP + LINE.0;
    let rows = pictures.dim(0)?.div_ceil(columns);
    for (row, line) in lines.iter().take(rows).enumerate() {
        let at = (GAP as i32 + 2, (GAP + row as u32 * height) as i32);
        super::plot::write_text(&mut sheet, line.as_ref(), at, LINE.1).map_err(|e| Error::format(OP, e.to_string()))?;
    }
    super::save_png(OP, path, &sheet)
}

/// The pictures, with `above` pixels above each row.
fn sheet(op: &str, pictures: &Tensor, columns: usize, above: u32) -> Result<RgbImage> {
    let [n, c, h, w] = pictures.dims_n(op)?;
    if !(c == 1 || c == 3) || n == 0 || columns == 0 {
        return Err(Error::shape(
            op,
            format!("expected pictures (N, 1 or 3, H, W) in at least one column, got shape {}", pictures.shape()),
        ));
    }
    let values = pictures.detach().to_dtype(DType::F32)?.to_vec::<f32>()?;
    let extent = |count: usize, size: usize, more: u32| {
        let each = u32::try_from(size).ok()?.checked_mul(ZOOM)?.checked_add(GAP + more)?;
        u32::try_from(count).ok()?.checked_mul(each)?.checked_add(GAP)
    };
    let size = extent(columns, w, 0).zip(extent(n.div_ceil(columns), h, above));
    let size = size.filter(|(w, h)| u64::from(*w) * u64::from(*h) < 1 << 28);
    let (width, height) = size.ok_or_else(|| Error::shape(op, format!("a grid of {} pictures is too large", pictures.shape())))?;
    let mut sheet = RgbImage::from_pixel(width, height, GROUND);
    for (i, picture) in values.chunks_exact((c * h * w).max(1)).enumerate() {
        let left = GAP + (i % columns) as u32 * (w as u32 * ZOOM + GAP);
        let top = GAP + above + (i / columns) as u32 * (h as u32 * ZOOM + GAP + above);
        for y in 0..h as u32 * ZOOM {
            for x in 0..w as u32 * ZOOM {
                let at = (y / ZOOM) as usize * w + (x / ZOOM) as usize;
                let channel = |k: usize| ((picture[(k % c) * h * w + at] + 1.0) * 127.5).round().clamp(0.0, 255.0) as u8;
                sheet.put_pixel(left + x, top + y, image::Rgb([channel(0), channel(1), channel(2)]));
            }
        }
    }
    Ok(sheet)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caption_is_above_its_row() -> Result<()> {
        let folder = std::env::temp_dir().join(format!("kiln-grid-{}", std::process::id()));
        let path = folder.join("grid.png");
        let black = Tensor::full([4, 3, 32, 32], -1.0, ())?;
        save_captioned_grid(&path, &black, 2, &["first"])?;
        let sheet = image::open(&path).map_err(|e| Error::format("test", e.to_string()))?.to_rgb8();
        let row = 32 * ZOOM + GAP + LINE.0;
        assert_eq!(sheet.dimensions(), (2 * (32 * ZOOM + GAP) + GAP, 2 * row + GAP));
        let bright = |top: u32| (top..top + LINE.0).any(|y| (0..sheet.width()).any(|x| sheet.get_pixel(x, y).0[0] > 200));
        assert!(bright(GAP) && !bright(GAP + row));
        // What is below the text is the grid without it.
        assert_eq!(sheet.get_pixel(GAP, GAP + LINE.0).0, [0; 3]);
        assert!(save_captioned_grid(&path, &black, 0, &["first"]).is_err());
        assert!(save_captioned_grid(&path, &black.reshape([4, 3 * 32, 32])?, 2, &["first"]).is_err());
        std::fs::remove_dir_all(folder).map_err(|e| Error::io("test", "grid", e))
    }
}
