//! Patches: the sources of a target pixel under all taps of its class, copied side by side.

use super::super::isa::WithSimd;
use super::super::simd::{F32s, Simd};
use super::Gather;
use super::class::Class;

/// Copies the patches of a range of a class' pixels to `out`, one after the other: `[pixel][tap][channel]`, zeros for the padding.
pub(super) struct Patches<'a> {
    pub g: &'a Gather,
    pub x: &'a [f32],
    pub class: &'a Class<'a>,
    pub group: usize,
    pub pixels: std::ops::Range<usize>,
    pub out: &'a mut [f32],
}

impl WithSimd for Patches<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let g = self.g;
        let len = self.class.tap_count() * g.cin;
        let mut pixels = self.class.pixels_from(self.pixels.start);
        for patch in self.out.chunks_exact_mut(len.max(1)).take(self.pixels.len()) {
            copy_patch(s, g, self.x, self.class, self.group, (pixels.image, pixels.at), patch);
            pixels.advance();
        }
    }
}

#[inline(always)]
fn copy_patch<S: Simd>(s: S, g: &Gather, x: &[f32], class: &Class, group: usize, (image, at): (usize, [usize; 3]), patch: &mut [f32]) {
    let [d, h, w] = class.axes;
    let channels = g.groups * g.cin;
    let [first_d, first_h, first_w]: [isize; 3] = std::array::from_fn(|i| class.axes[i].first[at[i]]);
    let taps = w.taps.len();
    // The taps of a row whose sources lie inside of the image are a range, as sources rise.
    let inside = |sw: isize| (0..g.source[2] as isize).contains(&sw);
    let all_inside = inside(first_w) && inside(first_w + (taps as isize - 1) * w.step);
    let low = if all_inside { 0 } else { (0..taps).find(|&i| inside(first_w + i as isize * w.step)).unwrap_or(taps) };
    let high = if all_inside { taps } else { low + (low..taps).take_while(|&i| inside(first_w + i as isize * w.step)).count() };
    let mut rows = patch.chunks_exact_mut((taps * g.cin).max(1));
    for kd in 0..d.taps.len() {
        let sd = first_d + kd as isize * d.step;
        for kh in 0..h.taps.len() {
            let sh = first_h + kh as isize * h.step;
            let Some(row) = rows.next() else { return };
            let hit = low < high && (0..g.source[0] as isize).contains(&sd) && (0..g.source[1] as isize).contains(&sh);
            if !hit || high - low < taps {
                fill_zero(s, row);
            }
            if !hit {
                continue;
            }
            let line = ((image * g.source[0] + sd as usize) * g.source[1] + sh as usize) * g.source[2];
            let start = (line as isize + first_w + low as isize * w.step) as usize * channels + group * g.cin;
            let row = &mut row[low * g.cin..high * g.cin];
            if w.step == 1 && channels == g.cin {
                copy(s, &x[start..start + row.len()], row);
            } else {
                for (tap, pixel) in row.chunks_exact_mut(g.cin).enumerate() {
                    copy(s, &x[start + tap * w.step as usize * channels..][..g.cin], pixel);
                }
            }
        }
    }
}

/// A copy of a few values in line: a call of `memcpy` would cost more than the copy.
#[inline(always)]
fn copy<S: Simd>(s: S, from: &[f32], to: &mut [f32]) {
    for (from, to) in from.chunks(S::LANES).zip(to.chunks_mut(S::LANES)) {
        // SAFETY: `chunks` of at most LANES values, read and written for exactly their length (the slices are equally long).
        unsafe { s.load_partial(from.as_ptr(), from.len().min(to.len())).store_partial(to.as_mut_ptr(), from.len().min(to.len())) };
    }
}

#[inline(always)]
fn fill_zero<S: Simd>(s: S, to: &mut [f32]) {
    for to in to.chunks_mut(S::LANES) {
        s.zero().store_slice(to, to.len());
    }
}
