//! Child-tuning and R-AMT: what stays as it was.

use crate::common::{adamw, bits, folder, method, open, sgd, trained, walk};
use retune_core::change::{Mode, Scope};
use retune_core::parameters::to_vec;

#[test]
fn a_child_of_everything_is_full_tuning_to_the_bit() {
    let (model, weights) = open();
    let run = |name: &str, options: &str| {
        let (_guard, root) = folder();
        let walk = walk(&root, 3, 1e-3);
        bits(&trained((&*model, &weights), method(name, options), adamw(), walk).parameters)
    };
    let full = run("full", "");
    assert!(run("child-tuning", "share = 1.0") == full);
    assert!(run("child-tuning", "share = 1.0\nmode = \"free\"") == full);
}

#[test]
fn a_driven_child_moves_its_share_and_nothing_else() {
    let (model, weights) = open();
    let (_guard, root) = folder();
    let options = "share = 0.2\nfisher_steps = 2";
    let child = method("child-tuning", options);
    let done = trained((&*model, &weights), child, adamw(), walk(&root, 4, 1e-3));
    let (mut moved, mut total) = (0, 0);
    for (id, parameter) in done.parameters.iter().filter(|(_, p)| p.trains) {
        let base = weights.values(&parameter.name).unwrap();
        let now = done.parameters.values(id);
        let mask = done.parameters.find(&format!("{}.child", parameter.name)).unwrap();
        for ((now, base), open) in now.iter().zip(&base).zip(done.parameters.values(mask)) {
            assert!(open == 1.0 || now == base, "{}", parameter.name);
            moved += usize::from(now != base);
            total += 1;
        }
    }
    let share = (0.2 * f64::from(total)).round() as usize;
    assert!(moved <= share && moved > share * 9 / 10, "{moved} of {share}");
    let error = method("child-tuning", options).stages(2).unwrap_err().to_string();
    assert!(error.contains("fewer than the run's 2 steps"), "{error}");
}

#[test]
fn r_amt_switches_weights_off_and_changes_none() {
    let (model, weights) = open();
    let (_guard, root) = folder();
    // The gap to the threshold is half of one step's length.
    let mask = method("r-amt", "drop = 1.0");
    let done = trained((&*model, &weights), mask, adamw(), walk(&root, 2, 1e-2));
    let tuned = done.tuned();
    let scope = Scope::new(tuned.parameters, Mode::Evaluate);
    let (mut off, mut total) = (0, 0);
    for name in tuned.changes.changed_weights() {
        let now = to_vec(tuned.changes.materialize(name, &weights, &scope).unwrap());
        for (now, base) in now.iter().zip(weights.values(name).unwrap()) {
            assert!(*now == 0.0 || now.to_bits() == base.to_bits(), "{name}");
            off += usize::from(*now != base);
            total += 1;
        }
    }
    assert!(off > total / 100 && off < total, "{off} of {total}");
}

#[test]
fn gradients_of_both_losses_accumulate_over_passes() {
    let (model, weights) = open();
    let scores = |split: bool| {
        let (_guard, root) = folder();
        let walk = walk(&root, 1, 0.1);
        let mut training = retune_train::training::Training::new(
            &*model,
            &weights,
            method("r-amt", "drop = 1.0"),
            sgd(),
            walk,
        )
        .unwrap();
        let mut source = crate::common::Source { fails_at: None, split };
        training.walk(&mut source, None, &mut Vec::<retune_core::event::Event>::new()).unwrap();
        let ids: Vec<_> = training.parameters.iter().map(|(id, _)| id).collect();
        ids.into_iter().flat_map(|id| training.parameters.values(id)).collect::<Vec<f32>>()
    };
    let (whole, parts) = (scores(false), scores(true));
    // An entry whose probability lies at the drawn number may fall on the other side.
    let differ = whole.iter().zip(&parts).filter(|(a, b)| (*a - *b).abs() > 1e-5).count();
    assert!(differ * 1000 < whole.len(), "{differ} of {}", whole.len());
    assert!(whole.iter().any(|m| (m - 0.01).abs() > 1e-4));
}

#[test]
fn apet_meets_its_budget_exactly_by_entries_and_never_passes_it_by_tensors() {
    let (model, _) = open();
    let spec = model.spec();
    let count = |options: &str| method("apet", options).plan(spec).unwrap().num_trainable();
    assert_eq!(count("granularity = \"element\"\nbudget = 777"), 777);
    for budget in [500, 3000, 20_000] {
        let found = count(&format!("budget = {budget}\nrank = 2"));
        assert!(found <= budget && found > 0, "{found} of {budget}");
    }
    // By default as many as LoRA of this rank.
    let lora = method("lora", "rank = 3").plan(spec).unwrap().num_trainable();
    assert_eq!(count("granularity = \"element\"\nrank = 3"), lora);
    let names = |seed: u64| {
        let options = format!("budget = 3000\nrank = 2\nseed = {seed}");
        method("apet", &options).plan(spec).unwrap().parameters
    };
    assert!(names(1) == names(1) && names(1) != names(2));
    let refused = |options: &str| method("apet", options).plan(spec).unwrap_err().to_string();
    assert!(refused("budget = 1").contains("granularity"));
    assert!(refused("granularity = \"element\"\nbudget = 100000000").contains("1 to "));
}

#[test]
fn locft_edits_one_matrix_and_skips_what_is_learned() {
    let (model, weights) = open();
    let run = |options: &str| {
        let (_guard, root) = folder();
        let locft = method("locft-bf", options);
        let done = trained((&*model, &weights), locft, adamw(), walk(&root, 2, 1e-3));
        bits(&done.parameters)
    };
    let (edited, still) = (run("layer = 1"), run("layer = 1\nskip_below = 1000.0"));
    assert_eq!(edited.len(), 1);
    assert!(edited[0].0.contains("layers.1.mlp.down_proj"));
    let base = weights.values("model.layers.1.mlp.down_proj.weight").unwrap();
    let base: Vec<u32> = base.into_iter().map(f32::to_bits).collect();
    assert!(still[0].1 == base && edited[0].1 != base);
    let error = method("locft-bf", "layer = 2").plan(model.spec()).unwrap_err().to_string();
    assert!(error.contains("0 to 1"), "{error}");
}

#[test]
fn diff_pruning_ends_with_its_density() {
    let (model, weights) = open();
    let (_guard, root) = folder();
    let options = "density = 0.02\ngate_start = 0.0";
    let pruned = method("diff-pruning", options);
    let done = trained((&*model, &weights), pruned, adamw(), walk(&root, 6, 1e-3));
    let targeted: usize = model
        .spec()
        .linears()
        .filter(|w| w.layer.is_some())
        .map(retune_core::spec::WeightSpec::count)
        .sum();
    let budget = (0.02 * targeted as f64).round() as usize;
    assert_eq!(done.parameters.num_trainable(), budget);
    let bytes: usize =
        done.optimizer_state().iter().map(retune_core::method::ParameterState::bytes).sum();
    assert_eq!(bytes, 8 * budget);
}
