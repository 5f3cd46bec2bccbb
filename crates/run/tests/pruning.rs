//! DSEE's pruning step, and the smaller model that is exported of it.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::Path;
use std::sync::Arc;

use retune_core::batch::{Batch, Document};
use retune_core::change::{Changes, Mode, Scope};
use retune_core::kernels::matrix::Form;
use retune_core::method::{Method, StepView};
use retune_core::model::{Model, Output, Tuned};
use retune_core::parameters::{Parameters, to_vec};
use retune_core::random::Seed;
use retune_core::spec::ModelSpec;
use retune_core::step::StepParts;
use retune_core::weights::{Packing, WeightSource, Weights};
use retune_files::Dtype;
use retune_methods::registry;
use retune_models::config::Config;
use retune_options::Document as Toml;
use retune_run::export::Beside;
use retune_run::structured::{Cut, write_structured};
use retune_testkit::run::outputs;
use retune_testkit::tiny::{MemorySource, configs};
use serde_json::json;
use tensor::Device;

const NUM_STEPS: u64 = 4;

/// A model that DSEE has pruned at the second of four steps.
struct Pruned {
    model: Box<dyn Model>,
    weights: Weights,
    changes: Changes,
    parameters: Parameters,
}

impl Pruned {
    fn tuned(&self) -> Tuned<'_> {
        let Self { model, weights, changes, parameters } = self;
        Tuned { model: model.as_ref(), weights, changes, parameters }
    }

    fn spec(&self) -> &ModelSpec {
        self.model.spec()
    }

    fn merged(&self, name: &str) -> Vec<f32> {
        let scope = Scope::new(&self.parameters, Mode::Evaluate);
        to_vec(self.changes.materialize(name, &self.weights, &scope).unwrap())
    }
}

fn model(name: &str, heads: Option<[usize; 2]>) -> (Box<dyn Model>, Weights) {
    let mut config = configs().into_iter().find(|(known, _)| *known == name).unwrap().1;
    if let Some([heads, keys]) = heads {
        config["num_attention_heads"] = json!(heads);
        config["num_key_value_heads"] = json!(keys);
    }
    let model = retune_models::build(&Config::new(Path::new("config.json"), config)).unwrap();
    let source = Arc::new(MemorySource::random(model.spec(), Seed(11)));
    let packing = Packing { form: Form::F32, ..Packing::default() };
    let spec = Arc::clone(model.spec());
    let weights = Weights::new(source, spec, packing, &Device::flex()).unwrap();
    (model, weights)
}

fn dsee(options: &str) -> Box<dyn Method> {
    let plugin = registry::find("dsee").unwrap();
    Toml::parse("test.toml", options).unwrap().read(plugin.read).unwrap().0
}

/// Tunes as noise would, and prunes.
fn pruned(name: &str, heads: Option<[usize; 2]>, options: &str) -> Pruned {
    let (model, weights) = model(name, heads);
    let mut method = dsee(&format!("rank = 2\nentries = 5\n{options}"));
    let mut parameters = Parameters::new(&Device::flex());
    let changes = method.attach(&weights, &mut parameters, Seed(7)).unwrap();
    let ids: Vec<_> = parameters.iter().filter(|(_, p)| p.trains).map(|(id, _)| id).collect();
    for id in ids {
        let mut random = Seed(3).stream("noise", &[id.index() as u64]);
        parameters.update(id, |values| random.fill_normal(values, 0.3));
    }
    assert_eq!(method.stages(NUM_STEPS).unwrap(), [2, 2]);
    let mut parts = StepParts::new(&parameters);
    parts.spec = ModelSpec::clone(model.spec());
    for step in 1..=NUM_STEPS {
        let view = parts.view(step, NUM_STEPS, &mut parameters);
        method.on_step(&mut StepView { weights: Some(&weights), ..view }).unwrap();
        let off: usize = parameters
            .iter()
            .filter(|(_, p)| p.name.contains(".pruned."))
            .map(|(_, p)| p.count())
            .sum();
        assert_eq!(off > 0, step >= 2, "step {step}");
    }
    Pruned { model, weights, changes, parameters }
}

/// Computes the size of the tuned update without its scale, from the adapter's tensors alone.
fn update(pruned: &Pruned, module: &str) -> Option<Vec<f32>> {
    let name = |part: &str| format!("base_model.model.{module}.{part}");
    let find = |part: &str| pruned.parameters.find(&name(part));
    let (a, b) = (find("lora_A.weight")?, find("lora_B.weight")?);
    let (a, b) = (pruned.parameters.values(a), pruned.parameters.values(b));
    let [rows, columns] = pruned.spec().weight(&format!("{module}.weight")).unwrap().matrix();
    let mut sum = vec![0.0; rows * columns];
    for row in 0..rows {
        for column in 0..columns {
            let product = b[row * 2] * a[column] + b[row * 2 + 1] * a[columns + column];
            sum[row * columns + column] = product;
        }
    }
    let id = find("shira_weight").unwrap();
    for (place, value) in pruned.parameters.indices(id).iter().zip(pruned.parameters.values(id)) {
        sum[*place as usize] += value;
    }
    Some(sum.into_iter().map(f32::abs).collect())
}

