//! Optimiser updates: one fused pass over parameter, gradient and states of a whole list of tensors.
//!
//! The formulas are PyTorch's, in its order of operations, with the scalars computed in f64. Products and sums are rounded one by one
//! (no fused multiply-add), so the f32 results are the same on every instruction set.

use super::isa::{WithSimd, dispatch};
use super::parallel;
use super::simd::{F32s, Simd};
use std::ops::{Add, Div, Mul, Neg, Sub};

/// Elements of a task: 64 KB of f32 a slice, so that a task is long beside a hand-over and short beside a training step.
const TASK: usize = 16 * 1024;

/// What a formula is written in: a number, or a vector of them.
pub trait Value: Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self> + Neg<Output = Self> {
    /// A constant, rounded from f64.
    fn constant(self, x: f64) -> Self;
    /// Square root.
    fn root(self) -> Self;
    /// The larger; `other` where either is NaN.
    fn larger(self, other: Self) -> Self;
    /// −1 or 1; a zero or NaN stays what it is.
    fn sign(self) -> Self;
}

impl<V: F32s> Value for V {
    #[inline(always)]
    fn constant(self, x: f64) -> Self {
        self.splat_like(x as f32)
    }
    #[inline(always)]
    fn root(self) -> Self {
        self.sqrt()
    }
    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        self.max(other)
    }
    #[inline(always)]
    fn sign(self) -> Self {
        let (zero, one) = (self.splat_like(0.0), self.splat_like(1.0));
        one.or_else(self.gt(zero), (-one).or_else(self.lt(zero), self))
    }
}

impl Value for f64 {
    #[inline(always)]
    fn constant(self, x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn root(self) -> Self {
        self.sqrt()
    }
    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        if self > other { self } else { other }
    }
    #[inline(always)]
    fn sign(self) -> Self {
        if self > 0.0 {
            1.0
        } else if self < 0.0 {
            -1.0
        } else {
            self
        }
    }
}

/// An update rule with `N` states an element.
pub trait Rule<const N: usize>: Copy + Send + Sync {
    /// The new parameter and states from the old ones and the gradient.
    fn update<V: Value>(&self, param: V, grad: V, states: [V; N]) -> (V, [V; N]);
}

/// One tensor's slices, all of one length.
#[derive(Debug)]
pub struct Slot<'a, T, const N: usize> {
    /// The parameter, updated in place.
    pub param: &'a mut [T],
    /// Its gradient.
    pub grad: &'a [T],
    /// The rule's states in its order, updated in place.
    pub states: [&'a mut [T]; N],
}

/// A type that parameters may have.
pub trait OptimFloat: crate::element::Float {
    /// Updates one piece, its gradients times `factor`.
    fn apply<const N: usize, R: Rule<N>>(rule: &R, factor: f64, slot: &mut Slot<'_, Self, N>);
}

/// Updates every tensor of the list.
///
/// # Panics
/// If the slices of a slot differ in length.
pub fn step<T: OptimFloat, const N: usize>(rule: &impl Rule<N>, slots: Vec<Slot<'_, T, N>>) {
    step_scaled(rule, 1.0, slots);
}

/// [`step`] with every gradient times `factor`, which is rounded to the type first: what an update sees, not what lies in memory.
///
/// # Panics
/// If the slices of a slot differ in length.
pub fn step_scaled<T: OptimFloat, const N: usize>(rule: &impl Rule<N>, factor: f64, slots: Vec<Slot<'_, T, N>>) {
    let mut pieces = Vec::new();
    let mut total = 0;
    for slot in slots {
        total += slot.param.len();
        cut(slot, &mut pieces);
    }
    // A byte takes some 0.04 ns from memory.
    let ns = total * (N + 2) * size_of::<T>() / 25;
    parallel::for_each_chunk(&mut pieces, 1, ns, |_, piece| piece.iter_mut().for_each(|slot| T::apply(rule, factor, slot)));
}

/// Cuts a tensor into pieces of [`TASK`] elements.
fn cut<'a, T, const N: usize>(slot: Slot<'a, T, N>, pieces: &mut Vec<Slot<'a, T, N>>) {
    let n = slot.param.len();
    assert!(slot.grad.len() == n && slot.states.iter().all(|s| s.len() == n), "parameter, gradient and states differ in length");
    let mut states = slot.states.map(|s| s.chunks_mut(TASK));
    for (param, grad) in slot.param.chunks_mut(TASK).zip(slot.grad.chunks(TASK)) {
        let states = states.each_mut().map(|s| s.next().unwrap_or_default());
        pieces.push(Slot { param, grad, states });
    }
}

