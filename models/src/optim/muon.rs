//! Muon.

use super::adam::AdamWOptions;
use super::group::{Field, GroupOptimizer, Method, Work, unless, unless_decay, unless_positive};
use kiln_tensor::ops::optim::global_norm;
use kiln_tensor::{Result, Shape, Tensor};

/// Muon (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024): momentum whose singular values are set to
/// about one. For matrices, with NS as in [`newton_schulz`]:
///
/// ```text
/// m ← m + (1 − momentum)(g − m)
/// u ← g + momentum · (m − g)  if nesterov, else m
/// p ← p · (1 − lr · weight_decay)
/// p ← p − lr · √max(1, rows / columns) · NS(u)
/// ```
///
/// With `match_rms` the last factor is `0.2 · √max(rows, columns)`, which makes the updates as large as AdamW's, so that its rates
/// and decays serve (Liu et al., "Muon is scalable for LLM training", 2025).
///
/// Parameters that are not matrices, and groups without `orthogonalize` (meant for embeddings and output layers), take steps of
/// [`AdamW`](super::AdamW) with `lr · adamw_scale`. States: `momentum_buffer` m, or AdamW's `exp_avg` and `exp_avg_sq`.
pub type Muon = GroupOptimizer<MuonOptions>;

/// Hyper-parameters of [`Muon`].
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct MuonOptions {
    /// Learning rate.
    pub lr: f64,
    /// Strength of the decoupled decay, of AdamW's parameters too.
    pub weight_decay: f64,
    /// Decay of the momentum.
    pub momentum: f64,
    /// Looks ahead along the momentum.
    pub nesterov: bool,
    /// Coefficients of the Newton–Schulz polynomial.
    pub ns_coefficients: (f64, f64, f64),
    /// Number of its iterations.
    pub ns_steps: usize,
    /// Least norm that the momentum is divided by.
    pub eps: f64,
    /// Scales updates to the size of AdamW's.
    pub match_rms: bool,
    /// Whether this group's matrices are orthogonalised: if not, AdamW trains them.
    pub orthogonalize: bool,
    /// AdamW's learning rate as a multiple of `lr`.
    pub adamw_scale: f64,
    /// AdamW's decay rates.
    pub adamw_betas: (f64, f64),
    /// AdamW's term in the denominator.
    pub adamw_eps: f64,
}

impl Default for MuonOptions {
    /// PyTorch's: 1e-3, decay 0.1, Nesterov momentum 0.95, (3.4445, −4.775, 2.0315), 5 iterations, 1e-7; AdamW with (0.9, 0.95), 1e-8.
    fn default() -> Self {
        Self {
            lr: 1e-3,
            weight_decay: 0.1,
            momentum: 0.95,
            nesterov: true,
            ns_coefficients: (3.4445, -4.775, 2.0315),
            ns_steps: 5,
            eps: 1e-7,
            match_rms: false,
            orthogonalize: true,
            adamw_scale: 1.0,
            adamw_betas: (0.9, 0.95),
            adamw_eps: 1e-8,
        }
    }
}

/// A matrix with the singular vectors of `matrix` and singular values near one (0.7 to 1.2 after 5 iterations of the default
/// coefficients, unless tiny): `x ← matrix / max(‖matrix‖, eps)`, then `steps` times `x ← a x + (b A + c A²) x` with `A = x xᵀ`.
/// An error if it is not a matrix of floats.
pub fn newton_schulz(matrix: &Tensor, (a, b, c): (f64, f64, f64), steps: usize, eps: f64) -> Result<Tensor> {
    let [rows, columns] = matrix.dims_n("newton_schulz")?;
    // x xᵀ is smaller if x is wide.
    let mut x = if rows > columns { matrix.t()? } else { matrix.clone() };
    x = x.div_scalar(global_norm(std::slice::from_ref(matrix))?.max(eps))?;
    for _ in 0..steps {
        let gram = x.matmul(&x.t()?)?;
        let polynomial = gram.mul_scalar(b)?.add(&gram.matmul(&gram)?.mul_scalar(c)?)?;
        x = x.mul_scalar(a)?.add(&polynomial.matmul(&x)?)?;
    }
    if rows > columns { x.t() } else { Ok(x) }
}

impl MuonOptions {
    fn is_orthogonalized(&self, shape: &Shape) -> bool {
        self.orthogonalize && shape.rank() == 2
    }

