//! Methods that change states, on tiny models of every family: reading piece by piece is reading
//! at once, neighbours do not matter, gradients are differences of the loss, running layers again
//! changes nothing, and what is saved computes what was trained.
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
use retune_core::weights::{Packing, WeightSource, Weights};
use retune_methods::adapter::Adapter;
use retune_methods::registry;
use retune_models::config::Config;
use retune_options::Document as Text;
use retune_testkit::golden::assert_close;
use retune_testkit::tiny::{MemorySource, configs};
use retune_train::backprop::Backprop;
use tensor::Device;

/// What a method may lack.
#[derive(Clone, Copy, PartialEq)]
enum Lacks {
    Nothing,
    /// Texts that are read together share something.
    Independence,
    /// The branch spans layers, which cannot run again one by one.
    Recomputing,
}

/// Methods with options that fit models of 2 layers and width 16, and families each refuses.
const METHODS: &[(&str, &str, Lacks, &[&str])] = &[
    ("prompt-tuning", "tokens = 3\ninit_tokens = [4, 5]", Lacks::Nothing, &[]),
    ("p-tuning", "tokens = 3\nhidden = 6", Lacks::Nothing, &[]),
    ("p-tuning", "tokens = 3\nhidden = 6\nencoder = 'lstm'", Lacks::Nothing, &[]),
    ("prefix-tuning", "tokens = 3\nhidden = 6", Lacks::Nothing, &[]),
    ("prefix-tuning", "tokens = 3\nprojection = false", Lacks::Nothing, &[]),
    ("multitask-prompt-tuning", "tokens = 3\ntasks = 2\nrank = 2", Lacks::Nothing, &[]),
    ("cpt", "context = [3, 9, 4]\nkinds = [1, 2, 4]", Lacks::Nothing, &[]),
    ("cartridge", "tokens = 4", Lacks::Nothing, &[]),
    (
        "llama-adapter",
        "tokens = 3\ntop_layers = 1",
        Lacks::Nothing,
        &["gpt2", "bert", "bert classes"],
    ),
    ("poly", "rank = 2\ntasks = 2\nskills = 3\nsplits = 2", Lacks::Nothing, &[]),
    ("lily", "rank = 2\ntargets = ['.*layers.*', '.*h\\..*']", Lacks::Independence, &["*"]),
    ("lily", "rank = 2", Lacks::Independence, &[]),
];

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
    let weights = Weights::new(source, spec, Packing::default(), &Device::flex()).unwrap();
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
        token_types: None,
        targets: vec![None; tokens.len()],
        classes: vec![None; parts.len()],
        rows: (0..parts.len()).collect(),
        tasks: None,
        tokens,
    }
}

fn for_all(check: impl Fn(&str, &serde_json::Value, &str, &str, Lacks)) {
    for (family, config) in configs() {
        for (name, options, lacks, refused) in METHODS {
            if !refused.contains(&family) && !refused.contains(&"*") {
                let what = format!("{name} [{}] on {family}", options.replace('\n', ", "));
                check(&what, &config, name, options, *lacks);
            }
        }
    }
}

#[test]
fn pieces_over_a_cache_are_the_whole_text() {
    for_all(|what, config, name, options, lacks| {
        let tiny = Tiny::new(config, method(name, options));
        let spec = tiny.model.spec();
        if !spec.causal || !matches!(spec.head, Head::Language { .. }) {
            return;
        }
        if lacks == Lacks::Independence {
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
    for_all(|what, config, name, options, lacks| {
        if lacks == Lacks::Independence {
            return;
        }
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
fn gradients_are_differences_of_the_loss() {
    for_all(|what, config, name, options, lacks| {
        let mut tiny = Tiny::new(config, method(name, options));
        if tiny.model.spec().head == Head::Embedding {
            return;
        }
        let batches = [Batch::new(&documents()).unwrap()];
        let learner = Backprop { seed: Seed(1), recompute: false };
        let step = learner.step(&tiny.tuned(), &batches, 0).unwrap();
        if lacks == Lacks::Recomputing {
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
        let ids: Vec<_> = tiny.parameters.iter().map(|(id, p)| (id, p.trains)).collect();
        for (id, trains) in ids {
            let gradient = &step.gradients[id.index()];
            if !trains {
                assert!(gradient.is_none(), "{what}: a gradient of what does not train");
                continue;
            }
            let label = format!("{what}: {}", tiny.parameters.get(id).name);
            let gradient = gradient.as_ref().unwrap_or_else(|| panic!("{label}: no gradient"));
            let mut random = Seed(9).stream("direction", &[id.index() as u64]);
            let direction: Vec<f32> = gradient.iter().map(|_| random.normal() as f32).collect();
            let expected: f64 =
                gradient.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
            let width = 2e-3 / (direction.len() as f64).sqrt().max(1.0);
            let mut loss = |factor: f64| {
                let before = tiny.parameters.values(id);
                tiny.parameters.update(id, |values| {
                    let moved = values.iter_mut().zip(&direction);
                    moved.for_each(|(v, d)| *v += (factor * width) as f32 * d);
                });
                let loss = learner.step(&tiny.tuned(), &batches, 0).unwrap().loss;
                tiny.parameters.set(id, before).unwrap();
                loss
            };
            let found = (loss(4.0) - loss(-4.0)) / (8.0 * width);
            let scale = expected.abs().max(found.abs());
            let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            assert!(
                (found - expected).abs() <= 0.03 * scale + 0.02 * norm + 2e-3,
                "{label}: differences give {found}, the gradient {expected}"
            );
        }
    });
}

#[test]
fn what_is_saved_computes_what_was_trained() {
    for_all(|what, config, name, options, lacks| {
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
        let documents =
            if lacks == Lacks::Independence { vec![document(9, 1, Some(2))] } else { documents() };
        let batch = Batch::new(&documents).unwrap();
        assert_close(what, &again.outputs(&batch, None), &tiny.outputs(&batch, None), 2e-6);
        let written = Adapter::collect(&*again.method, spec, &again.parameters, None).unwrap();
        assert_eq!((written.config, written.tensors), (read.config, read.tensors), "{what}");
    });
}
