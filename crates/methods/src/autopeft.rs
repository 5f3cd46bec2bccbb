//! AutoPEFT's space: serial and parallel bottlenecks, prefixes, prompts and low-rank changes, each
//! with a size that may be 0 and layers it is on in.
//!
//! A configuration search writes sizes and layers; a person may as well. The bottlenecks have the
//! shapes of the studies on audio and music: fully connected, convolutional, conformer,
//! transformer.

use std::sync::Arc;

use retune_core::change::{Changes, Scope, SiteView, StateChange, WeightChange};
use retune_core::kernels::linear_low_rank;
use retune_core::kernels::matrix::PackedMatrix;
use retune_core::method::{Card, Promises};
use retune_core::parameters::ParameterId;
use retune_core::site::{Site, Sublayer};
use retune_core::spec::{ModelSpec, WeightSpec};
use retune_core::targets::{Among, Targets};
use retune_core::{Error, Result};
use retune_options::{choice, options};
use tensor::{Int, Tensor, TensorData};

use crate::adapter::PREFIX;
use crate::prefix_tuning::key_width;
use crate::registry;
use crate::state::block::{Ends, Nonlinearity, Plan, Shape};
use crate::state::prompt::{self, Prompt};
use crate::state::sublayer::{Adapter, Extra, Insertion};
use crate::state::{self, Form, Made, Needs, Slot, Start, StateMethod, kaiming, layers};

choice! {
    /// Which sub-layers have a bottleneck.
    pub enum Place {
        /// The feed-forward network (Pfeiffer).
        FeedForward = "feed-forward",
        /// Attention.
        Attention = "attention",
        /// Both (Houlsby).
        Both = "both",
    }
}

choice! {
    /// Whether what a bottleneck reads is added to what it gives.
    pub enum Residual {
        /// On for a serial bottleneck, off for a parallel one.
        Usual = "usual",
        /// On.
        On = "on",
        /// Off.
        Off = "off",
    }
}

options! {
    /// A bottleneck in each layer.
    pub struct BottleneckOptions("bottleneck") {
        /// Width of the bottleneck; 0 is none.
        size: usize = 0, in 0..=65536;
        /// What lies between down and up.
        shape: Shape = Shape::Fc;
        /// Which sub-layers have one.
        place: Place = Place::FeedForward;
        /// Whether what it reads is added to what it gives.
        residual: Residual = Residual::Usual;
        /// Factor on what it gives.
        scale: f64 = 1.0, in -1e4..=1e4;
        /// The activation of the shape fc.
        activation: Nonlinearity = Nonlinearity::Relu;
        /// How its two ends begin.
        start: Ends = Ends::Lora;
        /// Tokens a convolution sees.
        kernel: usize = 3, in 1..=1023;
        /// Gates the channels of the shape conv by a mean over tokens, through which a token feels what
        /// lies beyond the convolutions.
        gate: bool = true;
        /// Attention heads of a transformer bottleneck.
        heads: usize = 1, in 1..=1024;
        /// Probability of dropping a number inside it while training.
        dropout: f64 = 0.0, in 0.0..=0.99;
        /// Only these of the layers; empty means all of them.
        layers: Vec<usize> = Vec::new();
    }
}

options! {
    /// Keys and values in each layer.
    pub struct PrefixOptions("prefix") {
        /// Number of keys; 0 is none.
        tokens: usize = 0, in 0..=4096;
        /// Only these of the layers; empty means all of them.
        layers: Vec<usize> = Vec::new();
    }
}

options! {
    /// Virtual tokens before the text, and anew in each layer.
    pub struct PromptOptions("prompt") {
        /// Number of virtual tokens; 0 is none.
        tokens: usize = 0, in 0..=4096;
        /// Whether each layer replaces them by its own.
        deep: bool = true;
        /// Only these of the layers have their own; empty means all of them.
        layers: Vec<usize> = Vec::new();
    }
}

options! {
    /// Low-rank changes of weights.
    pub struct LowRankOptions("lora") {
        /// Rank; 0 is none.
        rank: usize = 0, in 0..=65536;
        /// The change is scaled by alpha / rank.
        alpha: f64 = 16.0, in 0.0..=1e6;
        /// Targeted modules: suffixes, one regular expression, or all-linear.
        modules: Vec<String> = vec!["all-linear".to_owned()];
        /// Only these of the layers; empty means all of them.
        layers: Vec<usize> = Vec::new();
    }
}

