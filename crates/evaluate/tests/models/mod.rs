//! Models small enough to be worked out by hand.

#![allow(dead_code, reason = "every test file uses its own part")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use retune_core::Result;
use retune_core::change::Changes;
use retune_core::kernels::AttentionOptions;
use retune_core::model::{Model, Output, Tuned};
use retune_core::parameters::Parameters;
use retune_core::pass::{Pass, Rope};
use retune_core::spec::{Head, Kind, ModelSpec, Role, WeightSpec};
use retune_core::weights::{Packing, Weights};
use retune_testkit::tiny::MemorySource;
use tensor::{Device, Tensor};

/// Name, kind, role, shape and values of a weight.
type Weight<'a> = (&'a str, Kind, Role, Vec<usize>, Vec<f32>);

/// What a tiny model does with the rows it reads from its table.
#[derive(Debug, Clone, PartialEq)]
enum Body {
    /// Nothing: the next token depends on the last one only.
    Bigram,
    /// All tokens so far are averaged, by attention that looks at all alike.
    Average,
    /// Attention with rotary positions, shared key heads and a window.
    Attention,
    /// The mean of a document's rows is its classes' logits.
    Classes,
    /// The mean of a document's rows is its vector.
    Vectors,
}

/// A model and everything it needs to run.
#[derive(Debug)]
pub(crate) struct Tiny {
    model: TinyModel,
    weights: Weights,
    changes: Changes,
    parameters: Parameters,
}

#[derive(Debug)]
struct TinyModel {
    spec: Arc<ModelSpec>,
    body: Body,
    num_read: AtomicUsize,
}

impl Tiny {
    fn new(body: Body, max_positions: usize, vocabulary: usize, tensors: Vec<Weight<'_>>) -> Self {
        let head = match body {
            Body::Classes => {
                let width = tensors[0].3[1];
                Head::Classes { labels: (0..width).map(|i| i.to_string()).collect() }
            }
            Body::Vectors => Head::Embedding,
            _ => Head::Language { weight: "head.weight".into(), bias: None, soft_cap: None },
        };
        let spec = Arc::new(ModelSpec {
            architecture: "tiny".into(),
            class: "TinyModel".into(),
            num_layers: usize::from(matches!(body, Body::Average | Body::Attention)),
            width: tensors[0].3[1],
            inner_width: 0,
            num_heads: 4,
            num_key_heads: 2,
            head_width: 4,
            vocabulary,
            max_positions,
            causal: !matches!(body, Body::Classes | Body::Vectors),
            towers: Vec::new(),
            weights: tensors
                .iter()
                .map(|(name, kind, role, shape, _)| WeightSpec {
                    name: (*name).to_owned(),
                    shape: shape.clone(),
                    kind: *kind,
                    role: *role,
                    layer: None,
                })
                .collect(),
            head,
            config: serde_json::Value::Null,
        });
        let device = Device::flex();
        let mut source = MemorySource::default();
        for (name, _, _, shape, values) in tensors {
            source.insert(name, &shape, values);
        }
        let source = Arc::new(source);
        let weights = Weights::new(source, Arc::clone(&spec), Packing::default(), &device).unwrap();
        let parameters = Parameters::new(&device);
        let changes = Changes::default();
        let model = TinyModel { spec, body, num_read: AtomicUsize::new(0) };
        Self { model, weights, changes, parameters }
    }

    /// Returns how many tokens went through the model since the last call.
    pub(crate) fn take_num_read(&self) -> usize {
        self.model.num_read.swap(0, Ordering::Relaxed)
    }

    pub(crate) fn tuned(&self) -> Tuned<'_> {
        Tuned {
            model: &self.model,
            weights: &self.weights,
            changes: &self.changes,
            parameters: &self.parameters,
        }
    }
}

const LINEAR: Kind = Kind::Linear { transposed: false };

fn identity(n: usize) -> Vec<f32> {
    (0..n * n).map(|i| f32::from(u8::from(i % n == i / n))).collect()
}

/// A model in which token `i` is followed by `j` with `probabilities[i][j]`.
///
/// The table is the identity and the head holds logarithms, so the logits after token `i` are
/// exactly `ln probabilities[i][..]`.
pub(crate) fn bigram(probabilities: &[Vec<f64>], max_positions: usize) -> Tiny {
    let n = probabilities.len();
    let head = (0..n * n).map(|i| probabilities[i % n][i / n].ln() as f32).collect();
    Tiny::new(
        Body::Bigram,
        max_positions,
        n,
        vec![
            ("embed.weight", Kind::Embedding, Role::Embedding, vec![n, n], identity(n)),
            ("head.weight", LINEAR, Role::Head, vec![n, n], head),
        ],
    )
}

