//! LLaMA-Adapter: the upper layers attend to prompts through a second softmax with a gate.

use std::sync::Arc;

use retune_core::change::{AttentionChange, Changes, Scope};
use retune_core::kernels::matrix::PackedMatrix;
use retune_core::kernels::{AttentionOptions, linear_frozen};
use retune_core::method::{Card, Promises, Refusal};
use retune_core::parameters::ParameterId;
use retune_core::spec::{Kind, ModelSpec, Role, WeightSpec};
use retune_core::{Error, Result};
use retune_options::options;
use serde_json::{Map, Value, json};
use tensor::Tensor;

use crate::adapter::PREFIX;
use crate::registry;
use crate::state::attend::beside;
use crate::state::keys::Keys;
use crate::state::{Form, Made, Needs, Slot, Start, StateMethod, in_layer};

options! {
    /// Trains prompts that attention of the upper layers sees through a gate of its own.
    pub struct LlamaAdapter("llama-adapter") {
        /// Number of prompt vectors per layer.
        tokens: usize = 10, in 1..=4096, also "adapter_len";
        /// How many layers have them, counted from the top; 0 means all.
        top_layers: usize = 0, in 0..=65536, also "adapter_layers";
    }
}

crate::state_plugin!(LlamaAdapter);

/// The projections of one layer that the prompts go through.
struct Projections<'a> {
    key: &'a WeightSpec,
    value: &'a WeightSpec,
    /// The attention module's path.
    module: &'a str,
}

impl LlamaAdapter {
    fn layers(&self, spec: &ModelSpec) -> Result<std::ops::Range<usize>> {
        if self.top_layers > spec.num_layers {
            return Err(Error::Setting {
                setting: "method.llama-adapter.top_layers".to_owned(),
                what: "the model has fewer layers".to_owned(),
                expected: format!("at most {}", spec.num_layers),
                found: self.top_layers.to_string(),
                help: "0 takes all".to_owned(),
            });
        }
        let count = if self.top_layers == 0 { spec.num_layers } else { self.top_layers };
        Ok(spec.num_layers - count..spec.num_layers)
    }
}

fn projections(spec: &ModelSpec, layer: usize) -> Result<Projections<'_>> {
    let key = in_layer(spec, layer, Role::Key, "llama-adapter")?;
    let value = in_layer(spec, layer, Role::Value, "llama-adapter")?;
    let output = in_layer(spec, layer, Role::AttentionOutput, "llama-adapter")?;
    if spec.weight(&format!("{}.bias", output.module())).is_some() {
        return Err(Error::Unsupported {
            what: format!("llama-adapter on {}, whose {} has a bias", spec.class, output.module()),
            help: "the method's file format counts such a bias twice; use prefix-tuning, which \
                   does the same with one softmax"
                .to_owned(),
        });
    }
    let module = key.module().rsplit_once('.').map_or("", |(module, _)| module);
    Ok(Projections { key, value, module })
}

impl StateMethod for LlamaAdapter {
    const CARD: Card = Card {
        name: "llama-adapter",
        summary: "Trains prompts that the upper layers attend to through a gate that begins shut.",
        source: "Zhang et al., LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention, 2023, arXiv 2303.16199",
        usual_learning_rates: (1e-3, 2e-2),
        options: registry::specs::<Self>,
    };
    const PEFT_TYPE: &'static str = "ADAPTION_PROMPT";

    fn promises(&self) -> Promises {
        let refusal = Refusal {
            models: "of encoder and decoder, whose keys have no projection of their own, or with a bias \
                     behind the heads",
            applies: |spec| {
                let has = |role, kind: fn(Kind) -> bool| {
                    spec.weights.iter().any(|weight| weight.role == role && kind(weight.kind))
                };
                spec.has_sides()
                    || !has(Role::Key, |_| true)
                    || has(Role::AttentionOutput, |kind| kind == Kind::Bias)
            },
        };
        Promises { refuses: Some(refusal), ..Promises::default() }
    }