impl OptimFloat for f64 {
    fn apply<const N: usize, R: Rule<N>>(rule: &R, factor: f64, slot: &mut Slot<'_, f64, N>) {
        for (i, (param, &grad)) in slot.param.iter_mut().zip(slot.grad).enumerate() {
            let (new, states) = rule.update(*param, grad * factor, slot.states.each_ref().map(|s| s[i]));
            *param = new;
            slot.states.iter_mut().zip(states).for_each(|(s, new)| s[i] = new);
        }
    }
}

impl OptimFloat for f32 {
    fn apply<const N: usize, R: Rule<N>>(rule: &R, factor: f64, slot: &mut Slot<'_, f32, N>) {
        dispatch(Apply { rule, factor: factor as f32, slot });
    }
}

struct Apply<'r, 's, 'a, R, const N: usize> {
    rule: &'r R,
    factor: f32,
    slot: &'s mut Slot<'a, f32, N>,
}

impl<R: Rule<N>, const N: usize> WithSimd for Apply<'_, '_, '_, R, N> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Slot { param, grad, states } = self.slot;
        let n = param.len();
        assert!(grad.len() == n && states.iter().all(|s| s.len() == n));
        let factor = s.splat(self.factor);
        // A copy that no store can change: what the formula computes of its scalars, powers above all, leaves the loop.
        let rule = *self.rule;
        let param = param.as_mut_ptr();
        let states = states.each_mut().map(|s| s.as_mut_ptr());
        let whole = n / S::LANES * S::LANES;
        for i in (0..whole).step_by(S::LANES) {
            // SAFETY: `i + LANES <= n`, the length of every slice.
            unsafe {
                let (p, g) = (s.load(param.add(i)), s.load(grad.as_ptr().add(i)));
                let mut old = [s.zero(); N];
                for (v, x) in old.iter_mut().zip(states) {
                    *v = s.load(x.add(i));
                }
                let (p, new) = rule.update(p, g * factor, old);
                p.store(param.add(i));
                for (x, v) in states.into_iter().zip(new) {
                    v.store(x.add(i));
                }
            }
        }
        let rest = n - whole;
        if rest > 0 {
            // SAFETY: `whole + rest` is `n`, the length of every slice.
            unsafe {
                let (p, g) = (s.load_partial(param.add(whole), rest), s.load_partial(grad.as_ptr().add(whole), rest));
                let mut old = [s.zero(); N];
                for (v, x) in old.iter_mut().zip(states) {
                    *v = s.load_partial(x.add(whole), rest);
                }
                let (p, new) = rule.update(p, g * factor, old);
                p.store_partial(param.add(whole), rest);
                for (x, v) in states.into_iter().zip(new) {
                    v.store_partial(x.add(whole), rest);
                }
            }
        }
    }
}

/// Stochastic gradient descent. Without a state: `g += weight_decay · p`, `p −= lr · g`.
/// With one, the momentum buffer: `b = momentum · b + (1 − dampening) · g` (`b = g` at the first step), and `b` takes the place of `g`,
/// or `g + momentum · b` with Nesterov's method.
#[derive(Clone, Copy, Debug)]
pub struct Sgd {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the momentum buffer.
    pub momentum: f64,
    /// Share of the gradient kept out of the buffer.
    pub dampening: f64,
    /// L2 penalty, added to the gradient.
    pub weight_decay: f64,
    /// Looks ahead along the buffer.
    pub nesterov: bool,
    /// The buffer is not initialised yet.
    pub first_step: bool,
}

impl Sgd {
    #[inline(always)]
    fn decayed<V: Value>(&self, p: V, g: V) -> V {
        if self.weight_decay == 0.0 { g } else { g + p.constant(self.weight_decay) * p }
    }
}

