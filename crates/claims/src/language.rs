//! Pretrained language models in proofs, and texts of one style.

use std::sync::Arc;

use retune_core::batch::Document;
use retune_core::model::{Model, Tuned};
use retune_core::random::{Random, Seed};
use retune_core::weights::WeightSource;
use retune_models::Checkpoint;
use retune_run::open::Located;

use crate::lab::Lab;
use crate::{Error, Result, mean};

/// Texts that are measured at a time, so that their states fit into memory.
const AT_ONCE: usize = 16;

/// A model that was found, and texts as its tokens.
#[derive(Debug)]
pub(crate) struct Language {
    checkpoint: Checkpoint,
    documents: Vec<Document>,
}

impl Language {
    /// Opens a model for texts: what stands before, and what is learned.
    ///
    /// # Errors
    /// If the model or its tokenizer cannot be read.
    pub(crate) fn open(located: &Located, texts: &[(String, String)]) -> Result<Self> {
        let tokenizer = located.tokenizer()?;
        let encode = |text: &str, add_special: bool| {
            let encoded = tokenizer.encode(text, add_special).map_err(retune_run::Error::from)?;
            Ok::<Vec<u32>, Error>(encoded.ids)
        };
        let document = |(row, (before, learned)): (usize, &(String, String))| -> Result<Document> {
            let mut tokens = encode(before, true)?;
            let mut learn = vec![false; tokens.len()];
            tokens.extend(encode(learned, false)?);
            learn.resize(tokens.len(), true);
            Ok(Document { tokens, learn, row, ..Document::default() })
        };
        let documents = texts.iter().enumerate().map(document).collect::<Result<_>>()?;
        Ok(Self { checkpoint: retune_models::open(&located.path)?, documents })
    }

    /// Builds the architecture.
    ///
    /// # Errors
    /// If the configuration is damaged.
    pub(crate) fn model(&self) -> Result<Box<dyn Model>> {
        Ok(retune_models::build(&self.checkpoint.config)?)
    }

    /// Makes a lab whose rows are the texts.
    pub(crate) fn lab(&self, model: Box<dyn Model>) -> Lab {
        let source: Arc<dyn WeightSource> = Arc::clone(&self.checkpoint.source);
        Lab::on(Arc::from(model), source, self.documents.clone())
    }

    /// Counts the tokens of rows.
    pub(crate) fn num_tokens(&self, rows: &[usize]) -> usize {
        rows.iter().map(|row| self.documents[*row].tokens.len()).sum()
    }
}

/// Computes the perplexity per token of rows.
///
/// # Errors
/// If the batch does not fit.
pub(crate) fn perplexity(lab: &Lab, tuned: &Tuned<'_>, rows: &[usize]) -> Result<f64> {
    let mut losses = Vec::new();
    for rows in rows.chunks(AT_ONCE) {
        losses.extend(lab.token_losses(tuned, rows)?);
    }
    Ok(mean(&losses).exp())
}

/// Writes entries of a lighthouse's log, learned whole: one style, drawn facts.
pub(crate) fn log_entries(count: usize, seed: Seed) -> Vec<(String, String)> {
    let entry = |number: u64| (String::new(), entry(&mut seed.stream("log", &[number])));
    (0..count as u64).map(entry).collect()
}

/// Draws one of several words.
pub(crate) fn one<'w>(random: &mut Random, words: &[&'w str]) -> &'w str {
    words[random.below(words.len())]
}

fn entry(random: &mut Random) -> String {
    let wind = one(random, &["north", "north-west", "west", "south-west", "south", "east"]);
    let sea = one(random, &["calm", "slight", "moderate", "rough", "very rough", "confused"]);
    let sky = one(random, &["overcast", "clear", "thick with haze", "broken", "dark to the west"]);
    let ship = one(random, &["collier", "trawler", "schooner", "mail steamer", "ketch", "tanker"]);
    let course = one(random, &["inbound", "outbound", "standing off", "under tow", "at anchor"]);
    let work = one(
        random,
        &[
            "Trimmed the wick twice",
            "Painted the gallery rail",
            "Wound the clockwork at the change of watch",
            "Cleaned the lantern panes of salt",
            "Mended the boat's painter",
            "Drew oil for nine nights",
        ],
    );
    let end = one(
        random,
        &[
            "nothing further to remark",
            "the relief boat did not come",
            "one gull struck the glass",
            "the fog signal ran till dawn",
            "the barometer falls slowly",
            "bread for three days left",
        ],
    );
    format!(
        "Keeper's log, day {} of the quarter. Wind {wind}, force {}; sea {sea}, sky {sky}. At {:02}{:02} \
         hours a {ship} passed {course}, bearing {} degrees. {work}. Light exhibited at sunset; {end}.",
        1 + random.below(90),
        1 + random.below(9),
        random.below(24),
        random.below(60),
        random.below(360),
    )
}
