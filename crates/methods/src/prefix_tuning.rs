//! Prefix tuning: keys and values that every query of every layer sees beside the text.

use std::collections::BTreeMap;

use retune_core::change::{AttentionChange, Changes, Mode, Scope};
use retune_core::kernels::linear;
use retune_core::method::{Card, Promises};
use retune_core::parameters::{ParameterId, Parameters, to_vec};
use retune_core::site::Sublayer;
use retune_core::spec::ModelSpec;
use retune_core::{Error, Result};
use retune_options::{Choice, choice, options};
use serde_json::{Map, Value, json};
use tensor::Tensor;

use crate::registry;
use crate::state::keys::Keys;
use crate::state::{FileTensors, Form, Made, Slot, Start, StateMethod, kaiming, planned, prompt};

choice! {
    /// Which attention of an encoder-decoder has a prefix.
    pub enum Sides {
        /// The decoder's over its own text, as PEFT's files have it.
        Decoder = "decoder",
        /// The encoder's, the decoder's, and the decoder's over the encoder, as in the paper; PEFT
        /// has no such file.
        Both = "both",
    }
}

options! {
    /// Trains keys and values that stand before those of every text, in every layer.
    pub struct PrefixTuning("prefix-tuning") {
        /// Number of keys and values per layer.
        tokens: usize = 30, in 1..=4096, also "num_virtual_tokens";
        /// Whether a network makes them while they train; only its result is saved.
        projection: bool = true, also "prefix_projection";
        /// Width inside that network.
        hidden: usize = 800, in 1..=65536, also "encoder_hidden_size";
        /// Which attention has a prefix, in a model of encoder and decoder.
        sides: Sides = Sides::Decoder;
        /// Modules that train whole and are saved beside the prefix.
        modules_to_save: Vec<String> = Vec::new();
    }
}

crate::state_plugin!(PrefixTuning);

const EMBEDDING: &str = "prefix_encoder.embedding";
const LAYERS: &str = "prefix_encoder.layers.";
/// The key that says which attention of an encoder-decoder has a prefix; PEFT drops keys it does not
/// know.
const SIDES: &str = "retune_sides";

/// Returns the width of one layer's keys, which is that of its values.
pub fn key_width(spec: &ModelSpec) -> usize {
    spec.num_key_heads * spec.head_width
}

/// The prefixes that one saved tensor holds, beside each other.
struct Stack {
    /// The tensor's name.
    name: &'static str,
    sublayer: Sublayer,
    /// How many prefixes there are.
    num_places: usize,
    /// The blocks that have one, and which.
    blocks: Vec<(usize, usize)>,
}

impl Stack {
    /// Makes the prefixes of blocks in a row.
    fn of(name: &'static str, sublayer: Sublayer, blocks: std::ops::Range<usize>) -> Self {
        let num_places = blocks.len();
        Self { name, sublayer, num_places, blocks: blocks.zip(0..).collect() }
    }

    /// Returns what stands before the names of one prefix's own network.
    fn network(&self, place: usize) -> String {
        match self.name {
            prompt::NAME => format!("{LAYERS}{place}"),
            name => format!("{LAYERS}{name}.{place}"),
        }
    }

    /// Returns whether a block sees this prefix.
    fn uses(&self, place: usize) -> bool {
        self.blocks.iter().any(|(_, used)| *used == place)
    }
}

impl StateMethod for PrefixTuning {
    const CARD: Card = Card {
        name: "prefix-tuning",
        summary: "Trains keys and values that attention of every layer sees beside the text.",
        source: "Li and Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation, 2021, arXiv 2101.00190",
        usual_learning_rates: (5e-5, 5e-3),
        options: registry::specs::<Self>,
    };
    const PEFT_TYPE: &'static str = "PREFIX_TUNING";
    const BESIDE: &'static str = prompt::BESIDE;

    fn promises(&self) -> Promises {
        Promises { starts_at_base: false, ..Promises::default() }
    }

