//! Pictures as the image tower was trained to see them.

use image::imageops::FilterType;
use image::{RgbImage, imageops};
use kiln_tensor::{DType, Error, Result, Tensor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

/// What `preprocessor_config.json` says: a picture is scaled until its shorter edge has `shortest_edge` pixels, cropped about its centre,
/// brought to [0, 1] and normed, each if it says so. The default is that of OpenAI's models.
///
/// The pixels differ from those of PIL, with which the reference scales, by a level of 255 here and there, rarely two: PIL rounds to 8
/// bits between its two passes.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct ClipImageProcessor {
    /// Whether the picture is scaled.
    pub do_resize: bool,
    /// The shorter edge after scaling.
    #[serde(rename = "size", deserialize_with = "edge", serialize_with = "as_edge")]
    pub shortest_edge: usize,
    /// The filter that it is scaled with, by PIL's number: 1 for Lanczos', 2 for the bilinear, 3 for the bicubic one.
    pub resample: u8,
    /// Whether it is cropped.
    pub do_center_crop: bool,
    /// Height and width that are cut out.
    #[serde(deserialize_with = "extents", serialize_with = "as_extents")]
    pub crop_size: [usize; 2],
    /// Whether its levels are multiplied by `rescale_factor`.
    pub do_rescale: bool,
    /// What makes a level one of [0, 1].
    pub rescale_factor: f64,
    /// Whether it is normed.
    pub do_normalize: bool,
    /// What is subtracted from each channel, of values in [0, 1].
    pub image_mean: [f64; 3],
    /// What each channel is divided by then.
    pub image_std: [f64; 3],
}

impl Default for ClipImageProcessor {
    fn default() -> Self {
        Self {
            do_resize: true,
            shortest_edge: 224,
            resample: 3,
            do_center_crop: true,
            crop_size: [224, 224],
            do_rescale: true,
            rescale_factor: 1.0 / 255.0,
            do_normalize: true,
            image_mean: [0.48145466, 0.4578275, 0.40821073],
            image_std: [0.26862954, 0.26130258, 0.27577711],
        }
    }
}

/// No picture is scaled beyond this edge: a panorama's longer one may be long.
const MAX_EDGE: usize = 1 << 14;

impl ClipImageProcessor {
    /// A picture of u8 (3, H, W) as the image tower takes it: f32 (1, 3, h, w), h and w those of the crop. What the crop does not
    /// cover is black before the norm.
    ///
    /// # Errors
    /// If the picture is no such tensor or empty, an extent is 0 or beyond 16,384 pixels after scaling, the filter is another one, or the
    /// numbers of the norm are not finite or deviations of 0.
    pub fn preprocess(&self, picture: &Tensor) -> Result<Tensor> {
        let [channels, height, width] = picture.dims_n("clip_preprocess")?;
        if channels != 3 || picture.dtype() != DType::U8 || height == 0 || width == 0 {
            let message = format!("a picture is u8 [3, H, W], got {} {}", picture.dtype(), picture.shape());
            return Err(Error::shape("clip_preprocess", message));
        }
        let (factor, norm, edge) = (self.factor()?, self.norm()?, self.shortest_edge);
        // The longer edge is cut off to whole pixels, as the reference does.
        let longer = |long: usize, short: usize| edge.checked_mul(long).map_or(usize::MAX, |n| n / short);
        let size = match self.do_resize {
            false => [height, width],
            true if width <= height => [longer(height, width), edge],
            true => [edge, longer(width, height)],
        };
        let crop = if self.do_center_crop { self.crop_size } else { size };
        if size.iter().chain(&crop).any(|&extent| extent == 0 || extent > MAX_EDGE) {
            let message = format!("{height}×{width} pixels cannot be scaled to {size:?} and cropped to {crop:?}");
            return Err(Error::argument("clip_preprocess", message));
        }
        let [crop_height, crop_width] = crop;
        let filter = self.filter()?;
        let scaled = if size == [height, width] { interleaved(picture)? } else { resize(&interleaved(picture)?, size, filter) };
        let offset = |whole: usize, crop: usize| (whole as i64 - crop as i64).div_euclid(2);
        let (top, left) = (offset(size[0], crop_height), offset(size[1], crop_width));
        let mut values = Vec::with_capacity(3 * crop_height * crop_width);
        for (channel, (mean, std)) in norm.into_iter().enumerate() {
            for row in 0..crop_height as i64 {
                for column in 0..crop_width as i64 {
                    let at = u32::try_from(left + column).ok().zip(u32::try_from(top + row).ok());
                    let pixel = at.and_then(|(x, y)| scaled.get_pixel_checked(x, y)).map_or(0, |pixel| pixel.0[channel]);
                    values.push(((f64::from(pixel) * factor - mean) / std) as f32);
                }
            }
        }
        Tensor::from_vec(values, [1, 3, crop_height, crop_width])
    }

