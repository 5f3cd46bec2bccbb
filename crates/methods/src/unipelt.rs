//! UniPELT: low-rank changes, a prefix and an adapter in every layer, each behind a learned gate.
//!
//! A gate is a number for each token rather than the mean over a text, so that in a causal model no
//! token sees what comes after it; the prefix has a soft-max of its own, so that its gate can close.

use retune_core::change::{Changes, Scope, SiteView, StateChange};
use retune_core::kernels::{AttentionOptions, linear};
use retune_core::method::{Card, Working};
use retune_core::parameters::ParameterId;
use retune_core::site::{Site, Sublayer};
use retune_core::spec::{ModelSpec, Role, WeightSpec};
use retune_core::{Error, Result};
use retune_options::options;
use tensor::{Tensor, activation};

use crate::adapter::PREFIX;
use crate::registry;
use crate::state::attend::beside;
use crate::state::block::{Bottleneck, Plan};
use crate::state::sublayer::Queries;
use crate::state::{Form, Made, Slot, Start, StateMethod, kaiming, layers};

options! {
    /// Trains low-rank changes, a prefix and an adapter in every layer, each behind a gate.
    pub struct Unipelt("unipelt") {
        /// Rank of the changes of queries and values; 0 is none.
        rank: usize = 8, in 0..=65536;
        /// The low-rank change is scaled by alpha / rank.
        alpha: f64 = 16.0, in 0.0..=1e6;
        /// Number of keys of the prefix; 0 is none.
        prefix: usize = 10, in 0..=4096;
        /// Width of the adapter behind the feed-forward network; 0 is none.
        bottleneck: usize = 48, in 0..=65536;
        /// Only these layers, counted from 0; empty means all.
        layers: Vec<usize> = Vec::new();
        /// Modules of the model that train whole and are saved beside.
        modules_to_save: Vec<String> = Vec::new();
    }
}

crate::state_plugin!(Unipelt);

fn name(layer: usize, part: &str) -> String {
    format!("{PREFIX}unipelt.layers.{layer}.{part}")
}

impl Unipelt {
    fn check(&self, spec: &ModelSpec) -> Result<Vec<usize>> {
        if self.rank + self.prefix + self.bottleneck == 0 {
            return Err(Error::Setting {
                setting: "method.unipelt.bottleneck".to_owned(),
                what: "every module is off".to_owned(),
                expected: "a size above 0 of at least one".to_owned(),
                found: "0 of each".to_owned(),
                help: "set `rank`, `prefix` or `bottleneck`".to_owned(),
            });
        }
        layers(spec, &self.layers, "method.unipelt.layers")
    }

    fn plan(&self, spec: &ModelSpec) -> Result<Plan> {
        let plan = Plan::new(spec.width, self.bottleneck, spec.width);
        plan.check("method.unipelt (bottleneck)", spec.causal).map(|()| plan)
    }

    /// Returns the projections of a layer that have a low-rank change.
    fn projections<'a>(&self, spec: &'a ModelSpec, layer: usize) -> Result<Vec<&'a WeightSpec>> {
        if self.rank == 0 {
            return Ok(Vec::new());
        }
        let changed = |role| matches!(role, Role::Query | Role::Value | Role::QueryKeyValue);
        let own = spec.weights.iter().filter(|w| w.layer == Some(layer) && w.is_linear());
        let found: Vec<_> = own.filter(|weight| changed(weight.role)).collect();
        let most = found.iter().flat_map(|weight| weight.matrix()).min().unwrap_or(0);
        if self.rank > most {
            return Err(Error::Setting {
                setting: "method.unipelt.rank".to_owned(),
                what: format!("the rank is above the full rank of a projection of layer {layer}"),
                expected: format!("at most {most}"),
                found: self.rank.to_string(),
                help: "lower it".to_owned(),
            });
        }
        Ok(found)
    }
}

