//! Methods that change states, on tiny models of every family: reading piece by piece is reading
//! at once, neighbours do not matter, running layers again changes no gradient, and what is saved
//! computes what was trained.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::path::Path;
use std::sync::Arc;

use retune_core::batch::{Batch, Document};
use retune_core::change::Changes;
use retune_core::kernels::Spans;
use retune_core::method::Method;
use retune_core::model::{Model, Output, Tuned};
use retune_core::parameters::{Parameters, to_vec};
use retune_core::pass::KeyValueCache;
use retune_core::random::Seed;
use retune_core::spec::Head;
use retune_core::weights::{WeightSource, Weights};
use retune_methods::adapter::Adapter;
use retune_methods::registry;
use retune_models::config::Config;
use retune_options::Document as Text;
use retune_testkit::golden::assert_close;
use retune_testkit::open::weights;
use retune_testkit::tiny::{MemorySource, configs};
use retune_train::backprop::Backprop;
use tensor::Device;

/// The methods that change states; those that change weights have tests of their own.
const METHODS: &[&str] = &[
    "prompt-tuning",
    "p-tuning",
    "prefix-tuning",
    "multitask-prompt-tuning",
    "cpt",
    "cartridge",
    "llama-adapter",
    "poly",
    "lily",
    "ssf",
    "unified-view",
    "dept",
    "iaa",
    "reft",
    "autopeft",
    "compacter",
    "unipelt",
    "loretta-adp",
    "adapter-fusion",
];

/// Methods whose change of a token looks at later tokens of its text.
const LOOKS_AHEAD: &[&str] = &["lily"];

struct Tiny {
    model: Box<dyn Model>,
    weights: Weights,
    changes: Changes,
    parameters: Parameters,
    method: Box<dyn Method>,
}

fn method(name: &str, options: &str) -> Box<dyn Method> {
    let plugin = registry::find(name).unwrap();
    let text = Text::parse("recipe.toml", options).unwrap();
    text.read(|reader| (plugin.read)(reader)).unwrap_or_else(|report| panic!("{report:?}")).0
}

fn open(config: &serde_json::Value) -> (Box<dyn Model>, Weights) {
    let model =
        retune_models::build(&Config::new(Path::new("config.json"), config.clone())).unwrap();
    let source: Arc<dyn WeightSource> = Arc::new(MemorySource::random(model.spec(), Seed(3)));
    let spec = Arc::clone(model.spec());
    let weights = weights(source, &spec);
    (model, weights)
}

impl Tiny {
    /// Attaches a method and moves everything that trains, so that no part is without effect.
    fn new(config: &serde_json::Value, method: Box<dyn Method>) -> Self {
        let (model, weights) = open(config);
        let mut parameters = Parameters::new(&Device::flex());
        let changes = method.attach(&weights, &mut parameters, Seed(5)).unwrap();
        let plan = method.plan(model.spec()).unwrap();
        let made: Vec<_> = parameters.iter().map(|(_, p)| (&p.name, &p.shape, p.trains)).collect();
        let planned: Vec<_> =
            plan.parameters.iter().map(|p| (&p.name, &p.shape, p.trains)).collect();
        assert_eq!(made, planned);
        let ids: Vec<_> = parameters.iter().filter(|(_, p)| p.trains).map(|(id, _)| id).collect();
        for id in ids {
            let mut random = Seed(7).stream("noise", &[id.index() as u64]);
            parameters.update(id, |values| {
                for value in values {
                    *value += 0.1 * random.normal() as f32;
                }
            });
        }
        Self { model, weights, changes, parameters, method }
    }

    fn tuned(&self) -> Tuned<'_> {
        Tuned {
            model: &*self.model,
            weights: &self.weights,
            changes: &self.changes,
            parameters: &self.parameters,
        }
    }

    fn outputs(&self, batch: &Batch, cache: Option<&mut KeyValueCache>) -> Vec<f32> {
        let read = |pass: &mut retune_core::pass::Pass<'_>, output| {
            Ok(match output {
                Output::States(states) => {
                    let rows: Vec<usize> = (0..batch.num_tokens()).collect();
                    to_vec(pass.logits(&states, &rows)?.inner())
                }
                Output::Classes(rows) | Output::Embeddings(rows) => to_vec(rows.inner()),
                Output::Pairs(pairs) => to_vec(pairs.similarities().inner()),
            })
        };
        self.tuned().evaluate(batch, cache, read).unwrap()
    }
}

