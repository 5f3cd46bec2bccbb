//! Plug-ins with one flaw each: the check that is for it must fail, and none where there is none.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::sync::Arc;

use retune_conformance::{CHECKS, check_all, subjects};
use retune_core::Result;
use retune_core::change::{Changes, Scope, WeightChange};
use retune_core::kernels::linear;
use retune_core::kernels::matrix::{Form, PackedMatrix};
use retune_core::method::{Card, Method, MethodPlan, PlannedParameter, StepView};
use retune_core::parameters::{ParameterId, Parameters};
use retune_core::random::Seed;
use retune_core::spec::{ModelSpec, WeightSpec};
use retune_core::weights::Weights;
use retune_methods::adapter::peft_config;
use retune_methods::registry::Plugin;
use retune_options::{Options, Table, Value, options};
use serde_json::json;
use tensor::Tensor;

options! {
    /// Scales the rows of one linear layer per block.
    pub struct ScaleOptions("scale") {
        /// Steps between halvings of the first scale.
        every: usize = 2, in 1..=100;
    }
}

/// What is wrong with a plug-in, as a number, since a plug-in is made by a plain function.
mod flaw {
    pub(crate) const NONE: u8 = 0;
    pub(crate) const PLAN: u8 = 1;
    pub(crate) const START: u8 = 2;
    pub(crate) const FAST: u8 = 3;
    pub(crate) const MERGE: u8 = 4;
    pub(crate) const PACKING: u8 = 5;
    pub(crate) const ACCUMULATION: u8 = 6;
    pub(crate) const THREADS: u8 = 7;
    pub(crate) const MOVES: u8 = 8;
    pub(crate) const GRADIENT: u8 = 9;
    pub(crate) const OPTIONS: u8 = 10;
    pub(crate) const SAVE: u8 = 11;
    pub(crate) const RESUME: u8 = 12;
    pub(crate) const QUANTISED: u8 = 13;
}

/// Scales the rows of each feed-forward output: right but for `FLAW`.
#[derive(Debug, Clone, Default)]
struct Scale<const FLAW: u8> {
    options: ScaleOptions,
    /// State of its own, which no checkpoint knows.
    num_steps: u64,
}

const CARD: Card = Card {
    name: "scale",
    summary: "Scales rows.",
    source: "none",
    usual_learning_rates: (1e-4, 1e-2),
    options: || ScaleOptions::specs().to_vec(),
};

fn plugin<const FLAW: u8>() -> Plugin {
    Plugin {
        card: CARD,
        read: |reader| {
            let options = if FLAW == flaw::OPTIONS {
                let every = match reader.item("every").map(|item| &item.value) {
                    Some(Value::Integer(every)) => *every as usize,
                    _ => 2,
                };
                ScaleOptions { every }
            } else {
                ScaleOptions::read(reader)
            };
            Box::new(Scale::<FLAW> { options, num_steps: 0 })
        },
        adapter: Some(("SCALE", |config| {
            let every = config["every"].as_u64().unwrap_or(2) as usize;
            Ok(Box::new(Scale::<FLAW> { options: ScaleOptions { every }, num_steps: 0 }))
        })),
    }
}

fn chosen(spec: &ModelSpec) -> impl Iterator<Item = &WeightSpec> {
    spec.linears().filter(|weight| {
        ["up_proj", "c_fc", "intermediate.dense", "fc1", "wi", "wi_0"]
            .iter()
            .any(|end| weight.module().ends_with(end))
    })
}

impl<const FLAW: u8> Method for Scale<FLAW> {
    fn options(&self) -> Table {
        self.options.write()
    }

    fn boxed_clone(&self) -> Box<dyn Method> {
        Box::new(self.clone())
    }

    fn card(&self) -> Card {
        CARD
    }

    fn plan(&self, spec: &ModelSpec) -> Result<MethodPlan> {
        let rows = |weight: &WeightSpec| {
            let [rows, _] = weight.matrix();
            if FLAW == flaw::PLAN { rows + 1 } else { rows }
        };
        let planned = |weight: &WeightSpec| PlannedParameter {
            name: format!("{}.scale", weight.module()),
            shape: vec![rows(weight)],
            place: weight.name.clone(),
            trains: true,
        };
        Ok(MethodPlan { parameters: chosen(spec).map(planned).collect(), notes: Vec::new() })
    }

    fn attach(
        &self,
        weights: &Weights,
        parameters: &mut Parameters,
        seed: Seed,
    ) -> Result<Changes> {
        let mut changes = Changes::default();
        for weight in chosen(weights.spec()) {
            let [rows, columns] = weight.matrix();
            let start = match FLAW {
                flaw::START => 1.5,
                flaw::THREADS => 1.0 + 1e-7 * rayon::current_num_threads() as f32,
                _ => 1.0,
            };
            let id =
                parameters.add(format!("{}.scale", weight.module()), &[rows], vec![start; rows]);
            let hidden =
                if FLAW == flaw::SAVE { seed.stream("hidden", &[]).uniform() as f32 } else { 0.0 };
            changes.change_weight(&weight.name, Row::<FLAW> { id, rows, columns, hidden });
        }
        Ok(changes)
    }

