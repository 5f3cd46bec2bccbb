//! Small tokenizers for the tests of this crate.

use crate::tokenizer::{GgufTokenizer, Tokenizer};

/// GPT-2's alphabet: the character that stands for each byte.
pub(crate) fn byte_alphabet() -> Vec<String> {
    let mut next = 256;
    (0u32..256)
        .map(|byte| {
            let visible = matches!(byte, 33..=126 | 161..=172 | 174..=255);
            let code = if visible {
                byte
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).unwrap().to_string()
        })
        .collect()
}

/// Metadata of a byte-level tokenizer: ids 0 to 3 are `<s>`, `<|im_start|>`, `<|im_end|>`,
/// `<pad>`; then the 256 bytes; then merges `he`, `ll`, `hell`, `hello`, `Ġw`.
pub(crate) fn byte_level_metadata() -> GgufTokenizer {
    let control = ["<s>", "<|im_start|>", "<|im_end|>", "<pad>"];
    let merges = ["h e", "l l", "he ll", "hell o", "Ġ w"];
    let mut tokens: Vec<String> = control.iter().map(ToString::to_string).collect();
    tokens.extend(byte_alphabet());
    tokens.extend(merges.iter().map(|m| m.replace(' ', "")));
    let mut token_types = vec![1; tokens.len()];
    token_types[..4].fill(3);
    GgufTokenizer {
        model: "gpt2".into(),
        pre: Some("smollm".into()),
        tokens,
        token_types,
        merges: merges.iter().map(ToString::to_string).collect(),
        bos: Some(0),
        eos: Some(2),
        pad: Some(3),
        add_bos: Some(false),
        ..GgufTokenizer::default()
    }
}

/// The tokenizer of [`byte_level_metadata`].
pub(crate) fn byte_level() -> Tokenizer {
    Tokenizer::from_gguf(byte_level_metadata(), "fixture").unwrap()
}

/// The same with a beginning-of-sequence token before every text.
pub(crate) fn byte_level_with_bos() -> Tokenizer {
    let metadata = GgufTokenizer { add_bos: Some(true), ..byte_level_metadata() };
    Tokenizer::from_gguf(metadata, "fixture").unwrap()
}
