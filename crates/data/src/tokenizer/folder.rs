//! Tokenizers in Hugging Face folders.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{SpecialTokens, Tokenizer};
use crate::error::{Error, Result};

/// Reads a folder's tokenizer files.
pub(super) fn read(folder: &Path) -> Result<Tokenizer> {
    let path = folder.join("tokenizer.json");
    if !path.is_file() {
        return Err(Error::tokenizer(
            path.display().to_string(),
            "the file is missing: a model folder needs a tokenizer.json",
            "save it with transformers (AutoTokenizer.from_pretrained(…).save_pretrained(…)), or \
             point to a folder that has one",
        ));
    }
    let mut tokenizer = Tokenizer::from_file(&path)?;
    let config = optional_object(&folder.join("tokenizer_config.json"))?;
    let map = optional_object(&folder.join("special_tokens_map.json"))?;
    let id = |name: &str| {
        token_text(config.get(name))
            .or_else(|| token_text(map.get(name)))
            .and_then(|text| tokenizer.token_to_id(text))
    };
    tokenizer.special = SpecialTokens {
        bos: id("bos_token"),
        eos: id("eos_token"),
        pad: id("pad_token"),
        unk: id("unk_token"),
    };
    apply_flags(&mut tokenizer, &config);
    let jinja = folder.join("chat_template.jinja");
    tokenizer.chat_template = if jinja.is_file() {
        Some(std::fs::read_to_string(&jinja).map_err(Error::io("read", &jinja))?)
    } else {
        template_text(config.get("chat_template"))
    };
    Ok(tokenizer)
}

/// `add_bos_token` and `add_eos_token` are what slow tokenizers went by; a `tokenizer.json` without
/// a post-processor for them leaves them to the configuration.
fn apply_flags(tokenizer: &mut Tokenizer, config: &Map<String, Value>) {
    let wants = |name: &str| config.get(name).and_then(Value::as_bool) == Some(true);
    if let Some(bos) = tokenizer.special.bos
        && wants("add_bos_token")
        && !tokenizer.affixes.0.contains(&bos)
    {
        tokenizer.affixes.0.insert(0, bos);
    }
    if let Some(eos) = tokenizer.special.eos
        && wants("add_eos_token")
        && !tokenizer.affixes.1.contains(&eos)
    {
        tokenizer.affixes.1.push(eos);
    }
}

/// Reads a JSON object; an absent file is an empty one.
fn optional_object(path: &Path) -> Result<Map<String, Value>> {
    if !path.is_file() {
        return Ok(Map::new());
    }
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    serde_json::from_slice(&bytes).map_err(|e| {
        Error::tokenizer(
            path.display().to_string(),
            format!("not a JSON object: {e}"),
            "get the file again",
        )
    })
}

/// A special token is written as its text or as an object with `content`.
fn token_text(value: Option<&Value>) -> Option<&str> {
    match value? {
        Value::String(text) => Some(text),
        Value::Object(token) => token.get("content")?.as_str(),
        _ => None,
    }
}

/// A chat template is a string, or a list of named ones of which `default` is meant.
fn template_text(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(text) => Some(text.clone()),
        Value::Array(list) => {
            let named = |t: &&Value| t.get("name").and_then(Value::as_str) == Some("default");
            let chosen = list.iter().find(named).or_else(|| list.first())?;
            Some(chosen.get("template")?.as_str()?.to_owned())
        }
        _ => None,
    }
}

/// The files that hold a tokenizer.
pub(super) fn write(tokenizer: &Tokenizer) -> Result<Vec<(&'static str, String)>> {
    let mut config = Map::new();
    config.insert("tokenizer_class".to_owned(), json!("PreTrainedTokenizerFast"));
    config.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
    let special = tokenizer.special;
    for (name, id) in [
        ("bos_token", special.bos),
        ("eos_token", special.eos),
        ("pad_token", special.pad),
        ("unk_token", special.unk),
    ] {
        if let Some(token) = id.and_then(|id| tokenizer.id_to_token(id)) {
            config.insert(name.to_owned(), Value::String(token));
        }
    }
    let config = serde_json::to_string_pretty(&config).map_err(|e| {
        Error::tokenizer(&tokenizer.origin, e.to_string(), "this is a bug in retune: report it")
    })?;
    let mut files =
        vec![("tokenizer.json", tokenizer.to_json()?), ("tokenizer_config.json", config + "\n")];
    if let Some(template) = &tokenizer.chat_template {
        files.push(("chat_template.jinja", template.clone()));
    }
    Ok(files)
}
