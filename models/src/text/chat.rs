//! Chats as text: messages, and the Jinja templates that models bring along for them.

use super::folder::{read_object, read_text};
use super::python::{strftime, tojson};
use super::special::{content, token_text};
use super::tokenizer::Tokenizer;
use kiln_tensor::{Error, Result};
use minijinja::value::{Kwargs, Serde, Tuple, ValueKind};
use minijinja::{AutoEscape, Environment, ErrorKind, State, Value as TemplateValue, syntax::SyntaxConfig};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};
use std::ops::Range;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

const OP: &str = "chat_template";

/// Named values that a template sees besides the messages.
pub type Variables = Map<String, Value>;

/// What somebody says in a chat.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who says it: `system`, `user`, `assistant`, `tool` …
    pub role: String,
    /// What is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Content>,
    /// Whatever else a template reads: `tool_calls`, `name`, `reasoning_content` …
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The content of a [`Message`].
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Content {
    /// A text.
    Text(String),
    /// A list of objects, such as `{"type": "text", "text": "…"}`.
    Parts(Vec<Value>),
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::String(text) => Ok(Self::Text(text)),
            Value::Array(parts) => Ok(Self::Parts(parts)),
            _ => Err(serde::de::Error::custom("expected `content` to be a string or a list")),
        }
    }
}

