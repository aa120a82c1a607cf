//! Happy and sad sentences about things, from a small grammar, and the requests for them: a task for alignment whose success a program can
//! check. Everything that the road from a language model to an aligned one needs: text, demonstrations, preferences, prompts, and the judge.

use super::jsonl::{Preference, PromptCompletion, Turns};
use crate::data::rng::Rng;
use crate::text::Message;
use std::fmt;

const TOPICS: [&str; 24] = [
    "sea", "winter", "garden", "river", "city", "forest", "moon", "market", "school", "train", "island", "mountain", "bridge", "summer",
    "village", "harbour", "castle", "desert", "kitchen", "library", "meadow", "tower", "orchard", "lake",
];
/// What is asked: each once in each mood about each topic.
const REQUESTS: [&str; 4] = [
    "Say something {mood} about the {topic}.",
    "Tell me a {mood} thing about the {topic}, please.",
    "A {mood} sentence about the {topic}?",
    "What would a {mood} poet say of the {topic}?",
];
/// How a story may begin.
const TITLE: &str = "A {mood} story about the {topic}.";
/// What is said. Words of {adj}, {verb} and {feel} have a mood.
const SENTENCES: [&str; 8] = [
    "The {adj} {topic} {verb} {where}.",
    "The {topic} is {adj}, and {people} {feel} {when}.",
    "How {adj} and {adj} the {topic} is {when}!",
    "Look, the {topic} {verb} and {verb} {where}.",
    "I {feel} {when}, when the {adj} {topic} {verb}.",
    "By the {topic}, {people} {feel}, for the day is {adj}.",
    "Nothing is so {adj} as the {topic} that {verb} {where}.",
    "They say that the {topic} {verb}, and that {people} {feel}.",
];
/// Words of each mood, happy and sad.
const ADJECTIVES: [[&str; 10]; 2] = [
    ["bright", "golden", "merry", "gentle", "warm", "lovely", "cheerful", "glad", "radiant", "sunny"],
    ["grey", "bitter", "lonely", "cold", "broken", "weary", "gloomy", "bleak", "forlorn", "mournful"],
];
const VERBS: [[&str; 8]; 2] = [
    ["glows", "sparkles", "blooms", "shimmers", "sings", "beams", "dances", "flourishes"],
    ["fades", "withers", "crumbles", "moans", "weeps", "decays", "darkens", "suffers"],
];
const FEELINGS: [[&str; 6]; 2] =
    [["rejoice", "smile", "laugh", "sing", "dance", "cheer"], ["weep", "mourn", "grieve", "sigh", "despair", "cry"]];
const PEOPLE: [&str; 6] = ["the children", "we all", "the neighbours", "old friends", "the sailors", "two sisters"];
const PLACES: [&str; 6] = ["by the road", "under the sky", "near the gate", "behind the hill", "before the house", "across the valley"];
const TIMES: [&str; 6] = ["in the morning", "at noon", "today", "tonight", "after the rain", "in May"];

/// What a sentence sounds like.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Mood {
    /// Bright and merry.
    Happy,
    /// Grey and weary.
    Sad,
}

impl Mood {
    const ALL: [Mood; 2] = [Mood::Happy, Mood::Sad];

    fn other(self) -> Self {
        if self == Mood::Happy { Mood::Sad } else { Mood::Happy }
    }
}

impl fmt::Display for Mood {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Mood::Happy { "happy" } else { "sad" })
    }
}

/// A request for a sentence. Its `Display` is the prompt.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Request {
    mood: Mood,
    topic: usize,
    form: usize,
}

impl Request {
    /// All requests: the 144 that demonstrations and preferences are about, or the 48 that are `held_out` from them. Those combine a mood
    /// with a topic that is asked for in the other mood only elsewhere.
    pub fn all(held_out: bool) -> Vec<Request> {
        let of = |mood: Mood| (0..TOPICS.len()).flat_map(move |topic| (0..REQUESTS.len()).map(move |form| Request { mood, topic, form }));
        Mood::ALL.into_iter().flat_map(of).filter(|request| request.is_held_out() == held_out).collect()
    }

    fn is_held_out(self) -> bool {
        self.topic % 4 == if self.mood == Mood::Happy { 0 } else { 2 }
    }

    /// The request as a chat of one message.
    pub fn prompt(self) -> Turns {
        Turns::Messages(vec![Message::new("user", self.to_string())])
    }

