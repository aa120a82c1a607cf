//! Whole runs of Stable Diffusion against `diffusers`: fixtures/pipeline/make.py.

use kiln_autograd::no_grad;
use kiln_models::diffusion::ldm::{controlnet_from_ldm, unet_from_ldm, vae_from_ldm};
use kiln_models::diffusion::pipeline::{
    ControlInput, DrawOptions, LoadOptions, Phase, StableDiffusion, TextualInversion, load_picture, read_png_text,
};
use kiln_models::diffusion::schedulers::{SchedulerClass, SchedulerConfig, SchedulerKind};
use kiln_models::diffusion::unet::{UNet2dConditionConfig, UNet2dConditionModel, UNetConditions};
use kiln_models::lora::{Lora, LoraConfig, LoraPart, LoraStack, LoraWeights, save_lora_weights};
use kiln_models::nn::{Params, ParamsOptions, StateDict};
use kiln_models::text::Tokenizer;
use kiln_models::transformer::load_pretrained;
use kiln_models::vae::AutoencoderKlConfig;
use kiln_tensor::io::safetensors;
use kiln_tensor::{DType, Device, Generator, Result, Tensor};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

/// On the final picture, in [0, 1].
const TOLERANCE: f32 = 1e-3;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pipeline")
}

static EXPECTED: LazyLock<StateDict> = LazyLock::new(|| safetensors::load(fixtures().join("expected.safetensors")).unwrap());