impl StateMethod for Unipelt {
    const CARD: Card = Card {
        name: "unipelt",
        summary: "Trains low-rank changes, a prefix and an adapter per layer, each behind a gate.",
        source: "Mao et al., UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning, 2022, arXiv 2110.07577",
        usual_learning_rates: (5e-5, 2e-3),
        options: registry::specs::<Self>,
    };
    const PEFT_TYPE: &'static str = "UNIPELT";

    fn examples() -> &'static [&'static str] {
        &[
            "rank = 2\nprefix = 3\nbottleneck = 4",
            "rank = 0\nprefix = 0\nbottleneck = 6\nlayers = [1]",
            "rank = 2\nprefix = 0\nbottleneck = 0",
        ]
    }

    fn slots(&self, spec: &ModelSpec, _form: Form) -> Result<Vec<Slot>> {
        let mut slots = Vec::new();
        for layer in self.check(spec)? {
            let mut add = |part: &str, shape: &[usize], site: Site, start| {
                slots.push(Slot::new(name(layer, part), shape, site, start));
            };
            let mut gate = |part: &str, site: Site| {
                add(&format!("{part}.weight"), &[1, spec.width], site, kaiming(spec.width));
                add(&format!("{part}.bias"), &[1], site, Start::Constant(0.0));
            };
            let (heads, output) = (
                Site::Heads(layer, Sublayer::Attention),
                Site::Output(layer, Sublayer::FeedForward),
            );
            if self.rank > 0 {
                gate("lora.gate", heads);
            }
            if self.prefix > 0 {
                gate("prefix.gate", heads);
            }
            if self.bottleneck > 0 {
                gate("adapter.gate", output);
            }
            if self.prefix > 0 {
                let shape = [self.prefix, spec.num_heads * spec.head_width];
                add("prefix.keys", &shape, heads, Start::Normal(0.02));
                add("prefix.values", &shape, heads, Start::Constant(0.0));
            }
            if self.bottleneck > 0 {
                slots.extend(self.plan(spec)?.slots(&name(layer, "adapter"), &output.to_string()));
            }
            for weight in self.projections(spec, layer)? {
                let [rows, columns] = weight.matrix();
                let slot = |part: &str, shape, start| {
                    let name = format!("{PREFIX}{}.{part}", weight.module());
                    Slot::new(name, shape, &weight.name, start)
                };
                slots.push(slot("lora_A.weight", [self.rank, columns], kaiming(columns)));
                slots.push(slot("lora_B.weight", [rows, self.rank], Start::Constant(0.0)));
            }
        }
        Ok(slots)
    }

    fn build(&self, spec: &ModelSpec, _form: Form, made: &Made<'_>) -> Result<Changes> {
        let mut changes = Changes::default();
        for layer in self.check(spec)? {
            let gate = |part: &str| Gate {
                weight: made.id(&name(layer, &format!("{part}.gate.weight"))),
                bias: made.id(&name(layer, &format!("{part}.gate.bias"))),
                width: spec.width,
            };
            for weight in self.projections(spec, layer)? {
                let [rows, columns] = weight.matrix();
                let id =
                    |part: &str| made.id(&format!("{PREFIX}{}.{part}.weight", weight.module()));
                changes.change_output(
                    weight.module(),
                    GatedLowRank {
                        gate: gate("lora"),
                        a: id("lora_A"),
                        b: id("lora_B"),
                        rank: self.rank,
                        rows,
                        columns,
                        scale: self.alpha / self.rank as f64,
                    },
                );
            }
            if self.prefix > 0 {
                let (heads, head_width) = (spec.num_heads, spec.head_width);
                changes.change_state(
                    Site::Heads(layer, Sublayer::Attention),
                    GatedPrefix {
                        gate: gate("prefix"),
                        queries: Queries::of(spec, layer, made.weights)?,
                        keys: made.id(&name(layer, "prefix.keys")),
                        values: made.id(&name(layer, "prefix.values")),
                        tokens: self.prefix,
                        options: AttentionOptions::causal(heads, heads, head_width),
                    },
                );
            }
            if self.bottleneck > 0 {
                let block = self.plan(spec)?.build(&name(layer, "adapter"), made);
                let site = Site::Output(layer, Sublayer::FeedForward);
                changes.change_state(site, GatedAdapter { gate: gate("adapter"), block });
            }
        }
        Ok(changes)
    }

    fn working(&self, spec: &ModelSpec) -> Working {
        // Queries, what they see in the prefix and what comes of it; the adapter's input and output.
        let prefix = if self.prefix > 0 { 3 * spec.num_heads * spec.head_width } else { 0 };
        let adapter = if self.bottleneck > 0 { 2 * spec.width } else { 0 };
        let layers = self.check(spec).map_or(0, |layers| layers.len());
        Working { values_per_token: ((prefix + adapter) * layers) as u64, ..Working::default() }
    }

    fn modules_to_save(&self) -> &[String] {
        &self.modules_to_save
    }
}

