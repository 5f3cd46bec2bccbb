//! Prefix tuning: keys and values that every query of every layer sees beside the text.

use retune_core::Result;
use retune_core::change::{AttentionChange, Changes, Mode, Scope};
use retune_core::kernels::linear;
use retune_core::method::{Card, Promises};
use retune_core::parameters::{ParameterId, Parameters, to_vec};
use retune_core::spec::ModelSpec;
use retune_options::options;
use serde_json::{Map, Value, json};
use tensor::Tensor;

use crate::registry;
use crate::state::keys::Keys;
use crate::state::{FileTensors, Form, Made, Slot, Start, StateMethod, kaiming, planned, prompt};

options! {
    /// Trains keys and values that stand before those of every text, in every layer.
    pub struct PrefixTuning("prefix-tuning") {
        /// Number of keys and values per layer.
        tokens: usize = 30, in 1..=4096, also "num_virtual_tokens";
        /// Whether a network makes them while they train; only its result is saved.
        projection: bool = true, also "prefix_projection";
        /// Width inside that network.
        hidden: usize = 800, in 1..=65536, also "encoder_hidden_size";
        /// Modules that train whole and are saved beside the prefix.
        modules_to_save: Vec<String> = Vec::new();
    }
}

crate::state_plugin!(PrefixTuning);

const EMBEDDING: &str = "prefix_encoder.embedding";
const LAYERS: &str = "prefix_encoder.layers.";

/// Returns the width of one layer's keys, which is that of its values.
pub fn key_width(spec: &ModelSpec) -> usize {
    spec.num_key_heads * spec.head_width
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
        &["tokens = 3\nhidden = 6", "tokens = 3\nprojection = false"]
    }

    fn slots(&self, spec: &ModelSpec, form: Form) -> Result<Vec<Slot>> {
        let width = key_width(spec);
        let place = "attention";
        if form == Form::Saved || !self.projection {
            let shape = [self.tokens, 2 * spec.num_layers * width];
            return Ok(vec![Slot::new(prompt::NAME, shape, place, Start::Normal(0.02))]);
        }
        let hidden = self.hidden;
        let slot = |name: &str, shape: &[usize], start| Slot::new(name, shape, place, start);
        let mut slots = vec![
            slot(EMBEDDING, &[self.tokens, width], Start::Normal(1.0)),
            slot("prefix_encoder.in.weight", &[hidden, width], kaiming(width)),
            slot("prefix_encoder.in.bias", &[hidden], kaiming(width)),
        ];
        for layer in 0..spec.num_layers {
            let name = |part: &str| format!("{LAYERS}{layer}.{part}");
            slots.push(slot(&name("weight"), &[2 * width, hidden], kaiming(hidden)));
            slots.push(slot(&name("bias"), &[2 * width], kaiming(hidden)));
        }
        Ok(slots)
    }

    fn build(&self, spec: &ModelSpec, form: Form, made: &Made<'_>) -> Result<Changes> {
        let mut changes = Changes::default();
        let (tokens, width) = (self.tokens, key_width(spec));
        for layer in 0..spec.num_layers {
            if form == Form::Saved || !self.projection {
                let parts = vec![made.id(prompt::NAME)];
                let num_layers = spec.num_layers;
                let counts = vec![tokens];
                changes.change_attention(layer, Prefix { parts, counts, layer, num_layers, width });
            } else {
                changes.change_attention(layer, self.network(layer, width, |name| made.id(name)));
            }
        }
        Ok(changes)
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
        let layer = |name: &str| {
            let number = name.strip_prefix(LAYERS)?.strip_suffix(".bias")?;
            number.parse::<usize>().ok()
        };
        let num_layers = parameters.iter().filter_map(|(_, p)| layer(&p.name)).count();
        let scope = Scope::new(parameters, Mode::Evaluate);
        let layers = (0..num_layers)
            .map(|layer| self.network(layer, width, |name| planned(parameters, name)).make(&scope));
        let values = to_vec(Tensor::cat(layers.collect(), 1));
        tensors.retain(|name, _| !name.starts_with("prefix_encoder."));
        let shape = vec![self.tokens, 2 * num_layers * width];
        tensors.insert(prompt::NAME.to_owned(), (shape, values));
    }

    fn write_config(&self, spec: &ModelSpec, config: &mut Map<String, Value>) {
        write_config(spec, self.tokens, config);
        config.insert("encoder_hidden_size".to_owned(), json!(self.hidden));
        config.insert("prefix_projection".to_owned(), json!(self.projection));
    }

    fn read_config(keys: &Keys<'_>) -> Result<Self> {
        let tokens = prompt::read_tokens(keys)?;
        Ok(Self { tokens, modules_to_save: keys.modules_to_save()?, ..Self::default() })
    }
}

/// Adds the keys of a prefix: PEFT counts heads of keys, and the width of all of them.
pub fn write_config(spec: &ModelSpec, tokens: usize, config: &mut Map<String, Value>) {
    prompt::write_config(spec, tokens, config);
    config.insert("num_attention_heads".to_owned(), json!(spec.num_key_heads));
    config.insert("token_dim".to_owned(), json!(key_width(spec)));
}

impl PrefixTuning {
    fn network(
        &self,
        layer: usize,
        width: usize,
        find: impl Fn(&str) -> ParameterId,
    ) -> MadePrefix {
        let own = |part: &str| find(&format!("{LAYERS}{layer}.{part}"));
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

/// One layer's slices of the tensors all layers share.
///
/// A row holds keys and values of layer 0, then those of layer 1, and so on.
#[derive(Debug)]
pub struct Prefix {
    /// The tensors, one below the other.
    pub parts: Vec<ParameterId>,
    /// How many rows each has.
    pub counts: Vec<usize>,
    /// The layer.
    pub layer: usize,
    /// The number of layers.
    pub num_layers: usize,
    /// Width of one layer's keys.
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
        let side = 2 * self.num_layers * self.width;
        let parts = self.parts.iter().zip(&self.counts);
        let rows: Vec<Tensor<2>> =
            parts.map(|(id, count)| scope.tensor(*id, [*count, side])).collect();
        let all = Tensor::cat(rows, 0);
        let slice = |place: usize| all.clone().narrow(1, place * self.width, self.width);
        Some([slice(2 * self.layer), slice(2 * self.layer + 1)])
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
