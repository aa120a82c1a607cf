//! Tokenizers and chat templates against `tokenizers` and `transformers` (tests/fixtures/text/text.py), data sets of text, and bad input.

use kiln_models::data::{
    Corpus, CorpusSource, Dataset, IGNORE_INDEX, Loader, LoaderOptions, Overlong, PackOptions, PackedSequences, Packing, PaddedSequences,
    PaddingSide, Rng, TokenBlocks, TokenSequence, pad_sequences,
};
use kiln_models::text::json::{Map, Value, from_str, from_value};
use kiln_models::text::{CharTokenizer, ChatTemplate, Message, SpecialTokens, Tokenizer, Variables, train_bpe};
use std::fs;
use std::path::{Path, PathBuf};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/text")
}

fn fixture(name: &str) -> Value {
    from_str(&fs::read_to_string(fixtures().join(name)).unwrap()).unwrap()
}

/// A fresh folder that is removed at the end.
struct Temporary(PathBuf);

impl Temporary {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kiln-text-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What a stream gives for `ids`, whole.
fn streamed(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
    let mut stream = tokenizer.stream(skip_special);
    let mut text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    text.push_str(&stream.finish().unwrap());
    text
}

#[test]
fn folders_tokenize_as_the_reference() {
    let expected = fixture("ids.json");
    for name in ["gpt2", "metaspace", "bert"] {
        let tokenizer = Tokenizer::from_folder(fixtures().join(name)).unwrap();
        let case = &expected[name];
        assert_eq!(tokenizer.vocab_size() as u64, case["size"].as_u64().unwrap());
        for (i, text) in case["texts"].as_array().unwrap().iter().enumerate() {
            let text = text.as_str().unwrap();
            let ids: Vec<u32> = from_value(case["ids"][i].clone()).unwrap();
            let special: Vec<u32> = from_value(case["with_specials"][i].clone()).unwrap();
            assert_eq!(tokenizer.encode(text).unwrap(), ids, "{name}: {text:?}");
            assert_eq!(tokenizer.encode_with_specials(text).unwrap(), special, "{name}: {text:?}");
            let offsets = tokenizer.encode_with_offsets(text).unwrap();
            assert_eq!(offsets.iter().map(|(id, _)| *id).collect::<Vec<_>>(), ids);
            assert!(offsets.iter().all(|(_, place)| place.start <= place.end && place.end <= text.chars().count()));
            for (skip, key) in [(false, "decoded"), (true, "decoded_plain")] {
                let decoded = case[key][i].as_str().unwrap();
                assert_eq!(tokenizer.decode(&special, skip).unwrap(), decoded, "{name}: {text:?}");
                assert_eq!(streamed(&tokenizer, &special, skip), decoded, "{name} as a stream: {text:?}");
            }
        }
    }
    let bert = Tokenizer::from_folder(fixtures().join("bert")).unwrap();
    let (ids, types) = bert.encode_pair("the dog", "a fox").unwrap();
    assert_eq!(
        (ids, types),
        (from_value(expected["pair"]["ids"].clone()).unwrap(), from_value(expected["pair"]["types"].clone()).unwrap())
    );
}

#[test]
fn special_tokens_come_from_the_folder() {
    let gpt2 = Tokenizer::from_folder(fixtures().join("gpt2")).unwrap();
    let id = |token: &str| gpt2.token_to_id(token);
    assert_eq!((gpt2.bos(), gpt2.eos(), gpt2.pad()), (id("<|endoftext|>"), id("<|im_end|>"), None));
    // The generation configuration adds a second end; 50256 is beyond this vocabulary.
    assert_eq!(gpt2.special_tokens().eos, [id("<|im_end|>").unwrap(), id("<|endoftext|>").unwrap()]);
    assert_eq!(gpt2.id_to_token(gpt2.bos().unwrap()).as_deref(), Some("<|endoftext|>"));
    let llama = Tokenizer::from_folder(fixtures().join("metaspace")).unwrap();
    assert_eq!((llama.bos(), llama.eos(), llama.special_tokens().unk), (Some(1), Some(2), Some(0)));
    let changed = llama.clone().with_special_tokens(SpecialTokens { pad: Some(0), ..llama.special_tokens().clone() }).unwrap();
    assert_eq!(changed.pad(), Some(0));
    assert!(llama.with_special_tokens(SpecialTokens { pad: Some(1 << 30), ..SpecialTokens::default() }).is_err());
}

const ODD: [&str; 8] = [
    "",
    " \t\r\n  \n",
    "naïve e\u{301} \u{200b}\u{feff}",
    "👩‍👩‍👧 😀\u{fe0f}",
    "\0\u{1}\u{7f}\u{85}\u{2028}",
    "العربية עברית 東京 한국어",
    "\u{fffd}\u{10ffff}\u{e000}\u{fdd0}",
    "x<|endoftext|>y <|pad|>",
];

#[test]
fn a_trained_vocabulary_expresses_any_text_and_is_saved() {
    let corpus = ["low lower lowest, new newer newest", "the cat sat on the mat; the cat sat", "naïve café 東京"];
    let train = || train_bpe(corpus, 290, &["<|endoftext|>", "<|pad|>"]).unwrap();
    let (tokenizer, folder) = (train(), Temporary::new("bpe"));
    assert_eq!((tokenizer.vocab_size(), tokenizer.eos(), tokenizer.token_to_id("<|pad|>")), (290, Some(0), Some(1)));
    let path = folder.0.join("tokenizer.json");
    tokenizer.save(&path).unwrap();
    let saved = fs::read(&path).unwrap();
    for _ in 0..3 {
        train().save(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), saved, "training is not deterministic");
    }
    let loaded = Tokenizer::from_folder(&folder.0).unwrap();
    for text in ODD.into_iter().chain(corpus) {
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(loaded.encode(text).unwrap(), ids);
        assert_eq!(loaded.decode(&ids, false).unwrap(), text);
        assert_eq!(streamed(&loaded, &ids, false), text);
    }
    assert!(tokenizer.encode("the cat sat").unwrap().len() < 11);
    // No pair is left to merge: the vocabulary stays small, however large it was to be.
    assert_eq!(train_bpe(["ab"], u32::MAX as usize, &[]).unwrap().vocab_size(), 257);
    assert!(train_bpe(["ab"], 255, &[]).is_err());
    assert!(train_bpe(["ab"], 300, &["<a>", "<a>"]).unwrap_err().to_string().contains("<a>"));
    assert!(train_bpe(["ab"], 300, &[""]).is_err());
    assert_eq!(train_bpe([""; 0], 300, &[]).unwrap().vocab_size(), 256);
}

