//! FRoD: weights of one kind in a basis they share, with their scales and a few rotations trained.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use retune_core::change::Scope;
use retune_core::kernels::matrix::PackedMatrix;
use retune_core::kernels::{linear, linear_frozen};
use retune_core::method::{Card, Promises};
use retune_core::parameters::to_vec;
use retune_core::random::Random;
use retune_core::spec::{ModelSpec, Role};
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_eigen::{dot, symmetric};
use retune_files::Dtype;
use retune_options::options;
use serde_json::Value;
use tensor::{Tensor, TensorData};

use crate::frame::{
    self, Built, Context, Facts, Formula, Held, Slot, Target, Values, View, WeightMethod,
};
use crate::linear_algebra::{invert, product, scatter, transposed};
use crate::registry::{self, Plugin};
use crate::torch::TorchGenerator;

options! {
    /// Replaces each targeted weight by U·(S + diag(l))·Vᵀ, with V shared by weights of one kind.
    pub struct FrodOptions("frod") {
        /// Share of the entries of S, off its diagonal, that train.
        sparse_rate: f64 = 0.01, in 1e-6..=1.0;
        /// Ridge of the shared basis, for weights that are much alike.
        regularization_alpha: f64 = 1e-3, in 1e-9..=1e3;
        /// Seed of the places of S.
        seed: u64 = 0;
        /// Probability of zeroing an entry of the input of the change while training.
        dropout: f64 = 0.0, in 0.0..=0.99;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<FrodOptions>();

impl WeightMethod for FrodOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "frod",
            summary: "Trains the scales and a few rotations of each targeted weight in a basis that weights of one kind share.",
            source: "FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees, AAAI 2026, doi 10.1609/aaai.v40i31.39813",
            usual_learning_rates: (1e-4, 1e-2),
            options: registry::specs::<Self>,
        },
        peft_type: "FROD",
        keys: &[
            ("sparse_rate", "sparse_rate"),
            ("regularization_alpha", "regularization_alpha"),
            ("seed", "projection_prng_key"),
            ("dropout", "frod_dropout"),
        ],
        fixed: &[("bias", "\"none\"")],
        written: &[
            ("save_projection", "true"),
            ("init_weights", "true"),
            ("progressbar", "true"),
            ("runtime_offload_base_weight", "false"),
            ("fan_in_fan_out", "false"),
            ("layers_to_transform", "null"),
            ("layers_pattern", "null"),
        ],
        among: Among::Linears,
        targets: &[],
        examples: &[
            "targets = [\"all-linear\"]",
            "sparse_rate = 0.2\ndropout = 0.1\nseed = 3",
            "targets = [\"all-linear\"]\nlayers = [1]\nsparse_rate = 1.0",
        ],
    };

    fn default_targets(&self, spec: &ModelSpec) -> Vec<String> {
        // The basis costs a decomposition for each kind of weight, so PEFT's choice is narrow.
        let roles = [Role::Query, Role::Value, Role::QueryKeyValue];
        let linears = spec.linears().filter(|weight| roles.contains(&weight.role));
        linears.map(|weight| weight.module().to_owned()).collect()
    }

    fn layout(&self, target: &Target, _context: &Context<'_>) -> Result<Vec<Slot>> {
        Ok(vec![
            Slot::computed("frod_lambda_l", [target.columns]),
            Slot::zeros("frod_lambda_s_values", [self.num_places(target.columns)]),
        ])
    }

    fn build(
        &self,
        target: &Target,
        context: &Context<'_>,
        weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        let kinds = kinds(context.targets);
        let own = kind(target, context.targets);
        let index = kinds.keys().position(|kind| *kind == own).unwrap_or_default();
        let Some(Values::Floats(basis)) = context.shared.get(3 * index) else {
            unreachable!("the basis of `{own}` was made before its targets")
        };
        let base = weights.values(&target.name)?;
        let (left, lengths) = left_factor(&base, basis, target.columns);
        if lengths.iter().any(|length| !length.is_finite()) {
            return Err(dependent(&target.module));
        }
        let frod = Frod {
            shared: 3 * index,
            shape: target.shape(),
            dropout: self.dropout,
            made: (fingerprint(basis), left),
            read: OnceLock::new(),
        };
        Ok(Built::new(frod).computed(vec![Values::Floats(lengths)]))
    }

    fn shared(&self, context: &Context<'_>) -> Result<Vec<Slot>> {
        let mut slots = Vec::new();
        for (kind, targets) in kinds(context.targets) {
            let columns = width(&targets);
            let (count, limit) = (self.num_places(columns), columns as i32);
            let kept = |slot: Slot| slot.buffer().saved_if(context.is_complete);
            slots.push(kept(Slot::computed(format!("frod_V.{kind}"), [columns, columns])));
            let places = format!("frod_s_indices.{kind}");
            slots.push(kept(Slot::integers(places, [2, count], Dtype::I64, vec![limit])));
            let size = format!("frod_s_size.{kind}");
            slots.push(kept(Slot::integers(size, [2], Dtype::I64, vec![limit + 1])));
        }
        Ok(slots)
    }

    fn shared_values(&self, context: &Context<'_>, weights: &Weights) -> Result<Vec<Values>> {
        let mut generator = TorchGenerator::new(self.seed);
        let mut values = Vec::new();
        for targets in kinds(context.targets).into_values() {
            let columns = width(&targets);
            let read = |target: &&Target| -> Result<Vec<f64>> {
                let values = weights.values(&target.name)?;
                Ok(values.iter().map(|value| f64::from(*value)).collect())
            };
            let matrices = targets.iter().map(read).collect::<Result<Vec<_>>>()?;
            let basis = shared_basis(&matrices, columns, self.regularization_alpha);
            values.push(Values::Floats(basis.iter().map(|value| *value as f32).collect()));
            values.push(Values::Integers(self.places(columns, &mut generator)));
            values.push(Values::Integers(vec![columns as i32; 2]));
        }
        Ok(values)
    }

    fn is_complete(config: &Value) -> bool {
        config.get("save_projection").and_then(Value::as_bool).unwrap_or(true)
    }

    fn notes(&self, context: &Context<'_>) -> Vec<String> {
        if context.is_complete {
            return Vec::new();
        }
        vec![
            "the adapter's file does not hold the shared basis; the signs of its columns, which \
             another decomposition chooses otherwise, decide what the adapter does"
                .to_owned(),
        ]
    }

    fn promises(&self) -> Promises {
        // The weight is put together again from directions of the checkpoint's own.
        Promises { needs_base: true, ..Promises::default() }
    }
}

