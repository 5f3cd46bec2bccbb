//! OSF: the leading singular directions of each chosen weight stay, the rest trains.

use retune_core::Result;
use retune_core::method::Card;
use retune_core::method::Promises;
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_options::options;
use tensor::{Tensor, TensorData};

use crate::checks;
use crate::frame::{
    self, Built, Context, Facts, Formula, Slot, Target, Values, View, WeightMethod,
};
use crate::registry::{self, Plugin};
use crate::svd::Svd;

options! {
    /// Trains the trailing part of each targeted weight's singular value decomposition.
    pub struct OsfOptions("osf") {
        /// Leading directions that stay; half of them where it is missing.
        effective_rank: Option<usize>, in 1..=65536;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<OsfOptions>();

impl WeightMethod for OsfOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "osf",
            summary: "Trains the trailing singular directions of each targeted weight, whose leading ones stay.",
            source: "Nayak et al., Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning, 2025, arXiv 2504.07097",
            usual_learning_rates: (1e-6, 1e-4),
            options: registry::specs::<Self>,
        },
        peft_type: "OSF",
        keys: &[("effective_rank", "effective_rank")],
        fixed: &[("rank_pattern", "null"), ("target_svd_config", "null")],
        written: &[("init_weights", "true")],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &["", "effective_rank = 3"],
    };

    fn layout(&self, target: &Target, _context: &Context<'_>) -> Result<Vec<Slot>> {
        let full = target.rows.min(target.columns);
        let rest = full - self.kept(target)?;
        Ok(vec![
            Slot::computed("osf_svd_params.U_low", [target.rows, rest]),
            Slot::computed("osf_svd_params.S_low", [rest]),
            Slot::computed("osf_svd_params.V_low", [rest, target.columns]),
        ])
    }

    fn build(
        &self,
        target: &Target,
        _context: &Context<'_>,
        weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        let [rows, columns] = target.shape();
        let kept = self.kept(target)?;
        let svd = Svd::new(&weights.values(&target.name)?, rows, columns);
        let values = vec![
            Values::Floats(svd.left(kept, svd.k)),
            Values::Floats(svd.s[kept..].iter().map(|s| *s as f32).collect()),
            Values::Floats(svd.right(kept, svd.k)),
        ];
        let scaled: Vec<f32> = svd
            .u
            .chunks_exact(svd.k)
            .flat_map(|row| row[..kept].iter().zip(&svd.s).map(|(u, s)| (u * s) as f32))
            .collect();
        let device = weights.device();
        let tensor = |values: Vec<f32>, shape: [usize; 2]| {
            Tensor::<2>::from_data(TensorData::new(values, shape), device)
        };
        let left = tensor(scaled, [rows, kept]);
        let right = tensor(svd.right(0, kept), [kept, columns]);
        Ok(Built::new(Osf { left, right }).computed(values))
    }

    fn promises(&self) -> Promises {
        // Directions that stay take no part in a step, so those that train are kept apart from them.
        // The weight is put together again from the checkpoint's own directions.
        Promises { exact_gradients: false, needs_base: true, ..Promises::default() }
    }
}

impl OsfOptions {
    fn kept(&self, target: &Target) -> Result<usize> {
        let full = target.rows.min(target.columns);
        let kept = self.effective_rank.unwrap_or((full / 2).max(1));
        if kept >= full {
            return Err(checks::above("osf.effective_rank", target, full - 1, kept));
        }
        Ok(kept)
    }
}

/// The leading part of the decomposition, which stays.
#[derive(Debug)]
struct Osf {
    /// The left vectors times their singular values, `[rows, kept]`.
    left: Tensor<2>,
    /// `[kept, columns]`.
    right: Tensor<2>,
}

impl Osf {
    /// Returns `x` with the part along the rows of `basis`, which are orthonormal, held constant:
    /// a gradient does not move it there.
    fn apart(x: Tensor<2>, basis: Tensor<2>) -> Tensor<2> {
        let along = x.clone().matmul(basis.clone().transpose()).matmul(basis);
        x - along.clone() + along.detach()
    }
}

impl Formula for Osf {
    fn weight(&self, _base: Tensor<2>, tensors: &View<'_>) -> Tensor<2> {
        let lengths = self.left.clone().powi_scalar(2).sum_dim(0).sqrt();
        let unit = self.left.clone() / lengths.clamp_min(1e-30);
        let u = Self::apart(tensors.get::<2>(0).transpose(), unit.transpose()).transpose();
        let v = Self::apart(tensors.get::<2>(2), self.right.clone());
        let s = tensors.get::<1>(1).unsqueeze_dim::<2>(0);
        self.left.clone().matmul(self.right.clone()) + (u * s).matmul(v)
    }
}
