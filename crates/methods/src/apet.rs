//! APET: arbitrary parameters or modules train, drawn at random until a budget is met.

use retune_core::change::Changes;
use retune_core::method::{Card, Method, MethodPlan, PlannedParameter, Promises};
use retune_core::parameters::Parameters;
use retune_core::random::Seed;
use retune_core::spec::{ModelSpec, WeightSpec};
use retune_core::targets::{Among, Targets};
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_options::{Options, Table, choice, options};
use serde_json::Value;

use crate::adapter::PREFIX;
use crate::lora::{Lora, LoraOptions};
use crate::registry::{self, Plugin};
use crate::sparse::{self, Meaning};

choice! {
    /// What is drawn.
    pub enum Granularity {
        /// Whole tensors: half of the budget of LoRA pairs, half of the model's own.
        Tensor = "tensor",
        /// Single entries of the targeted weights.
        Element = "element",
    }
}

options! {
    /// Trains parameters drawn at random until a budget is met.
    pub struct ApetOptions("apet") {
        /// Values that train; by default as many as LoRA of this rank would have.
        budget: Option<usize> = None, in 1..=1_000_000_000_000;
        /// What is drawn.
        granularity: Granularity = Granularity::Tensor;
        /// Modules drawn from: suffixes, one regular expression, or all-linear.
        targets: Vec<String> = vec!["all-linear".to_owned()];
        /// Modules left out again, matched the same way.
        exclude: Vec<String> = Vec::new();
        /// Only these layers, counted from 0; empty means all.
        layers: Vec<usize> = Vec::new();
        /// Rank of the pairs that may be drawn.
        rank: usize = 8, in 1..=65536;
        /// Their scale.
        alpha: f64 = 16.0, in 0.0..=1e6;
        /// Seed of the draw.
        seed: u64 = 1;
    }
}

/// What help, documentation and model cards say.
pub const CARD: Card = Card {
    name: "apet",
    summary: "Trains parameters drawn at random under a budget: what every designed method must beat.",
    source: "Su, Chan, Cheng, Qin, Lin and others, Exploring the Impact of Model Scaling on Parameter-Efficient Tuning, 2023, arXiv 2306.02320",
    usual_learning_rates: (1e-4, 3e-2),
    options: registry::specs::<ApetOptions>,
};

/// Arbitrary parameter-efficient tuning.
#[derive(Debug, Clone, Default)]
pub struct Apet {
    /// Budget, pool and draw.
    pub options: ApetOptions,
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = Plugin {
    card: CARD,
    read: |reader| Box::new(Apet { options: ApetOptions::read(reader) }),
    adapter: Some(("APET", |config| {
        Ok(Box::new(Apet { options: sparse::saved_options(config)? }))
    })),
};

/// What was drawn.
#[derive(Default)]
struct Drawn<'a> {
    /// LoRA pairs, where any were drawn.
    pairs: Option<Lora>,
    /// Tensors of the model, under their names in a file.
    own: Vec<(String, &'a WeightSpec)>,
    /// Entries per weight.
    entries: Vec<(&'a WeightSpec, Vec<u32>)>,
}

impl Apet {
    fn lora(&self, targets: Vec<String>) -> Lora {
        let o = &self.options;
        let options =
            LoraOptions { rank: o.rank, alpha: o.alpha, targets, ..LoraOptions::default() };
        Lora { options, original: None }
    }

    fn pool<'a>(&self, spec: &'a ModelSpec) -> Result<Vec<&'a WeightSpec>> {
        let o = &self.options;
        let targets = Targets {
            names: o.targets.clone(),
            exclude: o.exclude.clone(),
            layers: o.layers.clone(),
        };
        targets.select(spec, Among::Linears, "method.apet.targets")
    }