    fn examples() -> &'static [&'static str] {
        &[
            "tokens = 3\nhidden = 6",
            "tokens = 3\nprojection = false",
            "tokens = 3\nhidden = 6\nsides = 'both'",
        ]
    }

    fn slots(&self, spec: &ModelSpec, form: Form) -> Result<Vec<Slot>> {
        let width = key_width(spec);
        let stacks = self.stacks(spec)?;
        let slot = |name: &str, shape: &[usize], start| Slot::new(name, shape, "attention", start);
        if form == Form::Saved || !self.projection {
            let whole = |stack: &Stack| {
                let shape = [self.tokens, 2 * stack.num_places * width];
                slot(stack.name, &shape, Start::Normal(0.02))
            };
            return Ok(stacks.iter().map(whole).collect());
        }
        let hidden = self.hidden;
        let mut slots = vec![
            slot(EMBEDDING, &[self.tokens, width], Start::Normal(1.0)),
            slot("prefix_encoder.in.weight", &[hidden, width], kaiming(width)),
            slot("prefix_encoder.in.bias", &[hidden], kaiming(width)),
        ];
        for (stack, place) in stacks.iter().flat_map(|s| (0..s.num_places).map(move |p| (s, p))) {
            let network = stack.network(place);
            let own = [
                slot(&format!("{network}.weight"), &[2 * width, hidden], kaiming(hidden)),
                slot(&format!("{network}.bias"), &[2 * width], kaiming(hidden)),
            ];
            slots.extend(own.map(|slot| if stack.uses(place) { slot } else { slot.frozen() }));
        }
        Ok(slots)
    }

    fn build(&self, spec: &ModelSpec, form: Form, made: &Made<'_>) -> Result<Changes> {
        let mut changes = Changes::default();
        let (tokens, width) = (self.tokens, key_width(spec));
        for stack in self.stacks(spec)? {
            for (layer, place) in stack.blocks.iter().copied() {
                let change: Box<dyn AttentionChange> = if form == Form::Saved || !self.projection {
                    let parts = vec![made.id(stack.name)];
                    let (counts, num_places) = (vec![tokens], stack.num_places);
                    Box::new(Prefix { parts, counts, place, num_places, width })
                } else {
                    let network = stack.network(place);
                    Box::new(self.network(&network, width, |name| made.id(name)))
                };
                changes.change_attention_of(layer, stack.sublayer, change);
            }
        }
        Ok(changes)
    }

    fn num_stacks(spec: &ModelSpec) -> usize {
        if spec.decoder_start().is_some() { 2 } else { 1 }
    }

    fn notes(&self, spec: &ModelSpec) -> Vec<String> {
        let Ok(stacks) = self.stacks(spec) else { return Vec::new() };
        let idle = |stack: &Stack| (0..stack.num_places).filter(|p| !stack.uses(*p)).count();
        match stacks.iter().map(idle).sum::<usize>() {
            0 => Vec::new(),
            idle => vec![format!(
                "PEFT's format lets decoder blocks share keys, and {idle} of the {} prefixes of \
                 the file have no effect; `sides = \"both\"` gives each block its own",
                stacks.iter().map(|stack| stack.num_places).sum::<usize>()
            )],
        }
    }

    fn modules_to_save(&self) -> &[String] {
        &self.modules_to_save
    }

    fn num_positions(&self) -> usize {
        self.tokens
    }

    fn fold(&self, parameters: &Parameters, tensors: &mut FileTensors) {
        let Some(embedding) = parameters.find(EMBEDDING) else { return };
        let width = parameters.get(embedding).shape[1];
        let mut networks: BTreeMap<String, BTreeMap<usize, String>> = BTreeMap::new();
        for (_, parameter) in parameters.iter() {
            let network = parameter.name.strip_suffix(".bias");
            let Some(path) = network.and_then(|name| name.strip_prefix(LAYERS)) else { continue };
            let (stack, place) = path.rsplit_once('.').unwrap_or((prompt::NAME, path));
            if let Ok(place) = place.parse() {
                let network = format!("{LAYERS}{path}");
                networks.entry(stack.to_owned()).or_default().insert(place, network);
            }
        }
        tensors.retain(|name, _| !name.starts_with("prefix_encoder."));
        let scope = Scope::new(parameters, Mode::Evaluate);
        for (stack, places) in networks {
            let shape = vec![self.tokens, 2 * places.len() * width];
            let made = places.values().map(|network| {
                self.network(network, width, |name| planned(parameters, name)).make(&scope)
            });
            tensors.insert(stack, (shape, to_vec(Tensor::cat(made.collect(), 1))));
        }
    }

    fn write_config(&self, spec: &ModelSpec, config: &mut Map<String, Value>) {
        write_config(spec, self.tokens, config);
        config.insert("encoder_hidden_size".to_owned(), json!(self.hidden));
        config.insert("prefix_projection".to_owned(), json!(self.projection));
        if spec.decoder_start().is_some() {
            config.insert(SIDES.to_owned(), json!(self.sides.name()));
        }
    }

    fn read_config(keys: &Keys<'_>) -> Result<Self> {
        let tokens = prompt::read_tokens(keys)?;
        let sides = match keys.text(SIDES)? {
            None | Some("decoder") => Sides::Decoder,
            Some("both") => Sides::Both,
            Some(_) => return Err(keys.error(SIDES, "\"decoder\" or \"both\"")),
        };
        Ok(Self { tokens, sides, modules_to_save: keys.modules_to_save()?, ..Self::default() })
    }
}

/// Adds the keys of a prefix: PEFT counts heads of keys, and the width of all of them.
pub fn write_config(spec: &ModelSpec, tokens: usize, config: &mut Map<String, Value>) {
    prompt::write_config(spec, tokens, config);
    config.insert("num_attention_heads".to_owned(), json!(spec.num_key_heads));
    config.insert("token_dim".to_owned(), json!(key_width(spec)));
    let stacks = PrefixTuning::num_stacks(spec);
    config.insert(prompt::STACKS.to_owned(), json!(stacks));
}

