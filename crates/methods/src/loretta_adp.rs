//! LoRETTA-adp: bottleneck adapters whose two matrices are trains of small tensors.

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
use crate::state::{Form, Made, Slot, Start, StateMethod, layers};
use crate::tensor_train::TensorTrain;

options! {
    /// Trains adapters whose matrices are multiplied out of small tensors.
    pub struct LorettaAdp("loretta-adp") {
        /// Width of the bottleneck.
        size: usize = 64, in 1..=65536;
        /// Rank of the tensor trains.
        tensor_rank: usize = 5, in 1..=1024;
        /// Sides of the small tensors, at most, where the matrices' sides have such divisors.
        most: usize = 16, in 2..=1024;
        /// Which sub-layers have an adapter.
        place: Place = Place::Both;
        /// The activation of the bottleneck.
        activation: Nonlinearity = Nonlinearity::Gelu;
        /// Only these layers, counted from 0; empty means all.
        layers: Vec<usize> = Vec::new();
        /// Modules of the model that train whole and are saved beside; the paper trains norms and
        /// the last layer.
        modules_to_save: Vec<String> = Vec::new();
    }
}

crate::state_plugin!(LorettaAdp);

impl LorettaAdp {
    fn sites(&self, spec: &ModelSpec) -> Result<Vec<(String, Site)>> {
        if self.size > spec.width {
            return Err(Error::Setting {
                setting: "method.loretta-adp.size".to_owned(),
                what: "a bottleneck is narrower than what goes through it".to_owned(),
                expected: format!("at most {}", spec.width),
                found: self.size.to_string(),
                help: "lower `size`".to_owned(),
            });
        }
        let places: &[Sublayer] = match self.place {
            Place::FeedForward => &[Sublayer::FeedForward],
            Place::Attention => &[Sublayer::Attention],
            Place::Both => &[Sublayer::Attention, Sublayer::FeedForward],
        };
        let all = layers(spec, &self.layers, "method.loretta-adp.layers")?;
        let site = |layer: usize, place: &Sublayer| {
            let name = format!("{PREFIX}loretta.layers.{layer}.{}", place.name());
            (name, Site::Output(layer, *place))
        };
        Ok(all.into_iter().flat_map(|l| places.iter().map(move |place| site(l, place))).collect())
    }

    /// Returns how the two matrices, `[outputs, inputs]`, are cut.
    fn ends(&self, spec: &ModelSpec) -> [(&'static str, TensorTrain); 2] {
        [("down", [self.size, spec.width]), ("up", [spec.width, self.size])]
            .map(|(end, shape)| (end, TensorTrain::new(shape, self.tensor_rank, self.most)))
    }
}

impl StateMethod for LorettaAdp {
    const CARD: Card = Card {
        name: "loretta-adp",
        summary: "Trains adapters whose matrices are trains of small tensors.",
        source: "Yang et al., LoRETTA: Low-Rank Economic Tensor-Train Adaptation for Ultra-Low-Parameter Fine-Tuning of Large Language Models, 2024, arXiv 2402.11417",
        usual_learning_rates: (1e-4, 1e-2),
        options: registry::specs::<Self>,
    };
    const PEFT_TYPE: &'static str = "LORETTA_ADP";

    fn examples() -> &'static [&'static str] {
        &[
            "size = 8\ntensor_rank = 3\nmost = 4",
            "size = 6\ntensor_rank = 2\nplace = 'feed-forward'\nlayers = [1]",
        ]
    }

    fn slots(&self, spec: &ModelSpec, _form: Form) -> Result<Vec<Slot>> {
        let mut slots = Vec::new();
        for (name, site) in self.sites(spec)? {
            for (end, train) in self.ends(spec) {
                let [outputs, inputs] = train.shape;
                let slot = |part: String, shape: &[usize], start| {
                    Slot::new(format!("{name}.{end}.{part}"), shape, site, start)
                };
                let start = Start::Normal(train.deviation((3.0 * inputs as f64).powf(-0.5)));
                for (place, shape) in train.cores.iter().enumerate() {
                    // One core of the last matrix is zero: the first step starts at the base.
                    let zero = end == "up" && place + 1 == train.cores.len();
                    let start = if zero { Start::Constant(0.0) } else { start.clone() };
                    slots.push(slot(place.to_string(), shape, start));
                }
                slots.push(slot("bias".to_owned(), &[outputs], Start::Constant(0.0)));
            }
        }
        Ok(slots)
    }

    fn build(&self, spec: &ModelSpec, _form: Form, made: &Made<'_>) -> Result<Changes> {
        let mut changes = Changes::default();
        for (name, site) in self.sites(spec)? {
            let ends = self.ends(spec).map(|(end, train)| {
                let id = |place: usize| made.id(&format!("{name}.{end}.{place}"));
                let cores = (0..train.cores.len()).map(id).collect();
                Matrix { cores, bias: made.id(&format!("{name}.{end}.bias")), train }
            });
            changes.change_state(site, TrainAdapter { ends, activation: self.activation });
        }
        Ok(changes)
    }

    fn modules_to_save(&self) -> &[String] {
        &self.modules_to_save
    }
}

/// A linear layer whose weight is a tensor train.
#[derive(Debug)]
struct Matrix {
    cores: Vec<ParameterId>,
    bias: ParameterId,
    train: TensorTrain,
}

impl Matrix {
    fn apply(&self, x: Tensor<2>, scope: &Scope<'_>) -> Tensor<2> {
        let core = |place: usize| scope.tensor(self.cores[place], self.train.cores[place]);
        let bias = scope.tensor(self.bias, [self.train.shape[0]]);
        linear(x, self.train.matrix(core), Some(bias))
    }
}

/// Down and up, added to what they read.
#[derive(Debug)]
struct TrainAdapter {
    ends: [Matrix; 2],
    activation: Nonlinearity,
}

impl StateChange for TrainAdapter {
    fn parameters(&self) -> Vec<ParameterId> {
        let of = |end: &Matrix| end.cores.iter().copied().chain([end.bias]).collect::<Vec<_>>();
        self.ends.iter().flat_map(of).collect()
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
    fn a_layer_by_hand() {
        let mut parameters = Parameters::new(&Device::flex());
        let train = TensorTrain::new([2, 2], 1, 2);
        let cores = vec![
            parameters.add("0", &[1, 2, 1], vec![2.0, -1.0]),
            parameters.add("1", &[1, 2, 1], vec![3.0, 4.0]),
        ];
        let layer = Matrix { cores, bias: parameters.add("b", &[2], vec![0.5, 0.0]), train };
        let x = Tensor::<2>::from_data([[1.0, 10.0]], &Device::flex());
        // The weight is (2, -1) (3, 4)ᵀ, and (3, 4) · (1, 10) = 43.
        let y = layer.apply(x, &Scope::new(&parameters, Mode::Evaluate));
        assert_eq!(to_vec(y), [86.5, -43.0]);
    }
}
