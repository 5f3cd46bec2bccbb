//! Trainable tokens: a few rows of the embedding train.

use retune_core::method::{Card, Promises, Refusal};
use retune_core::random::Random;
use retune_core::spec::{Kind, ModelSpec, Role};
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_options::options;
use tensor::{IndexingUpdateOp, Int};
use tensor::{Tensor, TensorData};

use crate::frame::{
    self, Built, Context, Facts, Formula, Slot, Target, Values, View, WeightMethod,
};
use crate::registry::{self, Plugin};

options! {
    /// Replaces chosen rows of an embedding.
    pub struct TrainableTokensOptions("trainable_tokens") {
        /// Rows of the embedding that train, as token ids.
        token_indices: Vec<usize> = Vec::new();
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<TrainableTokensOptions>();

impl WeightMethod for TrainableTokensOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "trainable_tokens",
            summary: "Trains the embeddings of chosen tokens.",
            source: "PEFT library, trainable tokens, 2025",
            usual_learning_rates: (1e-4, 1e-2),
            options: registry::specs::<Self>,
        },
        peft_type: "TRAINABLE_TOKENS",
        keys: &[("token_indices", "token_indices")],
        fixed: &[],
        written: &[("init_weights", "true")],
        among: Among::LinearsAndEmbeddings,
        targets: &[],
        examples: &["token_indices = [1, 4, 5, 6, 7, 8, 9, 10, 11, 12]"],
    };

    fn layout(&self, target: &Target, _context: &Context<'_>) -> Result<Vec<Slot>> {
        let mut seen = self.token_indices.clone();
        seen.sort_unstable();
        seen.dedup();
        let wrong = |what: &str, found: String| Error::Setting {
            setting: "method.trainable_tokens.token_indices".to_owned(),
            what: what.to_owned(),
            expected: format!("token ids below {}, each once", target.rows),
            found,
            help: "list the ids of the tokens whose embeddings train".to_owned(),
        };
        if target.kind != Kind::Embedding {
            return Err(wrong("the target is no embedding", target.module.clone()));
        }
        if seen.is_empty() {
            return Err(wrong("nothing would train", "an empty list".to_owned()));
        }
        if let Some(beyond) = seen.iter().find(|id| **id >= target.rows) {
            return Err(wrong("the embedding has no such row", beyond.to_string()));
        }
        if seen.len() < self.token_indices.len() {
            return Err(wrong("a token is listed twice", format!("{:?}", self.token_indices)));
        }
        let shape = [self.token_indices.len(), target.columns];
        Ok(vec![Slot::computed("trainable_tokens_delta", shape)])
    }

    fn build(
        &self,
        target: &Target,
        _context: &Context<'_>,
        weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        let table = weights.values(&target.name)?;
        let width = target.columns;
        let row = |id: &usize| table[id * width..(id + 1) * width].iter().copied();
        let rows = self.token_indices.iter().flat_map(row).collect();
        let tokens = TrainableTokens { ids: self.token_indices.clone() };
        Ok(Built::new(tokens).computed(vec![Values::Floats(rows)]))
    }

    fn promises(&self) -> Promises {
        let refusal = Refusal {
            models: "that read no words",
            applies: |spec| spec.weights.iter().all(|weight| weight.role != Role::Embedding),
        };
        Promises { refuses: Some(refusal), ..Promises::default() }
    }

    fn default_targets(&self, spec: &ModelSpec) -> Vec<String> {
        let tables = spec.weights.iter().filter(|weight| weight.role == Role::Embedding);
        tables.map(|weight| weight.module().to_owned()).collect()
    }
}

#[derive(Debug)]
struct TrainableTokens {
    ids: Vec<usize>,
}

impl Formula for TrainableTokens {
    fn weight(&self, base: Tensor<2>, tensors: &View<'_>) -> Tensor<2> {
        let device = base.device().inner();
        let [rows, _] = base.dims();
        let mut kept = vec![1.0; rows];
        self.ids.iter().for_each(|id| kept[*id] = 0.0);
        let kept = Tensor::<2>::from_data(TensorData::new(kept, [rows, 1]), &device);
        let ids: Vec<i32> = self.ids.iter().map(|id| *id as i32).collect();
        let index = Tensor::<1, Int>::from_data(TensorData::new(ids, [self.ids.len()]), &device);
        let new = tensors.get::<2>(0);
        (base * kept).select_assign(0, index, new, IndexingUpdateOp::Add)
    }
}
