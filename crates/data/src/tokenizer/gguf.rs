//! Tokenizers from a GGUF file's metadata.
//!
//! Source of names, defaults and splitting rules: llama.cpp's vocabulary loader and converters.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tokenizers::models::bpe::BPE;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
};

use super::{SpecialTokens, Tokenizer, part};
use crate::error::{Error, Result};

/// What a GGUF file says about its tokenizer: the values of its `tokenizer.*` keys.
#[derive(Debug, Clone, Default)]
pub struct GgufTokenizer {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece).
    pub model: String,
    /// `tokenizer.ggml.pre`: the rule that splits text before BPE.
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`, in order of ids.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.scores`, for `llama`; empty if absent.
    pub scores: Vec<f32>,
    /// `tokenizer.ggml.token_type`: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused,
    /// 6 byte; empty if absent.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.merges`, for `gpt2`: pairs as `left right`.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unk: Option<u32>,
    /// `tokenizer.ggml.padding_token_id`.
    pub pad: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`.
    pub add_eos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`, for `llama`.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// A pre-tokenizer's name and what follows from it.
struct Rule {
    /// Applied one after the other; a match is a piece, and so is what lies between matches.
    patterns: &'static [&'static str],
    /// A whole piece that is a token is taken without merging.
    ignore_merges: bool,
    /// Whether a beginning-of-sequence token is put first where the file does not say.
    add_bos: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

fn rule(pre: &str) -> Option<Rule> {
    let plain = |patterns| Rule { patterns, ignore_merges: false, add_bos: false };
    Some(match pre {
        "gpt-2" | "mpt" | "olmo" | "jais" | "phi-2" | "roberta-bpe" => plain(&[GPT2]),
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" => {
            plain(&[r"\p{N}", GPT2])
        }
        "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" => {
            Rule { patterns: &[LLAMA3], ignore_merges: true, add_bos: true }
        }
        "dbrx" | "smaug-bpe" => plain(&[LLAMA3]),
        "qwen2" | "deepseek-r1-qwen" | "stablelm2" => plain(&[QWEN2]),
        "default" => plain(&[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"]),
        _ => return None,
    })
}

/// Finds the name a GGUF file gives to a byte-level tokenizer's way of cutting text into pieces.
///
/// `tokenizer` is a whole `tokenizer.json`. `None` where no known name cuts the same way: a file
/// with another name would be read, and every tool would cut text otherwise than in training.
pub fn pre_name(tokenizer: &Value) -> Option<&'static str> {
    let steps = match &tokenizer["pre_tokenizer"] {
        Value::Object(step) if step.get("type")? == "Sequence" => {
            step.get("pretokenizers")?.as_array()?.clone()
        }
        step => vec![step.clone()],
    };
    let mut patterns: Vec<&str> = Vec::new();
    for step in &steps {
        match step["type"].as_str()? {
            "Split" if step["behavior"] == "Isolated" && step["invert"] == false => {
                patterns.push(step["pattern"]["Regex"].as_str()?);
            }
            "Digits" if step["individual_digits"] == true => patterns.push(r"\p{N}"),
            // Its own expression is GPT-2's; without it bytes are only spelled as letters.
            "ByteLevel" if step["add_prefix_space"] == true => return None,
            "ByteLevel" if step["use_regex"] != false => patterns.push(GPT2),
            "ByteLevel" => {}
            _ => return None,
        }
    }
    let whole = tokenizer["model"]["ignore_merges"] == true;
    ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "default"].into_iter().find(|name| {
        rule(name).is_some_and(|rule| rule.patterns == patterns && rule.ignore_merges == whole)
    })
}

/// Builds the tokenizer.
pub(super) fn build(mut gguf: GgufTokenizer, origin: &str) -> Result<Tokenizer> {
    check_lists(&gguf, origin)?;
    let vocabulary = unique_vocabulary(&mut gguf.tokens);
    let (mut inner, add_bos) = match gguf.model.as_str() {
        "gpt2" => byte_level(&gguf, vocabulary, origin)?,
        "llama" => sentence_piece(&gguf, vocabulary, origin)?,
        other => {
            return Err(Error::tokenizer(
                origin,
                format!("tokenizer.ggml.model is {other:?}, expected \"gpt2\" or \"llama\""),
                "use the model's Hugging Face folder with its tokenizer.json instead",
            ));
        }
    };
    add_special(&mut inner, &gguf, origin)?;
    let bos = gguf.bos.filter(|_| gguf.add_bos.unwrap_or(add_bos));
    let eos = gguf.eos.filter(|_| gguf.add_eos.unwrap_or(false));
    if bos.is_some() || eos.is_some() {
        let processor: PostProcessorWrapper = part(around(&gguf.tokens, bos, eos), origin)?;
        inner.with_post_processor(Some(processor));
    }
    let special = SpecialTokens { bos: gguf.bos, eos: gguf.eos, pad: gguf.pad, unk: gguf.unk };
    Tokenizer::new(inner, special, gguf.chat_template, origin)
}

