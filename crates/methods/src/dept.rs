//! DePT: a short prompt, and a low-rank offset of the words by their place in the text.

use retune_core::change::{Changes, InputChange, InputView, Scope};
use retune_core::method::{Card, Promises};
use retune_core::parameters::ParameterId;
use retune_core::spec::ModelSpec;
use retune_core::{Error, Result};
use retune_options::{above, options};
use tensor::{Int, Tensor, TensorData};

use crate::registry;
use crate::state::prompt::{self, Prompt};
use crate::state::{Form, Made, Needs, Slot, Start, StateMethod, kaiming};

options! {
    /// Trains a short prompt and a low-rank table of offsets, one row for each place in a text.
    pub struct Dept("dept") {
        /// Number of virtual tokens.
        tokens: usize = 40, in 0..=4096;
        /// Rank of the table of offsets; 0 spends what `budget` leaves.
        rank: usize = 0, in 0..=65536;
        /// Length of a plain prompt whose number of values is spent, where `rank` is 0.
        budget: usize = 100, in 1..=65536;
        /// Places in a text that have an offset; later ones have none.
        length: usize = 256, in 1..=1048576;
        /// The offsets are scaled by alpha / sqrt(rank).
        alpha: f64 = 8.0, in above(0.0);
        /// The table's learning rate is the prompt's times this.
        table_rate: f64 = 0.01, in above(0.0);
        /// Ids of the tokens whose embeddings the prompt begins as; empty means drawn ones.
        init_tokens: Vec<usize> = Vec::new();
        /// Modules that train whole and are saved beside.
        modules_to_save: Vec<String> = Vec::new();
    }
}

crate::state_plugin!(Dept);

const A: &str = "dept.lora_A";
const B: &str = "dept.lora_B";

impl Dept {
    /// Returns the rank: as written, or the largest for which `m d + (s + d) r <= l d`.
    fn rank(&self, width: usize) -> Result<usize> {
        if self.rank > 0 {
            return Ok(self.rank);
        }
        let left = self.budget.saturating_sub(self.tokens) * width;
        let rank = left / (self.length + width);
        if rank > 0 {
            return Ok(rank);
        }
        let most = self.budget.saturating_sub((self.length + width).div_ceil(width));
        Err(Error::Setting {
            setting: "method.dept.tokens".to_owned(),
            what: "the budget leaves no rank for the table of offsets".to_owned(),
            expected: format!("at most {most} of the {} tokens of the budget", self.budget),
            found: self.tokens.to_string(),
            help: "take a shorter prompt, a larger `budget`, or write `rank` yourself".to_owned(),
        })
    }
}

impl StateMethod for Dept {
    const CARD: Card = Card {
        name: "dept",
        summary: "Trains a short prompt and a low-rank offset of the words by their place.",
        source: "Shi and Lipani, DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning, 2024, arXiv 2309.05173",
        usual_learning_rates: (3e-3, 4e-1),
        options: registry::specs::<Self>,
    };
    const PEFT_TYPE: &'static str = "DEPT";
    const BESIDE: &'static str = prompt::BESIDE;

    fn needs(&self) -> Needs {
        Needs::Words
    }

    fn promises(&self) -> Promises {
        Promises { starts_at_base: self.tokens == 0, ..Promises::default() }
    }

