//! What the survey says every method must answer: start, merge, counts, optimiser state.

use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;

use retune_core::batch::{Batch, Document};
use retune_core::change::Changes;
use retune_core::event::Silent;
use retune_core::model::{Model, Output, Tuned};
use retune_core::parameters::{Parameters, to_vec};
use retune_core::random::Seed;
use retune_core::weights::{Packing, Weights};
use retune_files::safetensors::SafetensorsFile;
use retune_methods::registry::{self, Plugin};
use retune_models::config::Config;
use retune_train::checkpoint;
use retune_train::optimizer::AdamW;
use retune_train::training::{BatchSource, Training};
use serde_json::json;
use tensor::Device;

use crate::lab::{Held, Pace, Values, method, walk};
use crate::{Claim, Clock, Proof, Prove, Result};

/// The claim.
pub(crate) const CLAIM: Claim = Claim {
    number: 14,
    name: "what each method answers",
    source: "Han, Gao, Liu, Zhang and Zhang, Parameter-Efficient Fine-Tuning for Large Models: A \
             Comprehensive Survey, 2024, arXiv 2403.14608",
    claims: "Methods that begin at zero change nothing before the first step; those that change \
             weights are merged without a trace; each trains as many values as its formula says, \
             and the optimiser keeps state for these alone.",
    run: "Every method of the registry with the first of its examples, on a random llama-shaped \
          model of 2 blocks and width 16, tuned for 5 steps of AdamW at 1e-2 on random texts. The \
          survey's times and its copy task are not part of this proof.",
    quick: true,
    prove: Prove::Alone(prove),
};

/// What one method answered.
struct Answer {
    name: &'static str,
    trained: usize,
    /// The most that trained at once, those frozen on the way included.
    most: usize,
    planned: usize,
    start: f64,
    promised: bool,
    merged: Option<f64>,
    state_bytes: usize,
    /// What the state must be: two moments a value, and a count of its updates where values come
    /// and go.
    expected_bytes: usize,
}

fn prove(_clock: Clock) -> Result<Proof> {
    let mut proof = Proof::default();
    let mut answers = Vec::new();
    for plugin in registry::METHODS {
        match answer(plugin)? {
            Some(answer) => answers.push(answer),
            None => proof.notes.push(format!("`{}` does not take this model.", plugin.card.name)),
        }
    }
    proof.figures.push_str(
        "| method | values that train | difference at the start | difference when merged | bytes of \
         state |\n|---|---|---|---|---|\n",
    );
    for a in &answers {
        let merged =
            a.merged.map_or_else(|| "does not merge".to_owned(), |gap| format!("{gap:.1e}"));
        let _ = writeln!(
            proof.figures,
            "| {} | {} | {:.1e}{} | {merged} | {} |",
            a.name,
            a.trained,
            a.start,
            if a.promised { "" } else { " (not claimed)" },
            a.state_bytes
        );
    }
    let names = |wrong: &dyn Fn(&Answer) -> bool| -> Vec<&str> {
        answers.iter().filter(|a| wrong(a)).map(|a| a.name).collect()
    };
    let mut assert = |says: &str, wrong: Vec<&str>| {
        let found = match wrong.len() {
            0 => format!("all of {}", answers.len()),
            _ => format!("not {}", wrong.join(", ")),
        };
        proof.assert(says, found, wrong.is_empty());
    };
    assert(
        "logits before the first step are the base's within 1e-5, where that is claimed",
        names(&|a| a.promised && a.start >= 1e-5),
    );
    assert(
        "logits after merging are the tuned model's within 1e-4, where there is something to merge",
        names(&|a| a.merged.is_some_and(|gap| gap >= 1e-4)),
    );
    assert(
        "the most values that train at once, those frozen on the way included, are exactly as many as \
         planned",
        names(&|a| a.most != a.planned),
    );
    assert(
        "AdamW's state is 8 bytes per trained value, and 4 for the number of its updates where values \
         come and go: to the byte",
        names(&|a| a.state_bytes != a.expected_bytes),
    );
    Ok(proof)
}

fn config() -> Config {
    let value = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32,
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": false,
    });
    Config::new(Path::new("config.json"), value)
}

/// Random texts, two a step.
struct Texts;

