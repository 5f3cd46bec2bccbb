//! Adapters written by the PEFT library: they load, give PEFT's logits and merge to PEFT's weights.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use retune_core::batch::{Batch, Document};
use retune_core::change::{Changes, Mode, Scope};
use retune_core::model::{Output, Tuned};
use retune_core::parameters::{Parameters, to_vec};
use retune_core::random::Seed;
use retune_core::weights::Weights;
use retune_files::Dtype;
use retune_files::safetensors::SafetensorsFile;
use retune_methods::adapter::Adapter;
use retune_run::export::merged;
use retune_testkit::open::weights;
use tensor::Device;

fn pack() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/golden/peft")
}

fn base_weights() -> Weights {
    let checkpoint = retune_models::open(&pack().join("base")).unwrap();
    let spec = Arc::clone(checkpoint.model.spec());
    weights(checkpoint.source, &spec)
}

fn check(case: &str) {
    check_within(case, 1e-6);
}

fn check_within(case: &str, merged_tolerance: f32) {
    check_with(case, merged_tolerance, |_, _| {}, |_, _, _, _| {});
}

fn check_with(
    case: &str,
    merged_tolerance: f32,
    complete: impl Fn(&mut Adapter, &SafetensorsFile),
    prepare: impl Fn(&Weights, &Changes, &mut Parameters, &SafetensorsFile),
) {
    let checkpoint = retune_models::open(&pack().join("base")).unwrap();
    let weights = weights(Arc::clone(&checkpoint.source), checkpoint.model.spec());
    let folder = pack().join(case);
    let want = SafetensorsFile::open(folder.join("expected.safetensors")).unwrap();
    let mut adapter = Adapter::read(&folder).unwrap();
    complete(&mut adapter, &want);
    let method = adapter.method().unwrap();
    let mut parameters = Parameters::new(&Device::flex());
    let changes = method.attach(&weights, &mut parameters, Seed(0)).unwrap();
    adapter.fill(&folder, &mut parameters).unwrap();
    prepare(&weights, &changes, &mut parameters, &want);
    let tuned = Tuned {
        model: &*checkpoint.model,
        weights: &weights,
        changes: &changes,
        parameters: &parameters,
    };

    let ids = want.tensor("input_ids").unwrap();
    let width = ids.shape[1];
    let documents: Vec<Document> = ids
        .to_i64()
        .unwrap()
        .chunks(width)
        .map(|row| Document {
            tokens: row.iter().map(|id| *id as u32).collect(),
            learn: vec![false; width],
            ..Document::default()
        })
        .collect();
    let batch = Batch::new(&documents).unwrap();
    let found = tuned
        .evaluate(&batch, None, |pass, output| {
            let Output::States(states) = output else { panic!("a language model") };
            let rows: Vec<usize> = (0..batch.num_tokens()).collect();
            Ok(to_vec(pass.logits(&states, &rows)?.inner()))
        })
        .unwrap();
    let expected = want.tensor("logits").unwrap().to_f32().unwrap();
    compare(&format!("{case} logits"), &found, &expected, 1e-5);

    let mut num_merged = 0;
    for view in want.tensors().filter(|view| view.name.starts_with("merged.")) {
        let name = view.name.strip_prefix("merged.").unwrap();
        let spec = checkpoint.model.spec();
        let found = merged(&tuned, spec.weight(name).unwrap()).unwrap();
        compare(&format!("{case} {name}"), &found, &view.to_f32().unwrap(), merged_tolerance);
        num_merged += 1;
    }
    // PEFT refuses to merge a bias into a layer that has none, and so does retune.
    let merges = changes.unmergeable().is_none();
    assert_eq!(num_merged > 0, merges, "{case}: {num_merged} weights were merged");

    // What was loaded is written again with the same keys, shapes and values.
    let collected = Adapter::collect(&*method, checkpoint.model.spec(), &parameters, None).unwrap();
    assert_eq!(collected.config, adapter.config);
    let repeated = |name: &str| {
        name.ends_with(".base_layer.weight")
            || (name.contains(".layers.")
                && name.contains("randlora_")
                && name.ends_with(['A', 'B']))
    };
    let expected: Vec<_> = adapter.tensors.iter().filter(|(name, _)| !repeated(name)).collect();
    assert_eq!(collected.tensors.iter().collect::<Vec<_>>(), expected, "{case}");
    assert_eq!(collected.integers, adapter.integers, "{case}");
}

