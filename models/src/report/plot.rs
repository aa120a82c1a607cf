//! Curves over steps, and points in the plane.

use image::RgbImage;
use kiln_tensor::{Error, Result};
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};
use std::path::Path;
use std::sync::Once;

/// Width and height of the picture.
const SIZE: (u32, u32) = (800, 450);
/// Those of a picture of points.
const SCATTER_SIZE: (u32, u32) = (760, 720);

/// Curves with more points are drawn as means over as many equal stretches as fit the width.
const MAX_POINTS: usize = 600;

/// Values are held to ±this: beyond it the axis' arithmetic overflows, and no loss is worth telling apart.
const LIMIT: f64 = 1e9;

/// A named series of values, one a step.
#[derive(Clone, PartialEq, Debug)]
pub struct Curve {
    name: String,
    values: Vec<f64>,
}

impl Curve {
    /// A curve; values that are not finite are left out of the drawing.
    pub fn new(name: impl Into<String>, values: Vec<f64>) -> Self {
        Self { name: name.into(), values }
    }

    /// The points that are drawn: at the middle of each stretch, its mean.
    fn points(&self) -> Vec<(f64, f64)> {
        let stretch = self.values.len().div_ceil(MAX_POINTS).max(1);
        let mean = |(i, part): (usize, &[f64])| {
            let finite: Vec<f64> = part.iter().filter(|v| v.is_finite()).map(|v| v.clamp(-LIMIT, LIMIT)).collect();
            let middle = (i * stretch) as f64 + (part.len() as f64 + 1.0) / 2.0;
            (!finite.is_empty()).then(|| (middle, finite.iter().sum::<f64>() / finite.len() as f64))
        };
        self.values.chunks(stretch).enumerate().filter_map(mean).collect()
    }
}

/// Draws `curves` over their steps into a PNG, with a legend.
///
/// # Errors
/// If the file cannot be written.
pub fn plot_curves(path: &Path, title: &str, curves: &[Curve]) -> Result<()> {
    let mut pixels = RgbImage::new(SIZE.0, SIZE.1);
    draw(&mut pixels, title, curves).map_err(|e| Error::format("plot_curves", e.to_string()))?;
    super::save_png("plot_curves", path, &pixels)
}

/// A named set of points.
#[derive(Clone, PartialEq, Debug)]
pub struct Cloud {
    name: String,
    points: Vec<(f64, f64)>,
}

impl Cloud {
    /// A cloud; points that are not finite are left out of the drawing.
    pub fn new(name: impl Into<String>, mut points: Vec<(f64, f64)>) -> Self {
        points.retain(|(x, y)| x.is_finite() && y.is_finite());
        points.iter_mut().for_each(|(x, y)| (*x, *y) = (x.clamp(-LIMIT, LIMIT), y.clamp(-LIMIT, LIMIT)));
        Self { name: name.into(), points }
    }
}

/// Draws `clouds` into a PNG, each in a colour of its own, with a legend.
///
/// # Errors
/// If the file cannot be written.
pub fn plot_clouds(path: &Path, title: &str, clouds: &[Cloud]) -> Result<()> {
    let mut pixels = RgbImage::new(SCATTER_SIZE.0, SCATTER_SIZE.1);
    scatter(&mut pixels, title, clouds).map_err(|e| Error::format("plot_clouds", e.to_string()))?;
    super::save_png("plot_clouds", path, &pixels)
}