impl FrodOptions {
    /// Returns how many entries of S, `[n, n]`, train.
    fn num_places(&self, n: usize) -> usize {
        ((n as f64 * n as f64 * self.sparse_rate) as usize).clamp(1, (n * n - n).max(1))
    }

    /// Draws places off the diagonal, rows before columns, as PEFT does.
    fn places(&self, n: usize, generator: &mut TorchGenerator) -> Vec<i32> {
        let (all, count) = (n * n - n, self.num_places(n));
        if all == 0 {
            return vec![0; 2];
        }
        // The whole order is drawn, so that the next kind's begins where PEFT's does.
        let order = generator.permutation(all, all);
        let places = order[..count].iter().map(|place| *place as usize);
        let (rows, columns): (Vec<i32>, Vec<i32>) = places
            .map(|place| (place / (n - 1), place % (n - 1)))
            .map(|(row, rest)| (row as i32, (rest + usize::from(rest >= row)) as i32))
            .unzip();
        [rows, columns].concat()
    }
}

/// Returns what weights that share a basis have in common, as PEFT names it: the last parts of
/// their path.
fn category(module: &str) -> String {
    let parts: Vec<&str> = module.split('.').rev().take(3).collect();
    match parts.as_slice() {
        ["dense", "output", "attention"] => "attention_output".to_owned(),
        [last, before, ..] if before.parse::<usize>().is_err() => format!("{before}_{last}"),
        [last, ..] => (*last).to_owned(),
        [] => String::new(),
    }
}

