//! GGUF files: read as a checkpoint under the names of the Hugging Face classes, and written.
//!
//! llama.cpp stores some families differently from their library classes. What is undone on
//! reading and done again on writing is listed once, in `Arch`.

mod adapter;
mod config;
mod names;
mod source;
mod tokenizer;
mod write;

pub use adapter::{AdapterPair, write_adapter};
pub use config::read_config;
pub use source::GgufSource;
pub use tokenizer::GgufTokenizer;
pub use write::write_model;

use retune_core::spec::{Kind, ModelSpec, Role, WeightSpec};

/// How llama.cpp stores one architecture.
#[derive(Debug)]
pub(crate) struct Arch {
    /// `general.architecture`, also what the architecture's keys begin with.
    pub(crate) name: &'static str,
    /// The Hugging Face `model_type`.
    pub(crate) model_type: &'static str,
    /// The Hugging Face class.
    pub(crate) class: &'static str,
    /// Whether the rows of q and k are interleaved: within each head, row `2i + j` is the class's
    /// row `j · d/2 + i`.
    pub(crate) interleaved: bool,
    /// Whether norms are stored as the gain itself where the class stores `gain - 1`.
    pub(crate) whole_gains: bool,
    /// Whether norms stand behind the sub-layers too.
    pub(crate) norms_behind: bool,
}

const ARCHS: &[Arch] = &[
    Arch {
        name: "llama",
        model_type: "llama",
        class: "LlamaForCausalLM",
        interleaved: true,
        whole_gains: false,
        norms_behind: false,
    },
    Arch {
        name: "qwen2",
        model_type: "qwen2",
        class: "Qwen2ForCausalLM",
        interleaved: false,
        whole_gains: false,
        norms_behind: false,
    },
    Arch {
        name: "qwen3",
        model_type: "qwen3",
        class: "Qwen3ForCausalLM",
        interleaved: false,
        whole_gains: false,
        norms_behind: false,
    },
    Arch {
        name: "gemma2",
        model_type: "gemma2",
        class: "Gemma2ForCausalLM",
        interleaved: false,
        whole_gains: true,
        norms_behind: true,
    },
    Arch {
        name: "gemma3",
        model_type: "gemma3_text",
        class: "Gemma3ForCausalLM",
        interleaved: false,
        whole_gains: true,
        norms_behind: true,
    },
];

impl Arch {
    /// Finds an architecture by `general.architecture`.
    pub(crate) fn named(name: &str) -> Option<&'static Self> {
        ARCHS.iter().find(|arch| arch.name == name)
    }

    /// Finds the architecture a model is written as.
    pub(crate) fn of(spec: &ModelSpec) -> Option<&'static Self> {
        // llama.cpp reads Mistral as llama.
        let wanted = if spec.architecture == "mistral" { "llama" } else { &spec.architecture };
        ARCHS.iter().find(|arch| arch.model_type == wanted)
    }

    /// Returns the heads whose rows are interleaved, if this weight's are.
    pub(crate) fn heads(&self, weight: &WeightSpec, spec: &ModelSpec) -> Option<usize> {
        match weight.role {
            Role::Query if self.interleaved => Some(spec.num_heads),
            Role::Key if self.interleaved => Some(spec.num_key_heads),
            _ => None,
        }
    }

    /// Returns what is added to a weight's values when it is stored.
    pub(crate) fn offset(&self, weight: &WeightSpec) -> f32 {
        if self.whole_gains && weight.kind == Kind::Norm { 1.0 } else { 0.0 }
    }

    /// Lists the architectures for messages.
    pub(crate) fn list() -> String {
        ARCHS.iter().map(|arch| arch.name).collect::<Vec<_>>().join(", ")
    }
}

/// Returns, for each row of the class's order, its place among the interleaved rows.
///
/// `rows` is a multiple of `2 · heads`.
fn interleaved_rows(rows: usize, heads: usize) -> impl Iterator<Item = usize> {
    let width = rows / heads;
    (0..rows).map(move |row| {
        let (head, inside) = (row / width, row % width);
        let (j, i) = (inside / (width / 2), inside % (width / 2));
        head * width + 2 * i + j
    })
}

/// Puts interleaved rows of `row_bytes` each into the class's order.
pub(crate) fn untangle<T: Copy>(stored: &[T], rows: usize, heads: usize) -> Vec<T> {
    let width = stored.len() / rows.max(1);
    let mut out = Vec::with_capacity(stored.len());
    for place in interleaved_rows(rows, heads) {
        out.extend_from_slice(&stored[place * width..(place + 1) * width]);
    }
    out
}

/// Puts rows of the class's order where llama.cpp has them.
pub(crate) fn tangle<T: Copy>(values: &[T], rows: usize, heads: usize) -> Vec<T> {
    let width = values.len() / rows.max(1);
    let mut out = values.to_vec();
    for (row, place) in interleaved_rows(rows, heads).enumerate() {
        out[place * width..(place + 1) * width]
            .copy_from_slice(&values[row * width..(row + 1) * width]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_put_back_as_the_class_has_them() {
        // Two heads of width 4: the halves (0 1)(2 3) of a head are stored as 0 2 1 3.
        let stored = [0, 2, 1, 3, 4, 6, 5, 7];
        assert_eq!(untangle(&stored, 8, 2), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(tangle(&[0, 1, 2, 3, 4, 5, 6, 7], 8, 2), stored);
        // Rows of two values each, one head.
        assert_eq!(untangle(&[0, 0, 2, 2, 1, 1, 3, 3], 4, 1), [0, 0, 1, 1, 2, 2, 3, 3]);
    }
}
