//! Grafts: the search follows the paper's formula, goes on where it stopped, and what it finds is an
//! adapter like any other.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use retune_core::batch::{Batch, Document};
use retune_core::change::Changes;
use retune_core::model::{Model, Tuned};
use retune_core::parameters::Parameters;
use retune_core::random::Seed;
use retune_core::spec::Role;
use retune_core::weights::{Stored, Weights};
use retune_evaluate::answers::Answers;
use retune_methods::adapter::Adapter;
use retune_run::export::merged;
use retune_run::graft::pair::{Bench, Pair};
use retune_run::graft::search::{BaseMask, Found, Settings, Task, search};
use retune_run::graft::sparse::{adapter, compose, overlaps, region};
use retune_run::graft::{Keep, Region};
use retune_testkit::golden;
use retune_testkit::open::weights;
use retune_testkit::tiny::MemorySource;
use retune_train::backprop::Backprop;
use tensor::Device;

fn open() -> (Box<dyn Model>, Weights) {
    let base = golden::folder("training/llama/base");
    let checkpoint = retune_models::open(&base).unwrap();
    let weights = weights(Arc::clone(&checkpoint.source), checkpoint.model.spec());
    (checkpoint.model, weights)
}

/// A model whose weights in blocks moved by noise, more so in the first block.
fn tuned(model: &dyn Model, base: &Weights, seed: u64) -> Weights {
    let mut source = MemorySource::default();
    for weight in &base.spec().weights {
        let mut values = base.values(&weight.name).unwrap();
        if let Some(layer) = weight.layer {
            let mut noise = vec![0.0; values.len()];
            let deviation = if layer == 0 { 0.1 } else { 0.03 };
            Seed(seed).stream(&weight.name, &[]).fill_normal(&mut noise, deviation);
            values.iter_mut().zip(noise).for_each(|(value, noise)| *value += noise);
        }
        source.insert(&weight.name, &weight.shape, values);
    }
    weights(Arc::new(source), model.spec())
}

fn batches() -> Vec<Batch> {
    let document = |seed: u64| {
        let mut random = Seed(seed).stream("document", &[]);
        let tokens: Vec<u32> = (0..12).map(|_| random.below(128) as u32).collect();
        Document { learn: vec![true; 12], tokens, row: seed as usize, ..Document::default() }
    };
    vec![Batch::new(&[document(1), document(2), document(3)]).unwrap()]
}

fn settings(num_steps: u64) -> Settings {
    Settings {
        base: BaseMask::Movement(0.01),
        flips: 0.02,
        num_steps,
        seed: Seed(9),
        ..Settings::default()
    }
}