fn document(length: u32, seed: u32, class: Option<u32>) -> Document {
    let tokens: Vec<u32> = (0..length).map(|t| (t * 7 + seed * 5 + 1) % 32).collect();
    let learn = vec![true; tokens.len()];
    Document { tokens, learn, class, row: seed as usize, ..Document::default() }
}

fn documents() -> Vec<Document> {
    vec![document(9, 1, Some(2)), document(4, 2, Some(0)), document(6, 3, Some(1))]
}

fn parts(parts: &[(&[u32], usize)]) -> Batch {
    let tokens: Vec<u32> = parts.iter().flat_map(|(ids, _)| ids.iter().copied()).collect();
    Batch {
        spans: Spans::from_lengths(parts.iter().map(|(ids, _)| ids.len())),
        positions: parts.iter().flat_map(|(ids, start)| *start..start + ids.len()).collect(),
        pixels: Vec::new(),
        token_types: None,
        targets: vec![None; tokens.len()],
        classes: vec![None; parts.len()],
        rows: (0..parts.len()).collect(),
        tasks: None,
        tokens,
    }
}

fn for_all(check: impl Fn(&str, &serde_json::Value, &str, &str)) {
    for (family, config) in configs() {
        let (model, _) = open(&config);
        for name in METHODS {
            for options in method(name, "").examples() {
                if !method(name, options).promises().refuses(model.spec()) {
                    let what = format!("{name} [{}] on {family}", options.replace('\n', ", "));
                    check(&what, &config, name, options);
                }
            }
        }
    }
}

#[test]
fn pieces_over_a_cache_are_the_whole_text() {
    for_all(|what, config, name, options| {
        let tiny = Tiny::new(config, method(name, options));
        let spec = tiny.model.spec();
        if !spec.causal || !matches!(spec.head, Head::Language { .. }) {
            return;
        }
        if LOOKS_AHEAD.contains(&name) {
            return;
        }
        let [a, b] = [document(9, 1, None).tokens, document(7, 2, None).tokens];
        let whole = tiny.outputs(&parts(&[(&a, 0), (&b, 0)]), None);
        let width = spec.vocabulary;
        let mut cache = KeyValueCache::default();
        // The second text begins while the first goes on; then the first ends and leaves.
        let first = tiny.outputs(&parts(&[(&a[..5], 0)]), Some(&mut cache));
        let second = tiny.outputs(&parts(&[(&a[5..], 5), (&b[..3], 0)]), Some(&mut cache));
        cache.select(&[1]);
        let third = tiny.outputs(&parts(&[(&b[3..], 3)]), Some(&mut cache));
        let pieces = [&first[..], &second[..], &third[..]].concat();
        assert_eq!(pieces.len(), 16 * width);
        assert_close(what, &pieces, &whole, 2e-5);
    });
}

#[test]
fn neighbours_do_not_matter() {
    for_all(|what, config, name, options| {
        let tiny = Tiny::new(config, method(name, options));
        let together = tiny.outputs(&Batch::new(&documents()).unwrap(), None);
        let alone: Vec<f32> = documents()
            .into_iter()
            .flat_map(|document| tiny.outputs(&Batch::new(&[document]).unwrap(), None))
            .collect();
        assert_close(what, &together, &alone, 1e-5);
    });
}

#[test]
fn layers_run_again_give_the_same_gradients() {
    for_all(|what, config, name, options| {
        let tiny = Tiny::new(config, method(name, options));
        if tiny.model.spec().head == Head::Embedding {
            return;
        }
        let batches = [Batch::new(&documents()).unwrap()];
        let learner = Backprop { seed: Seed(1), recompute: false };
        let step = learner.step(&tiny.tuned(), &batches, 0).unwrap();
        if tiny.changes.across_layers().is_some() {
            let again = Backprop { recompute: true, ..learner };
            let error = again.step(&tiny.tuned(), &batches, 0).unwrap_err().to_string();
            assert!(error.contains("train.recompute"), "{what}: {error}");
        } else {
            let again = Backprop { recompute: true, ..learner };
            let again = again.step(&tiny.tuned(), &batches, 0).unwrap();
            for (kept, recomputed) in step.gradients.iter().zip(&again.gradients) {
                let (kept, recomputed) = (kept.as_deref(), recomputed.as_deref());
                assert_close(what, recomputed.unwrap_or(&[]), kept.unwrap_or(&[]), 2e-6);
            }
        }
    });
}

