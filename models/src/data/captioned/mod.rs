//! Captioned pictures, made up: a digit or a shape of some size, colour and place on a small canvas, with a sentence that says so. Some
//! combinations can be kept from training, so that what a model makes of them shows what it understood.

mod attributes;
mod draw;

pub use attributes::Attributes;
pub use draw::Style;

use super::dataset::{Dataset, check_indices};
use super::digits::SIDE as GLYPH;
use super::{ImageSet, Rng};
use crate::text::WordTokenizer;
use kiln_tensor::ops::conv::ConvOptions;
use kiln_tensor::ops::movement::PadMode;
use kiln_tensor::{Error, Result, Shape, Tensor, default_device};

/// Which combinations of attributes a data set shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Combinations {
    /// Those that are not held out.
    #[default]
    Training,
    /// Those that training never shows.
    HeldOut,
    /// All.
    All,
}

/// How captioned pictures are made.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct CaptionedOptions {
    /// Height and width of a picture.
    pub side: usize,
    /// Number of pictures.
    pub samples: usize,
    /// The seed of all randomness in them. Which combinations are held out does not depend on it.
    pub seed: u64,
    /// How objects are painted.
    pub style: Style,
    /// Which combinations are shown.
    pub combinations: Combinations,
    /// The share of combinations that are held out.
    pub held_out: f64,
    /// Pictures in a row that differ in one attribute only, by turns the object and the place; with 1 all are independent. Independent ones
    /// of a batch can be told apart by the attributes that are easily seen, so that a contrastive loss learns little about the others.
    pub alike: usize,
}

impl Default for CaptionedOptions {
    /// 10,000 plain pictures of 32 × 32 of the combinations for training; every seventh is held out.
    fn default() -> Self {
        let combinations = Combinations::Training;
        Self { side: 32, samples: 10_000, seed: 0, style: Style::Plain, combinations, held_out: 1.0 / 7.0, alike: 1 }
    }
}

/// A data set of captioned pictures. Picture `i` is a function of the options' seed and of `i`.
///
/// ```
/// use kiln_models::data::{CaptionedOptions, CaptionedPictures, Dataset, Rng, digits};
/// let set = CaptionedPictures::new(&digits::generate(200, 0)?, CaptionedOptions::default())?;
/// let batch = set.batch(&[0, 1, 2], &mut Rng::new(0))?;
/// assert_eq!(batch.pictures.dims(), [3, 3, 32, 32]);
/// assert_eq!(batch.tokens.dims(), [3, CaptionedPictures::TEXT_LENGTH]);
/// println!("{}", batch.captions[0]);
/// # Ok::<(), kiln_tensor::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct CaptionedPictures {
    digits: ImageSet,
    /// The pictures of each digit.
    by_digit: [Vec<usize>; 10],
    options: CaptionedOptions,
    combinations: Vec<Attributes>,
    tokenizer: WordTokenizer,
}

/// A batch of captioned pictures.
#[derive(Clone)]
pub struct CaptionedBatch {
    /// The pictures, f32 (B, 3, side, side) in [-1, 1].
    pub pictures: Tensor,
    /// The captions' tokens, i64 (B, [`TEXT_LENGTH`](CaptionedPictures::TEXT_LENGTH)): start, words, end, padding.
    pub tokens: Tensor,
    /// What the pictures show.
    pub attributes: Vec<Attributes>,
    /// The captions.
    pub captions: Vec<String>,
}

/// The largest canvas.
const MAX_SIDE: usize = 1024;

impl CaptionedPictures {
    /// Tokens of a caption, with start, end and padding.
    pub const TEXT_LENGTH: usize = 16;

