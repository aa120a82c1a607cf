//! A codebook: each latent vector is replaced by the nearest of a list of learned ones.

use crate::nn::{Buffer, Embedding, Init, Mode, Module, Params};
use kiln_autograd::no_grad;
use kiln_tensor::graph::is_recomputing;
use kiln_tensor::{DType, Error, Generator, Result, Tensor};

/// Added to the counts of an averaged codebook, so that none is zero.
const SMOOTHING: f64 = 1e-5;

/// How a codebook learns.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct CodebookOptions {
    /// Weight of the commitment loss β.
    pub beta: f64,
    /// β is put on the codebook's term instead of the commitment's, as `VQModel` of `diffusers` does.
    pub legacy: bool,
    /// The codes are moving averages, of this decay, of the vectors that they replace (van den Oord et al. 2017, appendix A.1), instead
    /// of learning by gradients. 0.99 is usual.
    pub ema_decay: Option<f64>,
    /// A code to which fewer vectors of a batch fall, by a moving average, becomes one of the batch's vectors (Dhariwal et al.,
    /// *Jukebox*, 2020).
    pub restart_below: Option<f64>,
}

impl Default for CodebookOptions {
    /// Gradients, β = 0.25, no restarts.
    fn default() -> Self {
        Self { beta: 0.25, legacy: false, ema_decay: None, restart_below: None }
    }
}

/// Decay of the counts that restarts go by where the codebook has no averages.
const COUNT_DECAY: f64 = 0.99;

/// What a [`VectorQuantizer`] makes of latents.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// The nearest codes (B, D, H, W). Their gradients go to the latents as they are (straight-through).
    pub output: Tensor,
    /// Codebook and commitment loss, a scalar.
    pub loss: Tensor,
    /// The codes' numbers, i64 (B, H, W).
    pub indices: Tensor,
}

/// How much of a codebook a set of indices uses.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct CodebookUse {
    /// exp(−Σ p log p) of the shares p of the codes: as many codes as are used alike.
    pub perplexity: f64,
    /// The share of codes that occur.
    pub used: f64,
}

impl CodebookUse {
    /// That of `indices` into a codebook of `codes`.
    ///
    /// # Errors
    /// If an index is out of range, or there is none.
    pub fn of(indices: &Tensor, codes: usize) -> Result<Self> {
        let mut counts = vec![0u64; codes];
        for index in indices.to_vec::<i64>()? {
            let count = usize::try_from(index).ok().and_then(|i| counts.get_mut(i));
            *count.ok_or_else(|| Error::index("codebook", format!("code {index} of {codes}")))? += 1;
        }
        let total = counts.iter().sum::<u64>() as f64;
        if total == 0.0 {
            return Err(Error::argument("codebook", "there are no indices"));
        }
        let used = counts.iter().filter(|&&n| n > 0);
        let entropy: f64 = used.clone().map(|&n| n as f64 / total).map(|p| -p * p.ln()).sum();
        Ok(Self { perplexity: entropy.exp(), used: used.count() as f64 / codes as f64 })
    }
}

/// The moving averages of a codebook.
struct Averages {
    /// Vectors of a batch that fall to each code, (K).
    cluster_size: Buffer,
    /// Their sum, (K, D), where the codes are averages.
    sums: Option<Buffer>,
}

/// Vectors z (B, D, H, W) to the nearest rows e of a table `embedding.weight` (K, D).
///
/// The loss is mean (sg(z) − e)² + β mean (z − sg(e))², where sg stops gradients. With averages only the second term is left.
///
/// Source: van den Oord et al., *Neural Discrete Representation Learning*, 2017.
pub struct VectorQuantizer {
    embedding: Embedding,
    averages: Option<Averages>,
    options: CodebookOptions,
    codes: usize,
    width: usize,
    mode: Mode,
    generator: Generator,
}

impl VectorQuantizer {
    /// A codebook of `codes` vectors of `width` elements, uniform in ±1 / codes at first.
    ///
    /// # Errors
    /// If it would be empty, or an option is out of its domain.
    pub fn new(params: &Params, codes: usize, width: usize, options: CodebookOptions) -> Result<Self> {
        let decays = options.ema_decay.is_none_or(|decay| (0.0..1.0).contains(&decay));
        if codes == 0 || width == 0 || !decays || !(options.beta >= 0.0 && options.beta.is_finite()) {
            let hint = "there must be at least one code of one element, β ≥ 0 and a decay in [0, 1)";
            return Err(Error::argument("VectorQuantizer", format!("{codes} codes of {width} elements with {options:?}: {hint}")));
        }
        let bound = 1.0 / codes as f64;
        let table = params.scope("embedding");
        let embedding = Embedding::with_init(&table, codes, width, Init::Uniform { low: -bound, high: bound })?;
        let averages = || -> Result<Averages> {
            let cluster_size = params.buffer("ema_cluster_size", [codes], Init::Ones)?;
            let sums = || params.buffer_from("ema_embedding", &embedding.weight().get().detach());
            Ok(Averages { cluster_size, sums: options.ema_decay.map(|_| sums()).transpose()? })
        };
        let averages = (options.ema_decay.is_some() || options.restart_below.is_some()).then(averages).transpose()?;
        if options.ema_decay.is_some() {
            embedding.weight().freeze();
        }
        let (mode, generator) = (params.mode(), params.generator().clone());
        Ok(Self { embedding, averages, options, codes, width, mode, generator })
    }

    /// Number of codes.
    pub fn codes(&self) -> usize {
        self.codes
    }

