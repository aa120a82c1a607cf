//! A built-in generator of small colour pictures: a sky above a meadow, a beach or a lake, with houses, trees, balls and a sun. What a thing
//! is shows in its shape, its texture and its place, and says its hue; how bright it is says nothing. So the colours can be told from the
//! grey picture, but not pixel by pixel.

use super::images::ImageSet;
use super::rng::Rng;
use kiln_tensor::{Error, Result};
use rayon::prelude::*;

/// Height and width of a picture.
pub const SIDE: usize = 32;
/// The brightness that a surface may have on average: the same range for all.
const BRIGHTNESS: (f32, f32) = (0.38, 0.72);
/// Places in a pixel whose mean it is, along each axis.
const SAMPLES: usize = 3;

/// `count` pictures (3 × 32 × 32), labelled with their ground: 0 a meadow, 1 a beach, 2 a lake. The same for a seed on any number of
/// threads.
///
/// # Errors
/// If there is no memory for `count` pictures.
pub fn generate(count: usize, seed: u64) -> Result<ImageSet> {
    let too_many = || Error::argument("generate landscapes", format!("there is no memory for {count} generated pictures"));
    let size = 3 * SIDE * SIDE;
    let mut pixels = Vec::new();
    let mut labels = Vec::new();
    let total = count.checked_mul(size).ok_or_else(too_many)?;
    pixels.try_reserve_exact(total).and_then(|()| labels.try_reserve_exact(count)).map_err(|_| too_many())?;
    pixels.resize(total, 0);
    labels.resize(count, 0);
    pixels.par_chunks_exact_mut(size).zip(labels.par_iter_mut()).enumerate().for_each(|(i, (pixels, label))| {
        let scene = Scene::random(&mut Rng::keyed(seed, i as u64, 2));
        *label = scene.ground.material as u8 - Material::Grass as u8;
        scene.draw(pixels);
    });
    ImageSet::new(pixels, labels, [3, SIDE, SIDE])
}

/// What a surface is made of, which says its hue and its texture.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Material {
    /// Lighter towards the horizon: blue.
    Day,
    /// Darker towards the horizon: orange.
    Dusk,
    /// Upright blades.
    Grass,
    /// Grains.
    Sand,
    /// Waves that lie.
    Water,
    Leaves,
    Trunk,
    /// Rows of bricks.
    Wall,
    Roof,
    /// Slanted stripes.
    Ball,
    Sun,
}

impl Material {
    /// A colour of its hue and saturation, as red, green and blue.
    fn colour(self) -> [f32; 3] {
        match self {
            Material::Day => [0.35, 0.58, 0.95],
            Material::Dusk => [0.95, 0.55, 0.35],
            Material::Grass => [0.36, 0.68, 0.22],
            Material::Sand => [0.86, 0.72, 0.36],
            Material::Water => [0.12, 0.62, 0.66],
            Material::Leaves => [0.12, 0.55, 0.28],
            Material::Trunk => [0.60, 0.38, 0.18],
            Material::Wall => [0.80, 0.32, 0.26],
            Material::Roof => [0.42, 0.32, 0.78],
            Material::Ball => [0.92, 0.22, 0.66],
            Material::Sun => [1.00, 0.88, 0.15],
        }
    }
}

/// Brightness of `rgb` (Rec. 601).
fn luma([r, g, b]: [f32; 3]) -> f32 {
    0.299 * r + 0.587 * g + 0.114 * b
}

/// A material with the brightness that it has in this picture.
#[derive(Clone, Copy)]
struct Surface {
    material: Material,
    brightness: f32,
}

impl Surface {
    fn random(material: Material, rng: &mut Rng) -> Self {
        Self { material, brightness: rng.range(BRIGHTNESS.0, BRIGHTNESS.1) }
    }

