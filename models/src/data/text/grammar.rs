//! Dialogue from a small grammar, for where no real text is to be had. It has what a language model can learn in minutes and a
//! unigram model cannot: spelling, names that answer each other, verbs that agree with their subject, answers about what was asked.

use crate::data::rng::Rng;

const SPEAKERS: [&str; 10] = ["MIRA", "TOBIAS", "ANSELM", "IDA", "CORIN", "HELENE", "OSWIN", "RUTH", "LEANDER", "NELL"];
const PLACES: [&str; 12] = [
    "the harbour",
    "the old mill",
    "the market",
    "the north gate",
    "the orchard",
    "the bridge",
    "the tower",
    "the bakery",
    "the river",
    "the inn",
    "the library",
    "the garden",
];
const TIMES: [&str; 8] =
    ["at dawn", "before noon", "tonight", "after the rain", "in the evening", "at midnight", "on market day", "in spring"];
/// One of a thing, and several.
const THINGS: [[&str; 2]; 16] = [
    ["lantern", "lanterns"],
    ["letter", "letters"],
    ["horse", "horses"],
    ["boat", "boats"],
    ["candle", "candles"],
    ["apple", "apples"],
    ["bell", "bells"],
    ["key", "keys"],
    ["ring", "rings"],
    ["map", "maps"],
    ["goose", "geese"],
    ["loaf", "loaves"],
    ["coat", "coats"],
    ["song", "songs"],
    ["clock", "clocks"],
    ["wheel", "wheels"],
];
const KINDS: [&str; 14] =
    ["old", "little", "broken", "golden", "heavy", "strange", "quiet", "red", "blue", "wooden", "silver", "lost", "good", "cold"];
/// Said of one, of several, and as it was.
const VERBS: [[&str; 3]; 12] = [
    ["shines", "shine", "shone"],
    ["sleeps", "sleep", "slept"],
    ["waits", "wait", "waited"],
    ["falls", "fall", "fell"],
    ["sings", "sing", "sang"],
    ["burns", "burn", "burned"],
    ["turns", "turn", "turned"],
    ["stays", "stay", "stayed"],
    ["rests", "rest", "rested"],
    ["breaks", "break", "broke"],
    ["stands", "stand", "stood"],
    ["drifts", "drift", "drifted"],
];
/// What people do with things, now and then.
const DEEDS: [[&str; 2]; 10] = [
    ["find", "found"],
    ["sell", "sold"],
    ["carry", "carried"],
    ["hide", "hid"],
    ["mend", "mended"],
    ["see", "saw"],
    ["bring", "brought"],
    ["lose", "lost"],
    ["keep", "kept"],
    ["paint", "painted"],
];
const NUMBERS: [&str; 8] = ["two", "three", "four", "five", "six", "seven", "nine", "twelve"];
const GREETINGS: [&str; 6] = ["Good morrow", "Well met", "Welcome", "God keep you", "Come in", "Sit down"];
const REGRETS: [&str; 6] = ["Alas", "I fear", "So it is", "They say", "In truth", "I swear"];

/// Scenes of dialogue, at least `bytes` long (and less than a scene longer): a function of its arguments, for ever.
pub(super) fn dialogue(seed: u64, bytes: usize) -> String {
    let mut rng = Rng::new(seed);
    let mut out = String::new();
    while out.len() < bytes {
        scene(&mut rng, &mut out);
    }
    out
}

pub(super) fn pick<T: Copy>(rng: &mut Rng, of: &[T]) -> T {
    of[rng.below(of.len())]
}

/// A name as it is spoken: the first letter large.
fn spoken(speaker: &str) -> String {
    speaker.chars().enumerate().map(|(i, c)| if i == 0 { c } else { c.to_ascii_lowercase() }).collect()
}

/// Two people, four to nine exchanges.
fn scene(rng: &mut Rng, out: &mut String) {
    let first = rng.below(SPEAKERS.len());
    let second = (first + 1 + rng.below(SPEAKERS.len() - 1)) % SPEAKERS.len();
    let pair = [SPEAKERS[first], SPEAKERS[second]];
    let mut say = |speaker: &str, text: String| out.push_str(&format!("{speaker}:\n{text}\n\n"));
    say(pair[0], format!("{}, {}. {}", pick(rng, &GREETINGS), spoken(pair[1]), remark(rng)));
    say(pair[1], format!("{} to you, {}.", pick(rng, &["Good day", "Peace", "Good evening"]), spoken(pair[0])));
    for _ in 0..4 + rng.below(6) {
        let asks = rng.below(2);
        let (question, answer) = exchange(rng, &spoken(pair[1 - asks]));
        say(pair[asks], question);
        say(pair[1 - asks], answer);
    }
}

/// A sentence about the world, in which the verb agrees with its subject.
fn remark(rng: &mut Rng) -> String {
    let (thing, kind, verb, place) = (pick(rng, &THINGS), pick(rng, &KINDS), pick(rng, &VERBS), pick(rng, &PLACES));
    match rng.below(3) {
        0 => format!("The {kind} {} {} by {place}.", thing[0], verb[0]),
        1 => format!("The {kind} {} {} by {place}.", thing[1], verb[1]),
        _ => format!("{}, the {kind} {} {} by {place} {}.", pick(rng, &REGRETS), thing[0], verb[2], pick(rng, &TIMES)),
    }
}

/// A question, and an answer that speaks of the same things.
fn exchange(rng: &mut Rng, name: &str) -> (String, String) {
    let (thing, kind, deed) = (pick(rng, &THINGS), pick(rng, &KINDS), pick(rng, &DEEDS));
    let (place, time, number) = (pick(rng, &PLACES), pick(rng, &TIMES), pick(rng, &NUMBERS));
    match rng.below(5) {
        0 => (
            format!("Where did you {} the {kind} {}, {name}?", deed[0], thing[0]),
            format!("I {} the {kind} {} by {place}, {time}.", deed[1], thing[0]),
        ),
        1 => (
            format!("How many {} did you {} at {place}?", thing[1], deed[0]),
            format!("I {} {number} {} there. {}", deed[1], thing[1], remark(rng)),
        ),
        2 => (
            format!("Will you {} my {} {time}, {name}?", deed[0], thing[0]),
            match rng.below(2) {
                0 => format!("Yes, I will {} your {} {time}.", deed[0], thing[0]),
                _ => format!("No, I will not {} your {}. {}", deed[0], thing[0], remark(rng)),
            },
        ),
        3 => (
            format!("Who {} the {} of {place}?", deed[1], thing[1]),
            format!("{} {} them {time}, all {number} {}.", spoken(pick(rng, &SPEAKERS)), deed[1], thing[1]),
        ),
        _ => (format!("{}\n{}", remark(rng), remark(rng)), format!("So you say, but I {} no {} at {place}.", deed[1], thing[1])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_text_for_ever() {
        let text = dialogue(0, 400_000);
        assert!(text.len() >= 400_000 && text.len() < 403_000 && text.is_ascii());
        assert!(dialogue(0, 500_000).starts_with(&text) && !dialogue(1, 400).starts_with(&text[..200]));
        // FNV-1a: a change of the grammar changes what examples report, and is to be seen here.
        let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        assert_eq!(hash, 4_704_646_127_513_755_116, "{}", &text[..600]);
    }
}