options! {
    /// Trains bottlenecks, prefixes, prompts and low-rank changes, each on or off in every layer.
    pub struct AutoPeft("autopeft") {
        /// Only these layers have any module; empty means all.
        layers: Vec<usize> = Vec::new();
        /// Bottlenecks behind sub-layers.
        serial: BottleneckOptions;
        /// Bottlenecks beside sub-layers.
        parallel: BottleneckOptions = BottleneckOptions {
            size: 48,
            scale: 4.0,
            ..BottleneckOptions::default()
        };
        /// Keys and values beside the text's.
        prefix: PrefixOptions;
        /// Virtual tokens.
        prompt: PromptOptions;
        /// Low-rank changes of weights.
        lora: LowRankOptions;
        /// Modules of the model that train whole and are saved beside.
        modules_to_save: Vec<String> = Vec::new();
    }
}

crate::state_plugin!(AutoPeft);

const NAME: &str = "method.autopeft";

fn name(layer: usize, part: &str) -> String {
    format!("{PREFIX}autopeft.layers.{layer}.{part}")
}

/// One bottleneck in one layer.
struct Unit {
    name: String,
    site: Site,
    plan: Plan,
    insertion: Insertion,
    scale: f64,
    residual: bool,
}

impl AutoPeft {
    /// Returns the layers a kind of module is on in.
    fn on(&self, spec: &ModelSpec, own: &[usize], key: &str) -> Result<Vec<usize>> {
        let all = layers(spec, &self.layers, &format!("{NAME}.layers"))?;
        let own = layers(spec, own, &format!("{NAME}.{key}.layers"))?;
        Ok(all.into_iter().filter(|layer| own.contains(layer)).collect())
    }

    fn units(&self, spec: &ModelSpec) -> Result<Vec<Unit>> {
        let mut units = Vec::new();
        let kinds = [
            ("serial", &self.serial, Insertion::Sequential),
            ("parallel", &self.parallel, Insertion::Parallel),
        ];
        for (key, options, insertion) in kinds {
            if options.size == 0 {
                continue;
            }
            let plan = Plan {
                shape: options.shape,
                nonlinearity: options.activation,
                ends: options.start,
                kernel: options.kernel,
                gate: options.gate,
                heads: options.heads,
                dropout: options.dropout,
                ..Plan::new(spec.width, options.size, spec.width)
            };
            plan.check(&format!("{NAME}.{key}"), spec.causal)?;
            let places: &[Sublayer] = match options.place {
                Place::FeedForward => &[Sublayer::FeedForward],
                Place::Attention => &[Sublayer::Attention],
                Place::Both => &[Sublayer::Attention, Sublayer::FeedForward],
            };
            for layer in self.on(spec, &options.layers, key)? {
                units.extend(places.iter().map(|place| Unit {
                    name: name(layer, &format!("{}.{key}", place.name())),
                    site: Site::Output(layer, *place),
                    plan: plan.clone(),
                    insertion,
                    scale: options.scale,
                    residual: match options.residual {
                        Residual::Usual => insertion == Insertion::Sequential,
                        Residual::On => true,
                        Residual::Off => false,
                    },
                }));
            }
        }
        Ok(units)
    }

    fn low_rank<'a>(&self, spec: &'a ModelSpec) -> Result<Vec<&'a WeightSpec>> {
        let options = &self.lora;
        if options.rank == 0 {
            return Ok(Vec::new());
        }
        let on = self.on(spec, &options.layers, "lora")?;
        let targets = Targets { names: options.modules.clone(), ..Targets::default() };
        let found = targets.select(spec, Among::Linears, &format!("{NAME}.lora.modules"))?;
        let on = |weight: &&WeightSpec| weight.layer.is_some_and(|layer| on.contains(&layer));
        let found: Vec<_> = found.into_iter().filter(on).collect();
        match found
            .iter()
            .find(|weight| options.rank > weight.matrix().into_iter().min().unwrap_or(0))
        {
            Some(weight) => Err(Error::Setting {
                setting: format!("{NAME}.lora.rank"),
                what: format!("the rank is above the full rank of {}", weight.module()),
                expected: format!("at most {}", weight.matrix().into_iter().min().unwrap_or(0)),
                found: options.rank.to_string(),
                help: "lower it, or name other `modules`".to_owned(),
            }),
            None => Ok(found),
        }
    }

    /// Returns the layers that replace the virtual tokens by their own.
    fn deep(&self, spec: &ModelSpec) -> Result<Vec<usize>> {
        if self.prompt.tokens == 0 || !self.prompt.deep {
            return Ok(Vec::new());
        }
        let on = self.on(spec, &self.prompt.layers, "prompt")?;
        // What enters the first layer is the prompt itself.
        Ok(on.into_iter().filter(|layer| *layer > 0).collect())
    }
}