fn check_lists(gguf: &GgufTokenizer, origin: &str) -> Result<()> {
    let damaged = |problem: String| {
        Err(Error::tokenizer(origin, problem, "get the GGUF file again: its metadata is damaged"))
    };
    let tokens = gguf.tokens.len();
    if tokens == 0 {
        return damaged("tokenizer.ggml.tokens is missing or empty".to_owned());
    }
    for (name, length) in [("token_type", gguf.token_types.len()), ("scores", gguf.scores.len())] {
        if length != 0 && length != tokens {
            return damaged(format!(
                "tokenizer.ggml.{name} has {length} entries for {tokens} tokens"
            ));
        }
    }
    for (name, id) in
        [("bos", gguf.bos), ("eos", gguf.eos), ("unknown", gguf.unk), ("padding", gguf.pad)]
    {
        if let Some(id) = id.filter(|&id| id as usize >= tokens) {
            return damaged(format!(
                "tokenizer.ggml.{name}_token_id is {id}, beyond {tokens} tokens"
            ));
        }
    }
    Ok(())
}

/// Gives every id a text of its own: empty and repeated entries are renamed, so that no id is lost.
fn unique_vocabulary(tokens: &mut [String]) -> BTreeMap<String, u32> {
    let mut vocabulary = BTreeMap::new();
    for (id, token) in tokens.iter_mut().enumerate() {
        if token.is_empty() || vocabulary.contains_key(token) {
            *token = format!("[retune: unused {id}]");
        }
        vocabulary.insert(token.clone(), id as u32);
    }
    vocabulary
}

fn token_type(gguf: &GgufTokenizer, id: usize) -> i32 {
    gguf.token_types.get(id).copied().unwrap_or(NORMAL)
}

type Built = (tokenizers::Tokenizer, bool);

fn byte_level(
    gguf: &GgufTokenizer,
    vocabulary: BTreeMap<String, u32>,
    origin: &str,
) -> Result<Built> {
    let pre = gguf.pre.as_deref().unwrap_or("default");
    let Some(rule) = rule(pre) else {
        return Err(Error::tokenizer(
            origin,
            format!(
                "tokenizer.ggml.pre is {pre:?}; known are default, gpt-2, smollm, starcoder, \
                 llama-bpe, qwen2 and their kin"
            ),
            "use the model's Hugging Face folder with its tokenizer.json instead",
        ));
    };
    if gguf.merges.is_empty() {
        return Err(Error::tokenizer(
            origin,
            "tokenizer.ggml.merges is missing or empty",
            "get the GGUF file again: its metadata is damaged",
        ));
    }
    let mut merges = Vec::with_capacity(gguf.merges.len());
    for (at, line) in gguf.merges.iter().enumerate() {
        // Tokens may hold a blank only as their first character.
        let split = line.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
        let Some(split) = split else {
            return Err(Error::tokenizer(
                origin,
                format!("tokenizer.ggml.merges entry {at} is {line:?}, expected two tokens"),
                "get the GGUF file again: its metadata is damaged",
            ));
        };
        merges.push((line[..split].to_owned(), line[split + 1..].to_owned()));
    }
    // Bytes cover every text, so there is no unknown token to name.
    let mut inner = bpe(vocabulary, merges, rule.ignore_merges, false, None, origin)?;
    let mut steps: Vec<Value> = rule
        .patterns
        .iter()
        .map(|regex| {
            json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated",
                   "invert": false})
        })
        .collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
                       "use_regex": false});
    steps.push(bytes.clone());
    let steps: PreTokenizerWrapper =
        part(json!({"type": "Sequence", "pretokenizers": steps}), origin)?;
    inner.with_pre_tokenizer(Some(steps));
    inner.with_decoder(Some(part::<DecoderWrapper>(bytes, origin)?));
    Ok((inner, rule.add_bos))
}