fn scatter(pixels: &mut RgbImage, title: &str, clouds: &[Cloud]) -> std::result::Result<(), Box<dyn std::error::Error>> {
    load_font();
    let range = |axis: fn(&(f64, f64)) -> f64| {
        let values = || clouds.iter().flat_map(|cloud| &cloud.points).map(axis);
        let (low, high) = (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max));
        let (low, high) = if low > high { (0.0, 1.0) } else { (low, high) };
        let margin = margin(low, high);
        low - margin..high + margin
    };
    let area = BitMapBackend::with_buffer(pixels, SCATTER_SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d(range(|p| p.0), range(|p| p.1))?;
    chart.configure_mesh().light_line_style(WHITE).label_style(("sans-serif", 14)).draw()?;
    for (i, cloud) in clouds.iter().enumerate() {
        let colour = Palette99::pick(i).to_rgba();
        chart
            .draw_series(cloud.points.iter().map(|&point| Circle::new(point, 2, colour.mix(0.6).filled())))?
            .label(cloud.name.as_str())
            .legend(move |(x, y)| Circle::new((x + 9, y), 5, colour.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 15))
        .draw()?;
    area.present()?;
    Ok(())
}

/// A font of our own: a bare machine has none. Registering it cannot fail for a font that parses.
fn load_font() {
    static FONT: Once = Once::new();
    FONT.call_once(|| {
        let _ = register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular());
    });
}

/// Writes a line of white text with its upper left corner at `at`.
pub(super) fn write_text(
    pixels: &mut RgbImage,
    text: &str,
    at: (i32, i32),
    height: u32,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    load_font();
    let size = pixels.dimensions();
    let area = BitMapBackend::with_buffer(pixels, size).into_drawing_area();
    area.draw(&Text::new(text, at, ("sans-serif", height).into_font().color(&WHITE)))?;
    area.present()?;
    Ok(())
}

/// Wide enough for the axis to tell its two ends apart, however large the values are.
fn margin(low: f64, high: f64) -> f64 {
    ((high - low) * 0.05).max(low.abs().max(high.abs()) * 1e-3).max(1e-6)
}

fn draw(pixels: &mut RgbImage, title: &str, curves: &[Curve]) -> std::result::Result<(), Box<dyn std::error::Error>> {
    load_font();
    let lines: Vec<Vec<(f64, f64)>> = curves.iter().map(Curve::points).collect();
    let all = || lines.iter().flatten();
    let right = all().map(|p| p.0).fold(1.0, f64::max);
    let (low, high) = all().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), p| (low.min(p.1), high.max(p.1)));
    let (low, high) = if low > high { (0.0, 1.0) } else { (low, high) };
    let margin = margin(low, high);

    let area = BitMapBackend::with_buffer(pixels, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..right, low - margin..high + margin)?;
    chart.configure_mesh().x_desc("step").light_line_style(WHITE).label_style(("sans-serif", 14)).draw()?;
    for (i, (curve, line)) in curves.iter().zip(lines).enumerate() {
        let colour = Palette99::pick(i).to_rgba();
        chart
            .draw_series(LineSeries::new(line, colour.stroke_width(2)))?
            .label(curve.name.as_str())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 15))
        .draw()?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_values_are_drawn() {
        let wild = [f64::MAX, f64::MIN, f64::NAN, f64::INFINITY, 1e16, 1e-300, 0.0];
        let series =
            [vec![], vec![f64::NAN], vec![3.0], vec![1e16; 5], vec![-1e300, -1e300], wild.to_vec(), (0..5000).map(f64::from).collect()];
        for values in series {
            let mut pixels = RgbImage::new(SIZE.0, SIZE.1);
            let finite = values.iter().any(|v| v.is_finite());
            draw(&mut pixels, "losses", &[Curve::new("loss", values.clone())]).unwrap();
            let [r, g, b] = {
                let (r, g, b) = Palette99::pick(0).rgb();
                [r, g, b]
            };
            // Within the axes, left of the legend.
            let drawn = (80..500).any(|x| (0..SIZE.1).any(|y| pixels.get_pixel(x, y).0 == [r, g, b]));
            assert_eq!(drawn, finite && values.len() > 1, "{values:?}");
        }
    }

    #[test]
    fn any_points_are_drawn() {
        for points in [vec![], vec![(f64::NAN, 0.0)], vec![(1.0, 2.0)], vec![(f64::MAX, f64::MIN), (1e-300, 0.0), (f64::INFINITY, 1.0)]] {
            let mut pixels = RgbImage::new(SCATTER_SIZE.0, SCATTER_SIZE.1);
            scatter(&mut pixels, "points", &[Cloud::new("cloud", points)]).unwrap();
            assert!(pixels.pixels().any(|p| p.0 == [255; 3]));
        }
    }
}
