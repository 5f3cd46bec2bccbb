//! Poly: each task mixes low-rank changes from a store of skills that all tasks share.

use retune_core::change::{Changes, Scope, SiteView, StateChange};
use retune_core::method::{Card, Promises};
use retune_core::parameters::ParameterId;
use retune_core::spec::{ModelSpec, WeightSpec};
use retune_core::targets::{Among, Targets};
use retune_core::{Error, Result};
use retune_options::options;
use serde_json::{Map, Value, json};
use tensor::{Tensor, activation};

use crate::adapter::PREFIX;
use crate::registry;
use crate::state::keys::{Keys, TASK};
use crate::state::{Form, Made, Needs, Slot, Start, StateMethod, kaiming};

options! {
    /// Trains a store of low-rank changes and, for each task, how it mixes them.
    pub struct Poly("poly") {
        /// Rank of each change.
        rank: usize = 8, in 1..=65536, also "r";
        /// Number of tasks.
        tasks: usize = 1, in 1..=65536, also "n_tasks";
        /// Number of changes in the store.
        skills: usize = 4, in 1..=4096, also "n_skills";
        /// Into how many parts inputs and outputs are cut, each mixed by itself.
        splits: usize = 1, in 1..=4096, also "n_splits";
        /// The task of rows that do not say theirs, counted from 0.
        task: usize = 0, in 0..=65535;
        /// Targeted modules: suffixes, one regular expression, or all-linear.
        targets: Vec<String> = vec!["all-linear".to_owned()], also "target_modules";
        /// Modules left out again, matched the same way.
        exclude: Vec<String> = Vec::new(), also "exclude_modules";
        /// Modules that train whole and are saved beside.
        modules_to_save: Vec<String> = Vec::new();
    }
}

crate::state_plugin!(Poly);

impl Poly {
    fn chosen<'a>(&self, spec: &'a ModelSpec) -> Result<Vec<&'a WeightSpec>> {
        let wrong = |setting: &str, what: String, expected: String, found: usize| Error::Setting {
            setting: format!("method.poly.{setting}"),
            what,
            expected,
            found: found.to_string(),
            help: "change one of the two".to_owned(),
        };
        if self.task >= self.tasks {
            let expected = format!("0 to {}", self.tasks - 1);
            return Err(wrong("task", "no such task".to_owned(), expected, self.task));
        }
        let targets = Targets {
            names: self.targets.clone(),
            exclude: self.exclude.clone(),
            layers: Vec::new(),
        };
        let chosen = targets.select(spec, Among::Linears, "method.poly.targets")?;
        for weight in &chosen {
            let [rows, columns] = weight.matrix();
            if !rows.is_multiple_of(self.splits) || !columns.is_multiple_of(self.splits) {
                let what = format!("{} cannot be cut into so many parts", weight.module());
                let expected = format!("a divisor of {rows} and {columns}");
                return Err(wrong("splits", what, expected, self.splits));
            }
            if self.rank > rows.min(columns) {
                let what = format!("the rank is above the full rank of {}", weight.module());
                let expected = format!("at most {}", rows.min(columns));
                return Err(wrong("rank", what, expected, self.rank));
            }
        }
        Ok(chosen)
    }
}

impl StateMethod for Poly {
    const CARD: Card = Card {
        name: "poly",
        summary: "Trains a store of low-rank changes and how each task mixes them.",
        source: "Ponti et al., Combining Modular Skills in Multitask Learning, 2022, arXiv 2202.13914",
        usual_learning_rates: (5e-5, 2e-3),
        options: registry::specs::<Self>,
    };
    const PEFT_TYPE: &'static str = "POLY";

    fn promises(&self) -> Promises {
        Promises { num_tasks: Some(self.tasks), ..Promises::default() }
    }

    fn needs(&self) -> Needs {
        // A text has a task.
        Needs::OneText
    }

