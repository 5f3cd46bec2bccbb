//! LoftQ: a quantised base and a low-rank change that begin where their sum is nearest to the weight.

use std::sync::Arc;

use retune_core::change::Scope;
use retune_core::kernels::matrix::{Form, PackedMatrix};
use retune_core::method::{Card, Promises};
use retune_core::parameters::to_vec;
use retune_core::random::{Random, Seed};
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_files::ggml::BlockType;
use retune_options::{choice, options};
use tensor::{Tensor, TensorData};

use crate::checks;
use crate::factor_start::{Factors, principal};
use crate::frame::{
    self, Added, Addition, Built, Context, Delta, Facts, Formula, Held, Slot, Target, Values, View,
    WeightMethod,
};
use crate::nf4;
use crate::registry::{self, Plugin};

choice! {
    /// How the base is quantised.
    pub enum Blocks {
        /// 64 values share a scale, each is one of 16 quantiles of the normal distribution; kept as
        /// plain numbers.
        Nf4 = "nf4",
        /// GGML's 4 bits with a scale, kept as they are.
        Q4_0 = "q4_0",
        /// GGML's 4 bits with a scale and a minimum, kept as they are.
        Q4_1 = "q4_1",
        /// GGML's 8 bits with a scale, kept as they are.
        Q8_0 = "q8_0",
    }
}

options! {
    /// Quantises each targeted weight and adds B·A, begun at the best approximation of both.
    pub struct LoftqOptions("loftq") {
        /// Rank of the change.
        rank: usize = 8, in 1..=65536;
        /// The change is scaled by alpha / rank.
        alpha: f64 = 16.0, in 1e-6..=1e6;
        /// Form of the quantised weights.
        blocks: Blocks = Blocks::Nf4;
        /// Times the weight is quantised and what is left is decomposed, in turn.
        rounds: usize = 5, in 1..=20;
        /// Seed of the decompositions.
        seed: u64 = 0;
        /// Probability of zeroing an entry of the input of the change while training.
        dropout: f64 = 0.0, in 0.0..=0.99;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<LoftqOptions>();

impl WeightMethod for LoftqOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "loftq",
            summary: "Trains a low-rank change over weights it quantises, both begun so that their sum is near the weight.",
            source: "Li et al., LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models, 2023, arXiv 2310.08659",
            usual_learning_rates: (5e-5, 2e-3),
            options: registry::specs::<Self>,
        },
        // PEFT keeps such a change as a LoRA adapter of a base that was changed with it; over the
        // base as it was, that would be another model without a word.
        peft_type: "LOFTQ",
        keys: &[
            ("rank", "r"),
            ("alpha", "lora_alpha"),
            ("blocks", "loftq_blocks"),
            ("rounds", "loftq_iter"),
            ("seed", "loftq_seed"),
            ("dropout", "lora_dropout"),
        ],
        fixed: &[],
        written: &[("exclude_modules", "null"), ("layers_to_transform", "null")],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &["rank = 2", "rank = 3\nrounds = 1\ndropout = 0.1\nlayers = [1]"],
    };

    fn layout(&self, target: &Target, _context: &Context<'_>) -> Result<Vec<Slot>> {
        checks::rank("loftq", self.rank, target)?;
        if let Form::Blocks(kind) = self.form()
            && !target.columns.is_multiple_of(kind.block_len())
        {
            return Err(Error::Setting {
                setting: "method.loftq.blocks".to_owned(),
                what: format!("rows of {} are no whole blocks", target.module),
                expected: format!("a multiple of {} inputs", kind.block_len()),
                found: target.columns.to_string(),
                help: "set `blocks` to \"nf4\", or leave this module out with `exclude`".to_owned(),
            });
        }
        Ok(vec![
            Slot::computed("lora_A.weight", [self.rank, target.columns]),
            Slot::computed("lora_B.weight", [target.rows, self.rank]),
        ])
    }

    fn build(
        &self,
        target: &Target,
        _context: &Context<'_>,
        weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        // The quantised weights are made again when an adapter is read, so the run's seed must not
        // matter.
        let random = Seed(self.seed).stream("loftq", &[target.index as u64]);
        let start = self.start(&weights.dense(&target.name)?, random, &target.module)?;
        let base = start.base.with_arithmetic(weights.packing().arithmetic);
        let (a, b) = start.factors;
        let pair = Added(Pair { scale: self.scale(), dropout: self.dropout });
        let loftq = Loftq { base: Arc::new(base), shape: target.shape(), pair };
        Ok(Built::new(loftq).computed(vec![Values::Floats(a), Values::Floats(b)]))
    }

    fn promises(&self) -> Promises {
        Promises { starts_at_base: false, needs_base: true, ..Promises::default() }
    }
}

/// Where a weight's quantised part and its change begin.
struct Start {
    base: PackedMatrix,
    factors: Factors,
}

impl LoftqOptions {
    fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    fn form(&self) -> Form {
        match self.blocks {
            Blocks::Nf4 => Form::F32,
            Blocks::Q4_0 => Form::Blocks(BlockType::Q4_0),
            Blocks::Q4_1 => Form::Blocks(BlockType::Q4_1),
            Blocks::Q8_0 => Form::Blocks(BlockType::Q8_0),
        }
    }

