//! Multitask prompt tuning: one prompt, scaled for each task by a low-rank matrix of its own.

use retune_core::change::{Changes, InputChange, InputView, Scope};
use retune_core::method::{Card, Promises};
use retune_core::parameters::ParameterId;
use retune_core::spec::ModelSpec;
use retune_core::{Error, Result};
use retune_options::options;
use serde_json::{Map, Value, json};
use tensor::Tensor;

use crate::registry;
use crate::state::keys::{Keys, TASK};
use crate::state::prompt;
use crate::state::{Form, Made, Needs, Slot, Start, StateMethod};

options! {
    /// Trains a prompt that all tasks share, and a low-rank factor on it for each task.
    pub struct MultitaskPromptTuning("multitask-prompt-tuning") {
        /// Number of virtual tokens.
        tokens: usize = 20, in 1..=4096, also "num_virtual_tokens";
        /// Number of tasks.
        tasks: usize = 1, in 1..=65536, also "num_tasks";
        /// Rank of a task's factor.
        rank: usize = 1, in 1..=4096, also "num_ranks";
        /// The task of rows that do not say theirs, counted from 0.
        task: usize = 0, in 0..=65535;
        /// Modules that train whole and are saved beside the prompt.
        modules_to_save: Vec<String> = Vec::new();
    }
}

crate::state_plugin!(MultitaskPromptTuning);

const COLUMNS: &str = "prefix_task_cols";
const ROWS: &str = "prefix_task_rows";

impl StateMethod for MultitaskPromptTuning {
    const CARD: Card = Card {
        name: "multitask-prompt-tuning",
        summary: "Trains a prompt shared by all tasks and a low-rank factor on it for each.",
        source: "Wang et al., Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning, 2023, arXiv 2303.02861",
        usual_learning_rates: (3e-3, 3e-1),
        options: registry::specs::<Self>,
    };
    const PEFT_TYPE: &'static str = "MULTITASK_PROMPT_TUNING";
    const BESIDE: &'static str = prompt::BESIDE;

    fn needs(&self) -> Needs {
        Needs::Words
    }

    fn promises(&self) -> Promises {
        let num_tasks = Some(self.tasks);
        Promises { starts_at_base: false, num_tasks, ..Promises::default() }
    }

    fn examples() -> &'static [&'static str] {
        &["tokens = 3\ntasks = 2\nrank = 2\ntask = 1"]
    }

    fn slots(&self, spec: &ModelSpec, _form: Form) -> Result<Vec<Slot>> {
        if self.task >= self.tasks {
            return Err(Error::Setting {
                setting: "method.multitask-prompt-tuning.task".to_owned(),
                what: "no such task".to_owned(),
                expected: format!("0 to {}", self.tasks - 1),
                found: self.task.to_string(),
                help: "raise `tasks`, or count tasks from 0".to_owned(),
            });
        }
        let (tasks, start) = (self.tasks, Start::Normal(0.02));
        let shape = [tasks, self.tokens, self.rank];
        Ok(vec![
            prompt::slot(spec, self.tokens, &[], "method.multitask-prompt-tuning.tokens")?,
            Slot::new(COLUMNS, shape, "embedding", start.clone()),
            Slot::new(ROWS, [tasks, self.rank, spec.width], "embedding", start),
        ])
    }

    fn build(&self, spec: &ModelSpec, _form: Form, made: &Made<'_>) -> Result<Changes> {
        let mut changes = Changes::default();
        changes.limit_tasks(self.tasks);
        changes.change_input(TaskPrompt {
            vectors: made.id(prompt::NAME),
            columns: made.id(COLUMNS),
            rows: made.id(ROWS),
            options: self.clone(),
            width: spec.width,
        });
        Ok(changes)
    }

    fn modules_to_save(&self) -> &[String] {
        &self.modules_to_save
    }

    fn num_positions(&self) -> usize {
        self.tokens
    }

    fn write_config(&self, spec: &ModelSpec, config: &mut Map<String, Value>) {
        prompt::write_config(spec, self.tokens, config);
        for (key, value) in [
            ("num_tasks", json!(self.tasks)),
            (TASK, json!(self.task)),
            ("num_ranks", json!(self.rank)),
            ("prompt_tuning_init", json!("RANDOM")),
        ] {
            config.insert(key.to_owned(), value);
        }
    }

    fn read_config(keys: &Keys<'_>) -> Result<Self> {
        Ok(Self {
            tokens: prompt::read_tokens(keys)?,
            tasks: keys.count("num_tasks")?,
            rank: keys.count("num_ranks")?,
            task: keys.optional_count(TASK)?.unwrap_or(0),
            modules_to_save: keys.modules_to_save()?,
        })
    }
}

/// The prompt of each document's task.
#[derive(Debug)]
struct TaskPrompt {
    vectors: ParameterId,
    columns: ParameterId,
    rows: ParameterId,
    options: MultitaskPromptTuning,
    width: usize,
}

impl InputChange for TaskPrompt {
    fn parameters(&self) -> Vec<ParameterId> {
        vec![self.vectors, self.columns, self.rows]
    }

    fn num_virtual(&self) -> usize {
        self.options.tokens
    }

    fn virtual_tokens(
        &self,
        documents: usize,
        view: &InputView<'_>,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        let MultitaskPromptTuning { tokens, tasks, rank, task, .. } = self.options;
        let vectors: Tensor<2> = scope.tensor(self.vectors, [tokens, self.width]);
        let columns: Tensor<2> = scope.tensor(self.columns, [tasks * tokens, rank]);
        let rows: Tensor<2> = scope.tensor(self.rows, [tasks * rank, self.width]);
        let of_document = |document: usize| {
            let own = view.tasks.and_then(|tasks| tasks.get(document)).copied();
            let task = own.unwrap_or(task);
            let columns = columns.clone().narrow(0, task * tokens, tokens);
            let rows = rows.clone().narrow(0, task * rank, rank);
            vectors.clone() * columns.matmul(rows)
        };
        Some(Tensor::cat((0..documents).map(of_document).collect(), 0))
    }
}
