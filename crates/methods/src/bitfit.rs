//! BitFit: only the biases train.

use retune_core::change::Changes;
use retune_core::method::{Card, Method, MethodPlan, Promises, Refusal};
use retune_core::parameters::Parameters;
use retune_core::random::Seed;
use retune_core::spec::{Kind, ModelSpec, Role, WeightSpec};
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_options::{Options, Table, choice, options};
use serde_json::Value;

use crate::adapter::PREFIX;
use crate::registry::{self, Plugin};
use crate::sparse;

choice! {
    /// Which biases train.
    pub enum Terms {
        /// All of them.
        All = "all",
        /// Those of queries and of the widening projection, the paper's half.
        QueryAndUp = "query-and-up",
    }
}

options! {
    /// Trains biases alone.
    pub struct BitFitOptions("bitfit") {
        /// Which biases train.
        terms: Terms = Terms::All;
    }
}

/// What help, documentation and model cards say.
pub const CARD: Card = Card {
    name: "bitfit",
    summary: "Trains the biases of the model and nothing else.",
    source: "Ben Zaken, Ravfogel and Goldberg, BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models, 2021, arXiv 2106.10199",
    usual_learning_rates: (1e-4, 1e-2),
    options: registry::specs::<BitFitOptions>,
};

/// BitFit.
#[derive(Debug, Clone, Default)]
pub struct BitFit {
    /// Which biases.
    pub options: BitFitOptions,
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = Plugin {
    card: CARD,
    read: |reader| Box::new(BitFit { options: BitFitOptions::read(reader) }),
    adapter: Some(("BITFIT", |config| {
        Ok(Box::new(BitFit { options: sparse::saved_options(config)? }))
    })),
};

impl BitFit {
    fn chosen<'a>(&self, spec: &'a ModelSpec) -> Result<Vec<(String, &'a WeightSpec)>> {
        let is_meant = |weight: &&WeightSpec| {
            weight.kind == Kind::Bias
                && match self.options.terms {
                    Terms::All => true,
                    Terms::QueryAndUp => {
                        matches!(weight.role, Role::Query | Role::QueryKeyValue | Role::Up)
                    }
                }
        };
        let heads = sparse::heads(spec, &[])?;
        let in_head = |weight: &&WeightSpec| heads.iter().any(|(_, head)| head.name == weight.name);
        let biases: Vec<(String, &WeightSpec)> = spec
            .weights
            .iter()
            .filter(is_meant)
            .filter(|weight| !in_head(weight))
            .map(|weight| (format!("{PREFIX}{}", weight.name), weight))
            .collect();
        if biases.is_empty() {
            return Err(Error::Unsupported {
                what: format!("bitfit on {} (it has no such bias)", spec.class),
                help: "train its norms (`ln_tuning`), or use a method that adds parameters, such \
                       as `ssf` or `lora`"
                    .to_owned(),
            });
        }
        Ok([biases, heads].concat())
    }
}

impl Method for BitFit {
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
        let refusal = Refusal {
            models: "without biases",
            applies: |spec| spec.weights.iter().all(|weight| weight.kind != Kind::Bias),
        };
        Promises { refuses: Some(refusal), ..Promises::default() }
    }

    fn examples(&self) -> &'static [&'static str] {
        &["", "terms = \"query-and-up\""]
    }

    fn plan(&self, spec: &ModelSpec) -> Result<MethodPlan> {
        let parameters = sparse::plan_heads(&self.chosen(spec)?);
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
        sparse::attach_heads(&self.chosen(&spec)?, weights, parameters, &mut changes)?;
        Ok(changes)
    }

    fn adapter_config(&self, spec: &ModelSpec) -> Option<Value> {
        Some(sparse::config("BITFIT", &self.options.write(), spec).into())
    }
}