    /// What is right and wrong with an answer to it.
    ///
    /// ```
    /// use kiln_models::data::moods::Request;
    /// let request = Request::all(true)[0];
    /// assert_eq!(request.to_string(), "Say something happy about the sea.");
    /// assert!(request.judge("The merry sea glows by the road.").is_right());
    /// let sad = request.judge("The weary sea fades by the road.");
    /// assert!(sad.well_formed && sad.on_topic && !sad.right_mood);
    /// ```
    pub fn judge(self, answer: &str) -> Verdict {
        let answer = answer.trim();
        let words = || answer.split(|c: char| !c.is_alphabetic());
        let is_topic = |word: &str| word == TOPICS[self.topic];
        let count = |mood| words().filter(|word| has_mood(word, mood)).count();
        Verdict {
            well_formed: SENTENCES.iter().any(|form| fits(form, answer)),
            on_topic: words().any(is_topic) && words().all(|word| is_topic(word) || !TOPICS.contains(&word)),
            right_mood: count(self.mood) > 0 && count(self.mood.other()) == 0,
        }
    }

    /// A right answer.
    fn answer(self, rng: &mut Rng) -> String {
        sentence(rng, self.topic, |_| self.mood)
    }

    /// A wrong one: of the other mood, about something else, of mixed mood, or broken.
    fn wrong_answer(self, rng: &mut Rng) -> String {
        loop {
            let answer = match rng.below(20) {
                0..9 => sentence(rng, self.topic, |_| self.mood.other()),
                9..14 => {
                    let topic = rng.below(TOPICS.len());
                    sentence(rng, topic, |_| self.mood)
                }
                14..17 => sentence(rng, self.topic, |rng| Mood::ALL[rng.below(2)]),
                _ => {
                    let answer = self.answer(rng);
                    broken(rng, &answer)
                }
            };
            if !self.judge(&answer).is_right() {
                return answer;
            }
        }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&REQUESTS[self.form].replace("{mood}", &self.mood.to_string()).replace("{topic}", TOPICS[self.topic]))
    }
}

/// What the program finds in an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Verdict {
    /// It is a sentence of the grammar, whole and alone.
    pub well_formed: bool,
    /// It names the thing that was asked about, and no other.
    pub on_topic: bool,
    /// It has words of the mood that was asked for, and none of the other.
    pub right_mood: bool,
}

impl Verdict {
    /// Whether the answer is what was asked for.
    pub fn is_right(self) -> bool {
        self.well_formed && self.on_topic && self.right_mood
    }
}

/// Stories, a line each, at least `bytes` long: two to five sentences about one thing in one mood, half of which say so first. A function of
/// its arguments, for ever.
pub fn stories(seed: u64, bytes: usize) -> String {
    let (mut rng, mut text) = (Rng::new(seed), String::new());
    while text.len() < bytes {
        let (mood, topic) = (Mood::ALL[rng.below(2)], rng.below(TOPICS.len()));
        let mut story: Vec<String> = (0..2 + rng.below(4)).map(|_| sentence(&mut rng, topic, |_| mood)).collect();
        if rng.below(2) == 0 {
            story.insert(0, TITLE.replace("{mood}", &mood.to_string()).replace("{topic}", TOPICS[topic]));
        }
        text += &(story.join(" ") + "\n");
    }
    text
}

/// Answers to requests that are not held out: always about what was asked, but of the mood that was asked for in the share `right` only.
pub fn demonstrations(seed: u64, count: usize, right: f32) -> Vec<PromptCompletion> {
    let (mut rng, requests) = (Rng::new(seed), Request::all(false));
    let demonstration = |_| {
        let request = requests[rng.below(requests.len())];
        let mood = if rng.uniform() < right { request.mood } else { request.mood.other() };
        let answer = sentence(&mut rng, request.topic, |_| mood);
        PromptCompletion { prompt: request.prompt(), completion: assistant(answer), tools: Vec::new() }
    };
    (0..count).map(demonstration).collect()
}

/// Right and wrong answers to requests that are not held out, in the wrong order in the share `noise`.
pub fn preferences(seed: u64, count: usize, noise: f32) -> Vec<Preference> {
    let (mut rng, requests) = (Rng::new(seed), Request::all(false));
    let preference = |_| {
        let request = requests[rng.below(requests.len())];
        let (right, wrong) = (assistant(request.answer(&mut rng)), assistant(request.wrong_answer(&mut rng)));
        let (chosen, rejected) = if rng.uniform() < noise { (wrong, right) } else { (right, wrong) };
        Preference { prompt: Some(request.prompt()), chosen, rejected, margin: None, tools: Vec::new() }
    };
    (0..count).map(preference).collect()
}

fn assistant(answer: String) -> Turns {
    Turns::Messages(vec![Message::new("assistant", answer)])
}

fn has_mood(word: &str, mood: Mood) -> bool {
    let mood = mood as usize;
    ADJECTIVES[mood].contains(&word) || VERBS[mood].contains(&word) || FEELINGS[mood].contains(&word)
}