impl PrefixTuning {
    /// Lists which attention has which prefix.
    ///
    /// # Errors
    /// If PEFT's format does not reach all blocks of a decoder.
    fn stacks(&self, spec: &ModelSpec) -> Result<Vec<Stack>> {
        let (own, all) = (Sublayer::Attention, spec.num_layers);
        let Some(read) = spec.encoder_layers() else {
            return Ok(vec![Stack::of(prompt::NAME, own, 0..all)]);
        };
        let decoder = read..all;
        if self.sides == Sides::Both {
            let cross = Sublayer::CrossAttention;
            return Ok(vec![
                Stack::of("prefix.encoder", own, 0..read),
                Stack::of("prefix.decoder", own, decoder.clone()),
                Stack::of("prefix.cross", cross, decoder),
            ]);
        }
        if decoder.len() > read {
            return Err(Error::Setting {
                setting: "method.prefix-tuning.sides".to_owned(),
                what: "PEFT's format has one prefix for each block of the encoder".to_owned(),
                expected: "a decoder that is no deeper than the encoder".to_owned(),
                found: format!("{} blocks over {read}", decoder.len()),
                help: "set sides = \"both\"".to_owned(),
            });
        }
        // PEFT lays two copies of the prefixes end to end and gives each block of the decoder two of
        // them, the second for its attention over the encoder, where it is then dropped.
        let blocks = decoder.zip(0..).map(|(layer, place)| (layer, 2 * place % read)).collect();
        Ok(vec![Stack { name: prompt::NAME, sublayer: own, num_places: read, blocks }])
    }

    fn network(
        &self,
        network: &str,
        width: usize,
        find: impl Fn(&str) -> ParameterId,
    ) -> MadePrefix {
        let own = |part: &str| find(&format!("{network}.{part}"));
        MadePrefix {
            embedding: find(EMBEDDING),
            inner: [find("prefix_encoder.in.weight"), find("prefix_encoder.in.bias")],
            outer: [own("weight"), own("bias")],
            tokens: self.tokens,
            hidden: self.hidden,
            width,
            takes_positions: true,
        }
    }
}

/// One block's slices of the tensors that several share.
///
/// A row holds keys and values of the first place, then those of the second, and so on.
#[derive(Debug)]
pub struct Prefix {
    /// The tensors, one below the other.
    pub parts: Vec<ParameterId>,
    /// How many rows each has.
    pub counts: Vec<usize>,
    /// Which of them the block has.
    pub place: usize,
    /// How many there are.
    pub num_places: usize,
    /// Width of one block's keys.
    pub width: usize,
}

impl AttentionChange for Prefix {
    fn parameters(&self) -> Vec<ParameterId> {
        self.parts.clone()
    }

    fn num_prefix(&self) -> usize {
        self.counts.iter().sum()
    }

    fn takes_positions(&self) -> bool {
        true
    }

    fn prefix(&self, scope: &mut Scope<'_>) -> Option<[Tensor<2>; 2]> {
        let side = 2 * self.num_places * self.width;
        let parts = self.parts.iter().zip(&self.counts);
        let rows: Vec<Tensor<2>> =
            parts.map(|(id, count)| scope.tensor(*id, [*count, side])).collect();
        let all = Tensor::cat(rows, 0);
        let slice = |place: usize| all.clone().narrow(1, place * self.width, self.width);
        Some([slice(2 * self.place), slice(2 * self.place + 1)])
    }
}

/// One layer's keys and values as a network makes them.
#[derive(Debug)]
pub struct MadePrefix {
    /// What the network reads, `[tokens, width]`.
    pub embedding: ParameterId,
    /// Weight and bias of the layer all blocks share.
    pub inner: [ParameterId; 2],
    /// Weight and bias of the block's own layer.
    pub outer: [ParameterId; 2],
    /// Number of keys.
    pub tokens: usize,
    /// Width between the two layers.
    pub hidden: usize,
    /// Width of the block's keys.
    pub width: usize,
    /// Whether a text begins behind the prefix.
    pub takes_positions: bool,
}

impl MadePrefix {
    /// Computes keys beside values, `[tokens, 2 · width]`.
    pub fn make(&self, scope: &Scope<'_>) -> Tensor<2> {
        let Self { tokens, hidden, width, .. } = *self;
        let layer = |x, [weight, bias]: [ParameterId; 2], outputs, inputs| {
            let weight = scope.tensor(weight, [outputs, inputs]);
            linear(x, weight, Some(scope.tensor(bias, [outputs])))
        };
        let x = scope.tensor(self.embedding, [tokens, width]);
        let x = layer(x, self.inner, hidden, width).tanh();
        layer(x, self.outer, 2 * width, hidden)
    }
}

impl AttentionChange for MadePrefix {
    fn parameters(&self) -> Vec<ParameterId> {
        [self.embedding].into_iter().chain(self.inner).chain(self.outer).collect()
    }

    fn num_prefix(&self) -> usize {
        self.tokens
    }

    fn takes_positions(&self) -> bool {
        self.takes_positions
    }

    fn prefix(&self, scope: &mut Scope<'_>) -> Option<[Tensor<2>; 2]> {
        let both = self.make(scope);
        let half = |place: usize| both.clone().narrow(1, place * self.width, self.width);
        Some([half(0), half(1)])
    }
}
