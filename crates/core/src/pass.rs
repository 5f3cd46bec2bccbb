//! One forward pass: frozen weights, the changes in force, and who listens.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::batch::Batch;
use crate::change::{Changes, Mode, Scope, SiteView};
use crate::error::{Error, Result};
use crate::parameters::{Parameters, to_vec};
use crate::site::{Site, Sublayer};
use crate::spec::Head;
use crate::weights::Weights;
use retune_kernels::matrix::PackedMatrix;
use retune_kernels::{self as kernels, AttentionOptions, HeadOptions, Rotation, Spans, Table};
use tensor::{Tensor, TensorData};

/// Rotary position embedding of one kind of layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Angle per position of each rotated pair, `[rotated width / 2]`.
    pub inverse_frequencies: Arc<[f64]>,
    /// Factor on both sine and cosine (YaRN's attention scaling; 1 elsewhere).
    pub scale: f64,
}

/// Keys and values of what was read before, per layer and document.
#[derive(Debug, Default)]
pub struct KeyValueCache {
    layers: BTreeMap<usize, Vec<(Tensor<2>, Tensor<2>)>>,
}

impl KeyValueCache {
    /// Keeps only the documents whose place is in `keep`, in that order.
    ///
    /// # Panics
    /// If a place is not below the number of documents read so far.
    pub fn select(&mut self, keep: &[usize]) {
        for documents in self.layers.values_mut() {
            *documents = keep.iter().map(|place| documents[*place].clone()).collect();
        }
    }
}

/// Called with the states at a site; what it returns goes on through the model.
pub type Listener<'a> = Box<dyn FnMut(Site, Tensor<2>) -> Tensor<2> + 'a>;

/// One run through a model.
///
/// Architectures are written against these methods and never ask which method is attached.
pub struct Pass<'a> {
    weights: &'a Weights,
    changes: &'a Changes,
    scope: Scope<'a>,
    batch: &'a Batch,
    cache: Option<&'a mut KeyValueCache>,
    listener: Option<Listener<'a>>,
    rotations: Vec<(Rope, Rotation)>,
    marks: BTreeMap<usize, u64>,
}

impl<'a> Pass<'a> {
    /// Opens a pass over `batch`.
    ///
    /// # Errors
    /// [`Error::Input`] if the batch does not fit the model.
    pub fn new(
        weights: &'a Weights,
        changes: &'a Changes,
        parameters: &'a Parameters,
        batch: &'a Batch,
        mode: Mode,
    ) -> Result<Self> {
        batch.check(weights.spec())?;
        Ok(Self {
            weights,
            changes,
            scope: Scope::new(parameters, mode),
            batch,
            cache: None,
            listener: None,
            rotations: Vec::new(),
            marks: BTreeMap::new(),
        })
    }

    /// Appends to `cache` and lets attention see what it holds, for generation.
    #[must_use]
    pub fn with_cache(mut self, cache: &'a mut KeyValueCache) -> Self {
        self.cache = Some(cache);
        self
    }

    /// Shows every site's states to `listener`, which may replace them.
    #[must_use]
    pub fn with_listener(mut self, listener: Listener<'a>) -> Self {
        self.listener = Some(listener);
        self
    }

