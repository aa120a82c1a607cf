//! Patches: the sources of a target pixel under all taps of its class, copied side by side.

use super::super::isa::WithSimd;
use super::super::simd::{F32s, Simd};
use super::Gather;
use super::class::{Class, Line};
use super::direct::Word;

/// Copies the patches of a range of a class' pixels to `out`, one after the other: `[pixel][tap][channel]`, zeros for the padding.
pub(super) struct Patches<'a, W> {
    pub g: &'a Gather,
    pub x: &'a [W],
    pub class: &'a Class<'a>,
    pub group: usize,
    pub pixels: std::ops::Range<usize>,
    pub out: &'a mut [W],
}

impl<W: Word> WithSimd for Patches<'_, W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let len = self.class.tap_count() * self.g.cin;
        let mut out = self.out;
        for line in self.class.lines(self.pixels) {
            let (patches, rest) = out.split_at_mut(line.count * len);
            copy_line(s, self.g, self.x, self.class, self.group, &line, patches);
            out = rest;
        }
    }
}

/// The patches of a line: for each line of taps, the sources of all its pixels.
#[inline(always)]
fn copy_line<W: Word, S: Simd>(s: S, g: &Gather, x: &[W], class: &Class, group: usize, line: &Line, patches: &mut [W]) {
    let [d, h, w] = class.axes;
    let (channels, taps) = (g.groups * g.cin, w.taps.len());
    let len = class.tap_count() * g.cin;
    if len == 0 {
        return;
    }
    // The taps whose sources lie in the padding are the first of the first pixels and the last of the last.
    let inside = class.inside(g, line, 0).start..class.inside(g, line, taps - 1).end;
    let left = w.first(line.at[2]);
    let in_line = w.step == 1 && channels == g.cin;
    for kd in 0..d.taps.len() {
        let sd = d.first(line.at[0]) + kd as isize * d.step;
        for kh in 0..h.taps.len() {
            let sh = h.first(line.at[1]) + kh as isize * h.step;
            let hit = (0..g.source[0] as isize).contains(&sd) && (0..g.source[1] as isize).contains(&sh);
            let source = ((line.image * g.source[0]) as isize + sd) * g.source[1] as isize + sh;
            let at = (kd * h.taps.len() + kh) * taps * g.cin;
            let whole = if hit && in_line { inside.clone() } else { 0..0 };
            for i in (0..whole.start).chain(whole.end..line.count) {
                let patch = &mut patches[i * len + at..][..taps * g.cin];
                for (tap, pixel) in patch.chunks_exact_mut(g.cin).enumerate() {
                    let along = left + i as isize * w.advance + tap as isize * w.step;
                    if hit && (0..g.source[2] as isize).contains(&along) {
                        let start = (source * g.source[2] as isize + along) as usize * channels + group * g.cin;
                        copy(s, &x[start..][..g.cin], pixel);
                    } else {
                        fill_zero(s, pixel);
                    }
                }
            }
            if !whole.is_empty() {
                let start = (source * g.source[2] as isize + left + whole.start as isize * w.advance) as usize * channels;
                let runs = Runs {
                    from: &x[start..],
                    step: w.advance as usize * channels,
                    to: &mut patches[whole.start * len..whole.end * len],
                    len,
                    at,
                };
                runs.copy(s, taps * g.cin);
            }
        }
    }
}

/// Runs of words that lie `step` apart in `from` and belong at `at` in each `len` of `to`.
struct Runs<'a, W> {
    from: &'a [W],
    step: usize,
    to: &'a mut [W],
    len: usize,
    at: usize,
}

impl<W: Word> Runs<'_, W> {
    /// Copies runs of `count` words. The lengths by name are kernels of one channel, and of three or four channels.
    #[inline(always)]
    fn copy<S: Simd>(self, s: S, count: usize) {
        match count {
            2 => self.copy_of::<2>(),
            3 => self.copy_of::<3>(),
            4 => self.copy_of::<4>(),
            5 => self.copy_of::<5>(),
            7 => self.copy_of::<7>(),
            9 => self.copy_of::<9>(),
            12 => self.copy_of::<12>(),
            16 => self.copy_of::<16>(),
            _ => {
                for (i, to) in self.to.chunks_exact_mut(self.len).enumerate() {
                    copy(s, &self.from[i * self.step..][..count], &mut to[self.at..self.at + count]);
                }
            }
        }
    }

    /// A length that the compiler knows makes a copy one or two moves.
    #[inline(always)]
    fn copy_of<const COUNT: usize>(self) {
        for (i, to) in self.to.chunks_exact_mut(self.len).enumerate() {
            to[self.at..self.at + COUNT].copy_from_slice(&self.from[i * self.step..][..COUNT]);
        }
    }
}

/// A copy of a few values in line: a call of `memcpy` would cost more than the copy.
#[inline(always)]
fn copy<W: Word, S: Simd>(s: S, from: &[W], to: &mut [W]) {
    if let ([from], [to]) = (from, &mut *to) {
        *to = *from;
        return;
    }
    for (from, to) in from.chunks(S::LANES).zip(to.chunks_mut(S::LANES)) {
        // SAFETY: `chunks` of at most LANES words of 32 bits, read and written for exactly their length (the slices are equally long).
        unsafe {
            s.load_partial(from.as_ptr().cast(), from.len().min(to.len())).store_partial(to.as_mut_ptr().cast(), from.len().min(to.len()))
        };
    }
}

#[inline(always)]
fn fill_zero<W: Word, S: Simd>(s: S, to: &mut [W]) {
    if let [to] = &mut *to {
        *to = W::default();
        return;
    }
    for to in to.chunks_mut(S::LANES) {
        // SAFETY: as many words of 32 bits are written as there are; all zeros are one.
        unsafe { s.zero().store_partial(to.as_mut_ptr().cast(), to.len()) }
    }
}