    fn filter(&self) -> Result<FilterType> {
        match self.resample {
            1 => Ok(FilterType::Lanczos3),
            2 => Ok(FilterType::Triangle),
            3 => Ok(FilterType::CatmullRom),
            other => {
                let message = format!("resample {other} is not supported: 1 (Lanczos), 2 (bilinear) or 3 (bicubic)");
                Err(Error::argument("clip_preprocess", message))
            }
        }
    }

    /// What levels are multiplied by.
    fn factor(&self) -> Result<f64> {
        match self.do_rescale {
            true if !self.rescale_factor.is_finite() => {
                Err(Error::argument("clip_preprocess", format!("rescale_factor {} is no factor", self.rescale_factor)))
            }
            true => Ok(self.rescale_factor),
            false => Ok(1.0),
        }
    }

    /// Mean and deviation of each channel.
    fn norm(&self) -> Result<[(f64, f64); 3]> {
        if !self.do_normalize {
            return Ok([(0.0, 1.0); 3]);
        }
        let wrong = |field: &str, value: f64| Error::argument("clip_preprocess", format!("{field} {value} cannot be normed by"));
        if let Some(&mean) = self.image_mean.iter().find(|mean| !mean.is_finite()) {
            return Err(wrong("image_mean", mean));
        }
        if let Some(&std) = self.image_std.iter().find(|std| !std.is_finite() || **std == 0.0) {
            return Err(wrong("image_std", std));
        }
        Ok(std::array::from_fn(|channel| (self.image_mean[channel], self.image_std[channel])))
    }
}

/// (3, H, W) → rows of pixels.
fn interleaved(picture: &Tensor) -> Result<RgbImage> {
    let [_, height, width] = picture.dims_n("clip_preprocess")?;
    let pixels = picture.permute(&[1, 2, 0])?.contiguous()?.to_vec::<u8>()?;
    let extents = u32::try_from(width).ok().zip(u32::try_from(height).ok());
    let image = extents.and_then(|(width, height)| RgbImage::from_raw(width, height, pixels));
    image.ok_or_else(|| Error::shape("clip_preprocess", format!("a picture {} is too large", picture.shape())))
}

/// With the filter (of the bicubic ones that with a = −1/2) widened where the picture shrinks, as PIL does.
fn resize(image: &RgbImage, [height, width]: [usize; 2], filter: FilterType) -> RgbImage {
    imageops::resize(image, width as u32, height as u32, filter)
}

/// `size`: a number, or `{"shortest_edge": n}`.
fn edge<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<usize, D::Error> {
    let value = Value::deserialize(deserializer)?;
    number(value.get("shortest_edge").unwrap_or(&value)).ok_or_else(|| wrong("size", &value))
}

/// `crop_size`: a number, or `{"height": h, "width": w}`.
fn extents<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<[usize; 2], D::Error> {
    let value = Value::deserialize(deserializer)?;
    let of = |name: &str| number(value.get(name).unwrap_or(&value));
    of("height").zip(of("width")).map(|(height, width)| [height, width]).ok_or_else(|| wrong("crop_size", &value))
}

fn number(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|n| usize::try_from(n).ok())
}

fn wrong<E: serde::de::Error>(field: &str, value: &Value) -> E {
    E::custom(format!("`{field}`: {value} names no pixels"))
}

fn as_edge<S: serde::Serializer>(edge: &usize, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serde_json::json!({"shortest_edge": edge}).serialize(serializer)
}

fn as_extents<S: serde::Serializer>(extents: &[usize; 2], serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serde_json::json!({"height": extents[0], "width": extents[1]}).serialize(serializer)
}
