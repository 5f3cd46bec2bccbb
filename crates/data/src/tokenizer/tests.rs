use std::fs;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::fixtures::{byte_alphabet, byte_level, byte_level_metadata, byte_level_with_bos};

/// Id of a byte in the fixtures.
fn byte(b: u8) -> u32 {
    4 + u32::from(b)
}

#[test]
fn byte_level_merges_and_byte_ranges() {
    let tokenizer = byte_level();
    // 260 he, 261 ll, 262 hell, 263 hello, 264 Ġw.
    let got = tokenizer.encode("hello wé", false).unwrap();
    assert_eq!(got.ids, [263, 264, byte(0xc3), byte(0xa9)]);
    // Both bytes of é stand for the whole character.
    assert_eq!(got.bytes, [0..5, 5..7, 7..9, 7..9]);
    assert_eq!(tokenizer.decode(&got.ids, false).unwrap(), "hello wé");
}

#[test]
fn control_tokens_are_cut_out_first_and_digits_stand_alone() {
    let tokenizer = byte_level();
    let got = tokenizer.encode("<|im_start|>he12<|im_end|>", false).unwrap();
    assert_eq!(got.ids, [1, 260, byte(b'1'), byte(b'2'), 2]);
    assert_eq!(got.bytes, [0..12, 12..14, 14..15, 15..16, 16..26]);
    assert_eq!(tokenizer.decode(&got.ids, true).unwrap(), "he12");
    assert!(tokenizer.is_special(1) && !tokenizer.is_special(260));
}

#[test]
fn added_special_tokens_have_empty_ranges() {
    let tokenizer = byte_level_with_bos();
    assert!(tokenizer.adds_bos() && !tokenizer.adds_eos());
    let got = tokenizer.encode("he", true).unwrap();
    assert_eq!((got.ids, got.bytes), (vec![0, 260], vec![0..0, 0..2]));
    assert_eq!(tokenizer.encode("he", false).unwrap().ids, [260]);
}

#[test]
fn tokens_are_shown_one_by_one() {
    let tokenizer = byte_level();
    assert_eq!(tokenizer.token_text(264), " w");
    assert_eq!(tokenizer.token_text(2), "<|im_end|>");
    assert_eq!(tokenizer.token_text(byte(0xc3)), "\u{fffd}");
    assert_eq!(tokenizer.token_text(9999), "<unknown id 9999>");
}

#[test]
fn a_vocabulary_larger_than_the_model_is_refused() {
    let tokenizer = byte_level();
    assert_eq!(tokenizer.vocabulary_size(), 265);
    tokenizer.check_fits(265).unwrap();
    tokenizer.check_fits(320).unwrap();
    assert_eq!(
        tokenizer.check_fits(264).unwrap_err().to_string(),
        "tokenizer fixture: it does not fit the model: its highest id is 264, the model's \
         embedding has 264 rows; token 264 (\"Ġw\") has none; use the tokenizer that came with \
         this model"
    );
}

/// Pieces and scores as SentencePiece writes them; merging follows the scores.
fn sentence_piece(add_space_prefix: bool) -> Tokenizer {
    let mut tokens: Vec<String> =
        ["<unk>", "<s>", "</s>"].iter().map(ToString::to_string).collect();
    let mut token_types = vec![2, 3, 3];
    for b in 0..=255u8 {
        tokens.push(format!("<0x{b:02X}>"));
        token_types.push(6);
    }
    let mut scores = vec![0.0; tokens.len()];
    // 259.. : best score first, as in a real vocabulary.
    for (piece, score) in [
        ("▁a", -1.0),
        ("bc", -2.0),
        ("ab", -3.0),
        ("▁abc", -4.0),
        ("▁", -5.0),
        ("a", -6.0),
        ("b", -7.0),
        ("c", -8.0),
    ] {
        tokens.push(piece.to_owned());
        token_types.push(1);
        scores.push(score);
    }
    let metadata = GgufTokenizer {
        model: "llama".into(),
        tokens,
        scores,
        token_types,
        bos: Some(1),
        eos: Some(2),
        unk: Some(0),
        add_space_prefix: Some(add_space_prefix),
        ..GgufTokenizer::default()
    };
    Tokenizer::from_gguf(metadata, "fixture").unwrap()
}

