//! What a run promises: resume to the same bits, accumulation, packing, threads, damaged checkpoints.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use retune_core::batch::{Batch, Document};
use retune_core::event::Event;
use retune_core::method::Method;
use retune_core::model::{Model, Tuned};
use retune_core::parameters::Parameters;
use retune_core::random::Seed;
use retune_core::weights::Weights;
use retune_methods::lora::{Lora, LoraOptions};
use retune_testkit::golden;
use retune_testkit::open::weights;
use retune_train::backprop::{Backprop, StepResult};
use retune_train::checkpoint;
use retune_train::optimizer::{AdamW, Optimizer};
use retune_train::schedule::{Schedule, Shape};
use retune_train::training::{BatchSource, Training, Validation, Walk};
use tensor::Device;

fn base() -> PathBuf {
    golden::folder("training/llama/base")
}

fn open() -> (Box<dyn Model>, Weights) {
    let checkpoint = retune_models::open(&base()).unwrap();
    let weights = weights(Arc::clone(&checkpoint.source), checkpoint.model.spec());
    (checkpoint.model, weights)
}

fn lora(dropout: f64) -> Box<dyn Method> {
    let options = LoraOptions { rank: 4, dropout, ..LoraOptions::default() };
    Box::new(Lora { options, ..Lora::default() })
}

fn document(seed: u64, length: usize) -> Document {
    let mut random = Seed(seed).stream("document", &[]);
    let tokens: Vec<u32> = (0..length).map(|_| random.below(128) as u32).collect();
    let learn = (0..length).map(|t| t > 1).collect();
    Document { tokens, learn, row: seed as usize, ..Document::default() }
}

/// Gives two documents a step, and fails at a step to play the kill.
struct Source {
    fails_at: Option<u64>,
}

impl BatchSource for Source {
    fn micro_batches(&mut self, step: u64) -> retune_train::Result<Vec<Batch>> {
        if self.fails_at == Some(step) {
            return Err(retune_train::Error::Data("killed".into()));
        }
        let documents = [document(step * 2, 9), document(step * 2 + 1, 14)];
        Ok(vec![Batch::new(&documents)?])
    }

    fn epoch(&self, steps: u64) -> f64 {
        steps as f64
    }
}

fn walk(checkpoints: &Path) -> Walk {
    Walk {
        num_steps: 8,
        schedule: Schedule {
            shape: Shape::Cosine,
            peak: 1e-2,
            floor_frac: 0.0,
            warmup_steps: 2,
            decay_frac: 0.0,
            num_steps: 8,
        },
        clip: 1.0,
        evaluate_every: 0,
        save_every: 2,
        keep_last: 3,
        patience: 0,
        seed: Seed(7),
        recompute: false,
        plan: "plan".to_owned(),
        checkpoints: checkpoints.to_path_buf(),
    }
}

fn adamw() -> Box<dyn Optimizer> {
    Box::new(AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 })
}

fn losses(events: &[Event]) -> Vec<(u64, f64)> {
    let of = |event: &Event| match event {
        Event::StepDone { step, loss, .. } => Some((*step, *loss)),
        _ => None,
    };
    events.iter().filter_map(of).collect()
}

fn bits(parameters: &Parameters) -> Vec<u32> {
    parameters.iter().flat_map(|(id, _)| parameters.values(id)).map(f32::to_bits).collect()
}

#[test]
fn a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one() {
    let (model, weights) = open();
    let (whole, cut) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());

    let mut straight =
        Training::new(&*model, &weights, lora(0.1), adamw(), walk(whole.path())).unwrap();
    let mut expected: Vec<Event> = Vec::new();
    straight.walk(&mut Source { fails_at: None }, None, &mut expected).unwrap();

    let mut first = Training::new(&*model, &weights, lora(0.1), adamw(), walk(cut.path())).unwrap();
    let mut events: Vec<Event> = Vec::new();
    first.walk(&mut Source { fails_at: Some(5) }, None, &mut events).unwrap_err();
    drop(first);
    let mut second =
        Training::new(&*model, &weights, lora(0.1), adamw(), walk(cut.path())).unwrap();
    let (step, refused) = second.resume().unwrap();
    assert_eq!((step, refused.len()), (4, 0));
    let mut rest: Vec<Event> = Vec::new();
    second.walk(&mut Source { fails_at: None }, None, &mut rest).unwrap();

    assert_eq!(bits(&straight.parameters), bits(&second.parameters));
    let mut series = losses(&events);
    series.retain(|(number, _)| *number <= step);
    series.extend(losses(&rest));
    assert_eq!(series, losses(&expected));
    let file = |root: &Path, name: &str| std::fs::read(checkpoint::folder(root, 8).join(name));
    for name in ["parameters.safetensors", "optimizer.safetensors"] {
        assert_eq!(file(whole.path(), name).unwrap(), file(cut.path(), name).unwrap(), "{name}");
    }
}

#[test]
fn a_checkpoint_cut_in_half_is_passed_over_and_named() {
    let (model, weights) = open();
    let root = tempfile::tempdir().unwrap();
    let mut training =
        Training::new(&*model, &weights, lora(0.0), adamw(), walk(root.path())).unwrap();
    training.walk(&mut Source { fails_at: None }, None, &mut Vec::<Event>::new()).unwrap();
    let newest = checkpoint::folder(root.path(), 8).join("parameters.safetensors");
    let whole = std::fs::read(&newest).unwrap();
    std::fs::write(&newest, &whole[..whole.len() / 2]).unwrap();
    let (step, refused) = training.resume().unwrap();
    assert_eq!(step, 6);
    assert!(refused.len() == 1 && refused[0].contains("step-00000008"), "{refused:?}");
}

