//! Captioned pictures in one style or several at once.

use kiln::data::{Attributes, CaptionedOptions, CaptionedPictures, Combinations, Dataset, ImageSet, Rng, Style};
use kiln::{Result, Tensor};

/// Pictures of an epoch that has no end: each is drawn when it is asked for.
pub const ENDLESS: usize = 1 << 20;

/// A set whose picture `i` is in style `i` modulo their number.
pub struct Pictures {
    sets: Vec<CaptionedPictures>,
    styles: Vec<Style>,
}

/// A batch, sorted by style.
pub struct Batch {
    /// (B, 3, 32, 32) in [-1, 1].
    pub pictures: Tensor,
    /// (B, 16)
    pub tokens: Tensor,
    pub attributes: Vec<Attributes>,
    pub captions: Vec<String>,
    pub styles: Vec<Style>,
}

impl Pictures {
    /// `samples` pictures in `styles`.
    pub fn new(digits: &ImageSet, styles: &[Style], combinations: Combinations, samples: usize, seed: u64) -> Result<Self> {
        Self::with(digits, styles, CaptionedOptions { samples, seed, combinations, ..Default::default() })
    }

    /// Plain pictures for training, without end; `alike` in a row differ in one attribute only.
    pub fn alike(digits: &ImageSet, alike: usize, seed: u64) -> Result<Self> {
        Self::with(digits, &[Style::Plain], CaptionedOptions { samples: ENDLESS, seed, alike, ..Default::default() })
    }

    fn with(digits: &ImageSet, styles: &[Style], options: CaptionedOptions) -> Result<Self> {
        let of = |style| CaptionedPictures::new(digits, CaptionedOptions { style, ..options });
        Ok(Self { sets: styles.iter().copied().map(of).collect::<Result<_>>()?, styles: styles.to_vec() })
    }

    /// The first `count` pictures.
    pub fn first(&self, count: usize) -> Result<Batch> {
        self.batch(&(0..count).collect::<Vec<_>>(), &mut Rng::new(0))
    }
}

impl Dataset for Pictures {
    type Batch = Batch;

    fn len(&self) -> usize {
        self.sets.first().map_or(0, Dataset::len)
    }

    fn batch(&self, indices: &[usize], rng: &mut Rng) -> Result<Batch> {
        let (mut pictures, mut tokens) = (Vec::new(), Vec::new());
        let (mut attributes, mut captions, mut styles) = (Vec::new(), Vec::new(), Vec::new());
        for (number, (set, &style)) in self.sets.iter().zip(&self.styles).enumerate() {
            let own: Vec<usize> = indices.iter().copied().filter(|index| index % self.sets.len() == number).collect();
            if own.is_empty() {
                continue;
            }
            let part = set.batch(&own, rng)?;
            pictures.push(part.pictures);
            tokens.push(part.tokens);
            attributes.extend(part.attributes);
            captions.extend(part.captions);
            styles.extend(own.iter().map(|_| style));
        }
        Ok(Batch { pictures: Tensor::cat(&pictures, 0)?, tokens: Tensor::cat(&tokens, 0)?, attributes, captions, styles })
    }
}