fn attention(layer: usize, which: &str) -> String {
    format!("model.layers.{layer}.self_attn.{which}_proj")
}

/// Says which heads' columns of the output projection are zero.
fn silent(pruned: &Pruned, layer: usize) -> Vec<usize> {
    let spec = pruned.spec();
    let values = pruned.merged(&format!("{}.weight", attention(layer, "o")));
    let (width, columns) = (spec.head_width, spec.num_heads * spec.head_width);
    let is_silent = |head: &usize| {
        values
            .chunks(columns)
            .all(|row| row[head * width..(head + 1) * width].iter().all(|value| *value == 0.0))
    };
    (0..spec.num_heads).filter(is_silent).collect()
}

/// Adds up the update of queries and values over the rows of each query head.
fn head_scores(pruned: &Pruned, layer: usize) -> Vec<f64> {
    let spec = pruned.spec();
    let size = spec.head_width * spec.width;
    let sums = |which: &str| -> Vec<f64> {
        let update = update(pruned, &attention(layer, which)).unwrap();
        update.chunks(size).map(|rows| rows.iter().map(|v| f64::from(*v)).sum()).collect()
    };
    let (queries, values) = (sums("q"), sums("v"));
    let shared = spec.num_heads / spec.num_key_heads;
    (0..spec.num_heads).map(|head| queries[head] + values[head / shared]).collect()
}

fn lowest(scores: &[(f64, usize)], count: usize) -> Vec<usize> {
    let mut order = scores.to_vec();
    order.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut found: Vec<usize> = order[..count].iter().map(|(_, place)| *place).collect();
    found.sort_unstable();
    found
}

fn logits(tuned: &Tuned<'_>, batch: &Batch) -> Vec<f32> {
    tuned
        .evaluate(batch, None, |pass, output| {
            let Output::States(states) = output else { unreachable!("a language model") };
            let rows: Vec<usize> = (0..batch.num_tokens()).collect();
            Ok(to_vec(pass.logits(&states, &rows)?.inner()))
        })
        .unwrap()
}

/// Exports, opens again, and compares the logits with the masked model's.
fn export(pruned: &Pruned) -> (Cut, Box<dyn Model>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("smaller");
    let card = |cut: &Cut| format!("{cut:?}");
    let cut =
        write_structured(&pruned.tuned(), &Beside::default(), Dtype::F32, &card, &path).unwrap();
    let smaller = retune_models::open(&path).unwrap();
    let document = |tokens: Vec<u32>| Document {
        learn: vec![false; tokens.len()],
        tokens,
        ..Document::default()
    };
    let batch = Batch::new(&[document((0..9).collect()), document(vec![30, 4, 4, 17])]).unwrap();
    let source: Arc<dyn WeightSource> = smaller.source;
    let found = outputs(smaller.model.as_ref(), &source, &batch, Packing::default()).unwrap();
    let expected = logits(&pruned.tuned(), &batch);
    assert_eq!(found.len(), expected.len());
    for (place, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert!((found - expected).abs() < 1e-5, "logit {place}: {found}, expected {expected}");
    }
    (cut, smaller.model)
}

#[test]
fn the_heads_with_the_smallest_update_go_and_are_cut_out() {
    // Every head has its own key; queries, keys and values have biases too.
    let pruned = pruned("qwen2", Some([4, 4]), "prune = \"heads\"\nprune_heads = 1");
    for layer in 0..2 {
        let scores: Vec<(f64, usize)> = head_scores(&pruned, layer).into_iter().zip(0..).collect();
        assert_eq!(silent(&pruned, layer), lowest(&scores, 1), "layer {layer}");
        // The update goes with the base.
        let head = silent(&pruned, layer)[0];
        for which in ["q", "k", "v"] {
            let values = pruned.merged(&format!("{}.weight", attention(layer, which)));
            let zeros = values.iter().filter(|value| **value == 0.0).count();
            assert_eq!(zeros, 4 * 16, "{which} of layer {layer}");
            assert!(values[head * 64..(head + 1) * 64].iter().all(|value| *value == 0.0));
        }
    }
    let (cut, smaller) = export(&pruned);
    assert_eq!((cut.heads, cut.key_heads, cut.dead_heads_left), ([4, 3], [4, 3], 0));
    let spec = smaller.spec();
    assert_eq!(spec.weight("model.layers.1.self_attn.v_proj.weight").unwrap().shape, [12, 16]);
    assert_eq!(spec.weight("model.layers.1.self_attn.k_proj.bias").unwrap().shape, [12]);
    assert_eq!(spec.weight("model.layers.0.self_attn.o_proj.weight").unwrap().shape, [16, 12]);
    // Four matrices of 16 x 16 a layer become 16 x 12; those of the feed-forward network stay.
    let (attention, inner) = (4 * 16 * 16, 3 * 16 * 24);
    assert_eq!(cut.flops_per_token[0], 2 * 2 * (attention + inner));
    assert_eq!(cut.flops_per_token[1], 2 * 2 * (attention * 3 / 4 + inner));
    assert_eq!(cut.nonzero_flops_per_token, cut.flops_per_token[1]);
}