/// Returns the name of the basis a target shares: PEFT's, and where a model has weights of that
/// kind in several widths (two towers), the width behind it for all but the first.
fn kind(target: &Target, targets: &[Target]) -> String {
    let own = category(&target.module);
    let first = targets.iter().find(|other| category(&other.module) == own);
    if first.is_some_and(|first| first.columns != target.columns) {
        return format!("{own}_{}", target.columns);
    }
    own
}

/// Groups targets that share a basis, by its name.
fn kinds(targets: &[Target]) -> BTreeMap<String, Vec<&Target>> {
    let mut kinds: BTreeMap<String, Vec<&Target>> = BTreeMap::new();
    for target in targets {
        kinds.entry(kind(target, targets)).or_default().push(target);
    }
    kinds
}

/// Returns the width all of a kind have.
fn width(targets: &[&Target]) -> usize {
    targets.first().map_or(0, |target| target.columns)
}

fn dependent(module: &str) -> Error {
    Error::Setting {
        setting: "method.frod.targets".to_owned(),
        what: format!("the basis of {module} cannot be turned back"),
        expected: "weights whose inputs are independent of each other".to_owned(),
        found: "inputs that are combinations of others".to_owned(),
        help: "leave this kind of weight out with `exclude`".to_owned(),
    }
}

/// Returns a basis V, `[n, n]`, of the rows of all matrices `[rows, n]`.
///
/// With A = QR all matrices below each other and Qᵢ the part of the i-th, V is Rᵀ times the
/// eigenvectors of the mean of (QᵢᵀQᵢ + αI)⁻¹, which is what comes closest to making all of Qᵢᵀ Qᵢ
/// diagonal at once. Matrices with fewer rows than columns, or that depend on each other, get the
/// right singular vectors of A.
fn shared_basis(matrices: &[Vec<f64>], n: usize, alpha: f64) -> Vec<f64> {
    let gram = |matrix: &Vec<f64>| {
        let rows = matrix.len() / n.max(1);
        product(&transposed(matrix, rows, n), matrix, rows, n)
    };
    let grams: Vec<Vec<f64>> = matrices.iter().map(gram).collect();
    let mut all = vec![0.0; n * n];
    for gram in &grams {
        all.iter_mut().zip(gram).for_each(|(sum, value)| *sum += value);
    }
    let rows: usize = matrices.iter().map(|matrix| matrix.len() / n.max(1)).sum();
    let factor = if rows < n { None } else { cholesky(&all, n) };
    let Some(r) = factor else {
        return transposed(&symmetric(all, n, true).vectors, n, n);
    };
    let back = invert(&r, n);
    let turned = transposed(&back, n, n);
    let mut mean = vec![0.0; n * n];
    for gram in &grams {
        let mut part = product(&product(&turned, gram, n, n), &back, n, n);
        (0..n).for_each(|i| part[i * n + i] += alpha);
        let share = 1.0 / grams.len() as f64;
        mean.iter_mut().zip(invert(&part, n)).for_each(|(sum, value)| *sum += value * share);
    }
    let mut vectors = symmetric(mean, n, true).vectors;
    // PEFT's library gives the smallest first.
    let rows: Vec<Vec<f64>> = vectors.chunks_exact(n).rev().map(<[f64]>::to_vec).collect();
    vectors = rows.concat();
    product(&transposed(&r, n, n), &transposed(&vectors, n, n), n, n)
}

/// Returns the upper R with RᵀR = `gram`, `[n, n]`, or nothing where a pivot vanishes.
fn cholesky(gram: &[f64], n: usize) -> Option<Vec<f64>> {
    let mut lower = vec![0.0; n * n];
    let most = (0..n).map(|i| gram[i * n + i]).fold(0.0, f64::max);
    for i in 0..n {
        for j in 0..=i {
            let (left, right) = (&lower[i * n..i * n + j], &lower[j * n..j * n + j]);
            let rest = gram[i * n + j] - dot(left, right);
            if i == j {
                if rest <= 1e-13 * most {
                    return None;
                }
                lower[i * n + i] = rest.sqrt();
            } else {
                lower[i * n + j] = rest / lower[j * n + j];
            }
        }
    }
    Some(transposed(&lower, n, n))
}

