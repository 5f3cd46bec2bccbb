//! Compacter: adapters whose matrices are sums of Kronecker products with factors all layers share.

use retune_core::change::{Changes, Scope, SiteView, StateChange};
use retune_core::kernels::{activate, linear};
use retune_core::method::Card;
use retune_core::parameters::ParameterId;
use retune_core::site::{Site, Sublayer};
use retune_core::spec::ModelSpec;
use retune_core::{Error, Result};
use retune_options::options;
use tensor::Tensor;

use crate::adapter::PREFIX;
use crate::autopeft::Place;
use crate::registry;
use crate::state::block::Nonlinearity;
use crate::state::{Form, Made, Slot, Start, StateMethod, kaiming, layers};

options! {
    /// Trains adapters made of Kronecker products of small and low-rank matrices.
    pub struct Compacter("compacter") {
        /// Width of the bottleneck.
        size: usize = 32, in 1..=65536;
        /// Number of Kronecker products in a sum, which is the side of the small matrices too; it
        /// divides the bottleneck and the model's width.
        terms: usize = 4, in 1..=256, also "phm_dim";
        /// Rank of the large factors.
        rank: usize = 1, in 1..=65536, also "phm_rank";
        /// Which sub-layers have an adapter (feed-forward alone is Compacter++).
        place: Place = Place::Both;
        /// The activation of the bottleneck.
        activation: Nonlinearity = Nonlinearity::Gelu;
        /// Only these layers, counted from 0; empty means all.
        layers: Vec<usize> = Vec::new();
        /// Modules of the model that train whole and are saved beside.
        modules_to_save: Vec<String> = Vec::new();
    }
}

crate::state_plugin!(Compacter);

/// The small matrices, which all adapters share.
const SHARED: &str = "base_model.model.compacter.shared";

/// One of the two matrices of an adapter.
#[derive(Debug, Clone, Copy)]
struct Sides {
    outputs: usize,
    inputs: usize,
}

impl Compacter {
    fn check(&self, spec: &ModelSpec) -> Result<()> {
        let wrong = |key: &str, what: &str, expected: String, found: usize| {
            Err(Error::Setting {
                setting: format!("method.compacter.{key}"),
                what: what.to_owned(),
                expected,
                found: found.to_string(),
                help: "change one of the two".to_owned(),
            })
        };
        if self.size > spec.width {
            let what = "a bottleneck is narrower than what goes through it";
            return wrong("size", what, format!("at most {}", spec.width), self.size);
        }
        for side in [self.size, spec.width] {
            if !side.is_multiple_of(self.terms) {
                let what = "the matrices cannot be cut into Kronecker products";
                return wrong("terms", what, format!("a divisor of {side}"), self.terms);
            }
        }
        let most = self.size.min(spec.width) / self.terms;
        if self.rank > most {
            let what = "the rank is above the full rank of the large factors";
            return wrong("rank", what, format!("at most {most}"), self.rank);
        }
        Ok(())
    }

    fn sites(&self, spec: &ModelSpec) -> Result<Vec<(String, Site)>> {
        self.check(spec)?;
        let places: &[Sublayer] = match self.place {
            Place::FeedForward => &[Sublayer::FeedForward],
            Place::Attention => &[Sublayer::Attention],
            Place::Both => &[Sublayer::Attention, Sublayer::FeedForward],
        };
        let all = layers(spec, &self.layers, "method.compacter.layers")?;
        let site = |layer: usize, place: &Sublayer| {
            let name = format!("{PREFIX}compacter.layers.{layer}.{}", place.name());
            (name, Site::Output(layer, *place))
        };
        Ok(all.into_iter().flat_map(|l| places.iter().map(move |place| site(l, place))).collect())
    }

    fn ends(&self, spec: &ModelSpec) -> [(&'static str, Sides); 2] {
        [
            ("down", Sides { outputs: self.size, inputs: spec.width }),
            ("up", Sides { outputs: spec.width, inputs: self.size }),
        ]
    }
}

impl StateMethod for Compacter {
    const CARD: Card = Card {
        name: "compacter",
        summary: "Trains adapters of Kronecker products whose small factors all layers share.",
        source: "Karimi Mahabadi et al., Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, 2021, arXiv 2106.04647",
        usual_learning_rates: (1e-4, 5e-3),
        options: registry::specs::<Self>,
    };
    const PEFT_TYPE: &'static str = "COMPACTER";

    fn examples() -> &'static [&'static str] {
        &["size = 8", "size = 8\nterms = 2\nrank = 2\nplace = 'feed-forward'\nlayers = [1]"]
    }