#[test]
fn a_stream_never_shows_a_character_in_parts() {
    let tokenizer = train_bpe(["a"], 256, &[]).unwrap();
    let ids = tokenizer.encode("é😀z").unwrap();
    assert_eq!(ids.len(), 7);
    let mut stream = tokenizer.stream(false);
    let parts: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(parts, ["", "é", "", "", "", "😀", "z"]);
    // Cut in the middle of a character, and bytes that are none.
    let cut = &ids[..4];
    assert_eq!(streamed(&tokenizer, cut, false), "é\u{fffd}");
    assert_eq!(streamed(&tokenizer, cut, false), tokenizer.decode(cut, false).unwrap());
    let byte = |c: &str| tokenizer.token_to_id(c).unwrap();
    let broken = [byte("ÿ"), byte("a"), byte("â"), byte("a"), byte("ÿ")];
    assert_eq!(streamed(&tokenizer, &broken, false), "\u{fffd}a\u{fffd}a\u{fffd}");
    assert!(tokenizer.stream(false).push(256).unwrap_err().to_string().contains("id 256"));

    // Byte fallback: the bytes of a character are tokens of their own, and spaces belong to the token after them.
    let llama = Tokenizer::from_folder(fixtures().join("metaspace")).unwrap();
    let byte = |value: u8| llama.token_to_id(&format!("<0x{value:02X}>")).unwrap();
    let ids: Vec<u32> = "😀".bytes().map(byte).collect();
    let mut stream = llama.stream(false);
    let parts: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!((parts.concat().as_str(), parts[3].as_str()), ("😀", "😀"));
    assert_eq!(streamed(&llama, &ids[..2], false), llama.decode(&ids[..2], false).unwrap());
    let words = llama.encode("the fox runs on").unwrap();
    let mut stream = llama.stream(false);
    let before_last: String = words[..words.len() - 1].iter().map(|&id| stream.push(id).unwrap()).collect();
    assert!("the fox runs on".starts_with(&before_last) && before_last.len() >= "the fox runs".len(), "{before_last:?}");
}