/// A folder of the test's own, removed at its end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kiln-pipeline-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// A copy of a fixture's folder.
    fn copy(name: &str, of: &str) -> Self {
        fn copy(from: &Path, to: &Path) {
            std::fs::create_dir_all(to).unwrap();
            for entry in std::fs::read_dir(from).unwrap().map(|entry| entry.unwrap().path()) {
                let target = to.join(entry.file_name().unwrap());
                if entry.is_dir() {
                    copy(&entry, &target);
                } else {
                    std::fs::copy(&entry, &target).unwrap();
                }
            }
        }
        let scratch = Self::new(name);
        copy(&fixtures().join(of), &scratch.0);
        scratch
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Changes a JSON file.
fn edit(path: impl AsRef<Path>, change: impl FnOnce(&mut serde_json::Value)) {
    let mut value: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(path, value.to_string()).unwrap();
}

fn pipeline(name: &str) -> StableDiffusion {
    StableDiffusion::load(fixtures().join(name), LoadOptions { keep: true, ..LoadOptions::default() }).unwrap()
}

fn options() -> DrawOptions {
    DrawOptions {
        prompt: "A lighthouse,  at DUSK (it's 1903)".into(),
        num_inference_steps: 10,
        guidance_scale: 5.0,
        ..DrawOptions::default()
    }
}

fn from_latents() -> DrawOptions {
    DrawOptions { latents: Some(EXPECTED["latents"].clone()), ..options() }
}

fn signed(name: &str) -> Tensor {
    EXPECTED[name].mul_scalar(2.0).unwrap().add_scalar(-1.0).unwrap()
}

/// Every second pixel, in [0, 1].
fn sampled(picture: &Tensor) -> Vec<f32> {
    let [_, _, h, w] = picture.dims_n("test").unwrap();
    let all = picture.to_vec::<f32>().unwrap();
    let at = |c: usize, y: usize, x: usize| (all[(c * h + y) * w + x] + 1.0) / 2.0;
    (0..3).flat_map(|c| (0..h).step_by(2).flat_map(move |y| (0..w).step_by(2).map(move |x| at(c, y, x)))).collect::<Vec<f32>>()
}

fn assert_drawn(pipeline: &StableDiffusion, options: &DrawOptions, case: &str) {
    let drawn = pipeline.draw(options, &mut |_| Ok(())).unwrap_or_else(|e| panic!("{case}: {e}"));
    let (found, expected) = (sampled(&drawn.picture), EXPECTED[case].to_vec::<f32>().unwrap());
    assert_eq!(found.len(), expected.len(), "{case}");
    let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    // A picture of one colour would prove nothing.
    let spread = expected.iter().fold(0.0f32, |m, x| m.max(*x)) - expected.iter().fold(1.0f32, |m, x| m.min(*x));
    assert!(spread > 0.05, "{case}: {spread}");
    println!("{case}: {worst:.1e}");
    assert!(worst < TOLERANCE, "{case}: {worst}");
}

#[test]
fn sd1_is_the_reference_with_each_scheduler() {
    let pipeline = pipeline("sd1");
    for (name, kind) in [
        ("pndm", None),
        ("ddim", Some(SchedulerKind::Ddim)),
        ("euler", Some(SchedulerKind::Euler)),
        ("dpm", Some("dpm++-2m".parse().unwrap())),
        ("euler_a", Some("euler-a".parse().unwrap())),
    ] {
        if name != "euler_a" {
            let given = DrawOptions { scheduler: kind, negative_prompt: Some("blurry".into()), ..from_latents() };
            assert_drawn(&pipeline, &given, &format!("sd1.{name}"));
        }
        assert_drawn(&pipeline, &DrawOptions { scheduler: kind, seed: 7, ..options() }, &format!("sd1.{name}.seed"));
    }
}

#[test]
fn guidance_clip_skip_eta_and_size_are_the_references() {
    let pipeline = pipeline("sd1");
    let ddim = |options| DrawOptions { scheduler: Some(SchedulerKind::Ddim), ..options };
    assert_drawn(&pipeline, &DrawOptions { guidance_rescale: 0.7, ..ddim(from_latents()) }, "sd1.rescaled");
    assert_drawn(&pipeline, &DrawOptions { guidance_scale: 1.0, ..ddim(from_latents()) }, "sd1.unguided");
    assert_drawn(&pipeline, &DrawOptions { clip_skip: 1, ..ddim(from_latents()) }, "sd1.skip");
    assert_drawn(&pipeline, &DrawOptions { eta: 1.0, seed: 5, ..ddim(options()) }, "sd1.eta");
    assert_drawn(&pipeline, &DrawOptions { seed: 5, height: Some(32), width: Some(40), ..ddim(options()) }, "sd1.wide");
}

#[test]
fn pictures_are_continued_and_filled_in_as_the_reference_does() {
    let pipeline = pipeline("sd1");
    for (name, kind) in [("ddim", "ddim"), ("euler", "euler"), ("dpm", "dpm++-2m"), ("euler_a", "euler-a")] {
        let from = DrawOptions { image: Some(signed("image")), scheduler: Some(kind.parse().unwrap()), ..options() };
        let again = DrawOptions { strength: Some(0.6), seed: 11, ..from.clone() };
        assert_drawn(&pipeline, &again, &format!("sd1.img2img.{name}"));
        let filled = DrawOptions { mask: Some(EXPECTED["mask"].clone()), seed: 12, ..from };
        assert_drawn(&pipeline, &filled, &format!("sd1.inpaint.{name}"));
        if name == "ddim" {
            assert_drawn(&pipeline, &DrawOptions { strength: Some(0.5), ..filled }, "sd1.inpaint.part");
        }
    }
    // Begins at the first of two timesteps that are equal after rounding.
    let (image, scheduler) = (Some(signed("image")), Some(SchedulerKind::DpmSolver2MKarras));
    let late = DrawOptions { image, scheduler, num_inference_steps: 50, strength: Some(0.06), seed: 11, ..options() };
    assert_drawn(&pipeline, &late, "sd1.img2img.karras");
}

#[test]
fn controlnets_steer_as_the_reference() {
    let pipeline = pipeline("sd1");
    let network = ControlInput::load_network(fixtures().join("controlnet"), &Params::seeded(0)).unwrap();
    let edges = &EXPECTED["edges"];
    let one = ControlInput::new(network.clone(), edges);
    let with = |controls| DrawOptions { controls, scheduler: Some(SchedulerKind::Ddim), ..from_latents() };
    assert_drawn(&pipeline, &with(vec![ControlInput { conditioning_scale: 0.8, ..one.clone() }]), "sd1.control");
    assert_drawn(&pipeline, &with(vec![ControlInput { guess_mode: true, ..one.clone() }]), "sd1.control.guess");
    let inverse = edges.mul_scalar(-1.0).unwrap().add_scalar(1.0).unwrap();
    let span = (0.0, 0.6);
    let two = vec![
        ControlInput { conditioning_scale: 0.5, span, ..one },
        ControlInput { conditioning_scale: 0.7, span, ..ControlInput::new(network, &inverse) },
    ];
    assert_drawn(&pipeline, &with(two), "sd1.control.two");
    let pooling = Scratch::copy("pooling", "controlnet");
    edit(pooling.0.join("config.json"), |config| config["global_pool_conditions"] = true.into());
    let network = ControlInput::load_network(&pooling.0, &Params::seeded(0)).unwrap();
    assert_drawn(&pipeline, &with(vec![ControlInput::new(network, edges)]), "sd1.control.pooled");
}

#[test]
fn sdxl_is_the_reference() {
    let pipeline = pipeline("xl");
    assert!(pipeline.is_xl());
    assert_drawn(&pipeline, &from_latents(), "xl.euler");
    assert_drawn(&pipeline, &DrawOptions { negative_prompt: Some("blurry".into()), ..from_latents() }, "xl.negative");
    let ddim = DrawOptions { scheduler: Some(SchedulerKind::Ddim), ..options() };
    assert_drawn(&pipeline, &DrawOptions { seed: 7, clip_skip: 1, ..ddim.clone() }, "xl.ddim.seed");
    let again = DrawOptions { image: Some(signed("image")), strength: Some(0.6), seed: 11, ..ddim };
    assert_drawn(&pipeline, &again, "xl.img2img");
}

#[test]
fn sd2_is_the_reference() {
    let pipeline = pipeline("sd2");
    let negative = DrawOptions { negative_prompt: Some("blurry".into()), ..from_latents() };
    assert_drawn(&pipeline, &negative, "sd2.ddim");
    assert_drawn(&pipeline, &DrawOptions { seed: 7, guidance_rescale: 0.7, ..options() }, "sd2.ddim.seed");
    for (name, kind) in [("euler", "euler"), ("dpm", "dpm++-2m")] {
        let given = DrawOptions { scheduler: Some(kind.parse().unwrap()), ..from_latents() };
        assert_drawn(&pipeline, &given, &format!("sd2.{name}"));
    }
}

/// sd1, whose U-Net is told the guidance scale.
#[test]
fn a_latent_consistency_model_is_the_reference() {
    let folder = Scratch::copy("lcm", "sd1");
    edit(folder.0.join("model_index.json"), |index| index["_class_name"] = "LatentConsistencyModelPipeline".into());
    edit(folder.0.join("unet/config.json"), |config| config["time_cond_proj_dim"] = 8.into());
    let file = folder.0.join("unet/diffusion_pytorch_model.fp16.safetensors");
    let mut state = safetensors::load(&file).unwrap();
    state.insert("time_embedding.cond_proj.weight".into(), EXPECTED["cond_proj"].to_dtype(DType::F16).unwrap());
    safetensors::save(&file, &state, &Default::default()).unwrap();
    let pipeline = StableDiffusion::load(&folder.0, LoadOptions::default()).unwrap();
    let four = DrawOptions { scheduler: Some(SchedulerKind::Lcm), num_inference_steps: 4, seed: 9, ..options() };
    assert_drawn(&pipeline, &four, "sd1.lcm");
}

/// `diffusers` sets what the oldest files of Stable Diffusion leave out.
#[test]
fn scheduler_files_of_before_are_brought_up_to_date() {
    let folder = Scratch::copy("old", "sd1");
    edit(folder.0.join("scheduler/scheduler_config.json"), |config| {
        config.as_object_mut().unwrap().retain(|name, _| !["steps_offset", "clip_sample", "skip_prk_steps"].contains(&name.as_str()));
    });
    let load = |class: &str| {
        edit(folder.0.join("model_index.json"), |index| index["_class_name"] = class.into());
        StableDiffusion::load(&folder.0, LoadOptions::default()).unwrap()
    };
    let fields = |pipeline: &StableDiffusion| {
        let config = pipeline.scheduler();
        (config.steps_offset, config.clip_sample, config.skip_prk_steps)
    };
    assert_eq!(fields(&load("StableDiffusionControlNetPipeline")), (None, None, None));
    assert_eq!(fields(&load("StableDiffusionInpaintPipeline")), (Some(1), None, Some(true)));
    assert_eq!(fields(&load("StableDiffusionImg2ImgPipeline")), (Some(1), Some(false), None));
    let old = load("StableDiffusionPipeline");
    assert_eq!(fields(&old), (Some(1), Some(false), None));
    for (name, kind) in [("pndm", SchedulerKind::Pndm), ("ddim", SchedulerKind::Ddim)] {
        let given = DrawOptions { scheduler: Some(kind), negative_prompt: Some("blurry".into()), ..from_latents() };
        assert_drawn(&old, &given, &format!("sd1.{name}"));
    }
}

#[test]
fn a_scheduler_that_is_not_known_can_be_replaced() {
    let folder = Scratch::copy("magic", "sd1");
    edit(folder.0.join("scheduler/scheduler_config.json"), |config| config["_class_name"] = "MagicScheduler".into());
    let options = LoadOptions { scheduler: Some(SchedulerKind::Ddim), ..LoadOptions::default() };
    let pipeline = StableDiffusion::load(&folder.0, options).unwrap();
    assert_eq!(pipeline.scheduler().class, SchedulerClass::Ddim);
    let given = DrawOptions { negative_prompt: Some("blurry".into()), ..from_latents() };
    assert_drawn(&pipeline, &given, "sd1.ddim");
}

#[test]
fn large_pictures_are_decoded_in_tiles_if_asked() -> Result<()> {
    let options = DrawOptions { height: Some(48), width: Some(64), num_inference_steps: 2, ..options() };
    let whole = pipeline("sd1").draw(&options, &mut |_| Ok(()))?;
    let load = LoadOptions { vae_tiling: true, ..LoadOptions::default() };
    let tiled = StableDiffusion::load(fixtures().join("sd1"), load)?.draw(&options, &mut |_| Ok(()))?;
    assert_eq!(tiled.latents.to_vec::<f32>()?, whole.latents.to_vec::<f32>()?);
    assert_ne!(tiled.picture.to_vec::<f32>()?, whole.picture.to_vec::<f32>()?);
    let (_, mut vae) = load_pretrained::<AutoencoderKlConfig>(fixtures().join("sd1/vae"), &Params::new())?;
    vae.enable_tiling();
    let expected = no_grad(|| vae.decode(&vae.unscale(&tiled.latents)?)?.clamp(-1.0, 1.0))?;
    assert_eq!(tiled.picture.to_vec::<f32>()?, expected.to_vec::<f32>()?);
    assert_eq!((tiled.texts.get("vae_tiling").map(String::as_str), whole.texts.get("vae_tiling")), (Some("on"), None));
    Ok(())
}

/// With `KILN_TEST_DEVICE=cuda`, on a GPU (or the emulator of one) that is not the default device.
#[test]
fn a_gpu_draws_the_same() -> Result<()> {
    if !std::env::var("KILN_TEST_DEVICE").is_ok_and(|device| device == "cuda") {
        return Ok(());
    }
    let device = Device::cuda(0)?;
    let mut pipeline = StableDiffusion::load(fixtures().join("sd1"), LoadOptions { device, keep: true, ..LoadOptions::default() })?;
    let ddim = |options| DrawOptions { scheduler: Some(SchedulerKind::Ddim), ..options };
    let params = Params::with(ParamsOptions { device, generator: Generator::new(0), ..ParamsOptions::default() });
    let network = ControlInput::load_network(fixtures().join("controlnet"), &params)?;
    let controls = vec![ControlInput { guess_mode: true, ..ControlInput::new(network, &EXPECTED["edges"]) }];
    assert_drawn(&pipeline, &ddim(DrawOptions { controls, ..from_latents() }), "sd1.control.guess");
    let (image, mask) = (Some(signed("image")), Some(EXPECTED["mask"].clone()));
    assert_drawn(&pipeline, &ddim(DrawOptions { image, mask, seed: 12, ..options() }), "sd1.inpaint.ddim");
    pipeline.add_lora("kohya", &LoraWeights::load(fixtures().join("lora_sd1_kohya.safetensors"))?, 1.0)?;
    assert_drawn(&pipeline, &ddim(from_latents()), "sd1.lora.kohya");
    Ok(())
}

/// A U-Net that was trained to fill in, and U-Nets that were not.
#[test]
fn masks_are_filled_in_as_the_reference_does_by_nine_channels_and_by_xl() {
    let folder = Scratch::copy("nine", "sd1");
    for entry in std::fs::read_dir(fixtures().join("unet_inpaint")).unwrap().map(|entry| entry.unwrap().path()) {
        std::fs::copy(&entry, folder.0.join("unet").join(entry.file_name().unwrap())).unwrap();
    }
    let nine = StableDiffusion::load(&folder.0, LoadOptions { keep: true, ..LoadOptions::default() }).unwrap();
    let (image, mask) = (Some(signed("image")), Some(EXPECTED["mask"].clone()));
    let filled = DrawOptions { image, mask, scheduler: Some(SchedulerKind::Ddim), ..options() };
    assert_drawn(&nine, &DrawOptions { seed: 13, ..filled.clone() }, "sd1.nine");
    assert_drawn(&nine, &DrawOptions { seed: 13, strength: Some(0.6), ..filled.clone() }, "sd1.nine.part");
    let xl = pipeline("xl");
    assert_drawn(&xl, &DrawOptions { seed: 12, ..filled.clone() }, "xl.inpaint");
    assert_drawn(&xl, &DrawOptions { seed: 12, strength: Some(0.5), ..filled }, "xl.inpaint.part");
}

#[test]
fn loras_of_kohya_and_diffusers_change_pictures_as_the_reference() {
    for which in ["sd1", "xl"] {
        let mut pipeline = pipeline(which);
        let file = |kind: &str| LoraWeights::load(fixtures().join(format!("lora_{which}_{kind}.safetensors"))).unwrap();
        for weights in [&[("kohya", 1.0)][..], &[("diffusers", 1.0)], &[("kohya", 0.5), ("diffusers", 0.8)]] {
            for &(kind, weight) in weights {
                pipeline.add_lora(kind, &file(kind), weight).unwrap();
            }
            let names: Vec<&str> = weights.iter().map(|(kind, _)| *kind).collect();
            let ddim = DrawOptions { scheduler: Some(SchedulerKind::Ddim), ..from_latents() };
            assert_drawn(&pipeline, &ddim, &format!("{which}.lora.{}", names.join("_")));
            pipeline.clear_loras();
        }
    }
}

/// The U-Net of the fixture, and what it says of fixed inputs.
fn sd1_unet(params: &Params) -> (UNet2dConditionModel, impl Fn(&UNet2dConditionModel) -> Tensor + use<>) {
    let (_, unet) = load_pretrained::<UNet2dConditionConfig>(fixtures().join("sd1/unet"), params).unwrap();
    let generator = Generator::torch_cpu(1);
    let (sample, context) = (generator.randn([1, 4, 4, 4], ()).unwrap(), generator.randn([1, 5, 16], ()).unwrap());
    let time = Tensor::from_vec(vec![300f32], 1).unwrap();
    (unet, move |unet| unet.forward(&sample, &time, &context, &UNetConditions::default()).unwrap().detach())
}

/// What this writes to the folder in KILN_SAVED, fixtures/pipeline/check_lora.py loads in `diffusers`.
#[test]
fn an_adapter_of_our_own_is_saved_for_diffusers() -> Result<()> {
    let scratch = Scratch::new("lora");
    let folder = std::env::var_os("KILN_SAVED").map_or(scratch.0.clone(), PathBuf::from);
    let params = Params::seeded(0);
    let (unet, says) = sd1_unet(&params);
    let plain = says(&unet);
    let config =
        LoraConfig { r: 2, lora_alpha: 3.0, target_modules: ["to_q", "to_out.0", "conv1", "proj_in"].into(), ..LoraConfig::default() };
    let lora = Lora::attach(&params, &config, &Generator::new(2))?;
    let generator = Generator::new(3);
    for param in lora.params().params() {
        param.set(&generator.randn(param.shape(), ())?.mul_scalar(0.2)?)?;
    }
    let adapted = says(&unet);
    assert!(adapted.sub(&plain)?.abs()?.max(())?.item::<f32>()? > 0.1, "an adapter that changes nothing proves nothing");
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("pytorch_lora_weights.safetensors");
    save_lora_weights(&file, &[(LoraPart::Unet, &lora)])?;
    safetensors::save(
        folder.join("expected.safetensors"),
        &StateDict::from([("output".to_owned(), adapted.clone())]),
        &Default::default(),
    )?;
    let fresh = Params::seeded(0);
    let (unet, says) = sd1_unet(&fresh);
    let mut stack = LoraStack::new(&fresh, LoraPart::Unet);
    stack.add("own", &LoraWeights::load(&file)?, 1.0)?;
    let near = |x: &Tensor, y: &Tensor| x.sub(y).unwrap().abs().unwrap().max(()).unwrap().item::<f32>().unwrap();
    assert!(near(&says(&unet), &adapted) < 1e-5);
    stack.merge()?;
    assert!(near(&says(&unet), &adapted) < 1e-5);
    stack.unmerge()?;
    stack.set_weight("own", 0.0)?;
    assert_eq!(near(&says(&unet), &plain), 0.0);
    Ok(())
}

#[test]
fn prompts_are_read_as_the_reference_reads_them() {
    let text = std::fs::read_to_string(fixtures().join("tokens.json")).unwrap();
    let expected: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (name, folder) in [("sd1", "sd1/tokenizer"), ("xl_2", "xl/tokenizer_2")] {
        let tokenizer = Tokenizer::from_folder(fixtures().join(folder)).unwrap();
        for (prompt, ids) in expected["prompts"].as_array().unwrap().iter().zip(expected[name].as_array().unwrap()) {
            let (mut found, _) = tokenizer.encode_truncated(prompt.as_str().unwrap(), 77).unwrap();
            found.resize(77, tokenizer.pad().unwrap());
            let ids: Vec<u32> = ids.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
            assert_eq!(found, ids, "{name} {prompt}");
        }
    }
}

#[test]
fn steps_are_told_with_a_preview_and_pictures_say_how_they_were_drawn() -> Result<()> {
    let (pipeline, scratch) = (pipeline("sd1"), Scratch::new("png"));
    let options = DrawOptions { num_inference_steps: 4, negative_prompt: Some("trübe 雨".into()), seed: 3, ..options() };
    let (mut previews, mut begun) = (0, Vec::new());
    let drawn = pipeline.draw(&options, &mut |step| {
        begun.extend((step.done == 0).then_some((step.phase, step.total)));
        if let Some(preview) = step.preview()? {
            assert_eq!(preview.dims(), [1, 3, 4, 4]);
            previews += 1;
        }
        Ok(())
    })?;
    // PNDM asks the network once more.
    assert_eq!(previews, 5);
    assert_eq!(begun, [(Phase::Prompt, 1), (Phase::Denoise, 5), (Phase::Decode, 1)]);
    let path = scratch.0.join("out/picture.png");
    drawn.save(&path)?;
    let texts = read_png_text(&path)?;
    assert_eq!(texts, drawn.texts);
    assert_eq!((texts["prompt"].as_str(), texts["negative_prompt"].as_str()), (options.prompt.as_str(), "trübe 雨"));
    assert_eq!((texts["seed"].as_str(), texts["size"].as_str()), ("3", "32x32"));
    let near = load_picture(&path)?.sub(&drawn.picture)?.abs()?.max(())?.item::<f32>()?;
    assert!(near <= 1.01 / 255.0, "{near}");
    let again = pipeline.draw(&options, &mut |_| Ok(()))?;
    assert_eq!(again.picture.to_vec::<f32>()?, drawn.picture.to_vec::<f32>()?);
    let stopped =
        pipeline.draw(&options, &mut |step| if step.done == 2 { Err(kiln_tensor::Error::argument("test", "enough")) } else { Ok(()) });
    assert!(stopped.err().unwrap().to_string().contains("enough"));
    Ok(())
}

#[test]
fn pictures_say_all_that_it_takes_to_draw_them_again() -> Result<()> {
    let mut pipeline = pipeline("sd1");
    pipeline.add_word(TextualInversion::new("<evening>", &[Tensor::zeros([1, 16], ())?])?)?;
    let network = ControlInput::load_network(fixtures().join("controlnet"), &Params::seeded(0))?;
    let control = ControlInput { conditioning_scale: 0.5, span: (0.0, 0.6), ..ControlInput::new(network, &EXPECTED["edges"]) };
    let controls = vec![control.clone(), ControlInput { guess_mode: true, span: (0.0, 1.0), ..control }];
    let (image, mask) = (Some(signed("image")), Some(EXPECTED["mask"].clone()));
    let scheduler = Some(SchedulerKind::Ddim);
    let few = DrawOptions { num_inference_steps: 2, scheduler, seed: 3, ..options() };
    let texts = |options: &DrawOptions| pipeline.draw(options, &mut |_| Ok(())).map(|drawn| drawn.texts);
    let full = texts(&DrawOptions { image, mask, controls, eta: 0.5, guidance_rescale: 0.7, ..few.clone() })?;
    for (name, text) in [
        ("scheduler", "ddim"),
        ("seed", "3"),
        ("guidance_scale", "5"),
        ("guidance_rescale", "0.7"),
        ("eta", "0.5"),
        ("image", "given"),
        ("strength", "1"),
        ("mask", "given"),
        ("controlnet", "scale 0.5, from 0 to 0.6 of the steps; scale 0.5, from 0 to 1 of the steps, guess mode"),
        ("textual_inversion", "<evening>"),
    ] {
        assert_eq!(full.get(name).map(String::as_str), Some(text), "{name}");
    }
    let config = SchedulerConfig::from_json(&full["scheduler_config"])?;
    assert_eq!((config.class, config.beta_end, config.clip_sample), (SchedulerClass::Ddim, Some(0.012), Some(false)));
    let plain = texts(&DrawOptions { scheduler: None, ..few.clone() })?;
    assert_eq!(plain["scheduler"], "PNDMScheduler");
    assert!(["eta", "guidance_rescale", "image", "mask", "controlnet", "noise"].iter().all(|name| !plain.contains_key(*name)));
    // A seed that the first noise is not of is not called one.
    let latents = Some(EXPECTED["latents"].clone());
    let started = texts(&DrawOptions { latents, ..few.clone() })?;
    assert_eq!((started.get("seed"), started["noise"].as_str()), (None, "given as latents, all other of seed 3"));
    let drawn = texts(&DrawOptions { generator: Some(Generator::new(1)), ..few })?;
    assert_eq!((drawn.get("seed"), drawn["noise"].as_str()), (None, "of a given generator"));
    Ok(())
}

#[test]
fn the_ends_of_texts_that_are_too_long_are_told() -> Result<()> {
    let long = |end: &str| "x ".repeat(75) + end;
    let options = DrawOptions { prompt: long("the dusk, light"), num_inference_steps: 1, ..options() };
    for name in ["sd1", "xl"] {
        let pipeline = pipeline(name);
        let unread = |options: &DrawOptions| pipeline.draw(options, &mut |_| Ok(())).map(|drawn| drawn.unread);
        assert_eq!(unread(&options)?, ["the dusk , light"], "{name}");
        let negative_prompt = Some(long("sk"));
        assert_eq!(unread(&DrawOptions { negative_prompt, ..options.clone() })?, ["the dusk , light", "sk"], "{name}");
        assert!(unread(&DrawOptions { prompt: long(""), ..options.clone() })?.is_empty(), "{name}");
    }
    Ok(())
}

#[test]
fn half_precision_draws_nearly_the_same() -> Result<()> {
    let exact = pipeline("sd1").draw(&from_latents(), &mut |_| Ok(()))?;
    for dtype in [DType::BF16, DType::F16] {
        let options = LoadOptions { dtype, ..LoadOptions::default() };
        let drawn = StableDiffusion::load(fixtures().join("sd1"), options)?.draw(&from_latents(), &mut |_| Ok(()))?;
        let off = drawn.picture.to_dtype(DType::F32)?.sub(&exact.picture)?.abs()?.mean(())?.item::<f32>()?;
        assert!(off < 0.02, "{dtype}: {off}");
    }
    Ok(())
}

#[test]
fn a_word_has_vectors_of_its_own() -> Result<()> {
    let (mut pipeline, scratch) = (pipeline("sd1"), Scratch::new("word"));
    let table = safetensors::load(fixtures().join("sd1/text_encoder/model.fp16.safetensors"))?;
    let table = table["text_model.embeddings.token_embedding.weight"].to_dtype(DType::F32)?;
    let tokenizer = Tokenizer::from_folder(fixtures().join("sd1/tokenizer"))?;
    let ids = tokenizer.encode("dusk light")?;
    let rows = Tensor::from_vec(ids.iter().map(|&id| i64::from(id)).collect(), [ids.len()])?.embedding(&table)?;
    // A word that stands for two tokens reads as these do.
    let path = scratch.0.join("word.safetensors");
    TextualInversion::new("<evening>", &[rows])?.save(&path)?;
    let spelt = pipeline.draw(&DrawOptions { prompt: "a dusk light, the".into(), ..from_latents() }, &mut |_| Ok(()))?;
    let worded = DrawOptions { prompt: "a <evening>, the".into(), ..from_latents() };
    let before = pipeline.draw(&worded, &mut |_| Ok(()))?;
    pipeline.add_word(TextualInversion::load(&path, None)?)?;
    let after = pipeline.draw(&worded, &mut |_| Ok(()))?;
    assert_ne!(before.picture.to_vec::<f32>()?, spelt.picture.to_vec::<f32>()?);
    assert_eq!(after.picture.to_vec::<f32>()?, spelt.picture.to_vec::<f32>()?);
    let twice = TextualInversion::load(&path, None).and_then(|word| pipeline.add_word(word));
    assert!(twice.unwrap_err().to_string().contains("`<evening>` already"));
    Ok(())
}

fn expect_error<T>(result: Result<T>, parts: &[&str]) {
    let error = result.err().expect("an error was expected").to_string();
    for part in parts {
        assert!(error.contains(part), "`{part}` is not in: {error}");
    }
}

/// Every tensor gets the name that the conversion of `diffusers` gives it.
#[test]
fn names_of_ldm_become_those_of_the_reference() {
    let text = std::fs::read_to_string(fixtures().join("ldm.json")).unwrap();
    let expected: serde_json::Value = serde_json::from_str(&text).unwrap();
    type Convert = fn(StateDict) -> Result<StateDict>;
    let conversions: [(&str, Convert); 4] = [
        ("unet_sd1", |state| unet_from_ldm(state, 2)),
        ("unet_xl", |state| unet_from_ldm(state, 2)),
        ("controlnet", |state| controlnet_from_ldm(state, 2)),
        ("vae", vae_from_ldm),
    ];
    for (network, convert) in conversions {
        let pairs: Vec<(&str, &str)> =
            expected[network].as_object().unwrap().iter().map(|(old, new)| (old.as_str(), new.as_str().unwrap())).collect();
        assert!(pairs.len() > 90, "{network}");
        let number = |i: usize| Tensor::from_vec(vec![i as f32], [1, 1, 1, 1]).unwrap();
        let state = pairs.iter().enumerate().map(|(i, (old, _))| ((*old).to_owned(), number(i))).collect();
        let converted = convert(state).unwrap();
        assert_eq!(converted.len(), pairs.len(), "{network}");
        for (i, (old, new)) in pairs.iter().enumerate() {
            let found = converted.get(*new).unwrap_or_else(|| panic!("{network}: {old} did not become {new}"));
            assert_eq!(found.to_vec::<f32>().unwrap(), [i as f32], "{network}: {old}");
        }
    }
}

#[test]
fn what_is_wrong_is_named() {
    let pipeline = pipeline("sd1");
    let draw = |options: DrawOptions| pipeline.draw(&options, &mut |_| Ok(()));
    expect_error(draw(DrawOptions { width: Some(36), ..options() }), &["width 36", "multiples of 8"]);
    expect_error(draw(DrawOptions { height: Some(0), ..options() }), &["height 0"]);
    expect_error(draw(DrawOptions { num_inference_steps: 0, ..options() }), &["one step"]);
    expect_error(draw(DrawOptions { strength: Some(0.5), ..options() }), &["strength", "initial picture"]);
    expect_error(draw(DrawOptions { mask: Some(EXPECTED["mask"].clone()), ..options() }), &["mask"]);
    expect_error(draw(DrawOptions { image: Some(signed("image")), strength: Some(1.5), ..options() }), &["strength 1.5"]);
    expect_error(draw(DrawOptions { image: Some(signed("image")), strength: Some(0.01), ..options() }), &["less than one step"]);
    expect_error(draw(DrawOptions { clip_skip: 9, ..options() }), &["9 of 3"]);
    expect_error(draw(DrawOptions { latents: Some(Tensor::zeros([1, 4, 9, 4], ()).unwrap()), ..options() }), &["[1, 4, 4, 4]"]);
    expect_error("dpm9000".parse::<SchedulerKind>(), &["dpm9000", "ddim"]);
}

#[test]
fn broken_folders_are_errors_that_name_the_part() {
    let load = |scratch: &Scratch| StableDiffusion::load(&scratch.0, LoadOptions::default());
    expect_error(load(&Scratch::new("empty")), &["model_index.json"]);
    let scratch = Scratch::copy("missing", "sd1");
    std::fs::remove_dir_all(scratch.0.join("vae")).unwrap();
    expect_error(load(&scratch), &["vae"]);
    let scratch = Scratch::copy("class", "sd1");
    std::fs::write(scratch.0.join("model_index.json"), r#"{"_class_name": "FluxPipeline"}"#).unwrap();
    expect_error(load(&scratch), &["FluxPipeline", "StableDiffusionPipeline"]);
    let scratch = Scratch::copy("scheduler", "sd1");
    std::fs::write(scratch.0.join("scheduler/scheduler_config.json"), r#"{"_class_name": "MagicScheduler"}"#).unwrap();
    expect_error(load(&scratch), &["MagicScheduler"]);
    let scratch = Scratch::copy("refiner", "xl");
    let parts = ["tokenizer", "text_encoder"];
    edit(scratch.0.join("model_index.json"), |index| parts.iter().for_each(|part| index[*part] = serde_json::json!([null, null])));
    parts.iter().for_each(|part| std::fs::remove_dir_all(scratch.0.join(part)).unwrap());
    expect_error(load(&scratch), &["does without tokenizer, text_encoder", "refiner", "not supported"]);
    let scratch = Scratch::copy("weights", "sd1");
    std::fs::remove_file(scratch.0.join("unet/diffusion_pytorch_model.fp16.safetensors")).unwrap();
    let opened = load(&scratch).unwrap();
    expect_error(opened.draw(&options(), &mut |_| Ok(())), &["unet", "diffusion_pytorch_model.safetensors"]);
}

#[test]
fn corrupt_pictures_are_errors() -> Result<()> {
    let (pipeline, scratch) = (pipeline("sd1"), Scratch::new("corrupt"));
    let path = scratch.0.join("picture.png");
    pipeline.draw(&DrawOptions { num_inference_steps: 1, ..options() }, &mut |_| Ok(()))?.save(&path)?;
    let sound = std::fs::read(&path).unwrap();
    load_picture(&path)?;
    for cut in [0, 7, 20, 60, sound.len() / 2, sound.len() - 20] {
        std::fs::write(&path, &sound[..cut]).unwrap();
        assert!(load_picture(&path).is_err() && read_png_text(&path).is_err(), "{cut}");
    }
    let mut broken = sound.clone();
    let middle = broken.len() - 30;
    broken[middle] ^= 0x55;
    std::fs::write(&path, &broken).unwrap();
    assert!(load_picture(&path).is_err() && read_png_text(&path).is_err());
    std::fs::write(&path, b"no picture").unwrap();
    expect_error(load_picture(&path), &["picture.png"]);
    expect_error(load_picture(scratch.0.join("nothing.png")), &["nothing.png"]);
    Ok(())
}