impl StateMethod for AutoPeft {
    const CARD: Card = Card {
        name: "autopeft",
        summary: "Trains bottlenecks, prefixes, prompts and low-rank changes, on or off per layer.",
        source: "Zhou et al., AutoPEFT: Automatic Configuration Search for Parameter-Efficient Fine-Tuning, 2024, arXiv 2301.12132; shapes: Cappellazzo et al., arXiv 2312.03694, Mehta et al., arXiv 2506.21298",
        usual_learning_rates: (5e-5, 3e-3),
        options: registry::specs::<Self>,
    };
    const PEFT_TYPE: &'static str = "AUTOPEFT";

    fn needs(&self) -> Needs {
        if self.prompt.tokens > 0 { Needs::Words } else { Needs::OneStack }
    }

    fn promises(&self) -> Promises {
        let at_base = |options: &BottleneckOptions, usual: Residual| {
            options.size == 0
                || (options.start == Ends::Lora
                    && (options.residual == usual || options.residual == Residual::Usual))
        };
        let starts_at_base = at_base(&self.serial, Residual::On)
            && at_base(&self.parallel, Residual::Off)
            && self.prefix.tokens == 0
            && self.prompt.tokens == 0;
        Promises { starts_at_base, ..Promises::default() }
    }

    fn examples() -> &'static [&'static str] {
        &[
            "parallel = { size = 6 }\nserial = { size = 4, place = 'both', layers = [1] }",
            "parallel = { size = 0 }\nserial = { size = 8, shape = 'conv', activation = 'gelu' }",
            "parallel = { size = 6, shape = 'conformer', kernel = 5, place = 'attention' }",
            "parallel = { size = 8, shape = 'transformer', heads = 2, residual = 'on' }",
            "parallel = { size = 0 }\nprefix = { tokens = 3, layers = [0] }\nlora = { rank = 2 }",
            "layers = [1]\nparallel = { size = 0 }\nprompt = { tokens = 3 }",
            "parallel = { size = 0 }\nserial = { size = 5, residual = 'off', start = 'bert' }",
        ]
    }

    fn slots(&self, spec: &ModelSpec, _form: Form) -> Result<Vec<Slot>> {
        let mut slots = Vec::new();
        for unit in self.units(spec)? {
            slots.extend(unit.plan.slots(&unit.name, &unit.site.to_string()));
        }
        if self.prefix.tokens > 0 {
            for layer in self.on(spec, &self.prefix.layers, "prefix")? {
                for part in ["prefix.keys", "prefix.values"] {
                    let shape = [self.prefix.tokens, key_width(spec)];
                    let place = Site::Heads(layer, Sublayer::Attention);
                    slots.push(Slot::new(name(layer, part), shape, place, Start::Normal(0.02)));
                }
            }
        }
        if self.prompt.tokens > 0 {
            let shape = [self.prompt.tokens, spec.width];
            // Uniform as the study has it; near the size of words of most models.
            let start = || Start::Uniform((6.0 / (3.0 * 256.0 + spec.width as f64)).sqrt());
            slots.push(if state::embedding(spec).is_ok() {
                prompt::slot(spec, shape[0], &[], &format!("{NAME}.prompt.tokens"))?
            } else {
                Slot::new(prompt::NAME, shape, "embedding", start())
            });
            for layer in self.deep(spec)? {
                let place = Site::LayerInput(layer);
                slots.push(Slot::new(name(layer, "prompt"), shape, place, start()));
            }
        }
        for weight in self.low_rank(spec)? {
            let [rows, columns] = weight.matrix();
            let slot = |part: &str, shape, start| {
                let name = format!("{PREFIX}{}.{part}", weight.module());
                Slot::new(name, shape, &weight.name, start)
            };
            slots.push(slot("lora_A.weight", [self.lora.rank, columns], kaiming(columns)));
            slots.push(slot("lora_B.weight", [rows, self.lora.rank], Start::Constant(0.0)));
        }
        if slots.is_empty() {
            return Err(Error::Setting {
                setting: NAME.to_owned(),
                what: "every module is off, or on in no layer".to_owned(),
                expected: "a size above 0 in at least one layer".to_owned(),
                found: "nothing to train".to_owned(),
                help: "set `parallel.size`, or another size".to_owned(),
            });
        }
        Ok(slots)
    }

    fn build(&self, spec: &ModelSpec, _form: Form, made: &Made<'_>) -> Result<Changes> {
        let mut changes = Changes::default();
        for Unit { name, site, plan, insertion, scale, residual } in self.units(spec)? {
            let block = plan.build(&name, made);
            let through = None;
            changes.change_state(site, Adapter { block, insertion, scale, residual, through });
        }
        if self.prefix.tokens > 0 {
            for layer in self.on(spec, &self.prefix.layers, "prefix")? {
                changes.change_attention(
                    layer,
                    Extra {
                        keys: made.id(&name(layer, "prefix.keys")),
                        values: made.id(&name(layer, "prefix.values")),
                        tokens: self.prefix.tokens,
                        width: key_width(spec),
                        beside: None,
                    },
                );
            }
        }
        if self.prompt.tokens > 0 {
            let (tokens, width) = (self.prompt.tokens, spec.width);
            changes.change_input(Prompt { vectors: made.id(prompt::NAME), tokens, width });
            for layer in self.deep(spec)? {
                let vectors = made.id(&name(layer, "prompt"));
                changes
                    .change_state(Site::LayerInput(layer), DeepPrompt { vectors, tokens, width });
            }
        }
        for weight in self.low_rank(spec)? {
            let [rows, columns] = weight.matrix();
            let id = |part: &str| made.id(&format!("{PREFIX}{}.{part}.weight", weight.module()));
            let rank = self.lora.rank;
            let scale = self.lora.alpha / rank as f64;
            let (a, b) = (id("lora_A"), id("lora_B"));
            changes.change_weight(&weight.name, LowRank { a, b, rank, rows, columns, scale });
        }
        Ok(changes)
    }

    fn modules_to_save(&self) -> &[String] {
        &self.modules_to_save
    }

    fn num_positions(&self) -> usize {
        self.prompt.tokens
    }
}