impl Rule<0> for Sgd {
    #[inline(always)]
    fn update<V: Value>(&self, p: V, g: V, _: [V; 0]) -> (V, [V; 0]) {
        (p + p.constant(-self.lr) * self.decayed(p, g), [])
    }
}

impl Rule<1> for Sgd {
    #[inline(always)]
    fn update<V: Value>(&self, p: V, g: V, [buffer]: [V; 1]) -> (V, [V; 1]) {
        let g = self.decayed(p, g);
        let momentum = p.constant(self.momentum);
        let buffer = if self.first_step { g } else { momentum * buffer + p.constant(1.0 - self.dampening) * g };
        let direction = if self.nesterov { g + momentum * buffer } else { buffer };
        (p + p.constant(-self.lr) * direction, [buffer])
    }
}

/// Adam (Kingma and Ba, 2015) and, with decoupled decay, AdamW (Loshchilov and Hutter, 2019):
/// `m += (1 − β₁)(g − m)`, `v = β₂ v + (1 − β₂) g²`, `p −= lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)`.
/// Weight decay adds `wd · p` to `g`, or, decoupled, multiplies `p` by `1 − lr · wd` first.
/// States: m, v; with a third, AMSGrad's running maximum of v takes v's place in the root.
#[derive(Clone, Copy, Debug)]
pub struct Adam {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root.
    pub eps: f64,
    /// Strength of the decay.
    pub weight_decay: f64,
    /// AdamW's decay instead of an L2 penalty.
    pub decoupled: bool,
    /// Number of this step, from 1.
    pub step: u64,
}

impl Adam {
    /// The decayed parameter, and the new moments.
    #[inline(always)]
    fn moments<V: Value>(&self, p: V, g: V, m: V, v: V) -> (V, V, V) {
        let (p, g) = match self.weight_decay {
            0.0 => (p, g),
            decay if self.decoupled => (p * p.constant(1.0 - self.lr * decay), g),
            decay => (p, g + p.constant(decay) * p),
        };
        let m = m + p.constant(1.0 - self.beta1) * (g - m);
        let v = v * p.constant(self.beta2) + p.constant(1.0 - self.beta2) * g * g;
        (p, m, v)
    }

    #[inline(always)]
    fn moved<V: Value>(&self, p: V, m: V, v: V) -> V {
        let t = self.step as f64;
        let (correction1, correction2) = (1.0 - self.beta1.powf(t), 1.0 - self.beta2.powf(t));
        let denominator = v.root() / p.constant(correction2.sqrt()) + p.constant(self.eps);
        p + p.constant(-(self.lr / correction1)) * m / denominator
    }
}

impl Rule<2> for Adam {
    #[inline(always)]
    fn update<V: Value>(&self, p: V, g: V, [m, v]: [V; 2]) -> (V, [V; 2]) {
        let (p, m, v) = self.moments(p, g, m, v);
        (self.moved(p, m, v), [m, v])
    }
}

impl Rule<3> for Adam {
    #[inline(always)]
    fn update<V: Value>(&self, p: V, g: V, [m, v, largest]: [V; 3]) -> (V, [V; 3]) {
        let (p, m, v) = self.moments(p, g, m, v);
        let largest = largest.larger(v);
        (self.moved(p, m, largest), [m, v, largest])
    }
}

/// RMSprop (Hinton): `v = α v + (1 − α) g²`, `p −= lr · g / (√v + ε)`.
/// States: v; a momentum buffer `b = momentum · b + g / (√v + ε)`, which then is the direction; and the mean gradient `a += (1 − α)(g − a)`, with which `v − a²`
/// takes v's place in the root (centred).
#[derive(Clone, Copy, Debug)]
pub struct RmsProp {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the averages.
    pub alpha: f64,
    /// Added to the root.
    pub eps: f64,
    /// L2 penalty, added to the gradient.
    pub weight_decay: f64,
    /// Decay of the momentum buffer.
    pub momentum: f64,
}

impl RmsProp {
    /// The decayed gradient, and the new mean square.
    #[inline(always)]
    fn mean_square<V: Value>(&self, p: V, g: V, v: V) -> (V, V) {
        let g = if self.weight_decay == 0.0 { g } else { g + p.constant(self.weight_decay) * p };
        (g, v * p.constant(self.alpha) + p.constant(1.0 - self.alpha) * g * g)
    }

