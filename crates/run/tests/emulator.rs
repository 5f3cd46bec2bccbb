//! A model whose blocks run more than once: the same numbers as one with the blocks written out,
//! stored once, with a slot of the cache for each place.
#![expect(clippy::unwrap_used, reason = "a test fails where a helper of it cannot go on")]

use std::path::Path;
use std::sync::Arc;

use retune_core::batch::{Batch, Document};
use retune_core::change::Changes;
use retune_core::kernels::Spans;
use retune_core::method::Method;
use retune_core::model::{Model, Output, Tuned};
use retune_core::parameters::{Parameters, to_vec};
use retune_core::pass::KeyValueCache;
use retune_core::random::Seed;
use retune_core::weights::{Stored, WeightSource, Weights};
use retune_methods::lora::{Lora, LoraOptions};
use retune_models::Emulator;
use retune_models::config::Config;
use retune_testkit::golden::assert_close;
use retune_testkit::open::weights;
use retune_testkit::tiny::{MemorySource, configs};
use serde_json::{Value, json};
use tensor::Device;

/// Which of two stored blocks runs at each of five places; each is itself at the place in `OWN`.
const ORDER: [usize; 5] = [0, 0, 1, 1, 1];
const OWN: [usize; 2] = [1, 3];

fn config(layers: usize, more: Value) -> Config {
    let (_, mut config) = configs().into_iter().find(|(name, _)| *name == "llama").unwrap();
    config["num_hidden_layers"] = json!(layers);
    config.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap_or_default());
    Config::new(Path::new("config.json"), config)
}

fn emulated() -> Config {
    config(2, json!({"retune_emulator": {"order": ORDER, "kept": OWN}}))
}

/// Makes the emulator and a model of five blocks that holds the same weights as often as they run.
fn both() -> [(Box<dyn Model>, Weights); 2] {
    let small = retune_models::build(&emulated()).unwrap();
    let source = MemorySource::random(small.spec(), Seed(3));
    let large = retune_models::build(&config(5, json!({}))).unwrap();
    let mut written_out = MemorySource::default();
    for weight in &large.spec().weights {
        let name = match weight.layer {
            Some(place) => {
                weight.name.replace(&format!(".{place}."), &format!(".{}.", ORDER[place]))
            }
            None => weight.name.clone(),
        };
        let Stored::Values(values) = source.read(&name).unwrap() else {
            unreachable!("plain values")
        };
        written_out.insert(&weight.name, &weight.shape, values);
    }
    let (a, b) =
        (weights(Arc::new(source), small.spec()), weights(Arc::new(written_out), large.spec()));
    [(small, a), (large, b)]
}

fn batch(ids: &[u32], start: usize) -> Batch {
    let mut batch = Batch::new(&[Document {
        tokens: ids.to_vec(),
        learn: vec![true; ids.len()],
        ..Document::default()
    }])
    .unwrap();
    batch.positions = (start..start + ids.len()).collect();
    batch.spans = Spans::from_lengths([ids.len()]);
    batch
}

fn logits(
    (model, weights): &(Box<dyn Model>, Weights),
    ids: &[u32],
    start: usize,
    cache: Option<&mut KeyValueCache>,
) -> Vec<f32> {
    let (changes, parameters) = (Changes::default(), Parameters::new(&Device::flex()));
    let tuned = Tuned { model: &**model, weights, changes: &changes, parameters: &parameters };
    logits_of(&tuned, ids, start, cache)
}

fn logits_of(
    tuned: &Tuned<'_>,
    ids: &[u32],
    start: usize,
    cache: Option<&mut KeyValueCache>,
) -> Vec<f32> {
    let rows: Vec<usize> = (0..ids.len()).collect();
    tuned
        .evaluate(&batch(ids, start), cache, |pass, output| {
            let Output::States(states) = output else { unreachable!("a language model") };
            Ok(to_vec(pass.logits(&states, &rows)?.inner()))
        })
        .unwrap()
}

