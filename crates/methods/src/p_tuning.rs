//! P-tuning: a prompt that a small network makes while it trains.

use retune_core::Result;
use retune_core::change::{Changes, InputChange, InputView, Mode, Scope};
use retune_core::kernels::{Activation, activate, linear};
use retune_core::method::{Card, Promises};
use retune_core::parameters::{ParameterId, Parameters, to_vec};
use retune_core::spec::ModelSpec;
use retune_options::{Choice, choice, options};
use serde_json::{Map, Value, json};
use tensor::{Tensor, activation};

use crate::registry;
use crate::state::keys::Keys;
use crate::state::prompt::{self, Prompt, for_each};
use crate::state::{FileTensors, Form, Made, Needs, Slot, Start, StateMethod, kaiming, planned};

choice! {
    /// The network that makes the prompt.
    pub enum Encoder {
        /// Three linear layers with ReLU between.
        Mlp = "mlp",
        /// A two-way LSTM, then two linear layers with ReLU between.
        Lstm = "lstm",
    }
}

options! {
    /// Trains a network that makes the vectors before the words of every text.
    pub struct PTuning("p-tuning") {
        /// Number of virtual tokens.
        tokens: usize = 20, in 1..=4096, also "num_virtual_tokens";
        /// The network that makes them; only its result is saved.
        encoder: Encoder = Encoder::Mlp, also "encoder_reparameterization_type";
        /// Width inside the network; 0 means the model's.
        hidden: usize = 0, in 0..=65536, also "encoder_hidden_size";
        /// Modules that train whole and are saved beside the prompt.
        modules_to_save: Vec<String> = Vec::new();
    }
}

crate::state_plugin!(PTuning);

/// What stands before the names of the network's tensors.
const NETWORK: &str = "prompt_encoder.";

impl PTuning {
    fn inner(&self, spec: &ModelSpec) -> usize {
        if self.hidden == 0 { spec.width } else { self.hidden }
    }

    fn network(
        &self,
        width: usize,
        inner: usize,
        find: impl Fn(&str) -> ParameterId,
    ) -> MadePrompt {
        let id = |part: &str| find(&format!("{NETWORK}{part}"));
        let way = |way: &str| Lstm {
            input: id(&format!("lstm.{way}.input")),
            state: id(&format!("lstm.{way}.state")),
            bias: id(&format!("lstm.{way}.bias")),
        };
        let linears = self.linears(width, inner).into_iter();
        let linears = linears.map(|(part, outputs, inputs)| Linear {
            weight: id(&format!("{part}.weight")),
            bias: id(&format!("{part}.bias")),
            outputs,
            inputs,
        });
        MadePrompt {
            embedding: id("embedding"),
            lstm: (self.encoder == Encoder::Lstm).then(|| [way("forward"), way("backward")]),
            linears: linears.collect(),
            tokens: self.tokens,
            width,
            inner,
        }
    }

    /// Lists the linear layers: name, outputs, inputs.
    fn linears(&self, width: usize, inner: usize) -> Vec<(&'static str, usize, usize)> {
        match self.encoder {
            Encoder::Mlp => vec![
                ("mlp_head.0", inner, width),
                ("mlp_head.2", inner, inner),
                ("mlp_head.4", width, inner),
            ],
            Encoder::Lstm => {
                vec![("mlp_head.0", 2 * inner, 2 * inner), ("mlp_head.2", width, 2 * inner)]
            }
        }
    }
}

impl StateMethod for PTuning {
    const CARD: Card = Card {
        name: "p-tuning",
        summary: "Trains a network that makes the vectors before the words; the result is saved.",
        source: "Liu et al., GPT Understands, Too, 2021, arXiv 2103.10385",
        usual_learning_rates: (1e-4, 1e-2),
        options: registry::specs::<Self>,
    };
    const PEFT_TYPE: &'static str = "P_TUNING";
    const BESIDE: &'static str = prompt::BESIDE;

    fn needs(&self) -> Needs {
        Needs::Words
    }

    fn promises(&self) -> Promises {
        Promises { starts_at_base: false, ..Promises::default() }
    }

