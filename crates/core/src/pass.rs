//! One forward pass: frozen weights, the changes in force, and who listens.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use crate::batch::Batch;
use crate::change::{Changes, InputView, Mode, Scope, SiteView, StateChange};
use crate::error::{Error, Result};
use crate::history::History;
use crate::layout::Layout;
use crate::parameters::{Parameters, to_vec};
use crate::site::{Site, Sublayer};
use crate::spec::Head;
use crate::weights::Weights;
use retune_kernels::matrix::PackedMatrix;
use retune_kernels::{
    self as kernels, AttentionOptions, HeadOptions, KeyValues, Rotation, Spans, Table,
};
use tensor::{Device, Int, Tensor, TensorData};

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
    layers: BTreeMap<usize, Vec<KeyValues>>,
    /// What [`Pass::keys_values`] gives out as tensors.
    tensors: BTreeMap<usize, Vec<(Tensor<2>, Tensor<2>)>>,
    history: History,
}

impl KeyValueCache {
    /// Keeps only the documents whose place is in `keep`, in that order.
    ///
    /// # Panics
    /// If a place is not below the number of documents read so far.
    pub fn select(&mut self, keep: &[usize]) {
        self.layers.values_mut().for_each(|documents| keep_only(documents, keep));
        self.tensors.values_mut().for_each(|documents| keep_only(documents, keep));
        self.history.select(keep);
    }

    /// Returns how many documents were begun.
    fn num_documents(&self) -> usize {
        let tensors = self.tensors.values().next().map_or(0, Vec::len);
        self.layers.values().next().map_or(tensors, Vec::len)
    }
}

/// Keeps the documents whose place is in `keep`: moved, not copied, unless asked for twice.
fn keep_only<T: Clone>(documents: &mut Vec<T>, keep: &[usize]) {
    let mut all: Vec<Option<T>> = std::mem::take(documents).into_iter().map(Some).collect();
    let mut last = vec![0; all.len()];
    keep.iter().enumerate().for_each(|(at, place)| last[*place] = at);
    let take = |(at, place): (usize, &usize)| {
        let document = &mut all[*place];
        if last[*place] == at { document.take() } else { document.clone() }
    };
    documents.extend(keep.iter().enumerate().filter_map(take));
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
    layout: Layout,
    cache: Option<&'a mut KeyValueCache>,
    listener: Option<Listener<'a>>,
    rotations: Vec<(Rope, Rotation)>,
    marks: BTreeMap<usize, u64>,
    /// What the present sub-layer read, where a change looks at it.
    sublayer_input: Option<Tensor<2>>,
    /// What entered the blocks whose input a change looks at.
    layer_inputs: BTreeMap<usize, Tensor<2>>,
    /// The cache's slot of the present block, where it is not the block's own number.
    slot: Option<usize>,
}