    fn slots(&self, spec: &ModelSpec, _form: Form) -> Result<Vec<Slot>> {
        let (n, rank) = (self.terms, self.rank);
        let start = Start::Normal((n as f64).powf(-0.5));
        let mut slots = vec![Slot::new(SHARED, [n, n, n], "adapters", start)];
        for (name, site) in self.sites(spec)? {
            for (end, Sides { outputs, inputs }) in self.ends(spec) {
                let slot = |part: &str, shape: &[usize], start| {
                    Slot::new(format!("{name}.{end}.{part}"), shape, site, start)
                };
                // One factor of the last matrix is zero, so that the first step starts at the base.
                let right = if end == "up" { Start::Constant(0.0) } else { kaiming(inputs) };
                slots.extend([
                    slot("left", &[n, outputs / n, rank], Start::Normal(1.0)),
                    slot("right", &[n, rank, inputs / n], right),
                    slot("bias", &[outputs], Start::Constant(0.0)),
                ]);
            }
        }
        Ok(slots)
    }

    fn build(&self, spec: &ModelSpec, _form: Form, made: &Made<'_>) -> Result<Changes> {
        let mut changes = Changes::default();
        for (name, site) in self.sites(spec)? {
            let ends = self.ends(spec).map(|(end, sides)| Kronecker {
                shared: made.id(SHARED),
                left: made.id(&format!("{name}.{end}.left")),
                right: made.id(&format!("{name}.{end}.right")),
                bias: made.id(&format!("{name}.{end}.bias")),
                terms: self.terms,
                rank: self.rank,
                sides,
            });
            changes.change_state(site, KroneckerAdapter { ends, activation: self.activation });
        }
        Ok(changes)
    }

    fn modules_to_save(&self) -> &[String] {
        &self.modules_to_save
    }
}

/// A linear layer whose weight is `Σ Aᵢ ⊗ (sᵢ tᵢ)`.
#[derive(Debug)]
struct Kronecker {
    shared: ParameterId,
    left: ParameterId,
    right: ParameterId,
    bias: ParameterId,
    terms: usize,
    rank: usize,
    sides: Sides,
}

impl Kronecker {
    /// Returns the weight, `[outputs, inputs]`.
    fn weight(&self, scope: &Scope<'_>) -> Tensor<2> {
        let Self { terms: n, rank, sides: Sides { outputs, inputs }, .. } = *self;
        let (p, q) = (outputs / n, inputs / n);
        let small: Tensor<2> = scope.tensor(self.shared, [n, n * n]);
        let left: Tensor<3> = scope.tensor(self.left, [n, p, rank]);
        let right: Tensor<3> = scope.tensor(self.right, [n, rank, q]);
        let large = left.matmul(right).reshape([n, p * q]);
        // Summed over i, entry [(a, b), (r, c)] is that of row (a, r) and column (b, c).
        let sum = small.transpose().matmul(large).reshape([n, n, p, q]);
        sum.swap_dims(1, 2).reshape([outputs, inputs])
    }

    fn apply(&self, x: Tensor<2>, scope: &Scope<'_>) -> Tensor<2> {
        let bias = scope.tensor(self.bias, [self.sides.outputs]);
        linear(x, self.weight(scope), Some(bias))
    }
}

/// Down and up, added to what they read.
#[derive(Debug)]
struct KroneckerAdapter {
    ends: [Kronecker; 2],
    activation: Nonlinearity,
}

impl StateChange for KroneckerAdapter {
    fn parameters(&self) -> Vec<ParameterId> {
        let own = self.ends.iter().flat_map(|end| [end.left, end.right, end.bias]);
        [self.ends[0].shared].into_iter().chain(own).collect()
    }

    fn apply(&self, y: Tensor<2>, _at: &SiteView<'_>, scope: &mut Scope<'_>) -> Tensor<2> {
        let [down, up] = &self.ends;
        let inner = activate(down.apply(y.clone(), scope), self.activation.kernel());
        y + up.apply(inner, scope)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use retune_core::change::Mode;
    use retune_core::parameters::{Parameters, to_vec};
    use tensor::Device;

    #[test]
    fn the_weight_is_a_sum_of_kronecker_products() {
        let mut parameters = Parameters::new(&Device::flex());
        // A₁ = [[1, 2], [0, 1]], A₂ = [[0, 1], [1, 0]]; s₁ t₁ = [3, 4], s₂ t₂ = [5, 6].
        let small = vec![1.0, 2.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0];
        let layer = Kronecker {
            shared: parameters.add("a", &[2, 2, 2], small),
            left: parameters.add("s", &[2, 1, 1], vec![1.0, 1.0]),
            right: parameters.add("t", &[2, 1, 2], vec![3.0, 4.0, 5.0, 6.0]),
            bias: parameters.add("b", &[2], vec![0.0; 2]),
            terms: 2,
            rank: 1,
            sides: Sides { outputs: 2, inputs: 4 },
        };
        let weight = to_vec(layer.weight(&Scope::new(&parameters, Mode::Evaluate)));
        assert_eq!(weight, [3.0, 4.0, 11.0, 14.0, 5.0, 6.0, 3.0, 4.0]);
    }
}
