//! HFT: half of the weights train, the other half keeps what the model knew.

use std::collections::BTreeSet;

use retune_core::change::Changes;
use retune_core::method::{Card, Method, MethodPlan, Promises, StepView};
use retune_core::parameters::Parameters;
use retune_core::random::{Random, Seed};
use retune_core::spec::{Kind, ModelSpec, Role, WeightSpec};
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_options::{Options, Table, choice, options};
use serde_json::Value;

use crate::registry::{self, Plugin};
use crate::{replacement, sparse};

choice! {
    /// Among what the half is drawn.
    pub enum Level {
        /// In every layer, among the matrices of attention, of the feed-forward network, and the norms.
        Category = "category",
        /// Whole layers.
        Layer = "layer",
        /// All modules of all layers together.
        Model = "model",
    }
}

options! {
    /// Trains a random, balanced half of the modules and freezes the other half.
    pub struct HftOptions("hft") {
        /// Share of the modules that trains.
        ratio: f64 = 0.5, in 0.0..=1.0;
        /// Among what the share is drawn.
        level: Level = Level::Category;
        /// Steps after which another half is drawn; 0 keeps the first one for the whole run.
        redraw_every: u64 = 0, in 0..=1_000_000_000;
        /// Trains the embeddings.
        train_embeddings: bool = true;
        /// Trains the output head and the final norm.
        train_head: bool = true;
        /// Also freezes a share of the norms; else all of them train.
        norms: bool = true;
        /// Seed of the draw.
        seed: u64 = 0;
        /// Which run of a sequence this is, counted from 0: each draws another half.
        stage: u64 = 0, in 0..=1_000_000_000;
    }
}

/// What help, documentation and model cards say.
pub const CARD: Card = Card {
    name: "hft",
    summary: "Trains a random half of each layer's matrices and freezes the others, so that less is forgotten.",
    source: "Hui, Zhang, Wang, Xu, Sun and Wu, HFT: Half Fine-Tuning for Large Language Models, 2024, arXiv 2404.18466",
    usual_learning_rates: (1e-6, 5e-5),
    options: registry::specs::<HftOptions>,
};

/// Half fine-tuning.
#[derive(Debug, Clone, Default)]
pub struct Hft {
    /// Share, level and rhythm.
    pub options: HftOptions,
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = Plugin {
    card: CARD,
    read: |reader| Box::new(Hft { options: HftOptions::read(reader) }),
    adapter: None,
};

/// The categories whose modules are drawn from together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Category {
    Attention,
    FeedForward,
    Norm,
}

fn category(weight: &WeightSpec) -> Option<Category> {
    match weight.role {
        Role::Query | Role::Key | Role::Value | Role::QueryKeyValue | Role::AttentionOutput => {
            Some(Category::Attention)
        }
        Role::Gate | Role::Up | Role::Down => Some(Category::FeedForward),
        Role::Norm => Some(Category::Norm),
        _ => None,
    }
}

/// A module that is frozen or trained whole; its bias follows its matrix.
struct Unit<'a> {
    module: &'a str,
    layer: usize,
    category: Category,
}

