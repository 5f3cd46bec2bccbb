//! Context-aware prompt tuning: a prompt of example texts whose embeddings move a little.

use std::collections::BTreeSet;

use retune_core::change::{Changes, InputChange, InputView, Mode, Scope};
use retune_core::method::{Card, Promises, StepView};
use retune_core::parameters::{ParameterId, Parameters, to_vec};
use retune_core::spec::ModelSpec;
use retune_core::{Error, Result};
use retune_options::{Choice, above, choice, options};
use serde_json::{Map, Value, json};
use tensor::{Tensor, TensorData};

use crate::registry;
use crate::state::keys::Keys;
use crate::state::prompt::{self, Prompt, for_each};
use crate::state::{FileTensors, Form, Made, Needs, Slot, Start, StateMethod, planned};

choice! {
    /// How much the answers of the context weigh.
    pub enum WeightedLoss {
        /// As much as those of the data.
        None = "none",
        /// Less, the further they are from the data.
        Decay = "decay",
    }
}

options! {
    /// Trains bounded shifts of the embeddings of a context of examples before every text.
    pub struct Cpt("cpt") {
        /// Ids of the context's tokens.
        context: Vec<usize> = Vec::new(), also "cpt_token_ids";
        /// What each token of the context is: 1 template of an input, 2 input, 3 template of an
        /// output, 0 output (which stays as it is); counted on by 4 for each example. Empty means
        /// all are input.
        kinds: Vec<usize> = Vec::new(), also "cpt_tokens_type_mask";
        /// How far an input token may move, for a model of width 2048.
        epsilon: f64 = 0.1, in above(0.0), also "opt_projection_epsilon";
        /// How far a template's token may move, for a model of width 2048.
        format_epsilon: f64 = 0.1, in above(0.0), also "opt_projection_format_epsilon";
        /// How much the answers of the context weigh in the loss, beside those of the data.
        weighted_loss: WeightedLoss = WeightedLoss::None, also "opt_weighted_loss_type";
        /// Factor from each answer of the context to the one before it, and from the data's to the
        /// last of the context, where the loss decays.
        loss_decay: f64 = 1.0, in 0.0..=1.0, also "opt_loss_decay_factor";
    }
}

crate::state_plugin!(Cpt);

const SHIFT: &str = "delta_embedding";

impl Cpt {
    /// Returns how far each token may move.
    fn bounds(&self, width: usize) -> Vec<f32> {
        let scale = (width as f64 / 2048.0).sqrt();
        let bound = |place: usize| match self.kinds.get(place).map_or(2, |kind| kind % 4) {
            2 => self.epsilon * scale,
            0 => 0.0,
            _ => self.format_epsilon * scale,
        };
        (0..self.context.len()).map(|place| bound(place) as f32).collect()
    }

    /// Returns what each token of the context should predict, and how much it weighs: the tokens of
    /// the examples' answers are learned as those of the data are.
    fn targets(&self) -> Vec<Option<(u32, f32)>> {
        let answer = |kind: &usize| *kind > 0 && kind.is_multiple_of(4);
        let answers: BTreeSet<usize> = self.kinds.iter().copied().filter(|k| answer(k)).collect();
        let weight = |kind: &usize| match self.weighted_loss {
            WeightedLoss::None => 1.0,
            WeightedLoss::Decay => {
                let behind = answers.iter().filter(|other| *other >= kind).count();
                self.loss_decay.powi(behind as i32)
            }
        };
        let behind = self.kinds.iter().zip(&self.context).skip(1);
        behind
            .map(|(kind, token)| answer(kind).then(|| (*token as u32, weight(kind) as f32)))
            .collect()
    }

    fn moved(&self, width: usize, find: impl Fn(&str) -> ParameterId) -> MovedContext {
        MovedContext {
            context: find(prompt::NAME),
            shift: find(SHIFT),
            bounds: self.bounds(width),
            targets: self.targets(),
            width,
        }
    }
}

