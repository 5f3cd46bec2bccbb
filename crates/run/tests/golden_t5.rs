//! Prompts and prefixes of PEFT on an encoder-decoder: they load, give PEFT's logits, whole and piece by
//! piece, and are written again as they were.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::path::Path;
use std::sync::Arc;

use retune_core::batch::{Batch, Document};
use retune_core::change::Changes;
use retune_core::model::{Output, Tuned};
use retune_core::parameters::{Parameters, to_vec};
use retune_core::pass::KeyValueCache;
use retune_core::random::Seed;
use retune_core::weights::{Packing, Weights};
use retune_methods::adapter::Adapter;
use retune_models::Checkpoint;
use retune_testkit::golden::{Tensors, assert_close, folder};
use serde_json::json;
use tensor::Device;

const TOLERANCE: f32 = 1e-5;

fn base() -> Checkpoint {
    retune_models::open(&folder("peft_t5/base")).unwrap()
}

/// The two rows of the pack, the encoder's tokens before the decoder's, and the length of the former.
fn rows(tensors: &Tensors) -> (Vec<Vec<u32>>, usize) {
    let tokens = |name: &str| {
        let width = tensors.shape(name)[1];
        let all: Vec<u32> = tensors.integers(name).iter().map(|id| *id as u32).collect();
        all.chunks(width).map(<[u32]>::to_vec).collect::<Vec<_>>()
    };
    let (sources, targets) = (tokens("input_ids"), tokens("decoder_input_ids"));
    let length = sources[0].len();
    (sources.into_iter().zip(targets).map(|(s, t)| [s, t].concat()).collect(), length)
}

fn batch(rows: &[Vec<u32>], first: usize, tasks: Option<Vec<usize>>) -> Batch {
    let documents: Vec<Document> = rows
        .iter()
        .map(|tokens| Document {
            tokens: tokens.clone(),
            learn: vec![false; tokens.len()],
            ..Document::default()
        })
        .collect();
    let mut batch = Batch::new(&documents).unwrap();
    batch.positions.iter_mut().for_each(|position| *position += first);
    batch.tasks = tasks;
    batch
}

/// Returns the logits of each row's tokens from `skip` on.
fn logits(
    tuned: &Tuned<'_>,
    batch: &Batch,
    skip: usize,
    cache: Option<&mut KeyValueCache>,
) -> Vec<f32> {
    let wanted: Vec<usize> =
        batch.spans.iter().flat_map(|span| span.start + skip..span.end).collect();
    tuned
        .evaluate(batch, cache, |pass, output| {
            let Output::States(states) = output else { panic!("a language model") };
            Ok(to_vec(pass.logits(&states, &wanted)?.inner()))
        })
        .unwrap()
}

fn with(path: &Path, check: impl FnOnce(&Tuned<'_>, &Adapter)) {
    let checkpoint = base();
    let spec = checkpoint.model.spec();
    let source = Arc::clone(&checkpoint.source);
    let weights =
        Weights::new(source, Arc::clone(spec), Packing::default(), &Device::flex()).unwrap();
    let adapter = Adapter::read(path).unwrap();
    let method = adapter.method().unwrap();
    let mut parameters = Parameters::new(&Device::flex());
    let changes: Changes = method.attach(&weights, &mut parameters, Seed(0)).unwrap();
    adapter.fill(path, &mut parameters).unwrap();
    let model = &*checkpoint.model;
    check(
        &Tuned { model, weights: &weights, changes: &changes, parameters: &parameters },
        &adapter,
    );
    let collected = Adapter::collect(&*method, spec, &parameters, None).unwrap();
    assert_eq!(collected.config, adapter.config);
    assert_eq!(collected.tensors, adapter.tensors);
}

fn check(case: &str, tasks: Option<&[usize]>) {
    with(&folder(&format!("peft_t5/{case}")), |tuned, _| {
        let expected = Tensors::open("peft_t5/expected.safetensors");
        let (rows, source) = rows(&expected);
        let tasks = |count: usize| tasks.map(|tasks| tasks[..count].to_vec());
        let found = logits(tuned, &batch(&rows, 0, tasks(2)), source, None);
        let values = expected.floats(case);
        assert_close(case, &found, &values, TOLERANCE);

        // The encoder's side and the start token, then one token, then the rest.
        let mut cache = KeyValueCache::default();
        let (mut found, mut done) = (Vec::new(), 0);
        for end in [source + 1, source + 2, rows[0].len()] {
            let piece = batch(&[rows[0][done..end].to_vec()], done, tasks(1));
            found.extend(logits(tuned, &piece, source.saturating_sub(done), Some(&mut cache)));
            done = end;
        }
        assert_close(&format!("{case}, in pieces"), &found, &values[..values.len() / 2], TOLERANCE);
    });
}

#[test]
fn a_prompt_before_the_encoders_input() {
    check("prompt_tuning_one", None);
}

#[test]
fn rows_for_the_decoder_that_peft_never_reads_are_dropped() {
    check("prompt_tuning", None);
    let adapter = Adapter::read(&folder("peft_t5/prompt_tuning")).unwrap();
    assert_eq!(adapter.tensors["prompt_embeddings"].0, [3, 16]);
    assert_eq!(adapter.config["num_transformer_submodules"], json!(1));
}

#[test]
fn p_tuning() {
    check("p_tuning", None);
}

#[test]
fn multitask_prompt_tuning() {
    check("mpt_one", Some(&[0, 1]));
}

#[test]
fn keys_before_the_decoders_text() {
    check("prefix_tuning", None);
}

#[test]
fn lora() {
    check("lora", None);
}

/// Without the adapter the logits are others: a check that ignored it would fail.
#[test]
#[should_panic(expected = "prefix_tuning[")]
fn the_adapter_matters() {
    let checkpoint = base();
    let source = Arc::clone(&checkpoint.source);
    let spec = Arc::clone(checkpoint.model.spec());
    let weights = Weights::new(source, spec, Packing::default(), &Device::flex()).unwrap();
    let (changes, parameters) = (Changes::default(), Parameters::new(&Device::flex()));
    let model = &*checkpoint.model;
    let tuned = Tuned { model, weights: &weights, changes: &changes, parameters: &parameters };
    let expected = Tensors::open("peft_t5/expected.safetensors");
    let (rows, source) = rows(&expected);
    let found = logits(&tuned, &batch(&rows, 0, None), source, None);
    assert_close("base", &found, &expected.floats("base"), TOLERANCE);
    assert_close("prefix_tuning", &found, &expected.floats("prefix_tuning"), TOLERANCE);
}

#[test]
fn a_prefix_for_one_stack_of_blocks_is_refused() {
    let path = folder("peft_t5/prefix_tuning");
    let mut adapter = Adapter::read(&path).unwrap();
    adapter.config["num_transformer_submodules"] = json!(1);
    let error = adapter.method().unwrap().plan(base().model.spec()).unwrap_err().to_string();
    assert!(error.contains("for 1 stacks of blocks"), "{error}");
}
