//! Lily: low-rank changes whose outer factor is a mixture that all layers share.

use std::ops::Range;

use retune_core::change::{Changes, Scope, SiteView, StateChange};
use retune_core::kernels::linear;
use retune_core::method::Card;
use retune_core::parameters::{ParameterId, Parameters};
use retune_core::spec::{ModelSpec, WeightSpec};
use retune_core::targets::{Among, Targets};
use retune_core::{Error, Result};
use retune_options::{Choice, choice, options};
use serde_json::{Map, Value, json};
use tensor::{Tensor, activation};

use crate::adapter::PREFIX;
use crate::registry;
use crate::state::keys::Keys;
use crate::state::{FileTensors, Form, Made, Needs, Slot, Start, StateMethod, kaiming};

choice! {
    /// Over which tokens the mixture of outer factors is averaged.
    pub enum Average {
        /// Those of one document, so that neighbours in a batch do not matter.
        Document = "document",
        /// All that are read together, as PEFT has it.
        Batch = "batch",
    }
}

options! {
    /// Trains an inner factor per layer and a store of outer factors that all layers mix.
    pub struct Lily("lily") {
        /// Rank of the change.
        rank: usize = 32, in 1..=65536, also "r";
        /// Number of outer factors in each store.
        experts: usize = 2, in 2..=4096, also "num_B";
        /// How many neighbouring layers share an inner factor.
        stride: usize = 1, in 1..=65536, also "stride_A";
        /// Factor on the change.
        scaling: f64 = 1.0, in 0.0..=1e6;
        /// Over which tokens the mixture is averaged.
        average: Average = Average::Document;
        /// Targeted modules: suffixes, one regular expression, or all-linear.
        targets: Vec<String> = vec!["all-linear".to_owned()], also "target_modules";
        /// Modules left out again, matched the same way.
        exclude: Vec<String> = Vec::new(), also "exclude_modules";
        /// Only these layers, counted from 0; empty means all.
        layers: Vec<usize> = Vec::new(), also "layers_to_transform";
        /// Modules that train whole and are saved beside.
        modules_to_save: Vec<String> = Vec::new();
    }
}

crate::state_plugin!(Lily);

/// The key that says over what the mixture is averaged; PEFT drops keys it does not know.
const AVERAGE: &str = "retune_average";

/// Returns a module's path without the numbers of layers: what is shared among layers.
fn kind(module: &str) -> String {
    let is_name = |part: &&str| part.parse::<usize>().is_err();
    module.split('.').filter(is_name).collect::<Vec<_>>().join(".")
}

/// One target and the names of its three tensors.
struct Target<'a> {
    weight: &'a WeightSpec,
    a: String,
    b: String,
    router: String,
}

impl Lily {
    fn targets<'a>(&self, spec: &'a ModelSpec, form: Form) -> Result<Vec<Target<'a>>> {
        let targets = Targets {
            names: self.targets.clone(),
            exclude: self.exclude.clone(),
            layers: self.layers.clone(),
        };
        let mut found: Vec<Target<'a>> = Vec::new();
        // How many targets of the same kind and shape came before.
        let mut seen: Vec<(String, [usize; 2], Vec<String>)> = Vec::new();
        for weight in targets.select(spec, Among::Linears, "method.lily.targets")? {
            let [rows, columns] = weight.matrix();
            if self.rank > rows.min(columns) {
                return Err(Error::Setting {
                    setting: "method.lily.rank".to_owned(),
                    what: format!("the rank is above the full rank of {}", weight.module()),
                    expected: format!("at most {}", rows.min(columns)),
                    found: self.rank.to_string(),
                    help: "lower `rank`, or leave this module out".to_owned(),
                });
            }
            let module = weight.module().to_owned();
            let kind = kind(&module);
            let known = seen.iter().position(|(k, s, _)| *k == kind && *s == [rows, columns]);
            let place = known.unwrap_or_else(|| {
                seen.push((kind, [rows, columns], Vec::new()));
                seen.len() - 1
            });
            let before = &mut seen[place].2;
            before.push(module.clone());
            // A file repeats what is shared.
            let (first_a, first_b) = match form {
                Form::Saved => (&module, &module),
                Form::Training => {
                    (&before[(before.len() - 1) / self.stride * self.stride], &before[0])
                }
            };
            found.push(Target {
                weight,
                a: format!("{PREFIX}{first_a}.lily_A.weight"),
                b: format!("{PREFIX}{first_b}.lily_B.weight"),
                router: format!("{PREFIX}{module}.lily_router.weight"),
            });
        }
        Ok(found)
    }
}

impl StateMethod for Lily {
    const CARD: Card = Card {
        name: "lily",
        summary: "Trains an inner factor per layer and a store of outer factors that layers mix.",
        source: "Zhong et al., Low-Rank Interconnected Adaptation across Layers, 2024, arXiv 2407.09946",
        usual_learning_rates: (5e-5, 2e-3),
        options: registry::specs::<Self>,
    };
    const PEFT_TYPE: &'static str = "LILY";

    fn needs(&self) -> Needs {
        // The mixture is averaged over the tokens of a text.
        Needs::OneText
    }