#[test]
fn sentence_piece_merges_by_score_and_falls_back_to_bytes() {
    let tokenizer = sentence_piece(true);
    // "▁abc": ▁a and bc have the best scores, and together they are a piece.
    assert_eq!(tokenizer.encode("abc", false).unwrap().ids, [262]);
    // "▁ab": ▁a joins first, so "ab" never forms.
    assert_eq!(tokenizer.encode("ab", false).unwrap().ids, [259, 265]);
    // é has no piece: its two bytes.
    let ids = tokenizer.encode("a é", true).unwrap().ids;
    assert_eq!(ids, [1, 259, 263, 3 + 0xc3, 3 + 0xa9]);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a é");
    assert_eq!(tokenizer.token_text(259), " a");
}

#[test]
fn sentence_piece_without_the_blank_in_front() {
    let tokenizer = sentence_piece(false);
    let ids = tokenizer.encode("ab", false).unwrap().ids;
    assert_eq!(ids, [261]);
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "ab");
}

#[test]
fn damaged_metadata_is_refused() {
    let refused = |change: fn(&mut GgufTokenizer)| {
        let mut metadata = byte_level_metadata();
        change(&mut metadata);
        Tokenizer::from_gguf(metadata, "x.gguf").unwrap_err().to_string()
    };
    let cases = [
        refused(|m| m.model = "rwkv".into()),
        refused(|m| m.pre = Some("nonsense".into())),
        refused(|m| m.tokens.clear()),
        refused(|m| m.token_types.truncate(3)),
        refused(|m| m.eos = Some(70_000)),
        refused(|m| m.merges.clear()),
        refused(|m| m.merges[2] = "hell".into()),
        refused(|m| m.merges[2] = "absent tokens".into()),
    ];
    insta::assert_snapshot!(cases.join("\n"), @r#"
    tokenizer x.gguf: tokenizer.ggml.model is "rwkv", expected "gpt2" or "llama"; use the model's Hugging Face folder with its tokenizer.json instead
    tokenizer x.gguf: tokenizer.ggml.pre is "nonsense"; known are default, gpt-2, smollm, starcoder, llama-bpe, qwen2 and their kin; use the model's Hugging Face folder with its tokenizer.json instead
    tokenizer x.gguf: tokenizer.ggml.tokens is missing or empty; get the GGUF file again: its metadata is damaged
    tokenizer x.gguf: tokenizer.ggml.token_type has 3 entries for 265 tokens; get the GGUF file again: its metadata is damaged
    tokenizer x.gguf: tokenizer.ggml.eos_token_id is 70000, beyond 265 tokens; get the GGUF file again: its metadata is damaged
    tokenizer x.gguf: tokenizer.ggml.merges is missing or empty; get the GGUF file again: its metadata is damaged
    tokenizer x.gguf: tokenizer.ggml.merges entry 2 is "hell", expected two tokens; get the GGUF file again: its metadata is damaged
    tokenizer x.gguf: its merges do not fit its tokens: Token `absent` out of vocabulary; get the GGUF file again: its metadata is damaged
    "#);
}

#[test]
fn repeated_and_empty_entries_keep_their_ids() {
    let mut metadata = byte_level_metadata();
    metadata.tokens.extend([String::new(), "hello".to_owned()]);
    metadata.token_types.extend([1, 1]);
    let tokenizer = Tokenizer::from_gguf(metadata, "x").unwrap();
    assert_eq!(tokenizer.vocabulary_size(), 267);
    assert_eq!(tokenizer.encode("hello", false).unwrap().ids, [263]);
}

#[test]
fn a_folder_round_trip_keeps_everything() {
    let folder = tempfile::tempdir().unwrap();
    let mut before = byte_level_with_bos();
    before.chat_template = Some("{{ messages }}".into());
    for (name, content) in before.to_folder_files().unwrap() {
        fs::write(folder.path().join(name), content).unwrap();
    }
    let after = Tokenizer::from_folder(folder.path()).unwrap();
    assert_eq!(
        after.special(),
        SpecialTokens { bos: Some(0), eos: Some(2), pad: Some(3), unk: None }
    );
    assert_eq!(after.chat_template(), Some("{{ messages }}"));
    let text = "<|im_start|>hello wé 42\n";
    assert_eq!(after.encode(text, true).unwrap(), before.encode(text, true).unwrap());
}

#[test]
fn folder_files_in_older_forms() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, content: String| fs::write(folder.path().join(name), content).unwrap();
    let mut json: Value = serde_json::from_str(&byte_level().to_json().unwrap()).unwrap();
    // Truncation in the file must not cut data.
    json["truncation"] =
        json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = json!({"strategy": {"Fixed": 9}, "direction": "Right",
        "pad_to_multiple_of": null, "pad_id": 3, "pad_type_id": 0, "pad_token": "<pad>"});
    file("tokenizer.json", json.to_string());
    let config = json!({
        "eos_token": {"content": "<|im_end|>", "special": true},
        "bos_token": null,
        "add_bos_token": true,
        "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],
    });
    file("tokenizer_config.json", config.to_string());
    file("special_tokens_map.json", json!({"bos_token": "<s>"}).to_string());
    let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
    assert_eq!(tokenizer.special().bos, Some(0));
    assert_eq!(tokenizer.special().eos, Some(2));
    assert_eq!(tokenizer.chat_template(), Some("D"));
    assert_eq!(tokenizer.encode("abc", true).unwrap().ids.len(), 4);
    file("chat_template.jinja", "J".into());
    assert_eq!(Tokenizer::from_folder(folder.path()).unwrap().chat_template(), Some("J"));
}

