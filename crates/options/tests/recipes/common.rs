//! A recipe with every kind of option, shared by the tests.

use retune_options::{
    Bytes, OneOrMany, Options, Pattern, Patterns, Portion, Reader, above, choice, options,
};
use std::{collections::BTreeMap, path::PathBuf, time::Duration};

choice! {
    /// How the learning rate moves.
    pub enum Schedule {
        /// Falls as half a cosine.
        Cosine = "cosine",
        /// Falls in a straight line.
        Linear = "linear",
        /// Stays as it is.
        Constant = "constant",
    }
}

options! {
    /// Low-rank update of chosen weights.
    pub struct LoraOptions("lora", validate = check_lora) {
        /// Rank of the update.
        rank: usize = 8, in 1..=4096, also "r" | "lora_r";
        /// Scale of the update; the update is
        /// multiplied by `alpha / rank`.
        alpha: f64 = 16.0, in above(0.0), also "lora_alpha";
        /// Share of the inputs that is dropped.
        dropout: f64 = 0.0, in 0.0..1.0;
        /// Which weights are tuned.
        targets: OneOrMany<String> = OneOrMany(vec!["all-linear".to_owned()]);
        /// Rank by weight.
        rank_pattern: Patterns<usize>, in 1..=4096;
        /// Name of the adapter.
        name: Option<String>;
    }
}

fn check_lora(lora: &LoraOptions, reader: &mut Reader<'_>) {
    if lora.rank > 64 && lora.dropout == 0.0 {
        reader.error("rank", "a rank above 64 needs dropout", "set `dropout`");
    }
}

options! {
    /// One every kind.
    pub struct Everything("everything") {
        /// Where the base model comes from.
        model: String;
        /// A boolean.
        flag: bool = true;
        /// The seed.
        seed: u64 = 0;
        /// Signed.
        offset: i64 = -3;
        /// Narrow.
        small: f32 = 0.1;
        /// Output folder.
        folder: PathBuf = PathBuf::from("runs");
        /// How the learning rate moves.
        schedule: Schedule = Schedule::Linear;
        /// Betas of the optimiser.
        betas: Vec<f64> = vec![0.9, 0.999], in 0.0..1.0;
        /// Steps of warm-up.
        warmup: Portion = Portion::Fraction(0.03);
        /// Most memory.
        memory: Bytes = Bytes(4 << 30);
        /// Time limit.
        limit: Option<Duration>;
        /// Weight of each data set.
        mix: BTreeMap<String, f64>, in 0.0..=1.0;
        /// Frozen weights.
        frozen: Option<Pattern>;
        /// The update.
        lora: LoraOptions;
        /// Further updates.
        more: Vec<LoraOptions> = Vec::new();
    }
}

/// Parses and reads, or renders what went wrong.
pub(crate) fn read<T: Options>(text: &str) -> Result<T, String> {
    let document = retune_options::Document::parse("recipe.toml", text);
    let read = document.and_then(|document| document.read(T::read));
    read.map(|(value, _)| value).map_err(|report| report.to_string())
}
