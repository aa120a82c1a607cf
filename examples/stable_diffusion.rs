//! Draws what a prompt says with Stable Diffusion 1.5, 2.1 or XL. `cargo run --example stable_diffusion -- --model FOLDER --prompt "…"`
//!
//! Writes PNGs that carry the prompt, the seed and the settings, and beside each a rough preview while it is drawn. Says how long each phase
//! took, and how much memory.

use clap::Parser;
use kiln::diffusion::pipeline::{
    ControlInput, DrawOptions, Drawn, LoadOptions, Phase, StableDiffusion, Step, TextualInversion, load_picture, read_png_text,
};
use kiln::diffusion::schedulers::SchedulerKind;
use kiln::lora::LoraWeights;
use kiln::nn::ParamsOptions;
use kiln::prelude::*;
use kiln::report::{Progress, save_grid};
use kiln::vae::split_colour;
use kiln::{Error, Result, memory_stats, reset_peak, set_default_device};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Steps between two previews.
const PREVIEW_EVERY: usize = 5;

/// Draws what a prompt says with Stable Diffusion 1.5, 2.1 or XL.
///
/// The pictures are those of `diffusers` for the same seed. Each network is read when its part comes and dropped after it.
#[derive(Parser, Debug)]
struct Args {
    /// Folder of `diffusers`' layout: model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/.
    #[arg(long)]
    model: Option<PathBuf>,
    /// A checkpoint of a single file in LDM's names; configurations and vocabularies then come from --model.
    #[arg(long, value_name = "FILE", requires = "model")]
    checkpoint: Option<PathBuf>,
    /// What the picture shows.
    #[arg(long, default_value = "a lighthouse on a cliff at dusk, oil painting")]
    prompt: String,
    /// What it shall not show.
    #[arg(long)]
    negative_prompt: Option<String>,
    /// Steps of the scheduler.
    #[arg(long, default_value_t = 30)]
    steps: usize,
    /// How much more the prompt counts than the network says; 1 for no guidance.
    #[arg(long, default_value_t = 7.5)]
    guidance: f64,
    /// Brings back the contrast that guidance raised: 0 not at all, 0.7 as published.
    #[arg(long, default_value_t = 0.0)]
    guidance_rescale: f64,
    /// Seed of the first picture; each further one has the next.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Width, a multiple of 8; that of the model's training by default.
    #[arg(long)]
    width: Option<usize>,
    /// Height, as the width.
    #[arg(long)]
    height: Option<usize>,
    #[arg(long, help = format!("Another scheduler than the model's, whatever that is: {}", SchedulerKind::names()))]
    scheduler: Option<SchedulerKind>,
    /// A LoRA (kohya, diffusers, PEFT), with its weight after a colon. Several add up.
    #[arg(long, value_name = "FILE[:WEIGHT]")]
    lora: Vec<String>,
    /// A textual inversion: its word can be used in prompts.
    #[arg(long, value_name = "FILE")]
    embedding: Vec<PathBuf>,
    /// Folder of a ControlNet. Several are summed; each takes a --control-image.
    #[arg(long, value_name = "FOLDER")]
    controlnet: Vec<PathBuf>,
    /// The picture that a ControlNet reads.
    #[arg(long, value_name = "PNG")]
    control_image: Vec<PathBuf>,
    /// How much the ControlNets count.
    #[arg(long, default_value_t = 1.0)]
    control_scale: f64,
    /// Lets the ControlNets lead: the prompt matters less.
    #[arg(long)]
    guess_mode: bool,
    /// A picture to start from.
    #[arg(long, value_name = "PNG")]
    init_image: Option<PathBuf>,
    /// How much of it is drawn anew, 0 to 1.
    #[arg(long)]
    strength: Option<f64>,
    /// White where the initial picture is drawn anew.
    #[arg(long, value_name = "PNG")]
    mask: Option<PathBuf>,
    /// Blocks of the text encoder to leave out at its end.
    #[arg(long, default_value_t = 0)]
    clip_skip: usize,
    /// Number of pictures.
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// Dtype of the networks: f32, bf16, f16.
    #[arg(long, default_value = "f32")]
    dtype: DType,
    /// Decode large pictures in tiles: less memory, nearly the same picture.
    #[arg(long)]
    vae_tiling: bool,
    /// Device: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Threads; all cores by default. The picture does not depend on it.
    #[arg(long)]
    threads: Option<usize>,
    /// Folder for the pictures.
    #[arg(long, default_value = "out/stable_diffusion")]
    out: PathBuf,
    /// Only print what a PNG says of how it was drawn.
    #[arg(long, value_name = "PNG")]
    read: Option<PathBuf>,
}