    fn examples() -> &'static [&'static str] {
        &["rank = 2", "rank = 3\nexperts = 3\nstride = 2"]
    }

    fn slots(&self, spec: &ModelSpec, form: Form) -> Result<Vec<Slot>> {
        let Self { rank, experts, .. } = *self;
        let mut slots: Vec<Slot> = Vec::new();
        for target in self.targets(spec, form)? {
            let [rows, columns] = target.weight.matrix();
            let slot = |name: &str, shape: [usize; 2], start| {
                Slot::new(name, shape, &target.weight.name, start)
            };
            for slot in [
                slot(&target.a, [rank, columns], kaiming(columns)),
                slot(&target.b, [experts * rank, rows], Start::Constant(0.0)),
                slot(&target.router, [experts, rank], kaiming(rank)),
            ] {
                if !slots.iter().any(|known| known.name == slot.name) {
                    slots.push(slot);
                }
            }
        }
        Ok(slots)
    }

    fn build(&self, spec: &ModelSpec, form: Form, made: &Made<'_>) -> Result<Changes> {
        let mut changes = Changes::default();
        for target in self.targets(spec, form)? {
            let [rows, columns] = target.weight.matrix();
            changes.change_output(
                target.weight.module(),
                Mixture {
                    a: made.id(&target.a),
                    b: made.id(&target.b),
                    router: made.id(&target.router),
                    options: self.clone(),
                    rows,
                    columns,
                },
            );
        }
        Ok(changes)
    }

    fn modules_to_save(&self) -> &[String] {
        &self.modules_to_save
    }

    fn fold(&self, parameters: &Parameters, tensors: &mut FileTensors) {
        // The file repeats shared factors at every module that has a router; modules of one kind
        // stand in the order they were made in.
        let routers: Vec<&str> = parameters
            .iter()
            .filter_map(|(_, p)| p.name.strip_suffix(".lily_router.weight"))
            .collect();
        for part in ["lily_A", "lily_B"] {
            let mut last: FileTensors = FileTensors::new();
            for module in &routers {
                let name = format!("{module}.{part}.weight");
                match tensors.get(&name) {
                    Some(own) => {
                        last.insert(kind(module), own.clone());
                    }
                    None => {
                        if let Some(shared) = last.get(&kind(module)) {
                            tensors.insert(name, shared.clone());
                        }
                    }
                }
            }
        }
    }

    fn write_config(&self, _spec: &ModelSpec, config: &mut Map<String, Value>) {
        let list = |items: &[String]| if items.is_empty() { Value::Null } else { json!(items) };
        let targets = match self.targets.as_slice() {
            [one] => json!(one),
            many => json!(many),
        };
        let layers = if self.layers.is_empty() { Value::Null } else { json!(self.layers) };
        for (key, value) in [
            ("r", json!(self.rank)),
            ("num_B", json!(self.experts)),
            ("stride_A", json!(self.stride)),
            ("scaling", json!(self.scaling)),
            (AVERAGE, json!(self.average.name())),
            ("init_weights", json!(true)),
            ("target_modules", targets),
            ("exclude_modules", list(&self.exclude)),
            ("layers_to_transform", layers),
            ("layers_pattern", Value::Null),
        ] {
            config.insert(key.to_owned(), value);
        }
    }

    fn read_config(keys: &Keys<'_>) -> Result<Self> {
        Ok(Self {
            rank: keys.count("r")?,
            experts: keys.count("num_B")?,
            stride: keys.optional_count("stride_A")?.unwrap_or(1).max(1),
            scaling: keys.number("scaling")?.unwrap_or(1.0),
            average: match keys.text(AVERAGE)? {
                None | Some("batch") => Average::Batch,
                Some("document") => Average::Document,
                Some(_) => return Err(keys.error(AVERAGE, "document or batch")),
            },
            targets: keys.names("target_modules")?,
            exclude: keys.names("exclude_modules")?,
            layers: keys.counts("layers_to_transform")?,
            modules_to_save: keys.modules_to_save()?,
        })
    }
}

/// The mixture beside one linear layer.
#[derive(Debug)]
struct Mixture {
    a: ParameterId,
    b: ParameterId,
    router: ParameterId,
    options: Lily,
    rows: usize,
    columns: usize,
}

impl StateChange for Mixture {
    fn parameters(&self) -> Vec<ParameterId> {
        vec![self.a, self.b, self.router]
    }

    fn reads_documents(&self) -> bool {
        self.options.average == Average::Document
    }

    fn apply(&self, y: Tensor<2>, at: &SiteView<'_>, scope: &mut Scope<'_>) -> Tensor<2> {
        let Some(x) = at.input else { return y };
        let Lily { rank, experts, scaling, .. } = self.options;
        let hidden = linear(x.clone(), scope.tensor(self.a, [rank, self.columns]), None);
        let router = scope.tensor(self.router, [experts, rank]);
        let shares = activation::softmax(linear(hidden.clone(), router, None), 1);
        let b: Tensor<2> = scope.tensor(self.b, [experts, rank * self.rows]);
        let mixed = |hidden: Tensor<2>, shares: Tensor<2>| {
            let b = shares.mean_dim(0).matmul(b.clone()).reshape([rank, self.rows]);
            hidden.matmul(b).mul_scalar(scaling)
        };
        if self.options.average == Average::Batch {
            return y + mixed(hidden, shares);
        }
        let of = |x: &Tensor<2>, span: &Range<usize>| x.clone().narrow(0, span.start, span.len());
        let parts = at.spans.iter().map(|span| mixed(of(&hidden, &span), of(&shares, &span)));
        y + Tensor::cat(parts.collect(), 0)
    }
}
