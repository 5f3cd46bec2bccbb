//! One training step, and twenty, against the numbers of torch, transformers and PEFT.
//!
//! The pack in `testkit/golden/training` says what was computed and which tolerances are demanded;
//! every element of every tensor is compared.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use retune_core::batch::{Batch, Document};
use retune_core::change::{Changes, Mode};
use retune_core::event::Event;
use retune_core::kernels::matrix::{Arithmetic, Form};
use retune_core::method::Method;
use retune_core::model::{Model, Output, Tuned};
use retune_core::parameters::{Parameters, to_vec};
use retune_core::pass::Pass;
use retune_core::random::Seed;
use retune_core::spec::Head;
use retune_core::weights::{Packing, Weights};
use retune_files::safetensors::SafetensorsFile;
use retune_methods::adapter::Adapter;
use retune_methods::full::Full;
use retune_train::backprop::Backprop;
use retune_train::optimizer::AdamW;
use retune_train::schedule::{Schedule, Shape};
use retune_train::training::{BatchSource, Training, Walk};
use serde_json::Value;
use tensor::Device;

fn pack() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/golden/training")
}

/// A case: the model and its frozen weights.
struct Case {
    folder: PathBuf,
    model: Box<dyn Model>,
    weights: Weights,
    expected: Value,
}

impl Case {
    fn open(name: &str) -> Self {
        Self::open_as(name, Packing::default())
    }

    fn open_as(name: &str, packing: Packing) -> Self {
        let folder = pack().join(name);
        let checkpoint = retune_models::open(&folder.join("base")).unwrap();
        let model = checkpoint.model;
        let weights =
            Weights::new(checkpoint.source, Arc::clone(model.spec()), packing, &Device::flex())
                .unwrap();
        let text = std::fs::read_to_string(folder.join("expected.json")).unwrap();
        Self { folder, model, weights, expected: serde_json::from_str(&text).unwrap() }
    }

    /// The method of a run, and for adapters the values before training.
    fn method(&self, run: &str) -> (Box<dyn Method>, Option<Adapter>) {
        if run == "full" {
            return (Box::<Full>::default(), None);
        }
        let adapter = Adapter::read(&self.folder.join(run)).unwrap();
        (adapter.method().unwrap(), Some(adapter))
    }
}

/// Reads one batch; `step` picks one of those in `train_batches`.
fn batch(file: &SafetensorsFile, step: Option<usize>, head: &Head) -> Batch {
    let read = |name: &str| {
        let view = file.get(name)?;
        let values = view.to_i64().unwrap();
        let shape = view.shape.to_vec();
        Some(match step {
            None => (values, shape),
            Some(step) => {
                let size: usize = shape[1..].iter().product();
                (values[step * size..(step + 1) * size].to_vec(), shape[1..].to_vec())
            }
        })
    };
    let (ids, shape) = read("input_ids").unwrap();
    let (mask, _) = read("attention_mask").unwrap();
    let (labels, _) = read("labels").unwrap();
    let types = read("token_type_ids").map(|(values, _)| values);
    let [rows, length] = shape[..] else { panic!("{shape:?}") };
    let documents: Vec<Document> = (0..rows)
        .map(|row| {
            // Padding is on the right in this pack.
            let kept = (0..length).filter(|t| mask[row * length + t] == 1).count();
            let of =
                |values: &[i64]| -> Vec<i64> { values[row * length..row * length + kept].to_vec() };
            let language = matches!(head, Head::Language { .. });
            Document {
                pixels: Vec::new(),
                tokens: of(&ids).iter().map(|id| *id as u32).collect(),
                learn: if language {
                    of(&labels).iter().map(|label| *label >= 0).collect()
                } else {
                    vec![false; kept]
                },
                token_types: types.as_ref().map(|t| of(t).iter().map(|x| *x as u32).collect()),
                class: (!language).then(|| labels[row] as u32),
                task: None,
                row,
            }
        })
        .collect();
    Batch::new(&documents).unwrap()
}

struct TwentySteps {
    batches: Vec<Batch>,
}

impl BatchSource for TwentySteps {
    fn micro_batches(&mut self, step: u64) -> retune_train::Result<Vec<Batch>> {
        Ok(vec![self.batches[step as usize].clone()])
    }

    fn epoch(&self, steps: u64) -> f64 {
        steps as f64 / 20.0
    }
}

