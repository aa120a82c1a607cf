//! What `scheduler_config.json` says, with the defaults of each class, and how one scheduler is made from another's configuration.

use super::names::{
    AlgorithmType, BetaSchedule, FinalSigmas, InterpolationType, PredictionType, SchedulerClass, SchedulerKind, SolverType, TimeShiftType,
    TimestepSpacing, TimestepType, VarianceType,
};
use kiln_tensor::io::write_atomic;
use kiln_tensor::{Error, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::DeserializeOwned};
use serde_json::{Map, Value};
use std::io::Write;
use std::path::Path;

const OP: &str = "scheduler config";

/// The fields: each an `Option` in the configuration (none: the class's default), and resolved in `Settings`; those after the semicolon
/// may be absent there too.
macro_rules! fields {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $default:expr,)*; $($(#[$note:meta])* $may:ident: $held:ty,)*) => {
        /// The configuration of a scheduler: what `scheduler_config.json` holds. A field that is `None` has the default of the class.
        ///
        /// ```
        /// use kiln_models::diffusion::schedulers::{PredictionType, SchedulerConfig, SchedulerKind};
        ///
        /// # fn main() -> kiln_tensor::Result<()> {
        /// let mut config = SchedulerConfig::from_json(r#"{"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"}"#)?;
        /// config.prediction_type = Some(PredictionType::VPrediction);
        /// let mut scheduler = config.with_kind(SchedulerKind::Ddim).build()?;
        /// scheduler.set_timesteps(25)?;
        /// assert_eq!(scheduler.timesteps()[0], 960.0);
        /// # Ok(()) }
        /// ```
        #[derive(Clone, PartialEq, Debug)]
        pub struct SchedulerConfig {
            /// Which scheduler.
            pub class: SchedulerClass,
            $($(#[$doc])* pub $name: Option<$type>,)*
            $($(#[$note])* pub $may: Option<$held>,)*
            /// What no class here knows, kept to be written back.
            pub extra: Map<String, Value>,
        }

        /// A configuration in which every field has its value.
        #[derive(Clone, Debug)]
        pub(crate) struct Settings {
            $(pub $name: $type,)*
            $(pub $may: Option<$held>,)*
        }

        impl SchedulerConfig {
            /// That of a class, with its defaults.
            pub fn new(class: SchedulerClass) -> Self {
                Self { class, $($name: None,)* $($may: None,)* extra: Map::new() }
            }

            fn from_map(class: SchedulerClass, mut map: Map<String, Value>) -> Result<Self> {
                Ok(Self {
                    class,
                    $($name: take(&mut map, stringify!($name))?,)*
                    $($may: take(&mut map, stringify!($may))?,)*
                    extra: map,
                })
            }

            /// The fields with the class's defaults.
            pub(crate) fn settings(&self) -> Settings {
                let class = self.class.defaults();
                Settings {
                    $($name: self.$name.clone().or(class.$name).unwrap_or_else(|| $default),)*
                    $($may: self.$may.clone(),)*
                }
            }

            fn to_map(&self) -> Result<Map<String, Value>> {
                let settings = self.settings();
                let mut map = Map::from_iter([("_class_name".to_owned(), Value::from(self.class.name()))]);
                $(if self.$name.is_some() || self.class.knows(stringify!($name)) {
                    put(&mut map, stringify!($name), &settings.$name)?;
                })*
                $(if self.$may.is_some() || self.class.knows(stringify!($may)) {
                    put(&mut map, stringify!($may), &settings.$may)?;
                })*
                map.extend(self.extra.clone());
                Ok(map)
            }
        }
    };
}

fields! {
    /// Timesteps of training, T.
    num_train_timesteps: usize = 1000,
    /// The first β.
    beta_start: f64 = 0.0001,
    /// The last β.
    beta_end: f64 = 0.02,
    /// How β grows.
    beta_schedule: BetaSchedule = BetaSchedule::Linear,
    /// What the network predicts.
    prediction_type: PredictionType = PredictionType::Epsilon,
    /// Whether β is rescaled so that the last timestep is pure noise (Lin et al., 2024).
    rescale_betas_zero_snr: bool = false,
    /// Which timesteps a run visits.
    timestep_spacing: TimestepSpacing = TimestepSpacing::Leading,
    /// Added to the timesteps of `leading`.
    steps_offset: i64 = 0,
    /// Whether x₀ is clipped.
    clip_sample: bool = true,
    /// What x₀ is clipped to: ± this.
    clip_sample_range: f64 = 1.0,
    /// Whether x₀ is thresholded dynamically (Saharia et al., *Imagen*, 2022).
    thresholding: bool = false,
    /// The quantile of |x₀| that dynamic thresholding takes as the new range.
    dynamic_thresholding_ratio: f64 = 0.995,
    /// The largest such range.
    sample_max_value: f64 = 1.0,
    /// Whether the step below the first timestep has no noise at all (otherwise that of timestep 0).
    set_alpha_to_one: bool = true,
    /// The variance of DDPM's noise; DPM-Solver knows only whether it is learned.
    variance_type: VarianceType = VarianceType::FixedSmall,
    /// Whether PNDM goes without its Runge–Kutta steps.
    skip_prk_steps: bool = false,
    /// Whether the noise levels are those of Karras et al. (2022).
    use_karras_sigmas: bool = false,
    /// Whether the noise levels are evenly spaced in log σ.
    use_exponential_sigmas: bool = false,
    /// Whether the noise levels are quantiles of a beta distribution (Lee et al., *Beta Sampling is All You Need*, 2024).
    use_beta_sigmas: bool = false,
    /// Whether the noise levels are evenly spaced in log-SNR (Lu et al.).
    use_lu_lambdas: bool = false,
    /// Whether the noise levels are those of a flow.
    use_flow_sigmas: bool = false,
    /// The shift of a flow's noise levels, in DPM-Solver and UniPC.
    flow_shift: f64 = 1.0,
    /// The level that a run ends at.
    final_sigmas_type: FinalSigmas = FinalSigmas::Zero,
    /// How the levels lie between those of training.
    interpolation_type: InterpolationType = InterpolationType::Linear,
    /// What the network is told of the time.
    timestep_type: TimestepType = TimestepType::Discrete,
    /// The order of a multistep solver, 1 to 3.
    solver_order: usize = 2,
    /// Which equation DPM-Solver integrates.
    algorithm_type: AlgorithmType = AlgorithmType::DpmSolverPlusPlus,
    /// The variant of the solver.
    solver_type: SolverType = SolverType::Midpoint,
    /// Whether the last steps of a run of fewer than 15 are of lower order.
    lower_order_final: bool = true,
    /// Whether the last step is of first order.
    euler_at_final: bool = false,
    /// The smallest log-SNR of a run.
    lambda_min_clipped: f64 = f64::NEG_INFINITY,
    /// Whether UniPC predicts the sample, not the noise.
    predict_x0: bool = true,
    /// The steps after which UniPC does not correct.
    disable_corrector: Vec<usize> = Vec::new(),
    /// The steps that a consistency model was distilled from.
    original_inference_steps: usize = 50,
    /// What timesteps are multiplied by in a consistency model's boundary condition.
    timestep_scaling: f64 = 10.0,
    /// The shift of a flow's noise levels: σ′ = s σ / (1 + (s − 1) σ).
    shift: f64 = 1.0,
    /// Whether the shift depends on the size of the picture, through μ.
    use_dynamic_shifting: bool = false,
    /// μ at `base_image_seq_len` tokens.
    base_shift: f64 = 0.5,
    /// μ at `max_image_seq_len` tokens.
    max_shift: f64 = 1.15,
    /// Tokens of the smallest picture.
    base_image_seq_len: usize = 256,
    /// Tokens of the largest picture.
    max_image_seq_len: usize = 4096,
    /// How μ is meant.
    time_shift_type: TimeShiftType = TimeShiftType::Exponential,
    /// Whether levels rise from 0 to 1.
    invert_sigmas: bool = false,
    /// Whether each step of a flow draws new noise.
    stochastic_sampling: bool = false,
    ;
    /// The βs themselves, in place of a schedule.
    trained_betas: Vec<f64>,
    /// The lowest noise level of Karras's, the exponential and the beta spacing; the run's own if none.
    sigma_min: f64,
    /// The highest noise level of the same.
    sigma_max: f64,
    /// The level that a flow's last one is stretched to.
    shift_terminal: f64,
}

fn take<T: DeserializeOwned>(map: &mut Map<String, Value>, key: &str) -> Result<Option<T>> {
    match map.shift_remove(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            let text = value.to_string();
            serde_json::from_value(value).map(Some).map_err(|e| Error::format(OP, format!("{key} = {text}: {e}")))
        }
    }
}

fn put(map: &mut Map<String, Value>, key: &str, value: &impl Serialize) -> Result<()> {
    let json = serde_json::to_value(value).map_err(|e| Error::format(OP, format!("{key}: {e}")))?;
    // JSON has no −∞, the default of `lambda_min_clipped`: a reader takes it if the field is not there.
    if key != "lambda_min_clipped" || !json.is_null() {
        map.insert(key.to_owned(), json);
    }
    Ok(())
}

const BETAS: &[&str] = &["num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"];
const STEPS: &[&str] = &["timestep_spacing", "steps_offset"];
const ZERO_SNR: &[&str] = &["rescale_betas_zero_snr"];
const CLIP: &[&str] = &["clip_sample", "clip_sample_range"];
const THRESHOLD: &[&str] = &["thresholding", "dynamic_thresholding_ratio", "sample_max_value"];
const SIGMAS: &[&str] = &["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"];

const MULTISTEP: &[&str] = &[
    "solver_order",
    "solver_type",
    "lower_order_final",
    "use_flow_sigmas",
    "flow_shift",
    "final_sigmas_type",
    "use_dynamic_shifting",
    "time_shift_type",
];
const FLOW: &[&str] = &[
    "num_train_timesteps",
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "invert_sigmas",
    "shift_terminal",
    "time_shift_type",
    "stochastic_sampling",
];

impl SchedulerClass {
    /// What this class sets otherwise than the rest.
    fn defaults(self) -> SchedulerConfig {
        let base = SchedulerConfig::new(self);
        let linspace = Some(TimestepSpacing::Linspace);
        match self {
            Self::Ddpm | Self::Ddim => base,
            Self::Pndm => SchedulerConfig { set_alpha_to_one: Some(false), ..base },
            Self::Euler | Self::EulerAncestral | Self::DpmSolverMultistep => SchedulerConfig { timestep_spacing: linspace, ..base },
            Self::UniPcMultistep => SchedulerConfig { timestep_spacing: linspace, solver_type: Some(SolverType::Bh2), ..base },
            Self::Heun => SchedulerConfig {
                beta_start: Some(0.00085),
                beta_end: Some(0.012),
                clip_sample: Some(false),
                timestep_spacing: linspace,
                ..base
            },
            Self::Lcm => SchedulerConfig {
                beta_start: Some(0.00085),
                beta_end: Some(0.012),
                beta_schedule: Some(BetaSchedule::ScaledLinear),
                clip_sample: Some(false),
                ..base
            },
            Self::FlowEuler => base,
        }
    }

    /// The fields of the class, in groups.
    fn fields(self) -> Vec<&'static [&'static str]> {
        match self {
            Self::Ddpm => vec![BETAS, STEPS, ZERO_SNR, CLIP, THRESHOLD, &["variance_type"]],
            Self::Ddim => vec![BETAS, STEPS, ZERO_SNR, CLIP, THRESHOLD, &["set_alpha_to_one"]],
            Self::Pndm => vec![BETAS, STEPS, &["skip_prk_steps", "set_alpha_to_one"]],
            Self::Euler => {
                let own: &[&str] = &["interpolation_type", "sigma_min", "sigma_max", "timestep_type", "final_sigmas_type"];
                vec![BETAS, STEPS, ZERO_SNR, SIGMAS, own]
            }
            Self::EulerAncestral => vec![BETAS, STEPS, ZERO_SNR],
            Self::Heun => vec![BETAS, STEPS, CLIP, SIGMAS],
            Self::DpmSolverMultistep => {
                let own: &[&str] = &["algorithm_type", "euler_at_final", "use_lu_lambdas", "lambda_min_clipped"];
                vec![BETAS, STEPS, ZERO_SNR, THRESHOLD, SIGMAS, MULTISTEP, own]
            }
            Self::UniPcMultistep => {
                let own: &[&str] = &["predict_x0", "disable_corrector", "sigma_min", "sigma_max", "shift_terminal"];
                vec![BETAS, STEPS, ZERO_SNR, THRESHOLD, SIGMAS, MULTISTEP, own]
            }
            Self::Lcm => {
                let own: &[&str] = &["set_alpha_to_one", "original_inference_steps", "timestep_scaling"];
                vec![BETAS, STEPS, ZERO_SNR, CLIP, THRESHOLD, own]
            }
            Self::FlowEuler => vec![SIGMAS, FLOW],
        }
    }

    fn knows(self, field: &str) -> bool {
        self.fields().iter().any(|group| group.contains(&field))
    }
}

impl SchedulerKind {
    /// The scheduler behind it.
    pub fn class(self) -> SchedulerClass {
        match self {
            Self::Ddpm => SchedulerClass::Ddpm,
            Self::Ddim => SchedulerClass::Ddim,
            Self::Pndm => SchedulerClass::Pndm,
            Self::Euler | Self::EulerKarras => SchedulerClass::Euler,
            Self::EulerAncestral => SchedulerClass::EulerAncestral,
            Self::Heun | Self::HeunKarras => SchedulerClass::Heun,
            Self::DpmSolver2M | Self::DpmSolver2MKarras | Self::DpmSolver2MSde | Self::DpmSolver2MSdeKarras | Self::DpmSolver3M => {
                SchedulerClass::DpmSolverMultistep
            }
            Self::UniPc | Self::UniPcKarras => SchedulerClass::UniPcMultistep,
            Self::Lcm => SchedulerClass::Lcm,
            Self::FlowEuler => SchedulerClass::FlowEuler,
        }
    }

    fn karras(self) -> bool {
        let with = [Self::EulerKarras, Self::HeunKarras, Self::DpmSolver2MKarras, Self::DpmSolver2MSdeKarras, Self::UniPcKarras];
        with.contains(&self)
    }

    /// What the name says of DPM-Solver++: its order and whether it is that of the SDE.
    fn dpm_solver(self) -> Option<(usize, AlgorithmType)> {
        match self {
            Self::DpmSolver2M | Self::DpmSolver2MKarras => Some((2, AlgorithmType::DpmSolverPlusPlus)),
            Self::DpmSolver2MSde | Self::DpmSolver2MSdeKarras => Some((2, AlgorithmType::SdeDpmSolverPlusPlus)),
            Self::DpmSolver3M => Some((3, AlgorithmType::DpmSolverPlusPlus)),
            _ => None,
        }
    }
}

impl SchedulerConfig {
    /// From the text of a `scheduler_config.json`.
    ///
    /// # Errors
    /// If it is not JSON, names no scheduler that there is, or a field has a value of another kind; the error lists what there is.
    pub fn from_json(text: &str) -> Result<Self> {
        let mut map = fields_of(text)?;
        let class = take::<SchedulerClass>(&mut map, "_class_name")?.ok_or_else(|| {
            let names = SchedulerClass::names();
            Error::format(OP, format!("_class_name is missing; expected one of {names}"))
        })?;
        Self::from_map(class, map)
    }

    /// From a text as [`from_json`](Self::from_json) takes it, for another scheduler ([`with_kind`](Self::with_kind)) than it names: also
    /// where it names one that is not known here.
    ///
    /// # Errors
    /// If it is not JSON, or a field has a value of another kind.
    pub fn from_json_as(text: &str, kind: SchedulerKind) -> Result<Self> {
        let mut map = fields_of(text)?;
        let named = map.shift_remove("_class_name");
        let class = named.as_ref().and_then(Value::as_str).and_then(|name| name.parse().ok()).unwrap_or(kind.class());
        Ok(Self::from_map(class, map)?.with_kind(kind))
    }

    /// From a file, or from the `scheduler_config.json` of a folder.
    ///
    /// # Errors
    /// As [`from_json`](Self::from_json), or if it cannot be read.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        Self::read(path.as_ref(), Self::from_json)
    }

    /// As [`load`](Self::load), for another scheduler than the file names.
    ///
    /// # Errors
    /// As [`from_json_as`](Self::from_json_as), or if it cannot be read.
    pub fn load_as(path: impl AsRef<Path>, kind: SchedulerKind) -> Result<Self> {
        Self::read(path.as_ref(), |text| Self::from_json_as(text, kind))
    }

    fn read(path: &Path, parse: impl FnOnce(&str) -> Result<Self>) -> Result<Self> {
        let path = if path.is_dir() { path.join("scheduler_config.json") } else { path.to_owned() };
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(OP, path.display(), e))?;
        parse(&text).map_err(|e| Error::format(OP, format!("{}: {e}", path.display())))
    }

    /// As the text of a `scheduler_config.json`, with every field of the class.
    ///
    /// # Errors
    /// If a value has no form in JSON.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string_pretty(&self.to_map()?).map_err(|e| Error::format(OP, e.to_string()))
    }

    /// Writes the file.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let text = self.to_json()? + "\n";
        write_atomic(path, |file| file.write_all(text.as_bytes()).map_err(|e| Error::io(OP, path.display(), e)))
    }

    /// The shift μ of a flow for a picture of so many tokens: on the line through `base_shift` at `base_image_seq_len` and `max_shift` at
    /// `max_image_seq_len` (Flux's way), to be [set](super::Scheduler::set_mu).
    ///
    /// # Errors
    /// If the two lengths are equal.
    pub fn mu(&self, tokens: usize) -> Result<f64> {
        let settings = self.settings();
        let (from, to) = (settings.base_image_seq_len as f64, settings.max_image_seq_len as f64);
        if from == to {
            return Err(Error::argument(OP, format!("base_image_seq_len and max_image_seq_len are both {to}; expected two lengths")));
        }
        Ok(settings.base_shift + (settings.max_shift - settings.base_shift) * (tokens as f64 - from) / (to - from))
    }

    /// The configuration of another scheduler for the same model: what was given stays, the rest has the defaults of the new class, as
    /// in `NewScheduler.from_config(scheduler.config)`. What the kind's name says is set, and the repeated step of PLMS in place of its
    /// Runge–Kutta start. A flow's configuration becomes that of a flow.
    pub fn with_kind(&self, kind: SchedulerKind) -> Self {
        let mut config = Self { class: kind.class(), ..self.clone() };
        if config.class != self.class && self.class == SchedulerClass::FlowEuler {
            config.prediction_type = Some(PredictionType::FlowPrediction);
            (config.use_flow_sigmas, config.flow_shift) = (Some(true), self.shift.or(self.flow_shift));
        }
        if config.class.knows("use_karras_sigmas") && config.class != SchedulerClass::FlowEuler {
            config.use_karras_sigmas = Some(kind.karras());
            if kind.karras() {
                (config.use_exponential_sigmas, config.use_beta_sigmas, config.use_lu_lambdas) = (Some(false), Some(false), Some(false));
            }
        }
        if let Some((order, algorithm)) = kind.dpm_solver() {
            (config.solver_order, config.algorithm_type) = (Some(order), Some(algorithm));
        }
        if kind == SchedulerKind::Pndm {
            config.skip_prk_steps = Some(true);
        }
        config
    }
}

impl Serialize for SchedulerConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        self.to_map().map_err(serde::ser::Error::custom)?.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for SchedulerConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let map = Map::<String, Value>::deserialize(deserializer)?;
        Self::from_json(&Value::Object(map).to_string()).map_err(serde::de::Error::custom)
    }
}

/// The fields of a `scheduler_config.json`.
fn fields_of(text: &str) -> Result<Map<String, Value>> {
    serde_json::from_str(&without_infinity(text)).map_err(|e| Error::format(OP, e.to_string()))
}

/// Python writes `lambda_min_clipped` as `-Infinity`, which is no JSON: here it becomes null, which is the default.
fn without_infinity(text: &str) -> String {
    const KEY: &str = "\"lambda_min_clipped\"";
    let Some((before, after)) = text.split_once(KEY) else { return text.to_owned() };
    match after.trim_start().strip_prefix(':').and_then(|value| value.trim_start().strip_prefix("-Infinity")) {
        Some(rest) => format!("{before}{KEY}: null{rest}"),
        None => text.to_owned(),
    }
}