impl Message {
    /// A message of text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: Some(Content::Text(content.into())), extra: Map::new() }
    }

    /// The text, if the content is one.
    pub fn text(&self) -> Option<&str> {
        match &self.content {
            Some(Content::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// What a template sees: keys without a value are left out, as templates test for their presence.
    fn to_value(&self) -> Result<Value> {
        let mut value = serde_json::to_value(self).map_err(|e| Error::format(OP, e.to_string()))?;
        if let Value::Object(object) = &mut value {
            object.retain(|_, value| !value.is_null());
        }
        Ok(value)
    }
}

/// ChatML: `<|im_start|>role\ncontent<|im_end|>\n`, the answers in generation blocks.
const CHATML: &str = "{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message.content + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
";

/// A Jinja template that writes a chat as the text that a model was trained on.
///
/// It renders as `transformers` does: blocks take the line break after them and the spaces before them along, `tojson`, `raise_exception` and
/// `strftime_now` (in UTC) are Hugging Face's, strings and dictionaries have Python's methods. A template that runs without end, or
/// asks for ever more memory or nesting, is stopped; namespaces keep plain data.
///
/// ```
/// use kiln_models::text::{ChatTemplate, Message, Variables};
/// let chat = [Message::new("user", "Hi"), Message::new("assistant", "Hello!"), Message::new("user", "Bye")];
/// let text = ChatTemplate::chatml().render(&chat[..1], true, &Variables::new())?;
/// assert_eq!(text, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
/// # Ok::<(), kiln_tensor::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    environment: Environment<'static>,
    variables: Variables,
    now: Option<i64>,
}

impl ChatTemplate {
    /// A template from its source.
    ///
    /// # Errors
    /// If it is not Jinja; the error names the line.
    pub fn new(source: impl Into<String>) -> Result<Self> {
        let source = source.into();
        let environment = environment(&source, MARKS[0], None)?;
        Ok(Self { source, environment, variables: Variables::new(), now: None })
    }

    /// The template for models of one's own: ChatML, each message between the tokens `<|im_start|>` and `<|im_end|>`.
    pub fn chatml() -> Self {
        let environment = environment(CHATML, MARKS[0], None);
        // The source is a constant that the tests compile; without it every rendering would say what is wrong.
        Self { source: CHATML.to_owned(), environment: environment.unwrap_or_default(), variables: Variables::new(), now: None }
    }

    /// The template of a model's folder: `chat_template.jinja`, else `chat_template` in `tokenizer_config.json` (a string, or a list of named ones, of
    /// which `default` is taken). The special tokens that the folder names are variables: `bos_token`, `eos_token` …
    ///
    /// # Errors
    /// If there is none, a file cannot be read, or the template is not Jinja.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        Self::from_folder_named(folder, "default")
    }

    /// As [`from_folder`](ChatTemplate::from_folder), the template `name` of several: `tool_use`, `rag` …
    ///
    /// # Errors
    /// As [`from_folder`](ChatTemplate::from_folder), or if there is none of that name.
    pub fn from_folder_named(folder: impl AsRef<Path>, name: &str) -> Result<Self> {
        let folder = folder.as_ref();
        let (path, source) = find(folder, name)?;
        let template = Self::new(source).map_err(|e| named(&path, e))?;
        Ok(Self { variables: special_variables(folder)?, ..template })
    }

    /// The same template with the variable `name` set for all renderings.
    pub fn with_variable(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.variables.insert(name.into(), value.into());
        self
    }

    /// The same template, for which the time is always `seconds` after 1970: what it writes no longer depends on the day.
    ///
    /// # Errors
    /// As [`new`](ChatTemplate::new).
    pub fn at_time(mut self, seconds: i64) -> Result<Self> {
        self.now = Some(seconds);
        self.environment = environment(&self.source, MARKS[0], self.now)?;
        Ok(self)
    }

    /// The source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The chat as text; `add_generation_prompt` asks for the beginning of an answer at the end. `variables` (`tools`, `documents`,
    /// `enable_thinking` …) come before the template's own.
    ///
    /// # Errors
    /// If the template fails, refuses the chat (`raise_exception`), runs too long or nests too deeply; the error names the line.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool, variables: &Variables) -> Result<String> {
        self.render_marked(messages, add_generation_prompt, variables).map(|(text, _)| text)
    }

    /// The token ids of the chat as text. Special tokens are those that the template writes; none is added.
    ///
    /// # Errors
    /// As [`render`](ChatTemplate::render), and if the tokenizer cannot encode the text.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        add_generation_prompt: bool,
        variables: &Variables,
    ) -> Result<Vec<u32>> {
        tokenizer.encode(&self.render(messages, add_generation_prompt, variables)?)
    }

    /// The chat as text, and the bytes of it that come out of generation blocks.
    pub(super) fn render_marked(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        variables: &Variables,
    ) -> Result<(String, Vec<Range<usize>>)> {
        let context = self.context(messages, add_generation_prompt, variables)?;
        let input = context.to_string();
        let unused = |marks: &&[char; 2]| !input.contains(*marks) && !self.source.contains(*marks);
        let marks = MARKS.iter().find(unused).ok_or_else(|| Error::argument(OP, "the chat has all of Unicode's noncharacters"))?;
        let fuel = BASE_FUEL.saturating_add(FUEL_PER_BYTE.saturating_mul(input.len() as u64));
        let mut environment = if *marks == MARKS[0] { self.environment.clone() } else { environment(&self.source, *marks, self.now)? };
        environment.set_fuel(Some(fuel));
        on_stack(rendering_stack(&self.source), move || {
            let rendered = environment.get_template(NAME).and_then(|template| template.render(TemplateValue::from(Serde(&context))));
            split_marks(&rendered.map_err(wrap)?, *marks)
        })
    }

    fn context(&self, messages: &[Message], add_generation_prompt: bool, variables: &Variables) -> Result<Value> {
        let mut context = self.variables.clone();
        // Templates tell a chat without tools by `tools is none`.
        context.extend([("tools".to_owned(), Value::Null), ("documents".to_owned(), Value::Null)]);
        context.extend(variables.clone());
        context.insert("messages".to_owned(), Value::Array(messages.iter().map(Message::to_value).collect::<Result<_>>()?));
        context.insert("add_generation_prompt".to_owned(), Value::Bool(add_generation_prompt));
        Ok(Value::Object(context))
    }

    /// Whether the template marks the assistant's answers by generation blocks.
    pub fn has_generation_blocks(&self) -> bool {
        translate(&self.source).1
    }
}

/// The template's name in its environment.
const NAME: &str = "template";
/// Instructions that any rendering may take, about 64 bytes each; real templates take some hundreds a message.
const BASE_FUEL: u64 = 4_000_000;
/// More of them for each byte of the chat.
const FUEL_PER_BYTE: u64 = 32;
/// Macros and loops inside of each other, as the engine counts them: a macro for six, a loop for one.
const MAX_FRAMES: usize = 128;
/// What `{% generation %}` calls.
const GENERATION: &str = "generation__";
/// The filter that what a namespace is given goes through: [`held`].
const HELD: &str = "held__";
/// The deepest nesting of lists and dictionaries that a namespace keeps.
const MAX_HELD: usize = 256;

/// What stands before and behind generation blocks in the raw output: characters that no text should have (Unicode's
/// noncharacters), the first pair that a chat does not have.
const MARKS: [[char; 2]; 3] = [['\u{fdd0}', '\u{fdd1}'], ['\u{fdd2}', '\u{fdd3}'], ['\u{fdd4}', '\u{fdd5}']];