fn compare(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (index, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= tolerance, "{what}[{index}]: {f}, expected {e}");
    }
}

#[test]
fn lora() {
    check("lora");
}

#[test]
fn dora() {
    check("lora_dora");
}

#[test]
fn rslora() {
    check("lora_rslora");
}

#[test]
fn rank_and_alpha_patterns() {
    check("lora_pattern");
}

#[test]
fn embedding() {
    check("lora_emb");
}

#[test]
fn head_saved_whole() {
    check("lora_lmhead_mts");
}

#[test]
fn adalora() {
    check("adalora");
}

/// Ranks are missing here and there, and all of one weight.
#[test]
fn adalora_that_pruned_its_ranks() {
    check("adalora_pruned");
}

#[test]
fn beft() {
    check("beft");
}

#[test]
fn hra() {
    check("hra");
}

#[test]
fn ia3() {
    check("ia3");
}

#[test]
fn ln_tuning() {
    check("ln_tuning");
}

#[test]
fn loha() {
    check("loha");
}

#[test]
fn lokr() {
    check("lokr");
}

#[test]
fn road() {
    check("road");
}

#[test]
fn boft() {
    check("boft");
}

#[test]
fn deft() {
    check("deft");
}

#[test]
fn fourierft() {
    check("fourierft");
}

#[test]
fn glora() {
    check("glora");
}

#[test]
fn oft() {
    check("oft");
}

#[test]
fn peanut() {
    check("peanut");
}

#[test]
fn shira() {
    check("shira");
}

#[test]
fn trainable_tokens() {
    check("trainable_tokens");
}

#[test]
fn vblora() {
    check("vblora");
}

#[test]
fn vera() {
    check("vera");
}

#[test]
fn randlora() {
    // Its weights reach 10.8, those of the others 1.1.
    check_within("randlora", 1e-5);
}

/// What PEFT draws from a seed is drawn again, to the last bit but two.
fn check_made_again(case: &str, tensors: &[&str]) {
    let (weights, adapter) = (base_weights(), Adapter::read(&pack().join(case)).unwrap());
    let mut parameters = Parameters::new(&Device::flex());
    adapter.method().unwrap().attach(&weights, &mut parameters, Seed(0)).unwrap();
    for name in tensors {
        let found = parameters.values(parameters.find(name).unwrap());
        compare(name, &found, &adapter.tensors[*name].1, 2.4e-7);
    }
}

#[test]
fn projections_of_vera_are_made_again() {
    check_made_again("vera", &["base_model.vera_A", "base_model.vera_B"]);
}

#[test]
fn bases_of_randlora_are_made_again() {
    check_made_again("randlora", &["base_model.randlora_A", "base_model.randlora_B"]);
}

#[test]
fn tinylora() {
    check("tinylora");
}

#[test]
fn projections_of_tinylora_are_made_again() {
    let module = "base_model.model.model.layers.1.self_attn.v_proj";
    check_made_again("tinylora", &[&format!("{module}.tinylora_P")]);
}

#[test]
fn unilora() {
    check("unilora");
}

#[test]
fn osf() {
    // PEFT itself decomposes in single precision.
    check_within("osf", 5e-6);
}

#[test]
fn frod() {
    check("frod");
}

/// PEFT's file leaves which rows belong to which cluster to whoever decomposes the base again; where
/// the weight's directions are taken in part, its clusters come out.
#[test]
fn adamss_with_clusters_made_again() {
    check("adamss_low_rank");
}

