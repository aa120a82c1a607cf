//! Noise schedules: β and ᾱ of training, which timesteps a run visits, and its noise levels σ = √((1 − ᾱ) / ᾱ).
//!
//! The tables are rounded to f32 where `diffusers` holds them in f32: at the first timesteps 1 − ᾱ keeps only a few of its digits, and a
//! table of f64 would give other noise levels.

use super::config::Settings;
use super::names::{BetaSchedule, TimestepSpacing};
use kiln_tensor::{Error, Result};

const OP: &str = "noise schedule";

/// Timesteps of training beyond which a configuration is taken for a mistake: the tables have that many entries.
const MOST_TIMESTEPS: usize = 1_000_000;

/// What ᾱ of the last timestep becomes where a noise level is to be finite although nothing of the sample is left.
const ALMOST_ZERO: f64 = 1.0 / (1 << 24) as f64;

pub(super) fn round32(x: f64) -> f64 {
    x as f32 as f64
}

/// `count` numbers from `start` to `end`, both included; of one number, `start`.
pub(super) fn linspace(start: f64, end: f64, count: usize) -> Vec<f64> {
    let step = (end - start) / count.saturating_sub(1).max(1) as f64;
    let last = count.saturating_sub(1);
    (0..count).map(|i| if i == last && i > 0 { end } else { start + step * i as f64 }).collect()
}

/// [`linspace`] in f32, counted from both ends with fused multiplications, as PyTorch does it.
fn linspace32(start: f64, end: f64, count: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    let step = (end - start) / count.saturating_sub(1).max(1) as f32;
    let value = |i: usize| {
        if i < count / 2 { step.mul_add(i as f32, start) } else { (-step).mul_add((count - 1 - i) as f32, end) }
    };
    // Of one number PyTorch takes the start.
    (0..count).map(|i| if count == 1 { start } else { value(i) }).collect()
}

fn squared_cosine(count: usize) -> Vec<f32> {
    let alpha_bar = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
    let time = |i: usize| i as f64 / count as f64;
    (0..count).map(|i| (1.0 - alpha_bar(time(i + 1)) / alpha_bar(time(i))).min(0.999) as f32).collect()
}

fn betas(settings: &Settings) -> Result<Vec<f32>> {
    let count = settings.num_train_timesteps;
    if count == 0 || count > MOST_TIMESTEPS {
        return Err(Error::argument(OP, format!("num_train_timesteps = {count}, expected 1 to {MOST_TIMESTEPS}")));
    }
    let (start, end) = (settings.beta_start, settings.beta_end);
    for (name, beta) in [("beta_start", start), ("beta_end", end)] {
        if !(0.0..=1.0).contains(&beta) {
            return Err(Error::argument(OP, format!("{name} = {beta}, expected 0 to 1")));
        }
    }
    if let Some(betas) = &settings.trained_betas {
        if betas.len() != count {
            return Err(Error::argument(OP, format!("{} trained_betas for num_train_timesteps = {count}", betas.len())));
        }
        return Ok(betas.iter().map(|&beta| beta as f32).collect());
    }
    Ok(match settings.beta_schedule {
        BetaSchedule::Linear => linspace32(start, end, count),
        BetaSchedule::ScaledLinear => linspace32(start.sqrt(), end.sqrt(), count).into_iter().map(|root| root * root).collect(),
        BetaSchedule::SquaredcosCapV2 => squared_cosine(count),
        BetaSchedule::Sigmoid => {
            let logistic = |x: f32| 1.0 / (1.0 + (-x).exp());
            linspace32(-6.0, 6.0, count).into_iter().map(|x| logistic(x) * (end - start) as f32 + start as f32).collect()
        }
    })
}

/// ᾱ: the running product of 1 − β.
fn cumprod(betas: &[f32]) -> Vec<f32> {
    let mut product = 1.0;
    let mut next = |&beta: &f32| {
        product *= (1.0 - beta) as f64;
        product as f32
    };
    betas.iter().map(&mut next).collect()
}

/// βs whose last ᾱ is zero: √ᾱ is shifted so that its last is 0 and scaled so that its first stays (algorithm 1 of Lin et al., *Common
/// Diffusion Noise Schedules and Sample Steps are Flawed*, 2024).
fn rescale_zero_terminal_snr(betas: &[f32]) -> Vec<f32> {
    let roots = cumprod(betas).into_iter().map(f32::sqrt).collect::<Vec<_>>();
    let (Some(&first), Some(&last)) = (roots.first(), roots.last()) else { return Vec::new() };
    let scale = first / (first - last);
    let alpha_bars = roots.iter().map(|root| ((root - last) * scale).powi(2)).collect::<Vec<_>>();
    let before = std::iter::once(1.0).chain(alpha_bars.iter().copied());
    alpha_bars.iter().zip(before).map(|(alpha_bar, before)| 1.0 - alpha_bar / before).collect()
}

