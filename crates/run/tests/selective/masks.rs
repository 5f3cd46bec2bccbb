//! SaRA, LT-SFT and ID³: which entries, from where, and what of the rest.

use std::collections::BTreeMap;

use crate::common::{adamw, dense_gradients, entries, folder, method, open, sgd, trained, walk};
use retune_core::change::{Mode, Scope};
use retune_core::model::Tuned;
use retune_core::parameters::to_vec;
use retune_core::weights::Weights;

/// Returns every changed weight with its base, by name.
fn changed(tuned: &Tuned<'_>, weights: &Weights) -> BTreeMap<String, (Vec<f32>, Vec<f32>)> {
    let scope = Scope::new(tuned.parameters, Mode::Evaluate);
    let of = |name: &str| {
        let now = to_vec(tuned.changes.materialize(name, weights, &scope).unwrap());
        (name.to_owned(), (now, weights.values(name).unwrap()))
    };
    tuned.changes.changed_weights().map(of).collect()
}

#[test]
fn sara_moves_the_smallest_tenth_and_freezes_what_grew() {
    let (model, weights) = open();
    let (_guard, root) = folder();
    let run = |steps, options: &str| {
        trained((&*model, &weights), method("sara", options), adamw(), walk(&root, steps, 3e-3))
    };
    let options = "fraction = 0.1\nswitch = 0.0\nrank_weight = 0.0";
    let done = run(4, options);
    let all = changed(&done.tuned(), &weights);
    let total: usize = all.values().map(|(_, base)| base.len()).sum();
    let mut moved = Vec::new();
    let mut stayed = f32::INFINITY;
    for (now, base) in all.values() {
        for (now, base) in now.iter().zip(base) {
            if now == base {
                stayed = stayed.min(base.abs());
            } else {
                moved.push(base.abs());
            }
        }
    }
    let budget = (0.1 * total as f64).round() as usize;
    assert_eq!(done.parameters.num_trainable(), budget);
    assert!(moved.len() <= budget && moved.len() > budget * 9 / 10, "{}", moved.len());
    assert!(moved.iter().all(|size| *size <= stayed));
    let bytes: usize =
        done.optimizer_state().iter().map(retune_core::method::ParameterState::bytes).sum();
    assert_eq!(bytes, 8 * budget);

    // With the switch after step 2: what has grown past the threshold stands still from there.
    let (two, four) = (run(2, options), run(4, &options.replace("0.0\nrank", "0.5\nrank")));
    let (two, frozen) = (changed(&two.tuned(), &weights), entries(&four.parameters));
    let end = changed(&four.tuned(), &weights);
    let mut still = 0;
    for (name, places) in frozen.iter().filter(|(name, _)| name.contains(".frozen.")) {
        let name = name.strip_prefix("base_model.model.").unwrap();
        let name = name.replace(".frozen.shira_weight", ".weight");
        for place in places {
            let (now, before) = (end[&name].0[*place as usize], two[&name].0[*place as usize]);
            assert!((now - before).abs() <= 1e-7, "{name}[{place}]: {before} then {now}");
            still += 1;
        }
    }
    assert!(still > 0 && four.parameters.num_trainable() + still == budget);
    let bytes: usize =
        four.optimizer_state().iter().map(retune_core::method::ParameterState::bytes).sum();
    assert_eq!(bytes, 8 * (budget - still));
}

#[test]
fn lt_sft_keeps_what_moved_most_and_starts_over() {
    let (model, weights) = open();
    let (_guard, root) = folder();
    // With plain gradient descent one step moves each entry by its gradient.
    let options = "num_tunable = 300";
    let done = trained((&*model, &weights), method("lt-sft", options), sgd(), walk(&root, 2, 0.5));
    let gradients: BTreeMap<String, Vec<f32>> =
        dense_gradients((&*model, &weights), 0).into_iter().collect();
    let mut sizes: Vec<f32> = model
        .spec()
        .linears()
        .filter(|weight| weight.layer.is_some())
        .flat_map(|weight| gradients[&weight.name].iter().map(|g| g.abs()))
        .collect();
    sizes.sort_by(|a, b| b.total_cmp(a));
    let mut kept = 0;
    for (name, places) in entries(&done.parameters) {
        let name = name.strip_prefix("base_model.model.").unwrap();
        let gradient = &gradients[&name.replace(".shira_weight", ".weight")];
        for place in &places {
            // The threshold with a little room: products were rounded in another order.
            assert!(gradient[*place as usize].abs() >= sizes[299] * 0.9999);
        }
        kept += places.len();
    }
    assert_eq!((kept, done.parameters.num_trainable()), (300, 300));
    // Everything else is the base again, to the bit.
    let moved: usize = changed(&done.tuned(), &weights)
        .values()
        .map(|(now, base)| now.iter().zip(base).filter(|(a, b)| a != b).count())
        .sum();
    assert!(moved <= 300 && moved > 200, "{moved}");
}

