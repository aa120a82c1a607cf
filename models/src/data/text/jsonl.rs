//! Records from JSONL files: a JSON object a line.

use crate::data::error;
use crate::text::Message;
use crate::text::json::{self, Map, Value};
use kiln_tensor::Result;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

/// The longest line that is read, in bytes: a file without line breaks is no reason to fill the memory with it.
const MAX_LINE: u64 = 1 << 26;

/// A record that a line of a JSONL file holds. Fields that it does not have are left out.
pub trait JsonRecord: Sized {
    /// The record from a line's object.
    ///
    /// # Errors
    /// What is wrong, with the name of the field.
    fn from_object(object: Map<String, Value>) -> std::result::Result<Self, String>;
}

/// A text, or a chat.
#[derive(Clone, Debug, PartialEq)]
pub enum Turns {
    /// Text as it is.
    Text(String),
    /// Messages, which a chat template writes as text.
    Messages(Vec<Message>),
}

/// `{"prompt": …, "completion": …}`: what follows what, with the `tools` of a chat, if any.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptCompletion {
    /// What is given.
    pub prompt: Turns,
    /// What is to be learnt.
    pub completion: Turns,
    /// Descriptions of functions that the assistant may call.
    pub tools: Vec<Value>,
}

/// `{"messages": […]}`: a chat, with the `tools` that it has, if any.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation {
    /// What is said.
    pub messages: Vec<Message>,
    /// Descriptions of functions that the assistant may call.
    pub tools: Vec<Value>,
}

/// Either of the two: what supervised fine-tuning learns from.
#[derive(Clone, Debug, PartialEq)]
pub enum Demonstration {
    /// A record with `messages`.
    Conversation(Conversation),
    /// Any other.
    PromptCompletion(PromptCompletion),
}

/// `{"prompt": …}`: what is to be answered, with the `tools` of a chat, if any.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// What is given.
    pub prompt: Turns,
    /// Descriptions of functions that the assistant may call.
    pub tools: Vec<Value>,
}

/// `{"chosen": …, "rejected": …}`, with a `prompt` of both if it is apart, the `tools` of a chat and a `margin`, if any: which of two answers
/// is better.
#[derive(Clone, Debug, PartialEq)]
pub struct Preference {
    /// What is answered.
    pub prompt: Option<Turns>,
    /// The better answer.
    pub chosen: Turns,
    /// The worse one.
    pub rejected: Turns,
    /// By how much the better one is to lead in a reward model.
    pub margin: Option<f64>,
    /// Descriptions of functions that the assistant may call.
    pub tools: Vec<Value>,
}

/// `{"text": …}`: text to train on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlainText {
    /// The text.
    pub text: String,
}

/// `{"text": …, "label": …}`: a text and its class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelledText {
    /// The text.
    pub text: String,
    /// The class.
    pub label: Class,
}

/// A class as a file names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Class {
    /// By number.
    Number(i64),
    /// By name.
    Name(String),
}

/// Reads a record from each line of the file at `path`; empty lines are skipped.
///
/// ```no_run
/// use kiln_models::data::{PromptCompletion, read_jsonl};
/// let examples: Vec<PromptCompletion> = read_jsonl("train.jsonl")?;
/// # Ok::<(), kiln_tensor::Error>(())
/// ```
///
/// # Errors
/// If the file cannot be read or has no record, or a line is no UTF-8, longer than 64 MiB, no JSON object, or lacks a field or has a wrong
/// one; the error names the line and the field.
pub fn read_jsonl<R: JsonRecord>(path: impl AsRef<Path>) -> Result<Vec<R>> {
    let path = path.as_ref();
    let file = File::open(path).map_err(|e| error::io("open", path, e))?;
    parse(BufReader::new(file), path, MAX_LINE)
}