    #[inline(always)]
    fn with_momentum<V: Value>(&self, p: V, g: V, root: V, buffer: V) -> (V, V) {
        let buffer = p.constant(self.momentum) * buffer + g / (root + p.constant(self.eps));
        (p + p.constant(-self.lr) * buffer, buffer)
    }
}

impl Rule<1> for RmsProp {
    #[inline(always)]
    fn update<V: Value>(&self, p: V, g: V, [v]: [V; 1]) -> (V, [V; 1]) {
        let (g, v) = self.mean_square(p, g, v);
        (p + p.constant(-self.lr) * g / (v.root() + p.constant(self.eps)), [v])
    }
}

impl Rule<2> for RmsProp {
    #[inline(always)]
    fn update<V: Value>(&self, p: V, g: V, [v, buffer]: [V; 2]) -> (V, [V; 2]) {
        let (g, v) = self.mean_square(p, g, v);
        let (p, buffer) = self.with_momentum(p, g, v.root(), buffer);
        (p, [v, buffer])
    }
}

impl Rule<3> for RmsProp {
    #[inline(always)]
    fn update<V: Value>(&self, p: V, g: V, [v, buffer, mean]: [V; 3]) -> (V, [V; 3]) {
        let (g, v) = self.mean_square(p, g, v);
        let mean = mean + p.constant(1.0 - self.alpha) * (g - mean);
        let (p, buffer) = self.with_momentum(p, g, (v - mean * mean).root(), buffer);
        (p, [v, buffer, mean])
    }
}

/// Lion (Chen et al., "Symbolic discovery of optimization algorithms", 2023): `p *= 1 − lr · wd`, `p −= lr · sign(β₁ m + (1 − β₁) g)`,
/// `m = β₂ m + (1 − β₂) g`. State: m.
#[derive(Clone, Copy, Debug)]
pub struct Lion {
    /// Learning rate.
    pub lr: f64,
    /// Weight of the momentum in the update.
    pub beta1: f64,
    /// Decay of the momentum.
    pub beta2: f64,
    /// Strength of the decoupled decay.
    pub weight_decay: f64,
}