/// What is in force where a block runs as the base has it.
static NO_CHANGES: LazyLock<Changes> = LazyLock::new(Changes::default);

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
        batch.check(weights.spec(), changes.num_positions())?;
        let spec = weights.spec();
        let refused = match spec.decoder_start() {
            Some(_) if changes.reads_states_across() => Some("changes across tokens or layers"),
            None if (spec.has_sides() && changes.reads_documents())
                || (spec.image().is_some() && !changes.of_input().is_empty()) =>
            {
                Some("virtual tokens, prefixes or changes across layers")
            }
            _ => None,
        };
        if let Some(refused) = refused {
            return Err(Error::Unsupported {
                what: format!("{refused} on {}", spec.class),
                help: "on this model use a method that changes weights or states of single \
                       tokens, e.g. lora or ia3"
                    .to_owned(),
            });
        }
        if let Some(count) = changes.num_tasks() {
            batch.check_tasks(count)?;
        }
        Ok(Self {
            layout: Layout::new(batch, changes.num_virtual(), changes.prefix_positions(), 0),
            weights,
            changes,
            scope: Scope::new(parameters, mode),
            batch,
            cache: None,
            listener: None,
            rotations: Vec::new(),
            marks: BTreeMap::new(),
            sublayer_input: None,
            layer_inputs: BTreeMap::new(),
            slot: None,
        })
    }

    /// Appends to `cache` and lets attention see what it holds, for generation.
    #[must_use]
    pub fn with_cache(mut self, cache: &'a mut KeyValueCache) -> Self {
        let (num_virtual, prefix) = (self.changes.num_virtual(), self.changes.prefix_positions());
        self.layout = Layout::new(self.batch, num_virtual, prefix, cache.num_documents());
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

    /// Returns where documents begin and end in the states, virtual tokens included.
    pub fn spans(&self) -> &Spans {
        &self.layout.spans
    }

    /// Returns the position of each row of the states.
    pub fn positions(&self) -> &[usize] {
        &self.layout.positions
    }

    /// Returns the type of each row of the states, 0 where the batch does not say.
    pub fn token_types(&self) -> Vec<u32> {
        match &self.batch.token_types {
            Some(types) => self.layout.spread(types, 0),
            None => vec![0; self.layout.positions.len()],
        }
    }

    /// Returns whether the pass learns.
    pub fn trains(&self) -> bool {
        self.scope.trains()
    }

    /// Applies dropout while the pass learns.
    pub fn dropout(&mut self, x: Tensor<2>, rate: f64) -> Tensor<2> {
        self.scope.dropout(x, rate)
    }

    /// Runs a block at another place of the model than its own, with a slot of the cache to itself;
    /// `as_base` leaves all changes out.
    ///
    /// # Errors
    /// Those of `body`.
    pub fn placed<T>(
        &mut self,
        slot: usize,
        as_base: bool,
        body: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let before = (self.slot.replace(slot), self.changes);
        if as_base {
            self.changes = &NO_CHANGES;
        }
        let out = body(self);
        (self.slot, self.changes) = before;
        out
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

    /// Returns `module`'s bias with its changes, if the model has one.
    fn bias(&mut self, module: &str) -> Result<Option<Tensor<1>>> {
        let name = format!("{module}.bias");
        if self.weights.spec().weight(&name).is_none() {
            return Ok(None);
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
        let changes = self.changes.of_output(module);
        if changes.is_empty() {
            return self.product(module, x);
        }
        let y = self.product(module, x.clone())?;
        let (rows, spans) = (x.dims()[0], &self.layout.spans);
        // Poolers and heads of classes read one row of each document.
        let spans = if rows == spans.tokens() {
            spans.clone()
        } else {
            Spans::from_lengths(std::iter::repeat_n(1, rows))
        };
        Ok(self.changed(changes, None, y, Some(&x), &spans))
    }

    fn product(&mut self, module: &str, x: Tensor<2>) -> Result<Tensor<2>> {
        let name = format!("{module}.weight");
        let bias = self.bias(module)?;
        let changes = self.changes.of_weight(&name);
        if changes.is_empty() {
            return Ok(kernels::linear_frozen(x, &self.weights.matrix(&name)?, bias));
        }
        // What is not used must not have drawn.
        let mark = self.scope.draws();
        if let [first, others @ ..] = changes {
            if first.replaces_base() {
                if others.is_empty()
                    && let Some(y) = first.linear_alone(&x, bias.as_ref(), &mut self.scope)
                {
                    return Ok(y);
                }
            } else if let Some(added) = others
                .iter()
                .map(|change| change.addition(&x, &mut self.scope))
                .collect::<Option<Vec<_>>>()
            {
                let base = self.weights.matrix(&name)?;
                if let Some(y) = first.linear(&x, &base, bias.as_ref(), &mut self.scope) {
                    return Ok(added.into_iter().fold(y, |y, more| y + more));
                }
            }
            self.scope.set_draws(mark);
        }
        let weight = self.changes.materialize(&name, self.weights, &self.scope)?;
        Ok(kernels::linear_in(self.weights.packing().arithmetic, x, weight, bias))
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

    /// Projects the patches of the batch's images.
    ///
    /// # Shapes
    /// - returns: `[patches, width]`, image by image
    ///
    /// # Errors
    /// If the weight cannot be read, or the batch has no image.
    pub fn patches(&mut self, module: &str) -> Result<Tensor<2>> {
        let spec = Arc::clone(self.weights.spec());
        let values = spec.image().map_or(0, crate::spec::ImageSpec::patch_values);
        let pixels = self.batch.pixels.clone();
        let Some(count) = pixels.len().checked_div(values).filter(|count| *count > 0) else {
            return Err(Error::Input {
                what: "the batch holds no image".to_owned(),
                expected: "at least one".to_owned(),
                found: "none".to_owned(),
                help: "give this model rows with images".to_owned(),
            });
        };
        let data = TensorData::new(pixels, [count, values]);
        self.linear(module, Tensor::from_data(data, self.weights.device()))
    }

    /// Returns states that are a weight themselves, with its changes.
    ///
    /// # Shapes
    /// - returns: `[rows, width]`
    ///
    /// # Errors
    /// If the weight cannot be read.
    pub fn constant(&mut self, name: &str, width: usize) -> Result<Tensor<2>> {
        let width = width.max(1);
        if self.changes.of_weight(name).is_empty() {
            let values = self.weights.vector(name)?;
            let rows = values.dims()[0] / width;
            return Ok(values.reshape([rows, width]));
        }
        let matrix = self.changes.materialize(name, self.weights, &self.scope)?;
        let [rows, columns] = matrix.dims();
        Ok(matrix.reshape([rows * columns / width, width]))
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

    /// Reads the embeddings of the batch's words and lays virtual tokens before each document.
    ///
    /// Positions and token types are added by the caller, to virtual tokens too.
    ///
    /// # Shapes
    /// - `scale`: a factor on the words; virtual tokens are as wide as the states already
    /// - returns: `[states, width]`
    ///
    /// # Errors
    /// If the weight cannot be read.
    pub fn embed_words(&mut self, module: &str, scale: Option<f64>) -> Result<Tensor<2>> {
        let mut x = self.embed(module, &self.batch.tokens)?;
        if let Some(scale) = scale {
            x = x.mul_scalar(scale);
        }
        Ok(self.lay_virtual(x))
    }

    /// Looks up the batch's tokens as [`Pass::embed_words`] does, in a model that has an encoder
    /// beside its decoder; virtual tokens are the encoder's.
    ///
    /// # Shapes
    /// - `encoder`: whether each token is the encoder's, `[tokens]`
    /// - returns: `[states, width]`
    ///
    /// # Errors
    /// If the weight cannot be read.
    pub fn embed_sides(&mut self, module: &str, encoder: &[bool]) -> Result<Tensor<2>> {
        let x = self.embed(module, &self.batch.tokens)?;
        Ok(self.lay(x, Some(encoder)))
    }

    /// Runs the input changes over the states of the batch's tokens, and lays virtual tokens before
    /// each document; for models whose tokens are no rows of a table.
    ///
    /// # Shapes
    /// - `x`: `[tokens, width]`
    /// - returns: `[states, width]`
    pub fn lay_virtual(&mut self, x: Tensor<2>) -> Tensor<2> {
        self.lay(x, None)
    }

    fn lay(&mut self, mut x: Tensor<2>, encoder: Option<&[bool]>) -> Tensor<2> {
        let begun = self.cache.as_ref().map_or(0, |cache| cache.num_documents());
        let tasks = self.batch.tasks.as_deref();
        let view = InputView {
            tasks: tasks.map(|tasks| tasks.get(begun..).unwrap_or(&[])),
            positions: &self.batch.positions,
            encoder,
        };
        let changes = self.changes.of_input();
        let mut prompts = Vec::new();
        let new = self.batch.spans.documents().saturating_sub(begun);
        for change in changes {
            x = change.tokens(x, &view, &mut self.scope);
            if new > 0 {
                prompts.extend(change.virtual_tokens(new, &view, &mut self.scope));
            }
        }
        let Some(rows) = self.layout.gather() else { return x };
        let prompts = documents_together(prompts, new);
        select(Tensor::cat(vec![prompts, x], 0), &rows)
    }

    /// Rotates the heads of `x` by the positions of the batch.
    ///
    /// # Shapes
    /// - `x`: `[tokens, heads · head width]`
    pub fn rotary(&mut self, x: Tensor<2>, heads: usize, rope: &Rope) -> Tensor<2> {
        if let Some((_, rotation)) = self.rotations.iter().find(|(known, _)| known == rope) {
            return kernels::rotary(x, heads, rotation);
        }
        let rotation = Rotation::new(&self.layout.positions, &rope.inverse_frequencies, rope.scale);
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
        let own = Sublayer::Attention;
        if self.changes.of_attention(layer, own).is_empty() {
            return self.plain_attention(layer, q, k, v, None, options);
        }
        let prefix = self.prefix(layer, own);
        let heads = self.plain_attention(layer, q.clone(), k, v, prefix, options);
        self.changed_heads(layer, own, heads, &q, options)
    }

    /// Computes keys and values that stand before those of each document in a block's attention,
    /// for models that compute attention themselves.
    ///
    /// # Shapes
    /// - returns: twice `[prefix, key heads · head width]`, or nothing where there is none
    pub fn prefix(&mut self, layer: usize, sublayer: Sublayer) -> Option<[Tensor<2>; 2]> {
        let changes = self.changes.of_attention(layer, sublayer).iter();
        let parts = changes.filter_map(|change| change.prefix(&mut self.scope));
        let (keys, values): (Vec<_>, Vec<_>) = parts.map(|[k, v]| (k, v)).unzip();
        (!keys.is_empty()).then(|| [Tensor::cat(keys, 0), Tensor::cat(values, 0)])
    }

    /// Runs the changes of a block's head outputs, for models that compute attention themselves.
    ///
    /// # Shapes
    /// - `heads`, `queries`: `[tokens, heads · head width]`
    /// - returns: the same
    pub fn changed_heads(
        &mut self,
        layer: usize,
        sublayer: Sublayer,
        heads: Tensor<2>,
        queries: &Tensor<2>,
        options: &AttentionOptions,
    ) -> Tensor<2> {
        let changes = self.changes.of_attention(layer, sublayer).iter();
        changes.fold(heads, |heads, change| change.heads(heads, queries, options, &mut self.scope))
    }

    /// Computes attention behind a prefix of keys and values that all documents share.
    fn plain_attention(
        &mut self,
        layer: usize,
        q: Tensor<2>,
        k: Tensor<2>,
        v: Tensor<2>,
        prefix: Option<[Tensor<2>; 2]>,
        options: &AttentionOptions,
    ) -> Tensor<2> {
        let spans = self.layout.spans.clone();
        let mut options = options.clone();
        let length = prefix.as_ref().map_or(0, |[keys, _]| keys.dims()[0]);
        options.prefix += length;
        let Some(cache) = self.cache.as_deref_mut() else {
            let Some([first_k, first_v]) = prefix else {
                return kernels::attention(q, k, v, &spans, &spans, &options);
            };
            let rows: Vec<usize> = spans
                .iter()
                .flat_map(|s| (0..length).chain(s.start + length..s.end + length))
                .collect();
            let behind = |first, x| select(Tensor::cat(vec![first, x], 0), &rows);
            let keys = Spans::from_lengths(spans.iter().map(|span| length + span.len()));
            let (k, v) = (behind(first_k, k), behind(first_v, v));
            return kernels::attention(q, k, v, &spans, &keys, &options);
        };
        let documents = cache.layers.entry(self.slot.unwrap_or(layer)).or_default();
        kernels::attention_over_cache([q, k, v], prefix.as_ref(), &spans, documents, &options)
    }

    /// Returns all keys and values of each document: those a cache holds, then the new ones, which
    /// it keeps.
    ///
    /// `slot` names the place in the cache; `new` may be absent where the cache holds everything,
    /// which then is shared, not copied.
    ///
    /// # Shapes
    /// - `new`: `[rows, width]` each, documents as in `spans`; a document may have none
    /// - returns: keys and values `[keys, width]` of each document
    ///
    /// # Errors
    /// [`Error::Input`] if there is neither.
    pub fn keys_values(
        &mut self,
        slot: usize,
        new: Option<(Tensor<2>, Tensor<2>)>,
        spans: &Spans,
    ) -> Result<Vec<(Tensor<2>, Tensor<2>)>> {
        let missing = || Error::Input {
            what: "a document continues a text that was never read".to_owned(),
            expected: "its earlier keys in the cache".to_owned(),
            found: "none".to_owned(),
            help: "read the document from its first token".to_owned(),
        };
        let part = |span: &std::ops::Range<usize>| {
            new.as_ref().map(|(k, v)| {
                let part = |x: &Tensor<2>| x.clone().slice_dim(0, span.clone());
                (part(k), part(v))
            })
        };
        let Some(cache) = self.cache.as_deref_mut() else {
            return spans.iter().map(|span| part(&span).ok_or_else(missing)).collect();
        };
        let documents = cache.tensors.entry(slot).or_default();
        for (place, span) in spans.iter().enumerate() {
            match (documents.get_mut(place), part(&span).filter(|_| !span.is_empty())) {
                (Some((old_k, old_v)), Some((k, v))) => {
                    *old_k = Tensor::cat(vec![old_k.clone(), k], 0);
                    *old_v = Tensor::cat(vec![old_v.clone(), v], 0);
                }
                (Some(_), None) => {}
                (None, Some(part)) => documents.push(part),
                (None, None) => return Err(missing()),
            }
        }
        Ok(documents.clone())
    }

    /// Runs the state changes of a site, in order, then shows the result to the listener.
    ///
    /// # Shapes
    /// - `x`: as the site says
    pub fn at(&mut self, site: Site, x: Tensor<2>) -> Tensor<2> {
        let changes = self.changes.of_site(site);
        let input = match site {
            Site::Heads(..) | Site::Hidden(..) | Site::Output(..) => self.sublayer_input.clone(),
            _ => None,
        };
        let spans = self.layout.spans.clone();
        let x = self.changed(changes, Some(site), x, input.as_ref(), &spans);
        if let Site::LayerInput(layer) = site
            && self.changes.reads_layer(layer)
        {
            self.layer_inputs.insert(layer, x.clone());
        }
        match &mut self.listener {
            Some(listener) => listener(site, x),
            None => x,
        }
    }

    fn changed(
        &mut self,
        changes: &[Box<dyn StateChange>],
        site: Option<Site>,
        mut x: Tensor<2>,
        input: Option<&Tensor<2>>,
        spans: &Spans,
    ) -> Tensor<2> {
        if changes.is_empty() {
            return x;
        }
        let view = SiteView {
            site,
            input,
            spans,
            causal: self.weights.spec().causal,
            tasks: self.batch.tasks.as_deref(),
            positions: (&self.layout.positions, self.layout.prefix),
            layer_inputs: &self.layer_inputs,
            history: self.cache.as_deref_mut().map(|cache| RefCell::new(&mut cache.history)),
        };
        for change in changes {
            x = change.apply(x, &view, &mut self.scope);
        }
        x
    }

    /// Runs one sub-layer between its input and output sites.
    ///
    /// The changes of its inner and output sites see what the sub-layer read, which is what parallel
    /// adapters need.
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
        let output = Site::Output(layer, sublayer);
        let inner = [Site::Heads(layer, sublayer), Site::Hidden(layer, sublayer), output];
        let looked_at = inner.iter().any(|site| !self.changes.of_site(*site).is_empty());
        self.sublayer_input = looked_at.then(|| x.clone());
        let y = body(self, x)?;
        let y = self.at(output, y);
        self.sublayer_input = None;
        Ok(y)
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
        let arithmetic = self.weights.packing().arithmetic;
        Ok((self.head_weight(&weight)?, HeadOptions { soft_cap, scale: 1.0, bias, arithmetic }))
    }

    /// Computes the cross-entropy of each token with its target, 0 where it has none.
    ///
    /// Logits of the whole batch never exist, and tokens without a target cost nothing.
    ///
    /// # Shapes
    /// - `states`: `[states, width]`, what [`crate::model::Model::finish`] returned
    /// - returns: `[tokens]`, virtual tokens left out
    ///
    /// # Errors
    /// If the model has no language head or its weight cannot be read.
    pub fn token_losses(&mut self, states: Tensor<2>) -> Result<Tensor<1>> {
        let (weight, options) = self.language_head()?;
        let targets = self.layout.spread(&self.batch.targets, None);
        let losses = kernels::token_losses(states, &weight, &targets, &options);
        Ok(match self.layout.tokens() {
            Some(tokens) => losses.select(0, index(tokens, self.weights.device())),
            None => losses,
        })
    }

    /// Computes the weighted cross-entropy of what virtual tokens should predict, before documents
    /// that have something to learn; nothing where methods learn from none.
    ///
    /// # Shapes
    /// - `states`: as [`Pass::token_losses`]
    /// - returns: `[states]`, 0 where a row has no target
    ///
    /// # Errors
    /// As [`Pass::token_losses`].
    pub fn virtual_losses(&mut self, states: Tensor<2>) -> Result<Option<Tensor<1>>> {
        let of_document = self.changes.virtual_targets();
        if of_document.iter().all(Option::is_none) {
            return Ok(None);
        }
        let count = states.dims()[0];
        let (mut targets, mut weights) = (vec![None; count], vec![0.0_f32; count]);
        for (tokens, rows) in self.batch.spans.iter().zip(self.layout.spans.iter()) {
            let learns = self.batch.targets[tokens].iter().any(Option::is_some);
            for (row, target) in rows.zip(&of_document).filter(|_| learns) {
                targets[row] = target.map(|(token, _)| token);
                weights[row] = target.map_or(0.0, |(_, weight)| weight);
            }
        }
        let (weight, options) = self.language_head()?;
        let losses = kernels::token_losses(states, &weight, &targets, &options);
        let weights = TensorData::new(weights, [count]);
        let weights = Tensor::<1>::from_data(weights, self.weights.device());
        Ok(Some(losses * weights))
    }

    /// Computes the logits of some tokens.
    ///
    /// # Shapes
    /// - `states`: `[states, width]`
    /// - `rows`: tokens of the batch, virtual ones not counted
    /// - returns: `[rows, vocabulary]`
    ///
    /// # Errors
    /// As [`Pass::token_losses`].
    pub fn logits(&mut self, states: &Tensor<2>, rows: &[usize]) -> Result<Tensor<2>> {
        let (weight, options) = self.language_head()?;
        let rows: Vec<usize> = match self.layout.tokens() {
            Some(tokens) => rows.iter().map(|row| tokens[*row]).collect(),
            None => rows.to_vec(),
        };
        let all = rows.len() == states.dims()[0] && rows.iter().enumerate().all(|(i, r)| i == *r);
        let picked = if all { states.clone() } else { select(states.clone(), &rows) };
        let mut logits = match weight {
            Table::Frozen(matrix) => kernels::linear_frozen(picked, &matrix, options.bias),
            Table::Trainable(weight) => {
                kernels::linear_in(options.arithmetic, picked, weight, options.bias)
            }
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

fn index(rows: &[usize], device: &Device) -> Tensor<1, Int> {
    let rows: Vec<i32> = rows.iter().map(|row| *row as i32).collect();
    let count = rows.len();
    Tensor::from_data(TensorData::new(rows, [count]), device)
}

/// Returns rows of `x`, in the order asked for.
///
/// # Shapes
/// - `x`: `[rows of x, width]`
/// - returns: `[rows, width]`
pub fn select(x: Tensor<2>, rows: &[usize]) -> Tensor<2> {
    let index = index(rows, &x.clone().inner().device());
    x.select(0, index)
}

/// Puts the virtual tokens of several changes beside each other, document by document.
///
/// # Shapes
/// - `parts`: `[documents · n, width]` each
fn documents_together(mut parts: Vec<Tensor<2>>, documents: usize) -> Tensor<2> {
    if parts.len() == 1 {
        return parts.remove(0);
    }
    let of_document = |part: &Tensor<2>, document: usize| {
        let count = part.dims()[0] / documents;
        part.clone().narrow(0, document * count, count)
    };
    let rows = (0..documents).flat_map(|d| parts.iter().map(move |part| of_document(part, d)));
    Tensor::cat(rows.collect(), 0)
}

/// Splits logits `[rows, vocabulary]` into rows of plain numbers.
pub fn logit_rows(logits: Tensor<2>) -> Vec<Vec<f32>> {
    let [_, width] = logits.dims();
    to_vec(logits.inner()).chunks_exact(width.max(1)).map(<[f32]>::to_vec).collect()
}