const IDS: [u32; 6] = [3, 17, 8, 29, 1, 12];

#[test]
fn repeated_blocks_give_the_numbers_of_blocks_written_out_and_are_stored_once() {
    let [small, large] = both();
    let expected = logits(&large, &IDS, 0, None);
    assert_eq!(logits(&small, &IDS, 0, None), expected);
    assert_eq!((small.0.depth(), small.0.spec().num_layers), (5, 2));
    // Each matrix is packed once however often its block runs.
    let two = retune_models::build(&config(2, json!({}))).unwrap();
    let source = MemorySource::random(two.spec(), Seed(3));
    let spec = Arc::clone(two.spec());
    let plain = (two, weights(Arc::new(source), &spec));
    logits(&plain, &IDS, 0, None);
    assert_eq!(small.1.resident_bytes(), plain.1.resident_bytes());
    assert!(large.1.resident_bytes() > small.1.resident_bytes());
}

#[test]
fn every_place_has_a_slot_of_the_cache() {
    let [small, large] = both();
    let expected = logits(&large, &IDS, 0, None);
    let mut cache = KeyValueCache::default();
    let mut found = logits(&small, &IDS[..4], 0, Some(&mut cache));
    found.extend(logits(&small, &IDS[4..], 4, Some(&mut cache)));
    assert_close("logits over a cache", &found, &expected, 1e-5);
}

#[test]
fn what_is_tuned_changes_a_block_at_its_own_place_only() {
    let [(small, weights), (large, written_out)] = both();
    let lora = |layers: Vec<usize>| {
        let options = LoraOptions { rank: 2, layers, ..LoraOptions::default() };
        Lora { options, ..Lora::default() }
    };
    let tuned = |model: &dyn Model, weights: &Weights, layers: Vec<usize>| {
        let mut parameters = Parameters::new(&Device::flex());
        let changes = lora(layers).attach(weights, &mut parameters, Seed(1)).unwrap();
        let ids: Vec<_> = parameters.iter().map(|(id, _)| id).collect();
        for (place, id) in ids.into_iter().enumerate() {
            parameters.update(id, |values| {
                Seed(5).stream("factor", &[place as u64]).fill_normal(values, 0.3);
            });
        }
        let tuned = Tuned { model, weights, changes: &changes, parameters: &parameters };
        logits_of(&tuned, &IDS, 0, None)
    };
    // Stored block 1 is itself at place 3, and repeated at 2 and 4.
    let found = tuned(&*small, &weights, vec![1]);
    let expected = tuned(&*large, &written_out, vec![3]);
    assert_close("logits", &found, &expected, 1e-5);
    assert_ne!(found, logits(&(small, weights), &IDS, 0, None));
}

#[test]
fn lists_that_do_not_fit_are_refused() {
    let build = |emulator: Value| {
        let found = retune_models::build(&config(2, json!({"retune_emulator": emulator})));
        found.map(|model| model.depth()).map_err(|error| error.to_string())
    };
    assert_eq!(build(json!({"order": [0, 1], "kept": [0, 1]})), Ok(2));
    for wrong in [
        json!({"order": [0, 2], "kept": [0, 1]}),
        json!({"order": [], "kept": [0, 1]}),
        json!({"order": [0, 1], "kept": [0]}),
        json!({"order": [0, 1], "kept": [1, 0]}),
        json!({"order": [0, 1], "kept": [0, 9]}),
        json!({"order": [0, -1], "kept": [0, 1]}),
        json!({"order": "all", "kept": [0, 1]}),
        json!({}),
        json!(7),
    ] {
        assert!(build(wrong.clone()).is_err(), "{wrong}");
    }
    let t5 = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/golden/families/t5");
    let t5 = retune_models::open(&t5).unwrap().model;
    let own = (0..t5.spec().num_layers).map(Some).collect();
    let order = (0..t5.spec().num_layers).collect();
    assert!(Emulator::new(t5, order, own).unwrap_err().to_string().contains("one stack"));
}
