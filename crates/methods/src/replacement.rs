//! A weight trained whole: full tuning, biases, `modules_to_save`.

use retune_core::change::{Changes, Scope, WeightChange};
use retune_core::method::PlannedParameter;
use retune_core::parameters::{ParameterId, Parameters};
use retune_core::spec::{Head, Kind, ModelSpec, Role, WeightSpec};
use retune_core::targets::{Among, Targets};
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use tensor::Tensor;

use crate::adapter::PREFIX;

/// A trainable copy that stands in for the base weight.
#[derive(Debug)]
pub struct Replacement {
    value: ParameterId,
    rows: usize,
    columns: usize,
}

impl WeightChange for Replacement {
    fn parameters(&self) -> Vec<ParameterId> {
        vec![self.value]
    }

    fn materialize(&self, _base: Tensor<2>, scope: &Scope<'_>) -> Tensor<2> {
        scope.tensor(self.value, [self.rows, self.columns])
    }

    fn replaces_base(&self) -> bool {
        true
    }
}

/// Plans the whole training of `weight` under the name `name`.
pub fn plan(name: String, weight: &WeightSpec) -> PlannedParameter {
    // A vector is one in the file too; matrices are saved in their logical orientation here and
    // turned where the file is written.
    PlannedParameter { name, shape: weight.shape.clone(), place: weight.name.clone(), trains: true }
}

/// Makes the trainable copy of `weight` and attaches it.
///
/// # Errors
/// If the weight cannot be read.
pub fn attach(
    name: &str,
    weight: &WeightSpec,
    weights: &Weights,
    parameters: &mut Parameters,
    changes: &mut Changes,
) -> Result<ParameterId> {
    let [rows, columns] = weight.matrix();
    let value = parameters.add(name, &weight.shape, weights.values(&weight.name)?);
    changes.change_weight(&weight.name, Replacement { value, rows, columns });
    Ok(value)
}

/// Adds the new head of a classifier to the modules that train whole, unless `leave_out` names it: a
/// frozen random head is useless.
pub fn with_new_head(
    spec: &ModelSpec,
    names: &[String],
    leave_out: impl Fn(&str) -> bool,
) -> Vec<String> {
    let mut modules = names.to_vec();
    if matches!(spec.head, Head::Classes { .. }) {
        for head in spec.weights.iter().filter(|weight| weight.role == Role::Head) {
            let last = head.module().rsplit('.').next().unwrap_or_default().to_owned();
            if !modules.contains(&last) && !leave_out(head.module()) {
                modules.push(last);
            }
        }
    }
    modules
}

/// Returns the weights of modules that train whole beside a method's change, with their names in an
/// adapter's file; a new head trains whole by itself, since a frozen random one is useless.
///
/// # Errors
/// [`Error::NoTarget`] for a name that matches nothing, [`Error::Setting`] for a module the method
/// changes already.
pub fn saved_modules<'a>(
    spec: &'a ModelSpec,
    names: &[String],
    is_targeted: &dyn Fn(&str) -> bool,
    setting: &str,
) -> Result<Vec<(String, &'a WeightSpec)>> {
    whole_modules(spec, with_new_head(spec, names, is_targeted), is_targeted, setting)
}

/// Returns the weights of `modules`, with their names in an adapter's file.
///
/// # Errors
/// As [`saved_modules`].
pub fn whole_modules<'a>(
    spec: &'a ModelSpec,
    modules: Vec<String>,
    is_targeted: &dyn Fn(&str) -> bool,
    setting: &str,
) -> Result<Vec<(String, &'a WeightSpec)>> {
    let mut whole = Vec::new();
    if modules.is_empty() {
        return Ok(whole);
    }
    let saved = Targets { names: modules, ..Targets::default() };
    for module in saved.select(spec, Among::Modules, setting)? {
        if is_targeted(module.module()) {
            return Err(Error::Setting {
                setting: setting.to_owned(),
                what: "a module is targeted and saved whole at once".to_owned(),
                expected: "each module in one of the two".to_owned(),
                found: module.module().to_owned(),
                help: "add it to `exclude`, or take it out of `modules_to_save`".to_owned(),
            });
        }
        let parts = spec.weights.iter().filter(|weight| weight.module() == module.module());
        whole.extend(parts.map(|weight| (format!("{PREFIX}{}", weight.name), weight)));
    }
    Ok(whole)
}

/// Returns whether the checkpoint stores the weight transposed (GPT-2's `Conv1D`).
pub fn is_transposed(weight: &WeightSpec) -> bool {
    is_transposed_kind(weight.kind)
}

/// Returns whether weights of this kind are stored transposed.
pub fn is_transposed_kind(kind: Kind) -> bool {
    kind == (Kind::Linear { transposed: true })
}