    /// Its colour, made as bright as `brightness`, with as much of its saturation as that leaves room for.
    fn lit(self, change: f32) -> [f32; 3] {
        let colour = self.material.colour();
        let (own, bright) = (luma(colour), (self.brightness + change).clamp(0.05, 0.95));
        let room = colour.map(|c| {
            let difference = c - own;
            if difference > 0.0 { (1.0 - bright) / difference } else { bright / (-difference).max(1e-6) }
        });
        let saturation = room.into_iter().fold(1.0, f32::min);
        colour.map(|c| bright + saturation * (c - own))
    }
}

/// What stands before sky and ground.
enum Thing {
    /// A trunk with a triangle of leaves: middle, foot, height, and half the width.
    Tree { at: (f32, f32), height: f32, half: f32, leaves: Surface, trunk: Surface },
    /// Walls with a roof: middle, foot, height of the walls, and half the width.
    House { at: (f32, f32), height: f32, half: f32, wall: Surface, roof: Surface },
    /// A disc: middle and radius.
    Disc { at: (f32, f32), radius: f32, surface: Surface },
}

impl Thing {
    fn on_ground(rng: &mut Rng, x: f32, horizon: f32) -> Self {
        let foot = rng.range(horizon + 3.0, SIDE as f32 - 2.0);
        // Nearer things are larger.
        let scale = 0.75 + 0.5 * (foot - horizon) / (SIDE as f32 - horizon);
        match rng.below(3) {
            0 => Thing::Tree {
                at: (x, foot),
                height: scale * rng.range(11.0, 16.0),
                half: scale * rng.range(4.0, 5.5),
                leaves: Surface::random(Material::Leaves, rng),
                trunk: Surface::random(Material::Trunk, rng),
            },
            1 => Thing::House {
                at: (x, foot),
                height: scale * rng.range(6.0, 8.0),
                half: scale * rng.range(4.0, 5.5),
                wall: Surface::random(Material::Wall, rng),
                roof: Surface::random(Material::Roof, rng),
            },
            _ => {
                let radius = scale * rng.range(3.0, 4.5);
                Thing::Disc { at: (x, foot - radius), radius, surface: Surface::random(Material::Ball, rng) }
            }
        }
    }

    /// The surface at (x, y), if it is there.
    fn at(&self, x: f32, y: f32) -> Option<Surface> {
        match *self {
            Thing::Tree { at, height, half, leaves, trunk } => {
                let (across, up) = ((x - at.0).abs(), at.1 - y);
                let bare = 0.25 * height;
                let wide = half * (height - up) / (height - bare);
                if up >= bare && up < height && across < wide {
                    Some(leaves)
                } else {
                    ((0.0..bare).contains(&up) && across < 0.22 * half + 0.4).then_some(trunk)
                }
            }
            Thing::House { at, height, half, wall, roof } => {
                let (across, up) = ((x - at.0).abs(), at.1 - y);
                if (0.0..height).contains(&up) && across < half {
                    Some(wall)
                } else {
                    (up >= height && up < 1.75 * height && across < 1.2 * half * (1.75 * height - up) / (0.75 * height)).then_some(roof)
                }
            }
            Thing::Disc { at, radius, surface } => ((x - at.0).hypot(y - at.1) < radius).then_some(surface),
        }
    }
}

/// A picture before it is drawn.
struct Scene {
    horizon: f32,
    sky: Surface,
    ground: Surface,
    /// Things, those behind first.
    things: Vec<Thing>,
    noise: Vec<f32>,
    phase: f32,
}

impl Scene {
    fn random(rng: &mut Rng) -> Self {
        let horizon = rng.range(11.0, 18.0);
        let sky = if rng.uniform() < 0.5 { Material::Day } else { Material::Dusk };
        let ground = [Material::Grass, Material::Sand, Material::Water][rng.below(3)];
        let (sky, ground) = (Surface::random(sky, rng), Surface::random(ground, rng));
        let mut things = Vec::new();
        if rng.uniform() < 0.5 {
            let radius = rng.range(2.2, 3.4);
            let at = (rng.range(4.0, SIDE as f32 - 4.0), rng.range(radius + 0.5, horizon - radius));
            things.push(Thing::Disc { at, radius, surface: Surface::random(Material::Sun, rng) });
        }
        let first = rng.range(6.0, 11.0);
        things.push(Thing::on_ground(rng, first, horizon));
        if rng.uniform() < 0.7 {
            let second = rng.range(20.0, 26.0);
            things.push(Thing::on_ground(rng, second, horizon));
        }
        let noise = (0..SIDE * SIDE).map(|_| rng.range(-1.0, 1.0)).collect();
        Self { horizon, sky, ground, things, noise, phase: rng.range(0.0, std::f32::consts::TAU) }
    }