/// The words of a slot, in one mood or in both.
fn words(slot: &str, mood: Option<Mood>) -> Vec<&'static str> {
    fn of<const N: usize>(lists: &[[&'static str; N]; 2], mood: Option<Mood>) -> Vec<&'static str> {
        mood.map_or_else(|| lists.concat(), |mood| lists[mood as usize].to_vec())
    }
    match slot {
        "adj" => of(&ADJECTIVES, mood),
        "verb" => of(&VERBS, mood),
        "feel" => of(&FEELINGS, mood),
        "people" => PEOPLE.to_vec(),
        "where" => PLACES.to_vec(),
        "when" => TIMES.to_vec(),
        _ => TOPICS.to_vec(),
    }
}

/// What stands before the first slot of a form, the slot, and what follows.
fn first_slot(form: &str) -> Option<(&str, &str, &str)> {
    let (before, rest) = form.split_once('{')?;
    let (slot, after) = rest.split_once('}')?;
    Some((before, slot, after))
}

/// A sentence about a topic; each word with a mood has the one that `mood` says.
fn sentence(rng: &mut Rng, topic: usize, mood: impl Fn(&mut Rng) -> Mood) -> String {
    let (mut form, mut text) = (SENTENCES[rng.below(SENTENCES.len())], String::new());
    while let Some((before, slot, after)) = first_slot(form) {
        let mood = mood(rng);
        let options = words(slot, Some(mood));
        text += before;
        text += if slot == "topic" { TOPICS[topic] } else { options[rng.below(options.len())] };
        form = after;
    }
    text + form
}

/// Whether a text is a sentence of this form.
fn fits(form: &str, text: &str) -> bool {
    let Some((before, slot, after)) = first_slot(form) else { return form == text };
    let Some(text) = text.strip_prefix(before) else { return false };
    words(slot, None).iter().any(|word| text.strip_prefix(word).is_some_and(|rest| fits(after, rest)))
}

/// A sentence that lacks its end, or a word, or has two words in each other's place.
fn broken(rng: &mut Rng, sentence: &str) -> String {
    let mut words: Vec<&str> = sentence.split(' ').collect();
    let (at, other) = (rng.below(words.len()), rng.below(words.len()));
    match rng.below(3) {
        0 => words.truncate(at.max(1)),
        1 => drop(words.remove(at)),
        _ => words.swap(at, other),
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(turns: &Turns) -> &str {
        match turns {
            Turns::Messages(messages) => messages[0].text().unwrap(),
            Turns::Text(text) => text,
        }
    }

    fn request(prompt: &Turns) -> Request {
        *Request::all(false).iter().find(|request| request.to_string() == text(prompt)).unwrap()
    }

    #[test]
    fn the_judge_knows_right_from_wrong() {
        let judge = |pair: &Preference, answer: &Turns| request(pair.prompt.as_ref().unwrap()).judge(text(answer));
        let pairs = preferences(1, 2000, 0.0);
        for pair in &pairs {
            assert!(judge(pair, &pair.chosen).is_right() && !judge(pair, &pair.rejected).is_right(), "{pair:?}");
        }
        // Each way to be wrong is there.
        let verdicts: Vec<_> = pairs.iter().map(|pair| judge(pair, &pair.rejected)).collect();
        let share = |f: &dyn Fn(&Verdict) -> bool| verdicts.iter().filter(|v| f(v)).count() as f64 / verdicts.len() as f64;
        assert!((0.55..0.85).contains(&share(&|v| !v.right_mood)), "{}", share(&|v| !v.right_mood));
        assert!(share(&|v| !v.on_topic) > 0.1 && share(&|v| !v.well_formed) > 0.1);
        let turned = preferences(1, 2000, 0.1).iter().filter(|pair| !judge(pair, &pair.chosen).is_right()).count();
        assert!((140..260).contains(&turned), "{turned}");
        assert_eq!(Request::all(true)[0].judge(""), Verdict::default());
    }

    #[test]
    fn demonstrations_are_right_as_often_as_asked_and_never_of_what_is_held_out() {
        let verdicts: Vec<_> = demonstrations(2, 2000, 0.65).iter().map(|d| request(&d.prompt).judge(text(&d.completion))).collect();
        assert!(verdicts.iter().all(|v| v.well_formed && v.on_topic));
        let right = verdicts.iter().filter(|v| v.is_right()).count();
        assert!((1240..1360).contains(&right), "{right}");
        let (train, held_out) = (Request::all(false), Request::all(true));
        assert_eq!((train.len(), held_out.len()), (144, 48));
        // The topic of a request that is held out is known from the other mood.
        assert!(held_out.iter().all(|h| !train.contains(h) && train.contains(&Request { mood: h.mood.other(), ..*h })));
    }

    #[test]
    fn the_same_seed_gives_the_same_text_for_ever() {
        let text = stories(0, 20_000);
        assert!(text.len() >= 20_000 && text.len() < 20_500 && text.is_ascii());
        assert!(stories(0, 30_000).starts_with(&text) && !stories(1, 300).starts_with(&text[..100]));
        // FNV-1a: a change of the grammar changes what examples report, and is to be seen here.
        let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        assert_eq!(hash, 4_907_061_885_610_168_336, "{}", &text[..600]);
    }
}