fn parse<R: JsonRecord>(mut input: impl BufRead, path: &Path, max_line: u64) -> Result<Vec<R>> {
    let (mut records, mut line) = (Vec::new(), Vec::new());
    for number in 1.. {
        line.clear();
        let read = input.by_ref().take(max_line + 1).read_until(b'\n', &mut line).map_err(|e| error::io("read", path, e))?;
        if read == 0 {
            break;
        }
        let wrong = |problem: &str| error::line(path, number, problem);
        if read as u64 > max_line {
            return Err(wrong(&format!("longer than {max_line} bytes")));
        }
        let text = std::str::from_utf8(&line).map_err(|e| wrong(&format!("not UTF-8 from its byte {} on", e.valid_up_to())))?;
        let text = if number == 1 { text.trim_start_matches('\u{feff}') } else { text };
        if !text.trim().is_empty() {
            records.push(record(text).map_err(|problem| wrong(&problem))?);
        }
    }
    if records.is_empty() {
        return Err(error::format(path, "records", "there are none"));
    }
    Ok(records)
}

fn record<R: JsonRecord>(text: &str) -> std::result::Result<R, String> {
    match json::from_str(text).map_err(|e| format!("column {}: {}", e.column(), without_place(&e)))? {
        Value::Object(object) => R::from_object(object),
        other => Err(format!("expected an object, found {}", kind(&other))),
    }
}

/// What is wrong, without the line and column inside the text that was parsed.
fn without_place(error: &json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or_default().to_owned()
}

/// What a value is, for messages.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Takes the field `name` out of an object and has `read` make something of it.
fn field<T>(
    object: &mut Map<String, Value>,
    name: &str,
    read: impl Fn(Value) -> std::result::Result<T, String>,
) -> std::result::Result<T, String> {
    read(object.remove(name).ok_or_else(|| format!("field `{name}` is missing"))?).map_err(|problem| format!("field `{name}`: {problem}"))
}

/// As [`field`], of a field that may be missing or null.
fn optional<T>(
    object: &mut Map<String, Value>,
    name: &str,
    read: impl Fn(Value) -> std::result::Result<T, String>,
) -> std::result::Result<Option<T>, String> {
    match object.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(_) => field(object, name, read).map(Some),
    }
}

fn string(value: Value) -> std::result::Result<String, String> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(format!("expected a string, found {}", kind(&other))),
    }
}

fn number(value: Value) -> std::result::Result<f64, String> {
    value.as_f64().ok_or_else(|| format!("expected a number, found {}", kind(&value)))
}

fn list(value: Value) -> std::result::Result<Vec<Value>, String> {
    match value {
        Value::Array(items) => Ok(items),
        other => Err(format!("expected a list, found {}", kind(&other))),
    }
}

/// Takes the field `tools` out of an object, if it has one.
fn tools(object: &mut Map<String, Value>) -> std::result::Result<Vec<Value>, String> {
    Ok(optional(object, "tools", list)?.unwrap_or_default())
}

fn messages(value: Value) -> std::result::Result<Vec<Message>, String> {
    let message = |(i, value)| json::from_value(value).map_err(|e| format!("message {i}: {}", without_place(&e)));
    let messages = list(value)?.into_iter().enumerate().map(message).collect::<std::result::Result<Vec<_>, _>>()?;
    if messages.is_empty() { Err("there is no message".to_owned()) } else { Ok(messages) }
}

fn turns(value: Value) -> std::result::Result<Turns, String> {
    match value {
        Value::String(text) => Ok(Turns::Text(text)),
        value @ Value::Array(_) => messages(value).map(Turns::Messages),
        other => Err(format!("expected a string or a list of messages, found {}", kind(&other))),
    }
}

fn class(value: Value) -> std::result::Result<Class, String> {
    match value {
        Value::String(name) => Ok(Class::Name(name)),
        other => other.as_i64().map(Class::Number).ok_or_else(|| format!("expected a string or an integer, found {}", kind(&other))),
    }
}