    /// Pictures with the digits of `digits` (28 × 28, ten classes): [`Mnist`](super::Mnist)'s, or
    /// [generated](super::digits::generate) ones.
    ///
    /// # Errors
    /// If a digit is missing, the canvas has less than 8 or more than 1,024 pixels a side, or no combinations are left.
    pub fn new(digits: &ImageSet, options: CaptionedOptions) -> Result<Self> {
        let wrong = |message: String| Err(Error::argument("captioned pictures", message));
        if digits.shape() != [1, GLYPH, GLYPH] {
            return wrong(format!("digits of {:?}, not [1, {GLYPH}, {GLYPH}]", digits.shape()));
        }
        if !(8..=MAX_SIDE).contains(&options.side) {
            return wrong(format!("a canvas of {0}×{0}, not of 8 to {MAX_SIDE} pixels a side", options.side));
        }
        let of_digit = |digit: usize| digits.labels().iter().enumerate().filter(move |(_, label)| usize::from(**label) == digit);
        let by_digit: [Vec<usize>; 10] = std::array::from_fn(|digit| of_digit(digit).map(|(i, _)| i).collect());
        if let Some(digit) = by_digit.iter().position(Vec::is_empty) {
            return wrong(format!("there is no picture of the digit {digit} to draw with"));
        }
        let shown = |combination: &Attributes| match options.combinations {
            Combinations::All => true,
            Combinations::HeldOut => is_held_out(combination, options.held_out),
            Combinations::Training => !is_held_out(combination, options.held_out),
        };
        let combinations: Vec<Attributes> = (0..Attributes::COMBINATIONS).map(Attributes::of).filter(shown).collect();
        if combinations.is_empty() {
            return wrong(format!("with a share of {} held out, no combinations are left", options.held_out));
        }
        Ok(Self { digits: digits.clone(), by_digit, options, combinations, tokenizer: Self::tokenizer()? })
    }

    /// The tokenizer of all captions.
    ///
    /// # Errors
    /// None, as long as captions have words.
    pub fn tokenizer() -> Result<WordTokenizer> {
        WordTokenizer::new(attributes::words())
    }

    /// The tokens of texts, i64 (N, [`TEXT_LENGTH`](Self::TEXT_LENGTH)).
    ///
    /// # Errors
    /// If a text has a word that no caption has, or is longer than captions are.
    pub fn tokenize<S: AsRef<str>>(texts: &[S]) -> Result<Tensor> {
        tokens(&Self::tokenizer()?, texts)
    }

    /// The options it was made with.
    pub fn options(&self) -> &CaptionedOptions {
        &self.options
    }

    /// The combinations that are shown.
    pub fn combinations(&self) -> &[Attributes] {
        &self.combinations
    }

    /// What picture `index` shows, and its caption.
    pub fn describe(&self, index: usize) -> (Attributes, String) {
        let attributes = self.attributes(index);
        (attributes, attributes.random_caption(&mut self.random(index, CAPTION)))
    }

    fn random(&self, index: usize, purpose: u64) -> Rng {
        Rng::keyed(self.options.seed, index as u64, purpose)
    }

    fn attributes(&self, index: usize) -> Attributes {
        let alike = self.options.alike.max(1);
        let mut rng = self.random(index / alike, COMBINATION);
        let first = self.combinations.get(rng.below(self.combinations.len())).copied().unwrap_or(Attributes::of(0));
        if alike == 1 {
            return first;
        }
        let is_alike = |other: &&Attributes| match (index / alike).is_multiple_of(2) {
            true => Attributes { object: first.object, ..**other } == first,
            false => Attributes { place: first.place, ..**other } == first,
        };
        let mut row: Vec<_> = self.combinations.iter().filter(is_alike).collect();
        rng.shuffle(&mut row);
        row.get(index % alike % row.len().max(1)).map_or(first, |shown| **shown)
    }

    /// Draws `attributes` with the chance of picture `index` into three planes.
    fn draw(&self, attributes: &Attributes, index: usize, out: &mut [f32]) {
        let mut rng = self.random(index, DRAWING);
        let glyph = attributes.digit().and_then(|digit| {
            let choices = &self.by_digit[digit];
            let at = choices.get(rng.below(choices.len()))? * GLYPH * GLYPH;
            self.digits.pixels().get(at..at + GLYPH * GLYPH)
        });
        draw::draw(attributes, glyph, self.options.style, self.options.side, &mut rng, out);
    }

