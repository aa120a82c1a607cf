//! Large pictures in overlapping tiles, whose seams are blended: memory that does not grow with the picture.

use kiln_tensor::{Error, Result, Tensor};

/// Tiles that an autoencoder takes large pictures apart into.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Tiling {
    /// The side of a tile of a picture (`tile_sample_min_size` of `diffusers`); pictures that are no larger stay whole.
    pub sample_min_size: usize,
    /// The side of a tile of latents (`tile_latent_min_size`).
    pub latent_min_size: usize,
    /// The share of a tile that overlaps the next (`tile_overlap_factor`), in [0, 1).
    pub overlap_factor: f64,
}

impl Tiling {
    /// From pictures to latents.
    pub(super) fn encoding(&self) -> Result<Tiles> {
        self.tiles(self.sample_min_size, self.latent_min_size)
    }

    /// From latents to pictures.
    pub(super) fn decoding(&self) -> Result<Tiles> {
        self.tiles(self.latent_min_size, self.sample_min_size)
    }

    fn tiles(&self, size: usize, output_size: usize) -> Result<Tiles> {
        let overlap = self.overlap_factor;
        let stride = (size as f64 * (1.0 - overlap)) as usize;
        let blend = (output_size as f64 * overlap) as usize;
        if !(0.0..1.0).contains(&overlap) || stride == 0 || blend >= output_size {
            let message = format!(
                "tiles of {} pixels and {} latents with an overlap of {overlap} cannot cover a picture; take sides of at least 1 / (1 − overlap) and an \
                 overlap in [0, 1)",
                self.sample_min_size, self.latent_min_size
            );
            return Err(Error::argument("tiling", message));
        }
        Ok(Tiles { size, stride, blend, keep: output_size - blend })
    }
}

/// The extents of tiles of an input, and of what is made of each.
pub(super) struct Tiles {
    /// The side of a tile of the input.
    size: usize,
    /// From a tile to the next.
    stride: usize,
    /// Rows and columns of the output that fade from a tile into the next.
    blend: usize,
    /// Rows and columns of the output that a tile gives.
    keep: usize,
}

impl Tiles {
    /// Whether `x` (B, C, H, W) is larger than a tile.
    pub fn divide(&self, x: &Tensor) -> Result<bool> {
        Ok(x.dim(-2)?.max(x.dim(-1)?) > self.size)
    }

    /// `f` of each tile of `x` (B, C, H, W), put together.
    pub fn map(&self, x: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let [_, _, height, width] = x.dims_n("tiling")?;
        let mut above: Vec<Tensor> = Vec::new();
        let mut rows = Vec::new();
        for top in (0..height).step_by(self.stride) {
            let band = x.narrow(2, top, self.size.min(height - top))?;
            let mut row: Vec<Tensor> = Vec::new();
            for (j, left) in (0..width).step_by(self.stride).enumerate() {
                let mut tile = f(&band.narrow(3, left, self.size.min(width - left))?)?;
                // The tiles above and to the left are taken as blended themselves.
                if let Some(above) = above.get(j) {
                    tile = blend(above, &tile, 2, self.blend)?;
                }
                if let Some(left) = row.last() {
                    tile = blend(left, &tile, 3, self.blend)?;
                }
                row.push(tile);
            }
            let kept = row.iter().map(|tile| self.kept(tile)).collect::<Result<Vec<_>>>()?;
            rows.push(Tensor::cat(&kept, 3)?);
            above = row;
        }
        Tensor::cat(&rows, 2)
    }

    fn kept(&self, tile: &Tensor) -> Result<Tensor> {
        let [_, _, height, width] = tile.dims_n("tiling")?;
        tile.narrow(2, 0, self.keep.min(height))?.narrow(3, 0, self.keep.min(width))
    }
}

/// `b` with its first `extent` rows (`dim` 2) or columns (3) faded in from the last of `a`: a·(1 − i / extent) + b·i / extent.
fn blend(a: &Tensor, b: &Tensor, dim: isize, extent: usize) -> Result<Tensor> {
    let (before, size) = (a.dim(dim)?, b.dim(dim)?);
    let extent = extent.min(before).min(size);
    if extent == 0 {
        return Ok(b.clone());
    }
    let weights = |f: &dyn Fn(f64) -> f64| -> Result<Tensor> {
        let weights = (0..extent).map(|i| f(i as f64 / extent as f64) as f32).collect::<Vec<_>>();
        let shape = if dim == 2 { [extent, 1] } else { [1, extent] };
        Tensor::from_vec(weights, shape)?.to_dtype(b.dtype())?.to_device(b.device())
    };
    let old = a.narrow(dim, before - extent, extent)?.mul(&weights(&|t| 1.0 - t)?)?;
    let seam = old.add(&b.narrow(dim, 0, extent)?.mul(&weights(&|t| t)?)?)?;
    Tensor::cat(&[&seam, &b.narrow(dim, extent, size - extent)?], dim)
}