const WHERE: &str = "\
No model was given. Put one where you like and name it with --model; a folder looks like this:

    stable-diffusion-v1-5/
        model_index.json
        scheduler/scheduler_config.json
        text_encoder/config.json, model.safetensors
        tokenizer/vocab.json, merges.txt
        unet/config.json, diffusion_pytorch_model.safetensors
        vae/config.json, diffusion_pytorch_model.safetensors

`diffusers` writes such folders with pipe.save_pretrained(\"stable-diffusion-v1-5\"); `huggingface-cli download
stable-diffusion-v1-5/stable-diffusion-v1-5 --local-dir stable-diffusion-v1-5` fetches one. SDXL has text_encoder_2/ and tokenizer_2/ too.
A single .safetensors file in LDM's names goes with --checkpoint, beside a folder that has all of this but the weights.";

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(path) = &args.read {
        read_png_text(path)?.iter().for_each(|(name, text)| println!("{name}: {text}"));
        return Ok(());
    }
    let Some(model) = &args.model else {
        println!("{WHERE}");
        return Ok(());
    };
    if let Some(threads) = args.threads {
        kiln::set_threads(threads)?;
    }
    set_default_device(args.device);
    let load = LoadOptions {
        dtype: args.dtype,
        device: args.device,
        keep: args.count > 1,
        scheduler: args.scheduler,
        vae_tiling: args.vae_tiling,
        ..LoadOptions::default()
    };
    let mut pipeline = match &args.checkpoint {
        Some(file) => StableDiffusion::load_single_file(file, model, load)?,
        None => StableDiffusion::load(model, load)?,
    };
    for lora in &args.lora {
        let (file, weight) = with_weight(lora)?;
        pipeline.add_lora(file, &LoraWeights::load(file)?, weight)?;
    }
    for file in &args.embedding {
        pipeline.add_word(TextualInversion::load(file, None)?)?;
    }
    let options = draw_options(&args)?;
    for seed in (0..args.count).map(|i| args.seed.wrapping_add(i)) {
        let path = args.out.join(format!("{seed:05}.png"));
        let start = Instant::now();
        let mut phases = Phases::new(args.device);
        let preview = args.out.join(format!("{seed:05}_preview.png"));
        let drawn = draw(&pipeline, &DrawOptions { seed, ..options.clone() }, &preview, &mut phases)?;
        drawn.save(&path)?;
        println!("seed {seed}: {} after {:.1} s ({})", path.display(), start.elapsed().as_secs_f64(), phases.done.join("; "));
        drawn.unread.iter().for_each(|rest| println!("not read, because the text is too long: {rest}"));
    }
    Ok(())
}

/// `FILE:WEIGHT`, or a file whose weight is 1.
fn with_weight(lora: &str) -> Result<(&str, f64)> {
    match lora.rsplit_once(':') {
        Some((file, weight)) if !weight.contains(['/', '\\']) => {
            let wrong = |_| Error::argument("lora", format!("`{weight}` in `{lora}` is no weight"));
            Ok((file, weight.parse().map_err(wrong)?))
        }
        _ => Ok((lora, 1.0)),
    }
}

fn draw_options(args: &Args) -> Result<DrawOptions> {
    let image = args.init_image.as_ref().map(load_picture).transpose()?;
    let mask = args.mask.as_ref().map(|path| to_unit(&split_colour(&load_picture(path)?)?.0)).transpose()?;
    Ok(DrawOptions {
        prompt: args.prompt.clone(),
        negative_prompt: args.negative_prompt.clone(),
        num_inference_steps: args.steps,
        guidance_scale: args.guidance,
        guidance_rescale: args.guidance_rescale,
        height: args.height,
        width: args.width,
        clip_skip: args.clip_skip,
        image,
        strength: args.strength,
        mask,
        controls: controls(args)?,
        ..DrawOptions::default()
    })
}

fn controls(args: &Args) -> Result<Vec<ControlInput>> {
    if args.controlnet.len() != args.control_image.len() {
        let message = format!("{} --controlnet for {} --control-image: each takes one", args.controlnet.len(), args.control_image.len());
        return Err(Error::argument("controlnet", message));
    }
    let one = |(folder, image): (&PathBuf, &PathBuf)| {
        let params = Params::with(ParamsOptions { dtype: args.dtype, device: args.device, ..ParamsOptions::default() });
        let network = ControlInput::load_network(folder, &params)?;
        let input = ControlInput::new(network, &to_unit(&load_picture(image)?)?);
        Ok(ControlInput { conditioning_scale: args.control_scale, guess_mode: args.guess_mode, ..input })
    };
    args.controlnet.iter().zip(&args.control_image).map(one).collect()
}

/// Values of [−1, 1] as values of [0, 1].
fn to_unit(picture: &Tensor) -> Result<Tensor> {
    picture.add_scalar(1.0)?.mul_scalar(0.5)
}

/// The time and the memory that each phase of a picture took.
struct Phases {
    device: Device,
    running: Option<(Phase, Instant)>,
    done: Vec<String>,
}

impl Phases {
    fn new(device: Device) -> Self {
        Self { device, running: None, done: Vec::new() }
    }

    /// Ends the phase before, if another one begins.
    fn enter(&mut self, phase: Phase) -> Result<()> {
        if self.running.is_none_or(|(running, _)| running != phase) {
            self.leave()?;
            self.device.gpu()?.map_or_else(reset_peak, |gpu| gpu.reset_peak());
            self.running = Some((phase, Instant::now()));
        }
        Ok(())
    }

    fn leave(&mut self) -> Result<()> {
        let Some((phase, start)) = self.running.take() else { return Ok(()) };
        self.device.synchronize()?;
        let peak = self.device.gpu()?.map_or_else(|| memory_stats().peak, |gpu| gpu.memory_stats().peak);
        let name = match phase {
            Phase::Prompt => "reading the prompt",
            Phase::Encode => "reading the picture",
            Phase::Denoise => "drawing",
            Phase::Decode => "decoding",
        };
        self.done.push(format!("{name} {:.1} s, {} MiB at most", start.elapsed().as_secs_f64(), peak.div_ceil(1 << 20)));
        Ok(())
    }
}

fn draw(pipeline: &StableDiffusion, options: &DrawOptions, preview: &Path, phases: &mut Phases) -> Result<Drawn> {
    let mut progress: Option<Progress> = None;
    let mut seen = |step: &Step<'_>| -> Result<()> {
        phases.enter(step.phase)?;
        if step.phase == Phase::Denoise {
            progress.get_or_insert_with(|| Progress::new(step.total as u64, "drawing")).set(step.done as u64, &[]);
            if let Some(picture) = step.preview()?.filter(|_| step.done.is_multiple_of(PREVIEW_EVERY)) {
                save_grid(preview, &picture, 1)?;
            }
        } else if step.phase == Phase::Decode && step.done == 0 {
            progress.iter().for_each(Progress::finish);
        }
        Ok(())
    };
    let drawn = pipeline.draw(options, &mut seen)?;
    phases.leave()?;
    Ok(drawn)
}
