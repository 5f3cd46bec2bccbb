//! SHiRA: a few entries of each chosen weight train, at fixed random places.

use retune_core::Result;
use retune_core::method::Card;
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_files::Dtype;
use retune_options::options;

use crate::checks;
use crate::frame::{
    self, Addition, Built, Context, Delta, Facts, Slot, Target, Values, View, WeightMethod,
};
use crate::registry::{self, Plugin};

options! {
    /// Adds trained values at random places of each targeted weight.
    pub struct ShiraOptions("shira") {
        /// As many entries train as a low-rank change of this rank has values.
        rank: usize = 32, in 1..=65536;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<ShiraOptions>();

impl WeightMethod for ShiraOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "shira",
            summary: "Trains as many entries of each targeted weight as a low-rank change has values, at random places.",
            source: "Bhardwaj et al., Sparse High Rank Adapters, 2024, arXiv 2406.13175",
            usual_learning_rates: (1e-4, 5e-3),
            options: registry::specs::<Self>,
        },
        peft_type: "SHIRA",
        keys: &[("rank", "r")],
        fixed: &[],
        written: &[
            ("mask_type", "\"random\""),
            ("random_seed", "null"),
            ("init_weights", "true"),
            ("fan_in_fan_out", "false"),
        ],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &["rank = 2"],
    };

    fn layout(&self, target: &Target, _context: &Context<'_>) -> Result<Vec<Slot>> {
        let count = self.count(target)?;
        checks::index_limit("shira", target)?;
        let limits = vec![target.rows as i32, target.columns as i32];
        Ok(vec![
            Slot::zeros("shira_weight", [count]),
            Slot::integers("shira_indices", [2, count], Dtype::I32, limits),
        ])
    }

    fn build(
        &self,
        target: &Target,
        _context: &Context<'_>,
        _weights: &Weights,
        random: &mut Random,
    ) -> Result<Built> {
        let total = target.rows * target.columns;
        let mut places = random.choose(total, self.count(target)?);
        places.sort_unstable();
        let rows = places.iter().map(|place| (place / target.columns) as i32);
        let columns = places.iter().map(|place| (place % target.columns) as i32);
        let indices = Values::Integers(rows.chain(columns).collect());
        Ok(Built::added(Shira { shape: target.shape() }).computed(vec![indices]))
    }
}

impl ShiraOptions {
    fn count(&self, target: &Target) -> Result<usize> {
        let most = target.rows * target.columns / (target.rows + target.columns);
        if self.rank > most {
            return Err(checks::above("shira.rank", target, most, self.rank));
        }
        Ok(self.rank * (target.rows + target.columns))
    }
}

#[derive(Debug)]
struct Shira {
    shape: [usize; 2],
}

impl Addition for Shira {
    fn delta(&self, tensors: &View<'_>) -> Delta {
        let (rows, columns) = tensors.integers(1).split_at(tensors.integers(1).len() / 2);
        let width = self.shape[1] as i32;
        let places: Vec<i32> = rows.iter().zip(columns).map(|(r, c)| r * width + c).collect();
        Delta::Sparse { values: tensors.get(0), places, shape: self.shape }
    }
}
