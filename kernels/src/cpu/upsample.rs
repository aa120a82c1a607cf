//! Axis maps of interpolation: nearest and linear (with bilinear and trilinear as its products), to run with
//! [`resample`](super::resample::resample) and, transposed, for the gradient.

use super::resample::{AxisMap, Tap};

/// Nearest neighbour: output `o` copies input `⌊o · inputs / outputs⌋`, the quotient rounded to f32 as PyTorch does.
pub fn nearest_axis(inputs: usize, outputs: usize) -> AxisMap {
    let scale = inputs as f32 / outputs as f32;
    AxisMap::new(
        inputs,
        (0..outputs).map(|o| {
            let index = if inputs == outputs { o } else { (o as f32 * scale) as usize };
            ([Tap { index: index.min(inputs.saturating_sub(1)), weight: 1.0 }], 1.0)
        }),
    )
}

/// Linear interpolation. With `align_corners` the first and last positions of input and output coincide; without, pixels are
/// areas: position `(o + ½) · inputs / outputs − ½`, clamped at the borders.
pub fn linear_axis(inputs: usize, outputs: usize, align_corners: bool) -> AxisMap {
    let scale = match (align_corners, outputs) {
        (true, 0 | 1) => 0.0,
        (true, _) => (inputs as f64 - 1.0) / (outputs as f64 - 1.0),
        (false, _) => inputs as f64 / outputs as f64,
    };
    AxisMap::new(
        inputs,
        (0..outputs).map(|o| {
            let position = if align_corners { o as f64 * scale } else { ((o as f64 + 0.5) * scale - 0.5).max(0.0) };
            let low = (position as usize).min(inputs.saturating_sub(1));
            let high = (low + 1).min(inputs.saturating_sub(1));
            let fraction = if low == high { 0.0 } else { position - low as f64 };
            // A neighbour of weight 0 is left out: its infinity or NaN must not reach the output.
            let taps = [Tap { index: low, weight: 1.0 - fraction }, Tap { index: high, weight: fraction }];
            (taps.into_iter().filter(|t| t.weight != 0.0), 1.0)
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::super::resample::resample;
    use super::*;

    fn line(map: AxisMap, x: &[f32]) -> Vec<f32> {
        let mut out = vec![9.0; map.outputs()];
        resample(&[AxisMap::unit(), AxisMap::unit(), map], 1, 1, x, &mut out);
        out
    }

    #[test]
    fn nearest_repeats_and_drops() {
        assert_eq!(line(nearest_axis(2, 4), &[1.0, -0.0]), [1.0, 1.0, -0.0, -0.0]);
        assert_eq!(line(nearest_axis(5, 3), &[0.0, 1.0, 2.0, 3.0, 4.0]), [0.0, 1.0, 3.0]);
        assert_eq!(line(nearest_axis(3, 0), &[0.0; 3]), []);
    }

    #[test]
    fn linear_agrees_with_worked_values() {
        assert_eq!(line(linear_axis(2, 4, false), &[0.0, 4.0]), [0.0, 1.0, 3.0, 4.0]);
        assert_eq!(line(linear_axis(2, 5, true), &[0.0, 4.0]), [0.0, 1.0, 2.0, 3.0, 4.0]);
        assert_eq!(line(linear_axis(4, 2, false), &[0.0, 2.0, 4.0, 6.0]), [1.0, 5.0]);
        assert_eq!(line(linear_axis(3, 1, true), &[7.0, 2.0, 4.0]), [7.0]);
        assert_eq!(line(linear_axis(1, 3, false), &[f32::INFINITY]), [f32::INFINITY; 3]);
    }
}
