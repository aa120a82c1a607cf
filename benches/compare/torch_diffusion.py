"""The networks of Stable Diffusion 1.5 as `diffusers` has them, with random weights, at 256x256 pixels."""
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel


def unet(dev, dtype):
    torch.set_default_dtype(dtype)
    model = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).to(dev).eval()
    torch.set_default_dtype(torch.float32)
    latent, text = (torch.randn(*s, device=dev, dtype=dtype) for s in ((1, 4, 32, 32), (1, 77, 768)))
    step = torch.tensor([500], device=dev)
    def run():
        with torch.inference_mode(): model(latent, step, text)
    return model, run


def decoder(dev):
    n = 4
    model = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * n, up_block_types=["UpDecoderBlock2D"] * n, block_out_channels=(128, 256, 512, 512),
                          layers_per_block=2, sample_size=512).to(dev).eval()
    latent = torch.randn(1, 4, 32, 32, device=dev)
    def run():
        with torch.inference_mode(): model.decode(latent)
    return model, run


def run(bench, only, dev, cl):
    wanted = lambda name: any(o in name for o in only.split(","))
    for name, make in (
        ("sd15_unet_256_f32", lambda: unet(dev, torch.float32)),
        ("sd15_unet_256_bf16", lambda: unet(dev, torch.bfloat16)),
        ("sd15_vae_decode_256", lambda: decoder(dev)),
    ):
        if wanted(name):
            model, step = make()
            cl(model)
            bench(name, step, 1e9, "calls/s")
            del model, step