/// Where all directions are taken, all rows are equally far from each other and rounding decides: the
/// file is refused, and with the clusters it was made with, read off PEFT's merged weights and
/// written as retune writes them, PEFT's numbers come out.
#[test]
fn adamss() {
    let error = refused("adamss", |_| {});
    assert!(error.contains("does not say which rows"), "{error}");
    let weights = base_weights();
    let complete = |adapter: &mut Adapter, want: &SafetensorsFile| {
        for view in want.tensors().filter(|view| view.name.starts_with("merged.")) {
            let name = view.name.strip_prefix("merged.").unwrap();
            let key = format!("base_model.model.{}", name.strip_suffix("weight").unwrap());
            let base = weights.values(name).unwrap();
            let merged = view.to_f32().unwrap();
            let columns = view.shape[1];
            let factor = |part: &str| adapter.tensors[&format!("{key}{part}")].1.clone();
            let mut clusters = vec![-1; view.shape[0]];
            for cluster in 0..5 {
                // Of rank 1: row by row, a number of B times A times the directions.
                let a = factor(&format!("adamss_A.{cluster}"));
                let directions = factor("adamss_newB");
                let along = |column: usize| -> f32 {
                    a.iter().enumerate().map(|(k, a)| a * directions[k * columns + column]).sum()
                };
                let along: Vec<f32> = (0..columns).map(along).collect();
                for b in factor(&format!("adamss_B.{cluster}")) {
                    let gap = |row: &usize| -> f32 {
                        let entries = row * columns..(row + 1) * columns;
                        let change = entries.map(|at| merged[at] - base[at]).zip(&along);
                        change.map(|(found, along)| (found - b * along).abs()).fold(0.0, f32::max)
                    };
                    let rows = (0..clusters.len()).filter(|row| clusters[*row] == -1);
                    let row = rows.min_by(|x, y| gap(x).total_cmp(&gap(y))).unwrap();
                    clusters[row] = cluster;
                }
            }
            let shape = vec![clusters.len()];
            let name = format!("{key}adamss_clusters");
            adapter.integers.insert(name, (Dtype::I32, shape, clusters));
        }
        adapter.config["retune_complete"] = true.into();
    };
    check_with("adamss", 1e-6, complete, |_, _, _, _| {});
}

/// PEFT's file leaves the signs of the singular vectors to whoever decomposes the base again: with
/// those of PEFT's own decomposition, read off its merged weights, its numbers come out.
#[test]
fn psoft() {
    let as_it_is = |_: &mut Adapter, _: &SafetensorsFile| {};
    check_with("psoft", 1e-6, as_it_is, |weights, changes, parameters, want| {
        let scope = Scope::new(parameters, Mode::Evaluate);
        let mut flips = Vec::new();
        for name in changes.changed_weights() {
            let base = weights.values(name).unwrap();
            let own = to_vec(changes.materialize(name, weights, &scope).unwrap().inner());
            let theirs = want.tensor(&format!("merged.{name}")).unwrap().to_f32().unwrap();
            let key = format!("base_model.model.{}", name.strip_suffix("weight").unwrap());
            let find = |part: &str| parameters.find(&format!("{key}{part}")).unwrap();
            let (a, b) = (find("psoft_A"), find("psoft_B"));
            let rank = parameters.get(a).shape[0];
            let (left, right) = (parameters.values(b), parameters.values(a));
            let columns = right.len() / rank;
            // Bᵀ·Δ·Aᵀ is S²·(R − I), with signs on both sides.
            let inner = |merged: &[f32], i: usize, j: usize| -> f64 {
                let entry = |at: usize| {
                    let delta = f64::from(merged[at]) - f64::from(base[at]);
                    let (row, column) = (at / columns, at % columns);
                    f64::from(left[row * rank + i]) * delta * f64::from(right[j * columns + column])
                };
                (0..base.len()).map(entry).sum()
            };
            let mut signs = vec![0.0_f32; rank];
            signs[0] = 1.0;
            for _ in 1..rank {
                let known = (0..rank).filter(|i| signs[*i] != 0.0);
                let pairs = known.flat_map(|i| {
                    (0..rank).filter(|j| signs[*j] == 0.0).map(move |j| (i, j)).collect::<Vec<_>>()
                });
                let sized = pairs.map(|(i, j)| (inner(&own, i, j), i, j));
                let (size, i, j) = sized.max_by(|x, y| x.0.abs().total_cmp(&y.0.abs())).unwrap();
                signs[j] = signs[i] * (size * inner(&theirs, i, j)).signum() as f32;
            }
            flips.push((a, b, columns, signs));
        }
        assert!(flips.iter().any(|(_, _, _, signs)| signs.contains(&-1.0)), "a hazard no more");
        for (a, b, columns, signs) in flips {
            parameters.update(a, |values| {
                values.iter_mut().enumerate().for_each(|(at, v)| *v *= signs[at / columns]);
            });
            parameters.update(b, |values| {
                values.iter_mut().enumerate().for_each(|(at, v)| *v *= signs[at % signs.len()]);
            });
        }
    });
}

