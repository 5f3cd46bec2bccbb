//! HFT: what stays, what is remembered.

use std::collections::BTreeMap;

use crate::common::{adamw, folder, method, open, trained, walk};
use retune_core::spec::Kind;

#[test]
fn the_frozen_half_keeps_its_bits_and_has_no_state() {
    let (model, weights) = open();
    let spec = model.spec();
    let (_guard, root) = folder();
    let hft = method("hft", "redraw_every = 100");
    let plan = hft.plan(spec).unwrap();
    let done = trained((&*model, &weights), hft, adamw(), walk(&root, 3, 1e-2));
    let mut counts: BTreeMap<(Option<usize>, bool), usize> = BTreeMap::new();
    for ((id, parameter), planned) in done.parameters.iter().zip(&plan.parameters) {
        assert_eq!((&parameter.name, parameter.trains), (&planned.name, planned.trains));
        let base = weights.values(&parameter.name).unwrap();
        assert_eq!(done.parameters.values(id) == base, !parameter.trains, "{}", parameter.name);
        let bytes = if parameter.trains { 8 * base.len() } else { 0 };
        assert_eq!(done.optimizer_state()[id.index()].bytes(), bytes);
        let weight = spec.weight(&parameter.name).unwrap();
        if weight.is_linear() && weight.layer.is_some() {
            *counts.entry((weight.layer, parameter.trains)).or_default() += 1;
        }
    }
    // Of 7 matrices a layer trains 2 of attention, and 1 or 2 of the feed-forward network: in half
    // of the layers each.
    let mut trained: Vec<usize> = (0..2).map(|layer| counts[&(Some(layer), true)]).collect();
    trained.sort_unstable();
    assert_eq!(trained, [3, 4]);
}

#[test]
fn a_new_half_forgets_the_state_of_the_old_one() {
    let (model, weights) = open();
    let (_guard, root) = folder();
    let hft = method("hft", "redraw_every = 2\ntrain_embeddings = false\ntrain_head = false");
    let first: Vec<bool> =
        hft.plan(model.spec()).unwrap().parameters.iter().map(|p| p.trains).collect();
    let done = trained((&*model, &weights), hft, adamw(), walk(&root, 3, 1e-2));
    let second: Vec<bool> = done.parameters.iter().map(|(_, p)| p.trains).collect();
    assert_ne!(first, second);
    for ((id, parameter), before) in done.parameters.iter().zip(first) {
        let state = &done.optimizer_state()[id.index()];
        let since = if before == parameter.trains { 0 } else { 2 };
        assert_eq!((state.since, state.bytes() > 0), (since, parameter.trains));
        // What was trained first and frozen since keeps what it learned.
        let moved = done.parameters.values(id) != weights.values(&parameter.name).unwrap();
        assert_eq!(moved, before || parameter.trains, "{}", parameter.name);
    }
}

#[test]
fn each_run_of_a_sequence_draws_another_half() {
    let (model, _) = open();
    let spec = model.spec();
    let trained = |options: &str| -> Vec<String> {
        let plan = method("hft", options).plan(spec).unwrap();
        plan.parameters.into_iter().map(|p| p.name).collect()
    };
    let halves: Vec<Vec<String>> =
        (0..4).map(|stage| trained(&format!("seed = 7\nstage = {stage}"))).collect();
    assert_eq!(halves[0], trained("seed = 7"));
    assert_eq!(halves[3], trained("seed = 7\nstage = 3"));
    for later in 1..4 {
        assert!(halves[..later].iter().all(|half| *half != halves[later]), "{later}");
    }
    // Over four runs nearly everything has its turn: each matrix stays frozen with 1 in 16.
    let linears = || spec.linears().filter(|weight| weight.layer.is_some());
    let turned = linears().filter(|w| halves.iter().any(|half| half.contains(&w.name)));
    assert!(turned.count() > linears().count() * 3 / 4);
}

#[test]
fn without_a_redraw_the_frozen_half_is_not_copied() {
    let (model, _) = open();
    let spec = model.spec();
    for level in ["category", "layer", "model"] {
        let plan = method("hft", &format!("level = \"{level}\"")).plan(spec).unwrap();
        assert!(plan.parameters.iter().all(|p| p.trains));
        let inside = |p: &&retune_core::method::PlannedParameter| {
            let weight = spec.weight(&p.place).unwrap();
            weight.layer.is_some() && weight.kind != Kind::Bias
        };
        let modules = plan.parameters.iter().filter(inside).count();
        // Half of the 9 modules of each of 2 layers, however they are chosen.
        assert_eq!(modules, 9, "{level}");
    }
    for ratio in ["0.0", "1.0"] {
        let hft = method("hft", &format!("ratio = {ratio}"));
        assert!(hft.plan(spec).unwrap_err().to_string().contains("use `full`"));
    }
}