    fn drawn<'a>(&self, spec: &'a ModelSpec) -> Result<Drawn<'a>> {
        let pool = self.pool(spec)?;
        let pair = |weight: &WeightSpec| self.options.rank * weight.matrix().iter().sum::<usize>();
        let budget =
            self.options.budget.unwrap_or_else(|| pool.iter().map(|weight| pair(weight)).sum());
        let total: usize = pool.iter().map(|weight| weight.count()).sum();
        let mut random = Seed(self.options.seed).stream("apet", &[budget as u64]);
        let mut drawn = Drawn::default();
        if self.options.granularity == Granularity::Element {
            sparse::check_budget("method.apet.budget", budget, total)?;
            sparse::check_places("apet", total)?;
            let counts: Vec<usize> = pool.iter().map(|weight| weight.count()).collect();
            let places = sparse::random_entries(total, budget, &mut random);
            let entries = pool.into_iter().zip(sparse::split(&places, &counts));
            drawn.entries = entries.filter(|(_, places)| !places.is_empty()).collect();
            return Ok(drawn);
        }
        // Heads train whole anyway, and a targeted weight cannot be both.
        let heads = sparse::heads(spec, &pool)?;
        let is_head = |weight: &&WeightSpec| heads.iter().any(|(_, h)| h.name == weight.name);
        let modules: Vec<&str> = pool.iter().map(|weight| weight.module()).collect();
        let own: Vec<&WeightSpec> = spec
            .weights
            .iter()
            .filter(|weight| modules.contains(&weight.module()) || pool.is_empty())
            .chain(spec.weights.iter().filter(|weight| !weight.is_linear()))
            .filter(|weight| !is_head(weight))
            .collect();
        let mut own = own;
        own.sort_by(|a, b| a.name.cmp(&b.name));
        own.dedup_by(|a, b| a.name == b.name);
        let most = own.iter().map(|weight| weight.count()).sum::<usize>()
            + pool.iter().map(|weight| pair(weight)).sum::<usize>();
        sparse::check_budget("method.apet.budget", budget, most)?;
        let mut groups = pool.clone();
        random.shuffle(&mut groups);
        random.shuffle(&mut own);
        // A group is taken where it fits whole in what is left of its half.
        let mut left = budget / 2;
        let fits = |count: usize, left: &mut usize| {
            let fits = count <= *left;
            *left -= if fits { count } else { 0 };
            fits
        };
        groups.retain(|weight| fits(pair(weight), &mut left));
        let mut left = budget - budget / 2;
        // Of a weight that is replaced whole a pair would be lost.
        own.retain(|weight| {
            let has_pair = groups.iter().any(|group| group.name == weight.name);
            !has_pair && fits(weight.count(), &mut left)
        });
        if groups.is_empty() && own.is_empty() {
            return Err(Error::Setting {
                setting: "method.apet.budget".to_owned(),
                what: "no tensor is that small".to_owned(),
                expected: "room for at least one tensor in half of the budget".to_owned(),
                found: budget.to_string(),
                help: "set `granularity` to \"element\", which meets any budget".to_owned(),
            });
        }
        if !groups.is_empty() {
            let names = groups.iter().map(|weight| weight.module().to_owned()).collect();
            drawn.pairs = Some(self.lora(names));
        }
        own.sort_by_key(|weight| spec.weights.iter().position(|w| w.name == weight.name));
        drawn.own =
            own.into_iter().map(|weight| (format!("{PREFIX}{}", weight.name), weight)).collect();
        Ok(drawn)
    }

    fn heads<'a>(
        &self,
        spec: &'a ModelSpec,
        drawn: &Drawn<'_>,
    ) -> Result<Vec<(String, &'a WeightSpec)>> {
        // LoRA brings a classifier's head along.
        if drawn.pairs.is_some() { Ok(Vec::new()) } else { sparse::heads(spec, &self.pool(spec)?) }
    }
}

impl Method for Apet {
    fn options(&self) -> Table {
        self.options.write()
    }

    fn boxed_clone(&self) -> Box<dyn Method> {
        Box::new(self.clone())
    }

    fn card(&self) -> Card {
        CARD
    }

    fn promises(&self) -> Promises {
        // Entries are differences; whole tensors are copies, which blocks cannot be.
        let quantized_base = self.options.granularity == Granularity::Element;
        Promises { quantized_base, ..Promises::default() }
    }

    fn examples(&self) -> &'static [&'static str] {
        &["rank = 2\nbudget = 900", "granularity = \"element\"\nbudget = 111", "rank = 1\nseed = 3"]
    }

    fn plan(&self, spec: &ModelSpec) -> Result<MethodPlan> {
        let drawn = self.drawn(spec)?;
        let mut parameters = match &drawn.pairs {
            Some(lora) => lora.plan(spec)?.parameters,
            None => Vec::new(),
        };
        parameters.extend(sparse::plan_heads(&drawn.own));
        parameters.extend(drawn.entries.iter().map(|(weight, places)| PlannedParameter {
            name: sparse::name(weight),
            shape: vec![places.len()],
            place: weight.name.clone(),
            trains: true,
        }));
        parameters.extend(sparse::plan_heads(&self.heads(spec, &drawn)?));
        let mut plan = MethodPlan { parameters, notes: Vec::new() };
        if let Some(budget) = self.options.budget {
            plan.notes.push(format!("{} of {budget} values are drawn", plan.num_trainable()));
        }
        Ok(plan)
    }

    fn attach(
        &self,
        weights: &Weights,
        parameters: &mut Parameters,
        seed: Seed,
    ) -> Result<Changes> {
        if self.options.granularity == Granularity::Tensor {
            sparse::refuse_blocks(weights, "apet")?;
        }
        let spec = weights.spec().clone();
        let drawn = self.drawn(&spec)?;
        let mut changes = match &drawn.pairs {
            Some(lora) => lora.attach(weights, parameters, seed)?,
            None => Changes::default(),
        };
        sparse::attach_heads(&drawn.own, weights, parameters, &mut changes)?;
        for (weight, places) in &drawn.entries {
            let zeros = vec![0.0; places.len()];
            let meaning = Meaning::Difference;
            sparse::attach(weight, places.clone(), zeros, meaning, parameters, &mut changes);
        }
        let heads = self.heads(&spec, &drawn)?;
        sparse::attach_heads(&heads, weights, parameters, &mut changes)?;
        Ok(changes)
    }

    fn adapter_config(&self, spec: &ModelSpec) -> Option<Value> {
        Some(sparse::config("APET", &self.options.write(), spec).into())
    }
}