    /// The nearest codes of latents (B, D, H, W). In training mode the averages move, and codes restart: inside of
    /// [`checkpoint`](kiln_autograd::checkpoint) the table is then another one when the backward pass computes the part again.
    ///
    /// # Errors
    /// If the number of channels is another.
    pub fn forward(&self, z: &Tensor) -> Result<Quantized> {
        let [b, _, h, w] = self.expect_width(z)?;
        let z = z.permute(&[0, 2, 3, 1])?.reshape([b * h * w, self.width])?; // (N, D)
        let indices = self.nearest(&z.detach())?; // (N)
        let e = self.embedding.forward(&indices)?;
        let loss = self.loss(&z, &e)?;
        let output = z.add(&e.sub(&z)?.detach())?;
        if let Some(averages) = &self.averages
            && self.mode.is_training()
            && !is_recomputing()
        {
            no_grad(|| self.learn(averages, &z.detach(), &indices))?;
        }
        let output = output.reshape([b, h, w, self.width])?.permute(&[0, 3, 1, 2])?.contiguous()?;
        Ok(Quantized { output, loss, indices: indices.reshape([b, h, w])? })
    }

    /// The codes (B, D, H, W) of their numbers (B, H, W).
    ///
    /// # Errors
    /// If a number is out of range.
    pub fn lookup(&self, indices: &Tensor) -> Result<Tensor> {
        let [_, _, _] = indices.dims_n("codebook")?;
        self.embedding.forward(indices)?.permute(&[0, 3, 1, 2])?.contiguous()
    }

    fn expect_width(&self, z: &Tensor) -> Result<[usize; 4]> {
        let dims: [usize; 4] = z.dims_n("codebook")?;
        if dims[1] == self.width {
            return Ok(dims);
        }
        Err(Error::shape("codebook", format!("expected latents (B, {}, H, W), got {}", self.width, z.shape())))
    }

    /// argmin over e of ‖z − e‖², which is that of ‖e‖² − 2 z·e.
    fn nearest(&self, z: &Tensor) -> Result<Tensor> {
        no_grad(|| {
            let table = self.embedding.weight().get().detach();
            let products = z.matmul(&table.t()?)?; // (N, K)
            table.square()?.sum(1)?.sub(&products.mul_scalar(2.0)?)?.argmin(1)
        })
    }

    fn loss(&self, z: &Tensor, e: &Tensor) -> Result<Tensor> {
        let commitment = z.mse_loss(&e.detach())?;
        if self.options.ema_decay.is_some() {
            return commitment.mul_scalar(self.options.beta);
        }
        let codebook = e.mse_loss(&z.detach())?;
        let (codebook, commitment) = if self.options.legacy {
            (codebook.mul_scalar(self.options.beta)?, commitment)
        } else {
            (codebook, commitment.mul_scalar(self.options.beta)?)
        };
        codebook.add(&commitment)
    }

    /// The averages take in a batch `z` (N, D), and dead codes restart.
    fn learn(&self, averages: &Averages, z: &Tensor, indices: &Tensor) -> Result<()> {
        let decay = self.options.ema_decay.unwrap_or(COUNT_DECAY);
        let move_towards = |buffer: &Buffer, value: &Tensor| {
            buffer.update(|old| old.mul_scalar(decay)?.add(&value.to_dtype(old.dtype())?.mul_scalar(1.0 - decay)?))
        };
        let ones = Tensor::ones([z.dim(0)?], z)?;
        move_towards(&averages.cluster_size, &Tensor::zeros([self.codes], z)?.index_add(0, indices, &ones)?)?;
        if let Some(sums) = &averages.sums {
            move_towards(sums, &Tensor::zeros([self.codes, self.width], z)?.index_add(0, indices, z)?)?;
            self.embedding.weight().set(&averages.means(sums, self.codes)?)?;
        }
        self.options.restart_below.map_or(Ok(()), |least| self.restart(averages, least, z))
    }

    fn restart(&self, averages: &Averages, least: f64, z: &Tensor) -> Result<()> {
        let vectors = z.dim(0)? as i64;
        let size = averages.cluster_size.get();
        let dead = size.lt_scalar(least)?;
        if vectors == 0 || !dead.any(())?.item::<bool>()? {
            return Ok(());
        }
        let chosen = z.index_select(0, &self.generator.randint(0, vectors, [self.codes])?)?; // (K, D)
        let (rows, weight) = (dead.unsqueeze(1)?, self.embedding.weight());
        weight.set(&rows.where_cond(&chosen.to_dtype(weight.dtype())?, &weight.get().detach())?)?;
        let fresh = size.full_like(least.max(1.0))?;
        averages.cluster_size.set(&dead.where_cond(&fresh, &size)?)?;
        match &averages.sums {
            Some(sums) => {
                let held = sums.get();
                sums.set(&rows.where_cond(&chosen.to_dtype(held.dtype())?.mul_scalar(least.max(1.0))?, &held)?)
            }
            None => Ok(()),
        }
    }
}

impl Averages {
    /// sums / counts, the counts smoothed: n (count + ε) / (n + K ε) with n = Σ counts.
    fn means(&self, sums: &Buffer, codes: usize) -> Result<Tensor> {
        let size = self.cluster_size.get();
        let total = size.to_dtype(DType::F64)?.sum(())?.item_f64()?;
        let smooth = size.add_scalar(SMOOTHING)?.mul_scalar(total / (total + codes as f64 * SMOOTHING))?;
        sums.get().div(&smooth.unsqueeze(1)?)
    }
}