/// Returns U, `[rows, n]`, with columns of length one, and the lengths l, `[n]`, such that
/// U·diag(l)·Vᵀ is the base.
fn left_factor(base: &[f32], basis: &[f32], n: usize) -> (Vec<f32>, Vec<f32>) {
    let wide = |values: &[f32]| values.iter().map(|value| f64::from(*value)).collect::<Vec<_>>();
    let (base, back) = (wide(base), invert(&wide(basis), n));
    let mut left: Vec<f64> = Vec::with_capacity(base.len());
    for row in base.chunks_exact(n.max(1)) {
        left.extend(back.chunks_exact(n).map(|of| dot(row, of)));
    }
    let length = |column: usize| {
        left.iter().skip(column).step_by(n).map(|value| value * value).sum::<f64>().sqrt()
    };
    let lengths: Vec<f64> = (0..n).map(length).collect();
    let unit = |(place, value): (usize, &f64)| {
        let length = lengths[place % n];
        if length > 1e-12 { (value / length) as f32 } else { 0.0 }
    };
    let unit = left.iter().enumerate().map(unit).collect();
    (unit, lengths.iter().map(|length| *length as f32).collect())
}

/// Tells bases apart (FNV-1a over their bits).
fn fingerprint(values: &[f32]) -> u64 {
    let start = 0xcbf2_9ce4_8422_2325_u64;
    values.iter().fold(start, |hash, value| {
        (hash ^ u64::from(value.to_bits())).wrapping_mul(0x0100_0000_01b3)
    })
}

#[derive(Debug)]
struct Frod {
    /// Where the kind's basis stands among the shared tensors.
    shared: usize,
    shape: [usize; 2],
    dropout: f64,
    /// U of the basis that was made, and that basis's fingerprint.
    made: (u64, Vec<f32>),
    /// U of the basis in force, which a file may have brought.
    read: OnceLock<Tensor<2>>,
}

impl Frod {
    /// Returns U and V; `base` gives the weight where U has to be made again.
    fn bases(&self, base: impl FnOnce() -> Vec<f32>, tensors: &View<'_>) -> [Tensor<2>; 2] {
        let basis = tensors.shared::<2>(self.shared);
        let make = || {
            let values = to_vec(basis.clone().inner());
            let left = if fingerprint(&values) == self.made.0 {
                self.made.1.clone()
            } else {
                left_factor(&base(), &values, self.shape[1]).0
            };
            let device = tensors.scope().parameters().device();
            Tensor::from_data(TensorData::new(left, self.shape), device)
        };
        [self.read.get_or_init(make).clone(), basis]
    }

    /// Returns l, `[1, n]`, and S, `[n, n]`.
    fn middle(&self, tensors: &View<'_>) -> [Tensor<2>; 2] {
        let n = self.shape[1];
        let places = tensors.shared_integers(self.shared + 1);
        let (rows, columns) = places.split_at(places.len() / 2);
        let flat: Vec<i32> = rows.iter().zip(columns).map(|(r, c)| r * n as i32 + c).collect();
        [tensors.get::<1>(0).unsqueeze_dim(0), scatter(tensors.get(1), &flat, [n, n])]
    }
}

impl Formula for Frod {
    fn weight(&self, base: Tensor<2>, tensors: &View<'_>) -> Tensor<2> {
        let [left, basis] = self.bases(|| to_vec(base.inner()), tensors);
        let [lengths, rotation] = self.middle(tensors);
        let turned = left.clone().matmul(rotation) + left * lengths;
        turned.matmul(basis.transpose())
    }

