//! AdaMSS: low-rank changes inside clusters of a weight's rows.

use std::borrow::Cow;
use std::collections::BTreeMap;

use retune_core::Result;
use retune_core::method::{Card, FileIntegers, FileTensors, StepView};
use retune_core::parameters::Parameters;
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_files::Dtype;
use retune_options::{above, options};
use tensor::{Tensor, TensorData};

use crate::frame::{
    self, Addition, Built, Context, Delta, Facts, Formula, Slot, Target, Values, View, WeightMethod,
};
use crate::k_means::k_means;
use crate::linear_algebra::scatter;
use crate::registry::{self, Plugin};
use crate::svd::Svd;
use crate::torch::TorchGenerator;

options! {
    /// Adds Bᵢ·Aᵢ·Vᵀ to the rows of each cluster of a targeted weight.
    pub struct AdamssOptions("adamss") {
        /// Leading singular directions V of the weight in which the change lies.
        rank: usize = 100, in 1..=65536;
        /// Clusters of the weight's rows, by their singular vectors.
        num_subspaces: usize = 5, in 1..=1024;
        /// Rank of the change in each cluster.
        subspace_rank: usize = 1, in 1..=1024;
        /// Seed of the decomposition.
        seed: u64 = 0;
        /// Whether clusters that matter least stop training, over all targets together (adaptive
        /// subspace allocation).
        use_asa: bool = false;
        /// Clusters of all targets together that train to the end.
        asa_target_subspaces: usize = 50, in 1..=1_000_000;
        /// Steps before the first cluster stops.
        init_warmup: u64 = 50;
        /// The step at which only those that train to the end are left.
        final_warmup: u64 = 1000, in 1..=1_000_000_000;
        /// Steps between two choices.
        mask_interval: u64 = 100, in 1..=1_000_000;
        /// Smoothing of the importance, |value · gradient|.
        asa_importance_beta: f64 = 0.85, in 0.0..=0.9999;
        /// Smoothing of its uncertainty.
        asa_uncertainty_beta: f64 = 0.85, in 0.0..=0.9999;
        /// How much sooner than evenly they stop: the share that is left goes with this power of the
        /// steps that are left.
        asa_schedule_exponent: f64 = 3.0, in above(0.0);
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<AdamssOptions>();

/// What PEFT gives scikit-learn to draw the first centres from, and how long it may look.
const CLUSTER_SEED: u64 = 123_456_789;
const CLUSTER_ROUNDS: usize = 10;

/// Rounds of the decomposition's subspace iteration, PyTorch's own number.
const ROUNDS: usize = 2;

/// Names of a target's tensors; a file holds the first two in pieces, one for each cluster.
const A: &str = "adamss_A";
const B: &str = "adamss_B";
const CLUSTERS: &str = "adamss_clusters";

mod allocation;

impl WeightMethod for AdamssOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "adamss",
            summary: "Trains a small low-rank change for each cluster of a targeted weight's rows, inside its leading singular directions.",
            source: "Zheng et al., AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning, NeurIPS 2025",
            usual_learning_rates: (1e-4, 1e-2),
            options: registry::specs::<Self>,
        },
        peft_type: "ADAMSS",
        keys: &[
            ("rank", "r"),
            ("num_subspaces", "num_subspaces"),
            ("subspace_rank", "subspace_rank"),
            ("seed", "random_seed"),
            ("use_asa", "use_asa"),
            ("asa_target_subspaces", "asa_target_subspaces"),
            ("init_warmup", "init_warmup"),
            ("final_warmup", "final_warmup"),
            ("mask_interval", "mask_interval"),
            ("asa_importance_beta", "asa_importance_beta"),
            ("asa_uncertainty_beta", "asa_uncertainty_beta"),
            ("asa_schedule_exponent", "asa_schedule_exponent"),
        ],
        fixed: &[],
        written: &[
            ("init_weights", "\"orthogonal\""),
            ("use_dynamic_rank", "false"),
            ("layers_to_transform", "null"),
            ("layers_pattern", "null"),
        ],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &[
            "rank = 6\nnum_subspaces = 3",
            "subspace_rank = 4\nlayers = [1]\nseed = 2",
            "rank = 6\nnum_subspaces = 3\nuse_asa = true\nasa_target_subspaces = 5\ninit_warmup = 1\nfinal_warmup = 4\nmask_interval = 2",
        ],
    };

    fn layout(&self, target: &Target, context: &Context<'_>) -> Result<Vec<Slot>> {
        let clusters = self.num_clusters(target);
        let rank = self.directions(target);
        let wide = target.columns + usize::from(target.has_bias);
        let of_rows = Slot::integers(CLUSTERS, [target.rows], Dtype::I32, vec![clusters as i32]);
        let shapes = [[clusters * self.subspace_rank, rank], [target.rows, self.subspace_rank]];
        let mut slots = vec![
            Slot::computed(A, shapes[0]),
            Slot::zeros(B, shapes[1]),
            Slot::computed("adamss_newB", [rank, wide]).buffer(),
            of_rows.saved_if(context.is_complete),
        ];
        if self.use_asa && context.original.is_none() {
            slots.extend(self.allocation_slots(clusters, shapes)?);
        }
        Ok(slots)
    }

    fn on_gradients(&self, step: &mut StepView<'_>) {
        if self.use_asa {
            self.weigh(step);
        }
    }

    fn on_step(&self, step: &mut StepView<'_>) {
        if self.use_asa {
            self.allocate(step);
        }
    }

    fn build(
        &self,
        target: &Target,
        _context: &Context<'_>,
        weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        let mut base = wide(&weights.values(&target.name)?);
        let (rows, mut columns) = (target.rows, target.columns);
        if target.has_bias {
            // A bias is one more input that is always 1.
            let bias = wide(&weights.values(&target.bias())?);
            let beside = |(row, bias): (&[f64], &f64)| [row, &[*bias]].concat();
            base = base.chunks_exact(columns).zip(&bias).flat_map(beside).collect();
            columns += 1;
        }
        let rank = self.directions(target);
        let start = TorchGenerator::new(self.seed).normal(rows.min(columns) * rank, 1.0);
        let svd = Svd::leading(&base, [rows, columns], &wide(&start), rank, ROUNDS);
        let num_clusters = self.num_clusters(target);
        let clusters = k_means(&svd.u, rank, num_clusters, CLUSTER_ROUNDS, CLUSTER_SEED);
        let mut first = Vec::with_capacity(num_clusters * self.subspace_rank * rank);
        for cluster in 0..num_clusters as i32 {
            let members = svd.u.chunks_exact(rank).zip(&clusters);
            let own: Vec<f32> = members
                .filter(|(_, of)| **of == cluster)
                .flat_map(|(row, _)| row.iter().map(|value| *value as f32))
                .collect();
            let count = own.len() / rank;
            let kept = self.subspace_rank.min(count).min(rank);
            first.extend(Svd::new(&own, count, rank).right(0, kept));
            // A cluster smaller than the rank has directions that never do anything.
            first.resize(first.len() + (self.subspace_rank - kept) * rank, 0.0);
        }
        let computed = vec![
            Values::Floats(first),
            Values::Floats(svd.right(0, rank)),
            Values::Integers(clusters),
        ];
        let change = Adamss { columns: target.columns, subspace_rank: self.subspace_rank };
        let built = Built::added(change).computed(computed);
        Ok(if target.has_bias { built.with_bias(BiasOf(change)) } else { built })
    }

    fn notes(&self, context: &Context<'_>) -> Vec<String> {
        if context.is_complete {
            return Vec::new();
        }
        vec![
            "PEFT's AdaMSS files do not say which rows belong to which cluster: the clusters are \
             made again from the base, and where other ones come out the file is refused"
                .to_owned(),
        ]
    }

    fn fold(&self, parameters: &Parameters, tensors: &mut FileTensors) {
        for (module, clusters) in modules(parameters) {
            let pieces =
                (tensors.remove(&format!("{module}{A}")), tensors.remove(&format!("{module}{B}")));
            let (Some((shape, a)), Some((_, b))) = pieces else { continue };
            let rank = shape[1];
            let rows_of_a = a.chunks_exact(rank * self.subspace_rank).enumerate();
            for (cluster, a) in rows_of_a {
                let members = b.chunks_exact(self.subspace_rank).zip(clusters);
                let own = members.filter(|(_, of)| **of as usize == cluster);
                let own: Vec<&[f32]> = own.map(|(row, _)| row).collect();
                let kept = self.subspace_rank.min(own.len()).min(rank);
                let b: Vec<f32> = own.iter().flat_map(|row| row[..kept].to_vec()).collect();
                let a = (vec![kept, rank], a[..kept * rank].to_vec());
                tensors.insert(format!("{module}{A}.{cluster}"), a);
                tensors.insert(format!("{module}{B}.{cluster}"), (vec![own.len(), kept], b));
            }
        }
    }

    fn unfold(
        &self,
        parameters: &Parameters,
        integers: &FileIntegers,
        tensors: &mut Cow<'_, FileTensors>,
    ) -> Vec<String> {
        let mut wrong = Vec::new();
        for (module, made) in modules(parameters) {
            let said = integers.get(&format!("{module}{CLUSTERS}"));
            let clusters = match said {
                Some((_, _, values)) => values.clone(),
                None => made.iter().map(|cluster| i64::from(*cluster)).collect(),
            };
            if let Err(why) = self.join(&module, &clusters, said.is_some(), tensors.to_mut()) {
                wrong.push(why);
            }
        }
        wrong
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

/// Returns what the names of each target's tensors begin with, and the cluster of each row.
fn modules(parameters: &Parameters) -> Vec<(String, &[i32])> {
    let of = |(id, parameter): (_, &retune_core::parameters::Parameter)| {
        let module = parameter.name.strip_suffix(CLUSTERS)?;
        Some((module.to_owned(), parameters.integers(id)))
    };
    parameters.iter().filter_map(of).collect()
}

impl AdamssOptions {
    fn num_clusters(&self, target: &Target) -> usize {
        self.num_subspaces.min(target.rows)
    }

    fn directions(&self, target: &Target) -> usize {
        self.rank.min(target.rows).min(target.columns + usize::from(target.has_bias))
    }

    /// Puts the pieces of one module together: A one below the other, B at the rows of the clusters.
    fn join(
        &self,
        module: &str,
        clusters: &[i64],
        is_said: bool,
        tensors: &mut FileTensors,
    ) -> Result<(), String> {
        let (mut a, mut b) = (Vec::new(), vec![0.0; clusters.len() * self.subspace_rank]);
        let mut rank = None;
        for cluster in 0..self.num_subspaces.min(clusters.len()) {
            let mut take = |part: &str| {
                let name = format!("{module}{part}.{cluster}");
                let (shape, values) =
                    tensors.remove(&name).ok_or_else(|| format!("`{name}` is missing"))?;
                match <[usize; 2]>::try_from(shape.as_slice()) {
                    Ok(shape) => Ok((name, shape, values)),
                    Err(_) => Err(format!("`{name}` has shape {shape:?}, expected two axes")),
                }
            };
            let (name, [kept, width], values) = take(A)?;
            if kept > self.subspace_rank || *rank.get_or_insert(width) != width {
                return Err(format!(
                    "`{name}` has shape {:?}, expected [up to {}, {}]",
                    [kept, width],
                    self.subspace_rank,
                    rank.unwrap_or(width)
                ));
            }
            a.extend(values);
            a.resize(a.len() + (self.subspace_rank - kept) * width, 0.0);
            let (name, shape, values) = take(B)?;
            let rows: Vec<usize> =
                (0..clusters.len()).filter(|row| clusters[*row] == cluster as i64).collect();
            if shape != [rows.len(), kept] {
                let help = if is_said {
                    ""
                } else {
                    ": its file does not say which rows it means, and the clusters made of this \
                     base are others"
                };
                let expected = [rows.len(), kept];
                return Err(format!("`{name}` has shape {shape:?}, expected {expected:?}{help}"));
            }
            for (row, values) in rows.iter().zip(values.chunks_exact(kept.max(1))) {
                b[row * self.subspace_rank..][..kept].copy_from_slice(values);
            }
        }
        let width = rank.unwrap_or(1).max(1);
        tensors.insert(format!("{module}{A}"), (vec![a.len() / width, width], a));
        tensors.insert(format!("{module}{B}"), (vec![clusters.len(), self.subspace_rank], b));
        Ok(())
    }
}

#[derive(Debug, Clone, Copy)]
struct Adamss {
    /// Inputs of the weight, without the one that stands for the bias.
    columns: usize,
    subspace_rank: usize,
}

impl Adamss {
    /// Returns the change of the weight with its bias beside it, as two factors.
    fn factors(self, tensors: &View<'_>) -> [Tensor<2>; 2] {
        let (a, b) = (tensors.get::<2>(0), tensors.get::<2>(1));
        let ([inner, rank], [rows, _]) = (a.dims(), b.dims());
        let clusters = tensors.integers(3);
        let b = match alive(clusters, self.subspace_rank, rank) {
            None => b,
            Some(mask) => {
                let mask = TensorData::new(mask, [rows, self.subspace_rank]);
                b * Tensor::from_data(mask, tensors.scope().parameters().device())
            }
        };
        // Each row is a mixture of its own cluster's directions only.
        let place = |(row, cluster): (usize, &i32)| {
            let first = row * inner + *cluster as usize * self.subspace_rank;
            (first..first + self.subspace_rank).map(|place| place as i32)
        };
        let places: Vec<i32> = clusters.iter().enumerate().flat_map(place).collect();
        let mixture = scatter(b.reshape([rows * self.subspace_rank]), &places, [rows, inner]);
        [mixture, a.matmul(tensors.get(2))]
    }
}

/// Returns which entries of B, `[rows, subspace rank]`, do something, unless all do: a cluster has no
/// more directions than rows.
fn alive(clusters: &[i32], subspace_rank: usize, rank: usize) -> Option<Vec<f32>> {
    let mut counts = BTreeMap::<i32, usize>::new();
    for cluster in clusters {
        *counts.entry(*cluster).or_default() += 1;
    }
    if rank >= subspace_rank && counts.values().all(|count| *count >= subspace_rank) {
        return None;
    }
    let of = |cluster: &i32| {
        let kept = counts[cluster].min(rank);
        (0..subspace_rank).map(move |place| if place < kept { 1.0 } else { 0.0 })
    };
    Some(clusters.iter().flat_map(of).collect())
}

impl Addition for Adamss {
    fn delta(&self, tensors: &View<'_>) -> Delta {
        let [b, a] = self.factors(tensors);
        Delta::LowRank { a: a.narrow(1, 0, self.columns), b, scale: 1.0 }
    }
}

/// The same change of the bias.
#[derive(Debug)]
struct BiasOf(Adamss);

impl Formula for BiasOf {
    fn weight(&self, base: Tensor<2>, tensors: &View<'_>) -> Tensor<2> {
        let [b, a] = self.0.factors(tensors);
        base + b.matmul(a.narrow(1, self.0.columns, 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Added;
    use crate::frame::by_hand::{Given, weight};

    #[test]
    fn rows_change_by_their_own_clusters_directions() {
        // Row 0 is in cluster 1, row 1 in cluster 0; V is the identity beside a column for the bias.
        let given = [
            Given::Floats(&[2, 2], &[1.0, 2.0, 3.0, 4.0]),
            Given::Floats(&[2, 1], &[10.0, 100.0]),
            Given::Floats(&[2, 3], &[1.0, 0.0, 0.5, 0.0, 1.0, 0.0]),
            Given::Integers(&[1, 0]),
        ];
        let change = Adamss { columns: 2, subspace_rank: 1 };
        let found = weight(&Added(change), &[0.5, 0.0, 0.0, 0.0], &given);
        assert_eq!(found, [30.5, 40.0, 100.0, 200.0]);
        assert_eq!(weight(&BiasOf(change), &[1.0, 2.0], &given), [16.0, 52.0]);
    }

    #[test]
    fn pieces_are_joined_at_the_rows_of_their_clusters() {
        let options = AdamssOptions { num_subspaces: 2, subspace_rank: 2, ..Default::default() };
        let mut tensors = FileTensors::from([
            ("m.adamss_A.0".to_owned(), (vec![2, 2], vec![1.0, 2.0, 3.0, 4.0])),
            ("m.adamss_B.0".to_owned(), (vec![2, 2], vec![5.0, 6.0, 7.0, 8.0])),
            ("m.adamss_A.1".to_owned(), (vec![1, 2], vec![9.0, 10.0])),
            ("m.adamss_B.1".to_owned(), (vec![1, 1], vec![11.0])),
        ]);
        let mut other = tensors.clone();
        options.join("m.", &[0, 1, 0], true, &mut tensors).unwrap();
        assert_eq!(tensors["m.adamss_A"].1, [1.0, 2.0, 3.0, 4.0, 9.0, 10.0, 0.0, 0.0]);
        assert_eq!(tensors["m.adamss_B"].1, [5.0, 6.0, 11.0, 0.0, 7.0, 8.0]);
        assert_eq!(tensors.len(), 2);
        let error = options.join("m.", &[1, 1, 0], false, &mut other).unwrap_err();
        assert!(error.contains("m.adamss_B.0") && error.contains("are others"), "{error}");
    }
}