    /// Returns the batch.
    pub fn batch(&self) -> &'a Batch {
        self.batch
    }

    /// Returns the frozen weights.
    pub fn weights(&self) -> &'a Weights {
        self.weights
    }

    /// Returns where documents begin and end in the states.
    pub fn spans(&self) -> &Spans {
        &self.batch.spans
    }

    /// Returns whether the pass learns.
    pub fn trains(&self) -> bool {
        self.scope.trains()
    }

    /// Applies dropout while the pass learns.
    pub fn dropout(&mut self, x: Tensor<2>, rate: f64) -> Tensor<2> {
        self.scope.dropout(x, rate)
    }

    /// Returns a vector weight (norm gain or bias) with its changes.
    ///
    /// # Errors
    /// If the weight cannot be read.
    pub fn vector(&mut self, name: &str) -> Result<Tensor<1>> {
        if self.changes.of_weight(name).is_empty() {
            return self.weights.vector(name);
        }
        let matrix = self.changes.materialize(name, self.weights, &self.scope)?;
        let count = matrix.dims()[0];
        Ok(matrix.reshape([count]))
    }

    /// Returns `module`'s bias with its changes, if the model has one or a method adds one.
    fn bias(&mut self, module: &str) -> Result<Option<Tensor<1>>> {
        let name = format!("{module}.bias");
        if self.weights.spec().weight(&name).is_none() {
            let changes = self.changes.of_weight(&name);
            if changes.is_empty() {
                return Ok(None);
            }
            let [rows, _] = self.weights.describe(&format!("{module}.weight"))?.matrix();
            let none = Tensor::zeros([rows, 1], self.weights.device());
            let bias = changes.iter().fold(none, |b, change| change.materialize(b, &self.scope));
            return Ok(Some(bias.reshape([rows])));
        }
        self.vector(&name).map(Some)
    }

    /// Computes `x · weightᵀ + bias` with the weight's changes.
    ///
    /// # Shapes
    /// - `x`: `[tokens, inputs]`
    /// - returns: `[tokens, outputs]`
    ///
    /// # Errors
    /// If the weight cannot be read.
    pub fn linear(&mut self, module: &str, x: Tensor<2>) -> Result<Tensor<2>> {
        let name = format!("{module}.weight");
        let bias = self.bias(module)?;
        let changes = self.changes.of_weight(&name);
        if changes.is_empty() {
            return Ok(kernels::linear_frozen(x, &self.weights.matrix(&name)?, bias));
        }
        if let [change] = changes
            && !change.replaces_base()
        {
            let base = self.weights.matrix(&name)?;
            if let Some(y) = change.linear(&x, &base, bias.as_ref(), &mut self.scope) {
                return Ok(y);
            }
        }
        let weight = self.changes.materialize(&name, self.weights, &self.scope)?;
        Ok(kernels::linear(x, weight, bias))
    }

    /// Normalises by the root mean square; the gain is `offset + weight` (Gemma's offset is 1).
    ///
    /// # Shapes
    /// - `x`: `[tokens, width]`
    ///
    /// # Errors
    /// If the weight cannot be read.
    pub fn rms_norm(
        &mut self,
        module: &str,
        x: Tensor<2>,
        epsilon: f64,
        offset: f64,
    ) -> Result<Tensor<2>> {
        let mut weight = self.vector(&format!("{module}.weight"))?;
        if offset != 0.0 {
            weight = weight.add_scalar(offset);
        }
        Ok(kernels::rms_norm(x, weight, epsilon))
    }

    /// Normalises by mean and variance.
    ///
    /// # Shapes
    /// - `x`: `[tokens, width]`
    ///
    /// # Errors
    /// If a weight cannot be read.
    pub fn layer_norm(&mut self, module: &str, x: Tensor<2>, epsilon: f64) -> Result<Tensor<2>> {
        let weight = self.vector(&format!("{module}.weight"))?;
        let bias = self.bias(module)?;
        Ok(kernels::layer_norm(x, weight, bias, epsilon))
    }

    /// Reads rows of a table.
    ///
    /// # Shapes
    /// - returns: `[ids, width]`
    ///
    /// # Errors
    /// If the weight cannot be read.
    pub fn embed(&mut self, module: &str, ids: &[u32]) -> Result<Tensor<2>> {
        let name = format!("{module}.weight");
        let table = if self.changes.of_weight(&name).is_empty() {
            Table::Frozen(self.weights.matrix(&name)?)
        } else {
            Table::Trainable(self.changes.materialize(&name, self.weights, &self.scope)?)
        };
        Ok(kernels::embed(ids, &table, self.weights.device()))
    }

    /// Rotates the heads of `x` by the positions of the batch.
    ///
    /// # Shapes
    /// - `x`: `[tokens, heads · head width]`
    pub fn rotary(&mut self, x: Tensor<2>, heads: usize, rope: &Rope) -> Tensor<2> {
        if let Some((_, rotation)) = self.rotations.iter().find(|(known, _)| known == rope) {
            return kernels::rotary(x, heads, rotation);
        }
        let rotation = Rotation::new(&self.batch.positions, &rope.inverse_frequencies, rope.scale);
        let y = kernels::rotary(x, heads, &rotation);
        self.rotations.push((rope.clone(), rotation));
        y
    }

    /// Computes attention inside each document, over the cache too where there is one.
    ///
    /// # Shapes
    /// - `q`: `[tokens, heads · head width]`
    /// - `k`, `v`: `[tokens, key heads · head width]`
    /// - returns: as `q`
    pub fn attention(
        &mut self,
        layer: usize,
        q: Tensor<2>,
        k: Tensor<2>,
        v: Tensor<2>,
        options: &AttentionOptions,
    ) -> Tensor<2> {
        let spans = self.batch.spans.clone();
        let Some(cache) = self.cache.as_deref_mut() else {
            return kernels::attention(q, k, v, &spans, &spans, options);
        };
        let documents = cache.layers.entry(layer).or_default();
        let mut lengths = Vec::with_capacity(spans.documents());
        for (place, span) in spans.iter().enumerate() {
            let new = |x: &Tensor<2>| x.clone().narrow(0, span.start, span.len());
            let (new_k, new_v) = (new(&k), new(&v));
            match documents.get_mut(place) {
                Some((old_k, old_v)) => {
                    *old_k = Tensor::cat(vec![old_k.clone(), new_k], 0);
                    *old_v = Tensor::cat(vec![old_v.clone(), new_v], 0);
                }
                None => documents.push((new_k, new_v)),
            }
            lengths.push(documents[place].0.dims()[0]);
        }
        let join = |pick: fn(&(Tensor<2>, Tensor<2>)) -> Tensor<2>| match &documents[..] {
            [one] => pick(one),
            many => Tensor::cat(many.iter().map(pick).collect(), 0),
        };
        let (k, v) = (join(|d| d.0.clone()), join(|d| d.1.clone()));
        kernels::attention(q, k, v, &spans, &Spans::from_lengths(lengths), options)
    }

    /// Runs the state changes of a site, in order, then shows the result to the listener.
    ///
    /// # Shapes
    /// - `x`: as the site says
    pub fn at(&mut self, site: Site, x: Tensor<2>) -> Tensor<2> {
        self.at_with(site, x, None)
    }

    fn at_with(&mut self, site: Site, mut x: Tensor<2>, input: Option<&Tensor<2>>) -> Tensor<2> {
        for change in self.changes.of_site(site) {
            let view = SiteView { site, input, spans: &self.batch.spans };
            x = change.apply(x, &view, &mut self.scope);
        }
        match &mut self.listener {
            Some(listener) => listener(site, x),
            None => x,
        }
    }

    /// Runs one sub-layer between its input and output sites.
    ///
    /// The changes of the output site see what the sub-layer read, which is what parallel adapters
    /// need.
    ///
    /// # Errors
    /// Those of `body`.
    pub fn sublayer(
        &mut self,
        layer: usize,
        sublayer: Sublayer,
        x: Tensor<2>,
        body: impl FnOnce(&mut Self, Tensor<2>) -> Result<Tensor<2>>,
    ) -> Result<Tensor<2>> {
        let x = self.at(Site::Input(layer, sublayer), x);
        let site = Site::Output(layer, sublayer);
        let input = (!self.changes.of_site(site).is_empty()).then(|| x.clone());
        let y = body(self, x)?;
        Ok(self.at_with(site, y, input.as_ref()))
    }

    /// Returns the weight of a language head: packed, or with its changes.
    fn head_weight(&mut self, name: &str) -> Result<Table> {
        let tied = self.weights.describe(name)?.role == crate::spec::Role::Embedding;
        let changes = self.changes.of_weight(name);
        if changes.iter().any(|change| !tied || change.follows_tie()) {
            return Ok(Table::Trainable(self.changes.materialize(
                name,
                self.weights,
                &self.scope,
            )?));
        }
        Ok(Table::Frozen(self.weights.matrix(name)?))
    }

    fn language_head(&mut self) -> Result<(Table, HeadOptions)> {
        let Head::Language { weight, bias, soft_cap } = &self.weights.spec().head else {
            return Err(Error::Unsupported {
                what: format!("next-token loss on {}", self.weights.spec().class),
                help: "use a language model, or a classification objective".to_owned(),
            });
        };
        let (weight, bias, soft_cap) = (weight.clone(), bias.clone(), *soft_cap);
        let bias = bias.map(|name| self.vector(&name)).transpose()?;
        Ok((self.head_weight(&weight)?, HeadOptions { soft_cap, scale: 1.0, bias }))
    }

    /// Computes the cross-entropy of each token with its target, 0 where it has none.
    ///
    /// Logits of the whole batch never exist, and tokens without a target cost nothing.
    ///
    /// # Shapes
    /// - `states`: `[tokens, width]`, what [`crate::model::Model::finish`] returned
    /// - returns: `[tokens]`
    ///
    /// # Errors
    /// If the model has no language head or its weight cannot be read.
    pub fn token_losses(&mut self, states: Tensor<2>) -> Result<Tensor<1>> {
        let (weight, options) = self.language_head()?;
        Ok(kernels::token_losses(states, &weight, &self.batch.targets, &options))
    }

    /// Computes the logits of some tokens.
    ///
    /// # Shapes
    /// - `states`: `[tokens, width]`
    /// - `rows`: places in `0..tokens`
    /// - returns: `[rows, vocabulary]`
    ///
    /// # Errors
    /// As [`Pass::token_losses`].
    pub fn logits(&mut self, states: &Tensor<2>, rows: &[usize]) -> Result<Tensor<2>> {
        let (weight, options) = self.language_head()?;
        let device = states.device();
        let all = rows.len() == states.dims()[0] && rows.iter().enumerate().all(|(i, r)| i == *r);
        let picked = if all {
            states.clone()
        } else {
            let index: Vec<i32> = rows.iter().map(|row| *row as i32).collect();
            let count = index.len();
            let index = Tensor::from_data(TensorData::new(index, [count]), &device);
            states.clone().select(0, index)
        };
        let mut logits = match weight {
            Table::Frozen(matrix) => kernels::linear_frozen(picked, &matrix, options.bias),
            Table::Trainable(weight) => kernels::linear(picked, weight, options.bias),
        };
        if let Some(cap) = options.soft_cap {
            logits = logits.div_scalar(cap).tanh().mul_scalar(cap);
        }
        Ok(logits)
    }

    /// Returns how many random draws were made, for [`Pass::remember`].
    pub fn mark(&self) -> u64 {
        self.scope.draws()
    }

    /// Notes that layer `index` began at `mark`, so that running it again draws the same numbers.
    pub fn remember(&mut self, index: usize, mark: u64) {
        self.marks.insert(index, mark);
    }

    /// Goes back to where layer `index` began.
    pub fn recall(&mut self, index: usize) {
        if let Some(mark) = self.marks.get(&index) {
            self.scope.set_draws(*mark);
        }
    }

    /// Returns the packed base of a linear layer, for methods that look at it.
    ///
    /// # Errors
    /// If the weight cannot be read.
    pub fn base(&self, name: &str) -> Result<Arc<PackedMatrix>> {
        self.weights.matrix(name)
    }
}

/// Splits logits `[rows, vocabulary]` into rows of plain numbers.
pub fn logit_rows(logits: Tensor<2>) -> Vec<Vec<f32>> {
    let [_, width] = logits.dims();
    to_vec(logits.inner()).chunks_exact(width.max(1)).map(<[f32]>::to_vec).collect()
}
