//! The kinds of change a method makes: to weights at their path, to states at a site, to the input
//! and to attention.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::Arc;

use crate::error::Result;
use crate::history::History;
use crate::parameters::{ParameterId, Parameters};
use crate::random::Seed;
use crate::site::{Site, Sublayer};
use crate::weights::Weights;
use retune_kernels::matrix::PackedMatrix;
use retune_kernels::{self as kernels, AttentionOptions, Spans};
use tensor::{Tensor, TensorData};

/// Whether a pass learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Parameters are constants and dropout is off.
    Evaluate,
    /// Parameters are tracked; dropout draws from the seed's stream for this pass number.
    Train {
        /// The seed of dropout.
        seed: Seed,
        /// A number no other pass of the run has: step and micro-batch.
        pass: u64,
    },
}

/// Elements of a dropout's mask that one stream draws, so that threads share the work and masks do
/// not depend on their number.
const DRAWN_TOGETHER: usize = 1 << 14;

/// What a change may look at while it is applied: its parameters, the mode and randomness.
#[derive(Debug)]
pub struct Scope<'a> {
    parameters: &'a Parameters,
    mode: Mode,
    draws: u64,
}

impl<'a> Scope<'a> {
    /// Makes the scope of one pass.
    pub fn new(parameters: &'a Parameters, mode: Mode) -> Self {
        Self { parameters, mode, draws: 0 }
    }

    /// Returns whether the pass learns.
    pub fn trains(&self) -> bool {
        matches!(self.mode, Mode::Train { .. })
    }

    /// Returns whether the pass learns, and with which seed.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Returns how many random draws were made.
    pub(crate) fn draws(&self) -> u64 {
        self.draws
    }

    /// Goes back to an earlier number of draws.
    pub(crate) fn set_draws(&mut self, draws: u64) {
        self.draws = draws;
    }

    /// Returns the list of parameters.
    pub fn parameters(&self) -> &'a Parameters {
        self.parameters
    }

    /// Returns a parameter in the given shape, tracked if the pass learns.
    ///
    /// # Panics
    /// If `shape` holds another number of values.
    pub fn tensor<const D: usize>(&self, id: ParameterId, shape: [usize; D]) -> Tensor<D> {
        if self.trains() {
            self.parameters.tracked(id, shape)
        } else {
            self.parameters.constant(id, shape)
        }
    }

    /// Draws numbers from `[0, 1)` while the pass learns; nothing else.
    pub fn uniform<const D: usize>(&mut self, shape: [usize; D]) -> Option<Tensor<D>> {
        let Mode::Train { seed, pass } = self.mode else { return None };
        self.draws += 1;
        let mut random = seed.stream("uniform", &[pass, self.draws]);
        let count = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_| random.uniform() as f32).collect();
        Some(Tensor::from_data(TensorData::new(values, shape), self.parameters.device()))
    }

    /// Draws from the standard normal distribution; zeros in a pass that does not learn.
    ///
    /// Counted as [`Scope::dropout`] counts its draws.
    pub fn noise<const D: usize>(&mut self, shape: [usize; D]) -> Tensor<D> {
        let mut values = vec![0.0; shape.iter().product()];
        if let Mode::Train { seed, pass } = self.mode {
            self.draws += 1;
            seed.stream("noise", &[pass, self.draws]).fill_normal(&mut values, 1.0);
        }
        Tensor::from_data(TensorData::new(values, shape), self.parameters.device())
    }

    /// Zeroes each entry with probability `rate` and scales the rest by `1 / (1 - rate)`.
    ///
    /// Draws are counted per pass, so the same recipe gives the same masks on any machine.
    pub fn dropout<const D: usize>(&mut self, x: Tensor<D>, rate: f64) -> Tensor<D> {
        let Mode::Train { seed, pass } = self.mode else { return x };
        if rate <= 0.0 {
            return x;
        }
        self.draws += 1;
        let (draws, count) = (self.draws, x.shape().num_elements());
        let mut mask: Arc<[u8]> = std::iter::repeat_n(0, count).collect();
        if let Some(mask) = Arc::get_mut(&mut mask) {
            let parts = mask.chunks_mut(DRAWN_TOGETHER).enumerate();
            kernels::each(parts, |(part, mask)| {
                let mut random = seed.stream("dropout", &[pass, draws, part as u64]);
                mask.fill_with(|| u8::from(random.uniform() >= rate));
            });
        }
        kernels::dropout(x, mask, (1.0 / (1.0 - rate)) as f32)
    }
}

