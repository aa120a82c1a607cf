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
    let in_line = w.step == 1 && channels == g.cin;
    for kd in 0..d.taps.len() {
        let sd = d.first(line.at[0]) + kd as isize * d.step;
        for kh in 0..h.taps.len() {
            let sh = h.first(line.at[1]) + kh as isize * h.step;
            let hit = (0..g.source[0] as isize).contains(&sd) && (0..g.source[1] as isize).contains(&sh);
            let source = ((line.image * g.source[0]) as isize + sd) * g.source[1] as isize + sh;
            let first = source * g.source[2] as isize + w.first(line.at[2]);
            let at = (kd * h.taps.len() + kh) * taps * g.cin;
            for (i, patch) in patches.chunks_exact_mut(len).enumerate() {
                let row = &mut patch[at..at + taps * g.cin];
                let start = (first + i as isize * w.advance) * channels as isize + (group * g.cin) as isize;
                if hit && in_line && inside.contains(&i) {
                    copy(s, &x[start as usize..][..row.len()], row);
                    continue;
                }
                for (tap, pixel) in row.chunks_exact_mut(g.cin).enumerate() {
                    if hit && class.inside(g, line, tap).contains(&i) {
                        copy(s, &x[(start + tap as isize * w.step * channels as isize) as usize..][..g.cin], pixel);
                    } else {
                        fill_zero(s, pixel);
                    }
                }
            }
        }
    }
}

/// A copy of a few values in line: a call of `memcpy` would cost more than the copy.
#[inline(always)]
fn copy<W: Word, S: Simd>(s: S, from: &[W], to: &mut [W]) {
    for (from, to) in from.chunks(S::LANES).zip(to.chunks_mut(S::LANES)) {
        // SAFETY: `chunks` of at most LANES words of 32 bits, read and written for exactly their length (the slices are equally long).
        unsafe {
            s.load_partial(from.as_ptr().cast(), from.len().min(to.len())).store_partial(to.as_mut_ptr().cast(), from.len().min(to.len()))
        };
    }
}

#[inline(always)]
fn fill_zero<W: Word, S: Simd>(s: S, to: &mut [W]) {
    for to in to.chunks_mut(S::LANES) {
        // SAFETY: as many words of 32 bits are written as there are; all zeros are one.
        unsafe { s.zero().store_partial(to.as_mut_ptr().cast(), to.len()) }
    }
}
