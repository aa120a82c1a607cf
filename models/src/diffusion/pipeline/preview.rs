//! What a latent will be, in rough colours.

use kiln_tensor::{DType, Error, Result, Tensor};

/// Red, green and blue of each of the four channels of the latents of Stable Diffusion 1 and 2, fitted by users of both.
const SD: [[f32; 3]; 4] = [[0.298, 0.207, 0.208], [0.187, 0.286, 0.173], [-0.158, 0.189, 0.264], [-0.184, -0.271, -0.473]];

/// The same of SDXL.
const XL: [[f32; 3]; 4] = [[0.392, 0.405, 0.455], [-0.263, -0.02, 0.065], [0.057, 0.169, -0.076], [-0.311, -0.236, -0.208]];

/// A linear guess at the picture of scaled latents (B, 4, H, W), an eighth its size: (B, 3, H, W) in [−1, 1]. `is_xl` for SDXL's.
///
/// # Errors
/// If there are not four channels.
pub fn latent_preview(latents: &Tensor, is_xl: bool) -> Result<Tensor> {
    let [b, c, h, w] = latents.dims_n("preview")?;
    if c != 4 {
        return Err(Error::shape("preview", format!("latents have 4 channels, not those of {}", latents.shape())));
    }
    let map = if is_xl { XL } else { SD };
    let map = Tensor::from_vec(map.concat(), [4, 3])?.t()?.to_device(latents.device())?;
    let flat = latents.detach().to_dtype(DType::F32)?.reshape([b, c, h * w])?;
    map.unsqueeze(0)?.expand([b, 3, 4])?.contiguous()?.matmul(&flat)?.reshape([b, 3, h, w])?.clamp(-1.0, 1.0)
}