#[test]
fn missing_and_broken_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let error = Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json: the file is missing"), "{error}");
    fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    let error = Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
    assert!(error.contains("not a tokenizer.json"), "{error}");
    fs::write(folder.path().join("tokenizer.json"), byte_level().to_json().unwrap()).unwrap();
    fs::write(folder.path().join("tokenizer_config.json"), "[").unwrap();
    let error = Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json: not a JSON object"), "{error}");
}

/// A WordPiece tokenizer as BERT's files hold it.
fn small_bert() -> Value {
    let vocabulary =
        json!({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "hi": 3, "you": 4, "##s": 5, "a": 6});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocabulary},
    })
}

#[test]
fn pairs_get_token_types() {
    let json = small_bert();
    let tokenizer = Tokenizer::from_json(json.to_string().as_bytes(), "bert").unwrap();
    let (pair, cut) = tokenizer.encode_fitting("Hi", Some("yous"), 64).unwrap();
    assert_eq!(cut, 0);
    assert_eq!(pair.ids, [1, 3, 2, 4, 5, 2]);
    assert_eq!(pair.types, [0, 0, 0, 1, 1, 1]);
    // The longer text is cut, the tokens around both stay.
    let (pair, cut) = tokenizer.encode_fitting("hi", Some("yous hi hi"), 5).unwrap();
    assert_eq!((pair.ids, pair.types, cut), (vec![1, 3, 2, 4, 2], vec![0, 0, 0, 1, 1], 3));
    assert!(tokenizer.encode_fitting("hi", Some("hi"), 3).is_err());
    let one = tokenizer.encode("hi", true).unwrap();
    assert_eq!((one.ids, one.types), (vec![1, 3, 2], vec![0, 0, 0]));
    assert_eq!(tokenizer.token_text(5), "s");
}

#[test]
fn the_longer_of_two_texts_is_cut_first() {
    assert_eq!(longest_first(3, 4, 9), (3, 4));
    assert_eq!(longest_first(3, 9, 8), (3, 5));
    assert_eq!(longest_first(9, 3, 8), (5, 3));
    assert_eq!(longest_first(9, 9, 7), (3, 4));
    assert_eq!(longest_first(9, 0, 7), (7, 0));
}

