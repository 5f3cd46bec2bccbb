//! A weight trained whole: full tuning, biases, `modules_to_save`.

use retune_core::Result;
use retune_core::change::{Changes, Scope, WeightChange};
use retune_core::method::PlannedParameter;
use retune_core::parameters::{ParameterId, Parameters};
use retune_core::spec::{Kind, WeightSpec};
use retune_core::weights::Weights;
use tensor::Tensor;

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

/// Returns whether the checkpoint stores the weight transposed (GPT-2's `Conv1D`).
pub fn is_transposed(weight: &WeightSpec) -> bool {
    weight.kind == (Kind::Linear { transposed: true })
}