#[test]
fn characters_are_tokens_and_an_unknown_one_is_named() {
    let (characters, folder) = (CharTokenizer::new("hello wörld\n").unwrap(), Temporary::new("char"));
    assert_eq!(characters.vocab_size(), 9 + 1);
    assert_eq!(characters.decode(&characters.encode("wörd hello\n").unwrap()).unwrap(), "wörd hello\n");
    let error = characters.encode("hé").unwrap_err().to_string();
    assert_eq!(error, "char_tokenizer: character 'é' at place 1 is not among the 10 of the vocabulary");
    assert!(characters.decode(&[10]).unwrap_err().to_string().contains("id 10"));
    assert_eq!((characters.token_to_id("lo"), characters.token_to_id("é"), characters.id_to_token(0)), (None, None, Some('\n')));
    let path = folder.0.join("characters.json");
    characters.save(&path).unwrap();
    assert_eq!(CharTokenizer::from_file(&path).unwrap(), characters);
    let tokenizer = Tokenizer::from(characters);
    let ids = tokenizer.encode("wörd").unwrap();
    assert_eq!(streamed(&tokenizer, &ids, true), "wörd");
    assert_eq!(tokenizer.encode_with_offsets("wö").unwrap()[1].1, 1..2);
    assert!(CharTokenizer::new("").is_err());
    for (content, problem) in [
        (&b"{\"type\":\"characters\",\"vocabulary\":\"ba\"}"[..], "vocabulary"),
        (b"{\"type\":\"characters\",\"vocabulary\":\"\"}", "vocabulary"),
        (b"{\"type\":\"bytes\",\"vocabulary\":\"ab\"}", "type"),
        (b"{\"type\":\"characters\"}", "vocabulary"),
        (b"\xff", "bad.json"),
        (b"", "bad.json"),
    ] {
        let error = CharTokenizer::from_file(folder.write("bad.json", content)).unwrap_err().to_string();
        assert!(error.contains("bad.json") && error.contains(problem), "{error}");
    }
}