impl BatchSource for Texts {
    fn micro_batches(&mut self, step: u64) -> retune_train::Result<Vec<Batch>> {
        let text = |row: u64| {
            let mut random = Seed(2).stream("text", &[step, row]);
            let tokens: Vec<u32> = (0..12).map(|_| random.below(32) as u32).collect();
            let learn = (0..12).map(|place| place > 0).collect();
            Document { tokens, learn, row: row as usize, ..Document::default() }
        };
        Ok(vec![Batch::new(&[text(0), text(1)])?])
    }

    fn epoch(&self, steps: u64) -> f64 {
        steps as f64
    }
}

fn answer(plugin: &'static Plugin) -> Result<Option<Answer>> {
    let model = retune_models::build(&config())?;
    let spec = Arc::clone(model.spec());
    let name = plugin.card.name;
    let example = method(name, "").map_or("", |m| m.examples().first().copied().unwrap_or(""));
    let tuning = method(name, example)?;
    let promises = tuning.promises();
    let Ok(plan) = tuning.plan(&spec) else { return Ok(None) };
    let values = Held::draw(&spec, Seed(1));
    let weights = open(&*model, values.clone())?;
    let probe = Texts.micro_batches(99)?.remove(0);
    let (none, empty) = (Changes::default(), Parameters::new(weights.device()));
    let base = Tuned { model: &*model, weights: &weights, changes: &none, parameters: &empty };
    let before = logits(&base, &probe)?;

    let folder = tempfile::tempdir()?;
    let pace = Pace::steps(5, 2, 1e-2);
    let optimizer = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 };
    let walk = walk(pace, Seed(1), folder.path());
    let mut training = Training::new(&*model, &weights, tuning, Box::new(optimizer), walk)?;
    let trains_at_first = training.parameters.num_trainable();
    let start = gap(&logits(&training.tuned(), &probe)?, &before);
    training.walk(&mut Texts, None, &mut Silent)?;
    let tuned = training.tuned();
    let after = logits(&tuned, &probe)?;
    let mergeable = tuned.changes.unmergeable().is_none()
        && tuned.changes.changed_weights().all(|name| spec.weight(name).is_some());
    let merged = if mergeable {
        let merged: retune_core::Result<Values> = spec
            .weights
            .iter()
            .map(|weight| Ok((weight.name.clone(), retune_run::export::merged(&tuned, weight)?)))
            .collect();
        let weights = open(&*model, merged?)?;
        let merged = Tuned { weights: &weights, ..base };
        Some(gap(&logits(&merged, &probe)?, &after))
    } else {
        None
    };
    let file = checkpoint::folder(folder.path(), 5).join("optimizer.safetensors");
    let file = SafetensorsFile::open(file)?;
    let state_bytes = file.tensors().map(|tensor| tensor.bytes.len()).sum();
    let parameters = &training.parameters;
    let trains = parameters.iter().filter(|(_, p)| p.trains && !p.moved_by_method);
    let expected_bytes = trains.map(|(_, p)| p.count() * if p.counts_ages { 12 } else { 8 }).sum();
    // A pool is shared out over sparse parameters; what does not train of it has trained before.
    let was_trained = parameters
        .iter()
        .filter(|(id, p)| plan.is_pooled() && !p.trains && parameters.support(*id).is_some());
    let frozen: usize = was_trained.map(|(_, p)| p.count()).sum();
    Ok(Some(Answer {
        name,
        trained: parameters.num_trainable(),
        // A method may begin with everything and keep a few, or begin with none and let them in.
        most: trains_at_first.max(parameters.num_trainable() + frozen),
        planned: plan.num_trainable(),
        start,
        promised: promises.starts_at_base,
        merged,
        state_bytes,
        expected_bytes,
    }))
}

fn open(model: &dyn Model, values: Values) -> Result<Weights> {
    let spec = model.spec();
    let source = Arc::new(Held::new(spec, values));
    Ok(Weights::new(source, Arc::clone(spec), Packing::default(), &Device::flex())?)
}

fn logits(tuned: &Tuned<'_>, batch: &Batch) -> Result<Vec<f32>> {
    let rows: Vec<usize> = (0..batch.num_tokens()).collect();
    Ok(tuned.evaluate(batch, None, |pass, output| match output {
        Output::States(states) => Ok(to_vec(pass.logits(&states, &rows)?.inner())),
        Output::Classes(rows) | Output::Embeddings(rows) => Ok(to_vec(rows.inner())),
        Output::Pairs(pairs) => Ok(to_vec(pairs.similarities().inner())),
    })?)
}

/// Returns the largest difference.
fn gap(a: &[f32], b: &[f32]) -> f64 {
    let gaps = a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs()));
    gaps.fold(0.0, f64::max)
}
