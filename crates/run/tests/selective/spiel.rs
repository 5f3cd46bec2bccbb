//! SpIEL: where entries go, what the optimiser remembers, what is held.

use std::collections::BTreeMap;

use crate::common::{
    Source, adamw, dense_gradients, entries, folder, method, open, sgd, trained, walk,
};
use retune_core::change::{Mode, Scope};
use retune_core::model::Tuned;
use retune_core::parameters::{Parameters, to_vec};
use retune_core::random::Seed;
use retune_methods::adapter::Adapter;
use retune_train::backprop::Backprop;
use retune_train::training::BatchSource;
use tensor::Device;

const OPTIONS: &str = "density = 0.05\nreselect_every = 6\naccumulate = 3";

#[test]
fn the_first_reselection_goes_where_the_gradients_are() {
    let (model, weights) = open();
    let (_guard, root) = folder();
    // At a rate of 0 nothing moves: all entries are dropped, all candidates of step 1 grown.
    let done = trained((&*model, &weights), method("spiel", OPTIONS), adamw(), walk(&root, 3, 0.0));
    let steps: Vec<BTreeMap<String, Vec<f32>>> = (0..3)
        .map(|step| dense_gradients((&*model, &weights), step).into_iter().collect())
        .collect();
    let places = entries(&done.parameters);
    assert!(places.len() > 10);
    let mut fresh = Parameters::new(&Device::flex());
    method("spiel", OPTIONS).attach(&weights, &mut fresh, Seed(7)).unwrap();
    let drawn = entries(&fresh);
    for (place, (name, found)) in places.into_iter().enumerate() {
        let module = name.strip_prefix("base_model.model.").unwrap();
        let weight = format!("{}.weight", module.strip_suffix(".shira_weight").unwrap());
        let gradients: Vec<&Vec<f32>> = steps.iter().map(|step| &step[&weight]).collect();
        let mut order: Vec<u32> = (0..gradients[0].len() as u32).collect();
        let size = |i: &u32| gradients[0][*i as usize].abs();
        order.sort_by(|a, b| size(b).total_cmp(&size(a)).then(a.cmp(b)));
        let mut expected = order[..found.len()].to_vec();
        expected.sort_unstable();
        assert_eq!(found, expected, "{name}");
        let state = &done.optimizer_state()[place];
        assert_eq!(state.ages, Some(vec![3.0; found.len()]));
        for (element, index) in found.iter().enumerate() {
            if drawn[place].1.contains(index) {
                // Dropped and grown at once: it keeps what the optimiser knew.
                continue;
            }
            let of = |g: &&Vec<f32>| f64::from(g[*index as usize]);
            let mean: f64 = gradients.iter().map(of).sum::<f64>() / 3.0;
            let square: f64 = gradients.iter().map(|g| of(g).powi(2)).sum::<f64>() / 3.0;
            let expected = [mean * (1.0 - 0.9_f64.powi(3)), square * (1.0 - 0.999_f64.powi(3))];
            // Gradients of opposite signs cancel in the mean, whose error is that of its terms.
            let sizes = [square.sqrt(), square];
            for ((list, expected), size) in state.lists.iter().zip(expected).zip(sizes) {
                let found = f64::from(list[element]);
                assert!((found - expected).abs() <= 1e-5 * size, "{name}: {found} {expected}");
            }
        }
    }
}

#[test]
fn state_and_gradients_are_as_many_as_the_entries() {
    let (model, weights) = open();
    let spiel = method("spiel", OPTIONS);
    let planned = spiel.plan(model.spec()).unwrap().num_trainable();
    let targeted: usize = model
        .spec()
        .linears()
        .filter(|w| w.layer.is_some())
        .map(retune_core::spec::WeightSpec::count)
        .sum();
    let budget = (0.05 * model.spec().count() as f64) as usize;
    assert!(planned <= budget && planned + 20 > budget && planned < targeted / 5);
    let (_guard, root) = folder();
    let done = trained((&*model, &weights), spiel, adamw(), walk(&root, 8, 1e-2));
    assert_eq!(done.parameters.num_trainable(), planned);
    // Two moments and an age, 4 bytes each.
    let bytes: usize =
        done.optimizer_state().iter().map(retune_core::method::ParameterState::bytes).sum();
    assert_eq!(bytes, 12 * planned);
    let batches = Source::default().micro_batches(0).unwrap();
    let learner = Backprop { seed: Seed(7), recompute: true };
    let result = learner.step(&done.tuned(), &batches, 0).unwrap();
    assert_eq!(result.gradients.iter().flatten().map(Vec::len).sum::<usize>(), planned);
}

