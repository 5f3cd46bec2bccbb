//! The merges mergekit 0.1.4 made, from its own YAML files.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests may panic as tests do")]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use retune_merge::plan::Plan;
use retune_merge::source::Source;
use retune_merge::{Merged, Options, merge};

fn pack() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/mergekit")
}

fn merge_text(text: &str, target: &Path) -> Merged {
    let (plan, _) = Plan::parse("plan.yml", text.as_bytes()).unwrap_or_else(|e| panic!("{e}"));
    let locate = &mut |name: &str| Ok(pack().join(name));
    let watch = &|_| ControlFlow::Continue(());
    merge(&plan, target, Options::default(), locate, watch).unwrap_or_else(|e| panic!("{e}"))
}

/// Compares every value of every tensor, and returns the largest distance.
fn compare(name: &str, expected: &Path, found: &Path) -> f32 {
    let (expected, found) = (Source::open(expected).unwrap(), Source::open(found).unwrap());
    assert_eq!(
        expected.specs().collect::<Vec<_>>(),
        found.specs().collect::<Vec<_>>(),
        "{name}: names, types and shapes"
    );
    let mut worst = 0.0_f32;
    for spec in expected.specs() {
        let (a, b) = (expected.read_f32(&spec.name).unwrap(), found.read_f32(&spec.name).unwrap());
        for (i, (a, b)) in a.iter().zip(&b).enumerate() {
            let distance = (a - b).abs();
            assert!(distance <= 1e-6, "{name}: {} [{i}] is {b}, expected {a}", spec.name);
            worst = worst.max(distance);
        }
    }
    worst
}

#[test]
fn every_golden_merge_is_reached() {
    let home = tempfile::tempdir().unwrap();
    let mut names: Vec<String> = std::fs::read_dir(pack())
        .unwrap()
        .filter_map(|entry| {
            let name = entry.unwrap().file_name().into_string().unwrap();
            name.strip_suffix(".yml").map(str::to_owned)
        })
        .collect();
    names.sort();
    assert_eq!(names.len(), 15);
    for name in names {
        let text = std::fs::read_to_string(pack().join(format!("{name}.yml"))).unwrap();
        let target = home.path().join(&name);
        merge_text(&text, &target);
        let golden = pack().join(format!("out_{name}"));
        compare(&name, &golden, &target);
        let config = |folder: &Path| Source::open(folder).unwrap().config().unwrap().unwrap();
        for key in ["num_hidden_layers", "vocab_size", "model_type", "dtype"] {
            assert_eq!(config(&target)[key], config(&golden)[key], "{name}: {key}");
        }
    }
}
