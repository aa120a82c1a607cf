//! The data module's own random numbers: small, and fixed for ever, so that a shuffling or a generated
//! image stays the same across versions of Kiln and of its dependencies.

/// SplitMix64 (Steele, Lea, Flood 2014): a counter times the golden ratio, mixed.
///
/// It passes BigCrush and any 64-bit value is a good seed. It is for shuffling and augmentation, never for secrets.
#[derive(Clone, Debug)]
pub struct Rng {
    state: u64,
}

/// 2⁶⁴ divided by the golden ratio, odd: SplitMix64's increment.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

impl Rng {
    /// A generator that starts from `seed`.
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The generator that belongs to (`seed`, `a`, `b`): for instance seed, epoch and batch.
    ///
    /// Each word is mixed before the next is added, so that neighbouring triples are unrelated.
    pub fn keyed(seed: u64, a: u64, b: u64) -> Self {
        let mut rng = Self::new(seed);
        for word in [a, b] {
            rng.state = rng.next_u64() ^ word.wrapping_mul(GOLDEN);
        }
        rng.state = rng.next_u64();
        rng
    }

    /// 64 uniform bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GOLDEN);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1), a multiple of 2⁻²⁴.
    pub fn uniform(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 * (1.0 / (1u32 << 24) as f32)
    }

    /// Uniform in [`low`, `high`).
    pub fn range(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.uniform()
    }

    /// Standard normal (Box–Muller, the cosine half).
    pub fn normal(&mut self) -> f32 {
        let u = 1.0 - self.uniform();
        let v = self.uniform();
        (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos()
    }

    /// Uniform in 0..`n` (0 if `n` is 0), by the high word of a 128-bit product; its bias is below n/2⁶⁴.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// Shuffles `items` (Fisher–Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_the_published_sequence() {
        // The first outputs of SplitMix64 for seed 1234567, as in its reference implementation.
        let mut rng = Rng::new(1234567);
        assert_eq!(rng.next_u64(), 6457827717110365317);
        assert_eq!(rng.next_u64(), 3203168211198807973);
    }

    #[test]
    fn shuffle_is_a_permutation_and_uniform_stays_in_range() {
        let mut rng = Rng::keyed(1, 2, 3);
        let mut items: Vec<usize> = (0..1000).collect();
        rng.shuffle(&mut items);
        assert_ne!(items, (0..1000).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..1000).collect::<Vec<_>>());
        assert!((0..10_000).map(|_| rng.uniform()).all(|u| (0.0..1.0).contains(&u)));
        assert_eq!(rng.below(0), 0);
        let mean = (0..10_000).map(|_| rng.normal()).sum::<f32>() / 10_000.0;
        assert!(mean.abs() < 0.04, "mean {mean}");
    }
}