impl Hft {
    fn units<'a>(&self, spec: &'a ModelSpec) -> Result<Vec<Unit<'a>>> {
        let mut units = Vec::new();
        let mut unknown = Vec::new();
        for weight in spec.weights.iter().filter(|weight| weight.kind != Kind::Bias) {
            let Some(layer) = weight.layer else { continue };
            match category(weight) {
                Some(Category::Norm) if !self.options.norms => {}
                Some(category) => units.push(Unit { module: weight.module(), layer, category }),
                None => unknown.push(weight.name.clone()),
            }
        }
        if !unknown.is_empty() || units.is_empty() {
            return Err(Error::Setting {
                setting: "method.hft.level".to_owned(),
                what: "weights of a layer belong to no category".to_owned(),
                expected: "attention, feed-forward matrices and norms".to_owned(),
                found: unknown.join(", "),
                help: "use `full` with `freeze` for this model".to_owned(),
            });
        }
        Ok(units)
    }

    /// Draws the modules that stay frozen.
    fn frozen<'a>(&self, spec: &'a ModelSpec, round: u64) -> Result<BTreeSet<&'a str>> {
        let o = &self.options;
        if o.ratio <= 0.0 || o.ratio >= 1.0 {
            return Err(Error::Setting {
                setting: "method.hft.ratio".to_owned(),
                what: "nothing is left to draw".to_owned(),
                expected: "a share between 0 and 1".to_owned(),
                found: o.ratio.to_string(),
                help: "use `full` to train everything; training nothing is no training".to_owned(),
            });
        }
        let units = self.units(spec)?;
        // The first run of a sequence draws as one alone does.
        let numbers = [round, o.stage];
        let numbers = if o.stage == 0 { &numbers[..1] } else { &numbers[..] };
        let mut random = Seed(o.seed).stream("hft", numbers);
        let share = 1.0 - o.ratio;
        let mut frozen = BTreeSet::new();
        match o.level {
            Level::Model => {
                let all: Vec<&str> = units.iter().map(|unit| unit.module).collect();
                let count = (share * all.len() as f64).round() as usize;
                frozen.extend(drawn(all, count, &mut random));
            }
            Level::Layer => {
                let layers: BTreeSet<usize> = units.iter().map(|unit| unit.layer).collect();
                let count = (share * layers.len() as f64).round() as usize;
                let chosen = drawn(layers.into_iter().collect(), count, &mut random);
                let inside = units.iter().filter(|unit| chosen.contains(&unit.layer));
                frozen.extend(inside.map(|unit| unit.module));
            }
            Level::Category => {
                for category in [Category::Attention, Category::FeedForward, Category::Norm] {
                    frozen.extend(Self::of_category(&units, category, share, &mut random));
                }
            }
        }
        Ok(frozen)
    }

    /// Draws in every layer; where the share of a category is no whole number, it is rounded up in
    /// as many layers as make the mean right (for 3 matrices: 2 in half of the layers, else 1).
    fn of_category<'a>(
        units: &[Unit<'a>],
        category: Category,
        share: f64,
        random: &mut Random,
    ) -> Vec<&'a str> {
        let layers: BTreeSet<usize> =
            units.iter().filter(|unit| unit.category == category).map(|unit| unit.layer).collect();
        let mut order: Vec<usize> = layers.iter().copied().collect();
        random.shuffle(&mut order);
        let mut frozen = Vec::new();
        for layer in layers {
            let inside = |unit: &&Unit<'a>| unit.layer == layer && unit.category == category;
            let modules: Vec<&str> = units.iter().filter(inside).map(|unit| unit.module).collect();
            let exact = share * modules.len() as f64;
            let more = (exact.fract() * order.len() as f64).floor() as usize;
            let rounded_up = order[..more].contains(&layer);
            let count = exact as usize + usize::from(rounded_up);
            frozen.extend(drawn(modules, count, random));
        }
        frozen
    }

    /// Returns whether a weight is one the draw decides on or one that always trains.
    fn is_candidate(&self, weight: &WeightSpec) -> bool {
        match weight.role {
            Role::Embedding
            | Role::Position
            | Role::TokenType
            | Role::Patches
            | Role::ClassToken => self.options.train_embeddings,
            Role::Head | Role::Pooler | Role::Projection | Role::LogitScale => {
                self.options.train_head
            }
            Role::Norm if weight.layer.is_none() => self.options.train_head,
            _ => true,
        }
    }

    fn chosen<'a>(&self, spec: &'a ModelSpec, round: u64) -> Result<Vec<(&'a WeightSpec, bool)>> {
        let frozen = self.frozen(spec, round)?;
        let candidates = spec.weights.iter().filter(|weight| self.is_candidate(weight));
        let all = candidates.map(|weight| (weight, !frozen.contains(weight.module())));
        // What will never train needs no copy.
        Ok(all.filter(|(_, trains)| *trains || self.options.redraw_every > 0).collect())
    }
}

fn drawn<T>(mut items: Vec<T>, count: usize, random: &mut Random) -> Vec<T> {
    random.shuffle(&mut items);
    items.truncate(count);
    items
}

impl Method for Hft {
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
        Promises { quantized_base: false, ..Promises::default() }
    }

    fn examples(&self) -> &'static [&'static str] {
        &[
            "",
            "level = \"layer\"\nredraw_every = 2",
            "level = \"model\"\ntrain_embeddings = false\ntrain_head = false",
        ]
    }

    fn plan(&self, spec: &ModelSpec) -> Result<MethodPlan> {
        let mut parameters = Vec::new();
        let (mut modules, mut values) = (0, 0);
        for (weight, trains) in self.chosen(spec, 0)? {
            let mut planned = replacement::plan(weight.name.clone(), weight);
            planned.trains = trains;
            let in_layer = weight.layer.is_some() && trains;
            modules += usize::from(in_layer && weight.kind != Kind::Bias);
            values += if in_layer { weight.count() } else { 0 };
            parameters.push(planned);
        }
        let units = self.units(spec)?.len();
        let all =
            spec.weights.iter().filter(|w| w.layer.is_some()).map(WeightSpec::count).sum::<usize>();
        let mut notes = vec![format!(
            "{modules} of {units} modules of the layers train, {:.1} % of their values",
            100.0 * values as f64 / all.max(1) as f64
        )];
        if self.options.level == Level::Category
            && spec.weights.iter().any(|weight| weight.role == Role::QueryKeyValue)
        {
            notes.push(
                "queries, keys and values are one matrix here: attention is drawn from 2 \
                 matrices, not 4"
                    .to_owned(),
            );
        }
        Ok(MethodPlan { parameters, notes })
    }

    fn attach(
        &self,
        weights: &Weights,
        parameters: &mut Parameters,
        _seed: Seed,
    ) -> Result<Changes> {
        sparse::refuse_blocks(weights, "hft")?;
        let spec = weights.spec().clone();
        let mut changes = Changes::default();
        for (weight, trains) in self.chosen(&spec, 0)? {
            let name = &weight.name;
            let id = replacement::attach(name, weight, weights, parameters, &mut changes)?;
            parameters.set_trains(id, trains);
        }
        Ok(changes)
    }

    fn on_step(&mut self, step: &mut StepView<'_>) -> Result<()> {
        let every = self.options.redraw_every;
        if every == 0 || !step.step.is_multiple_of(every) || step.step == step.num_steps {
            return Ok(());
        }
        let chosen = self.chosen(step.spec, step.step / every)?;
        for (weight, trains) in chosen {
            if let Some(id) = step.parameters.find(&weight.name) {
                step.set_trains(id, trains);
            }
        }
        Ok(())
    }

    fn adapter_config(&self, _spec: &ModelSpec) -> Option<Value> {
        None
    }
}