fn check(what: &str, found: &[f32], expected: &[f32], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}: number of values");
    for (index, (f, e)) in found.iter().zip(expected).enumerate() {
        let gap = f64::from(f - e).abs();
        assert!(gap <= tolerance, "{what}[{index}]: {f}, expected {e}, {gap:e} > {tolerance:e}");
    }
}

fn largest(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(v.abs())).fold(0.0, f64::max)
}

fn attach(case: &Case, run: &str) -> (Box<dyn Method>, Changes, Parameters) {
    let (method, adapter) = case.method(run);
    let mut parameters = Parameters::new(&Device::flex());
    let changes = method.attach(&case.weights, &mut parameters, Seed(1)).unwrap();
    if let Some(adapter) = adapter {
        adapter.fill(&case.folder, &mut parameters).unwrap();
    }
    (method, changes, parameters)
}

/// Logits, loss and every gradient of the fixed batch.
fn one_step(name: &str, run: &str, recompute: bool) {
    let case = Case::open(name);
    let (_, changes, parameters) = attach(&case, run);
    let head = &case.model.spec().head;
    let file = SafetensorsFile::open(case.folder.join("batch.safetensors")).unwrap();
    let fixed = batch(&file, None, head);
    let want = SafetensorsFile::open(case.folder.join(run).join("expected.safetensors")).unwrap();

    let mut pass = Pass::new(&case.weights, &changes, &parameters, &fixed, Mode::Evaluate).unwrap();
    let found = match case.model.forward(&mut pass).unwrap() {
        Output::States(states) => {
            let rows: Vec<usize> = (0..fixed.num_tokens()).collect();
            to_vec(pass.logits(&states, &rows).unwrap().inner())
        }
        Output::Classes(logits) => to_vec(logits.inner()),
        Output::Embeddings(_) | Output::Pairs(_) => panic!("no case embeds"),
    };
    let logits = want.tensor("logits").unwrap();
    let width = *logits.shape.last().unwrap();
    let mask = file.tensor("attention_mask").unwrap().to_i64().unwrap();
    let all = logits.to_f32().unwrap();
    let expected: Vec<f32> = if logits.shape.len() == 3 {
        let kept = all.chunks(width).zip(&mask).filter(|(_, m)| **m == 1);
        kept.flat_map(|(row, _)| row.iter().copied()).collect()
    } else {
        all
    };
    check(&format!("{name}/{run} logits"), &found, &expected, 2e-5);

    let tuned = Tuned {
        model: case.model.as_ref(),
        weights: &case.weights,
        changes: &changes,
        parameters: &parameters,
    };
    let learner = Backprop { seed: Seed(1), recompute };
    let result = learner.step(&tuned, std::slice::from_ref(&fixed), 0).unwrap();
    let loss = case.expected["runs"][run]["loss"].as_f64().unwrap();
    assert!((result.loss - loss).abs() <= 5e-6, "{name}/{run} loss {} != {loss}", result.loss);

    let gradient = |name: &str| want.tensor(&format!("grad.{name}")).unwrap().to_f32().unwrap();
    let names: Vec<String> = parameters.iter().map(|(_, p)| p.name.clone()).collect();
    let top = names.iter().map(|name| largest(&gradient(name))).fold(0.0, f64::max);
    for ((_, parameter), found) in parameters.iter().zip(&result.gradients) {
        let expected = gradient(&parameter.name);
        let tolerance = (1e-4 * largest(&expected)).max(1e-6 * top);
        let found = found.clone().unwrap_or_else(|| vec![0.0; expected.len()]);
        check(&format!("{name}/{run} grad {}", parameter.name), &found, &expected, tolerance);
    }
    let in_file = want.names().filter(|name| name.starts_with("grad.")).count();
    assert_eq!(in_file, names.len(), "{name}/{run}: parameters with a gradient");
}