fn environment(source: &str, [open, close]: [char; 2], now: Option<i64>) -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(wrap)?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(unknown_method_callback);
    environment.set_recursion_limit(MAX_FRAMES);
    environment.add_filter(HELD, held);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", |message: String| -> std::result::Result<String, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", move |format: String| strftime(&format, now.unwrap_or_else(seconds_now)));
    environment.add_function(GENERATION, move |state: &mut State, options: Kwargs| -> std::result::Result<String, minijinja::Error> {
        let caller: TemplateValue = options.get("caller")?;
        Ok(format!("{open}{}{close}", caller.call(state, &[])?))
    });
    on_stack(source.len().saturating_mul(TOKEN_STACK), move || {
        environment.add_template_owned(NAME, translate(source).0).map_err(wrap)?;
        Ok(environment)
    })
}

/// What a thread needs beside [`LEVEL_STACK`] and [`TOKEN_STACK`].
const BASE_STACK: usize = 16 << 20;
/// Templates that could need more are refused.
const MAX_STACK: usize = 1 << 31;
/// The most that a byte of the source, of which an expression may be a long chain, takes while it is compiled.
const TOKEN_STACK: usize = 1 << 10;
/// The most that a value takes for each value it lies in when it is written, compared or dropped: the engine does so recursively.
const LEVEL_STACK: usize = 2 << 10;

/// What `f` gives, on a thread of its own with a stack of so many bytes more than usual. Memory is taken for what is used of them only.
fn on_stack<T: Send>(bytes: usize, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let bytes = bytes.saturating_add(BASE_STACK);
    if bytes > MAX_STACK {
        return Err(Error::format(OP, "the template is too long"));
    }
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(OP.to_owned()).stack_size(bytes).spawn_scoped(scope, f);
        let thread = thread.map_err(|e| Error::io(OP, format!("a thread with a stack of {bytes} bytes"), e))?;
        thread.join().unwrap_or_else(|_| Err(Error::format(OP, "the template makes the engine panic")))
    })
}

/// The stack for the deepest value that a template can make: each operation puts a value into another at most once in a macro or a loop,
/// as variables end with those and namespaces keep nothing deep.
fn rendering_stack(source: &str) -> usize {
    let operations = source.bytes().filter(|byte| b"[(|*+,:".contains(byte)).count();
    let frames = if source.contains("macro") || source.contains("recursive") { MAX_FRAMES } else { 1 };
    operations.saturating_mul(frames).saturating_mul(LEVEL_STACK)
}

/// What a namespace keeps of a value: text, numbers, and lists and dictionaries of these. What is yet to be computed is computed here; a
/// namespace in itself, or a list in a list for each round of a loop, would be deeper than any stack.
fn held(state: &State, value: TemplateValue) -> std::result::Result<TemplateValue, minijinja::Error> {
    held_below(state, value, MAX_HELD)
}

fn held_below(state: &State, value: TemplateValue, depth: usize) -> std::result::Result<TemplateValue, minijinja::Error> {
    let refused = |what: &str| minijinja::Error::new(ErrorKind::InvalidOperation, format!("a namespace cannot keep {what}"));
    let kind = value.kind();
    if !matches!(kind, ValueKind::Seq | ValueKind::Iterable | ValueKind::Map | ValueKind::Plain) {
        return Ok(value);
    }
    if kind == ValueKind::Plain || value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace")) {
        return Err(refused("macros or namespaces"));
    }
    let below = depth.checked_sub(1).ok_or_else(|| refused(&format!("values that are nested {MAX_HELD} deep")))?;
    let mut items = Vec::new();
    for item in value.try_iter()? {
        state.consume_fuel(1)?;
        items.push(item);
    }
    if kind == ValueKind::Map {
        let mut entries = Vec::with_capacity(items.len());
        for key in items {
            let item = held_below(state, value.get_item(&key)?, below)?;
            entries.push((held_below(state, key, below)?, item));
        }
        return Ok(TemplateValue::from(Serde(Entries(entries))));
    }
    let items = items.into_iter().map(|item| held_below(state, item, below)).collect::<std::result::Result<Vec<_>, _>>()?;
    Ok(if value.is_tuple() { Tuple::from(items).into() } else { items.into_iter().collect() })
}