impl StateMethod for Cpt {
    const CARD: Card = Card {
        name: "cpt",
        summary: "Trains bounded shifts of the embeddings of a context of examples.",
        source: "Blau et al., Context-Aware Prompt Tuning, 2024, arXiv 2410.17222",
        usual_learning_rates: (1e-4, 1e-2),
        options: registry::specs::<Self>,
    };
    const PEFT_TYPE: &'static str = "CPT";
    const BESIDE: &'static str = prompt::BESIDE;

    fn needs(&self) -> Needs {
        Needs::OneTextOfWords
    }

    fn promises(&self) -> Promises {
        Promises { starts_at_base: false, ..Promises::default() }
    }

    fn examples() -> &'static [&'static str] {
        &[
            "context = [3, 9, 4]\nkinds = [1, 2, 4]",
            "context = [3, 9, 4, 5, 6, 7]\nkinds = [1, 2, 4, 5, 8, 8]\nweighted_loss = 'decay'\nloss_decay = 0.5",
        ]
    }

    fn slots(&self, spec: &ModelSpec, form: Form) -> Result<Vec<Slot>> {
        let wrong = |setting: &str, expected: String, found: usize| Error::Setting {
            setting: format!("method.cpt.{setting}"),
            what: "cannot be used".to_owned(),
            expected,
            found: found.to_string(),
            help: "write the tokens of the examples, and the kind of each or none".to_owned(),
        };
        let count = self.context.len();
        if count == 0 {
            return Err(wrong("context", "at least one token".to_owned(), 0));
        }
        if !self.kinds.is_empty() && self.kinds.len() != count {
            return Err(wrong("kinds", format!("{count}, one for each token"), self.kinds.len()));
        }
        let context = prompt::slot(spec, count, &self.context, "method.cpt.context")?;
        if form == Form::Saved {
            return Ok(vec![context]);
        }
        let shift = Slot::new(SHIFT, context.shape.clone(), "embedding", Start::Constant(0.0));
        Ok(vec![context.frozen(), shift])
    }

    fn build(&self, spec: &ModelSpec, form: Form, made: &Made<'_>) -> Result<Changes> {
        let mut changes = Changes::default();
        if form == Form::Saved {
            let (vectors, tokens) = (made.id(prompt::NAME), self.context.len());
            changes.change_input(Prompt { vectors, tokens, width: spec.width });
        } else {
            changes.change_input(self.moved(spec.width, |name| made.id(name)));
        }
        Ok(changes)
    }

    fn num_positions(&self) -> usize {
        self.context.len()
    }

    fn on_step(&self, step: &mut StepView<'_>) {
        let Some(shift) = step.parameters.find(SHIFT) else { return };
        let width = step.parameters.get(shift).shape[1];
        let bounds = self.bounds(width);
        step.parameters.update(shift, |values| {
            for (shift, bound) in values.chunks_exact_mut(width).zip(&bounds) {
                let length = shift.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt() as f32;
                if length > *bound {
                    for value in shift {
                        *value *= bound / length;
                    }
                }
            }
        });
    }

    fn fold(&self, parameters: &Parameters, tensors: &mut FileTensors) {
        let context = parameters.get(planned(parameters, prompt::NAME));
        let moved = self.moved(context.shape[1], |name| planned(parameters, name));
        let values = to_vec(moved.make(&Scope::new(parameters, Mode::Evaluate)));
        tensors.remove(SHIFT);
        tensors.insert(prompt::NAME.to_owned(), (context.shape.clone(), values));
    }

    fn write_config(&self, spec: &ModelSpec, config: &mut Map<String, Value>) {
        let count = self.context.len();
        prompt::write_config(spec, count, config);
        let kinds = if self.kinds.is_empty() { vec![2; count] } else { self.kinds.clone() };
        for (key, value) in [
            ("cpt_token_ids", json!(self.context)),
            ("cpt_mask", json!(vec![1; count])),
            ("cpt_tokens_type_mask", json!(kinds)),
            ("opt_projection_epsilon", json!(self.epsilon)),
            ("opt_projection_format_epsilon", json!(self.format_epsilon)),
            ("opt_weighted_loss_type", json!(self.weighted_loss.name())),
            ("opt_loss_decay_factor", json!(self.loss_decay)),
        ] {
            config.insert(key.to_owned(), value);
        }
    }

    fn read_config(keys: &Keys<'_>) -> Result<Self> {
        let tokens = prompt::read_tokens(keys)?;
        let context = keys.counts("cpt_token_ids")?;
        if context.len() != tokens {
            return Err(keys.error("cpt_token_ids", "as many as `num_virtual_tokens`"));
        }
        Ok(Self { context, kinds: keys.counts("cpt_tokens_type_mask")?, ..Self::default() })
    }
}

