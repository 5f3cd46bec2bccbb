//! Bottlenecks: down to a few numbers a token, something in between, and up again.
//!
//! What lies between is nothing, convolutions over neighbouring tokens, or attention. In a causal
//! model no token sees what comes after it, and what came before is kept while a text is read piece
//! by piece.

use std::ops::Range;

use retune_core::change::{Scope, SiteView};
use retune_core::kernels::{
    Activation, AttentionOptions, Spans, activate, attention, layer_norm, linear,
};
use retune_core::parameters::ParameterId;
use retune_core::{Error, Result};
use retune_options::choice;
use tensor::{Int, Tensor, TensorData, activation};

use super::{Made, Slot, Start, kaiming};

choice! {
    /// What lies between down and up.
    pub enum Shape {
        /// Nothing but the activation.
        Fc = "fc",
        /// Dilated convolutions with residuals, and a gate over channels (squeeze-and-excitation) unless
        /// it is left out.
        Conv = "conv",
        /// The convolution module of a conformer: gated linear unit, depthwise convolution, norm.
        Conformer = "conformer",
        /// One transformer layer at the width of the bottleneck.
        Transformer = "transformer",
    }
}

choice! {
    /// How the two ends of a bottleneck begin.
    pub enum Ends {
        /// Down by Kaiming's rule, up zero: the first step starts at the base.
        Lora = "lora",
        /// Both normal with deviation 0.02.
        Bert = "bert",
    }
}

choice! {
    /// The activation inside a bottleneck.
    pub enum Nonlinearity {
        /// `max(x, 0)`
        Relu = "relu",
        /// `x Φ(x)`
        Gelu = "gelu",
        /// `x σ(x)`
        Silu = "silu",
        /// `tanh(x)`
        Tanh = "tanh",
        /// `x`
        Identity = "identity",
    }
}

impl Nonlinearity {
    /// Returns the kernel's name of it.
    pub fn kernel(self) -> Activation {
        match self {
            Self::Relu => Activation::Relu,
            Self::Gelu => Activation::Gelu,
            Self::Silu => Activation::Silu,
            Self::Tanh => Activation::Tanh,
            Self::Identity => Activation::Identity,
        }
    }
}

/// The plan of one bottleneck.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Width of what is read.
    pub inputs: usize,
    /// Width of the bottleneck.
    pub size: usize,
    /// Width of what is written.
    pub outputs: usize,
    /// What lies between.
    pub shape: Shape,
    /// The activation.
    pub nonlinearity: Nonlinearity,
    /// How the ends begin.
    pub ends: Ends,
    /// Whether what is read is normalised by a new norm.
    pub norm: bool,
    /// Tokens a convolution sees.
    pub kernel: usize,
    /// Whether channels behind convolutions are gated.
    pub gate: bool,
    /// Attention heads of a transformer bottleneck.
    pub heads: usize,
    /// Probability of dropping a number of the bottleneck while learning.
    pub dropout: f64,
}

/// Dilations of the convolutions, one residual block each.
const DILATIONS: [usize; 2] = [1, 2];

const EPSILON: f64 = 1e-5;

impl Plan {
    /// Plans a token-wise bottleneck that starts at the base.
    pub fn new(inputs: usize, size: usize, outputs: usize) -> Self {
        Self {
            inputs,
            size,
            outputs,
            shape: Shape::Fc,
            nonlinearity: Nonlinearity::Relu,
            ends: Ends::Lora,
            norm: false,
            kernel: 3,
            gate: true,
            heads: 1,
            dropout: 0.0,
        }
    }

    /// Checks that the parts fit each other.
    ///
    /// # Errors
    /// [`Error::Setting`] for the first that does not, under the table `setting`.
    pub fn check(&self, setting: &str, causal: bool) -> Result<()> {
        let wrong = |key: &str, what: &str, expected: String, found: usize| {
            Err(Error::Setting {
                setting: format!("{setting}.{key}"),
                what: what.to_owned(),
                expected,
                found: found.to_string(),
                help: "choose one of the values expected".to_owned(),
            })
        };
        let most = self.inputs.min(self.outputs);
        if self.size == 0 || self.size > most {
            let what = "a bottleneck is narrower than what goes through it";
            return wrong("size", what, format!("1 to {most}"), self.size);
        }
        if self.shape == Shape::Transformer && !self.size.is_multiple_of(self.heads) {
            let expected = format!("a divisor of the size {}", self.size);
            return wrong("heads", "the bottleneck cannot be cut into heads", expected, self.heads);
        }
        let convolves = matches!(self.shape, Shape::Conv | Shape::Conformer);
        if convolves && !causal && self.kernel.is_multiple_of(2) {
            let what = "an even kernel has no middle";
            return wrong("kernel", what, "an odd number".to_owned(), self.kernel);
        }
        Ok(())
    }

