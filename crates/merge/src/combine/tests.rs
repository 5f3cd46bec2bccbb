use std::path::{Path, PathBuf};

use retune_files::safetensors::Safetensors;

use super::*;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/combine")
}

fn adapter(name: &str) -> LoraAdapter {
    LoraAdapter::open(&golden().join(name)).unwrap()
}

fn settings(kind: &str) -> Settings {
    let (_, form) = NAMES.iter().find(|(name, _)| *name == kind).unwrap();
    Settings {
        form: *form,
        rank: None,
        density: Some(1.0),
        majority_sign: MajoritySign::Total,
        seed: 0,
    }
}

/// Reads what was combined as an adapter again, from a folder.
fn reread(combined: &Combined) -> LoraAdapter {
    let home = tempfile::tempdir().unwrap();
    let config = serde_json::to_string(&combined.config).unwrap();
    std::fs::write(home.path().join("adapter_config.json"), config).unwrap();
    let list: Vec<(&str, &[usize], Vec<f32>)> = combined
        .tensors
        .iter()
        .map(|(name, (shape, values))| (name.as_str(), shape.as_slice(), values.clone()))
        .collect();
    crate::update::write_tensors(&home.path().join("adapter_model.safetensors"), &list);
    LoraAdapter::open(home.path()).unwrap()
}

/// Every combination of `add_weighted_adapter`, against PEFT itself. Where DARE drops entries, PEFT
/// was given the same draws.
#[test]
fn changes_are_those_of_peft() {
    let text = std::fs::read_to_string(golden().join("cases.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&text).unwrap();
    let expected = Safetensors::open(golden().join("expected.safetensors")).unwrap();
    let mut kinds = BTreeSet::new();
    let (mut num_compared, mut num_thinned) = (0, 0);
    for (number, case) in cases.iter().enumerate() {
        let kind = case["kind"].as_str().unwrap();
        kinds.insert(kind.to_owned());
        num_thinned += usize::from(kind.contains("dare") && case["density"].as_f64() < Some(1.0));
        let weights = case["weights"].as_array().unwrap();
        let adapters: Vec<(LoraAdapter, f64)> = case["adapters"]
            .as_array()
            .unwrap()
            .iter()
            .zip(weights)
            .map(|(name, weight)| (adapter(name.as_str().unwrap()), weight.as_f64().unwrap()))
            .collect();
        let majority_sign = match case["majority_sign"].as_str().unwrap() {
            "frequency" => MajoritySign::Frequency,
            _ => MajoritySign::Total,
        };
        let settings = Settings {
            rank: case["rank"].as_u64().map(|rank| rank as usize),
            density: case["density"].as_f64(),
            majority_sign,
            seed: case["seed"].as_u64().unwrap(),
            ..settings(kind)
        };
        let found = reread(&combine(&adapters, &settings).unwrap());
        for module in ["table", "up", "down"] {
            let Some(want) = expected.get(&format!("{number}.{module}")) else { continue };
            let pair = &found.pairs[&format!("base_model.model.{module}")];
            assert_eq!(want.shape, [pair.outputs, pair.inputs]);
            let want = want.to_f32().unwrap();
            for (place, (f, e)) in pair.delta().iter().zip(&want).enumerate() {
                assert!((f - e).abs() < 2e-6, "{number} {kind} {module}[{place}]: {f}, PEFT {e}");
            }
            num_compared += 1;
        }
    }
    assert_eq!(kinds.len(), NAMES.len());
    assert_eq!(num_compared, 3 * cases.len());
    assert_eq!(num_thinned, 4, "every form of DARE that drops something");
}

#[test]
fn one_side_by_side_is_exact() {
    let pair = [(adapter("a"), 1.0), (adapter("c"), -0.5)];
    let found = reread(&combine(&pair, &settings("cat")).unwrap());
    let module = "base_model.model.up";
    let a = pair[0].0.pairs[module].delta();
    let c = pair[1].0.pairs[module].delta();
    assert_eq!(found.pairs[module].rank, 5);
    for ((found, a), c) in found.pairs[module].delta().iter().zip(a).zip(c) {
        assert!((found - (a - 0.5 * c)).abs() < 1e-6);
    }
}

#[test]
fn configurations_are_united() {
    let pair = [(adapter("a"), 1.0), (adapter("c"), 1.0)];
    let combined = combine(&pair, &settings("svd")).unwrap();
    assert_eq!(combined.config["target_modules"], json!(["down", "table", "up"]));
    assert_eq!((combined.config["r"].as_u64(), combined.rank), (Some(3), 3));
    assert_eq!(combined.config["lora_alpha"], json!(3));
    let kept = combined.kept.unwrap();
    assert!(kept > 0.8 && kept < 1.0, "{kept}");
    // Of one adapter nothing but its weight matters, whatever is asked for.
    let one = reread(&combine(&[(adapter("b"), 2.0)], &settings("ties")).unwrap());
    let module = "base_model.model.down";
    for (found, b) in one.pairs[module].delta().iter().zip(adapter("b").pairs[module].delta()) {
        assert!((found - 2.0 * b).abs() < 1e-6);
    }
    let mut text = adapter("a");
    text.config.insert("target_modules".to_owned(), json!(".*up"));
    let mixed = combine(&[(text.clone(), 1.0), (adapter("c"), 1.0)], &settings("cat")).unwrap();
    assert_eq!(mixed.config["target_modules"], json!(["down", "table", "up"]));
    let mut other = text.clone();
    other.config.insert("target_modules".to_owned(), json!("down"));
    let both = combine(&[(text, 1.0), (other, 1.0)], &settings("cat")).unwrap();
    assert_eq!(both.config["target_modules"], json!("(.*up)|(down)"));
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let message = |adapters: &[(LoraAdapter, f64)], settings: &Settings| {
        combine(adapters, settings).unwrap_err().to_string()
    };
    let pair = [(adapter("a"), 1.0), (adapter("c"), 1.0)];
    assert!(message(&pair, &settings("linear")).contains("use cat, svd"));
    assert!(message(&[], &settings("cat")).contains("at least one"));
    assert!(message(&[(adapter("a"), f64::NAN)], &settings("cat")).contains("weights"));
    let with = |density| Settings { density, ..settings("ties_svd") };
    assert!(message(&pair, &with(None)).contains("density"));
    assert!(message(&pair, &with(Some(0.0))).contains("density"));
    assert!(message(&pair, &with(Some(1.5))).contains("density"));
    assert!(message(&pair, &Settings { rank: Some(0), ..settings("svd") }).contains("rank"));
    let mut wide = adapter("a");
    wide.pairs.get_mut("base_model.model.up").unwrap().inputs = 3;
    assert!(message(&[(adapter("a"), 1.0), (wide, 1.0)], &settings("cat")).contains("shape"));
    let mut head = adapter("a");
    head.others.insert("head.weight".to_owned(), (vec![1], vec![1.0]));
    let two = [(head.clone(), 1.0), (head.clone(), 1.0)];
    assert!(message(&two, &settings("cat")).contains("saved whole"));
    let one = combine(&[(head, 1.0), (adapter("a"), 1.0)], &settings("cat")).unwrap();
    assert_eq!(one.tensors["head.weight"].1, [1.0]);
}