    /// A picture of each of `wanted`, (N, 3, side, side) in [-1, 1]: other drawings for another `seed`.
    ///
    /// # Errors
    /// If there is no memory for them.
    pub fn pictures_of(&self, wanted: &[Attributes], seed: u64) -> Result<Tensor> {
        let other = Self { options: CaptionedOptions { seed, ..self.options }, ..self.clone() };
        other.canvas(wanted.iter().copied().enumerate())
    }

    fn canvas(&self, items: impl ExactSizeIterator<Item = (usize, Attributes)>) -> Result<Tensor> {
        let side = self.options.side;
        Tensor::build::<f32>(default_device(), &Shape::new(&[items.len(), 3, side, side])?, |out| {
            for (picture, (index, attributes)) in out.chunks_exact_mut(3 * side * side).zip(items) {
                self.draw(&attributes, index, picture);
            }
            Ok(())
        })
    }
}

/// What random numbers are drawn for.
const COMBINATION: u64 = 0;
const CAPTION: u64 = 1;
const DRAWING: u64 = 2;

/// Whether a combination is among the `share` that training never shows: a hash of its number decides.
fn is_held_out(combination: &Attributes, share: f64) -> bool {
    f64::from(Rng::keyed(0x48E1D, combination.index() as u64, 0).uniform()) < share
}

fn tokens<S: AsRef<str>>(tokenizer: &WordTokenizer, texts: &[S]) -> Result<Tensor> {
    let mut ids = Vec::with_capacity(texts.len() * CaptionedPictures::TEXT_LENGTH);
    for text in texts {
        ids.extend(tokenizer.encode_padded(text.as_ref(), CaptionedPictures::TEXT_LENGTH)?.into_iter().map(i64::from));
    }
    Tensor::from_vec(ids, [texts.len(), CaptionedPictures::TEXT_LENGTH])?.to_device(default_device())
}

impl Dataset for CaptionedPictures {
    type Batch = CaptionedBatch;

    fn len(&self) -> usize {
        self.options.samples
    }

    fn batch(&self, indices: &[usize], _rng: &mut Rng) -> Result<CaptionedBatch> {
        check_indices(indices, self.len())?;
        let (attributes, captions): (Vec<_>, Vec<_>) = indices.iter().map(|&index| self.describe(index)).unzip();
        let pictures = self.canvas(indices.iter().copied().zip(attributes.iter().copied()))?;
        Ok(CaptionedBatch { pictures, tokens: tokens(&self.tokenizer, &captions)?, attributes, captions })
    }
}