    fn linear(
        &self,
        x: &Tensor<2>,
        base: &Arc<PackedMatrix>,
        bias: Option<&Tensor<1>>,
        held: &Held,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        let drops = scope.trains() && self.dropout > 0.0;
        let input = scope.dropout(x.clone(), self.dropout);
        let tensors = held.view(scope);
        let [left, basis] = self.bases(|| base.to_f32(), &tensors);
        let [lengths, rotation] = self.middle(&tensors);
        let inner = linear(input.clone(), basis.transpose(), None);
        let inner = inner.clone() * lengths + linear(inner, rotation, None);
        if !drops {
            return Some(linear(inner, left, bias.cloned()));
        }
        // What is dropped is the change's input, so the base keeps its own.
        let change = linear(inner, left, None) - linear_frozen(input, base, None);
        Some(linear_frozen(x.clone(), base, bias.cloned()) + change)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_named_as_peft_names_them() {
        for (module, expected) in [
            ("model.layers.0.self_attn.q_proj", "self_attn_q_proj"),
            ("bert.encoder.layer.1.attention.output.dense", "attention_output"),
            ("bert.encoder.layer.1.output.dense", "output_dense"),
            ("transformer.h.0.attn.c_attn", "attn_c_attn"),
            ("blocks.3.fc", "fc"),
            ("classifier", "classifier"),
        ] {
            assert_eq!(category(module), expected, "{module}");
        }
    }

    #[test]
    fn the_left_factor_by_hand() {
        // V = diag(2, 1) with its columns exchanged: W·V⁻ᵀ has columns W₁ and W₀ / 2.
        let (left, lengths) = left_factor(&[6.0, 0.0, 8.0, 2.0], &[0.0, 2.0, 1.0, 0.0], 2);
        assert_eq!(lengths, [2.0, 5.0]);
        assert_eq!(left, [0.0, 0.6, 1.0, 0.8]);
    }

    #[test]
    fn a_shared_basis_gives_every_weight_back() {
        let matrices = [vec![1.0, 2.0, 0.0, 1.0], vec![3.0, -1.0, 1.0, 1.0]];
        let basis: Vec<f32> = shared_basis(&matrices, 2, 1e-3).iter().map(|v| *v as f32).collect();
        for matrix in &matrices {
            let base: Vec<f32> = matrix.iter().map(|value| *value as f32).collect();
            let (left, lengths) = left_factor(&base, &basis, 2);
            for (place, expected) in base.iter().enumerate() {
                let (row, column) = (place / 2, place % 2);
                let term = |k: usize| left[row * 2 + k] * lengths[k] * basis[column * 2 + k];
                assert!((term(0) + term(1) - expected).abs() < 1e-6, "{left:?} {lengths:?}");
            }
        }
    }

    #[test]
    fn places_lie_off_the_diagonal_and_differ() {
        let options = FrodOptions { sparse_rate: 1.0, ..FrodOptions::default() };
        let places = options.places(4, &mut TorchGenerator::new(0));
        let (rows, columns) = places.split_at(12);
        let pairs: std::collections::BTreeSet<_> = rows.iter().zip(columns).collect();
        assert!(pairs.len() == 12 && pairs.iter().all(|(r, c)| r != c), "{places:?}");
    }

    #[test]
    fn the_weight_by_hand() {
        use crate::frame::by_hand::{Given, weight};
        let basis = [1.0, 0.0, 0.0, 1.0];
        // With V = I, U holds W's normalised columns: (3, 4) / 5 and (0, 1); S moves 2 from the
        // second coordinate into the first: U·[[5, 2], [0, 2]].
        let frod = Frod {
            shared: 0,
            shape: [2, 2],
            dropout: 0.0,
            made: (0, Vec::new()),
            read: OnceLock::new(),
        };
        let given = [
            Given::Floats(&[2], &[5.0, 2.0]),
            Given::Floats(&[1], &[2.0]),
            Given::Shared(&[2, 2], &basis),
            Given::SharedIntegers(&[0, 1]),
        ];
        let found = weight(&frod, &[3.0, 0.0, 4.0, 2.0], &given);
        for (f, e) in found.iter().zip([3.0, 1.2, 4.0, 3.6]) {
            assert!((f - e).abs() < 1e-6, "{found:?}");
        }
    }
}
