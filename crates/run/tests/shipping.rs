//! Each way to ship gives the outputs of the model its formula describes, worked out without it.
#![expect(clippy::unwrap_used, reason = "a test fails where a helper of it cannot go on")]

use std::path::Path;
use std::sync::Arc;

use retune_core::batch::{Batch, Document};
use retune_core::model::Model;
use retune_core::random::Seed;
use retune_core::spec::{Kind, WeightSpec};
use retune_core::weights::{Packing, WeightSource, Weights};
use retune_files::Dtype;
use retune_files::ggml::BlockType;
use retune_methods::adapter::Adapter;
use retune_models::config::Config;
use retune_models::export::{SHARD_BYTES, write_folder};
use retune_run::open::Opened;
use retune_run::ship::{Shift, Shipping, Way};
use retune_testkit::open::weights;
use retune_testkit::run::outputs;
use retune_testkit::tiny::{MemorySource, configs};
use serde_json::json;
use tensor::Device;

const VOCABULARY: usize = 32;
const RANK: usize = 2;
/// Scale of the adapter: alpha / rank.
const SCALE: f32 = 1.5;
/// The linear layers the adapter changes.
const TARGETS: [&str; 2] = ["q_proj", "down_proj"];
const IDS: [u32; 9] = [3, 17, 8, 29, 1, 12, 30, 2, 9];

/// A llama whose rows are whole blocks, in a folder.
fn base(folder: &Path) -> (Box<dyn Model>, MemorySource) {
    let mut config = configs().into_iter().find(|(name, _)| *name == "llama").unwrap().1;
    config["hidden_size"] = json!(32);
    config["intermediate_size"] = json!(64);
    config["head_dim"] = json!(8);
    let model = retune_models::build(&Config::new(Path::new("config.json"), config)).unwrap();
    let source = MemorySource::random(model.spec(), Seed(21));
    let stored = source.clone();
    let spec = Arc::clone(model.spec());
    let weights = weights(Arc::new(stored), &spec);
    write_folder(folder, model.spec(), Dtype::F32, SHARD_BYTES, &[], |w| weights.values(&w.name))
        .unwrap();
    (model, source)
}

/// Factors from a formula: `A` is `[RANK, inputs]`, `B` `[outputs, RANK]`.
fn factors(weight: &WeightSpec) -> (Vec<f32>, Vec<f32>) {
    let [outputs, inputs] = weight.matrix();
    let wave = |count: usize, step: f32| -> Vec<f32> {
        (0..count).map(|i| 0.2 * (i as f32 * step).sin()).collect()
    };
    (wave(RANK * inputs, 0.7), wave(outputs * RANK, 1.3))
}

fn adapter(model: &dyn Model, folder: &Path) {
    let mut adapter = Adapter {
        config: json!({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK,
            "lora_alpha": SCALE * RANK as f32, "target_modules": TARGETS}),
        ..Adapter::default()
    };
    for weight in model.spec().weights.iter().filter(|weight| is_changed(weight)) {
        let [outputs, inputs] = weight.matrix();
        let (a, b) = factors(weight);
        let module = format!("base_model.model.{}", weight.module());
        adapter.tensors.insert(format!("{module}.lora_A.weight"), (vec![RANK, inputs], a));
        adapter.tensors.insert(format!("{module}.lora_B.weight"), (vec![outputs, RANK], b));
    }
    adapter.write(folder, "card").unwrap();
}

fn is_changed(weight: &WeightSpec) -> bool {
    TARGETS.iter().any(|target| weight.module().ends_with(target))
}

/// `Δ = scale · B A`, entry by entry.
fn add_change(weight: &WeightSpec, values: &mut [f32]) {
    if !is_changed(weight) {
        return;
    }
    let [_, inputs] = weight.matrix();
    let (a, b) = factors(weight);
    for (place, value) in values.iter_mut().enumerate() {
        let (row, column) = (place / inputs, place % inputs);
        let product: f32 = (0..RANK).map(|k| b[row * RANK + k] * a[k * inputs + column]).sum();
        *value += SCALE * product;
    }
}

/// Q4_0 from its definition: 32 values share a scale, the one of largest size divided by -8, in
/// half precision; each is a whole number from 0 to 15, less 8, times the scale.
fn round(weight: &WeightSpec, values: &mut [f32]) {
    if matches!(weight.kind, Kind::Norm | Kind::Bias) {
        return;
    }
    for block in values.chunks_exact_mut(32) {
        let largest =
            block.iter().fold(0.0f32, |most, x| if x.abs() > most.abs() { *x } else { most });
        let scale = largest / -8.0;
        let half = Dtype::F16.encode(&[scale]).unwrap();
        let mut kept = [0.0];
        BlockType::F16.dequantize(&half, &mut kept).unwrap();
        for x in block {
            let level = (*x * (1.0 / scale) + 8.5).floor().min(15.0);
            *x = (level - 8.0) * kept[0];
        }
    }
}

