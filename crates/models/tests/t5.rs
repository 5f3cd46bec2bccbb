//! T5 gives transformers' logits, whole and piece by piece over a cache, and refuses rows of one side.

#![expect(clippy::unwrap_used, reason = "a test fails where a helper of it cannot go on")]

use std::ops::Range;
use std::sync::Arc;

use retune_core::batch::{Batch, Document};
use retune_core::change::Changes;
use retune_core::model::{Output, Tuned};
use retune_core::parameters::{Parameters, to_vec};
use retune_core::pass::KeyValueCache;
use retune_core::weights::{Packing, Weights};
use retune_models::Checkpoint;
use retune_testkit::golden::{Tensors, assert_close, folder};
use tensor::Device;

const CASES: [&str; 2] = ["t5", "t5_gated"];
const TOLERANCE: f32 = 2e-5;

/// Both sides of each row, and where the decoder's begins.
fn rows(expected: &Tensors) -> Vec<(Vec<u32>, usize)> {
    let width = expected.shape("decoder_input_ids")[1];
    let decoder = expected.integers("decoder_input_ids");
    expected
        .rows()
        .documents()
        .into_iter()
        .zip(decoder.chunks(width))
        .map(|(document, decoder)| {
            let source = document.tokens.len();
            let mut tokens = document.tokens;
            tokens.extend(decoder.iter().map(|id| *id as u32));
            (tokens, source)
        })
        .collect()
}

fn piece(tokens: &[u32], start: usize) -> Batch {
    let learn = vec![false; tokens.len()];
    let document = Document { tokens: tokens.to_vec(), learn, ..Document::default() };
    let mut batch = Batch::new(&[document]).unwrap();
    batch.positions.iter_mut().for_each(|position| *position += start);
    batch
}

fn logits(
    tuned: &Tuned<'_>,
    batch: &Batch,
    wanted: Range<usize>,
    cache: Option<&mut KeyValueCache>,
) -> Vec<f32> {
    let wanted: Vec<usize> = wanted.collect();
    tuned
        .evaluate(batch, cache, |pass, output| {
            let Output::States(states) = output else { unreachable!("a language model") };
            Ok(to_vec(pass.logits(&states, &wanted)?.inner()))
        })
        .unwrap()
}

fn with(case: &str, check: impl FnOnce(&Tuned<'_>, &Tensors)) {
    let base = folder("families").join(case);
    let Checkpoint { model, source, mut unused, .. } = retune_models::open(&base).unwrap();
    // Copies of the shared embedding.
    unused.retain(|name| !name.ends_with(".embed_tokens.weight"));
    assert_eq!(unused, Vec::<String>::new());
    let device = Device::flex();
    let weights =
        Weights::new(source, Arc::clone(model.spec()), Packing::default(), &device).unwrap();
    let (changes, parameters) = (Changes::default(), Parameters::new(&device));
    let tuned =
        Tuned { model: &*model, weights: &weights, changes: &changes, parameters: &parameters };
    check(&tuned, &Tensors::at(&base.join("expected.safetensors")));
}

#[test]
fn logits_are_those_of_transformers_one_by_one_and_packed() {
    for case in CASES {
        with(case, |tuned, expected| {
            let values = expected.floats("logits");
            let rows = rows(expected);
            let mut alone = Vec::new();
            for (tokens, source) in &rows {
                let batch = piece(tokens, 0);
                alone.extend(logits(tuned, &batch, *source..tokens.len(), None));
            }
            assert_close(&format!("{case} logits"), &alone, &values, TOLERANCE);

            let documents: Vec<Document> = rows
                .iter()
                .map(|(tokens, _)| Document {
                    tokens: tokens.clone(),
                    learn: vec![false; tokens.len()],
                    ..Document::default()
                })
                .collect();
            let batch = Batch::new(&documents).unwrap();
            let all = logits(tuned, &batch, 0..batch.num_tokens(), None);
            let size = tuned.model.spec().vocabulary;
            let packed: Vec<f32> = batch
                .spans
                .iter()
                .zip(&rows)
                .flat_map(|(span, (_, source))| {
                    all[(span.start + source) * size..span.end * size].to_vec()
                })
                .collect();
            assert_close(&format!("{case} packed"), &packed, &values, TOLERANCE);
        });
    }
}

#[test]
fn pieces_over_a_cache_give_the_logits_of_the_whole() {
    for case in CASES {
        with(case, |tuned, expected| {
            let values = expected.floats("logits");
            let (tokens, source) = rows(expected).swap_remove(1);
            let per_row = values.len() / 3;
            let mut cache = KeyValueCache::default();
            let mut found = Vec::new();
            let mut done = 0;
            // The source and the start token, then one token, then three, then the rest.
            for end in [source + 1, source + 2, source + 5, tokens.len()] {
                let batch = piece(&tokens[done..end], done);
                let first = source.saturating_sub(done);
                found.extend(logits(tuned, &batch, first..end - done, Some(&mut cache)));
                done = end;
            }
            assert_close(case, &found, &values[per_row..2 * per_row], TOLERANCE);
        });
    }
}

#[test]
fn a_row_of_one_side_is_refused() {
    with("t5", |tuned, _| {
        let refused = |tokens: &[u32]| {
            let batch = piece(tokens, 0);
            tuned.evaluate(&batch, None, |_, _| Ok(())).unwrap_err().to_string()
        };
        assert!(refused(&[5, 6, 7]).contains("no start token"));
        assert!(refused(&[0, 6, 7]).contains("nothing before the start token"));
    });
}