    fn surface(&self, x: f32, y: f32) -> Surface {
        let thing = self.things.iter().rev().find_map(|thing| thing.at(x, y));
        thing.unwrap_or(if y < self.horizon { self.sky } else { self.ground })
    }

    fn noise(&self, column: usize, row: usize) -> f32 {
        self.noise.get(row % SIDE * SIDE + column % SIDE).copied().unwrap_or(0.0)
    }

    /// How much brighter than its surface a place is.
    fn texture(&self, material: Material, x: f32, y: f32) -> f32 {
        let (column, row) = (x as usize, y as usize);
        match material {
            Material::Day => 0.22 * (y / self.horizon - 0.5),
            Material::Dusk => -0.22 * (y / self.horizon - 0.5),
            Material::Grass => 0.13 * self.noise(column, row / 5),
            Material::Sand => 0.13 * self.noise(column, row),
            Material::Water => 0.13 * (1.6 * y + (0.5 * x + self.phase).sin()).sin(),
            Material::Leaves => 0.06 * self.noise(column / 2, row / 2),
            Material::Wall if row.is_multiple_of(3) || (column + row / 3 * 2).is_multiple_of(4) => -0.14,
            Material::Ball => 0.14 * (1.3 * (x + y) + self.phase).sin(),
            Material::Trunk | Material::Wall | Material::Roof | Material::Sun => 0.0,
        }
    }

    fn draw(&self, pixels: &mut [u8]) {
        for at in 0..SIDE * SIDE {
            let mut sum = [0.0; 3];
            for i in 0..SAMPLES * SAMPLES {
                let within = |i: usize| (i as f32 + 0.5) / SAMPLES as f32;
                let (x, y) = ((at % SIDE) as f32 + within(i % SAMPLES), (at / SIDE) as f32 + within(i / SAMPLES));
                let surface = self.surface(x, y);
                let colour = surface.lit(self.texture(surface.material, x, y));
                sum.iter_mut().zip(colour).for_each(|(sum, c)| *sum += c);
            }
            for (channel, sum) in sum.into_iter().enumerate() {
                let value = 255.0 * sum / (SAMPLES * SAMPLES) as f32;
                pixels[channel * SIDE * SIDE + at] = value.round().clamp(0.0, 255.0) as u8;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_on_any_number_of_threads_and_another_for_another_seed() {
        let on = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| generate(40, 7).unwrap());
        let one = on(1);
        assert_eq!(one.pixels(), on(7).pixels());
        assert_ne!(one.pixels(), generate(40, 8).unwrap().pixels());
        assert_eq!((one.shape(), one.labels().iter().max()), ([3, SIDE, SIDE], Some(&2)));
        assert!(generate(usize::MAX, 0).is_err() && generate(usize::MAX / 4000, 0).is_err());
    }

    #[test]
    fn a_surface_is_as_bright_as_asked_whatever_its_hue() {
        use Material::*;
        for material in [Day, Dusk, Grass, Sand, Water, Leaves, Trunk, Wall, Roof, Ball, Sun] {
            for brightness in [0.1f32, 0.4, 0.7, 0.9] {
                let colour = Surface { material, brightness }.lit(0.0);
                assert!((luma(colour) - brightness).abs() < 1e-4, "{colour:?}");
                assert!(colour.iter().all(|c| (-1e-4..=1.0001).contains(c)), "{colour:?}");
            }
        }
    }
}
