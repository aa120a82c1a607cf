//! Pictures in files, and as tensors.

use image::imageops::FilterType;
use image::{DynamicImage, ImageReader, RgbImage};
use kiln_tensor::{DType, Error, Result, Tensor};
use std::path::Path;

/// The most pixels of a picture that is read.
const MAX_PIXELS: u64 = 1 << 28;

/// Reads a PNG or JPEG as (1, 3, H, W) in [−1, 1].
///
/// # Errors
/// If the file is missing, corrupt, or no picture.
pub fn load_picture(path: impl AsRef<Path>) -> Result<Tensor> {
    let path = path.as_ref();
    let wrong = |e: image::ImageError| Error::format("load_picture", format!("{}: {e}", path.display()));
    let open = || ImageReader::open(path).and_then(ImageReader::with_guessed_format);
    let (width, height) = open().map_err(|e| Error::io("load_picture", path.display(), e))?.into_dimensions().map_err(wrong)?;
    if u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(Error::format("load_picture", format!("{}: {width}×{height} pixels are too many", path.display())));
    }
    let picture = open().map_err(|e| Error::io("load_picture", path.display(), e))?.decode().map_err(wrong)?;
    to_tensor(&picture.to_rgb8())
}

fn to_tensor(picture: &RgbImage) -> Result<Tensor> {
    let (w, h) = (picture.width() as usize, picture.height() as usize);
    let values: Vec<f32> = picture.as_raw().iter().map(|&pixel| f32::from(pixel) / 127.5 - 1.0).collect();
    Tensor::from_vec(values, [h, w, 3])?.permute(&[2, 0, 1])?.unsqueeze(0)?.contiguous()
}

/// The pixels of a picture (1, 3, H, W) in [−1, 1], row by row, with its height and width: ½ (x + 1) · 255, rounded.
///
/// # Errors
/// If the shape is another one.
pub fn picture_bytes(picture: &Tensor) -> Result<(Vec<u8>, [usize; 2])> {
    let [b, c, h, w] = picture.dims_n("picture")?;
    if b != 1 || c != 3 {
        return Err(Error::shape("picture", format!("expected (1, 3, H, W), got {}", picture.shape())));
    }
    let rows = picture.detach().to_dtype(DType::F32)?.squeeze(0)?.permute(&[1, 2, 0])?.contiguous()?.to_vec::<f32>()?;
    Ok((rows.into_iter().map(|x| ((x + 1.0) * 127.5).round_ties_even().clamp(0.0, 255.0) as u8).collect(), [h, w]))
}

/// A picture (1, 1 or 3, H, W) in [−1, 1] at another size, by Lanczos' filter on 8-bit values, as `diffusers` resizes.
///
/// # Errors
/// If the shape is another one.
pub fn resize_picture(picture: &Tensor, [height, width]: [usize; 2]) -> Result<Tensor> {
    let [b, c, h, w] = picture.dims_n("resize")?;
    if [h, w] == [height, width] {
        return Ok(picture.clone());
    }
    if b != 1 || !(c == 1 || c == 3) || h * w == 0 {
        return Err(Error::shape("resize", format!("expected (1, 1 or 3, H, W), got {}", picture.shape())));
    }
    let (bytes, _) = picture_bytes(&picture.expand([1, 3, h, w])?)?;
    let size = |n: usize| u32::try_from(n).ok().filter(|n| *n < 1 << 16);
    let sizes = (size(h), size(w), size(height), size(width));
    let (Some(h), Some(w), Some(height), Some(width)) = sizes else {
        return Err(Error::shape("resize", format!("{} to {height}×{width} is too large", picture.shape())));
    };
    let pixels = RgbImage::from_raw(w, h, bytes).ok_or_else(|| Error::shape("resize", "the pixels do not fill the picture"))?;
    let resized = DynamicImage::from(pixels).resize_exact(width, height, FilterType::Lanczos3).to_rgb8();
    let resized = to_tensor(&resized)?;
    if c == 1 { resized.narrow(1, 0, 1) } else { Ok(resized) }
}