#[test]
fn broken_folders_name_the_file_and_the_key() {
    let vocabulary = r#"{"a": 0, "b": 1, "ab": 2}"#;
    let good = [("vocab.json", vocabulary), ("merges.txt", "#version: 0.2\na b\n")];
    type Files<'a> = &'a [(&'a str, &'a str)];
    let cases: [(Files, &[&str]); 21] = [
        (&[], &["neither tokenizer.json nor vocab.json"]),
        (&[("vocab.json", vocabulary)], &["merges.txt"]),
        (&[("merges.txt", "")], &["vocab.json"]),
        (&[("vocab.json", "")], &["vocab.json"]),
        (&[("vocab.json", "{}")], &["vocab.json", "empty"]),
        (&[("vocab.json", r#"{"a": -1}"#)], &["vocab.json", "\"a\""]),
        (&[("vocab.json", r#"{"a": 99999999999}"#)], &["vocab.json", "\"a\""]),
        (&[("vocab.json", "[1]")], &["vocab.json"]),
        (&[("merges.txt", "a b\nab\n")], &["merges.txt", "line 2"]),
        (&[("merges.txt", "a b\nb a\n")], &["merges.txt", "line 2", "\"ba\""]),
        (&[("merges.txt", "a c\n")], &["merges.txt", "line 1", "\"c\""]),
        (&[("tokenizer_config.json", "{")], &["tokenizer_config.json"]),
        (&[("tokenizer_config.json", r#"{"tokenizer_class": "BertTokenizer"}"#)], &["tokenizer_class", "BertTokenizer"]),
        (&[("tokenizer_config.json", r#"{"tokenizer_class": "CLIPTokenizer"}"#)], &["vocab.json", "<|startoftext|>"]),
        (&[("tokenizer_config.json", r#"{"eos_token": "</s>"}"#)], &["tokenizer_config.json", "eos_token", "</s>"]),
        (&[("tokenizer_config.json", r#"{"eos_token": 3}"#)], &["tokenizer_config.json", "eos_token"]),
        (&[("special_tokens_map.json", r#"{"pad_token": {"content": "<p>"}}"#)], &["special_tokens_map.json", "pad_token", "<p>"]),
        (&[("generation_config.json", r#"{"eos_token_id": "x"}"#)], &["generation_config.json", "eos_token_id"]),
        (&[("added_tokens.json", r#"{"<x>": 7}"#)], &["<x>", "7"]),
        (&[("tokenizer_config.json", r#"{"add_bos_token": true}"#)], &["bos_token"]),
        (&[("tokenizer.json", r#"{"version": "1.0"}"#)], &["tokenizer.json"]),
    ];
    for (i, (files, words)) in cases.into_iter().enumerate() {
        let folder = Temporary::new(&format!("broken-{i}"));
        // The first three are about files that are missing.
        for (name, content) in good.iter().filter(|_| i >= 3).chain(files) {
            folder.write(name, content);
        }
        let error = Tokenizer::from_folder(&folder.0).err().unwrap_or_else(|| panic!("case {i} loads")).to_string();
        assert!(words.iter().all(|word| error.contains(word)), "case {i}: {error}");
    }
    let folder = Temporary::new("broken-bytes");
    for content in [&b"\xff\xfe"[..], b"", b"null", b"{\"model\": {\"type\": \"BPE\"}}"] {
        folder.write("tokenizer.json", content);
        let error = Tokenizer::from_folder(&folder.0).err().unwrap().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    }
    // A merge longer than any entry makes the crate's own reader panic.
    let model = r#"{"type":"BPE","vocab":{"a":0,"b":1},"merges":["a b"]}"#;
    folder.write("tokenizer.json", format!(r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"model":{model}}}"#));
    assert!(Tokenizer::from_folder(&folder.0).err().unwrap().to_string().contains("tokenizer.json"));
    assert!(Tokenizer::from_file(folder.0.join("none.json")).err().unwrap().to_string().contains("none.json"));
}

#[test]
fn gpt2_folders_put_a_token_before_each_text_if_asked() {
    let folder = Temporary::new("bos");
    folder.write("vocab.json", r#"{"a": 0, "b": 1, "ab": 2, "</s>": 3}"#);
    folder.write("merges.txt", "#version: 0.2\na b\n");
    folder.write("tokenizer_config.json", r#"{"tokenizer_class": "GPT2Tokenizer", "add_bos_token": true, "bos_token": "</s>"}"#);
    let tokenizer = Tokenizer::from_folder(&folder.0).unwrap();
    assert_eq!(tokenizer.encode("ab</s>a").unwrap(), [2, 3, 0]);
    assert_eq!(tokenizer.encode_with_specials("ab</s>a").unwrap(), [3, 2, 3, 0]);
    assert_eq!(tokenizer.decode(&[3, 2, 3, 0], true).unwrap(), "aba");
}

fn chat(fixture: &Value, name: &str) -> Vec<Message> {
    from_value(fixture["chats"][name].clone()).unwrap()
}

#[test]
fn templates_render_and_mask_as_transformers() {
    let fixture = fixture("templates.json");
    let tokenizer = Tokenizer::from_folder(fixtures().join("gpt2")).unwrap();
    let (mut texts, mut errors, mut masks) = (0, 0, 0);
    for case in fixture["cases"].as_array().unwrap() {
        let source = fixture["templates"][case["template"].as_str().unwrap()].as_str().unwrap();
        let template = ChatTemplate::new(source).unwrap().at_time(fixture["now"].as_i64().unwrap()).unwrap();
        let template = template.with_variable("bos_token", "<|endoftext|>").with_variable("eos_token", "<|im_end|>");
        let messages = chat(&fixture, case["chat"].as_str().unwrap());
        let variables: Variables = case["variables"].as_object().unwrap().clone();
        let rendered = template.render(&messages, case["prompt"].as_bool().unwrap(), &variables);
        let place = format!("{} of {}", case["template"], case["chat"]);
        if let Some(error) = case.get("error") {
            let found = rendered.err().unwrap_or_else(|| panic!("{place} renders")).to_string();
            assert!(found.contains(error.as_str().unwrap()) && found.contains("line "), "{place}: {found}");
            errors += 1;
            continue;
        }
        assert_eq!(rendered.unwrap_or_else(|e| panic!("{place}: {e}")), case["text"].as_str().unwrap(), "{place}");
        texts += 1;
        if let Some(mask) = case.get("mask").filter(|_| case["prompt"] == false) {
            let (ids, found) = template.encode_with_mask(&tokenizer, &messages, &variables).unwrap();
            assert_eq!(ids, from_value::<Vec<u32>>(case["ids"].clone()).unwrap(), "{place}");
            let expected: Vec<bool> = mask.as_array().unwrap().iter().map(|m| m == 1).collect();
            assert_eq!(found, expected, "{place}");
            masks += 1;
        }
    }
    assert!(texts > 60 && errors > 5 && masks > 8, "{texts} texts, {errors} errors, {masks} masks");
}

#[test]
fn without_generation_blocks_answers_are_found_by_their_prefixes() {
    let fixture = fixture("templates.json");
    let tokenizer = Tokenizer::from_folder(fixtures().join("gpt2")).unwrap();
    let template = |name: &str| {
        let template = ChatTemplate::new(fixture["templates"][name].as_str().unwrap()).unwrap();
        template.with_variable("bos_token", "<|endoftext|>").with_variable("eos_token", "<|im_end|>")
    };
    let none = Variables::new();
    let turns = chat(&fixture, "turns");
    let masked = |template: &ChatTemplate, messages: &[Message]| {
        let (ids, mask) = template.encode_with_mask(&tokenizer, messages, &none).unwrap();
        assert_eq!(ids, template.encode(&tokenizer, messages, false, &none).unwrap());
        let answers: Vec<Vec<u32>> = ids
            .iter()
            .zip(&mask)
            .collect::<Vec<_>>()
            .chunk_by(|a, b| a.1 == b.1)
            .filter(|run| *run[0].1)
            .map(|run| run.iter().map(|(id, _)| **id).collect())
            .collect();
        answers.iter().map(|answer| tokenizer.decode(answer, false).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(masked(&template("chatml"), &turns), ["Hello 😀, how are you?<|im_end|>\n", "  Ça va.\n<|im_end|>\n"]);
    assert_eq!(masked(&template("llama2"), &turns), [" Hello 😀, how are you? <|im_end|>", " Ça va. <|im_end|>"]);
    assert_eq!(masked(&template("gemma"), &turns), ["Hello 😀, how are you?<end_of_turn>\n", "Ça va.<end_of_turn>\n"]);
    assert!(masked(&template("chatml"), &turns[..1]).is_empty());
    // The own template marks the same answers by its blocks, without the line break after them.
    assert_eq!(masked(&ChatTemplate::chatml(), &turns), ["Hello 😀, how are you?<|im_end|>", "  Ça va.\n<|im_end|>"]);
    assert_eq!(ChatTemplate::chatml().render(&turns, true, &none).unwrap(), template("chatml").render(&turns, true, &none).unwrap());
    // Reasoning that later turns leave out.
    let error = template("qwen3").encode_with_mask(&tokenizer, &chat(&fixture, "thinking"), &none).unwrap_err().to_string();
    assert!(error.contains("message 1") && error.contains("generation"), "{error}");
    // Characters that mark generation blocks inside are text like any other.
    let odd = [Message::new("user", "\u{fdd1}\u{fdd0}"), Message::new("assistant", "\u{fdd0}a\u{fdd3}")];
    assert_eq!(masked(&ChatTemplate::chatml(), &odd), ["\u{fdd0}a\u{fdd3}<|im_end|>"]);
}

#[test]
fn threads_share_tokenizers_and_templates() {
    fn shared<T: Send + Sync + Clone>() {}
    shared::<Tokenizer>();
    shared::<ChatTemplate>();
}

#[test]
fn templates_come_from_folders() {
    let folder = Temporary::new("chat");
    let none = Variables::new();
    let hi = [Message::new("user", "hi")];
    let render = |name: &str| ChatTemplate::from_folder_named(&folder.0, name).and_then(|template| template.render(&hi, false, &none));
    assert!(render("default").unwrap_err().to_string().contains("chat_template"));
    folder.write(
        "tokenizer_config.json",
        r#"{"chat_template": "{{ bos_token }}{{ messages[0].content }}", "bos_token": {"content": "<s>"}}"#,
    );
    assert_eq!(render("default").unwrap(), "<s>hi");
    assert!(render("tool_use").unwrap_err().to_string().contains("tool_use"));
    let list = r#"{"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T{{ eos_token }}"}], "eos_token": "</s>"}"#;
    folder.write("tokenizer_config.json", list);
    assert_eq!((render("default").unwrap(), render("tool_use").unwrap()), ("D".to_owned(), "T</s>".to_owned()));
    assert!(render("rag").unwrap_err().to_string().contains("rag"));
    folder.write("chat_template.jinja", "file {{ eos_token }}");
    folder.write("additional_chat_templates/rag.jinja", "rag");
    assert_eq!((render("default").unwrap(), render("rag").unwrap()), ("file </s>".to_owned(), "rag".to_owned()));
    assert!(render("../chat_template").is_err());
    folder.write("chat_template.jinja", "line one\n{% for m in messages %}\n{{ m. }}\n{% endfor %}");
    let error = render("default").unwrap_err().to_string();
    assert!(error.contains("chat_template.jinja") && error.contains("line 3"), "{error}");
    folder.write("chat_template.jinja", b"\xff");
    assert!(render("default").unwrap_err().to_string().contains("UTF-8"));
    fs::remove_file(folder.0.join("chat_template.jinja")).unwrap();
    folder.write("tokenizer_config.json", r#"{"chat_template": 3}"#);
    assert!(render("default").unwrap_err().to_string().contains("chat_template"));
}

#[test]
fn hostile_templates_end() {
    let none = Variables::new();
    let hi = [Message::new("user", "hi")];
    for source in [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for a in range(99999) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{{ 'x' * 9999999999 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for a in range(99999) %}{{ 'xxxxxxxxxxxxxxxx' * 100000 }}{% endfor %}",
        "{{ [1]|tojson(indent=99999999999) }}",
        "{{ missing.name }}",
        "{{ missing | tojson }}",
        "{{ strftime_now('%Q') }}",
        "{{ raise_exception('no') }}",
        "{% include 'other' %}",
        "{{ unknown_function() }}",
        "{% set ns = namespace(x=[]) %}{% for a in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}",
        "{% set ns = namespace() %}{% set ns.x = {'a': (ns,)} %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns.x | default([ns], true) %}{% endset %}{{ ns }}",
        "{% set ns = namespace() %}{% set b, (ns.x) = 1, [ns] -%}{{ ns }}",
        "{% set ns = namespace() %}{{ '{% set a.b = ' }}{%-set ns . x=[ns]%}{{ ns ~ '' }}",
        "{% set ns = namespace() %}{# {% raw %} #}{% set ns.x = [ns] %}{% raw %}{% endraw %}{{ ns }}",
    ] {
        let rendered = ChatTemplate::new(source).and_then(|template| template.render(&hi, false, &none));
        assert!(rendered.is_err(), "{source} gives {} bytes", rendered.unwrap().len());
    }
    let rendered = |source: &str| ChatTemplate::new(source).and_then(|template| template.render(&hi, false, &none));
    // A namespace keeps data as it was; what is only to be computed would be a list of a list of a list as well.
    for (source, text) in [
        ("{% set ns = namespace(x=[1]) %}{% for a in range(9999) %}{% set ns.x = ns.x * 1 %}{% endfor %}{{ ns.x }}", "[1]"),
        (
            "{% set ns = namespace(x=1) %}{% set ns.x = ns.x + 1 if ns.x else 0 %}{% set ns.y = ns.x, '%}' -%} {{ ns.x }}{{ ns.y }}",
            "2(2, '%}')",
        ),
        ("{% set ns = namespace() %}{% set ns.b, ns.a = {'z': 1, 'a': [2]}, none %}{{ ns.b }}{{ ns.a }}", "{'z': 1, 'a': [2]}None"),
        ("{% set ns = namespace() %}{% set ns.x | upper %}a{% endset %}{{ ns.x }}{% set settle = 1 %}{{ settle }}", "A1"),
        ("{% raw %}{% set ns.x = 1 %}{% generation %}{% endraw %}", "{% set ns.x = 1 %}{% generation %}"),
    ] {
        assert_eq!(rendered(source).unwrap(), text, "{source}");
    }
    // As deep as the source is long.
    let deep = format!("{{% set x = [] %}}{}{{{{ x }}}}", "{% set x = [x] %}".repeat(20_000));
    assert_eq!(rendered(&deep).unwrap(), ["[".repeat(20_001), "]".repeat(20_001)].concat());
    assert!(rendered(&"{{ 1 }}".repeat(1 << 20)).unwrap_err().to_string().contains("too long"));
    for source in ["{% if %}", "{{ 'open", "{% generation %}", "{% for %}", "{{ ( }}", "{% endgeneration %}", &"{{ (".repeat(100_000), "{%"]
    {
        let error =
            ChatTemplate::new(source).err().unwrap_or_else(|| panic!("{} is a template", &source[..source.len().min(40)])).to_string();
        assert!(error.contains("line 1"), "{error}");
    }
    let cut = "{% set a %}{% generation %}abc{% endgeneration %}{% endset %}{{ a[:2] }}";
    assert!(ChatTemplate::new(cut).unwrap().render(&hi, false, &none).unwrap_err().to_string().contains("generation block"));
    assert_eq!(Message::new("user", "x").text(), Some("x"));
    let parts: Message = from_str(r#"{"role": "user", "content": [{"type": "text", "text": "a"}], "name": null}"#).unwrap();
    let template = ChatTemplate::new("{{ messages[0].content[0].text }}{{ 'name' in messages[0] }}").unwrap();
    assert_eq!((template.render(&[parts], false, &none).unwrap().as_str(), Map::new().len()), ("aFalse", 0));
    assert!(from_str::<Message>(r#"{"role": "user", "content": 3}"#).unwrap_err().to_string().contains("content"));
}

#[test]
fn windows_cover_the_text_and_resume_exactly() {
    let tokens: Vec<u32> = (0..103).collect();
    let all = TokenBlocks::consecutive(tokens.clone(), 10).unwrap();
    assert_eq!(all.len(), 10);
    let batch = all.batch(&(0..10).collect::<Vec<_>>(), &mut Rng::new(0)).unwrap();
    assert_eq!(batch.inputs.to_vec::<i64>().unwrap(), (0..100).collect::<Vec<i64>>());
    assert_eq!(batch.targets.to_vec::<i64>().unwrap(), (1..101).collect::<Vec<i64>>());
    assert_eq!(TokenBlocks::consecutive(tokens[..101].to_vec(), 10).unwrap().len(), 10);
    assert_eq!(TokenBlocks::consecutive(tokens[..100].to_vec(), 10).unwrap().len(), 9);
    for (count, block) in [(0, 1), (10, 10), (10, 0), (3, usize::MAX)] {
        assert!(TokenBlocks::consecutive(tokens[..count].to_vec(), block).is_err());
    }
    assert!(all.batch(&[10], &mut Rng::new(0)).is_err());

    let random = || TokenBlocks::random(tokens.clone(), 10, 50).unwrap();
    let options = LoaderOptions { batch_size: 4, seed: 3, ..LoaderOptions::default() };
    let mut loader = Loader::new(random(), options.clone()).unwrap();
    let mut batches = Vec::new();
    let mut state = loader.state();
    for (i, batch) in (&mut loader).enumerate() {
        let batch = batch.unwrap();
        let (inputs, targets) = (batch.inputs.to_vec::<i64>().unwrap(), batch.targets.to_vec::<i64>().unwrap());
        for (row, next) in inputs.chunks(10).zip(targets.chunks(10)) {
            assert!(row.windows(2).all(|pair| pair[1] == pair[0] + 1) && row[1..] == next[..9] && next[9] == row[9] + 1 && next[9] < 103);
        }
        batches.push(inputs);
        if i == 5 {
            state.batch = 6;
        }
    }
    assert_eq!((batches.len(), batches[0] == batches[1]), (13, false));
    let starts: Vec<i64> = batches.iter().flat_map(|batch| batch.chunks(10).map(|row| row[0])).collect();
    assert!(starts.iter().any(|&start| start < 20) && starts.iter().any(|&start| start > 70));
    let mut resumed = Loader::new(random(), options).unwrap();
    resumed.resume(state).unwrap();
    let rest: Vec<Vec<i64>> = resumed.map(|batch| batch.unwrap().inputs.to_vec().unwrap()).collect();
    assert_eq!(rest, batches[6..]);
}

/// Sequences of `lengths`, every token another number, every third masked.
fn sequences(lengths: &[usize]) -> Vec<TokenSequence> {
    let mut next = 0;
    let sequence = |&length: &usize| {
        let tokens: Vec<u32> = (next..next + length as u32).collect();
        next += length as u32;
        TokenSequence::masked(tokens.clone(), tokens.iter().map(|token| token % 3 != 0).collect()).unwrap()
    };
    lengths.iter().map(sequence).collect()
}

#[test]
fn packed_rows_hold_every_sequence_once_and_mix_none() {
    let mut rng = Rng::new(4);
    let lengths: Vec<usize> = (0..200).map(|_| rng.below(17)).collect();
    for packing in [Packing::InOrder, Packing::FirstFit] {
        let options = PackOptions { length: 16, packing, overlong: Overlong::Refuse, pad: 9999 };
        let packed = PackedSequences::new(sequences(&lengths), options).unwrap();
        // The rows that a plain search gives.
        let mut rooms: Vec<usize> = Vec::new();
        for &length in lengths.iter().filter(|&&length| length > 0) {
            let first = if packing == Packing::InOrder { rooms.len().saturating_sub(1) } else { 0 };
            match (first..rooms.len()).find(|&row| rooms[row] >= length) {
                Some(row) => rooms[row] -= length,
                None => rooms.push(16 - length),
            }
        }
        assert_eq!(packed.len(), rooms.len());
        let places: usize = lengths.iter().sum();
        assert!((packed.density() - places as f64 / (16.0 * rooms.len() as f64)).abs() < 1e-12);
        let batch = packed.batch(&(0..packed.len()).collect::<Vec<_>>(), &mut Rng::new(0)).unwrap();
        let [inputs, targets, positions, segments] =
            [&batch.inputs, &batch.targets, &batch.positions, &batch.segments].map(|tensor| tensor.to_vec::<i64>().unwrap());
        let mut seen: Vec<i64> = inputs.iter().copied().filter(|&token| token != 9999).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..places as i64).collect::<Vec<_>>());
        let starts: Vec<i64> = lengths
            .iter()
            .scan(0, |sum, &length| {
                *sum += length as i64;
                Some(*sum - length as i64)
            })
            .collect();
        for place in 0..inputs.len() {
            let (row, column) = (place / 16, place % 16);
            if segments[place] < 0 {
                assert_eq!((inputs[place], targets[place]), (9999, IGNORE_INDEX));
                assert!(16 - column <= rooms[row] && positions[place] == (column + rooms[row] - 16) as i64);
                continue;
            }
            let start = *starts.iter().rev().find(|&&start| start <= inputs[place]).unwrap();
            assert_eq!(positions[place], inputs[place] - start);
            let follows = column < 15 && segments[place + 1] == segments[place];
            assert_eq!(follows, column < 15 && inputs[place + 1] == inputs[place] + 1 && positions[place + 1] > 0);
            let expected = if follows && inputs[place + 1] % 3 != 0 { inputs[place] + 1 } else { IGNORE_INDEX };
            assert_eq!(targets[place], expected, "place {place}");
        }
    }
}

#[test]
fn overlong_sequences_are_refused_cut_or_split() {
    let pack = |overlong| {
        let options = PackOptions { length: 4, packing: Packing::InOrder, overlong, pad: 0 };
        PackedSequences::new(vec![TokenSequence::new((1..=10).collect()), TokenSequence::default()], options)
    };
    assert!(pack(Overlong::Refuse).unwrap_err().to_string().contains("sequence 0 has 10 tokens"));
    let rows = |packed: PackedSequences| {
        let batch = packed.batch(&(0..packed.len()).collect::<Vec<_>>(), &mut Rng::new(0)).unwrap();
        (batch.inputs.to_vec::<i64>().unwrap(), batch.targets.to_vec::<i64>().unwrap())
    };
    assert_eq!(rows(pack(Overlong::Truncate).unwrap()), (vec![1, 2, 3, 4], vec![2, 3, 4, IGNORE_INDEX]));
    let (inputs, targets) = rows(pack(Overlong::Split).unwrap());
    assert_eq!(inputs, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 0]);
    assert_eq!(targets, [2, 3, 4, IGNORE_INDEX, 6, 7, 8, IGNORE_INDEX, 10, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]);
    let empty = PackOptions { length: 0, packing: Packing::InOrder, overlong: Overlong::Split, pad: 0 };
    assert!(PackedSequences::new(vec![], empty).is_err());
    assert!(PackedSequences::new(vec![], PackOptions { length: usize::MAX, ..empty }).is_err());
    assert_eq!(PackedSequences::new(vec![], PackOptions { length: 4, ..empty }).unwrap().len(), 0);
    assert!(TokenSequence::masked(vec![1, 2], vec![true]).is_err());
}

#[test]
fn padded_batches_have_their_padding_on_the_side_that_was_asked_for() {
    let three = sequences(&[2, 4, 1]);
    let batch = pad_sequences(&three, 77, PaddingSide::Right).unwrap();
    assert_eq!(batch.inputs.to_vec::<i64>().unwrap(), [0, 1, 77, 77, 2, 3, 4, 5, 6, 77, 77, 77]);
    assert_eq!(
        batch.targets.to_vec::<i64>().unwrap(),
        [
            1,
            IGNORE_INDEX,
            IGNORE_INDEX,
            IGNORE_INDEX,
            IGNORE_INDEX,
            4,
            5,
            IGNORE_INDEX,
            IGNORE_INDEX,
            IGNORE_INDEX,
            IGNORE_INDEX,
            IGNORE_INDEX
        ]
    );
    let mask = batch.key_mask.to_vec::<bool>().unwrap();
    assert_eq!(mask, [true, true, false, false, true, true, true, true, true, false, false, false]);
    assert_eq!(batch.lengths, [2, 4, 1]);
    let data = PaddedSequences::new(three, 77, PaddingSide::Left).unwrap();
    let batch = data.batch(&[2, 0], &mut Rng::new(0)).unwrap();
    assert_eq!(batch.inputs.to_vec::<i64>().unwrap(), [77, 6, 0, 1]);
    assert_eq!(batch.key_mask.to_vec::<bool>().unwrap(), [false, true, true, true]);
    assert!(data.batch(&[3], &mut Rng::new(0)).is_err());
    assert!(pad_sequences(&[], 0, PaddingSide::Left).is_err());
    assert!(pad_sequences(&[TokenSequence::default()], 0, PaddingSide::Left).is_err());
    assert!(PaddedSequences::new(vec![TokenSequence::default()], 0, PaddingSide::Left).is_err());
}

#[test]
fn a_corpus_becomes_tokens() {
    let corpus = Corpus::open(CorpusSource::Generated { seed: 5, bytes: 40_000 }).unwrap();
    assert!(corpus.to_string().contains("generated dialogue, seed 5"), "{corpus}");
    let (train, validation) = corpus.split();
    assert!(validation.len() * 9 <= train.len() && validation.len() * 10 + 20 > corpus.text.len());
    let characters = CharTokenizer::new(&corpus.text).unwrap();
    assert!((40..70).contains(&characters.vocab_size()), "{}", characters.vocab_size());
    let blocks = TokenBlocks::consecutive(characters.encode(train).unwrap(), 64).unwrap();
    assert_eq!(blocks.len(), (train.len() - 1) / 64);
    let bpe = train_bpe([train], 512, &["<|endoftext|>"]).unwrap();
    let ids = bpe.encode(validation).unwrap();
    assert!(ids.len() * 5 < validation.len() * 2 && bpe.decode(&ids, false).unwrap() == validation);
}
