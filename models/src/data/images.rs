//! Labelled images of one size, held in memory as bytes and scaled as they leave in batches.

use super::dataset::{Dataset, check_indices};
use super::rng::Rng;
use kiln_tensor::{Error, Result, Shape, Tensor, default_device};
use std::sync::Arc;

/// Labelled 8-bit images of one size, in memory. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct ImageSet {
    pixels: Arc<[u8]>,
    labels: Arc<[u8]>,
    /// Channels, height, width.
    shape: [usize; 3],
    scale: Scale,
}

/// The range that pixels 0 ..= 255 are mapped to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Scale {
    /// x / 255, in [0, 1].
    #[default]
    Unit,
    /// x / 127.5 − 1, in [−1, 1]: what a generator that ends in tanh draws.
    Signed,
}

/// A batch of an image data set.
#[derive(Clone)]
pub struct ImageBatch {
    /// The scaled pixels, f32 (B, C, H, W).
    pub images: Tensor,
    /// The class numbers, i64 (B).
    pub labels: Tensor,
}

impl ImageSet {
    /// Images of `shape` = [channels, height, width], one after another in `pixels` (row-major), and their class numbers.
    ///
    /// # Errors
    /// If `pixels` does not hold exactly one image for each label.
    pub fn new(pixels: Vec<u8>, labels: Vec<u8>, shape: [usize; 3]) -> Result<Self> {
        let size = shape.iter().try_fold(labels.len(), |product, &d| product.checked_mul(d));
        if size != Some(pixels.len()) {
            let (found, count) = (pixels.len(), labels.len());
            return Err(Error::argument("image set", format!("{found} pixels were given for {count} labelled images of {shape:?}")));
        }
        Ok(Self { pixels: pixels.into(), labels: labels.into(), shape, scale: Scale::default() })
    }

    /// The same images with batches scaled to another range.
    #[must_use]
    pub fn with_scale(mut self, scale: Scale) -> Self {
        self.scale = scale;
        self
    }

    /// The images `indices`, copied into a set of their own.
    ///
    /// # Errors
    /// If an index is out of range.
    pub fn select(&self, indices: &[usize]) -> Result<Self> {
        check_indices(indices, self.labels.len())?;
        let size = self.image_size();
        let pixels: Vec<u8> = indices.iter().flat_map(|&i| &self.pixels[i * size..(i + 1) * size]).copied().collect();
        let labels: Vec<u8> = indices.iter().map(|&i| self.labels[i]).collect();
        Ok(Self { pixels: pixels.into(), labels: labels.into(), ..self.clone() })
    }

    /// Channels, height and width of each image.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// All pixels, one image after another.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// All class numbers.
    pub fn labels(&self) -> &[u8] {
        &self.labels
    }

    fn image_size(&self) -> usize {
        self.shape.iter().product()
    }
}

impl Scale {
    /// One pixel, scaled.
    pub(super) fn apply(self, pixel: u8) -> f32 {
        match self {
            Self::Unit => f32::from(pixel) / 255.0,
            Self::Signed => f32::from(pixel) / 127.5 - 1.0,
        }
    }
}

impl Dataset for ImageSet {
    type Batch = ImageBatch;

    fn len(&self) -> usize {
        self.labels.len()
    }

    fn batch(&self, indices: &[usize], _rng: &mut Rng) -> Result<ImageBatch> {
        check_indices(indices, self.labels.len())?;
        let size = self.image_size();
        let [channels, height, width] = self.shape;
        let images = Tensor::build::<f32>(default_device(), &Shape::new(&[indices.len(), channels, height, width])?, |out| {
            for (image, &i) in out.chunks_exact_mut(size.max(1)).zip(indices) {
                let pixels = &self.pixels[i * size..(i + 1) * size];
                image.iter_mut().zip(pixels).for_each(|(value, &pixel)| *value = self.scale.apply(pixel));
            }
            Ok(())
        })?;
        let labels = indices.iter().map(|&i| i64::from(self.labels[i])).collect();
        Ok(ImageBatch { images, labels: Tensor::from_vec(labels, indices.len())? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_scaled_and_checked() {
        let set = ImageSet::new(vec![0, 255, 51, 102], vec![3, 7], [1, 1, 2]).unwrap();
        let batch = set.batch(&[1, 0], &mut Rng::new(0)).unwrap();
        assert_eq!((batch.images.dims(), batch.labels.to_vec::<i64>().unwrap()), (&[2, 1, 1, 2][..], vec![7, 3]));
        assert_eq!(batch.images.to_vec::<f32>().unwrap(), [0.2, 0.4, 0.0, 1.0]);
        let signed = set.clone().with_scale(Scale::Signed).batch(&[0], &mut Rng::new(0)).unwrap();
        assert_eq!(signed.images.to_vec::<f32>().unwrap(), [-1.0, 1.0]);
        assert_eq!(set.batch(&[2], &mut Rng::new(0)).err().unwrap().to_string(), "batch: sample 2 was asked of a data set of 2");
        assert!(ImageSet::new(vec![0; 3], vec![0], [1, 2, 2]).is_err());
        assert!(ImageSet::new(vec![], vec![0, 0], [usize::MAX, 2, 2]).is_err());
    }
}