#[test]
fn a_checkpoint_of_another_plan_is_refused() {
    let (model, weights) = open();
    let root = tempfile::tempdir().unwrap();
    let mut training =
        Training::new(&*model, &weights, lora(0.0), adamw(), walk(root.path())).unwrap();
    training.walk(&mut Source { fails_at: None }, None, &mut Vec::<Event>::new()).unwrap();
    let other = Walk { plan: "another".to_owned(), ..walk(root.path()) };
    let mut training = Training::new(&*model, &weights, lora(0.0), adamw(), other).unwrap();
    let error = training.resume().unwrap_err().to_string();
    assert!(error.contains("another plan"), "{error}");
}

/// Finds these losses, one an evaluation.
struct Losses(std::vec::IntoIter<f64>);

impl Validation for Losses {
    fn measure(
        &mut self,
        _tuned: &Tuned<'_>,
    ) -> retune_train::Result<std::collections::BTreeMap<String, f64>> {
        Ok(std::collections::BTreeMap::from([("loss".to_owned(), self.0.next().unwrap())]))
    }
}

#[test]
fn a_loss_that_is_not_a_number_is_never_the_best() {
    let (model, weights) = open();
    let root = tempfile::tempdir().unwrap();
    let walk = Walk { evaluate_every: 2, ..walk(root.path()) };
    let mut training = Training::new(&*model, &weights, lora(0.0), adamw(), walk).unwrap();
    let mut found = Losses(vec![f64::NAN, 3.0, f64::NAN, 4.0].into_iter());
    let mut events = Vec::<Event>::new();
    training.walk(&mut Source { fails_at: None }, Some(&mut found), &mut events).unwrap();
    assert_eq!(training.best(), Some((3.0, 4)));
    assert_eq!(training.take_best().unwrap(), Some(4));
}

fn step(documents: &[Vec<Document>]) -> StepResult {
    let (model, weights) = open();
    let mut parameters = Parameters::new(&Device::flex());
    let changes = lora(0.0).attach(&weights, &mut parameters, Seed(3)).unwrap();
    // B is zero at the start, and with it the gradient of A.
    let ids: Vec<_> = parameters.iter().map(|(id, _)| id).collect();
    for id in ids {
        let mut random = Seed(9).stream("noise", &[id.index() as u64]);
        parameters.update(id, |values| {
            for v in values {
                *v += (random.uniform() as f32 - 0.5) * 0.1;
            }
        });
    }
    let tuned =
        Tuned { model: &*model, weights: &weights, changes: &changes, parameters: &parameters };
    let batches: Vec<Batch> = documents.iter().map(|d| Batch::new(d).unwrap()).collect();
    Backprop { seed: Seed(1), recompute: false }.step(&tuned, &batches, 0).unwrap()
}

fn largest_gap(a: &StepResult, b: &StepResult) -> f64 {
    let values = |result: &StepResult| -> Vec<f32> {
        result.gradients.iter().flatten().flatten().copied().collect()
    };
    let (a, b) = (values(a), values(b));
    assert_eq!(a.len(), b.len());
    let top = a.iter().fold(0.0_f32, |top, v| top.max(v.abs()));
    let gap = a.iter().zip(&b).fold(0.0_f32, |gap, (x, y)| gap.max((x - y).abs()));
    f64::from(gap / top)
}

#[test]
fn eight_accumulated_passes_are_the_undivided_batch() {
    // Rows of unequal length: a mean of means would show (users' item 4).
    let all: Vec<Document> = (0..8).map(|i| document(i, 6 + 3 * i as usize)).collect();
    let whole = step(std::slice::from_ref(&all));
    let parts: Vec<Vec<Document>> = all.into_iter().map(|d| vec![d]).collect();
    let accumulated = step(&parts);
    assert!((whole.loss - accumulated.loss).abs() / whole.loss < 1e-6);
    let gap = largest_gap(&whole, &accumulated);
    assert!(gap < 1e-6, "gradients differ by {gap:e} of the largest");
}

#[test]
fn the_same_bits_on_one_and_two_threads() {
    let all: Vec<Document> = (0..4).map(|i| document(i, 20 + i as usize)).collect();
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| step(std::slice::from_ref(&all)))
    };
    let (one, two) = (on(1), on(2));
    assert_eq!(one.loss.to_bits(), two.loss.to_bits());
    assert_eq!(one.gradients, two.gradients);
}

#[test]
fn a_batch_without_anything_to_learn_is_an_error_that_names_its_rows() {
    let (model, weights) = open();
    let mut parameters = Parameters::new(&Device::flex());
    let changes = lora(0.0).attach(&weights, &mut parameters, Seed(3)).unwrap();
    let mut row = document(17, 5);
    row.learn.fill(false);
    let tuned =
        Tuned { model: &*model, weights: &weights, changes: &changes, parameters: &parameters };
    let error = Backprop { seed: Seed(1), recompute: false }
        .step(&tuned, &[Batch::new(&[row]).unwrap()], 0)
        .unwrap_err();
    assert!(error.to_string().contains("17"), "{error}");
}