/// The edges in pictures (B, C, H, W) with values in [-1, 1]: the length of Sobel's gradient in the channel where it is largest, scaled so
/// that a step over half of the range is 1, held to [0, 1]: (B, 1, H, W).
///
/// # Errors
/// If the pictures are empty or no floats.
pub fn edges(pictures: &Tensor) -> Result<Tensor> {
    let [batch, channels, height, width] = pictures.dims_n("edges")?;
    if pictures.numel() == 0 {
        return Err(Error::shape("edges", format!("pictures {} are empty", pictures.shape())));
    }
    let sobel = vec![-1f32, 0., 1., -2., 0., 2., -1., 0., 1., -1., -2., -1., 0., 0., 0., 1., 2., 1.];
    let sobel = Tensor::from_vec(sobel, [2, 1, 3, 3])?.to_dtype(pictures.dtype())?.to_device(pictures.device())?;
    let each = pictures.reshape([batch * channels, 1, height, width])?.pad(&[1, 1, 1, 1], PadMode::Replicate)?;
    let gradient = each.conv2d(&sobel, None, ConvOptions::new())?; // (B · C, 2, H, W)
    let length = gradient.norm(2.0, 1)?.reshape([batch, channels, height, width])?.max_keepdim(1)?;
    // A step of 1 has a gradient of 4.
    length.mul_scalar(0.25)?.clamp(None, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::digits;
    use std::collections::HashSet;

    fn set(options: CaptionedOptions) -> CaptionedPictures {
        CaptionedPictures::new(&digits::generate(200, 3).unwrap(), options).unwrap()
    }

    #[test]
    fn pictures_are_functions_of_seed_and_index() -> Result<()> {
        let a = set(CaptionedOptions::default());
        let one = a.batch(&[5, 9, 5], &mut Rng::new(0))?;
        let other = a.batch(&[9, 5], &mut Rng::new(1))?;
        let pixels = one.pictures.to_vec::<f32>()?;
        let plane = 3 * 32 * 32;
        assert_eq!(pixels[..plane], pixels[2 * plane..]);
        assert_eq!(other.pictures.to_vec::<f32>()?, [&pixels[plane..2 * plane], &pixels[..plane]].concat());
        assert_eq!((other.captions[0].as_str(), other.attributes[1]), (one.captions[1].as_str(), one.attributes[0]));
        assert!(pixels.iter().all(|value| (-1.0..=1.0).contains(value)));
        let reseeded = set(CaptionedOptions { seed: 1, ..CaptionedOptions::default() });
        assert_ne!(reseeded.batch(&[5], &mut Rng::new(0))?.pictures.to_vec::<f32>()?, pixels[..plane]);
        assert!(a.batch(&[10_000], &mut Rng::new(0)).is_err());
        Ok(())
    }

    #[test]
    fn held_out_combinations_are_apart_and_every_word_is_trained() {
        let of = |combinations| set(CaptionedOptions { combinations, ..CaptionedOptions::default() });
        let (training, held) = (of(Combinations::Training), of(Combinations::HeldOut));
        let shown: HashSet<_> = training.combinations().iter().collect();
        assert!(held.combinations().iter().all(|combination| !shown.contains(combination)));
        assert_eq!(shown.len() + held.combinations().len(), Attributes::COMBINATIONS);
        let share = held.combinations().len() as f64 / Attributes::COMBINATIONS as f64;
        assert!((share - 1.0 / 7.0).abs() < 0.03, "{share}");
        for (attribute, classes) in Attributes::CLASSES.into_iter().enumerate() {
            let values: HashSet<usize> = shown.iter().map(|combination| combination.labels()[attribute]).collect();
            assert_eq!(values.len(), classes);
        }
        assert!((0..500).all(|i| shown.contains(&training.describe(i).0)));
    }

    #[test]
    fn pictures_in_a_row_differ_in_one_attribute() {
        let set = set(CaptionedOptions { alike: 6, ..CaptionedOptions::default() });
        let mut firsts = HashSet::new();
        for row in 0..50 {
            let shown: Vec<_> = (6 * row..6 * row + 6).map(|i| set.describe(i).0).collect();
            let rest = |one: &Attributes| if row % 2 == 0 { Attributes { object: 0, ..*one } } else { Attributes { place: 0, ..*one } };
            assert!(shown.iter().all(|one| rest(one) == rest(&shown[0]) && set.combinations().contains(one)));
            assert!(shown.iter().collect::<HashSet<_>>().len() > 3, "{shown:?}");
            firsts.insert(shown[0]);
        }
        assert!(firsts.len() > 40);
    }

    #[test]
    fn every_caption_is_tokenized_and_numbers_come_back() -> Result<()> {
        let tokenizer = CaptionedPictures::tokenizer()?;
        let (mut rng, mut longest) = (Rng::new(1), 0);
        for index in 0..Attributes::COMBINATIONS {
            let attributes = Attributes::of(index);
            assert_eq!(attributes.index(), index);
            for caption in (0..Attributes::PHRASINGS).map(|i| attributes.caption(i)).chain([attributes.random_caption(&mut rng)]) {
                assert_eq!(tokenizer.decode(&tokenizer.encode_padded(&caption, CaptionedPictures::TEXT_LENGTH)?)?, caption);
                longest = longest.max(caption.split(' ').count());
            }
        }
        assert_eq!(longest, Attributes::MAX_WORDS);
        let seven = Attributes { size: 0, colour: 0, object: 7, place: 3 };
        assert_eq!(seven.to_string(), "a small red seven on the left");
        assert!(CaptionedPictures::tokenize(&["a small pink seven"]).unwrap_err().to_string().contains("pink"));
        Ok(())
    }

    /// The middle of what differs from the background is where the caption says.
    #[test]
    fn pictures_show_what_they_say() -> Result<()> {
        let set = set(CaptionedOptions { combinations: Combinations::All, ..CaptionedOptions::default() });
        let all: Vec<Attributes> = (0..Attributes::COMBINATIONS).map(Attributes::of).collect();
        for style in Style::ALL {
            let styled = CaptionedPictures { options: CaptionedOptions { style, ..set.options }, ..set.clone() };
            let pixels = styled.pictures_of(&all, 4)?.to_vec::<f32>()?;
            for (picture, attributes) in pixels.chunks_exact(3 * 1024).zip(&all) {
                let ground: [f32; 3] = std::array::from_fn(|channel| picture[channel * 1024]);
                let difference = |at: usize| (0..3).map(|channel| (picture[channel * 1024 + at] - ground[channel]).abs()).sum::<f32>();
                let shown: Vec<usize> = (0..1024).filter(|&at| difference(at) > 0.3).collect();
                assert!(shown.len() > 10, "{attributes} in {style}: an empty picture");
                let middle = |coordinate: fn(usize) -> usize| {
                    let (first, last) =
                        shown.iter().fold((32, 0), |(first, last), &at| (first.min(coordinate(at)), last.max(coordinate(at))));
                    (first + last) as f32 / 2.0
                };
                // Places are 5.4 pixels apart, and digits need not be in the middle of their own pictures.
                let tolerance = if attributes.digit().is_some() { 4.0 } else { 2.7 };
                for (found, place) in [(middle(|at| at % 32), attributes.place % 3), (middle(|at| at / 32), attributes.place / 3)] {
                    let wanted = [10.1, 15.5, 20.9][place];
                    assert!((found - wanted).abs() < tolerance, "{attributes} in {style}: {found}, not {wanted}");
                }
            }
        }
        assert_eq!("outline".parse::<Style>()?, Style::Outline);
        assert!("oil".parse::<Style>().is_err());
        Ok(())
    }

    #[test]
    fn edges_are_where_values_change() -> Result<()> {
        let step: Vec<f32> = (0..36).map(|at| if at % 6 < 3 { -1.0 } else { -0.5 }).collect();
        let found = edges(&Tensor::from_vec(step, [1, 1, 6, 6])?)?.to_vec::<f32>()?;
        let expected: Vec<f32> = (0..36).map(|at| f32::from((2..4).contains(&(at % 6))) * 0.5).collect();
        assert_eq!(found, expected);
        assert_eq!(edges(&Tensor::ones([2, 3, 4, 5], ())?)?.dims(), [2, 1, 4, 5]);
        assert!(edges(&Tensor::ones([1, 3, 0, 5], ())?).is_err());
        Ok(())
    }

    #[test]
    fn what_cannot_be_drawn_is_an_error() {
        let digits = digits::generate(200, 0).unwrap();
        let refused = |digits: &ImageSet, options| CaptionedPictures::new(digits, options).is_err();
        let options = CaptionedOptions::default();
        assert!(refused(&digits.select(&[0, 1, 2]).unwrap(), options));
        for side in [0, 7, 1 << 40] {
            assert!(refused(&digits, CaptionedOptions { side, ..options }));
        }
        assert!(refused(&digits, CaptionedOptions { held_out: 1.5, ..options }));
        assert!(refused(&digits, CaptionedOptions { held_out: f64::NAN, combinations: Combinations::HeldOut, ..options }));
    }
}