impl JsonRecord for PromptCompletion {
    fn from_object(mut object: Map<String, Value>) -> std::result::Result<Self, String> {
        let (prompt, completion) = (field(&mut object, "prompt", turns)?, field(&mut object, "completion", turns)?);
        Ok(Self { prompt, completion, tools: tools(&mut object)? })
    }
}

impl JsonRecord for Conversation {
    fn from_object(mut object: Map<String, Value>) -> std::result::Result<Self, String> {
        Ok(Self { messages: field(&mut object, "messages", messages)?, tools: tools(&mut object)? })
    }
}

impl JsonRecord for Demonstration {
    fn from_object(object: Map<String, Value>) -> std::result::Result<Self, String> {
        if object.contains_key("messages") {
            Conversation::from_object(object).map(Demonstration::Conversation)
        } else {
            PromptCompletion::from_object(object).map(Demonstration::PromptCompletion)
        }
    }
}

impl JsonRecord for Prompt {
    fn from_object(mut object: Map<String, Value>) -> std::result::Result<Self, String> {
        Ok(Self { prompt: field(&mut object, "prompt", turns)?, tools: tools(&mut object)? })
    }
}

impl JsonRecord for Preference {
    fn from_object(mut object: Map<String, Value>) -> std::result::Result<Self, String> {
        let (prompt, chosen) = (optional(&mut object, "prompt", turns)?, field(&mut object, "chosen", turns)?);
        let (rejected, margin) = (field(&mut object, "rejected", turns)?, optional(&mut object, "margin", number)?);
        Ok(Self { prompt, chosen, rejected, margin, tools: tools(&mut object)? })
    }
}

impl JsonRecord for PlainText {
    fn from_object(mut object: Map<String, Value>) -> std::result::Result<Self, String> {
        Ok(Self { text: field(&mut object, "text", string)? })
    }
}