/// ᾱ of every timestep of training, with or without the rescaling that the settings may ask for.
pub(crate) fn alphas_cumprod(settings: &Settings, rescaled: bool) -> Result<Vec<f64>> {
    let betas = betas(settings)?;
    let betas = if rescaled { rescale_zero_terminal_snr(&betas) } else { betas };
    let alphas = cumprod(&betas).into_iter().map(f64::from).collect::<Vec<_>>();
    match alphas.iter().find(|alpha| !(0.0..=1.0).contains(*alpha)) {
        Some(alpha) => Err(Error::argument(OP, format!("the betas give ᾱ = {alpha}, expected 0 to 1"))),
        None => Ok(alphas),
    }
}

/// σ of every timestep of training, for the schedulers that think in σ.
pub(super) struct Levels {
    pub sigmas: Vec<f64>,
}

impl Levels {
    pub fn new(settings: &Settings, rescaled: bool) -> Result<Self> {
        let mut alphas_cumprod = alphas_cumprod(settings, rescaled)?;
        if let Some(last) = alphas_cumprod.last_mut().filter(|_| rescaled) {
            *last = ALMOST_ZERO;
        }
        let sigma = |&alpha: &f64| ((1.0 - alpha as f32) / alpha as f32).sqrt() as f64;
        let sigmas = alphas_cumprod.iter().map(sigma).collect::<Vec<_>>();
        match sigmas.iter().find(|sigma| !sigma.is_finite()) {
            Some(_) => Err(Error::argument(OP, "the betas leave nothing of the sample at some timestep; set rescale_betas_zero_snr")),
            None => Ok(Self { sigmas }),
        }
    }

    /// σ at a timestep, between two of training too; at the ends, that of the end.
    pub fn sigma(&self, timestep: f64) -> f64 {
        let last = self.sigmas.len().saturating_sub(1);
        let low = (timestep.max(0.0) as usize).min(last);
        let (a, b) = (self.sigmas.get(low).copied().unwrap_or(0.0), self.sigmas.get((low + 1).min(last)).copied().unwrap_or(0.0));
        if low == last { a } else { a + (b - a) * (timestep.max(0.0) - low as f64) }
    }

    /// The timestep of σ, between two of training if need be: linear in log σ.
    pub fn timestep(&self, sigma: f64) -> f64 {
        let log = |sigma: f64| round32(sigma.ln());
        let wanted = sigma.max(1e-10).ln();
        let last = self.sigmas.len().saturating_sub(1);
        let low = self.sigmas.iter().rposition(|&sigma| log(sigma) <= wanted).unwrap_or(0).min(last.saturating_sub(1));
        let (a, b) = (self.sigmas.get(low).copied().map_or(0.0, log), self.sigmas.get(low + 1).copied().map_or(0.0, log));
        if a == b { low as f64 } else { low as f64 + ((a - wanted) / (a - b)).clamp(0.0, 1.0) }
    }

    pub fn sigma_min(&self) -> f64 {
        self.sigmas.first().copied().unwrap_or(0.0)
    }

    pub fn sigma_max(&self) -> f64 {
        self.sigmas.last().copied().unwrap_or(0.0)
    }
}

/// Noise levels from `max` down to `min`, evenly spaced in σ^(1/7) (equation 5 of Karras et al., *Elucidating the Design Space of
/// Diffusion-Based Generative Models*, 2022).
pub(super) fn karras_sigmas(max: f64, min: f64, count: usize) -> Vec<f64> {
    const RHO: f64 = 7.0;
    let (high, low) = (max.powf(1.0 / RHO), min.powf(1.0 / RHO));
    linspace(0.0, 1.0, count).into_iter().map(|ramp| (high + ramp * (low - high)).powf(RHO)).collect()
}

/// Noise levels from `max` down to `min`, evenly spaced in log σ.
pub(super) fn exponential_sigmas(max: f64, min: f64, count: usize) -> Vec<f64> {
    linspace(max.ln(), min.ln(), count).into_iter().map(f64::exp).collect()
}

/// Noise levels from `max` down to `min`, at evenly spaced quantiles of a beta distribution: close together at both ends.
fn beta_sigmas(max: f64, min: f64, count: usize) -> Vec<f64> {
    linspace(0.0, 1.0, count).into_iter().map(|ramp| min + beta_quantile(1.0 - ramp) * (max - min)).collect()
}

/// The x below which lies the share `p` of the distribution with the density x^(a − 1) (1 − x)^(a − 1) / B(a, a), a = 0.6.
fn beta_quantile(p: f64) -> f64 {
    if p > 0.5 {
        return 1.0 - beta_quantile(1.0 - p);
    }
    // Half of the distribution lies below ½, and the share grows with x.
    let (mut low, mut high, half) = (0.0, 0.5, below_beta(0.5));
    for _ in 0..f64::MANTISSA_DIGITS + 10 {
        let middle = (low + high) / 2.0;
        if below_beta(middle) < 2.0 * half * p {
            low = middle;
        } else {
            high = middle;
        }
    }
    high
}

