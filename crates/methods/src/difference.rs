//! A change of weights that was computed elsewhere: tuned less base, to be added again; of whole
//! weights, or of single entries (a graft).

use retune_core::change::{Changes, Scope, WeightChange};
use retune_core::method::{Card, Method, MethodPlan, PlannedParameter};
use retune_core::parameters::{ParameterId, Parameters};
use retune_core::random::Seed;
use retune_core::spec::{ModelSpec, WeightSpec};
use retune_core::weights::{Weights, transpose};
use retune_core::{Error, Result};
use retune_options::Table;
use serde_json::{Value, json};
use tensor::Tensor;

use crate::adapter::{Adapter, BaseIdentity};
use crate::replacement::is_transposed;
use crate::sparse::{self, Meaning};

/// The type such a change has as an adapter; no PEFT type has this name.
pub(crate) const PEFT_TYPE: &str = "RETUNE_DIFFERENCE";

/// What help and model cards say.
const CARD: Card = Card {
    name: "difference",
    summary: "Adds a change of whole weights that was computed elsewhere.",
    source: "Ilharco et al., Editing Models with Task Arithmetic, 2023, arXiv 2212.04089",
    usual_learning_rates: (1e-6, 1e-4),
    options: Vec::new,
};

/// A task vector: differences of weights by name, of whole weights or of single entries, and weights
/// that are replaced whole.
#[derive(Debug, Clone, Default)]
pub struct Difference {
    changed: Vec<String>,
    replaced: Vec<String>,
    sparse: Vec<String>,
}

impl Difference {
    /// Makes a change of single entries of the weights `sparse`, beside weights that are replaced.
    pub fn of_entries(sparse: Vec<String>, replaced: Vec<String>) -> Self {
        Self { changed: Vec::new(), replaced, sparse }
    }

    /// Returns the weights that are replaced whole.
    pub fn replaced(&self) -> &[String] {
        &self.replaced
    }

    /// Returns the weights of which single entries change.
    pub fn sparse(&self) -> &[String] {
        &self.sparse
    }

    /// Reads the lists of an adapter configuration of this type.
    ///
    /// # Errors
    /// If a list is missing or holds something else than names.
    pub fn from_adapter(config: &Value) -> Result<Self> {
        let list = |key: &str| -> Result<Vec<String>> {
            // Files of earlier versions have no list of entries.
            if key == "sparse" && config.get(key).is_none() {
                return Ok(Vec::new());
            }
            let names = config.get(key).and_then(Value::as_array);
            names
                .and_then(|names| names.iter().map(|n| n.as_str().map(str::to_owned)).collect())
                .ok_or_else(|| Error::Setting {
                    setting: format!("adapter_config.json: {key}"),
                    what: "cannot be used".to_owned(),
                    expected: "a list of weights".to_owned(),
                    found: config.get(key).map_or_else(|| "nothing".to_owned(), Value::to_string),
                    help: "the file is damaged; compress the change again".to_owned(),
                })
        };
        let (changed, replaced) = (list("changed")?, list("replaced")?);
        Ok(Self { changed, replaced, sparse: list("sparse")? })
    }

    /// Lists the weights of the model that change; those it has not are found when values are
    /// filled in.
    fn weights<'a>(
        spec: &'a ModelSpec,
        names: &'a [String],
    ) -> impl Iterator<Item = &'a WeightSpec> {
        spec.weights.iter().filter(|weight| names.contains(&weight.name))
    }
}