    /// Lists the tensors under `name.`.
    pub fn slots(&self, name: &str, place: &str) -> Vec<Slot> {
        let Self { inputs, size, outputs, kernel, .. } = *self;
        let slot = |part: &str, shape: &[usize], start| {
            Slot::new(format!("{name}.{part}"), shape, place, start)
        };
        let constant = Start::Constant;
        let mut slots = Vec::new();
        if self.norm {
            slots.push(slot("norm.weight", &[inputs], constant(1.0)));
            slots.push(slot("norm.bias", &[inputs], constant(0.0)));
        }
        let (down, up) = match self.ends {
            Ends::Lora => (kaiming(inputs), constant(0.0)),
            Ends::Bert => (Start::Normal(0.02), Start::Normal(0.02)),
        };
        let wide = if self.shape == Shape::Conformer { 2 * size } else { size };
        slots.push(slot("down.weight", &[wide, inputs], down));
        slots.push(slot("down.bias", &[wide], constant(0.0)));
        let mut norm = |part: &str| {
            slots.push(slot(&format!("{part}.weight"), &[size], constant(1.0)));
            slots.push(slot(&format!("{part}.bias"), &[size], constant(0.0)));
        };
        match self.shape {
            Shape::Fc => {}
            Shape::Conv => {
                for index in 0..DILATIONS.len() {
                    let inputs = kernel * size;
                    let part = format!("conv.{index}");
                    slots.push(slot(&format!("{part}.weight"), &[size, inputs], kaiming(inputs)));
                    slots.push(slot(&format!("{part}.bias"), &[size], constant(0.0)));
                }
                if self.gate {
                    let few = size.div_ceil(4);
                    slots.push(slot("gate.down.weight", &[few, size], kaiming(size)));
                    slots.push(slot("gate.down.bias", &[few], constant(0.0)));
                    slots.push(slot("gate.up.weight", &[size, few], kaiming(few)));
                    slots.push(slot("gate.up.bias", &[size], constant(0.0)));
                }
            }
            Shape::Conformer => {
                norm("inner_norm");
                slots.push(slot("depthwise.weight", &[kernel, size], kaiming(kernel)));
                slots.push(slot("depthwise.bias", &[size], constant(0.0)));
            }
            Shape::Transformer => {
                norm("attention_norm");
                norm("feed_forward_norm");
                for part in ["query", "key", "value", "output"] {
                    let name = format!("{part}.weight");
                    slots.push(slot(&name, &[size, size], kaiming(size)));
                }
                slots.push(slot("inner.weight", &[4 * size, size], kaiming(size)));
                slots.push(slot("inner.bias", &[4 * size], constant(0.0)));
                slots.push(slot("outer.weight", &[size, 4 * size], kaiming(4 * size)));
                slots.push(slot("outer.bias", &[size], constant(0.0)));
            }
        }
        slots.push(slot("up.weight", &[outputs, size], up));
        slots.push(slot("up.bias", &[outputs], constant(0.0)));
        slots
    }

    /// Finds the tensors that were made.
    pub fn build(self, name: &str, made: &Made<'_>) -> Bottleneck {
        let tensors = self
            .slots(name, "")
            .into_iter()
            .map(|slot| (slot.name[name.len() + 1..].to_owned(), made.id(&slot.name), slot.shape))
            .collect();
        Bottleneck { plan: self, tensors }
    }
}

/// A bottleneck with its tensors.
#[derive(Debug)]
pub struct Bottleneck {
    plan: Plan,
    tensors: Vec<(String, ParameterId, Vec<usize>)>,
}

impl Bottleneck {
    /// Returns its tensors.
    pub fn parameters(&self) -> Vec<ParameterId> {
        self.tensors.iter().map(|(_, id, _)| *id).collect()
    }

    /// Returns whether a token sees others of its text.
    pub fn reads_documents(&self) -> bool {
        self.plan.shape != Shape::Fc
    }

    fn find(&self, part: &str) -> (ParameterId, &[usize]) {
        let found = self.tensors.iter().find(|(name, ..)| name == part);
        let (_, id, shape) = found.unwrap_or_else(|| unreachable!("`{part}` was not planned"));
        (*id, shape)
    }

    fn matrix(&self, part: &str, scope: &Scope<'_>) -> Tensor<2> {
        let (id, shape) = self.find(part);
        scope.tensor(id, [shape[0], shape[1]])
    }