#[test]
fn what_is_saved_computes_what_was_trained() {
    for_all(|what, config, name, options| {
        let tiny = Tiny::new(config, method(name, options));
        let spec = tiny.model.spec();
        let adapter = Adapter::collect(&*tiny.method, spec, &tiny.parameters, None).unwrap();
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("adapter");
        adapter.write(&folder, "card").unwrap();
        let read = Adapter::read(&folder).unwrap();
        let loaded = read.method().unwrap();
        let (model, weights) = open(config);
        let mut parameters = Parameters::new(&Device::flex());
        let changes = loaded.attach(&weights, &mut parameters, Seed(99)).unwrap();
        read.fill(&folder, &mut parameters).unwrap_or_else(|error| panic!("{what}: {error}"));
        let again = Tiny { model, weights, changes, parameters, method: loaded };
        let batch = Batch::new(&documents()).unwrap();
        assert_close(what, &again.outputs(&batch, None), &tiny.outputs(&batch, None), 2e-6);
        let written = Adapter::collect(&*again.method, spec, &again.parameters, None).unwrap();
        assert_eq!((written.config, written.tensors), (read.config, read.tensors), "{what}");
    });
}

/// Adapters that were trained before come from their folders, stay as they are, and lie in the file
/// beside what was learned over them.
#[test]
fn adapters_of_two_folders_are_fused() {
    let config = &configs().into_iter().find(|(name, _)| *name == "llama").unwrap().1;
    let home = tempfile::tempdir().unwrap();
    let mut folders = Vec::new();
    for size in [3, 4] {
        let rows = format!("[[modules]]\nsize = {size}\ninsertion = 'sequential'");
        let tiny = Tiny::new(config, method("unified-view", &rows));
        let spec = tiny.model.spec();
        let folder = home.path().join(size.to_string());
        let adapter = Adapter::collect(&*tiny.method, spec, &tiny.parameters, None).unwrap();
        adapter.write(&folder, "card").unwrap();
        folders.push((folder, adapter.tensors));
    }
    let [one, two] = [0, 1].map(|place| folders[place].0.display().to_string());
    let fused =
        Tiny::new(config, method("adapter-fusion", &format!("adapters = ['{one}', '{two}']")));
    let spec = fused.model.spec();
    // Query with its bias, key and value in every layer.
    let trains = spec.num_layers * (3 * spec.width * spec.width + spec.width);
    assert_eq!(fused.parameters.num_trainable(), trains);
    for (place, (_, tensors)) in folders.iter().enumerate() {
        for (name, (shape, values)) in tensors {
            let own = name.strip_prefix("base_model.model.").unwrap();
            let here = format!("base_model.model.fusion.adapters.{place}.{own}");
            let id = fused.parameters.find(&here).unwrap();
            assert_eq!(
                (&fused.parameters.get(id).shape, &fused.parameters.values(id)),
                (shape, values)
            );
        }
    }
    let batch = Batch::new(&documents()).unwrap();
    let base = Tiny::new(config, method("adapter-fusion", "")).outputs(&batch, None);
    let found = fused.outputs(&batch, None);
    assert_ne!(found, base);
    let folder = home.path().join("fused");
    let adapter = Adapter::collect(&*fused.method, spec, &fused.parameters, None).unwrap();
    adapter.write(&folder, "card").unwrap();
    for (folder, _) in &folders {
        std::fs::remove_dir_all(folder).unwrap();
    }
    let read = Adapter::read(&folder).unwrap();
    let (model, weights) = open(config);
    let mut parameters = Parameters::new(&Device::flex());
    let loaded = read.method().unwrap();
    let changes = loaded.attach(&weights, &mut parameters, Seed(99)).unwrap();
    read.fill(&folder, &mut parameters).unwrap();
    let again = Tiny { model, weights, changes, parameters, method: loaded };
    assert_eq!(again.outputs(&batch, None), found);
    let refused = method("adapter-fusion", &format!("adapters = ['{one}', '{two}']"));
    let error = refused.plan(again.model.spec()).unwrap_err().to_string();
    assert!(error.contains(&one), "{error}");
}