impl Rule<1> for Lion {
    #[inline(always)]
    fn update<V: Value>(&self, p: V, g: V, [m]: [V; 1]) -> (V, [V; 1]) {
        let direction = (m * p.constant(self.beta1) + g * p.constant(1.0 - self.beta1)).sign();
        let p = p * p.constant(1.0 - self.lr * self.weight_decay) + p.constant(-self.lr) * direction;
        (p, [m * p.constant(self.beta2) + g * p.constant(1.0 - self.beta2)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Deterministic values in (-2, 2), zero among them.
    fn values(n: usize, salt: usize) -> Vec<f64> {
        (0..n).map(|i| ((i * 7919 + salt * 104_729) % 4001) as f64 / 1000.0 - 2.0).collect()
    }

    /// Three steps in f64 against `formula` applied element by element, and in f32 against f64.
    fn check<const N: usize, R: Rule<N>>(rule: impl Fn(u64) -> R, formula: impl Fn(u64, &mut f64, f64, &mut [f64; N])) {
        for n in [0, 1, 15, 16, 37, TASK + 3] {
            let mut p = values(n, 1);
            let mut states: [Vec<f64>; N] = std::array::from_fn(|_| vec![0.0; n]);
            let mut expected_p = p.clone();
            let mut expected_states = vec![[0.0; N]; n];
            let mut p32: Vec<f32> = p.iter().map(|&x| x as f32).collect();
            let mut states32: [Vec<f32>; N] = std::array::from_fn(|_| vec![0.0; n]);
            for t in 1..=3 {
                let g = values(n, 10 + t as usize);
                let g32: Vec<f32> = g.iter().map(|&x| x as f32).collect();
                let slot = Slot { param: &mut p, grad: &g, states: states.each_mut().map(|s| &mut s[..]) };
                step(&rule(t), vec![slot]);
                let slot = Slot { param: &mut p32, grad: &g32, states: states32.each_mut().map(|s| &mut s[..]) };
                step(&rule(t), vec![slot]);
                for i in 0..n {
                    formula(t, &mut expected_p[i], g[i], &mut expected_states[i]);
                }
            }
            for i in 0..n {
                assert!((p[i] - expected_p[i]).abs() < 1e-12, "{n}, element {i}: {} instead of {}", p[i], expected_p[i]);
                assert!((p32[i] as f64 - expected_p[i]).abs() < 2e-6, "{n}, element {i} in f32: {} instead of {}", p32[i], expected_p[i]);
                assert!((0..N).all(|k| (states[k][i] - expected_states[i][k]).abs() < 1e-12));
            }
        }
    }

    #[test]
    fn sgd() {
        let rule = Sgd { lr: 0.1, momentum: 0.9, dampening: 0.2, weight_decay: 0.01, nesterov: false, first_step: true };
        check::<0, _>(|_| rule, |_, p, g, _| *p -= 0.1 * (g + 0.01 * *p));
        for nesterov in [false, true] {
            check::<1, _>(
                |t| Sgd { nesterov, first_step: t == 1, ..rule },
                |t, p, g, [b]| {
                    let g = g + 0.01 * *p;
                    *b = if t == 1 { g } else { 0.9 * *b + 0.8 * g };
                    *p -= 0.1 * if nesterov { g + 0.9 * *b } else { *b };
                },
            );
        }
    }

    #[test]
    fn adam() {
        for decoupled in [false, true] {
            let rule = |step| Adam { lr: 0.01, beta1: 0.9, beta2: 0.99, eps: 1e-3, weight_decay: 0.1, decoupled, step };
            let moments = move |t: u64, p: &mut f64, mut g: f64, m: &mut f64, v: &mut f64| {
                if decoupled {
                    *p *= 1.0 - 0.01 * 0.1;
                } else {
                    g += 0.1 * *p;
                }
                *m = 0.9 * *m + 0.1 * g;
                *v = 0.99 * *v + 0.01 * g * g;
                *m / (1.0 - 0.9f64.powi(t as i32)) * 0.01
            };
            let root = |t: u64, v: f64| (v / (1.0 - 0.99f64.powi(t as i32))).sqrt() + 1e-3;
            check::<2, _>(rule, |t, p, g, [m, v]| {
                let numerator = moments(t, p, g, m, v);
                *p -= numerator / root(t, *v);
            });
            check::<3, _>(rule, |t, p, g, [m, v, largest]| {
                let numerator = moments(t, p, g, m, v);
                *largest = largest.max(*v);
                *p -= numerator / root(t, *largest);
            });
        }
    }

    #[test]
    fn rmsprop() {
        let rule = RmsProp { lr: 0.01, alpha: 0.9, eps: 0.1, weight_decay: 0.1, momentum: 0.8 };
        let square = |p: f64, g: f64, v: &mut f64| {
            let g = g + 0.1 * p;
            *v = 0.9 * *v + 0.1 * g * g;
            g
        };
        check::<1, _>(
            |_| rule,
            |_, p, g, [v]| {
                let g = square(*p, g, v);
                *p -= 0.01 * g / (v.sqrt() + 0.1);
            },
        );
        check::<2, _>(
            |_| rule,
            |_, p, g, [v, b]| {
                let g = square(*p, g, v);
                *b = 0.8 * *b + g / (v.sqrt() + 0.1);
                *p -= 0.01 * *b;
            },
        );
        check::<3, _>(
            |_| rule,
            |_, p, g, [v, b, a]| {
                let g = square(*p, g, v);
                *a = 0.9 * *a + 0.1 * g;
                *b = 0.8 * *b + g / ((*v - *a * *a).sqrt() + 0.1);
                *p -= 0.01 * *b;
            },
        );
    }

    #[test]
    fn lion() {
        check::<1, _>(
            |_| Lion { lr: 0.01, beta1: 0.9, beta2: 0.98, weight_decay: 0.1 },
            |_, p, g, [m]| {
                let u = 0.9 * *m + 0.1 * g;
                *p = *p * (1.0 - 0.001) - if u == 0.0 { 0.0 } else { 0.01 * u.signum() };
                *m = 0.98 * *m + 0.02 * g;
            },
        );
    }
}
