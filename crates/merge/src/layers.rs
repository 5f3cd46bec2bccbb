//! Layers as the names of tensors tell them.

use std::collections::BTreeMap;

/// What precedes a layer's number in the architectures of the ecosystem.
const CONTAINERS: [&str; 6] = ["layers", "layer", "h", "blocks", "block", "resblocks"];
/// Parts of the names of tensors that come before the layers.
const BEFORE: [&str; 9] = [
    "embed_tokens",
    "embeddings",
    "embed_positions",
    "embed_in",
    "word_embeddings",
    "tok_embeddings",
    "wte",
    "wpe",
    "shared",
];
/// Parts of the names of tensors with one row per token.
const VOCABULARY: [&str; 9] = [
    "embed_tokens",
    "lm_head",
    "wte",
    "word_embeddings",
    "tok_embeddings",
    "embed_in",
    "embed_out",
    "shared",
    "decoder",
];

/// A tensor's name split at the number of its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layered<'n> {
    /// What stands before the number, such as `model.layers.`: the stack it belongs to.
    pub stack: &'n str,
    /// The layer's number.
    pub layer: usize,
    /// What stands behind, such as `.mlp.up_proj.weight`.
    pub rest: &'n str,
}

impl<'n> Layered<'n> {
    /// Splits a name; `None` for a tensor outside of layers.
    pub fn parse(name: &'n str) -> Option<Self> {
        let mut before = "";
        let mut start = 0;
        for part in name.split('.') {
            let end = start + part.len();
            if CONTAINERS.contains(&before)
                && part.len() < 8
                && part.bytes().all(|b| b.is_ascii_digit())
                && let Ok(layer) = part.parse()
            {
                return Some(Self { stack: &name[..start], layer, rest: &name[end..] });
            }
            before = part;
            start = end + 1;
        }
        None
    }

    /// Returns the name with another number.
    pub fn at(&self, layer: usize) -> String {
        format!("{}{layer}{}", self.stack, self.rest)
    }
}

/// Counts the layers of every stack.
pub fn count<'n>(names: impl Iterator<Item = &'n str>) -> BTreeMap<&'n str, usize> {
    let mut stacks = BTreeMap::new();
    for part in names.filter_map(Layered::parse) {
        let count = stacks.entry(part.stack).or_insert(0);
        *count = (*count).max(part.layer + 1);
    }
    stacks
}

/// Tells whether a tensor outside of layers comes before them: an embedding.
pub fn is_before(name: &str) -> bool {
    name.split('.').any(|part| BEFORE.contains(&part)) && !name.contains("lm_head")
}

/// Tells whether a tensor has one row per token.
pub fn is_vocabulary(name: &str) -> bool {
    Layered::parse(name).is_none()
        && name.split('.').any(|part| VOCABULARY.contains(&part))
        && !name.contains("norm")
        && !name.contains("position")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_split_at_their_layer() {
        let split = |name| Layered::parse(name).map(|l| (l.stack, l.layer, l.rest));
        assert_eq!(
            split("model.layers.12.self_attn.q_proj.weight"),
            Some(("model.layers.", 12, ".self_attn.q_proj.weight"))
        );
        assert_eq!(split("h.0.attn.c_attn.weight"), Some(("h.", 0, ".attn.c_attn.weight")));
        assert_eq!(
            split("bert.encoder.layer.3.output.dense.bias"),
            Some(("bert.encoder.layer.", 3, ".output.dense.bias"))
        );
        // An expert's number is not its layer's.
        assert_eq!(split("model.layers.1.mlp.experts.7.up_proj.weight").map(|l| l.1), Some(1));
        for name in ["model.embed_tokens.weight", "lm_head.weight", "layers.x.w", "score.0.weight"]
        {
            assert_eq!(split(name), None, "{name}");
        }
        assert_eq!(Layered::parse("h.3.w").unwrap().at(10), "h.10.w");
    }

    #[test]
    fn stacks_are_counted_apart() {
        let names =
            ["encoder.block.0.a", "encoder.block.3.a", "decoder.block.1.a", "shared.weight"];
        let counts = count(names.into_iter());
        assert_eq!(
            counts.into_iter().collect::<Vec<_>>(),
            [("decoder.block.", 2), ("encoder.block.", 4)]
        );
    }

    #[test]
    fn embeddings_come_before_the_layers_and_heads_after() {
        for name in ["model.embed_tokens.weight", "transformer.wte.weight", "wpe.weight"] {
            assert!(is_before(name), "{name}");
        }
        for name in ["model.norm.weight", "lm_head.weight", "transformer.ln_f.bias"] {
            assert!(!is_before(name), "{name}");
        }
        for name in ["lm_head.weight", "model.embed_tokens.weight", "cls.predictions.decoder.bias"]
        {
            assert!(is_vocabulary(name), "{name}");
        }
        for name in ["wpe.weight", "bert.embeddings.LayerNorm.weight", "model.norm.weight"] {
            assert!(!is_vocabulary(name), "{name}");
        }
    }
}