    fn examples() -> &'static [&'static str] {
        &["rank = 2\ntasks = 2\nskills = 3\nsplits = 2\ntask = 1"]
    }

    fn slots(&self, spec: &ModelSpec, _form: Form) -> Result<Vec<Slot>> {
        let Self { rank, tasks, skills, splits, .. } = *self;
        let mut slots = Vec::new();
        for weight in self.chosen(spec)? {
            let [rows, columns] = weight.matrix();
            let inputs = columns / splits;
            let slot = |name: &str, shape: &[usize], start| {
                Slot::new(format!("{PREFIX}{}.{name}", weight.module()), shape, &weight.name, start)
            };
            let outputs = [splits, skills, rank, rows / splits];
            slots.extend([
                slot("poly_lora_A", &[splits, skills, inputs, rank], kaiming(inputs)),
                slot("poly_lora_B", &outputs, Start::Constant(0.0)),
                slot("poly_router.module_logits", &[tasks, splits * skills], Start::Uniform(1e-3)),
            ]);
        }
        Ok(slots)
    }

    fn build(&self, spec: &ModelSpec, _form: Form, made: &Made<'_>) -> Result<Changes> {
        let mut changes = Changes::default();
        changes.limit_tasks(self.tasks);
        for weight in self.chosen(spec)? {
            let [rows, columns] = weight.matrix();
            let id = |name: &str| made.id(&format!("{PREFIX}{}.{name}", weight.module()));
            changes.change_output(
                weight.module(),
                Mixture {
                    a: id("poly_lora_A"),
                    b: id("poly_lora_B"),
                    logits: id("poly_router.module_logits"),
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

    fn write_config(&self, _spec: &ModelSpec, config: &mut Map<String, Value>) {
        let targets = match self.targets.as_slice() {
            [one] => json!(one),
            many => json!(many),
        };
        let exclude = if self.exclude.is_empty() { Value::Null } else { json!(self.exclude) };
        for (key, value) in [
            ("r", json!(self.rank)),
            ("n_tasks", json!(self.tasks)),
            (TASK, json!(self.task)),
            ("n_skills", json!(self.skills)),
            ("n_splits", json!(self.splits)),
            ("poly_type", json!("poly")),
            ("init_weights", json!(true)),
            ("target_modules", targets),
            ("exclude_modules", exclude),
        ] {
            config.insert(key.to_owned(), value);
        }
    }

    fn read_config(keys: &Keys<'_>) -> Result<Self> {
        if keys.text("poly_type")?.is_some_and(|kind| kind != "poly") {
            return Err(keys.error("poly_type", "poly"));
        }
        Ok(Self {
            rank: keys.count("r")?,
            tasks: keys.count("n_tasks")?,
            skills: keys.count("n_skills")?,
            splits: keys.count("n_splits")?,
            task: keys.optional_count(TASK)?.unwrap_or(0),
            targets: keys.names("target_modules")?,
            exclude: keys.names("exclude_modules")?,
            modules_to_save: keys.modules_to_save()?,
        })
    }
}

/// The mixture of skills beside one linear layer.
#[derive(Debug)]
struct Mixture {
    a: ParameterId,
    b: ParameterId,
    logits: ParameterId,
    options: Poly,
    rows: usize,
    columns: usize,
}

impl Mixture {
    /// Returns each task's share of each skill, `[tasks · splits, skills]`.
    fn shares(&self, scope: &mut Scope<'_>) -> Tensor<2> {
        let Poly { tasks, skills, splits, .. } = self.options;
        let shape = [tasks * splits, skills];
        let mut logits: Tensor<2> = scope.tensor(self.logits, shape);
        // While learning a relaxed Bernoulli draw stands for the share.
        if let Some(draw) = scope.uniform(shape) {
            let draw = draw.clamp(1e-6, 1.0 - 1e-6);
            logits = logits + draw.clone().log() - (draw.neg() + 1.0).log();
        }
        let shares = activation::sigmoid(logits);
        let sums = shares.clone().sum_dim(1) + 1e-12;
        shares / sums
    }

    /// Returns the factors of one task: `[inputs, rank]` and `[rank, outputs]`.
    fn factors(&self, task: usize, shares: &Tensor<2>, scope: &Scope<'_>) -> [Tensor<2>; 2] {
        let Poly { rank, skills, splits, .. } = self.options;
        let (inputs, outputs) = (self.columns / splits, self.rows / splits);
        let a: Tensor<2> = scope.tensor(self.a, [splits * skills, inputs * rank]);
        let b: Tensor<2> = scope.tensor(self.b, [splits * skills, rank * outputs]);
        let mix = |store: &Tensor<2>, split: usize, shape: [usize; 2]| {
            let share = shares.clone().narrow(0, task * splits + split, 1);
            let own = store.clone().narrow(0, split * skills, skills);
            share.matmul(own).reshape(shape)
        };
        let a = (0..splits).map(|split| mix(&a, split, [inputs, rank])).collect();
        let b = (0..splits).map(|split| mix(&b, split, [rank, outputs])).collect();
        [Tensor::cat(a, 0), Tensor::cat(b, 1)]
    }
}

impl StateChange for Mixture {
    fn parameters(&self) -> Vec<ParameterId> {
        vec![self.a, self.b, self.logits]
    }

    fn reads_documents(&self) -> bool {
        self.options.tasks > 1
    }

    fn apply(&self, y: Tensor<2>, at: &SiteView<'_>, scope: &mut Scope<'_>) -> Tensor<2> {
        let Some(x) = at.input else { return y };
        let shares = self.shares(scope);
        let scale = 1.0 / self.options.rank as f64;
        let added = |x: Tensor<2>, task: usize| {
            let [a, b] = self.factors(task, &shares, scope);
            x.matmul(a).matmul(b).mul_scalar(scale)
        };
        let Some(tasks) = at.tasks else { return y + added(x.clone(), self.options.task) };
        let parts = at.spans.iter().zip(tasks);
        let parts = parts
            .map(|(span, task)| added(x.clone().narrow(0, span.start, span.len()), *task))
            .collect();
        y + Tensor::cat(parts, 0)
    }
}