#[test]
fn sm3_keeps_rows_and_columns_instead_of_moments() {
    let (model, weights) = open();
    let options = format!("{OPTIONS}\nvariant = \"sm3\"");
    let (_guard, root) = folder();
    let before = method("spiel", &options);
    let done = trained((&*model, &weights), before, sgd(), walk(&root, 1, 0.5));
    assert_eq!(
        done.optimizer_state()
            .iter()
            .map(retune_core::method::ParameterState::bytes)
            .sum::<usize>(),
        0
    );
    let gradients: BTreeMap<String, Vec<f32>> =
        dense_gradients((&*model, &weights), 0).into_iter().collect();
    // In the first step u is g², so an entry moves by the rate against its gradient's sign.
    for (id, parameter) in done.parameters.iter().filter(|(_, p)| p.trains) {
        let name = parameter.name.strip_prefix("base_model.model.").unwrap();
        let gradient = &gradients[&name.replace(".shira_weight", ".weight")];
        let places = done.parameters.indices(id);
        for (value, index) in done.parameters.values(id).iter().zip(places.iter()) {
            let g = gradient[*index as usize];
            if g.abs() > 1e-3 {
                assert!((value + 0.5 * g.signum()).abs() < 5e-3, "{value} {g}");
            }
        }
    }
}

#[test]
fn an_adapter_folder_gives_the_same_weights_back() {
    let (model, weights) = open();
    let (_guard, root) = folder();
    let done =
        trained((&*model, &weights), method("spiel", OPTIONS), adamw(), walk(&root, 5, 1e-2));
    let spec = model.spec();
    let adapter = Adapter::collect(done.method(), spec, &done.parameters, None).unwrap();
    let path = root.join("adapter");
    adapter.write(&path, "card").unwrap();
    let read = Adapter::read(&path).unwrap();
    let mut parameters = Parameters::new(&Device::flex());
    let changes = read.method().unwrap().attach(&weights, &mut parameters, Seed(99)).unwrap();
    read.fill(&path, &mut parameters).unwrap();
    let again =
        Tuned { model: &*model, weights: &weights, changes: &changes, parameters: &parameters };
    let merged = |tuned: &Tuned<'_>, name: &str| {
        let scope = Scope::new(tuned.parameters, Mode::Evaluate);
        to_vec(tuned.changes.materialize(name, tuned.weights, &scope).unwrap())
    };
    let mut moved = 0;
    for weight in spec.linears() {
        let (first, second) = (merged(&done.tuned(), &weight.name), merged(&again, &weight.name));
        assert_eq!(first, second);
        let base = weights.values(&weight.name).unwrap();
        moved += first.iter().zip(base).filter(|(a, b)| **a != *b).count();
    }
    assert!(moved > 100, "{moved}");

    let mut broken = read;
    let (_, _, places) = broken.integers.values_mut().next().unwrap();
    places[0] = 1_000_000;
    let error = broken.fill(&path, &mut parameters).unwrap_err().to_string();
    assert!(error.contains("lies outside"), "{error}");
}

#[test]
fn impossible_budgets_are_refused_before_step_1() {
    let (model, _) = open();
    let refused =
        |options: &str| method("spiel", options).plan(model.spec()).unwrap_err().to_string();
    assert!(refused("density = 1.0").contains("does not fit the targeted"));
    assert!(refused("density = 0.0").contains("1 to "));
    assert!(refused("num_tunable = 3").contains("no targeted weight gets an entry"));
    assert!(refused("targets = [\"q_porj\"]").contains("q_proj"));
    let plugin = retune_methods::registry::find("spiel").unwrap();
    let text = "reselect_every = 5\naccumulate = 5";
    let document = retune_options::Document::parse("test.toml", text).unwrap();
    assert!(document.read(plugin.read).unwrap_err().to_string().contains("one window"));
}