/// SentencePiece BPE, as transformers converts it: merges follow from the scores, bytes stand for
/// what has no piece.
fn sentence_piece(
    gguf: &GgufTokenizer,
    vocabulary: BTreeMap<String, u32>,
    origin: &str,
) -> Result<Built> {
    if gguf.scores.is_empty() {
        return Err(Error::tokenizer(
            origin,
            "tokenizer.ggml.scores is missing",
            "get the GGUF file again: its metadata is damaged",
        ));
    }
    let merges = merges_from_scores(gguf, &vocabulary);
    let unk = gguf.unk.map(|id| gguf.tokens[id as usize].clone());
    let mut inner = bpe(vocabulary, merges, false, true, unk, origin)?;
    let prefix = gguf.add_space_prefix.unwrap_or(true);
    let blank = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let mut normalizers = vec![blank];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let normalizer: NormalizerWrapper =
        part(json!({"type": "Sequence", "normalizers": normalizers}), origin)?;
    inner
        .with_normalizer(Some(normalizer))
        .map_err(|e| Error::tokenizer(origin, e.to_string(), "get the GGUF file again"))?;
    inner.with_decoder(Some(part::<DecoderWrapper>(
        json!({"type": "Sequence", "decoders": decoders}),
        origin,
    )?));
    Ok((inner, true))
}

/// The merges a SentencePiece vocabulary stands for: every way to split a piece into two pieces,
/// best score first.
fn merges_from_scores(
    gguf: &GgufTokenizer,
    vocabulary: &BTreeMap<String, u32>,
) -> Vec<(String, String)> {
    let is_piece = |id: u32| matches!(token_type(gguf, id as usize), NORMAL | USER_DEFINED);
    let piece = |text: &str| vocabulary.get(text).copied().filter(|&id| is_piece(id));
    let mut found = Vec::new();
    for (id, token) in gguf.tokens.iter().enumerate() {
        if !is_piece(id as u32) {
            continue;
        }
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(left_id), Some(right_id)) = (piece(left), piece(right)) {
                found.push((gguf.scores[id], id, left_id, right_id, left, right));
            }
        }
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
    found.into_iter().map(|(.., left, right)| (left.to_owned(), right.to_owned())).collect()
}

fn bpe(
    vocabulary: BTreeMap<String, u32>,
    merges: Vec<(String, String)>,
    ignore_merges: bool,
    byte_fallback: bool,
    unk: Option<String>,
    origin: &str,
) -> Result<tokenizers::Tokenizer> {
    let vocabulary: tokenizers::models::bpe::Vocab = vocabulary.into_iter().collect();
    let mut builder = BPE::builder()
        .vocab_and_merges(vocabulary, merges)
        .ignore_merges(ignore_merges)
        .byte_fallback(byte_fallback)
        .fuse_unk(byte_fallback);
    if let Some(unk) = unk {
        builder = builder.unk_token(unk);
    }
    let model = builder.build().map_err(|e| {
        Error::tokenizer(
            origin,
            format!("its merges do not fit its tokens: {e}"),
            "get the GGUF file again: its metadata is damaged",
        )
    })?;
    Ok(tokenizers::Tokenizer::new(model))
}

/// Control and user-defined tokens are cut out of the text before anything else.
fn add_special(
    inner: &mut tokenizers::Tokenizer,
    gguf: &GgufTokenizer,
    origin: &str,
) -> Result<()> {
    let tokens = gguf.tokens.iter().enumerate().filter_map(|(id, token)| {
        let special = match token_type(gguf, id) {
            CONTROL => true,
            USER_DEFINED => false,
            _ => return None,
        };
        Some(AddedToken::from(token.as_str(), special).normalized(false))
    });
    inner
        .add_tokens(tokens)
        .map_err(|e| Error::tokenizer(origin, e.to_string(), "get the GGUF file again"))?;
    Ok(())
}

/// A post-processor that puts tokens before and behind every text.
fn around(tokens: &[String], bos: Option<u32>, eos: Option<u32>) -> Value {
    let special =
        |id: u32, of: u32| json!({"SpecialToken": {"id": tokens[id as usize], "type_id": of}});
    let text = |name: &str, of: u32| {
        let mut pieces: Vec<Value> = bos.map(|id| special(id, of)).into_iter().collect();
        pieces.push(json!({"Sequence": {"id": name, "type_id": of}}));
        pieces.extend(eos.map(|id| special(id, of)));
        pieces
    };
    let mut pair = text("A", 0);
    pair.extend(text("B", 1));
    let used: serde_json::Map<String, Value> = bos
        .into_iter()
        .chain(eos)
        .map(|id| {
            let token = &tokens[id as usize];
            (token.clone(), json!({"id": token, "ids": [id], "tokens": [token]}))
        })
        .collect();
    json!({"type": "TemplateProcessing", "single": text("A", 0), "pair": pair,
           "special_tokens": used})
}