    fn vector(&self, part: &str, scope: &Scope<'_>) -> Tensor<1> {
        let (id, shape) = self.find(part);
        scope.tensor(id, [shape[0]])
    }

    fn linear(&self, part: &str, x: Tensor<2>, scope: &Scope<'_>) -> Tensor<2> {
        let bias = self.vector(&format!("{part}.bias"), scope);
        linear(x, self.matrix(&format!("{part}.weight"), scope), Some(bias))
    }

    fn normalised(&self, part: &str, x: Tensor<2>, scope: &Scope<'_>) -> Tensor<2> {
        let gain = self.vector(&format!("{part}.weight"), scope);
        let bias = self.vector(&format!("{part}.bias"), scope);
        layer_norm(x, gain, Some(bias), EPSILON)
    }

    /// Computes what goes through, without a residual around it.
    ///
    /// # Shapes
    /// - `x`: `[tokens, inputs]`
    /// - returns: `[tokens, outputs]`
    pub fn apply(&self, x: Tensor<2>, at: &SiteView<'_>, scope: &mut Scope<'_>) -> Tensor<2> {
        let x = if self.plan.norm { self.normalised("norm", x, scope) } else { x };
        let x = self.linear("down", x, scope);
        let x = match self.plan.shape {
            Shape::Fc => activate(x, self.plan.nonlinearity.kernel()),
            Shape::Conv => self.convolve(x, at, scope),
            Shape::Conformer => self.conformer(x, at, scope),
            Shape::Transformer => self.transformer(x, at, scope),
        };
        let x = scope.dropout(x, self.plan.dropout);
        self.linear("up", x, scope)
    }

    fn convolve(&self, mut x: Tensor<2>, at: &SiteView<'_>, scope: &Scope<'_>) -> Tensor<2> {
        for (index, dilation) in DILATIONS.into_iter().enumerate() {
            let part = format!("conv.{index}");
            let (key, _) = self.find(&format!("{part}.weight"));
            let seen = neighbours(key, x.clone(), at, self.plan.kernel, dilation);
            x = x + activate(self.linear(&part, Tensor::cat(seen, 1), scope), Activation::Gelu);
        }
        if !self.plan.gate {
            return x;
        }
        let (key, _) = self.find("gate.down.weight");
        let mean = mean(key, x.clone(), at);
        let gate = activate(self.linear("gate.down", mean, scope), Activation::Gelu);
        x * activation::sigmoid(self.linear("gate.up", gate, scope))
    }

    fn conformer(&self, x: Tensor<2>, at: &SiteView<'_>, scope: &Scope<'_>) -> Tensor<2> {
        let size = self.plan.size;
        let half = |place: usize| x.clone().narrow(1, place * size, size);
        let x = half(0) * activation::sigmoid(half(1));
        let (key, _) = self.find("depthwise.weight");
        let weights = self.matrix("depthwise.weight", scope);
        let taps = neighbours(key, x, at, self.plan.kernel, 1).into_iter().enumerate();
        let bias = self.vector("depthwise.bias", scope).reshape([1, size]);
        let x = taps.fold(bias, |sum, (tap, x)| sum + x * weights.clone().narrow(0, tap, 1));
        // The norm is over channels rather than the batch: a document must not see its neighbours.
        activate(self.normalised("inner_norm", x, scope), Activation::Silu)
    }

    fn transformer(&self, x: Tensor<2>, at: &SiteView<'_>, scope: &Scope<'_>) -> Tensor<2> {
        let Plan { size, heads, .. } = self.plan;
        let h = self.normalised("attention_norm", x.clone(), scope);
        let project = |part: &str, h: Tensor<2>| {
            linear(h, self.matrix(&format!("{part}.weight"), scope), None)
        };
        let earlier = |part: &str| {
            let (key, _) = self.find(&format!("{part}.weight"));
            at.with_earlier(key, project(part, h.clone()))
        };
        let (keys, spans) = earlier("key");
        let (values, _) = earlier("value");
        let options = AttentionOptions {
            causal: at.causal,
            ..AttentionOptions::causal(heads, heads, size / heads)
        };
        let queries = project("query", h.clone());
        let seen = attention(queries, keys, values, at.spans, &spans, &options);
        let x = x + project("output", seen);
        let h = self.normalised("feed_forward_norm", x.clone(), scope);
        let h = activate(self.linear("inner", h, scope), Activation::Gelu);
        x + self.linear("outer", h, scope)
    }
}

