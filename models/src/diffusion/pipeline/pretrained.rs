//! How the folders of a pipeline's networks are laid out.

use crate::diffusion::unet::{ControlNetConfig, ControlNetModel, UNet2dConditionConfig, UNet2dConditionModel};
use crate::nn::Params;
use crate::pretrained::{Layout, Library, Pretrained};
use crate::vae::{AutoencoderKl, AutoencoderKlConfig, rename_old_attention};
use kiln_tensor::Result;

impl Pretrained for UNet2dConditionConfig {
    type Model = UNet2dConditionModel;

    fn layout(&self) -> Layout {
        Layout::new(Library::Diffusers, "UNet2DConditionModel")
    }

    fn build_model(&self, params: &Params) -> Result<UNet2dConditionModel> {
        UNet2dConditionModel::new(params, self)
    }
}

impl Pretrained for ControlNetConfig {
    type Model = ControlNetModel;

    fn layout(&self) -> Layout {
        Layout::new(Library::Diffusers, "ControlNetModel")
    }

    fn build_model(&self, params: &Params) -> Result<ControlNetModel> {
        ControlNetModel::new(params, self)
    }
}

impl Pretrained for AutoencoderKlConfig {
    type Model = AutoencoderKl;

    fn layout(&self) -> Layout {
        Layout { modernise: Some(|state| Ok(rename_old_attention(state))), ..Layout::new(Library::Diffusers, "AutoencoderKL") }
    }

    fn build_model(&self, params: &Params) -> Result<AutoencoderKl> {
        self.build(params)
    }
}