#[test]
fn heads_that_share_a_key_go_as_a_group() {
    let pruned = pruned("llama", None, "prune = \"heads\"\nprune_heads = 2");
    for layer in 0..2 {
        let scores = head_scores(&pruned, layer);
        let groups = [(scores[0] + scores[1], 0), (scores[2] + scores[3], 1)];
        let group = lowest(&groups, 1)[0];
        assert_eq!(silent(&pruned, layer), [2 * group, 2 * group + 1], "layer {layer}");
    }
    let (cut, smaller) = export(&pruned);
    assert_eq!((cut.heads, cut.key_heads), ([4, 2], [2, 1]));
    assert_eq!((smaller.spec().num_heads, smaller.spec().num_key_heads), (2, 1));
}

#[test]
fn as_many_of_each_group_go_where_keys_stay() {
    let pruned = pruned("llama", Some([6, 2]), "prune = \"heads\"\nprune_heads = 2");
    for layer in 0..2 {
        let scores: Vec<(f64, usize)> = head_scores(&pruned, layer).into_iter().zip(0..).collect();
        let expected = [lowest(&scores[..3], 1), lowest(&scores[3..], 1)].concat();
        assert_eq!(silent(&pruned, layer), expected, "layer {layer}");
        let keys = pruned.weights.values(&format!("{}.weight", attention(layer, "k"))).unwrap();
        assert!(keys.iter().all(|value| *value != 0.0));
    }
    let (cut, _) = export(&pruned);
    assert_eq!((cut.heads, cut.key_heads), ([6, 4], [2, 2]));
}

#[test]
fn single_weights_with_the_smallest_score_go_group_by_group() {
    let pruned = pruned("llama", None, "prune = \"weights\"\nprune_share = 0.25");
    // Queries and values by their update, all others by themselves: each a group of its own.
    let (mut tuned, mut others) = (Vec::new(), Vec::new());
    for weight in pruned.spec().linears().filter(|weight| weight.layer.is_some()) {
        let (list, scores) = match update(&pruned, weight.module()) {
            Some(update) => (&mut tuned, update),
            None => (&mut others, pruned.weights.values(&weight.name).unwrap()),
        };
        let scores = scores.into_iter().map(|value| f64::from(value.abs()));
        list.extend(scores.zip(0_u32..).map(|(score, place)| (score, weight.name.clone(), place)));
    }
    assert_eq!((tuned.len(), others.len()), (2 * (256 + 128), 2 * (128 + 256 + 3 * 384)));
    for mut list in [tuned, others] {
        let count = list.len() / 4;
        list.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut gone: Vec<(String, u32)> =
            list.drain(..count).map(|(_, name, place)| (name, place)).collect();
        gone.sort();
        let names: std::collections::BTreeSet<&String> =
            gone.iter().map(|(name, _)| name).collect();
        let found: Vec<(String, u32)> = names
            .into_iter()
            .flat_map(|name| {
                let module = name.strip_suffix(".weight").unwrap();
                let name_of = format!("base_model.model.{module}.pruned.shira_weight");
                let id = pruned.parameters.find(&name_of).unwrap();
                let places = pruned.parameters.indices(id).to_vec();
                places.into_iter().map(|place| (name.clone(), place))
            })
            .collect();
        assert_eq!(found, gone);
    }
    // The base loses them, the update does not: `W ⊙ S1 + s (B A + S2)`.
    let name = format!("{}.weight", attention(0, "k"));
    let zeros = pruned.merged(&name).iter().filter(|value| **value == 0.0).count();
    assert!(zeros > 0);
    let name = format!("{}.weight", attention(0, "q"));
    assert!(pruned.merged(&name).iter().all(|value| *value != 0.0));
}

#[test]
fn what_cannot_be_pruned_is_refused_with_the_nearest_choice() {
    let plan = |name: &str, heads, options: &str| {
        let (model, _) = model(name, heads);
        dsee(options).plan(model.spec()).unwrap_err().to_string()
    };
    let why =
        plan("llama", Some([6, 2]), "rank = 2\nentries = 1\nprune = \"heads\"\nprune_heads = 5");
    assert!(why.contains("a multiple of 3") && why.contains("nearest: 4"), "{why}");
    let why = plan("llama", None, "rank = 2\nentries = 1\nprune = \"heads\"\nprune_heads = 4");
    assert!(why.contains("no head would be left"), "{why}");
    let why = plan("gpt2", None, "rank = 2\nentries = 1\nprune = \"heads\"");
    assert!(why.contains("prune") && why.contains("weights"), "{why}");
}

#[test]
fn an_architecture_without_a_head_width_of_its_own_is_refused() {
    let pruned = pruned("bert classes", None, "prune = \"heads\"\nprune_heads = 1");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("smaller");
    let error = write_structured(
        &pruned.tuned(),
        &Beside::default(),
        Dtype::F32,
        &|_: &Cut| String::new(),
        &path,
    );
    let why = error.unwrap_err().to_string();
    assert!(why.contains("BertForSequenceClassification") && why.contains("--format hf"), "{why}");
    assert!(!path.exists());
}