/// B(a, a) a times the share below x ≤ ½, as a series: xᵃ (1 − x)ᵃ Σₙ xⁿ (2a)ₙ / (a + 1)ₙ, whose terms are positive and fall as xⁿ.
fn below_beta(x: f64) -> f64 {
    /// Both parameters of the distribution.
    const A: f64 = 0.6;
    let (mut sum, mut term, mut n) = (0.0, 1.0, 0.0);
    while sum + term != sum {
        sum += term;
        term *= x * (2.0 * A + n) / (A + 1.0 + n);
        n += 1.0;
    }
    (x * (1.0 - x)).powf(A) * sum
}

/// The noise levels that the configuration asks for in place of the timesteps' own, which go from `max` to `min`, if it does.
pub(super) fn spaced_sigmas(settings: &Settings, max: f64, min: f64, count: usize) -> Result<Option<Vec<f64>>> {
    let asked = [settings.use_karras_sigmas, settings.use_exponential_sigmas, settings.use_beta_sigmas];
    if asked.iter().filter(|&&asked| asked).count() > 1 {
        return Err(Error::argument(OP, "only one of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas can be true"));
    }
    let (max, min) = (settings.sigma_max.unwrap_or(max), settings.sigma_min.unwrap_or(min));
    if asked.contains(&true) && !(min > 0.0 && max.is_finite() && min <= max) {
        return Err(Error::argument(OP, format!("noise levels from {max} to {min}, expected to fall and to stay above 0")));
    }
    let [karras, exponential, beta] = asked;
    Ok(if karras {
        Some(karras_sigmas(max, min, count))
    } else if exponential {
        Some(exponential_sigmas(max, min, count))
    } else {
        beta.then(|| beta_sigmas(max, min, count))
    })
}

/// `steps` is a number of steps that a model trained with `train` timesteps can make.
pub(super) fn check_steps(steps: usize, train: usize) -> Result<()> {
    if (1..=train).contains(&steps) {
        return Ok(());
    }
    Err(Error::argument("set_timesteps", format!("{steps} steps, expected 1 to {train} (num_train_timesteps)")))
}

/// Half to even, as NumPy rounds.
fn round(x: f64) -> f64 {
    x.round_ties_even()
}

/// Timesteps of a run, falling; whole numbers but those of `linspace`.
pub(super) fn spaced(settings: &Settings, steps: usize) -> Result<Vec<f64>> {
    let train = settings.num_train_timesteps;
    check_steps(steps, train)?;
    let mut timesteps: Vec<f64> = match settings.timestep_spacing {
        TimestepSpacing::Linspace => linspace(0.0, train as f64 - 1.0, steps),
        TimestepSpacing::Leading => (0..steps).map(|i| (i * (train / steps)) as f64 + settings.steps_offset as f64).collect(),
        TimestepSpacing::Trailing => return Ok(trailing(train, train as f64 / steps as f64)),
    };
    timesteps.reverse();
    within(timesteps, train)
}

/// [`spaced`] in whole numbers.
pub(super) fn spaced_whole(settings: &Settings, steps: usize) -> Result<Vec<f64>> {
    Ok(spaced(settings, steps)?.into_iter().map(round).collect())
}

/// From `last` down by `ratio`, less one. Where rounding would give one more timestep (−1), it is left out.
pub(super) fn trailing(last: usize, ratio: f64) -> Vec<f64> {
    let timesteps = (0..last).map(|i| round(last as f64 - i as f64 * ratio) - 1.0);
    timesteps.take_while(|&t| t >= 0.0).collect()
}

/// Timesteps that the model was trained with, or an error.
pub(super) fn within(timesteps: Vec<f64>, train: usize) -> Result<Vec<f64>> {
    match timesteps.iter().find(|&&t| t < 0.0 || t > train as f64 - 1.0) {
        Some(t) => Err(Error::argument(
            "set_timesteps",
            format!("timestep {t} lies outside training's 0 to {}; take fewer steps, or another steps_offset", train - 1),
        )),
        None => Ok(timesteps),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `scipy.stats.beta.ppf(p, 0.6, 0.6)`.
    #[test]
    fn quantiles_of_the_beta_distribution_are_those_of_scipy() {
        let expected = [
            (1e-3, 1.855873851745199e-5),
            (0.1, 0.03958440558878085),
            (0.25, 0.17568037865269498),
            (0.5, 0.5),
            (0.9, 0.9604155944112192),
            (0.999, 0.9999814412614826),
            (1.0, 1.0),
        ];
        for (p, x) in expected {
            assert!((beta_quantile(p) - x).abs() <= 1e-14 * x, "{p}: {}, expected {x}", beta_quantile(p));
        }
        assert!(beta_quantile(0.0) < 1e-18);
        assert_eq!(beta_sigmas(14.0, 0.5, 1), [14.0]);
    }
}