/// Puts a layer's own vectors where the virtual tokens are.
#[derive(Debug)]
struct DeepPrompt {
    vectors: ParameterId,
    tokens: usize,
    width: usize,
}

impl StateChange for DeepPrompt {
    fn parameters(&self) -> Vec<ParameterId> {
        vec![self.vectors]
    }

    fn reads_documents(&self) -> bool {
        true
    }

    fn apply(&self, x: Tensor<2>, at: &SiteView<'_>, scope: &mut Scope<'_>) -> Tensor<2> {
        let prompt: Tensor<2> = scope.tensor(self.vectors, [self.tokens, self.width]);
        let device = scope.parameters().device();
        let count = at.spans.tokens();
        let places: Vec<i32> =
            (0..count).map(|row| at.place(row).min(self.tokens) as i32).collect();
        let keep: Vec<f32> =
            places.iter().map(|p| f32::from(u8::from(*p == self.tokens as i32))).collect();
        let keep = Tensor::<2>::from_data(TensorData::new(keep, [count, 1]), device);
        let places = Tensor::<1, Int>::from_data(TensorData::new(places, [count]), device);
        let rows = Tensor::cat(vec![prompt, Tensor::zeros([1, self.width], device)], 0);
        x * keep + rows.select(0, places)
    }
}

/// `W + s B A`.
#[derive(Debug)]
struct LowRank {
    a: ParameterId,
    b: ParameterId,
    rank: usize,
    rows: usize,
    columns: usize,
    scale: f64,
}

impl LowRank {
    fn factors(&self, scope: &Scope<'_>) -> [Tensor<2>; 2] {
        let a = scope.tensor(self.a, [self.rank, self.columns]);
        [a, scope.tensor(self.b, [self.rows, self.rank])]
    }
}

impl WeightChange for LowRank {
    fn parameters(&self) -> Vec<ParameterId> {
        vec![self.a, self.b]
    }

    fn materialize(&self, base: Tensor<2>, scope: &Scope<'_>) -> Tensor<2> {
        let [a, b] = self.factors(scope);
        base + b.matmul(a).mul_scalar(self.scale)
    }

    fn linear(
        &self,
        x: &Tensor<2>,
        base: &Arc<PackedMatrix>,
        bias: Option<&Tensor<1>>,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        let [a, b] = self.factors(scope);
        Some(linear_low_rank(x.clone(), base, bias.cloned(), a, b, self.scale))
    }
}