/// A dictionary with its keys in this order.
struct Entries(Vec<(TemplateValue, TemplateValue)>);

impl Serialize for Entries {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(key, value)| (key, value)))
    }
}

fn seconds_now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |past| past.as_secs() as i64)
}

/// The source with generation blocks, which Jinja does not know, written as call blocks, and with what namespaces are given passed through
/// [`held`]; whether there are generation blocks.
fn translate(source: &str) -> (String, bool) {
    let (mut out, mut rest, mut found) = (String::with_capacity(source.len()), source, false);
    while let Some(start) = rest.find('{') {
        let (before, tag) = rest.split_at(start);
        let (tag, after) = tag.split_at(tag_length(tag));
        out.push_str(before);
        if let Some((word, replacement)) = generation_tag(tag) {
            found = true;
            out.push_str(&tag[..word.start]);
            out.push_str(&replacement);
            out.push_str(&tag[word.end..]);
        } else if let Some(replacement) = namespace_tag(tag) {
            out.push_str(&replacement);
        } else {
            out.push_str(tag);
        }
        rest = after;
    }
    out.push_str(rest);
    (out, found)
}

/// The length of the tag, comment or raw block that `text` begins with, or 1 if there is none. It ends where Jinja's lexer sees the end:
/// strings and brackets hide others.
fn tag_length(text: &str) -> usize {
    let bytes = text.as_bytes();
    let start = 2 + usize::from(matches!(bytes.get(2), Some(b'-' | b'+')));
    let close = match bytes.get(1) {
        Some(b'#') => return text[start..].find("#}").map_or(text.len(), |end| start + end + 2),
        Some(b'%') => "%}",
        Some(b'{') => "}}",
        _ => return 1,
    };
    if close == "%}"
        && let Some(length) = bare_tag(&text[2..], "raw")
    {
        return raw_length(text, 2 + length);
    }
    let (mut at, mut depth) = (start, 0isize);
    while let Some(&byte) = bytes.get(at) {
        let end = at + usize::from(matches!(byte, b'-' | b'+'));
        if depth == 0 && bytes[end..].starts_with(close.as_bytes()) {
            return end + close.len();
        }
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth -= 1,
            _ => {}
        }
        at += if matches!(byte, b'\'' | b'"') { string_length(&bytes[at..]) } else { 1 };
    }
    text.len()
}

/// The length of the raw block that `text` begins with, whose content begins at `at`.
fn raw_length(text: &str, mut at: usize) -> usize {
    while let Some(next) = text[at..].find("{%") {
        at += next + 2;
        if let Some(length) = bare_tag(&text[at..], "endraw") {
            return at + length;
        }
    }
    text.len()
}

/// The length of what follows the `{%` of a tag that only says `word`.
fn bare_tag(inner: &str, word: &str) -> Option<usize> {
    let said = inner.strip_prefix(['-', '+']).unwrap_or(inner).trim_ascii_start().strip_prefix(word)?.trim_ascii_start();
    let after = said.strip_prefix(['-', '+']).unwrap_or(said).strip_prefix("%}")?;
    Some(inner.len() - after.len())
}