/// Averages each document's tokens: all, or in a causal model those up to each token.
fn mean(key: ParameterId, x: Tensor<2>, at: &SiteView<'_>) -> Tensor<2> {
    let (all, spans) = at.with_earlier(key, x);
    let device = all.clone().inner().device();
    let parts = at.spans.iter().zip(spans.iter()).map(|(now, all_of_it)| {
        let earlier = all_of_it.len() - now.len();
        let weight = |t: usize, seen: usize| {
            let count = if at.causal { earlier + t + 1 } else { all_of_it.len() };
            if seen < count { 1.0 / count as f32 } else { 0.0 }
        };
        let weights: Vec<f32> = (0..now.len())
            .flat_map(|t| (0..all_of_it.len()).map(move |seen| weight(t, seen)))
            .collect();
        let shape = [now.len(), all_of_it.len()];
        let weights = Tensor::<2>::from_data(TensorData::new(weights, shape), &device);
        weights.matmul(all.clone().narrow(0, all_of_it.start, all_of_it.len()))
    });
    Tensor::cat(parts.collect(), 0)
}

/// Returns, for each tap of a convolution, the row it sees at every token: zeros beyond a document.
///
/// A causal kernel ends at its token, another one is centred on it.
fn neighbours(
    key: ParameterId,
    x: Tensor<2>,
    at: &SiteView<'_>,
    kernel: usize,
    dilation: usize,
) -> Vec<Tensor<2>> {
    let width = x.dims()[1];
    let (all, spans) = if at.causal { at.with_earlier(key, x) } else { (x, at.spans.clone()) };
    let device = all.clone().inner().device();
    let rows = Tensor::cat(vec![Tensor::zeros([1, width], &device), all], 0);
    let middle = if at.causal { kernel - 1 } else { kernel / 2 };
    let tap = |tap: usize| {
        let index = taps(at.spans, &spans, tap as isize - middle as isize, dilation);
        let count = index.len();
        let index = Tensor::<1, Int>::from_data(TensorData::new(index, [count]), &device);
        rows.clone().select(0, index)
    };
    (0..kernel).map(tap).collect()
}

/// Returns which row each token sees `offset · dilation` tokens away, counted from 1; 0 is none.
fn taps(now: &Spans, all: &Spans, offset: isize, dilation: usize) -> Vec<i32> {
    let shift = offset * dilation as isize;
    let of_document = |(now, all): (Range<usize>, Range<usize>)| {
        let first = (all.end - now.len()) as isize;
        let seen = move |t: usize| {
            let row = first + t as isize + shift;
            let inside = row >= all.start as isize && row < all.end as isize;
            if inside { row as i32 + 1 } else { 0 }
        };
        (0..now.len()).map(seen)
    };
    now.iter().zip(all.iter()).flat_map(of_document).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taps_stop_at_the_borders_of_documents() {
        let spans = Spans::from_lengths([3, 2]);
        // One before: the first of each document sees nothing.
        assert_eq!(taps(&spans, &spans, -1, 1), [0, 1, 2, 0, 4]);
        assert_eq!(taps(&spans, &spans, -1, 2), [0, 0, 1, 0, 0]);
        assert_eq!(taps(&spans, &spans, 1, 1), [2, 3, 0, 5, 0]);
        // The second document's last token alone, with its first kept.
        let now = Spans::from_lengths([0, 1]);
        assert_eq!(taps(&now, &spans, -1, 1), [4]);
    }

    #[test]
    fn a_count_of_parameters_is_its_closed_form() {
        let count = |plan: &Plan| -> usize {
            plan.slots("a", "").iter().map(|s| s.shape.iter().product::<usize>()).sum()
        };
        let (d, b, k) = (48, 8, 3);
        let plan = Plan::new(d, b, d);
        assert_eq!(count(&plan), 2 * d * b + b + d);
        let conv = Plan { shape: Shape::Conv, kernel: k, ..plan.clone() };
        let gate = 2 * b * b / 4 + b / 4 + b;
        let bare = 2 * d * b + b + d + 2 * (k * b * b + b);
        assert_eq!(count(&conv), bare + gate);
        assert_eq!(count(&Plan { gate: false, ..conv.clone() }), bare);
        let transformer = Plan { shape: Shape::Transformer, heads: 2, ..plan.clone() };
        assert_eq!(count(&transformer), 2 * d * b + b + d + 12 * b * b + 4 * b + 5 * b);
        let wide = Plan { size: 49, ..plan };
        assert!(wide.check("method.x", true).unwrap_err().to_string().contains("1 to 48"));
        let even = Plan { kernel: 4, ..conv };
        assert!(even.check("method.x", false).is_err() && even.check("method.x", true).is_ok());
    }
}