/// A change of one weight.
///
/// The one required computation is slow and obvious: it is the definition. The fast path is an
/// override, and the conformance suite compares the two.
pub trait WeightChange: Debug + Send + Sync {
    /// Returns the parameters and buffers this change uses.
    fn parameters(&self) -> Vec<ParameterId>;

    /// Computes the changed weight.
    ///
    /// # Shapes
    /// - `base`: `[rows, columns]`, the weight seen as a matrix (a vector is `[n, 1]`)
    /// - returns: the same
    fn materialize(&self, base: Tensor<2>, scope: &Scope<'_>) -> Tensor<2>;

    /// Computes `x · changedᵀ + bias` without the changed weight, where there is a faster way.
    ///
    /// # Shapes
    /// - `x`: `[tokens, columns]`
    /// - `bias`: `[rows]`
    /// - returns: `[tokens, rows]`, or nothing where [`WeightChange::materialize`] must do
    fn linear(
        &self,
        _x: &Tensor<2>,
        _base: &Arc<PackedMatrix>,
        _bias: Option<&Tensor<1>>,
        _scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        None
    }

    /// Computes what the change adds to the product, where that does not depend on the weight it
    /// changes: such a change has a fast path on top of others too.
    ///
    /// # Shapes
    /// - `x`: `[tokens, columns]`
    /// - returns: `[tokens, rows]`, or nothing where [`WeightChange::materialize`] must do
    fn addition(&self, _x: &Tensor<2>, _scope: &mut Scope<'_>) -> Option<Tensor<2>> {
        None
    }

    /// Computes the same where the base does not matter and is not read, and there is a faster way
    /// than [`WeightChange::materialize`].
    ///
    /// # Shapes
    /// As [`WeightChange::linear`].
    fn linear_alone(
        &self,
        _x: &Tensor<2>,
        _bias: Option<&Tensor<1>>,
        _scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        None
    }

    /// Returns whether the base does not matter, so that it need not be read.
    fn replaces_base(&self) -> bool {
        false
    }

    /// Returns whether the change also holds where a tied weight is used a second time.
    fn follows_tie(&self) -> bool {
        true
    }
}

/// What a state change sees beside the state itself.
#[derive(Debug)]
pub struct SiteView<'a> {
    /// The site, or nothing where the change is of a linear layer's output.
    pub site: Option<Site>,
    /// What was read: by the sub-layer at its `Heads`, `Hidden` and `Output` sites, by the linear
    /// layer at its output. Parallel adapters work on it.
    pub input: Option<&'a Tensor<2>>,
    /// Where documents begin and end among the rows, virtual tokens included.
    pub spans: &'a Spans,
    /// Whether a row may see only what stands before it.
    pub causal: bool,
    /// The task of each document, where the batch has several.
    pub tasks: Option<&'a [usize]>,
    /// Position of each row, and where positions of a text begin.
    pub(crate) positions: (&'a [usize], usize),
    pub(crate) layer_inputs: &'a BTreeMap<usize, Tensor<2>>,
    pub(crate) history: Option<RefCell<&'a mut History>>,
}

impl SiteView<'_> {
    /// Returns a row's place in its document: virtual tokens count, keys of a prefix do not.
    pub fn place(&self, row: usize) -> usize {
        let (positions, begin) = self.positions;
        positions[row] - begin
    }

    /// Returns what entered a block that the change named in [`StateChange::reads_layer`].
    ///
    /// # Shapes
    /// - returns: `[tokens, width]`
    pub fn layer_input(&self, layer: usize) -> Option<&Tensor<2>> {
        self.layer_inputs.get(&layer)
    }

    /// Returns these rows behind those of the same documents that earlier passes gave under `key`:
    /// convolutions and attention of a change see the whole text although it is read piece by
    /// piece.
    ///
    /// # Shapes
    /// - `rows`: `[tokens, width]`
    /// - returns: `[all tokens, width]`, and where documents begin among them
    pub fn with_earlier(&self, key: ParameterId, rows: Tensor<2>) -> (Tensor<2>, Spans) {
        match &self.history {
            Some(history) => history.borrow_mut().extend(key, &rows, self.spans),
            None => (rows, self.spans.clone()),
        }
    }
}