/// A model whose states are the mean of the one-hot tokens so far, and whose logits are
/// `head · mean`, `head` being `[n, n]` in row-major order.
pub(crate) fn average(n: usize, head: Vec<f32>, max_positions: usize) -> Tiny {
    Tiny::new(
        Body::Average,
        max_positions,
        n,
        vec![
            ("embed.weight", Kind::Embedding, Role::Embedding, vec![n, n], identity(n)),
            ("head.weight", LINEAR, Role::Head, vec![n, n], head),
        ],
    )
}

/// A random model with one layer of windowed rotary attention and learned positions.
pub(crate) fn attention(vocabulary: usize, max_positions: usize) -> Tiny {
    let mut random = retune_core::random::Seed(11).stream("tiny", &[]);
    let mut draw = |shape: [usize; 2]| {
        let mut values = vec![0.0; shape[0] * shape[1]];
        random.fill_normal(&mut values, 0.6);
        (shape.to_vec(), values)
    };
    let mut add = |name, kind, role, shape| {
        let (shape, values) = draw(shape);
        (name, kind, role, shape, values)
    };
    let tensors = vec![
        add("embed.weight", Kind::Embedding, Role::Embedding, [vocabulary, 16]),
        add("places.weight", Kind::Embedding, Role::Position, [max_positions, 16]),
        add("q.weight", LINEAR, Role::Query, [16, 16]),
        add("k.weight", LINEAR, Role::Key, [8, 16]),
        add("v.weight", LINEAR, Role::Value, [8, 16]),
        add("o.weight", LINEAR, Role::AttentionOutput, [16, 16]),
        add("head.weight", LINEAR, Role::Head, [vocabulary, 16]),
    ];
    Tiny::new(Body::Attention, max_positions, vocabulary, tensors)
}

/// A classifier (or encoder) whose output is the mean of a document's rows of `table`.
pub(crate) fn mean_of_rows(table: &[Vec<f32>], classes: bool) -> Tiny {
    let shape = vec![table.len(), table[0].len()];
    let body = if classes { Body::Classes } else { Body::Vectors };
    let values = table.concat();
    let tensors = vec![("embed.weight", Kind::Embedding, Role::Embedding, shape, values)];
    Tiny::new(body, 64, table.len(), tensors)
}

impl Model for TinyModel {
    fn spec(&self) -> &Arc<ModelSpec> {
        &self.spec
    }

    fn embed(&self, pass: &mut Pass<'_>) -> Result<Tensor<2>> {
        self.num_read.fetch_add(pass.batch().num_tokens(), Ordering::Relaxed);
        let x = pass.embed("embed", &pass.batch().tokens)?;
        if self.body != Body::Attention {
            return Ok(x);
        }
        let positions: Vec<u32> = pass.batch().positions.iter().map(|p| *p as u32).collect();
        Ok(x + pass.embed("places", &positions)?)
    }

    fn layer(&self, pass: &mut Pass<'_>, index: usize, x: Tensor<2>) -> Result<Tensor<2>> {
        if self.body == Body::Average {
            let width = self.spec.width;
            let same = x.clone().mul_scalar(0.0);
            let options = AttentionOptions::causal(1, 1, width);
            return Ok(pass.attention(index, same.clone(), same, x, &options));
        }
        let rope = Rope { inverse_frequencies: Arc::from([1.0, 0.1]), scale: 1.0 };
        let q = pass.linear("q", x.clone())?;
        let k = pass.linear("k", x.clone())?;
        let v = pass.linear("v", x.clone())?;
        let (q, k) = (pass.rotary(q, 4, &rope), pass.rotary(k, 2, &rope));
        let options = AttentionOptions { window: Some(5), ..AttentionOptions::causal(4, 2, 4) };
        let y = pass.attention(index, q, k, v, &options);
        Ok(x + pass.linear("o", y)?)
    }

    fn finish(&self, pass: &mut Pass<'_>, x: Tensor<2>) -> Result<Output> {
        if !matches!(self.body, Body::Classes | Body::Vectors) {
            return Ok(Output::States(x));
        }
        let means = pass.spans().iter().map(|span| x.clone().narrow(0, span.start, span.len()));
        let means = Tensor::cat(means.map(|rows| rows.mean_dim(0)).collect(), 0);
        Ok(match self.body {
            Body::Classes => Output::Classes(means),
            _ => Output::Embeddings(means),
        })
    }
}