    fn examples() -> &'static [&'static str] {
        &["tokens = 3\nhidden = 24", "tokens = 3\nhidden = 24\nencoder = 'lstm'"]
    }

    fn slots(&self, spec: &ModelSpec, form: Form) -> Result<Vec<Slot>> {
        let vectors = prompt::slot(spec, self.tokens, &[], "method.p-tuning.tokens")?;
        if form == Form::Saved {
            return Ok(vec![vectors]);
        }
        let name = |name: &str| format!("{NETWORK}{name}");
        let slot =
            |part: &str, shape: &[usize], start| Slot::new(name(part), shape, "embedding", start);
        let (width, inner) = (spec.width, self.inner(spec));
        let mut slots = vec![slot("embedding", &[self.tokens, width], Start::Normal(1.0))];
        if self.encoder == Encoder::Lstm {
            for way in ["forward", "backward"] {
                let start = kaiming(inner);
                slots.extend([
                    slot(&format!("lstm.{way}.input"), &[4 * inner, width], start.clone()),
                    slot(&format!("lstm.{way}.state"), &[4 * inner, inner], start.clone()),
                    slot(&format!("lstm.{way}.bias"), &[4 * inner], start),
                ]);
            }
        }
        for (part, outputs, inputs) in self.linears(width, inner) {
            slots.push(slot(&format!("{part}.weight"), &[outputs, inputs], kaiming(inputs)));
            slots.push(slot(&format!("{part}.bias"), &[outputs], kaiming(inputs)));
        }
        Ok(slots)
    }

    fn build(&self, spec: &ModelSpec, form: Form, made: &Made<'_>) -> Result<Changes> {
        let mut changes = Changes::default();
        let (tokens, width) = (self.tokens, spec.width);
        if form == Form::Saved {
            changes.change_input(Prompt { vectors: made.id(prompt::NAME), tokens, width });
            return Ok(changes);
        }
        changes.change_input(self.network(width, self.inner(spec), |name| made.id(name)));
        Ok(changes)
    }

    fn modules_to_save(&self) -> &[String] {
        &self.modules_to_save
    }

    fn num_positions(&self) -> usize {
        self.tokens
    }

    fn fold(&self, parameters: &Parameters, tensors: &mut FileTensors) {
        let embedding = parameters.get(planned(parameters, &format!("{NETWORK}embedding")));
        let width = embedding.shape[1];
        let inner = if self.hidden == 0 { width } else { self.hidden };
        let network = self.network(width, inner, |name| planned(parameters, name));
        let mut scope = Scope::new(parameters, Mode::Evaluate);
        let vectors = to_vec(network.make(&mut scope));
        tensors.retain(|name, _| !name.starts_with(NETWORK));
        tensors.insert(prompt::NAME.to_owned(), (vec![self.tokens, width], vectors));
    }

    fn write_config(&self, spec: &ModelSpec, config: &mut Map<String, Value>) {
        prompt::write_config(spec, self.tokens, config);
        let encoder = self.encoder.name().to_uppercase();
        for (key, value) in [
            ("encoder_dropout", json!(0.0)),
            ("encoder_hidden_size", json!(self.inner(spec))),
            ("encoder_num_layers", json!(1)),
            ("encoder_reparameterization_type", json!(encoder)),
        ] {
            config.insert(key.to_owned(), value);
        }
    }

    fn read_config(keys: &Keys<'_>) -> Result<Self> {
        let tokens = prompt::read_tokens(keys)?;
        Ok(Self { tokens, modules_to_save: keys.modules_to_save()?, ..Self::default() })
    }
}

/// One linear layer of the network.
#[derive(Debug)]
struct Linear {
    weight: ParameterId,
    bias: ParameterId,
    outputs: usize,
    inputs: usize,
}

/// One way of the LSTM; gates lie in the order input, forget, cell, output.
#[derive(Debug)]
struct Lstm {
    input: ParameterId,
    state: ParameterId,
    bias: ParameterId,
}

impl Lstm {
    /// Reads the rows in this order and returns the state after each, in the rows' order.
    fn read(
        &self,
        x: &Tensor<2>,
        order: impl Iterator<Item = usize>,
        inner: usize,
        scope: &Scope<'_>,
    ) -> Tensor<2> {
        let [rows, width] = x.dims();
        let input = scope.tensor(self.input, [4 * inner, width]);
        let state = scope.tensor(self.state, [4 * inner, inner]);
        let given = linear(x.clone(), input, Some(scope.tensor(self.bias, [4 * inner])));
        let mut hidden = Tensor::<2>::zeros([1, inner], &x.clone().inner().device());
        let mut cell = hidden.clone();
        let mut out: Vec<Option<Tensor<2>>> = vec![None; rows];
        for row in order {
            let gates =
                given.clone().narrow(0, row, 1) + linear(hidden.clone(), state.clone(), None);
            let gate = |place: usize| gates.clone().narrow(1, place * inner, inner);
            let open = |place: usize| activation::sigmoid(gate(place));
            cell = open(1) * cell + open(0) * gate(2).tanh();
            hidden = open(3) * cell.clone().tanh();
            out[row] = Some(hidden.clone());
        }
        Tensor::cat(out.into_iter().flatten().collect(), 0)
    }
}

/// A prompt as the network makes it.
#[derive(Debug)]
struct MadePrompt {
    embedding: ParameterId,
    lstm: Option<[Lstm; 2]>,
    linears: Vec<Linear>,
    tokens: usize,
    width: usize,
    inner: usize,
}

impl MadePrompt {
    fn make(&self, scope: &mut Scope<'_>) -> Tensor<2> {
        let mut x: Tensor<2> = scope.tensor(self.embedding, [self.tokens, self.width]);
        if let Some([forward, backward]) = &self.lstm {
            let there = forward.read(&x, 0..self.tokens, self.inner, scope);
            let back = backward.read(&x, (0..self.tokens).rev(), self.inner, scope);
            x = Tensor::cat(vec![there, back], 1);
        }
        for (place, layer) in self.linears.iter().enumerate() {
            if place > 0 {
                x = activate(x, Activation::Relu);
            }
            let weight = scope.tensor(layer.weight, [layer.outputs, layer.inputs]);
            x = linear(x, weight, Some(scope.tensor(layer.bias, [layer.outputs])));
        }
        x
    }
}

impl InputChange for MadePrompt {
    fn parameters(&self) -> Vec<ParameterId> {
        let ways = self.lstm.iter().flatten().flat_map(|way| [way.input, way.state, way.bias]);
        let linears = self.linears.iter().flat_map(|layer| [layer.weight, layer.bias]);
        [self.embedding].into_iter().chain(ways).chain(linears).collect()
    }

    fn num_virtual(&self) -> usize {
        self.tokens
    }

    fn virtual_tokens(
        &self,
        documents: usize,
        _view: &InputView<'_>,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        Some(for_each(self.make(scope), documents))
    }
}