/// A change of the states at one site, or of what a linear layer puts out.
pub trait StateChange: Debug + Send + Sync {
    /// Returns the parameters and buffers this change uses.
    fn parameters(&self) -> Vec<ParameterId>;

    /// Computes the changed states.
    ///
    /// # Shapes
    /// - `x`: `[tokens, width]`, as the site's table says
    /// - returns: the same
    fn apply(&self, x: Tensor<2>, at: &SiteView<'_>, scope: &mut Scope<'_>) -> Tensor<2>;

    /// Returns whether the change of a token depends on its place or on other tokens of its text.
    fn reads_documents(&self) -> bool {
        false
    }

    /// Names the block whose input the change looks at beside the state, if any.
    fn reads_layer(&self) -> Option<usize> {
        None
    }
}

/// What a change of the input sees beside the embeddings.
#[derive(Debug)]
pub struct InputView<'a> {
    /// The tasks of the documents asked for, where the batch has several.
    pub tasks: Option<&'a [usize]>,
    /// Position of each token in its document, virtual tokens not counted, `[tokens]`.
    pub positions: &'a [usize],
    /// Whether each token is the encoder's, `[tokens]`, in a model that has one beside a decoder.
    pub encoder: Option<&'a [bool]>,
}

/// A change of the embeddings before positions are added to them: virtual tokens, or offsets.
pub trait InputChange: Debug + Send + Sync {
    /// Returns the parameters and buffers this change uses.
    fn parameters(&self) -> Vec<ParameterId>;

    /// Returns how many virtual tokens stand before each document.
    fn num_virtual(&self) -> usize {
        0
    }

    /// Computes the embeddings of the virtual tokens of `documents` documents, one after another.
    ///
    /// # Shapes
    /// - returns: `[documents · virtual tokens, width]`, or nothing where there are none
    fn virtual_tokens(
        &self,
        _documents: usize,
        _view: &InputView<'_>,
        _scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        None
    }

    /// Returns what the virtual tokens of a text should predict and how much it weighs, where the
    /// method learns from its own prompt too.
    ///
    /// # Shapes
    /// - returns: one for each virtual token, or nothing at all
    fn virtual_targets(&self) -> Vec<Option<(u32, f32)>> {
        Vec::new()
    }

    /// Computes the changed embeddings of the tokens themselves.
    ///
    /// # Shapes
    /// - `x`: `[tokens, width]`
    /// - returns: the same
    fn tokens(&self, x: Tensor<2>, _view: &InputView<'_>, _scope: &mut Scope<'_>) -> Tensor<2> {
        x
    }
}

/// A change of one block's attention.
pub trait AttentionChange: Debug + Send + Sync {
    /// Returns the parameters and buffers this change uses.
    fn parameters(&self) -> Vec<ParameterId>;

    /// Returns how many keys stand before those of each document.
    fn num_prefix(&self) -> usize {
        0
    }

    /// Returns whether the prefix takes positions, so that a text begins behind it.
    fn takes_positions(&self) -> bool {
        false
    }

    /// Computes keys and values that every query of every document sees; they are not rotated.
    ///
    /// # Shapes
    /// - returns: twice `[prefix, key heads · head width]`, or nothing where there is none
    fn prefix(&self, _scope: &mut Scope<'_>) -> Option<[Tensor<2>; 2]> {
        None
    }

    /// Computes the changed head outputs.
    ///
    /// # Shapes
    /// - `heads`: `[tokens, heads · head width]`
    /// - `queries`: the same, as attention reads them (rotated where the model rotates)
    /// - returns: the same
    fn heads(
        &self,
        heads: Tensor<2>,
        _queries: &Tensor<2>,
        _options: &AttentionOptions,
        _scope: &mut Scope<'_>,
    ) -> Tensor<2> {
        heads
    }
}

/// All changes in force, by place; several at one place apply in the order they were added.
#[derive(Debug, Default)]
pub struct Changes {
    weights: BTreeMap<String, Vec<Box<dyn WeightChange>>>,
    states: BTreeMap<Site, Vec<Box<dyn StateChange>>>,
    outputs: BTreeMap<String, Vec<Box<dyn StateChange>>>,
    inputs: Vec<Box<dyn InputChange>>,
    attention: BTreeMap<(usize, Sublayer), Vec<Box<dyn AttentionChange>>>,
    read_layers: BTreeSet<usize>,
    num_tasks: Option<usize>,
}

