//! How a picture is drawn: the object's shape as coverage of each pixel, then its colours in a style.

use super::Attributes;
use crate::data::Rng;
use crate::data::digits::SIDE as GLYPH;
use kiln_tensor::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// How objects are painted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Style {
    /// In colour, on a dark background.
    #[default]
    Plain,
    /// A coloured line around the object, which is as dark as the background.
    Outline,
    /// In colour, on a bright background of a pale tint.
    Pastel,
    /// Dark, on a background in the colour.
    Inverted,
}

impl Style {
    /// All styles.
    pub const ALL: [Style; 4] = [Style::Plain, Style::Outline, Style::Pastel, Style::Inverted];
}

impl fmt::Display for Style {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Style::Plain => "plain",
            Style::Outline => "outline",
            Style::Pastel => "pastel",
            Style::Inverted => "inverted",
        })
    }
}

impl FromStr for Style {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let known = || Style::ALL.map(|style| style.to_string()).join(", ");
        let found = Style::ALL.into_iter().find(|style| style.to_string() == text);
        found.ok_or_else(|| Error::argument("style", format!("`{text}` is no style; there are {}", known())))
    }
}

/// Of the colours, in their order.
const RGB: [[f32; 3]; 6] =
    [[0.90, 0.12, 0.12], [0.12, 0.75, 0.20], [0.15, 0.30, 0.95], [0.95, 0.85, 0.10], [0.65, 0.15, 0.80], [0.10, 0.80, 0.85]];
/// Height and width of small and of large objects, as shares of the canvas.
const EXTENT: [f32; 2] = [0.42, 0.60];
/// The middles of the three columns (and rows) of places, as shares of the canvas.
const MIDDLES: [f32; 3] = [0.33, 0.5, 0.67];
/// Points along each axis of a pixel at which its coverage is sampled.
const SAMPLES: usize = 3;
/// A digit's height in its own picture: MNIST's box.
const BOX: f32 = 20.0;

/// Draws into `out`, three planes of `side`² values in [-1, 1]. `glyph` is the digit's picture, 28 × 28, if the object is one.
pub(super) fn draw(attributes: &Attributes, glyph: Option<&[u8]>, style: Style, side: usize, rng: &mut Rng, out: &mut [f32]) {
    let cover = coverage(attributes, glyph, side, rng);
    let cover = if style == Style::Outline { around(&cover, side) } else { cover };
    let mut ink = RGB[attributes.colour % RGB.len()].map(|channel| (channel + rng.range(-0.06, 0.06)).clamp(0.0, 1.0));
    let mut ground = [rng.range(0.0, 0.12); 3];
    match style {
        Style::Plain | Style::Outline => {}
        Style::Pastel => ground = std::array::from_fn(|_| rng.range(0.80, 0.97)),
        Style::Inverted => std::mem::swap(&mut ink, &mut ground),
    }
    for (plane, (ink, ground)) in out.chunks_exact_mut((side * side).max(1)).zip(ink.into_iter().zip(ground)) {
        plane.iter_mut().zip(&cover).for_each(|(value, &cover)| *value = 2.0 * (ground + cover * (ink - ground)) - 1.0);
    }
}

/// The share of each pixel that the object covers.
fn coverage(attributes: &Attributes, glyph: Option<&[u8]>, side: usize, rng: &mut Rng) -> Vec<f32> {
    let canvas = side as f32;
    let extent = canvas * EXTENT[attributes.size % 2] * rng.range(0.95, 1.05);
    let shift = |at: usize, rng: &mut Rng| canvas * (MIDDLES[at % 3] + rng.range(-0.02, 0.02));
    let (x, y) = (shift(attributes.place % 3, rng), shift(attributes.place / 3, rng));
    let (sin, cos) = rng.range(-0.12, 0.12).sin_cos();
    let at = |u: f32, v: f32| {
        let (u, v) = (cos * u + sin * v, cos * v - sin * u);
        glyph.map_or_else(|| f32::from(is_inside(attributes.object, u, v)), |glyph| ink(glyph, u, v))
    };
    let mut cover = Vec::with_capacity(side * side);
    for row in 0..side {
        for column in 0..side {
            let mut sum = 0.0;
            for sample in 0..SAMPLES * SAMPLES {
                let within = |i: usize| (i as f32 + 0.5) / SAMPLES as f32;
                let u = column as f32 + within(sample % SAMPLES) - x;
                let v = row as f32 + within(sample / SAMPLES) - y;
                sum += at(2.0 * u / extent, 2.0 * v / extent);
            }
            cover.push(sum / (SAMPLES * SAMPLES) as f32);
        }
    }
    cover
}

/// The ink of a digit's picture at (u, v), its box being [-1, 1]²: between the four pixels around it.
fn ink(glyph: &[u8], u: f32, v: f32) -> f32 {
    let place = |t: f32| t * BOX / 2.0 + GLYPH as f32 / 2.0 - 0.5;
    let (x, y) = (place(u), place(v));
    let pixel = |column: f32, row: f32| {
        let inside = |t: f32| (0.0..GLYPH as f32).contains(&t);
        let at = if inside(column) && inside(row) { glyph.get(row as usize * GLYPH + column as usize) } else { None };
        at.map_or(0.0, |&value| f32::from(value) / 255.0)
    };
    let (left, top) = (x.floor(), y.floor());
    let mix = |a: f32, b: f32, t: f32| a + t * (b - a);
    let row = |top: f32| mix(pixel(left, top), pixel(left + 1.0, top), x - left);
    mix(row(top), row(top + 1.0), y - top)
}

/// Whether (u, v) is inside of the shape that fills [-1, 1]².
fn is_inside(object: usize, u: f32, v: f32) -> bool {
    let radius = u.hypot(v);
    match object {
        10 => radius < 0.95,
        11 => u.abs().max(v.abs()) < 0.85,
        // The tip at the top.
        12 => v < 0.8 && v > -0.9 && u.abs() < 0.56 * (v + 0.9),
        13 => {
            // Five tips; straight edges from a tip to the notch beside it.
            let turn = std::f32::consts::TAU / 5.0;
            let angle = (u.atan2(-v) + turn / 2.0).rem_euclid(turn) - turn / 2.0;
            let (along, across) = (radius * angle.cos(), radius * angle.sin().abs());
            let (notch_along, notch_across) = (0.42 * (turn / 2.0).cos(), 0.42 * (turn / 2.0).sin());
            across * (1.0 - notch_along) < (1.0 - along) * notch_across
        }
        14 => u.abs().max(v.abs()) < 0.9 && u.abs().min(v.abs()) < 0.3,
        _ => (0.55..0.98).contains(&radius),
    }
}

/// The coverage of a line around what is covered, about a pixel wide.
fn around(cover: &[f32], side: usize) -> Vec<f32> {
    let near = |row: usize, column: usize| {
        let rows = row.saturating_sub(1)..(row + 2).min(side);
        let columns = move || column.saturating_sub(1)..(column + 2).min(side);
        rows.flat_map(|row| columns().map(move |column| cover[row * side + column])).fold(0.0, f32::max)
    };
    (0..side * side).map(|at| near(at / side, at % side) - cover[at]).collect()
}