/// The length of the string that `bytes` begin with, with its quotes.
fn string_length(bytes: &[u8]) -> usize {
    let mut at = 1;
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'\\' => at += 2,
            _ if byte == bytes[0] => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// A tag `{% set x.y = … %}` (or with a filter of the block that it opens) that passes the value through [`held`].
fn namespace_tag(tag: &str) -> Option<String> {
    let inner = tag.strip_prefix("{%")?.strip_suffix("%}")?;
    let word = inner.strip_prefix(['-', '+']).unwrap_or(inner).trim_ascii_start();
    let set = word.strip_prefix("set").filter(|set| !set.starts_with(|c: char| c.is_alphanumeric() || c == '_'))?;
    let (target, value) = set.split_at(set.find(['=', '|'])?);
    let body = value[1..].strip_suffix(['-', '+']).unwrap_or(&value[1..]);
    if !target.contains('.') || body.trim().is_empty() {
        return None;
    }
    let before = &tag[..tag.len() - "%}".len() - value.len()];
    let after = &tag[before.len() + 1 + body.len()..];
    Some(if value.starts_with('=') { format!("{before}=({body})|{HELD}{after}") } else { format!("{before}|{body}|{HELD}{after}") })
}

/// The place of the word in a tag `{% generation %}` or `{% endgeneration %}` at the start of `tag`, and what replaces it.
fn generation_tag(tag: &str) -> Option<(Range<usize>, String)> {
    let inner = tag.strip_prefix("{%")?;
    let word = inner.strip_prefix(['-', '+']).unwrap_or(inner).trim_start();
    let (after, replacement) = match word.strip_prefix("generation") {
        Some(after) => (after, format!("call {GENERATION}()")),
        None => (word.strip_prefix("endgeneration")?, "endcall".to_owned()),
    };
    let end = after.trim_start();
    let ends = end.strip_prefix(['-', '+']).unwrap_or(end).starts_with("%}");
    ends.then(|| (tag.len() - word.len()..tag.len() - after.len(), replacement))
}

/// The text without its marks, and the bytes between them.
fn split_marks(raw: &str, [open, close]: [char; 2]) -> Result<(String, Vec<Range<usize>>)> {
    let cut = || Error::format(OP, "the template cuts the output of a generation block");
    let (mut text, mut spans, mut begun) = (String::with_capacity(raw.len()), Vec::new(), Vec::new());
    for c in raw.chars() {
        if c == open {
            begun.push(text.len());
        } else if c == close {
            spans.push(begun.pop().ok_or_else(cut)?..text.len());
        } else {
            text.push(c);
        }
    }
    if begun.is_empty() { Ok((text, spans)) } else { Err(cut()) }
}

/// The file and the source of the template `name` in `folder`.
fn find(folder: &Path, name: &str) -> Result<(std::path::PathBuf, String)> {
    let file = match name {
        "default" => folder.join("chat_template.jinja"),
        name => folder.join("additional_chat_templates").join(format!("{name}.jinja")),
    };
    if !name.contains(['/', '\\']) && file.is_file() {
        return Ok((file.clone(), read_text(&file).map_err(|e| e.at(OP))?));
    }
    let path = folder.join("tokenizer_config.json");
    let config = read_object(&path).map_err(|e| e.at(OP))?.unwrap_or_default();
    let wrong = |problem: &str| Error::format(OP, format!("{}: chat_template: {problem}", path.display()));
    match config.get("chat_template") {
        None | Some(Value::Null) => {
            Err(wrong("missing, and there is no chat_template.jinja; ChatTemplate::chatml() is one for models of your own"))
        }
        Some(Value::String(source)) if name == "default" => Ok((path, source.clone())),
        Some(Value::String(_)) => Err(wrong(&format!("there is only one, and none that is named {name:?}"))),
        Some(Value::Array(several)) => {
            let found = several.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some(name));
            let source = found.and_then(|entry| entry.get("template")).and_then(Value::as_str);
            let source = source.ok_or_else(|| wrong(&format!("among {} there is none that is named {name:?}", several.len())))?;
            Ok((path.clone(), source.to_owned()))
        }
        Some(_) => Err(wrong("expected a string or a list of objects with `name` and `template`")),
    }
}

/// The special tokens that the folder names, as variables.
fn special_variables(folder: &Path) -> Result<Variables> {
    let mut variables = Variables::new();
    for role in ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"] {
        if let Some((text, _)) = token_text(folder, role).map_err(|e| e.at(OP))? {
            variables.insert(role.to_owned(), text.into());
        }
    }
    let config = read_object(&folder.join("tokenizer_config.json")).map_err(|e| e.at(OP))?.unwrap_or_default();
    if let Some(more) = config.get("additional_special_tokens").and_then(Value::as_array) {
        let texts: Vec<&str> = more.iter().filter_map(content).collect();
        variables.insert("additional_special_tokens".to_owned(), texts.into());
    }
    Ok(variables)
}

/// The same error, with the file that the template is from.
fn named(path: &Path, error: Error) -> Error {
    let text = error.to_string();
    Error::format(OP, format!("{}: {}", path.display(), text.strip_prefix(&format!("{OP}: ")).unwrap_or(&text)))
}

/// A template's error with its line.
fn wrap(error: minijinja::Error) -> Error {
    let line = error.line().map_or_else(String::new, |line| format!("line {line}: "));
    let detail = error.detail().map_or_else(String::new, |detail| format!(": {detail}"));
    let mut message = format!("{line}{}{detail}", error.kind());
    let mut cause = std::error::Error::source(&error);
    while let Some(inner) = cause {
        message = format!("{message}; {inner}");
        cause = inner.source();
    }
    Error::format(OP, message)
}