impl Changes {
    /// Adds a change of the weight `name`.
    pub fn change_weight(&mut self, name: impl Into<String>, change: impl WeightChange + 'static) {
        self.weights.entry(name.into()).or_default().push(Box::new(change));
    }

    /// Adds a change of the states at `site`.
    pub fn change_state(&mut self, site: Site, change: impl StateChange + 'static) {
        self.read_layers.extend(change.reads_layer());
        self.states.entry(site).or_default().push(Box::new(change));
    }

    /// Adds a change of what the linear layer `module` puts out.
    pub fn change_output(&mut self, module: impl Into<String>, change: impl StateChange + 'static) {
        self.read_layers.extend(change.reads_layer());
        self.outputs.entry(module.into()).or_default().push(Box::new(change));
    }

    /// Adds a change of the input embeddings.
    pub fn change_input(&mut self, change: impl InputChange + 'static) {
        self.inputs.push(Box::new(change));
    }

    /// Adds a change of a block's self-attention.
    pub fn change_attention(&mut self, layer: usize, change: impl AttentionChange + 'static) {
        self.change_attention_of(layer, Sublayer::Attention, Box::new(change));
    }

    /// Adds a change of a block's attention, over its own tokens or over the encoder's.
    pub fn change_attention_of(
        &mut self,
        layer: usize,
        sublayer: Sublayer,
        change: Box<dyn AttentionChange>,
    ) {
        self.attention.entry((layer, sublayer)).or_default().push(change);
    }

    /// Adds all changes of `other` behind these.
    pub fn extend(&mut self, other: Self) {
        fn behind<K: Ord, V>(map: &mut BTreeMap<K, Vec<V>>, other: BTreeMap<K, Vec<V>>) {
            for (place, changes) in other {
                map.entry(place).or_default().extend(changes);
            }
        }
        behind(&mut self.weights, other.weights);
        behind(&mut self.states, other.states);
        behind(&mut self.outputs, other.outputs);
        behind(&mut self.attention, other.attention);
        self.inputs.extend(other.inputs);
        self.read_layers.extend(other.read_layers);
        if let Some(count) = other.num_tasks {
            self.limit_tasks(count);
        }
    }

    /// Says that changes know tasks 0 to `count` - 1 and no other.
    pub fn limit_tasks(&mut self, count: usize) {
        self.num_tasks = Some(self.num_tasks.map_or(count, |known| known.min(count)));
    }

    /// Returns how many tasks the changes know, where they tell tasks apart.
    pub fn num_tasks(&self) -> Option<usize> {
        self.num_tasks
    }

    /// Returns the changes of a weight.
    pub fn of_weight(&self, name: &str) -> &[Box<dyn WeightChange>] {
        self.weights.get(name).map_or(&[], Vec::as_slice)
    }

    /// Returns the changes of a site.
    pub fn of_site(&self, site: Site) -> &[Box<dyn StateChange>] {
        self.states.get(&site).map_or(&[], Vec::as_slice)
    }

    /// Returns the changes of a linear layer's output.
    pub fn of_output(&self, module: &str) -> &[Box<dyn StateChange>] {
        self.outputs.get(module).map_or(&[], Vec::as_slice)
    }

    /// Returns the changes of the input embeddings.
    pub fn of_input(&self) -> &[Box<dyn InputChange>] {
        &self.inputs
    }

    /// Returns the changes of a block's attention, over its own tokens or over the encoder's.
    pub fn of_attention(&self, layer: usize, sublayer: Sublayer) -> &[Box<dyn AttentionChange>] {
        self.attention.get(&(layer, sublayer)).map_or(&[], Vec::as_slice)
    }

    /// Returns how many virtual tokens stand before each document.
    pub fn num_virtual(&self) -> usize {
        self.inputs.iter().map(|change| change.num_virtual()).sum()
    }

    /// Returns what the virtual tokens before each document should predict, and how much it weighs.
    pub fn virtual_targets(&self) -> Vec<Option<(u32, f32)>> {
        let changes = self.inputs.iter();
        let of_each = changes.map(|change| {
            let mut targets = change.virtual_targets();
            targets.resize(change.num_virtual(), None);
            targets
        });
        of_each.flatten().collect()
    }

    /// Returns how many positions of the model are taken before each document's first token.
    pub fn num_positions(&self) -> usize {
        self.num_virtual() + self.prefix_positions()
    }

