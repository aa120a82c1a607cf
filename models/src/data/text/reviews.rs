//! Reviews from a small grammar, for where no labelled texts are to be had. Each says how a thing was at first and how it is now; the
//! class is what both together mean. Negation turns words around, either time may be told first, and remarks about other things stand
//! between, so that it is not enough to know which words there are.

use super::classify::TextClassification;
use super::grammar::pick;
use crate::data::rng::Rng;

const THINGS: [&str; 12] =
    ["kettle", "phone", "bicycle", "lamp", "printer", "backpack", "heater", "radio", "blender", "watch", "drill", "vacuum cleaner"];
const PARTS: [&str; 10] = ["handle", "switch", "display", "cable", "finish", "case", "motor", "manual", "button", "battery"];
/// Words of praise, and of blame.
const WORDS: [[&str; 10]; 2] = [
    ["good", "reliable", "solid", "excellent", "quiet", "handy", "sturdy", "wonderful", "pleasant", "precise"],
    ["bad", "flimsy", "noisy", "terrible", "useless", "clumsy", "fragile", "annoying", "sluggish", "faulty"],
];
const DEGREES: [&str; 6] = ["", "", "", "very ", "really ", "quite "];
const NEGATIONS: [&str; 5] = ["not ", "not at all ", "anything but ", "far from ", "hardly "];
const EARLY: [&str; 6] = ["at first", "in the beginning", "out of the box", "last year", "during the first week", "when it arrived"];
const LATE: [&str; 6] = ["now", "by now", "these days", "after a month", "today", "since the last repair"];
const REMARKS: [&str; 12] = [
    "The parcel was not late.",
    "It came in a plain box.",
    "I did not read the instructions.",
    "The courier left it next door.",
    "My brother has the same one in green.",
    "There was no invoice in the box.",
    "I paid with a voucher.",
    "We use it twice a week.",
    "The shop never answered my letter.",
    "It is smaller than it looks in the picture.",
    "The colour is called slate.",
    "I had not planned to buy one.",
];

/// The classes: whether the thing was good at first, and whether it is now.
const CLASSES: [(&str, [bool; 2]); 4] =
    [("complaint", [false, false]), ("decline", [true, false]), ("praise", [true, true]), ("recovery", [false, true])];

/// Reviews of four classes, complaint, decline, praise and recovery, in turn: a function of its arguments, for ever.
///
/// The text says how a thing was and how it is. *The lamp was far from bad at first. We use it twice a week. These days it is
/// flimsy.* is a decline. A third of the judgements are negated, and either time may be told first, so that the words alone tell little.
///
/// ```
/// let reviews = kiln_models::data::generated_reviews(0, 8);
/// assert_eq!((reviews.classes.len(), &reviews.labels[..5]), (4, &[0, 1, 2, 3, 0][..]));
/// ```
pub fn generated_reviews(seed: u64, count: usize) -> TextClassification {
    let mut rng = Rng::new(seed);
    let classes = || CLASSES.iter().cycle().take(count);
    TextClassification {
        texts: classes().map(|(_, good)| review(&mut rng, *good)).collect(),
        labels: (0..CLASSES.len() as i64).cycle().take(count).collect(),
        classes: CLASSES.iter().map(|(name, _)| (*name).to_owned()).collect(),
    }
}

/// Two judgements of the thing in either order, with remarks around them.
fn review(rng: &mut Rng, good: [bool; 2]) -> String {
    let thing = pick(rng, &THINGS);
    let late_first = rng.below(2);
    let mut sentences = Vec::new();
    for place in 0..2 {
        if rng.below(3) == 0 {
            sentences.push(remark(rng));
        }
        let time = place ^ late_first;
        let subject = if place == 0 { format!("the {thing}") } else { "it".to_owned() };
        sentences.push(statement(rng, &subject, time, good[time]));
    }
    if rng.below(3) == 0 {
        sentences.push(remark(rng));
    }
    sentences.join(" ")
}

/// What a thing was like (`time` 0) or is like (1).
fn statement(rng: &mut Rng, subject: &str, time: usize, good: bool) -> String {
    let (verb, when) = (["was", "is"][time], pick(rng, [&EARLY, &LATE][time]));
    let judgement = judgement(rng, good);
    let sentence = match rng.below(3) {
        0 => format!("{subject} {verb} {judgement} {when}."),
        _ => format!("{when} {subject} {verb} {judgement}."),
    };
    capitalized(&sentence)
}

/// A word of praise or blame, or its opposite negated.
fn judgement(rng: &mut Rng, good: bool) -> String {
    let is_negated = rng.below(3) == 0;
    let word = pick(rng, &WORDS[usize::from(good == is_negated)]);
    match is_negated {
        true => format!("{}{word}", pick(rng, &NEGATIONS)),
        false => format!("{}{word}", pick(rng, &DEGREES)),
    }
}

/// Something about another thing, or about a part of this one, that decides nothing.
fn remark(rng: &mut Rng) -> String {
    match rng.below(3) {
        0 => {
            let good = rng.below(2) == 0;
            format!("My neighbour's {} is {}.", pick(rng, &THINGS), judgement(rng, good))
        }
        1 => format!("The {} has the colour of the {}.", pick(rng, &PARTS), pick(rng, &PARTS)),
        _ => pick(rng, &REMARKS).to_owned(),
    }
}

fn capitalized(sentence: &str) -> String {
    sentence.chars().enumerate().map(|(i, c)| if i == 0 { c.to_ascii_uppercase() } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_reviews_for_ever() {
        let reviews = generated_reviews(0, 2000);
        assert_eq!(generated_reviews(0, 100).texts, reviews.texts[..100]);
        assert_ne!(generated_reviews(1, 100).texts, reviews.texts[..100]);
        assert_eq!((0..4).map(|class| reviews.labels.iter().filter(|&&label| label == class).count()).collect::<Vec<_>>(), [500; 4]);
        // FNV-1a: a change of the grammar changes what the example reports, and is to be seen here.
        let bytes = reviews.texts.iter().flat_map(|text| text.bytes());
        let hash = bytes.fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        assert_eq!(hash, 10_669_986_577_119_514_114, "{:#?}", &reviews.texts[..8]);
    }

    /// What a text says, read with the grammar's own words.
    fn read(text: &str) -> [bool; 2] {
        let mut said = [None; 2];
        for sentence in text.to_lowercase().split_inclusive('.').filter(|sentence| !sentence.contains("neighbour")) {
            let is_said = |of: &[&str]| of.iter().any(|word| sentence.contains(word));
            let Some(word) = WORDS.map(|words| is_said(&words)).iter().position(|&found| found) else { continue };
            let time = usize::from(is_said(&LATE));
            assert!(is_said(&EARLY) != is_said(&LATE) && said[time].is_none(), "{text}");
            said[time] = Some((word == 0) != is_said(&NEGATIONS));
        }
        said.map(|good| good.unwrap_or_else(|| panic!("{text}")))
    }

    #[test]
    fn a_text_means_its_class() {
        let reviews = generated_reviews(3, 2000);
        for (text, &label) in reviews.texts.iter().zip(&reviews.labels) {
            assert_eq!(read(text), CLASSES[label as usize].1, "{text}");
        }
    }
}