/// Takes twenty AdamW steps with clipping; returns losses and gradient norms too.
fn walk_twenty<'a>(case: &'a Case, run: &str) -> (Training<'a>, Vec<(f64, f64)>) {
    let (method, adapter) = case.method(run);
    let head = &case.model.spec().head;
    let file = SafetensorsFile::open(case.folder.join("train_batches.safetensors")).unwrap();
    let mut source =
        TwentySteps { batches: (0..20).map(|step| batch(&file, Some(step), head)).collect() };
    let checkpoints = tempfile::tempdir().unwrap();
    let walk = Walk {
        num_steps: 20,
        schedule: Schedule {
            shape: Shape::Constant,
            peak: 1e-3,
            floor_frac: 0.0,
            warmup_steps: 0,
            decay_frac: 0.0,
            num_steps: 20,
        },
        clip: 1.0,
        evaluate_every: 0,
        save_every: 0,
        keep_last: 1,
        patience: 0,
        seed: Seed(1),
        recompute: false,
        plan: "golden".to_owned(),
        checkpoints: checkpoints.path().to_path_buf(),
    };
    let optimizer = Box::new(AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 });
    let mut training =
        Training::new(case.model.as_ref(), &case.weights, method, optimizer, walk).unwrap();
    if let Some(adapter) = adapter {
        adapter.fill(&case.folder, &mut training.parameters).unwrap();
    }
    let mut events: Vec<Event> = Vec::new();
    training.walk(&mut source, None, &mut events).unwrap();

    let done: Vec<(f64, f64)> = events
        .iter()
        .filter_map(|event| match event {
            Event::StepDone { loss, gradient_norm, .. } => Some((*loss, *gradient_norm)),
            _ => None,
        })
        .collect();
    assert_eq!(done.len(), 20);
    (training, done)
}

fn series(expected: &Value, key: &str) -> Vec<f64> {
    expected[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

/// In bf16, as far as the processor has it, every loss stays within one percent.
#[test]
fn bf16_stays_near_for_twenty_steps() {
    let bf16 = Packing { form: Form::Bf16, keep_blocks: false, arithmetic: Arithmetic::Bf16 };
    for (name, run) in [("llama", "lora"), ("llama", "full"), ("qwen2", "lora"), ("bert", "full")] {
        let case = Case::open_as(name, bf16);
        let (_, done) = walk_twenty(&case, run);
        let losses = series(&case.expected["runs"][run], "losses");
        for (step, ((loss, _), expected)) in done.iter().zip(losses).enumerate() {
            let gap = (loss - expected).abs() / expected;
            assert!(gap <= 1e-2, "{name}/{run} step {}: {loss}, f32 {expected}", step + 1);
        }
    }
}

/// Losses, gradient norms and values of twenty steps.
fn twenty_steps(name: &str, run: &str) {
    let case = Case::open(name);
    let (training, done) = walk_twenty(&case, run);
    let expected = &case.expected["runs"][run];
    for (step, ((loss, norm), (e_loss, e_norm))) in done
        .iter()
        .zip(series(expected, "losses").iter().zip(series(expected, "grad_norms")))
        .enumerate()
    {
        let step = step + 1;
        assert!((loss - e_loss).abs() <= 1e-5, "{name}/{run} step {step}: loss {loss} != {e_loss}");
        let gap = (norm - e_norm).abs() / e_norm;
        assert!(gap <= 1e-4, "{name}/{run} step {step}: norm {norm} != {e_norm}");
    }
    let after = SafetensorsFile::open(case.folder.join(run).join("after20.safetensors")).unwrap();
    let loose: BTreeMap<String, Value> =
        serde_json::from_value(expected["not_comparable_after20"].clone()).unwrap_or_default();
    let allowed = if run == "full" { 1e-2 } else { 1e-3 };
    for (id, parameter) in training.parameters.iter() {
        // A bias added to all keys has a true gradient of zero: Adam moves it by rounding noise.
        if loose.contains_key(&parameter.name) {
            continue;
        }
        let expected = after.tensor(&parameter.name).unwrap().to_f32().unwrap();
        let found = training.parameters.values(id);
        let tolerance = allowed * largest(&expected);
        check(&format!("{name}/{run} after20 {}", parameter.name), &found, &expected, tolerance);
    }
}

macro_rules! cases {
    ($($test:ident: $name:literal / $run:literal;)*) => {$(
        mod $test {
            #[test]
            fn logits_loss_and_gradients() {
                super::one_step($name, $run, false);
            }

            #[test]
            fn recomputing_layers_changes_nothing() {
                super::one_step($name, $run, true);
            }

            #[test]
            fn twenty_steps() {
                super::twenty_steps($name, $run);
            }
        }
    )*};
}

cases! {
    llama_full: "llama" / "full";
    llama_lora: "llama" / "lora";
    llama_dora: "llama" / "dora";
    qwen2_full: "qwen2" / "full";
    qwen2_lora: "qwen2" / "lora";
    gemma3_full: "gemma3" / "full";
    gemma3_lora: "gemma3" / "lora";
    bert_full: "bert" / "full";
    bert_lora: "bert" / "lora";
}