impl JsonRecord for LabelledText {
    fn from_object(mut object: Map<String, Value>) -> std::result::Result<Self, String> {
        Ok(Self { text: field(&mut object, "text", string)?, label: field(&mut object, "label", class)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Debug;

    fn read<R: JsonRecord>(text: &[u8]) -> Result<Vec<R>> {
        parse(text, Path::new("d.jsonl"), 200)
    }

    #[test]
    fn records_of_every_kind() {
        let pairs: Vec<PromptCompletion> = read("\u{feff}{\"prompt\":\"a\",\"completion\":\"b\",\"id\":3}\r\n\n{\"prompt\":[{\"role\":\"user\",\"content\":\"é\"}],\"completion\":\"\"}".as_bytes()).unwrap();
        let plain = PromptCompletion { prompt: Turns::Text("a".into()), completion: Turns::Text("b".into()), tools: Vec::new() };
        assert_eq!(pairs[0], plain);
        assert_eq!(pairs[1].prompt, Turns::Messages(vec![Message::new("user", "é")]));
        let chats: Vec<Conversation> =
            read(b"{\"messages\":[{\"role\":\"user\",\"content\":\"x\",\"name\":\"n\"}],\"tools\":[{}]}\n").unwrap();
        assert_eq!((chats[0].messages[0].extra["name"].as_str(), chats[0].tools.len()), (Some("n"), 1));
        let better: Vec<Preference> =
            read(b"{\"prompt\":null,\"chosen\":\"a\",\"rejected\":\"b\"}\n{\"prompt\":\"p\",\"chosen\":\"a\",\"rejected\":\"b\"}").unwrap();
        assert_eq!((better[0].prompt.clone(), better[1].prompt.clone()), (None, Some(Turns::Text("p".into()))));
        let leading: Vec<Preference> =
            read(b"{\"chosen\":\"a\",\"rejected\":\"b\",\"margin\":0.5}\n{\"chosen\":\"a\",\"rejected\":\"b\",\"margin\":2}").unwrap();
        assert_eq!([better[0].margin, leading[0].margin, leading[1].margin], [None, Some(0.5), Some(2.0)]);
        let labelled: Vec<LabelledText> = read(b"{\"text\":\"a\",\"label\":\"pos\"}\n{\"text\":\"b\",\"label\":-1}").unwrap();
        assert_eq!([&labelled[0].label, &labelled[1].label], [&Class::Name("pos".into()), &Class::Number(-1)]);
        assert_eq!(read::<PlainText>(b"{\"text\":\"a\"}").unwrap()[0].text, "a");
        let both: Vec<Demonstration> =
            read(b"{\"prompt\":\"a\",\"completion\":\"b\"}\n{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}").unwrap();
        assert!(matches!(both[..], [Demonstration::PromptCompletion(_), Demonstration::Conversation(_)]));
        assert_eq!(read::<Prompt>(b"{\"prompt\":\"a\",\"chosen\":3}").unwrap()[0].prompt, Turns::Text("a".into()));
        let tools = vec![Value::from("t")];
        let all = b"{\"prompt\":\"a\",\"completion\":\"b\",\"chosen\":\"c\",\"rejected\":\"d\",\"tools\":[\"t\"]}";
        assert_eq!(read::<PromptCompletion>(all).unwrap()[0].tools, tools);
        assert_eq!((&read::<Prompt>(all).unwrap()[0].tools, &read::<Preference>(all).unwrap()[0].tools), (&tools, &tools));
    }

    fn error<R: JsonRecord + Debug>(text: &[u8]) -> String {
        read::<R>(text).unwrap_err().to_string()
    }

    #[test]
    fn errors_name_line_and_field() {
        let line = |problem: &str| format!("read: d.jsonl, line 2: {problem}");
        let second = |text: &[u8]| [&b"{\"prompt\":\"a\",\"completion\":\"b\"}\n"[..], text].concat();
        let of = |text: &[u8]| error::<PromptCompletion>(&second(text));
        assert_eq!(of(b"{\"prompt\":\"a\"}"), line("field `completion` is missing"));
        assert_eq!(
            of(b"{\"prompt\":3,\"completion\":\"b\"}"),
            line("field `prompt`: expected a string or a list of messages, found a number")
        );
        assert_eq!(of(b"{\"prompt\":[],\"completion\":\"b\"}"), line("field `prompt`: there is no message"));
        let no_role = of(b"{\"prompt\":[{\"content\":\"x\"}],\"completion\":\"b\"}");
        assert!(no_role.contains("field `prompt`: message 0") && no_role.contains("role"), "{no_role}");
        assert_eq!(of(b"[1]"), line("expected an object, found a list"));
        assert_eq!(of(b"{\"prompt\": }"), line("column 12: expected value"));
        assert_eq!(of(b"{\"prompt\":\"\xff\"}"), line("not UTF-8 from its byte 11 on"));
        assert_eq!(of(&[b'['; 150]), line("column 128: recursion limit exceeded"));
        assert_eq!(of(&[b' '; 201]), line("longer than 200 bytes"));
        assert!(error::<LabelledText>(b"{\"text\":\"a\",\"label\":1.5}").contains("field `label`"));
        let margin = error::<Preference>(b"{\"chosen\":\"a\",\"rejected\":\"b\",\"margin\":\"1\"}");
        assert!(margin.contains("field `margin`: expected a number, found a string"), "{margin}");
        assert!(error::<Conversation>(b"{\"messages\":\"a\"}").contains("field `messages`: expected a list"));
        assert!(error::<Conversation>(b"{\"messages\":[{\"role\":\"u\",\"content\":3}]}").contains("content"));
        assert!(error::<PlainText>(b"\n \n").contains("there are none"));
        assert!(read_jsonl::<PlainText>("nowhere.jsonl").unwrap_err().to_string().contains("nowhere.jsonl"));
    }
}
