//! PyTorch's generator of random numbers on the CPU, for results equal to PyTorch's: MT19937, and the draws that `torch.rand`, `torch.randn`,
//! `torch.randint` and `torch.randperm` make of it, in their order.

use crate::DType;
use crate::generator::GeneratorState;
use std::f64::consts::TAU;

/// Words of the generator's state, and how far apart those lie that make a new one.
const STATE: usize = 624;
const MIDDLE: usize = 397;

/// Normals come in blocks of 16 where there are at least 16, otherwise in pairs.
pub(crate) const BLOCK: usize = 16;

/// A range from which on `randint` takes words of 64 bits.
const WIDE_RANGE: u64 = 1 << 28;

/// MT19937.
///
/// Source: Matsumoto and Nishimura, *Mersenne Twister: A 623-Dimensionally Equidistributed Uniform Pseudo-Random Number Generator*, 1998, with
/// the authors' initialisation of 2002.
#[derive(Clone, Debug)]
struct Mt19937 {
    state: [u32; STATE],
    next: usize,
}

impl Mt19937 {
    fn new(seed: u32) -> Self {
        let mut state = [seed; STATE];
        for i in 1..STATE {
            let before = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(before ^ (before >> 30)).wrapping_add(i as u32);
        }
        Self { state, next: STATE }
    }

    fn twist(&mut self) {
        for i in 0..STATE {
            let mixed = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % STATE] & 0x7fff_ffff);
            let odd = if mixed & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + MIDDLE) % STATE] ^ (mixed >> 1) ^ odd;
        }
        self.next = 0;
    }

    fn word(&mut self) -> u32 {
        if self.next == STATE {
            self.twist();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// Leaves out words.
    fn skip(&mut self, mut words: u64) {
        while words > 0 {
            if self.next == STATE {
                self.twist();
            }
            let now = words.min((STATE - self.next) as u64);
            self.next += now as usize;
            words -= now;
        }
    }
}

/// The generator: its words, how many it gave, and the normal that is left over from a pair with the count of words after that pair.
#[derive(Clone, Debug)]
pub(crate) struct TorchCpu {
    seed: u32,
    engine: Mt19937,
    words: u64,
    spare: Option<(f64, u64)>,
}

impl TorchCpu {
    /// PyTorch uses the low 32 bits of the seed.
    pub fn new(seed: u64) -> Self {
        let seed = seed as u32;
        Self { seed, engine: Mt19937::new(seed), words: 0, spare: None }
    }

    /// The seed in the low 32 bits of `seed`, and in the high ones, if a normal is left over, 1 + the words given since; the words given as
    /// `offset`. A normal that is left over for more than 2³² − 2 words is not kept.
    pub fn state(&self) -> GeneratorState {
        let age = self.spare.map_or(0, |(_, after)| self.words.saturating_sub(after).saturating_add(1));
        let age = u32::try_from(age).unwrap_or(0);
        GeneratorState { seed: (u64::from(age) << 32) | u64::from(self.seed), offset: self.words }
    }

    /// The generator in a saved state. It goes there word by word.
    pub fn at(state: GeneratorState) -> Self {
        let mut generator = Self::new(state.seed);
        let age = state.seed >> 32;
        // The pair took four words.
        if let Some(before) = age.checked_sub(1).and_then(|since| state.offset.checked_sub(since)?.checked_sub(4)) {
            generator.skip(before);
            generator.pair();
        }
        generator.skip(state.offset - generator.words);
        generator
    }

    /// Leaves out words.
    pub fn skip(&mut self, words: u64) {
        self.engine.skip(words);
        self.words = self.words.wrapping_add(words);
    }

    fn word(&mut self) -> u32 {
        self.words += 1;
        self.engine.word()
    }

    fn long(&mut self) -> u64 {
        let high = self.word();
        (u64::from(high) << 32) | u64::from(self.word())
    }

    /// A uniform number of 24 bits, as f32 takes it.
    fn single(&mut self) -> f64 {
        f64::from(self.word() & 0x00ff_ffff) / f64::from(1 << 24)
    }

    /// A uniform number of 53 bits, as f64 takes it.
    fn double(&mut self) -> f64 {
        (self.long() & ((1 << 53) - 1)) as f64 / (1u64 << 53) as f64
    }

    /// Two normals of 53 bits by Box and Muller's method: one to take, the other is left over.
    fn pair(&mut self) -> f64 {
        let (angle, tail) = (TAU * self.double(), self.double());
        let radius = (-2.0 * (-tail).ln_1p()).sqrt();
        self.spare = Some((radius * angle.sin(), self.words));
        radius * angle.cos()
    }

    /// Uniform numbers in [0, 1): of 53 bits for f64, of 24 for the other dtypes.
    pub fn fill_uniform(&mut self, out: &mut [f64], dtype: DType) {
        let double = dtype == DType::F64;
        out.iter_mut().for_each(|x| *x = if double { self.double() } else { self.single() });
    }

    /// Standard normals. Fewer than 16 come in pairs of 53 bits; more are made of uniforms in blocks of 16, and if the last block is not
    /// whole, the last 16 are drawn again. For f32 and f64, uniforms that will be drawn again are drawn before, too.
    pub fn fill_normal(&mut self, out: &mut [f64], dtype: DType) {
        let count = out.len();
        if count < BLOCK {
            for x in out {
                *x = match self.spare.take() {
                    Some((spare, _)) => spare,
                    None => self.pair(),
                };
            }
            return;
        }
        let rest = count % BLOCK;
        let at_once = if matches!(dtype, DType::F32 | DType::F64) { count } else { count - rest };
        self.fill_uniform(&mut out[..at_once], dtype);
        let round: fn(f64) -> f64 = if dtype == DType::F64 { |x| x } else { |x| f64::from(x as f32) };
        out.as_chunks_mut::<BLOCK>().0.iter_mut().for_each(|block| to_normal(block, round));
        if rest > 0
            && let Some(last) = out.last_chunk_mut::<BLOCK>()
        {
            self.fill_uniform(last, dtype);
            to_normal(last, round);
        }
    }

    /// A whole number in `low..low + range`.
    pub fn integer(&mut self, low: i64, range: u64) -> i64 {
        let drawn = if range >= WIDE_RANGE { self.long() } else { u64::from(self.word()) };
        low.wrapping_add((drawn % range) as i64)
    }

    /// `0..n` in random order, by Fisher and Yates's method.
    pub fn permutation(&mut self, out: &mut [i64]) {
        out.iter_mut().zip(0..).for_each(|(x, i)| *x = i);
        let count = out.len();
        for i in 0..count.saturating_sub(1) {
            let left = (count - i) as u64;
            let drawn = if count as u64 >= u64::from(u32::MAX) { self.long() } else { u64::from(self.word()) };
            out.swap(i, i + (drawn % left) as usize);
        }
    }
}

/// Sixteen uniforms as sixteen normals by Box and Muller's method: the first half are the radii, the second the angles. Results between are
/// rounded as PyTorch's are: an angle's error is not small beside a sine near 0.
fn to_normal(block: &mut [f64; BLOCK], round: fn(f64) -> f64) {
    let (radii, angles) = block.split_at_mut(BLOCK / 2);
    for (x, y) in radii.iter_mut().zip(angles) {
        let radius = round((-2.0 * round((1.0 - *x).ln())).sqrt());
        let angle = round(round(TAU) * *y);
        (*x, *y) = (round(radius * round(angle.cos())), round(radius * round(angle.sin())));
    }
}