#[test]
fn id3_touches_exactly_its_budget_where_gradients_are_largest() {
    let (model, weights) = open();
    let (_guard, root) = folder();
    let id3 = |options: &str| method("id3", options);
    let done = trained((&*model, &weights), id3("budget = 101"), adamw(), walk(&root, 7, 1e-3));
    let moved: usize = changed(&done.tuned(), &weights)
        .values()
        .map(|(now, base)| now.iter().zip(base).filter(|(a, b)| a != b).count())
        .sum();
    assert_eq!((moved, done.parameters.num_trainable()), (101, 101));
    let bytes: usize =
        done.optimizer_state().iter().map(retune_core::method::ParameterState::bytes).sum();
    assert_eq!(bytes, 12 * 101);
    // Ages tell how many updates each entry had: in all about half of a fixed mask's.
    let updates: f32 =
        done.optimizer_state().iter().flat_map(|state| state.ages.iter().flatten()).sum();
    let open: usize = (1..=7).map(|step| 101 * step / 7).sum();
    assert_eq!(updates as usize, open);

    // One step: the best by gradient over all weights together.
    let one = trained((&*model, &weights), id3("budget = 40"), adamw(), walk(&root, 1, 1e-3));
    let gradients: BTreeMap<String, Vec<f32>> =
        dense_gradients((&*model, &weights), 0).into_iter().collect();
    let mut sizes: Vec<f32> = model
        .spec()
        .linears()
        .filter(|weight| weight.layer.is_some())
        .flat_map(|weight| gradients[&weight.name].iter().map(|g| g.abs()))
        .collect();
    sizes.sort_by(|a, b| b.total_cmp(a));
    for (name, places) in entries(&one.parameters) {
        let name = name.strip_prefix("base_model.model.").unwrap();
        let gradient = &gradients[&name.replace(".shira_weight", ".weight")];
        assert!(places.iter().all(|place| gradient[*place as usize].abs() >= sizes[39] * 0.9999));
    }
}

#[test]
fn id3_at_random_touches_exactly_its_budget() {
    let (model, weights) = open();
    let (_guard, root) = folder();
    let id3 = method("id3", "budget = 101\norder = \"random\"");
    let done = trained((&*model, &weights), id3, adamw(), walk(&root, 7, 1e-3));
    let moved: usize = changed(&done.tuned(), &weights)
        .values()
        .map(|(now, base)| now.iter().zip(base).filter(|(a, b)| a != b).count())
        .sum();
    assert_eq!((moved, done.parameters.num_trainable()), (101, 101));
    let updates: f32 =
        done.optimizer_state().iter().flat_map(|state| state.ages.iter().flatten()).sum();
    let open: usize = (1..=7).map(|step| 101 * step / 7).sum();
    assert_eq!(updates as usize, open);
}

#[test]
fn id3_over_lora_moves_its_budget_of_factors() {
    let (model, weights) = open();
    let (_guard, root) = folder();
    let options = "budget = 30\nover = \"lora\"\nrank = 2";
    let done = trained((&*model, &weights), method("id3", options), adamw(), walk(&root, 5, 1e-3));
    let mut fresh = retune_core::parameters::Parameters::new(weights.device());
    method("id3", options).attach(&weights, &mut fresh, walk(&root, 5, 0.0).seed).unwrap();
    let moved: usize = done
        .parameters
        .iter()
        .map(|(id, _)| {
            let (now, before) = (done.parameters.values(id), fresh.values(id));
            now.iter().zip(before).filter(|(a, b)| **a != *b).count()
        })
        .sum();
    assert_eq!(moved, 30);
}

#[test]
fn impossible_budgets_are_refused() {
    let (model, weights) = open();
    let spec = model.spec();
    for (name, options, text) in [
        ("sara", "fraction = 0.0", "does not fit"),
        ("lt-sft", "density = 0.0", "does not fit"),
        ("lt-sft", "num_tunable = 100000000", "1 to "),
        ("id3", "budget = 100000000", "1 to "),
        ("id3", "budget = 100000\nover = \"lora\"\nrank = 1", "1 to "),
    ] {
        let error = method(name, options).plan(spec).unwrap_err().to_string();
        assert!(error.contains(text), "{name}: {error}");
    }
    let mut parameters = retune_core::parameters::Parameters::new(weights.device());
    let sara = method("sara", "threshold = 1e-30");
    let error = sara.attach(&weights, &mut parameters, retune_core::random::Seed(0)).unwrap_err();
    assert!(error.to_string().contains("the smallest weight"), "{error}");
    assert!(method("lt-sft", "").stages(1).unwrap_err().to_string().contains("at least 2 steps"));
}