/// A number between 0 and 1 for each token.
#[derive(Debug)]
struct Gate {
    weight: ParameterId,
    bias: ParameterId,
    width: usize,
}

impl Gate {
    fn parameters(&self) -> [ParameterId; 2] {
        [self.weight, self.bias]
    }

    /// Computes the gate of each row, `[tokens, 1]`.
    fn of(&self, x: &Tensor<2>, scope: &Scope<'_>) -> Tensor<2> {
        let weight = scope.tensor(self.weight, [1, self.width]);
        activation::sigmoid(linear(x.clone(), weight, Some(scope.tensor(self.bias, [1]))))
    }
}

/// `y + g(x) s B A x`
#[derive(Debug)]
struct GatedLowRank {
    gate: Gate,
    a: ParameterId,
    b: ParameterId,
    rank: usize,
    rows: usize,
    columns: usize,
    scale: f64,
}

impl StateChange for GatedLowRank {
    fn parameters(&self) -> Vec<ParameterId> {
        self.gate.parameters().into_iter().chain([self.a, self.b]).collect()
    }

    fn apply(&self, y: Tensor<2>, at: &SiteView<'_>, scope: &mut Scope<'_>) -> Tensor<2> {
        let Some(x) = at.input else { return y };
        let low = linear(x.clone(), scope.tensor(self.a, [self.rank, self.columns]), None);
        // In the narrow middle: what is multiplied is kept for the backward pass.
        let low = low * self.gate.of(x, scope).mul_scalar(self.scale);
        y + linear(low, scope.tensor(self.b, [self.rows, self.rank]), None)
    }
}

/// `heads + g(x) softmax(q Kᵀ) V`
#[derive(Debug)]
struct GatedPrefix {
    gate: Gate,
    queries: Queries,
    keys: ParameterId,
    values: ParameterId,
    tokens: usize,
    options: AttentionOptions,
}

impl StateChange for GatedPrefix {
    fn parameters(&self) -> Vec<ParameterId> {
        self.gate.parameters().into_iter().chain([self.keys, self.values]).collect()
    }

    fn apply(&self, heads: Tensor<2>, at: &SiteView<'_>, scope: &mut Scope<'_>) -> Tensor<2> {
        let Some(x) = at.input else { return heads };
        let shape = [self.tokens, self.options.heads * self.options.head_width];
        let (keys, values) = (scope.tensor(self.keys, shape), scope.tensor(self.values, shape));
        let seen = beside(&self.queries.apply(x.clone()), keys, values, &self.options);
        heads + seen * self.gate.of(x, scope)
    }
}

/// `y + g(y) A(y)`
#[derive(Debug)]
struct GatedAdapter {
    gate: Gate,
    block: Bottleneck,
}

impl StateChange for GatedAdapter {
    fn parameters(&self) -> Vec<ParameterId> {
        self.gate.parameters().into_iter().chain(self.block.parameters()).collect()
    }

    fn apply(&self, y: Tensor<2>, at: &SiteView<'_>, scope: &mut Scope<'_>) -> Tensor<2> {
        let gate = self.gate.of(&y, scope);
        y.clone() + self.block.apply(y, at, scope) * gate
    }
}