    fn quantized(&self, mut values: Vec<f32>, [rows, columns]: [usize; 2]) -> Result<PackedMatrix> {
        if self.blocks == Blocks::Nf4 {
            nf4::round(&mut values);
        }
        Ok(PackedMatrix::from_f32(rows, columns, values, self.form())?)
    }

    /// Quantises what the change leaves of the weight, and decomposes what quantising leaves of it,
    /// in turn.
    fn start(&self, weight: &Tensor<2>, mut random: Random, module: &str) -> Result<Start> {
        let [rows, columns] = weight.dims();
        let (rank, scale) = (self.rank, self.scale());
        let mut left = weight.clone();
        let mut rounds = self.rounds;
        loop {
            let base = self.quantized(to_vec(left), [rows, columns])?;
            let values = TensorData::new(base.to_f32(), [rows, columns]);
            let lost = weight.clone() - Tensor::from_data(values, &weight.device());
            let factors = if to_vec(lost.clone()).iter().any(|value| *value != 0.0) {
                principal(lost, rank, scale, &mut random, module)?
            } else {
                // Nothing was lost, so the change begins as LoRA's.
                let mut a = vec![0.0; rank * columns];
                random.fill_uniform(&mut a, (columns as f64).powf(-0.5));
                (a, vec![0.0; rows * rank])
            };
            rounds -= 1;
            if rounds == 0 {
                return Ok(Start { base, factors });
            }
            let make = |values: &[f32], shape: [usize; 2]| -> Tensor<2> {
                Tensor::from_data(TensorData::new(values.to_vec(), shape), &weight.device())
            };
            let (a, b) = (make(&factors.0, [rank, columns]), make(&factors.1, [rows, rank]));
            left = weight.clone() - b.matmul(a).mul_scalar(scale);
        }
    }
}

#[derive(Debug)]
struct Pair {
    scale: f64,
    dropout: f64,
}

impl Addition for Pair {
    fn delta(&self, tensors: &View<'_>) -> Delta {
        Delta::LowRank { a: tensors.get(0), b: tensors.get(1), scale: self.scale }
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }
}

/// The change over its own quantised weight.
#[derive(Debug)]
struct Loftq {
    base: Arc<PackedMatrix>,
    shape: [usize; 2],
    pair: Added<Pair>,
}

impl Formula for Loftq {
    fn weight(&self, base: Tensor<2>, tensors: &View<'_>) -> Tensor<2> {
        let own = TensorData::new(self.base.to_f32(), self.shape);
        self.pair.weight(Tensor::from_data(own, &base.device()), tensors)
    }

    fn linear_alone(
        &self,
        x: &Tensor<2>,
        bias: Option<&Tensor<1>>,
        held: &Held,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        self.pair.linear(x, &self.base, bias, held, scope)
    }

    fn replaces_base(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::Device;

    fn weight() -> Tensor<2> {
        let mut values = vec![0.0; 48 * 64];
        Seed(3).stream("loftq", &[]).fill_normal(&mut values, 0.05);
        Tensor::from_data(TensorData::new(values, [48, 64]), &Device::flex())
    }

    /// Returns how far the base and its change together are from the weight.
    fn gap(options: &LoftqOptions, with_change: bool) -> f32 {
        let weight = weight();
        let start = options.start(&weight, Seed(0).stream("loftq", &[0]), "m").unwrap();
        let make = |values: Vec<f32>, shape: [usize; 2]| -> Tensor<2> {
            Tensor::from_data(TensorData::new(values, shape), &Device::flex())
        };
        let mut found = make(start.base.to_f32(), [48, 64]);
        if with_change {
            let (a, b) = start.factors;
            let rank = options.rank;
            let change = make(b, [48, rank]).matmul(make(a, [rank, 64]));
            found = found + change.mul_scalar(options.scale());
        }
        to_vec((weight - found).powi_scalar(2).sum())[0].sqrt()
    }

    #[test]
    fn rounds_bring_the_sum_nearer_to_the_weight() {
        for blocks in [Blocks::Nf4, Blocks::Q4_0, Blocks::Q4_1] {
            let of = |rounds| LoftqOptions { blocks, rounds, rank: 8, ..Default::default() };
            let quantised = gap(&of(1), false);
            let (once, often) = (gap(&of(1), true), gap(&of(5), true));
            assert!(once < 0.9 * quantised && often < once, "{quantised} {once} {often}");
        }
    }

    #[test]
    fn blocks_that_do_not_fill_a_row_are_refused() {
        use retune_core::spec::{Kind, Role};
        let target = Target {
            name: "m.weight".to_owned(),
            module: "m".to_owned(),
            index: 0,
            rows: 64,
            columns: 48,
            kind: Kind::Linear { transposed: false },
            role: Role::Up,
            has_bias: false,
        };
        let once = std::cell::OnceCell::new();
        let context =
            Context { targets: &[], is_complete: true, original: None, once: &once, shared: &[] };
        let options = LoftqOptions { blocks: Blocks::Q4_0, ..Default::default() };
        let error = options.layout(&target, &context).unwrap_err().to_string();
        assert!(error.contains("multiple of 32") && error.contains("nf4"), "{error}");
    }
}