impl Difference {
    /// Makes an adapter of the weights that a method trained whole.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if something trains that is no weight of the model.
    pub(crate) fn replacing(
        method: &str,
        spec: &ModelSpec,
        parameters: &Parameters,
        base: Option<&BaseIdentity>,
    ) -> Result<Adapter> {
        let mut adapter = Adapter::default();
        let mut replaced = Vec::new();
        for (id, parameter) in parameters.iter() {
            let Some(weight) = spec.weight(&parameter.name) else {
                if parameter.trains && parameter.count() > 0 {
                    return Err(Error::Unsupported {
                        what: format!("an adapter of `{}`, which {method} trains", parameter.name),
                        help: "run this method alone; its result is a whole model".to_owned(),
                    });
                }
                continue;
            };
            let mut values = parameters.values(id);
            if is_transposed(weight) {
                let [rows, columns] = weight.matrix();
                values = transpose(&values, rows, columns);
            }
            replaced.push(weight.name.clone());
            adapter.tensors.insert(weight.name.clone(), (stored_shape(weight), values));
        }
        let difference = Self { replaced, ..Self::default() };
        adapter.config = difference.adapter_config(spec).unwrap_or_default();
        if let Some(base) = base {
            base.write(&mut adapter.config);
        }
        Ok(adapter)
    }
}

/// Returns a weight's shape as its file has it.
fn stored_shape(weight: &WeightSpec) -> Vec<usize> {
    let mut shape = weight.shape.clone();
    if is_transposed(weight) {
        shape.reverse();
    }
    shape
}

/// Values of the file's orientation, added to or put in place of a weight.
#[derive(Debug)]
struct Stored {
    value: ParameterId,
    matrix: [usize; 2],
    transposed: bool,
    replaces: bool,
}

impl WeightChange for Stored {
    fn parameters(&self) -> Vec<ParameterId> {
        vec![self.value]
    }

    fn materialize(&self, base: Tensor<2>, scope: &Scope<'_>) -> Tensor<2> {
        let [rows, columns] = self.matrix;
        let value = if self.transposed {
            scope.tensor(self.value, [columns, rows]).transpose()
        } else {
            scope.tensor(self.value, self.matrix)
        };
        if self.replaces { value } else { base + value }
    }

    fn replaces_base(&self) -> bool {
        self.replaces
    }
}

impl Method for Difference {
    fn options(&self) -> Table {
        Table::default()
    }

    fn boxed_clone(&self) -> Box<dyn Method> {
        Box::new(self.clone())
    }

    fn card(&self) -> Card {
        CARD
    }

    fn plan(&self, spec: &ModelSpec) -> Result<MethodPlan> {
        let plan = |weight: &WeightSpec| PlannedParameter {
            name: weight.name.clone(),
            shape: stored_shape(weight),
            place: weight.name.clone(),
            trains: true,
        };
        let entries = |weight: &WeightSpec| PlannedParameter {
            name: sparse::name(weight),
            shape: vec![0],
            ..plan(weight)
        };
        let parameters = Self::weights(spec, &self.changed)
            .chain(Self::weights(spec, &self.replaced))
            .map(plan)
            .chain(Self::weights(spec, &self.sparse).map(entries))
            .collect();
        Ok(MethodPlan { parameters, notes: Vec::new() })
    }

    fn attach(
        &self,
        weights: &Weights,
        parameters: &mut Parameters,
        _seed: Seed,
    ) -> Result<Changes> {
        let spec = weights.spec().clone();
        let mut changes = Changes::default();
        for (names, replaces) in [(&self.changed, false), (&self.replaced, true)] {
            for weight in Self::weights(&spec, names) {
                let shape = stored_shape(weight);
                let value = parameters.add(&weight.name, &shape, vec![0.0; weight.count()]);
                let (matrix, transposed) = (weight.matrix(), is_transposed(weight));
                changes.change_weight(&weight.name, Stored { value, matrix, transposed, replaces });
            }
        }
        for weight in Self::weights(&spec, &self.sparse) {
            let none = (Vec::new(), Vec::new());
            sparse::attach(weight, none.0, none.1, Meaning::Difference, parameters, &mut changes);
        }
        Ok(changes)
    }

    fn adapter_config(&self, _spec: &ModelSpec) -> Option<Value> {
        Some(json!({"peft_type": PEFT_TYPE, "changed": self.changed, "replaced": self.replaced,
            "sparse": self.sparse}))
    }
}