#[test]
fn the_byte_alphabet_is_complete() {
    let mut alphabet = byte_alphabet();
    alphabet.sort();
    alphabet.dedup();
    assert_eq!(alphabet.len(), 256);
}

proptest! {
    #[test]
    fn any_text_survives_encoding(text in "\\PC{0,60}|(hello| w|\n|<s>|12|é){0,12}") {
        let tokenizer = byte_level();
        let got = tokenizer.encode(&text, false).unwrap();
        prop_assert_eq!(tokenizer.decode(&got.ids, false).unwrap(), text.clone());
        prop_assert_eq!(got.ids.len(), got.bytes.len());
        // Ranges are in order and cover the text.
        let mut covered = 0;
        for range in &got.bytes {
            prop_assert!(range.start <= covered && range.end >= covered && range.end <= text.len());
            covered = range.end;
        }
        prop_assert_eq!(covered, text.len());
    }

    #[test]
    fn any_bytes_as_tokenizer_json_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Tokenizer::from_json(&bytes, "x");
    }

    #[test]
    fn damaged_tokenizer_files_never_panic(at: usize, byte in 32u8..127, cut in 0usize..40) {
        let mut json = small_bert().to_string().into_bytes();
        let at = at % json.len();
        json[at] = byte;
        if cut == 0 {
            json.truncate(at);
        }
        if let Ok(tokenizer) = Tokenizer::from_json(&json, "x") {
            if let Ok(got) = tokenizer.encode("hi yous é", true) {
                let _ = tokenizer.decode(&got.ids, false);
            }
            let _ = tokenizer.encode_fitting("hi", Some("you hi"), 5);
            let _ = tokenizer.vocabulary_size();
        }
    }

    #[test]
    fn damaged_gguf_metadata_never_panics(
        model in prop_oneof![Just("gpt2".to_owned()), Just("llama".to_owned())],
        tokens in proptest::collection::vec("[ab▁ ]{0,3}|<0x4[12]>", 0..12),
        types in proptest::collection::vec(0i32..8, 12),
        scores in proptest::collection::vec(any::<f32>(), 12),
        merges in proptest::collection::vec("[ab ]{0,4}", 0..4),
        special in 0u32..14,
    ) {
        let metadata = GgufTokenizer {
            model,
            pre: Some("gpt-2".into()),
            token_types: types[..tokens.len()].to_vec(),
            scores: scores[..tokens.len()].to_vec(),
            tokens,
            merges,
            bos: Some(special),
            eos: Some(special / 2),
            unk: Some(special / 3),
            add_bos: Some(true),
            ..GgufTokenizer::default()
        };
        if let Ok(tokenizer) = Tokenizer::from_gguf(metadata, "x")
            && let Ok(got) = tokenizer.encode("ab a<0x41>é ", true)
        {
            let _ = tokenizer.decode(&got.ids, false);
        }
    }
}

#[test]
fn a_way_of_cutting_text_is_named_only_where_a_name_cuts_the_same() {
    let bytes = |regex: bool| serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": regex});
    let digits = serde_json::json!({"type": "Digits", "individual_digits": true});
    let of = |steps: Vec<serde_json::Value>| {
        pre_name(&serde_json::json!({
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "model": {}
        }))
    };
    assert_eq!(of(vec![bytes(true)]), Some("gpt-2"));
    assert_eq!(of(vec![digits.clone(), bytes(true)]), Some("smollm"));
    assert_eq!(of(vec![bytes(false), digits]), None);
    let single = serde_json::json!({"pre_tokenizer": bytes(true), "model": {}});
    assert_eq!(pre_name(&single), Some("gpt-2"));
    // What is read from a file by name is found again under a name that cuts alike.
    for pre in ["gpt-2", "smollm", "llama-bpe", "qwen2", "default"] {
        let metadata =
            GgufTokenizer { pre: Some(pre.into()), ..crate::fixtures::byte_level_metadata() };
        let tokenizer = Tokenizer::from_gguf(metadata, "x").unwrap();
        let json = serde_json::from_str(&tokenizer.to_json().unwrap()).unwrap();
        assert_eq!(pre_name(&json), Some(pre));
    }
}
