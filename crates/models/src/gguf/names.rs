//! The names of llama.cpp against those of the Hugging Face classes.

use super::Arch;

/// Inside a block: the class's module, llama.cpp's.
const BLOCK: &[(&str, &str)] = &[
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// With norms before the sub-layers only.
const BEFORE: &[(&str, &str)] = &[("post_attention_layernorm", "ffn_norm")];

/// With norms behind the sub-layers too.
const BEHIND: &[(&str, &str)] = &[
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];

impl Arch {
    fn pairs(&self) -> impl Iterator<Item = &'static (&'static str, &'static str)> {
        BLOCK.iter().chain(if self.norms_behind { BEHIND } else { BEFORE })
    }

    /// Returns what llama.cpp calls a weight of the class.
    pub(crate) fn stored_name(&self, name: &str) -> Option<String> {
        let (module, part) = name.rsplit_once('.')?;
        if module == "lm_head" {
            return Some(format!("output.{part}"));
        }
        let inside = module.strip_prefix("model.").unwrap_or(module);
        let stored = match inside {
            "embed_tokens" => "token_embd".to_owned(),
            "norm" => "output_norm".to_owned(),
            _ => {
                let (layer, module) = inside.strip_prefix("layers.")?.split_once('.')?;
                let (_, stored) = self.pairs().find(|(class, _)| *class == module)?;
                format!("blk.{layer}.{stored}")
            }
        };
        Some(format!("{stored}.{part}"))
    }

    /// Returns what the class calls a tensor of llama.cpp; `prefix` stands before its body's names.
    pub(crate) fn class_name(&self, stored: &str, prefix: &str) -> Option<String> {
        let (module, part) = stored.rsplit_once('.')?;
        let class = match module {
            "output" => return Some(format!("lm_head.{part}")),
            "token_embd" => "embed_tokens".to_owned(),
            "output_norm" => "norm".to_owned(),
            _ => {
                let (layer, module) = module.strip_prefix("blk.")?.split_once('.')?;
                let (class, _) = self.pairs().find(|(_, stored)| *stored == module)?;
                format!("layers.{layer}.{class}")
            }
        };
        Some(format!("{prefix}{class}.{part}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        let arch = Arch::named("gemma3").unwrap();
        for (class, stored) in [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("lm_head.weight", "output.weight"),
            ("model.norm.weight", "output_norm.weight"),
            ("model.layers.12.self_attn.q_norm.weight", "blk.12.attn_q_norm.weight"),
            ("model.layers.0.post_attention_layernorm.weight", "blk.0.post_attention_norm.weight"),
            ("model.layers.0.mlp.down_proj.bias", "blk.0.ffn_down.bias"),
        ] {
            assert_eq!(arch.stored_name(class).as_deref(), Some(stored));
            assert_eq!(arch.class_name(stored, "model.").as_deref(), Some(class));
        }
        let llama = Arch::named("llama").unwrap();
        let name = "model.layers.3.post_attention_layernorm.weight";
        assert_eq!(llama.stored_name(name).as_deref(), Some("blk.3.ffn_norm.weight"));
        assert_eq!(llama.class_name("rope_freqs.weight", "model."), None);
    }
}