    fn needs(&self) -> Needs {
        Needs::OneText
    }

    fn examples() -> &'static [&'static str] {
        &["tokens = 3", "tokens = 3\ntop_layers = 1"]
    }

    fn slots(&self, spec: &ModelSpec, _form: Form) -> Result<Vec<Slot>> {
        let mut slots = Vec::new();
        for layer in self.layers(spec)? {
            let module = projections(spec, layer)?.module;
            let place = format!("layers.{layer}.attention");
            let name = |part: &str| format!("{PREFIX}{module}.{part}");
            let shape = [1, self.tokens, spec.width];
            slots.push(Slot::new(name("adaption_prompt"), shape, &place, Start::Normal(1.0)));
            slots.push(Slot::new(name("adaption_gate"), [1], &place, Start::Constant(0.0)));
        }
        Ok(slots)
    }

    fn build(&self, spec: &ModelSpec, _form: Form, made: &Made<'_>) -> Result<Changes> {
        let mut changes = Changes::default();
        for layer in self.layers(spec)? {
            let Projections { key, value, module } = projections(spec, layer)?;
            let project = |weight: &WeightSpec| -> Result<Projection> {
                let bias = format!("{}.bias", weight.module());
                let bias = spec.weight(&bias).map(|bias| made.weights.vector(&bias.name));
                Ok(Projection {
                    weight: made.weights.matrix(&weight.name)?,
                    bias: bias.transpose()?,
                })
            };
            changes.change_attention(
                layer,
                GatedPrompt {
                    prompt: made.id(&format!("{PREFIX}{module}.adaption_prompt")),
                    gate: made.id(&format!("{PREFIX}{module}.adaption_gate")),
                    key: project(key)?,
                    value: project(value)?,
                    tokens: self.tokens,
                    width: spec.width,
                },
            );
        }
        Ok(changes)
    }

    fn write_config(&self, spec: &ModelSpec, config: &mut Map<String, Value>) {
        let layers = self.layers(spec).unwrap_or(0..0);
        let module = layers.clone().next().and_then(|layer| projections(spec, layer).ok());
        let module = module.and_then(|found| found.module.rsplit('.').next());
        config.insert("adapter_layers".to_owned(), json!(layers.len()));
        config.insert("adapter_len".to_owned(), json!(self.tokens));
        config.insert("target_modules".to_owned(), json!(module));
    }

    fn read_config(keys: &Keys<'_>) -> Result<Self> {
        Ok(Self { tokens: keys.count("adapter_len")?, top_layers: keys.count("adapter_layers")? })
    }
}

/// A frozen linear layer.
#[derive(Debug)]
struct Projection {
    weight: Arc<PackedMatrix>,
    bias: Option<Tensor<1>>,
}

impl Projection {
    fn apply(&self, x: Tensor<2>) -> Tensor<2> {
        linear_frozen(x, &self.weight, self.bias.clone())
    }
}

/// Adds `gate · softmax(q kᵀ) v` over a prompt to the heads.
#[derive(Debug)]
struct GatedPrompt {
    prompt: ParameterId,
    gate: ParameterId,
    key: Projection,
    value: Projection,
    tokens: usize,
    width: usize,
}

impl AttentionChange for GatedPrompt {
    fn parameters(&self) -> Vec<ParameterId> {
        vec![self.prompt, self.gate]
    }

    fn heads(
        &self,
        heads: Tensor<2>,
        queries: &Tensor<2>,
        options: &AttentionOptions,
        scope: &mut Scope<'_>,
    ) -> Tensor<2> {
        let prompt: Tensor<2> = scope.tensor(self.prompt, [self.tokens, self.width]);
        let (keys, values) = (self.key.apply(prompt.clone()), self.value.apply(prompt));
        let gate: Tensor<2> = scope.tensor(self.gate, [1, 1]);
        heads + beside(queries, keys, values, options) * gate
    }
}
