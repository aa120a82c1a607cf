//! Pictures in files, and as tensors.

use crate::data::read_upright;
use image::imageops::FilterType;
use image::{DynamicImage, RgbImage};
use kiln_tensor::{DType, Error, Result, Tensor};
use std::path::Path;

/// Reads a PNG or JPEG as (1, 3, H, W) in [−1, 1], turned as its EXIF data says.
///
/// # Errors
/// If the file is missing, corrupt, or no picture, or claims more pixels than it can hold.
pub fn load_picture(path: impl AsRef<Path>) -> Result<Tensor> {
    let picture = read_upright(path.as_ref()).map_err(|e| e.at("load_picture"))?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use image::codecs::png::PngEncoder;
    use image::{ExtendedColorType, ImageEncoder};

    /// What reading a file of these bytes gives.
    fn load(bytes: &[u8]) -> Result<Tensor> {
        let path = std::env::temp_dir().join(format!("kiln-picture-{}.png", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        let picture = load_picture(&path);
        std::fs::remove_file(&path).unwrap();
        picture
    }

    #[test]
    fn pictures_are_turned_as_they_say_and_no_larger_than_their_files() {
        // A single entry, the orientation: to be turned clockwise.
        let entry = [0x12, 1, 3, 0, 1, 0, 0, 0, 6, 0, 0, 0];
        let exif = [b"II*\0\x08\0\0\0\x01\0".as_slice(), &entry, &[0; 4]].concat();
        let mut bytes = Vec::new();
        let mut encoder = PngEncoder::new(&mut bytes);
        encoder.set_exif_metadata(exif).unwrap();
        encoder.write_image(&[255, 0, 0, 0, 0, 255], 2, 1, ExtendedColorType::Rgb8).unwrap();
        let picture = load(&bytes).unwrap();
        assert_eq!(picture.dims(), [1, 3, 2, 1]);
        assert_eq!(picture.to_vec::<f32>().unwrap(), [1.0, -1.0, -1.0, -1.0, -1.0, 1.0]);
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, 13_000, 13_000);
        encoder.set_color(png::ColorType::Rgb);
        let mut writer = encoder.write_header().unwrap();
        writer.write_chunk(png::chunk::IDAT, &[0x78, 0x9c, 3, 0, 0, 0, 0, 1]).unwrap();
        drop(writer);
        let error = load(&bytes).unwrap_err().to_string();
        assert!(error.contains("load_picture") && error.contains("13000×13000 pixels cannot be"), "{error}");
    }
}
