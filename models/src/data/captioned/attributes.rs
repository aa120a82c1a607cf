//! What a picture shows, in numbers and in words.

use crate::data::Rng;
use std::fmt;

/// A picture's content: one object with a size, a colour and a place. Each field is the number of its word in [`Attributes::SIZES`],
/// [`COLOURS`](Attributes::COLOURS), [`OBJECTS`](Attributes::OBJECTS) or [`PLACES`](Attributes::PLACES).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Attributes {
    /// Small or large.
    pub size: usize,
    /// The colour.
    pub colour: usize,
    /// A digit (its own number) or a shape.
    pub object: usize,
    /// Where the object is.
    pub place: usize,
}

impl Attributes {
    /// The sizes.
    pub const SIZES: [&str; 2] = ["small", "large"];
    /// The colours.
    pub const COLOURS: [&str; 6] = ["red", "green", "blue", "yellow", "purple", "cyan"];
    /// The ten digits, then the shapes.
    pub const OBJECTS: [&str; 16] = [
        "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "circle", "square", "triangle", "star", "cross",
        "ring",
    ];
    /// The places: three rows of three, from the top left.
    pub const PLACES: [&str; 9] = ["top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right"];
    /// The number of combinations.
    pub const COMBINATIONS: usize = Self::SIZES.len() * Self::COLOURS.len() * Self::OBJECTS.len() * Self::PLACES.len();
    /// Phrasings of a caption: see [`caption`](Attributes::caption).
    pub const PHRASINGS: usize = SENTENCES.len();
    /// Words of the longest caption.
    pub const MAX_WORDS: usize = 12;

    /// The combination of number `index` (modulo [`COMBINATIONS`](Attributes::COMBINATIONS)).
    pub fn of(index: usize) -> Self {
        let (rest, place) = (index / Self::PLACES.len(), index % Self::PLACES.len());
        let (rest, object) = (rest / Self::OBJECTS.len(), rest % Self::OBJECTS.len());
        let (rest, colour) = (rest / Self::COLOURS.len(), rest % Self::COLOURS.len());
        Self { size: rest % Self::SIZES.len(), colour, object, place }
    }

    /// The number of this combination.
    pub fn index(&self) -> usize {
        let colour = self.size * Self::COLOURS.len() + self.colour;
        (colour * Self::OBJECTS.len() + self.object) * Self::PLACES.len() + self.place
    }

    /// All four numbers: size, colour, object, place.
    pub fn labels(&self) -> [usize; 4] {
        [self.size, self.colour, self.object, self.place]
    }

    /// The numbers of the values that each of the [`labels`](Attributes::labels) can have.
    pub const CLASSES: [usize; 4] = [Self::SIZES.len(), Self::COLOURS.len(), Self::OBJECTS.len(), Self::PLACES.len()];

    /// The digit that is shown, if it is one.
    pub fn digit(&self) -> Option<usize> {
        (self.object < 10).then_some(self.object)
    }

    /// The caption in the phrasing of number `phrasing` (modulo [`PHRASINGS`](Attributes::PHRASINGS)), with the first word for each
    /// attribute. Phrasing 0 is "a small red seven on the left".
    pub fn caption(&self, phrasing: usize) -> String {
        self.phrase(phrasing, |_| 0)
    }

    /// A caption in a random phrasing with random synonyms.
    pub fn random_caption(&self, rng: &mut Rng) -> String {
        let phrasing = rng.below(SENTENCES.len());
        self.phrase(phrasing, |synonyms| rng.below(synonyms))
    }

    fn phrase(&self, phrasing: usize, mut choose: impl FnMut(usize) -> usize) -> String {
        let mut pick = |synonyms: &[&'static str]| synonyms.get(choose(synonyms.len())).copied().unwrap_or_default();
        let (size, place) = (pick(SIZE_WORDS[self.size % 2]), pick(PLACE_PHRASES[self.place % 9]));
        let sentence = SENTENCES[phrasing % SENTENCES.len()];
        let sentence = sentence.replace("SIZE", size).replace("PLACE", place);
        sentence.replace("COLOUR", Self::COLOURS[self.colour % 6]).replace("OBJECT", Self::OBJECTS[self.object % 16])
    }
}

impl fmt::Display for Attributes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.caption(0))
    }
}

/// All words that a caption can have.
pub(super) fn words() -> impl Iterator<Item = &'static str> {
    let sentences = SENTENCES.into_iter().flat_map(|sentence| sentence.split(' ')).filter(|word| word.chars().all(char::is_lowercase));
    let chosen = SIZE_WORDS.into_iter().flatten().chain(PLACE_PHRASES.into_iter().flatten()).copied();
    sentences.chain(chosen).chain(Attributes::COLOURS).chain(Attributes::OBJECTS)
}

const SENTENCES: [&str; 5] = [
    "a SIZE COLOUR OBJECT PLACE",
    "PLACE there is a SIZE COLOUR OBJECT",
    "a COLOUR OBJECT PLACE that is SIZE",
    "the OBJECT PLACE is SIZE and COLOUR",
    "a picture of a SIZE COLOUR OBJECT PLACE",
];
const SIZE_WORDS: [&[&str]; 2] = [&["small", "little", "tiny"], &["large", "big", "huge"]];
const PLACE_PHRASES: [&[&str]; 9] = [
    &["at the top left", "in the upper left corner"],
    &["at the top", "on top"],
    &["at the top right", "in the upper right corner"],
    &["on the left", "at the left side"],
    &["in the centre", "in the middle"],
    &["on the right", "at the right side"],
    &["at the bottom left", "in the lower left corner"],
    &["at the bottom", "below"],
    &["at the bottom right", "in the lower right corner"],
];
