//! Every family, read piece by piece over a cache, gives the logits of the whole text.

#![expect(clippy::unwrap_used, reason = "a test fails where a helper of it cannot go on")]

use std::path::Path;
use std::sync::Arc;

use retune_core::batch::Batch;
use retune_core::change::Changes;
use retune_core::kernels::Spans;
use retune_core::model::{Model, Output, Tuned};
use retune_core::parameters::{Parameters, to_vec};
use retune_core::pass::KeyValueCache;
use retune_core::random::Seed;
use retune_core::spec::Head;
use retune_core::weights::{Packing, Weights};
use retune_models::config::Config;
use retune_testkit::golden::assert_close;
use retune_testkit::tiny::{MemorySource, configs};
use tensor::Device;

const TOLERANCE: f32 = 1e-5;

/// The ids of one document that were not read yet, and how many were.
type Part<'a> = (&'a [u32], usize);

fn batch(parts: &[Part<'_>]) -> Batch {
    let tokens: Vec<u32> = parts.iter().flat_map(|(ids, _)| ids.iter().copied()).collect();
    Batch {
        spans: Spans::from_lengths(parts.iter().map(|(ids, _)| ids.len())),
        positions: parts.iter().flat_map(|(ids, start)| *start..start + ids.len()).collect(),
        pixels: Vec::new(),
        token_types: None,
        targets: vec![None; tokens.len()],
        classes: vec![None; parts.len()],
        rows: (0..parts.len()).collect(),
        tasks: None,
        tokens,
    }
}

/// Returns the logits of every token, document by document.
fn logits(
    tuned: &Tuned<'_>,
    parts: &[Part<'_>],
    cache: Option<&mut KeyValueCache>,
) -> Vec<Vec<f32>> {
    let batch = batch(parts);
    let rows: Vec<usize> = (0..batch.num_tokens()).collect();
    let values = tuned
        .evaluate(&batch, cache, |pass, output| {
            let Output::States(states) = output else { unreachable!("a language model") };
            Ok(to_vec(pass.logits(&states, &rows)?.inner()))
        })
        .unwrap();
    let width = tuned.model.spec().vocabulary;
    batch.spans.iter().map(|span| values[span.start * width..span.end * width].to_vec()).collect()
}

fn check(name: &str, tuned: &Tuned<'_>) {
    let width = tuned.model.spec().vocabulary;
    let texts: Vec<Vec<u32>> =
        (0..3_u32).map(|i| (0..20 + i).map(|t| (t * (7 + i) + i) % 32).collect()).collect();
    let whole: Vec<Vec<f32>> =
        texts.iter().map(|text| logits(tuned, &[(text, 0)], None).remove(0)).collect();
    let mut cache = KeyValueCache::default();
    let mut done = [0; 3];
    // Which text has how many more tokens read in each pass; a text that is not named any more has
    // left the cache. Pieces are shorter and longer than the windows of 4 tokens.
    let passes: [&[(usize, usize)]; 6] = [
        &[(0, 6), (1, 1)],
        &[(0, 1), (1, 1)],
        &[(0, 5), (1, 2), (2, 9)],
        &[(1, 1), (2, 1)],
        &[(1, 7), (2, 1)],
        &[(2, 11)],
    ];
    let mut held: Vec<usize> = Vec::new();
    for (pass, wanted) in passes.iter().enumerate() {
        let stay: Vec<usize> = (0..held.len())
            .filter(|place| wanted.iter().any(|(text, _)| *text == held[*place]))
            .collect();
        cache.select(&stay);
        held = wanted.iter().map(|(text, _)| *text).collect();
        let parts: Vec<Part<'_>> = wanted
            .iter()
            .map(|(text, count)| (&texts[*text][done[*text]..done[*text] + count], done[*text]))
            .collect();
        let found = logits(tuned, &parts, Some(&mut cache));
        for ((text, count), found) in wanted.iter().zip(found) {
            let expected = &whole[*text][done[*text] * width..(done[*text] + count) * width];
            assert_close(&format!("{name}, pass {pass}, text {text}"), &found, expected, TOLERANCE);
            done[*text] += count;
        }
    }
}

#[test]
fn pieces_give_the_logits_of_the_whole() {
    let mut checked = Vec::new();
    for (name, config) in configs() {
        let config = Config::new(Path::new("config.json"), config);
        let model: Box<dyn Model> = retune_models::build(&config).unwrap();
        let spec = Arc::clone(model.spec());
        if !matches!(spec.head, Head::Language { .. }) {
            continue;
        }
        let device = Device::flex();
        let source = Arc::new(MemorySource::random(&spec, Seed(5)));
        let weights = Weights::new(source, spec, Packing::default(), &device).unwrap();
        let (changes, parameters) = (Changes::default(), Parameters::new(&device));
        let tuned =
            Tuned { model: &*model, weights: &weights, changes: &changes, parameters: &parameters };
        check(name, &tuned);
        checked.push(name);
    }
    assert_eq!(checked.len(), 8, "{checked:?}");
}