    fn adamw(&self) -> AdamWOptions {
        let (lr, weight_decay) = (self.lr * self.adamw_scale, self.weight_decay);
        AdamWOptions { lr, betas: self.adamw_betas, eps: self.adamw_eps, weight_decay, amsgrad: false }
    }

    /// The learning rate of a matrix.
    fn matrix_lr(&self, rows: usize, columns: usize) -> f64 {
        let (rows, columns) = (rows as f64, columns as f64);
        self.lr * if self.match_rms { 0.2 * rows.max(columns).sqrt() } else { (rows / columns).max(1.0).sqrt() }
    }

    fn step(&self, work: Work<'_>) -> Result<()> {
        work.replace(|param, grad, states| {
            let mut update = grad.clone();
            for momentum in states.iter_mut() {
                **momentum = momentum.add(&grad.sub(momentum)?.mul_scalar(1.0 - self.momentum)?)?.contiguous()?;
                update = if self.nesterov { grad.add(&momentum.sub(grad)?.mul_scalar(self.momentum)?)? } else { (**momentum).clone() };
            }
            let update = newton_schulz(&update, self.ns_coefficients, self.ns_steps, self.eps)?;
            let [rows, columns] = param.dims_n("Muon")?;
            let decayed = param.mul_scalar(1.0 - self.lr * self.weight_decay)?;
            decayed.sub(&update.mul_scalar(self.matrix_lr(rows, columns))?)
        })
    }
}

impl Method for MuonOptions {
    const NAME: &'static str = "Muon";

    fn fields(&mut self) -> Vec<(&'static str, Field<'_>)> {
        vec![
            ("lr", Field::Number(&mut self.lr)),
            ("weight_decay", Field::Number(&mut self.weight_decay)),
            ("momentum", Field::Number(&mut self.momentum)),
            ("nesterov", Field::Flag(&mut self.nesterov)),
            ("ns_a", Field::Number(&mut self.ns_coefficients.0)),
            ("ns_b", Field::Number(&mut self.ns_coefficients.1)),
            ("ns_c", Field::Number(&mut self.ns_coefficients.2)),
            ("ns_steps", Field::Count(&mut self.ns_steps)),
            ("eps", Field::Number(&mut self.eps)),
            ("match_rms", Field::Flag(&mut self.match_rms)),
            ("orthogonalize", Field::Flag(&mut self.orthogonalize)),
            ("adamw_scale", Field::Number(&mut self.adamw_scale)),
            ("adamw_beta1", Field::Number(&mut self.adamw_betas.0)),
            ("adamw_beta2", Field::Number(&mut self.adamw_betas.1)),
            ("adamw_eps", Field::Number(&mut self.adamw_eps)),
        ]
    }

    fn invalid(&self) -> Option<String> {
        let (a, b, c) = self.ns_coefficients;
        let coefficients = [("ns_a", a), ("ns_b", b), ("ns_c", c)];
        unless_positive("lr", self.lr)
            .or_else(|| unless_positive("weight_decay", self.weight_decay))
            .or_else(|| unless_decay("momentum", self.momentum))
            .or_else(|| coefficients.into_iter().find_map(|(name, x)| unless(x.is_finite(), name, x, "a finite value")))
            // PyTorch's bound: more never pays.
            .or_else(|| unless(self.ns_steps < 100, "ns_steps", self.ns_steps as f64, "fewer than 100"))
            .or_else(|| unless_positive("eps", self.eps))
            .or_else(|| unless_positive("adamw_scale", self.adamw_scale))
            .or_else(|| unless_decay("adamw_beta1", self.adamw_betas.0))
            .or_else(|| unless_decay("adamw_beta2", self.adamw_betas.1))
            .or_else(|| unless_positive("adamw_eps", self.adamw_eps))
    }

    fn states(&self, shape: &Shape) -> Vec<(&'static str, Shape)> {
        if self.is_orthogonalized(shape) { vec![("momentum_buffer", *shape)] } else { self.adamw().states(shape) }
    }

    fn update(&self, work: Vec<Work<'_>>) -> Result<()> {
        let (matrices, rest): (Vec<_>, Vec<_>) = work.into_iter().partition(|w| self.is_orthogonalized(w.param.shape()));
        matrices.into_iter().try_for_each(|work| self.step(work))?;
        self.adamw().step(rest)
    }
}