/// Searches with the negative loss as the judge, and stops after `stops` steps.
fn run(pair: &Pair<'_>, settings: &Settings, keep: Option<&Keep>, stops: u64) -> Found {
    let batches = batches();
    let mut judge =
        |tuned: &Tuned<'_>| Ok(-retune_evaluate::validation::validate(tuned, &batches)?.loss);
    let task = Task {
        batches: &mut |_| Ok(batches.clone()),
        judge: &mut judge,
        watch: &mut |step| {
            if step.step >= stops { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        },
    };
    search(pair, settings, keep, task).unwrap()
}

#[test]
fn one_step_moves_the_entries_the_papers_formula_says() {
    let (model, base) = open();
    let tuned = tuned(&*model, &base, 1);
    let pair = Pair::new(&*model, &base, &tuned).unwrap();
    let settings = settings(1);
    let found = run(&pair, &settings, None, 9);

    // γ + (1 - 2γ) σ(S - c), with S the same draws; the gradient of the loss at these weights.
    let count = (0.01 * pair.num_entries() as f64).floor() as usize;
    let movement = pair.most_moved(count).unwrap();
    assert_eq!(movement.len(), count);
    let scores: Vec<Vec<f64>> = pair
        .weights()
        .iter()
        .map(|weight| {
            let mut random = Seed(9).stream(&format!("graft scores {}", weight.name), &[]);
            (0..weight.count()).map(|_| random.uniform()).collect()
        })
        .collect();
    let gamma = |weight: usize, entry: usize| {
        movement.of(&pair.weights()[weight].name).binary_search(&(entry as u32)).is_ok()
    };
    let sigma = |score: f64| 1.0 / (1.0 + (-(score - 10.0)).exp());
    let soft = |weight: usize, entry: usize, score: f64| {
        if gamma(weight, entry) { 1.0 - sigma(score) } else { sigma(score) }
    };
    let mut bench = Bench::new(&pair).unwrap();
    bench.mix(|weight, entry| soft(weight, entry, scores[weight][entry]) as f32).unwrap();
    let learner = Backprop { seed: Seed(9), recompute: false };
    let step = learner.step(&bench.tuned(), &batches(), 0).unwrap();
    assert!((step.loss - found.steps[0].loss).abs() < 1e-5);
    let mut flipped = 0;
    for (place, weight) in pair.weights().iter().enumerate() {
        let id = bench.tuned().parameters.find(&weight.name).unwrap();
        let gradient = step.gradients[id.index()].as_ref().unwrap();
        let delta = pair.delta(weight).unwrap();
        for entry in 0..weight.count() {
            let score = scores[place][entry];
            let slope = sigma(score) * (1.0 - sigma(score));
            let sign = if gamma(place, entry) { -1.0 } else { 1.0 };
            let d = f64::from(gradient[entry]) * f64::from(delta[entry]) * sign * slope;
            let after = soft(place, entry, score - found.learning_rate * d);
            let inside = found.region.of(&weight.name).binary_search(&(entry as u32)).is_ok();
            // An entry within rounding of the border may fall on either side.
            if (after - 0.5).abs() > 1e-3 {
                assert_eq!(inside, after > 0.5, "{} entry {entry}: {after}", weight.name);
            }
            flipped += usize::from(inside != gamma(place, entry));
        }
    }
    let wanted = (0.02 * pair.num_entries() as f64).ceil() as usize;
    assert!(flipped.abs_diff(wanted) <= 1, "{flipped} of {wanted}");
}

#[test]
fn an_interrupted_search_ends_as_one_that_was_not() {
    let (model, base) = open();
    let tuned = tuned(&*model, &base, 1);
    let pair = Pair::new(&*model, &base, &tuned).unwrap();
    let home = tempfile::tempdir().unwrap();
    let keep =
        |identity: &str| Keep { path: home.path().join("search"), identity: identity.to_owned() };
    let whole = run(&pair, &settings(5), None, 9);
    assert_eq!(whole.steps.len(), 5);
    assert!(whole.steps[4].loss < whole.steps[0].loss, "{:?}", whole.steps);
    run(&pair, &settings(5), Some(&keep("work")), 2);
    assert_eq!(run(&pair, &settings(5), Some(&keep("work")), 9), whole);
    // Finished, it is read and not done again; of other work nothing is taken.
    assert_eq!(run(&pair, &settings(5), Some(&keep("work")), 0), whole);
    let other = run(&pair, &settings(5), Some(&keep("other work")), 1);
    assert_eq!(other.steps.len(), 1);
    // A damaged file says so.
    let bytes = std::fs::read(home.path().join("search")).unwrap();
    std::fs::write(home.path().join("search"), &bytes[..bytes.len() / 2]).unwrap();
    let batches = batches();
    let task = Task {
        batches: &mut |_| Ok(batches.clone()),
        judge: &mut |_| Ok(0.0),
        watch: &mut |_| ControlFlow::Continue(()),
    };
    assert!(search(&pair, &settings(5), Some(&keep("work")), task).is_err());
}

#[test]
fn the_budget_is_hard_and_keeps_the_surest_entries() {
    let (model, base) = open();
    let tuned = tuned(&*model, &base, 1);
    let pair = Pair::new(&*model, &base, &tuned).unwrap();
    let all = run(&pair, &settings(2), None, 9).region;
    let found = run(&pair, &Settings { budget: Some(50), ..settings(2) }, None, 9);
    let few = &found.region;
    assert_eq!(few.len(), 50);
    assert_eq!(few.shared(&all), 50);
    // What is judged is what would be returned.
    assert!(found.steps.iter().all(|step| step.num_entries == 50), "{:?}", found.steps);
}

#[test]
fn a_search_never_ends_below_the_mask_it_starts_from() {
    let (model, base) = open();
    let tuned = tuned(&*model, &base, 1);
    let pair = Pair::new(&*model, &base, &tuned).unwrap();
    let batches = batches();
    let task = Task {
        batches: &mut |_| Ok(batches.clone()),
        judge: &mut |_| Ok(0.5),
        watch: &mut |_| ControlFlow::Continue(()),
    };
    let found = search(&pair, &settings(2), None, task).unwrap();
    let count = (0.01 * pair.num_entries() as f64).floor() as usize;
    assert_eq!((found.step, found.score), (0, 0.5));
    assert_eq!(found.region, pair.most_moved(count).unwrap());
}

fn every_weight(
    model: &dyn Model,
    base: &Weights,
    adapter: &Adapter,
) -> BTreeMap<String, Vec<f32>> {
    let mut parameters = Parameters::new(&Device::flex());
    let method = adapter.method().unwrap();
    let changes = method.attach(base, &mut parameters, Seed(0)).unwrap();
    adapter.fill(Path::new("graft"), &mut parameters).unwrap();
    let tuned = Tuned { model, weights: base, changes: &changes, parameters: &parameters };
    let weights = base.spec().weights.iter();
    weights.map(|w| (w.name.clone(), merged(&tuned, w).unwrap())).collect()
}

#[test]
fn a_graft_is_written_read_merged_and_added_to_another() {
    let (model, base) = open();
    let home = tempfile::tempdir().unwrap();
    let models = [tuned(&*model, &base, 1), tuned(&*model, &base, 2)];
    let mut grafts = Vec::new();
    for (number, tuned) in models.iter().enumerate() {
        let pair = Pair::new(&*model, &base, tuned).unwrap();
        assert!(pair.left_behind().unwrap().is_empty());
        let entries = pair.random(3000, Seed(number as u64));
        let path = home.path().join(format!("graft-{number}"));
        adapter(&pair, &entries, None).unwrap().write(&path, "card").unwrap();
        let read = Adapter::read(&path).unwrap();
        assert_eq!(region(&path, &read, &pair).unwrap(), entries);
        let merged = every_weight(&*model, &base, &read);
        for weight in &base.spec().weights {
            let mut expected = base.values(&weight.name).unwrap();
            let after = tuned.values(&weight.name).unwrap();
            for entry in entries.of(&weight.name) {
                let entry = *entry as usize;
                expected[entry] += after[entry] - expected[entry];
            }
            assert_eq!(merged[&weight.name], expected, "{}", weight.name);
        }
        grafts.push((path, read, entries));
    }
    let list: Vec<(&Path, &Adapter)> =
        grafts.iter().map(|(path, read, _)| (path.as_path(), read)).collect();
    let shares = overlaps(&list).unwrap();
    let both = grafts[0].2.shared(&grafts[1].2);
    assert!(both > 0);
    assert_eq!(shares.counts, [3000, 3000]);
    assert!((shares.shares[0][1] - both as f64 / 3000.0).abs() < 1e-12);
    assert_eq!((shares.shares[0][0], shares.shares[1][1]), (1.0, 1.0));

    let sum = compose(&list).unwrap();
    let path = home.path().join("both");
    sum.write(&path, "card").unwrap();
    let found = every_weight(&*model, &base, &Adapter::read(&path).unwrap());
    let [first, second] = [0, 1].map(|i: usize| every_weight(&*model, &base, &grafts[i].1));
    for weight in &base.spec().weights {
        let before = base.values(&weight.name).unwrap();
        for (entry, value) in found[&weight.name].iter().enumerate() {
            let (a, b) = (first[&weight.name][entry], second[&weight.name][entry]);
            let expected = a + b - before[entry];
            assert!((value - expected).abs() < 1e-6, "{} {entry}", weight.name);
        }
    }
    // The region of a graft serves as the start of another search.
    let pair = Pair::new(&*model, &base, &models[0]).unwrap();
    let given = BaseMask::Given(grafts[0].2.clone());
    let tiny = Settings { base: given, learning_rate: Some(1e-9), ..settings(1) };
    assert_eq!(run(&pair, &tiny, None, 9).region, grafts[0].2);
}

#[test]
fn answers_of_base_and_tuned_model_are_the_ends_of_the_bench() {
    let (model, base) = open();
    let tuned = tuned(&*model, &base, 1);
    let pair = Pair::new(&*model, &base, &tuned).unwrap();
    let mut bench = Bench::new(&pair).unwrap();
    let plain = |weights: &Weights| {
        let (changes, parameters) = (Changes::default(), Parameters::new(&Device::flex()));
        let tuned = Tuned { model: &*model, weights, changes: &changes, parameters: &parameters };
        Answers::of(&tuned, &batches()).unwrap()
    };
    bench.graft(&Region::default()).unwrap();
    assert_eq!(Answers::of(&bench.tuned(), &batches()).unwrap(), plain(&base));
    bench.mix(|_, _| 1.0).unwrap();
    let (found, expected) = (Answers::of(&bench.tuned(), &batches()).unwrap(), plain(&tuned));
    assert_eq!(found.found, expected.found);
    for (a, b) in found.confidences.iter().zip(&expected.confidences) {
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }
}

/// Copies a model's weights, with one of them changed.
fn with(base: &Weights, name: &str, change: impl Fn(&mut Vec<f32>)) -> MemorySource {
    let mut source = MemorySource::default();
    for weight in &base.spec().weights {
        let Stored::Values(mut values) = base.source().read(&weight.name).unwrap() else {
            unreachable!("plain values")
        };
        if weight.name == name {
            change(&mut values);
        }
        source.insert(&weight.name, &weight.shape, values);
    }
    source
}

#[test]
fn models_that_do_not_belong_together_are_refused() {
    let (model, base) = open();
    let refused = |tuned: &Weights, what: &str| {
        let error = Pair::new(&*model, &base, tuned).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    refused(&base, "nothing to graft");
    let name = "model.layers.1.mlp.up_proj.weight";
    let nan = with(&base, name, |values| values[3] = f32::NAN);
    refused(&weights(Arc::new(nan), model.spec()), "index 3");
    // Only an embedding moved: that is no part of a graft.
    let embedding = base.spec().weights.iter().find(|w| w.role == Role::Embedding).unwrap();
    let moved = with(&base, &embedding.name, |values| values[0] += 1.0);
    refused(&weights(Arc::new(moved), model.spec()), "nothing to graft");
    let qwen = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/golden/training/qwen2/base");
    let other = retune_models::open(&qwen).unwrap();
    refused(
        &weights(Arc::clone(&other.source), other.model.spec()),
        "does not belong to this base",
    );
}

#[test]
fn impossible_settings_and_adapters_are_refused() {
    let (model, base) = open();
    let tuned = tuned(&*model, &base, 1);
    let pair = Pair::new(&*model, &base, &tuned).unwrap();
    let usual = settings(1);
    let elsewhere = Region(BTreeMap::from([("lm_head.weight".to_owned(), vec![1])]));
    let beyond = Region(BTreeMap::from([(pair.weights()[0].name.clone(), vec![u32::MAX])]));
    for wrong in [
        Settings { base: BaseMask::Movement(1.5), ..usual.clone() },
        Settings { base: BaseMask::Random(f64::NAN), ..usual.clone() },
        Settings { base: BaseMask::Given(elsewhere), ..usual.clone() },
        Settings { base: BaseMask::Given(beyond), ..usual.clone() },
        Settings { bias: 0.5, ..usual.clone() },
        Settings { num_steps: 0, ..usual.clone() },
        Settings { budget: Some(0), ..usual.clone() },
        Settings { learning_rate: Some(0.0), ..usual.clone() },
        Settings { flips: 0.0, ..usual.clone() },
    ] {
        let task = Task {
            batches: &mut |_| Ok(batches()),
            judge: &mut |_| Ok(0.0),
            watch: &mut |_| ControlFlow::Continue(()),
        };
        assert!(search(&pair, &wrong, None, task).is_err(), "{wrong:?}");
    }
    let lora = golden("lora");
    let adapter = Adapter::read(&lora).unwrap();
    for refused in [
        overlaps(&[(&lora, &adapter)]).map(drop).unwrap_err(),
        compose(&[(&lora, &adapter)]).map(drop).unwrap_err(),
        region(&lora, &adapter, &pair).map(drop).unwrap_err(),
    ] {
        assert!(refused.to_string().contains("no entries"), "{refused}");
    }
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/golden/peft").join(name)
}