    fn examples() -> &'static [&'static str] {
        &[
            "tokens = 3\nrank = 2\nlength = 9",
            "tokens = 2\nbudget = 8\nlength = 20\ninit_tokens = [1, 2, 3]",
            "tokens = 0\nrank = 3\nlength = 64",
        ]
    }

    fn slots(&self, spec: &ModelSpec, _form: Form) -> Result<Vec<Slot>> {
        let rank = self.rank(spec.width)?;
        if rank > self.length.min(spec.width) {
            return Err(Error::Setting {
                setting: "method.dept.rank".to_owned(),
                what: "the rank is above the full rank of the table of offsets".to_owned(),
                expected: format!("at most {}", self.length.min(spec.width)),
                found: rank.to_string(),
                help: "lower `rank`, or `budget` where it is worked out".to_owned(),
            });
        }
        if self.tokens + self.length > spec.max_positions {
            return Err(Error::Setting {
                setting: "method.dept.length".to_owned(),
                what: "prompt and offsets reach beyond the model's positions".to_owned(),
                expected: format!("at most {}", spec.max_positions.saturating_sub(self.tokens)),
                found: self.length.to_string(),
                help: "set it to the longest text of the data".to_owned(),
            });
        }
        let setting = "method.dept.init_tokens";
        let vectors = prompt::slot(spec, self.tokens, &self.init_tokens, setting)?;
        let mut slots = if self.tokens > 0 { vec![vectors] } else { Vec::new() };
        let table = |name, shape: [usize; 2], start| Slot {
            rate_factor: self.table_rate,
            ..Slot::new(name, shape, "embedding", start)
        };
        slots.push(table(A, [self.length, rank], kaiming(rank)));
        slots.push(table(B, [rank, spec.width], Start::Constant(0.0)));
        Ok(slots)
    }

    fn build(&self, spec: &ModelSpec, _form: Form, made: &Made<'_>) -> Result<Changes> {
        let mut changes = Changes::default();
        let (tokens, width, rank) = (self.tokens, spec.width, self.rank(spec.width)?);
        if tokens > 0 {
            changes.change_input(Prompt { vectors: made.id(prompt::NAME), tokens, width });
        }
        changes.change_input(Offsets {
            a: made.id(A),
            b: made.id(B),
            length: self.length,
            rank,
            width,
            scale: self.alpha / (rank as f64).sqrt(),
        });
        Ok(changes)
    }

    fn modules_to_save(&self) -> &[String] {
        &self.modules_to_save
    }

    fn num_positions(&self) -> usize {
        self.tokens
    }

    fn notes(&self, spec: &ModelSpec) -> Vec<String> {
        let mut notes = vec![format!(
            "words beyond place {} of a text have no offset; shifting a text by a few words shifts \
             all offsets",
            self.length
        )];
        if let (0, Ok(rank)) = (self.rank, self.rank(spec.width)) {
            let spent = self.tokens * spec.width + (self.length + spec.width) * rank;
            let plain = self.budget * spec.width;
            notes.push(format!("rank {rank}: {spent} of the {plain} values of a plain prompt"));
        }
        notes
    }
}

/// Adds row `t` of `c · A B` to the embedding of word `t` of every text.
#[derive(Debug)]
struct Offsets {
    a: ParameterId,
    b: ParameterId,
    length: usize,
    rank: usize,
    width: usize,
    scale: f64,
}

impl InputChange for Offsets {
    fn parameters(&self) -> Vec<ParameterId> {
        vec![self.a, self.b]
    }

    fn tokens(&self, x: Tensor<2>, view: &InputView<'_>, scope: &mut Scope<'_>) -> Tensor<2> {
        let a: Tensor<2> = scope.tensor(self.a, [self.length, self.rank]);
        let b: Tensor<2> = scope.tensor(self.b, [self.rank, self.width]);
        // A row of zeros stands for every place beyond the table.
        let device = scope.parameters().device();
        let a = Tensor::cat(vec![a, Tensor::zeros([1, self.rank], device)], 0);
        // What a decoder writes is no input.
        let is_input = |token: usize| view.encoder.is_none_or(|encoder| encoder[token]);
        let row = |(token, place): (usize, &usize)| {
            if is_input(token) { (*place).min(self.length) as i32 } else { self.length as i32 }
        };
        let rows: Vec<i32> = view.positions.iter().enumerate().map(row).collect();
        let count = rows.len();
        let rows = Tensor::<1, Int>::from_data(TensorData::new(rows, [count]), device);
        x + a.select(0, rows).matmul(b).mul_scalar(self.scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_the_papers() {
        let rank = |tokens, length| Dept { tokens, length, ..Dept::default() }.rank(768).unwrap();
        let found = [20, 40, 60, 80].map(|tokens| rank(tokens, 256));
        assert_eq!(found, [60, 45, 30, 15]);
        assert_eq!(rank(60, 512), 24);
        let error = Dept { tokens: 100, ..Dept::default() }.rank(768).unwrap_err().to_string();
        assert!(error.contains("at most 98 of the 100"), "{error}");
    }
}