    /// Returns how many positions prefixes take: those of the block where they are most.
    pub(crate) fn prefix_positions(&self) -> usize {
        let of_block = |changes: &Vec<Box<dyn AttentionChange>>| {
            let taking = changes.iter().filter(|change| change.takes_positions());
            taking.map(|change| change.num_prefix()).sum()
        };
        self.attention.values().map(of_block).max().unwrap_or(0)
    }

    /// Returns whether a change looks at what entered this block.
    pub(crate) fn reads_layer(&self, layer: usize) -> bool {
        self.read_layers.contains(&layer)
    }

    /// Names a change that looks at the input of a block before its own, if there is one: its
    /// gradient flows past the blocks between, which can then not be run again one by one.
    pub fn across_layers(&self) -> Option<Site> {
        let far = |site: Site, change: &dyn StateChange| {
            change.reads_layer().is_some_and(|read| site.layer() != Some(read))
        };
        let mut sites = self.states.iter();
        sites.find(|(site, list)| list.iter().any(|c| far(**site, &**c))).map(|(site, _)| *site)
    }

    /// Returns whether a change adds tokens or looks at attention, or at documents across tokens:
    /// such a change knows one stack of blocks only.
    pub fn reads_documents(&self) -> bool {
        !self.inputs.is_empty() || !self.attention.is_empty() || self.reads_states_across()
    }

    /// Returns whether a change of states looks at other tokens or at other blocks: such a change
    /// knows one text per document only.
    pub fn reads_states_across(&self) -> bool {
        let of_text = self.states.values().chain(self.outputs.values()).flatten();
        !self.read_layers.is_empty() || of_text.into_iter().any(|change| change.reads_documents())
    }

    /// Returns the blocks that hold a change of states or attention.
    pub fn changed_layers(&self) -> impl Iterator<Item = usize> {
        self.changed_sites()
            .filter_map(Site::layer)
            .chain(self.attention.keys().map(|(layer, _)| *layer))
    }

    /// Returns the linear layers whose output is changed, sorted.
    pub fn changed_outputs(&self) -> impl Iterator<Item = &str> {
        self.outputs.keys().map(String::as_str)
    }

    /// Says what of these changes can never become part of the weights, if anything.
    pub fn unmergeable(&self) -> Option<String> {
        if let Some(site) = self.states.keys().next() {
            return Some(format!("a module that changes the states at {site}"));
        }
        if let Some(module) = self.outputs.keys().next() {
            return Some(format!("a module beside {module} that is no change of its weight"));
        }
        if let Some(change) = self.inputs.first() {
            return Some(match change.num_virtual() {
                0 => "a change of the input that depends on the place in the text".to_owned(),
                count => format!("a prompt of {count} virtual tokens, which are input"),
            });
        }
        let ((layer, _), _) = self.attention.first_key_value()?;
        Some(format!("what attention of layer {layer} sees beside the text"))
    }

    /// Returns the names of all changed weights, sorted.
    pub fn changed_weights(&self) -> impl Iterator<Item = &str> {
        self.weights.keys().map(String::as_str)
    }

    /// Returns all sites with a change, in the order of the forward pass of a block.
    pub fn changed_sites(&self) -> impl Iterator<Item = Site> {
        self.states.keys().copied()
    }

    /// Returns whether nothing is changed.
    pub fn is_empty(&self) -> bool {
        self.weights.is_empty() && self.unmergeable().is_none()
    }

    /// Computes a weight with its changes, as `[first axis, all others]`.
    ///
    /// # Errors
    /// If the base weight cannot be read.
    pub fn materialize(
        &self,
        name: &str,
        weights: &Weights,
        scope: &Scope<'_>,
    ) -> Result<Tensor<2>> {
        let changes = self.of_weight(name);
        // A change that replaces the base makes everything before it irrelevant.
        let first = changes.iter().rposition(|change| change.replaces_base()).unwrap_or(0);
        let base = match changes.get(first) {
            Some(change) if change.replaces_base() => {
                let shape = weights.describe(name)?.matrix();
                // A view of one number: nobody reads it.
                Tensor::<2>::zeros([1, 1], weights.device()).expand(shape)
            }
            _ => weights.dense(name)?,
        };
        Ok(changes[first..].iter().fold(base, |weight, change| change.materialize(weight, scope)))
    }
}
