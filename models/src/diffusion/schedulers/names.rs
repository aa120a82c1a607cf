//! The choices that a scheduler's configuration makes by name, spelt as in `scheduler_config.json`, and the names of the schedulers.

use kiln_tensor::{Error, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use std::str::FromStr;

/// An enum whose variants have names: `Display` writes the first one, `FromStr` and serde read any.
macro_rules! names {
    ($(#[$doc:meta])* $name:ident($what:literal) { $($(#[$about:meta])* $variant:ident = $text:literal $(| $other:literal)*,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum $name { $($(#[$about])* $variant,)* }

        impl $name {
            /// Every one.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The names of all, with commas between them.
            pub fn names() -> String {
                Self::ALL.iter().map(|one| one.name()).collect::<Vec<_>>().join(", ")
            }

            /// The name.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }

        impl FromStr for $name {
            type Err = Error;

            /// From a name; an error lists what there is.
            fn from_str(text: &str) -> Result<Self> {
                match text {
                    $($text $(| $other)* => Ok(Self::$variant),)*
                    _ => {
                        let names = Self::names();
                        Err(Error::argument($what, format!("{text:?} is not known; expected one of {names}")))
                    }
                }
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
                serializer.serialize_str(self.name())
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }
    };
}

names! {
    /// What the network's output is.
    PredictionType("prediction type") {
        /// The noise ε.
        Epsilon = "epsilon",
        /// The sample x₀ without noise.
        Sample = "sample" | "original_sample",
        /// The velocity v = √ᾱ ε − √(1 − ᾱ) x₀ (Salimans and Ho, 2022).
        VPrediction = "v_prediction",
        /// The velocity ε − x₀ of rectified flow.
        FlowPrediction = "flow_prediction",
    }
}

names! {
    /// How β grows from the first timestep of training to the last.
    BetaSchedule("beta schedule") {
        /// Evenly.
        Linear = "linear",
        /// Evenly in √β (latent diffusion).
        ScaledLinear = "scaled_linear",
        /// So that ᾱ follows a squared cosine (Nichol and Dhariwal, 2021), with β ≤ 0.999.
        SquaredcosCapV2 = "squaredcos_cap_v2",
        /// Along a logistic curve.
        Sigmoid = "sigmoid",
    }
}

names! {
    /// Which timesteps of training a run visits (table 2 of Lin et al., 2024).
    TimestepSpacing("timestep spacing") {
        /// Evenly from the first to the last.
        Linspace = "linspace",
        /// Whole multiples of a ratio, from the first on.
        Leading = "leading",
        /// Whole multiples of a ratio, from the last down.
        Trailing = "trailing",
    }
}

names! {
    /// The variance of the noise that DDPM adds at each step.
    VarianceType("variance type") {
        /// The posterior's, β̃.
        FixedSmall = "fixed_small",
        /// As `fixed_small`, as the exponential of half a logarithm, used as the standard deviation.
        FixedSmallLog = "fixed_small_log",
        /// β.
        FixedLarge = "fixed_large",
        /// What the network's second half of channels says.
        Learned = "learned",
        /// Between log β̃ and log β, where the network's second half of channels says (Nichol and Dhariwal, 2021).
        LearnedRange = "learned_range",
    }
}

names! {
    /// The equation that DPM-Solver integrates.
    AlgorithmType("algorithm type") {
        /// The ODE, with the noise predicted (Lu et al., 2022a).
        DpmSolver = "dpmsolver",
        /// The ODE, with the sample predicted (Lu et al., 2022b).
        DpmSolverPlusPlus = "dpmsolver++" | "deis",
        /// The SDE, with the noise predicted.
        SdeDpmSolver = "sde-dpmsolver",
        /// The SDE, with the sample predicted.
        SdeDpmSolverPlusPlus = "sde-dpmsolver++",
    }
}

names! {
    /// The variant of a multistep solver: `midpoint` and `heun` are DPM-Solver's, `bh1` and `bh2` UniPC's. Each takes the other's (and
    /// DEIS's `logrho`) for its own default.
    SolverType("solver type") {
        /// Second order as the midpoint rule.
        Midpoint = "midpoint",
        /// Second order as Heun's rule.
        Heun = "heun",
        /// B(h) = h.
        Bh1 = "bh1",
        /// B(h) = eʰ − 1.
        Bh2 = "bh2",
        /// DEIS's only one.
        Logrho = "logrho",
    }
}

names! {
    /// The noise level that a run ends at.
    FinalSigmas("final sigmas type") {
        /// No noise.
        Zero = "zero",
        /// The lowest level of training.
        SigmaMin = "sigma_min",
    }
}

names! {
    /// How a run's noise levels lie between those of training.
    InterpolationType("interpolation type") {
        /// Those of the timesteps.
        Linear = "linear",
        /// Evenly in log σ.
        LogLinear = "log_linear",
    }
}

names! {
    /// What the network is told of the time.
    TimestepType("timestep type") {
        /// The timestep of training.
        Discrete = "discrete",
        /// A quarter of log σ, if the network predicts v.
        Continuous = "continuous",
    }
}

names! {
    /// How the shift μ of a flow's times is meant.
    TimeShiftType("time shift type") {
        /// As the factor e^μ.
        Exponential = "exponential",
        /// As the factor itself.
        Linear = "linear",
    }
}

names! {
    /// A scheduler, by the name of its class in `diffusers`.
    SchedulerClass("scheduler class") {
        /// [`Ddpm`](super::Ddpm).
        Ddpm = "DDPMScheduler",
        /// [`Ddim`](super::Ddim).
        Ddim = "DDIMScheduler",
        /// [`Pndm`](super::Pndm).
        Pndm = "PNDMScheduler",
        /// [`Euler`](super::Euler).
        Euler = "EulerDiscreteScheduler",
        /// [`EulerAncestral`](super::EulerAncestral).
        EulerAncestral = "EulerAncestralDiscreteScheduler",
        /// [`Heun`](super::Heun).
        Heun = "HeunDiscreteScheduler",
        /// [`DpmSolverMultistep`](super::DpmSolverMultistep).
        DpmSolverMultistep = "DPMSolverMultistepScheduler",
        /// [`UniPcMultistep`](super::UniPcMultistep).
        UniPcMultistep = "UniPCMultistepScheduler",
        /// [`Lcm`](super::Lcm).
        Lcm = "LCMScheduler",
        /// [`FlowEuler`](super::FlowEuler).
        FlowEuler = "FlowMatchEulerDiscreteScheduler",
    }
}

names! {
    /// A way to sample, by the name that users know: a scheduler and its main options.
    SchedulerKind("scheduler") {
        /// Ancestral sampling with every posterior's noise.
        Ddpm = "ddpm",
        /// Deterministic, fewer steps.
        Ddim = "ddim",
        /// Linear multistep after one repeated step.
        Pndm = "pndm" | "plms",
        /// Euler steps along the ODE.
        Euler = "euler",
        /// The same at the noise levels of Karras et al.
        EulerKarras = "euler-karras",
        /// Euler steps with fresh noise.
        EulerAncestral = "euler-a" | "euler-ancestral",
        /// Heun's method, two calls of the network for each step.
        Heun = "heun",
        /// The same at the noise levels of Karras et al.
        HeunKarras = "heun-karras",
        /// DPM-Solver++ of second order, multistep.
        DpmSolver2M = "dpm++-2m" | "dpm++",
        /// The same at the noise levels of Karras et al.
        DpmSolver2MKarras = "dpm++-2m-karras",
        /// DPM-Solver++ of second order for the SDE.
        DpmSolver2MSde = "dpm++-2m-sde",
        /// The same at the noise levels of Karras et al.
        DpmSolver2MSdeKarras = "dpm++-2m-sde-karras",
        /// DPM-Solver++ of third order.
        DpmSolver3M = "dpm++-3m",
        /// Predictor and corrector.
        UniPc = "unipc",
        /// The same at the noise levels of Karras et al.
        UniPcKarras = "unipc-karras",
        /// For consistency models.
        Lcm = "lcm",
        /// Euler steps along a rectified flow.
        FlowEuler = "flow-euler",
    }
}