/// The weights of a way by its formula.
fn expected(model: &dyn Model, source: &MemorySource, way: Way) -> Arc<dyn WeightSource> {
    let spec = Arc::clone(model.spec());
    let weights = weights(Arc::new(source.clone()), &spec);
    let mut out = MemorySource::default();
    for weight in &model.spec().weights {
        let mut values = weights.values(&weight.name).unwrap();
        let steps: &[fn(&WeightSpec, &mut [f32])] = match way {
            Way::Merged => &[add_change],
            Way::MergedQuantised => &[add_change, round],
            // The adapter beside the rounded base is, in exact arithmetic, their sum.
            Way::Attached | Way::DequantisedMerged => &[round, add_change],
            Way::DequantisedMergedQuantised => &[round, add_change, round],
        };
        for step in steps {
            step(weight, &mut values);
        }
        out.insert(&weight.name, &weight.shape, values);
    }
    Arc::new(out)
}

/// Log-probabilities in double precision, `[tokens, VOCABULARY]`.
fn log_probabilities(logits: &[f32]) -> Vec<f64> {
    let row = |row: &[f32]| {
        let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        row.iter().map(|x| f64::from(*x) - sum.ln()).collect::<Vec<f64>>()
    };
    logits.chunks_exact(VOCABULARY).flat_map(row).collect()
}

#[test]
fn five_ways_have_the_outputs_of_their_formulas() {
    let home = tempfile::tempdir().unwrap();
    let (model, source) = base(&home.path().join("base"));
    adapter(&*model, &home.path().join("adapter"));
    let checkpoint = retune_models::open(&home.path().join("base")).unwrap();
    let spec = Arc::clone(checkpoint.model.spec());
    let packing = Packing::default();
    let weights =
        Weights::new(Arc::clone(&checkpoint.source), spec, packing, &Device::flex()).unwrap();
    let opened = Opened { checkpoint, weights, fingerprint: "x".to_owned(), under: Vec::new() };
    let batch = Batch::new(&[Document {
        tokens: IDS.to_vec(),
        learn: vec![true; IDS.len()],
        ..Document::default()
    }])
    .unwrap();
    let path = home.path().join("adapter");
    let shipping = Shipping::open(&opened, &path, BlockType::Q4_0, false).unwrap();
    let shifts = shipping.measure(std::slice::from_ref(&batch), usize::MAX).unwrap();
    assert_eq!(shifts.iter().map(|shift| shift.way).collect::<Vec<_>>(), Way::ALL);

    let rows = |way: Way| {
        let source = expected(&*model, &source, way);
        log_probabilities(&outputs(&*model, &source, &batch, Packing::default()).unwrap())
    };
    let reference = rows(Way::Attached);
    let mut divergences = Vec::new();
    for Shift { way, divergence, largest, loss, .. } in shifts {
        let found = rows(way);
        // The last token has no next one to predict.
        let each: Vec<f64> = (0..IDS.len() - 1)
            .map(|t| {
                let row = t * VOCABULARY..(t + 1) * VOCABULARY;
                let pairs = reference[row.clone()].iter().zip(&found[row]);
                pairs.map(|(p, q)| p.exp() * (p - q)).sum()
            })
            .collect();
        let mean = each.iter().sum::<f64>() / each.len() as f64;
        let most = each.iter().copied().fold(0.0, f64::max);
        let losses = (0..IDS.len() - 1).map(|t| -found[t * VOCABULARY + IDS[t + 1] as usize]);
        let mean_loss = losses.sum::<f64>() / each.len() as f64;
        for (what, f, e) in
            [("mean", divergence, mean), ("largest", largest, most), ("loss", loss, mean_loss)]
        {
            assert!((f - e).abs() < 2e-6, "{} {what}: {f}, by hand {e}", way.name());
        }
        divergences.push(divergence);
    }
    // They are five different things, but for the two that are one in exact arithmetic.
    let [attached, merged, quantised, exact, twice] = divergences[..] else { unreachable!() };
    assert!(attached == 0.0 && exact < 1e-6, "{attached} {exact}");
    assert!(merged > 1e-3 && quantised > 1e-3 && twice > 1e-4, "{merged} {quantised} {twice}");
}
