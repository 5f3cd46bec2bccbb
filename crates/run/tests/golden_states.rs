//! Adapters of PEFT that change states: they load, give PEFT's logits and are written again as
//! they were.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::sync::Arc;

use retune_core::batch::Batch;
use retune_core::model::{Output, Tuned};
use retune_core::parameters::{Parameters, to_vec};
use retune_core::random::Seed;
use retune_methods::adapter::Adapter;
use retune_methods::registry;
use retune_options::Document;
use retune_testkit::golden::{Tensors, assert_close, folder};
use retune_testkit::open::weights;
use retune_train::backprop::Backprop;
use tensor::Device;

fn logits(tuned: &Tuned<'_>, batch: &Batch) -> Vec<f32> {
    tuned
        .evaluate(batch, None, |pass, output| {
            let Output::States(states) = output else { panic!("a language model") };
            let rows: Vec<usize> = (0..batch.num_tokens()).collect();
            Ok(to_vec(pass.logits(&states, &rows)?.inner()))
        })
        .unwrap()
}

/// Compares with the logits PEFT has at the words; `extra` positions of the prompt come first.
fn check(case: &str, extra: usize, tasks: Option<Vec<usize>>) {
    let checkpoint = retune_models::open(&folder("peft/base")).unwrap();
    let spec = checkpoint.model.spec();
    let source = Arc::clone(&checkpoint.source);
    let weights = weights(source, spec);
    let path = folder(&format!("peft/{case}"));
    let adapter = Adapter::read(&path).unwrap();
    let method = adapter.method().unwrap();
    let mut parameters = Parameters::new(&Device::flex());
    let changes = method.attach(&weights, &mut parameters, Seed(0)).unwrap();
    adapter.fill(&path, &mut parameters).unwrap();
    let model = &*checkpoint.model;
    let tuned = Tuned { model, weights: &weights, changes: &changes, parameters: &parameters };

    let want = Tensors::open(&format!("peft/{case}/expected.safetensors"));
    let mut batch = want.rows().batch();
    batch.tasks = tasks;
    let [rows, positions, width] = want.shape("logits") else { panic!("three axes") };
    let all = want.floats("logits");
    let row = |row: usize| &all[(row * positions + extra) * width..(row + 1) * positions * width];
    let expected: Vec<f32> = (0..*rows).flat_map(row).copied().collect();
    assert_close(case, &logits(&tuned, &batch), &expected, 1e-5);

    let collected = Adapter::collect(&*method, spec, &parameters, None).unwrap();
    assert_eq!(collected.config, adapter.config);
    assert_eq!(collected.tensors, adapter.tensors);
    assert!(changes.unmergeable().is_some());
}

#[test]
fn prompt_tuning() {
    check("prompt_tuning", 5, None);
}

#[test]
fn p_tuning() {
    check("p_tuning", 5, None);
}

#[test]
fn multitask_prompt_tuning() {
    check("mpt", 5, Some(vec![0, 1]));
}

#[test]
fn prefix_tuning() {
    check("prefix_tuning", 0, None);
}

#[test]
fn adaption_prompt() {
    check("adaption_prompt", 0, None);
}

#[test]
fn poly() {
    check("poly", 0, Some(vec![0, 1]));
}

#[test]
fn lily() {
    check("lily", 0, None);
}

/// Without the second task, its row must come out differently: the tasks are really read.
#[test]
#[should_panic(expected = "mpt[")]
fn tasks_matter() {
    check("mpt", 5, Some(vec![0, 0]));
}

/// Answers of the context are learned beside those of the data, the less the further they are.
#[test]
fn cpt_learns_from_its_context_as_peft_does() {
    let checkpoint = retune_models::open(&folder("peft/base")).unwrap();
    let spec = checkpoint.model.spec();
    let source = Arc::clone(&checkpoint.source);
    let weights = weights(source, spec);
    let want = Tensors::open("cpt/expected.safetensors");
    let mut documents = want.rows().documents();
    for document in &mut documents {
        document.learn = (0..document.tokens.len()).map(|place| place > 0).collect();
    }
    let batch = Batch::new(&documents).unwrap();
    for (kind, factor) in [("none", 1.0), ("decay", 0.7)] {
        let options = format!(
            "context = [5, 17, 9, 33, 60, 8, 21, 90, 14, 77]\nkinds = [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]\n\
             weighted_loss = '{kind}'\nloss_decay = {factor:?}"
        );
        let document = Document::parse("options", &options).unwrap();
        let plugin = registry::find("cpt").unwrap();
        let (method, _) = document.read(|reader| (plugin.read)(reader)).unwrap();
        let mut parameters = Parameters::new(&Device::flex());
        let changes = method.attach(&weights, &mut parameters, Seed(0)).unwrap();
        let shift = parameters.find("delta_embedding").unwrap();
        parameters.set(shift, want.floats("delta")).unwrap();
        let model = &*checkpoint.model;
        let tuned = Tuned { model, weights: &weights, changes: &changes, parameters: &parameters };
        let learner = Backprop { seed: Seed(0), recompute: false };
        let found = learner.step(&tuned, std::slice::from_ref(&batch), 0).unwrap();
        let loss = [found.loss as f32];
        assert_close(&format!("{kind} loss"), &loss, &want.floats(&format!("{kind}.loss")), 1e-5);
        let gradient = found.gradients[shift.index()].as_deref().unwrap();
        let expected = want.floats(&format!("{kind}.gradient"));
        assert_close(&format!("{kind} gradient"), gradient, &expected, 1e-5);
    }
}