    fn on_step(&mut self, step: &mut StepView<'_>) -> Result<()> {
        self.num_steps += 1;
        let now = if FLAW == flaw::RESUME { self.num_steps } else { step.step };
        let ids: Vec<ParameterId> = step.parameters.iter().map(|(id, _)| id).collect();
        if now.is_multiple_of(self.options.every as u64 + 1) {
            for id in ids {
                step.parameters.update(id, |values| values[0] *= 0.5);
            }
        }
        Ok(())
    }

    fn adapter_config(&self, spec: &ModelSpec) -> Option<serde_json::Value> {
        let mut config = peft_config("SCALE", spec);
        config.insert("every".to_owned(), json!(self.options.every));
        Some(config.into())
    }
}

#[derive(Debug)]
struct Row<const FLAW: u8> {
    id: ParameterId,
    rows: usize,
    columns: usize,
    hidden: f32,
}

impl<const FLAW: u8> Row<FLAW> {
    fn scale(&self, scope: &Scope<'_>) -> Tensor<2> {
        let scale: Tensor<2> = scope.tensor(self.id, [self.rows, 1]);
        let constant = scope.parameters().constant::<2>(self.id, [self.rows, 1]);
        let scale = match FLAW {
            flaw::MOVES => constant,
            flaw::GRADIENT => (scale + constant).mul_scalar(0.5),
            _ => scale,
        };
        scale.add_scalar(self.hidden)
    }
}

impl<const FLAW: u8> WeightChange for Row<FLAW> {
    fn parameters(&self) -> Vec<ParameterId> {
        vec![self.id]
    }

    fn materialize(&self, base: Tensor<2>, scope: &Scope<'_>) -> Tensor<2> {
        if FLAW == flaw::MERGE {
            return base * self.scale(scope).powi_scalar(2);
        }
        base * self.scale(scope)
    }

    fn linear(
        &self,
        x: &Tensor<2>,
        base: &Arc<PackedMatrix>,
        bias: Option<&Tensor<1>>,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        let mut weight = vec![0.0; self.rows * self.columns];
        for (row, values) in weight.chunks_exact_mut(self.columns).enumerate() {
            base.row_into(row, values);
        }
        let device = scope.parameters().device();
        let weight =
            Tensor::from_data(tensor::TensorData::new(weight, [self.rows, self.columns]), device);
        let mut y = linear(x.clone(), weight, None);
        let [tokens, _] = y.dims();
        match FLAW {
            flaw::FAST => y = y.mul_scalar(1.001),
            flaw::QUANTISED if base.form() != Form::F32 => y = y.mul_scalar(1.001),
            flaw::PACKING => {
                let mean = y.clone().mean_dim(0);
                y = y.clone() + (y - mean).mul_scalar(1e-3);
            }
            flaw::ACCUMULATION if scope.trains() => {
                y = y.mul_scalar(1.0 + 1e-3 * tokens as f64);
            }
            _ => {}
        }
        y = y * self.scale(scope).reshape([1, self.rows]);
        Some(match bias {
            Some(bias) => y + bias.clone().reshape([1, self.rows]),
            None => y,
        })
    }
}

/// Returns the names of the checks a plug-in fails, and one message of each.
fn failures(plugin: Plugin) -> Vec<(&'static str, String)> {
    let subjects = subjects().unwrap();
    CHECKS
        .iter()
        .filter_map(|check| {
            let first = check_all(check, &[plugin], &subjects).into_iter().next()?;
            Some((check.name, first.to_string()))
        })
        .collect()
}

#[test]
fn a_right_plug_in_passes() {
    assert_eq!(failures(plugin::<{ flaw::NONE }>()), []);
}

macro_rules! flaws {
    ($($test:ident: $flaw:ident fails $check:literal;)*) => {
        $(#[test]
        fn $test() {
            let found = failures(plugin::<{ flaw::$flaw }>());
            let message = found.iter().find(|(name, _)| *name == $check);
            let (_, message) = message.unwrap_or_else(|| panic!("{} passes: {found:?}", $check));
            assert!(message.starts_with("scale {} on "), "{message}");
        })*

        #[test]
        fn every_check_has_a_flaw() {
            let tried = [$($check),*];
            let listed: Vec<&str> = CHECKS.iter().map(|check| check.name).collect();
            assert_eq!(listed, tried);
        }
    };
}

flaws! {
    a_wrong_count_is_found: PLAN fails "plan";
    a_wrong_start_is_found: START fails "start";
    a_wrong_fast_path_is_found: FAST fails "fast path";
    a_wrong_merge_is_found: MERGE fails "merge";
    blocks_read_wrongly_are_found: QUANTISED fails "quantised base";
    leaking_documents_are_found: PACKING fails "packing";
    a_loss_that_depends_on_the_batch_is_found: ACCUMULATION fails "accumulation";
    bits_that_depend_on_threads_are_found: THREADS fails "threads";
    a_dead_parameter_is_found: MOVES fails "moves";
    a_halved_gradient_is_found: GRADIENT fails "gradient";
    an_unchecked_option_is_found: OPTIONS fails "options";
    state_outside_the_file_is_found: SAVE fails "save and load";
    state_outside_the_checkpoint_is_found: RESUME fails "resume";
}