/// The context, each token moved by what was learned.
#[derive(Debug)]
struct MovedContext {
    context: ParameterId,
    shift: ParameterId,
    bounds: Vec<f32>,
    targets: Vec<Option<(u32, f32)>>,
    width: usize,
}

impl MovedContext {
    fn make(&self, scope: &Scope<'_>) -> Tensor<2> {
        let tokens = self.bounds.len();
        let context: Tensor<2> = scope.tensor(self.context, [tokens, self.width]);
        let shift: Tensor<2> = scope.tensor(self.shift, [tokens, self.width]);
        // A token of an answer stays where it is.
        let moves = self.bounds.iter().map(|bound| f32::from(u8::from(*bound > 0.0))).collect();
        let device = scope.parameters().device();
        let moves = Tensor::<2>::from_data(TensorData::new::<f32, _>(moves, [tokens, 1]), device);
        context + shift * moves
    }
}

impl InputChange for MovedContext {
    fn parameters(&self) -> Vec<ParameterId> {
        vec![self.context, self.shift]
    }

    fn num_virtual(&self) -> usize {
        self.bounds.len()
    }

    fn virtual_targets(&self) -> Vec<Option<(u32, f32)>> {
        self.targets.clone()
    }

    fn virtual_tokens(
        &self,
        documents: usize,
        _view: &InputView<'_>,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        Some(for_each(self.make(scope), documents))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use retune_core::step::StepParts;
    use tensor::Device;

    #[test]
    fn answers_of_the_context_are_learned_the_less_the_further_they_are() {
        let mut options = Cpt {
            context: vec![11, 12, 13, 14, 15, 16],
            kinds: vec![1, 2, 4, 6, 8, 8],
            loss_decay: 0.5,
            ..Cpt::default()
        };
        let learned = |options: &Cpt| -> Vec<Option<(u32, f32)>> { options.targets() };
        let (first, last) = (Some((13, 1.0)), [Some((15, 1.0)), Some((16, 1.0))]);
        assert_eq!(learned(&options), [None, first, None, last[0], last[1]]);
        options.weighted_loss = WeightedLoss::Decay;
        let (first, last) = (Some((13, 0.25)), [Some((15, 0.5)), Some((16, 0.5))]);
        assert_eq!(learned(&options), [None, first, None, last[0], last[1]]);
    }

    #[test]
    fn shifts_are_cut_to_their_bounds() {
        let options = Cpt {
            context: vec![7, 8, 9],
            kinds: vec![1, 2, 4],
            epsilon: 2.0,
            format_epsilon: 0.5,
            ..Cpt::default()
        };
        let mut parameters = Parameters::new(&Device::flex());
        let id = parameters.add(SHIFT, &[3, 2048], vec![1.0; 3 * 2048]);
        // A row of ones is √2048 long.
        let mut parts = StepParts::new(&parameters);
        options.on_step(&mut parts.view(1, 2, &mut parameters));
        let values = parameters.values(id);
        let length = |row: usize| {
            values[row * 2048..(row + 1) * 2048].iter().map(|v| v * v).sum::<f32>().sqrt()
        };
        assert!((length(0) - 0.5).abs() < 1e-4 && (length(1) - 2.0).abs() < 1e-4);
        assert!(length(2) == 0.0, "an answer's token moved by {}", length(2));
    }
}
