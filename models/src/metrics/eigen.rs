//! Eigenvalues and eigenvectors of a real symmetric matrix, by Jacobi's rotations: a few hundred rows at most, in f64.

/// Sweeps over all pairs after which the rotations are given up; convergence is quadratic and takes fewer than fifteen.
const MAX_SWEEPS: usize = 60;

/// The eigenvalues of a symmetric matrix, and its eigenvectors as the rows of a row-major matrix, in no order.
pub(super) struct Eigen {
    pub values: Vec<f64>,
    pub vectors: Vec<f64>,
}

impl Eigen {
    /// Those of the row-major matrix `a` of `n` rows, of which `(a + aᵀ) / 2` is meant.
    pub fn of(mut a: Vec<f64>, n: usize) -> Self {
        for i in 0..n {
            for j in 0..i {
                let mean = 0.5 * (a[i * n + j] + a[j * n + i]);
                (a[i * n + j], a[j * n + i]) = (mean, mean);
            }
        }
        let negligible = f64::EPSILON * a.iter().map(|x| x * x).sum::<f64>().sqrt() / n as f64;
        let mut vectors: Vec<f64> = (0..n * n).map(|at| if at / n == at % n { 1.0 } else { 0.0 }).collect();
        for _ in 0..MAX_SWEEPS {
            let mut rotated = false;
            for p in 0..n {
                for q in p + 1..n {
                    let off = a[p * n + q];
                    if off.abs() > negligible {
                        let (cos, sin) = rotation(a[p * n + p], a[q * n + q], off);
                        rotate_columns(&mut a, n, p, q, cos, sin);
                        rotate_rows(&mut a, n, p, q, cos, sin);
                        rotate_rows(&mut vectors, n, p, q, cos, sin);
                        (a[p * n + q], a[q * n + p]) = (0.0, 0.0);
                        rotated = true;
                    }
                }
            }
            if !rotated {
                break;
            }
        }
        Self { values: (0..n).map(|i| a[i * n + i]).collect(), vectors }
    }
}

/// Cosine and sine of the smaller of the rotations that zero `off` between the diagonal elements `x` and `y`.
fn rotation(x: f64, y: f64, off: f64) -> (f64, f64) {
    let cot = (y - x) / (2.0 * off);
    let tan = cot.signum() / (cot.abs() + cot.hypot(1.0));
    let cos = 1.0 / tan.hypot(1.0);
    (cos, tan * cos)
}

fn rotate_rows(m: &mut [f64], n: usize, p: usize, q: usize, cos: f64, sin: f64) {
    let (head, tail) = m.split_at_mut(q * n);
    for (x, y) in head[p * n..][..n].iter_mut().zip(&mut tail[..n]) {
        (*x, *y) = (cos * *x - sin * *y, sin * *x + cos * *y);
    }
}

fn rotate_columns(m: &mut [f64], n: usize, p: usize, q: usize, cos: f64, sin: f64) {
    for row in m.chunks_exact_mut(n) {
        (row[p], row[q]) = (cos * row[p] - sin * row[q], sin * row[p] + cos * row[q]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Σ λ·v·vᵀ
    fn product(e: &Eigen, n: usize) -> Vec<f64> {
        let mut a = vec![0.0; n * n];
        for (v, value) in e.vectors.chunks_exact(n).zip(&e.values) {
            for i in 0..n {
                for j in 0..n {
                    a[i * n + j] += value * v[i] * v[j];
                }
            }
        }
        a
    }

    #[test]
    fn the_parts_make_the_matrix_again() {
        // Full rank; rank one; with eigenvalues of very different size.
        let full = |i: usize, j: usize| ((i * 7 + j * 7 + i * j * 3) % 11) as f64 - 5.0;
        let one = |i: usize, j: usize| (i as f64 - 3.0) * (j as f64 - 3.0);
        let graded = |i: usize, j: usize| 10f64.powi(-(i.max(j) as i32));
        for n in [1, 2, 5, 40] {
            for f in [&full as &dyn Fn(usize, usize) -> f64, &one, &graded] {
                let a: Vec<f64> = (0..n * n).map(|at| f(at / n, at % n)).collect();
                let e = Eigen::of(a.clone(), n);
                let scale = a.iter().fold(0f64, |m, x| m.max(x.abs()));
                product(&e, n).iter().zip(&a).for_each(|(x, y)| assert!((x - y).abs() <= 1e-13 * n as f64 * scale, "{x} {y}"));
                for (i, v) in e.vectors.chunks_exact(n).enumerate() {
                    for (j, w) in e.vectors.chunks_exact(n).enumerate() {
                        let dot: f64 = v.iter().zip(w).map(|(x, y)| x * y).sum();
                        assert!((dot - (i == j) as u8 as f64).abs() < 1e-13 * n as f64);
                    }
                }
            }
        }
    }

    #[test]
    fn a_matrix_that_is_not_finite_ends() {
        assert_eq!(Eigen::of(vec![f64::NAN; 9], 3).values.len(), 3);
        assert_eq!(Eigen::of(vec![f64::INFINITY; 9], 3).values.len(), 3);
    }
}