#[test]
fn a_missing_tensor_is_named() {
    let checkpoint = retune_models::open(&pack().join("base")).unwrap();
    let weights = weights(Arc::clone(&checkpoint.source), checkpoint.model.spec());
    let folder = pack().join("lora");
    let mut adapter = Adapter::read(&folder).unwrap();
    let lost = adapter.tensors.keys().next().unwrap().clone();
    let moved = adapter.tensors.remove(&lost).unwrap();
    adapter.tensors.insert(lost.replace("layers.0", "layers.9"), moved);
    let mut parameters = Parameters::new(&Device::flex());
    adapter.method().unwrap().attach(&weights, &mut parameters, Seed(0)).unwrap();
    let error = adapter.fill(&folder, &mut parameters).unwrap_err().to_string();
    assert!(error.contains(&lost) && error.contains("belongs to nothing"), "{error}");
}

/// Returns what filling a damaged adapter is refused with.
fn refused(case: &str, damage: impl Fn(&mut Adapter)) -> String {
    let (weights, folder) = (base_weights(), pack().join(case));
    let mut adapter = Adapter::read(&folder).unwrap();
    damage(&mut adapter);
    let mut parameters = Parameters::new(&Device::flex());
    adapter.method().unwrap().attach(&weights, &mut parameters, Seed(0)).unwrap();
    adapter.fill(&folder, &mut parameters).unwrap_err().to_string()
}

#[test]
fn missing_surplus_and_misshapen_tensors_are_named_whatever_the_type() {
    for case in ["adalora", "boft", "ia3", "lokr", "shira", "vblora", "vera"] {
        let first =
            Adapter::read(&pack().join(case)).unwrap().tensors.keys().next().unwrap().clone();
        let error = refused(case, |adapter| drop(adapter.tensors.remove(&first)));
        assert!(error.contains(&format!("`{first}` is missing")), "{case}: {error}");
        let error = refused(case, |adapter| {
            adapter.tensors.insert("base_model.model.nowhere".to_owned(), (vec![1], vec![0.0]));
        });
        assert!(error.contains("`base_model.model.nowhere` belongs to nothing"), "{case}: {error}");
        let error = refused(case, |adapter| {
            let (shape, _) = adapter.tensors.get_mut(&first).unwrap();
            shape.push(1);
        });
        assert!(error.contains(&format!("`{first}` has shape")), "{case}: {error}");
    }
}

#[test]
fn places_beyond_the_weight_are_refused() {
    let name = "base_model.model.model.layers.0.self_attn.v_proj.shira_indices";
    for (entry, beyond) in [(0, 32), (384, 64), (5, -1), (7, 1 << 40)] {
        let error = refused("shira", |adapter| {
            adapter.integers.get_mut(name).unwrap().2[entry] = beyond;
        });
        assert!(error.contains(name) && error.contains(&beyond.to_string()), "{error}");
    }
    let error = refused("shira", |adapter| {
        let (_, shape, values) = adapter.integers.remove(name).unwrap();
        let values = values.iter().map(|value| *value as f32).collect();
        adapter.tensors.insert(name.to_owned(), (shape, values));
    });
    assert!(error.contains("holds floats, expected whole numbers"), "{error}");
}

#[test]
fn configurations_with_impossible_or_foreign_settings_are_refused() {
    let refused = |case: &str, key: &str, value: serde_json::Value| {
        let mut adapter = Adapter::read(&pack().join(case)).unwrap();
        adapter.config[key] = value;
        match adapter.method() {
            Ok(method) => method.plan(base_weights().spec()).unwrap_err().to_string(),
            Err(error) => error.to_string(),
        }
    };
    for (case, key, value, expected) in [
        ("loha", "r", serde_json::json!(0), "rank"),
        ("loha", "r", serde_json::json!("many"), "rank"),
        ("loha", "r", serde_json::json!(33), "at most 32"),
        ("oft", "coft", serde_json::json!(true), "coft"),
        ("oft", "bias", serde_json::json!("all"), "bias"),
        ("road", "group_size", serde_json::json!(24), "divisor of 64"),
        ("vera", "target_modules", serde_json::json!(["q_porj"]), "q_proj"),
        ("vera", "target_modules", serde_json::json!([]), "target_modules"),
        ("fourierft", "n_frequency", serde_json::json!(5000), "at most 4096"),
        ("trainable_tokens", "token_indices", serde_json::json!([128]), "128"),
        ("lora", "alora_invocation_tokens", serde_json::json!([1, 2]), "alora_invocation_tokens"),
    ] {
        let error = refused(case, key, value.clone());
        assert!(error.contains(expected), "{case} with {key} = {value}: {error}");
    }
}
