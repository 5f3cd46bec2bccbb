//! Adaptive subspace allocation: clusters that matter least stop training, where they are.
//!
//! As PEFT does it, but for three things: importance is that of the values before the step moves them,
//! exactly as many clusters are left as were asked for (PEFT's comparison loses one), and the last
//! choice is made at the last step of the ramp whatever the interval.

use retune_core::method::StepView;
use retune_core::parameters::{ParameterId, Parameters};
use retune_core::{Error, Result};

use super::{A, AdamssOptions, B, modules};
use crate::frame::Slot;
use crate::state::planned;

/// What is kept beside a target's tensors: which clusters train, the smoothed importance of every value
/// and its uncertainty, and the values at which those stay that no longer train. It is kept with the
/// parameters, so that a run that is resumed decides alike.
const TRAINS: &str = "adamss_trains";
const IMPORTANCE: &str = ".importance";
const UNCERTAINTY: &str = ".uncertainty";
const STOPPED: &str = ".stopped";

/// One of a target's two tensors in a step.
struct Part {
    id: ParameterId,
    importance: ParameterId,
    uncertainty: ParameterId,
    stopped: ParameterId,
    /// The cluster of each value; nothing for a value that does nothing.
    clusters: Vec<Option<usize>>,
}

/// A target in a step.
struct Module {
    trains: ParameterId,
    parts: [Part; 2],
}

impl AdamssOptions {
    /// Returns what is kept beside the two tensors of a target.
    ///
    /// # Errors
    /// If the ramp ends before it begins.
    pub(super) fn allocation_slots(
        &self,
        clusters: usize,
        shapes: [[usize; 2]; 2],
    ) -> Result<Vec<Slot>> {
        if self.init_warmup >= self.final_warmup {
            return Err(Error::Setting {
                setting: "method.adamss.final_warmup".to_owned(),
                what: "clusters would stop training before the first may".to_owned(),
                expected: format!("above the {} steps of `init_warmup`", self.init_warmup),
                found: self.final_warmup.to_string(),
                help: "raise it, or lower `init_warmup`".to_owned(),
            });
        }
        let mut slots = vec![Slot::constant(TRAINS, [clusters], 1.0)];
        for (name, shape) in [A, B].into_iter().zip(shapes) {
            let of = |kind| Slot::zeros(format!("{name}{kind}"), shape);
            slots.extend([IMPORTANCE, UNCERTAINTY, STOPPED].map(of));
        }
        Ok(slots.into_iter().map(|slot| slot.buffer().saved_if(false)).collect())
    }

    /// Returns the targets, in their order.
    fn targets(&self, parameters: &Parameters) -> Vec<Module> {
        let of = |(module, clusters): (String, &[i32])| {
            let id = |name: &str| planned(parameters, &format!("{module}{name}"));
            let part = |name: &str, clusters: Vec<Option<usize>>| Part {
                id: id(name),
                importance: id(&format!("{name}{IMPORTANCE}")),
                uncertainty: id(&format!("{name}{UNCERTAINTY}")),
                stopped: id(&format!("{name}{STOPPED}")),
                clusters,
            };
            let rank = parameters.get(id(A)).shape[1];
            let count = parameters.get(id(TRAINS)).count();
            let mut rows = vec![0; count];
            for cluster in clusters {
                rows[*cluster as usize] += 1;
            }
            // A cluster has no more directions than rows.
            let does = |cluster: usize, place: usize| {
                (place < self.subspace_rank.min(rows[cluster]).min(rank)).then_some(cluster)
            };
            let places = 0..self.subspace_rank;
            let of_a = (0..count).flat_map(|cluster| {
                places.clone().flat_map(move |p| std::iter::repeat_n(does(cluster, p), rank))
            });
            let of_a = of_a.collect();
            let of_b =
                clusters.iter().flat_map(|c| places.clone().map(move |p| does(*c as usize, p)));
            Module { trains: id(TRAINS), parts: [part(A, of_a), part(B, of_b.collect())] }
        };
        modules(parameters).into_iter().map(of).collect()
    }

    fn within(&self, step: u64) -> bool {
        (self.init_warmup..=self.final_warmup).contains(&step)
    }

    /// Lets go of the gradients of clusters that stopped, and takes those of the others into the
    /// smoothed importance.
    pub(super) fn weigh(&self, step: &mut StepView<'_>) {
        let (beta, of_uncertainty) =
            (self.asa_importance_beta as f32, self.asa_uncertainty_beta as f32);
        for Module { trains, parts } in self.targets(step.parameters) {
            let trains = step.parameters.values(trains);
            for part in parts {
                let Some(gradient) = &mut step.gradients[part.id.index()] else { continue };
                for (gradient, cluster) in gradient.iter_mut().zip(&part.clusters) {
                    if cluster.is_some_and(|cluster| trains[cluster] == 0.0) {
                        *gradient = 0.0;
                    }
                }
                if !self.within(step.step) {
                    continue;
                }
                let values = step.parameters.values(part.id);
                let now: Vec<f32> =
                    values.iter().zip(&*gradient).map(|(v, g)| (v * g).abs()).collect();
                let smooth = step.parameters.values(part.importance);
                step.parameters.update(part.uncertainty, |uncertain| {
                    for ((uncertain, smooth), now) in uncertain.iter_mut().zip(&smooth).zip(&now) {
                        let apart = (now - smooth).abs();
                        *uncertain = of_uncertainty * *uncertain + (1.0 - of_uncertainty) * apart;
                    }
                });
                step.parameters.update(part.importance, |smooth| {
                    for (smooth, now) in smooth.iter_mut().zip(&now) {
                        *smooth = beta * *smooth + (1.0 - beta) * now;
                    }
                });
            }
        }
    }

    /// Stops the clusters of least importance over all targets, and holds those that stopped.
    pub(super) fn allocate(&self, step: &mut StepView<'_>) {
        let targets = self.targets(step.parameters);
        let chooses =
            step.step.is_multiple_of(self.mask_interval) || step.step == self.final_warmup;
        if self.within(step.step) && chooses {
            self.stop(step, &targets);
        }
        for Module { trains, parts } in &targets {
            let trains = step.parameters.values(*trains);
            for part in parts {
                let stopped = step.parameters.values(part.stopped);
                step.parameters.update(part.id, |values| {
                    let all = values.iter_mut().zip(&stopped).zip(&part.clusters);
                    for ((value, stopped), cluster) in all {
                        if cluster.is_some_and(|cluster| trains[cluster] == 0.0) {
                            *value = *stopped;
                        }
                    }
                });
            }
        }
    }

    fn stop(&self, step: &mut StepView<'_>, targets: &[Module]) {
        let mut scores = Vec::new();
        let mut total = 0;
        for (target, Module { trains, parts }) in targets.iter().enumerate() {
            let trains = step.parameters.values(*trains);
            total += trains.len();
            let of_parts = parts.each_ref().map(|part| score(part, trains.len(), step.parameters));
            for (cluster, _) in trains.iter().enumerate().filter(|(_, trains)| **trains > 0.0) {
                let score: f64 = of_parts.iter().map(|scores| scores[cluster]).sum();
                scores.push((score, target, cluster));
            }
        }
        // The largest first; the earlier of equals stays.
        scores.sort_by(|(a, ..), (b, ..)| b.total_cmp(a));
        for (_, target, cluster) in scores.into_iter().skip(self.left(step.step, total)) {
            let Module { trains, parts } = &targets[target];
            step.parameters.update(*trains, |trains| trains[cluster] = 0.0);
            for part in parts {
                let values = step.parameters.values(part.id);
                step.parameters.update(part.stopped, |stopped| {
                    for (place, _) in
                        part.clusters.iter().enumerate().filter(|(_, of)| **of == Some(cluster))
                    {
                        stopped[place] = values[place];
                    }
                });
            }
        }
        for part in targets.iter().flat_map(|target| &target.parts) {
            for id in [part.importance, part.uncertainty] {
                step.parameters.update(id, |values| values.fill(0.0));
            }
        }
    }

    /// Returns how many clusters train after a step of the ramp.
    fn left(&self, step: u64, total: usize) -> usize {
        let end = self.asa_target_subspaces;
        let ramp = (self.final_warmup - self.init_warmup) as f64;
        let share = 1.0 - step.saturating_sub(self.init_warmup) as f64 / ramp;
        let more = total.saturating_sub(end) as f64;
        (end as f64 + more * share.powf(self.asa_schedule_exponent)) as usize
    }
}

/// Returns the mean of importance times uncertainty of each cluster's values.
fn score(part: &Part, num_clusters: usize, parameters: &Parameters) -> Vec<f64> {
    let mut sums = vec![(0.0, 0_u32); num_clusters];
    let [importance, uncertainty] =
        [part.importance, part.uncertainty].map(|id| parameters.values(id));
    for ((importance, uncertainty), cluster) in
        importance.iter().zip(&uncertainty).zip(&part.clusters)
    {
        let Some(cluster) = *cluster else { continue };
        sums[cluster].0 += f64::from(*importance) * f64::from(*uncertainty);
        sums[cluster].1 += 1;
    }
    sums.into_iter().map(|(sum, count)| sum / f64::from(count.max(1))).collect()
}

#[cfg(test)]
mod tests {
    use retune_core::parameters::Integers;
    use retune_core::step::StepParts;
    use retune_files::Dtype;
    use tensor::Device;

    use super::super::CLUSTERS;
    use super::*;

    fn options() -> AdamssOptions {
        AdamssOptions {
            rank: 1,
            num_subspaces: 2,
            use_asa: true,
            asa_target_subspaces: 2,
            init_warmup: 1,
            final_warmup: 3,
            mask_interval: 1,
            asa_importance_beta: 0.5,
            asa_uncertainty_beta: 0.5,
            ..AdamssOptions::default()
        }
    }

    /// Two targets of two clusters each, a row and a direction in every cluster.
    fn two_targets() -> Parameters {
        let mut parameters = Parameters::new(&Device::flex());
        for module in ["p.", "q."] {
            parameters.add(format!("{module}{A}"), &[2, 1], vec![1.0, 2.0]);
            parameters.add(format!("{module}{B}"), &[2, 1], vec![3.0, 4.0]);
            let values = vec![1, 0];
            let integers = Integers { values, dtype: Dtype::I32, limits: vec![2] };
            parameters.add_integers(format!("{module}{CLUSTERS}"), &[2], integers);
            parameters.add_buffer(format!("{module}{TRAINS}"), &[2], vec![1.0; 2]);
            for (name, kind) in [A, B]
                .into_iter()
                .flat_map(|name| [IMPORTANCE, UNCERTAINTY, STOPPED].map(|kind| (name, kind)))
            {
                parameters.add_buffer(format!("{module}{name}{kind}"), &[2, 1], vec![0.0; 2]);
            }
        }
        parameters
    }

    #[test]
    fn clusters_that_matter_least_stop_where_they_are() {
        let options = options();
        let mut parameters = two_targets();
        let id = |parameters: &Parameters, name: &str| parameters.find(name).unwrap();
        let mut parts = StepParts::new(&parameters);
        // Row 0 is of cluster 1: |value · gradient| is 1·1 and 2·2 for A, by cluster, and of B 4·1 in
        // cluster 0 and 3·1 in cluster 1. Target q has gradients ten times smaller.
        for (module, factor) in [("p.", 1.0), ("q.", 0.1_f32)] {
            for (name, gradient) in [(A, [1.0, 2.0]), (B, [1.0, 1.0])] {
                let place = id(&parameters, &format!("{module}{name}")).index();
                parts.gradients[place] = Some(gradient.map(|g| factor * g).to_vec());
            }
        }
        options.weigh(&mut parts.view(2, 9, &mut parameters));
        let importance = id(&parameters, &format!("p.{A}{IMPORTANCE}"));
        assert_eq!(parameters.values(importance), [0.5, 2.0]);
        // Halfway, 2 + (4 - 2) · 0.5³ = 2.25 are left: those of p.
        options.allocate(&mut parts.view(2, 9, &mut parameters));
        let trains = |parameters: &Parameters, module: &str| {
            parameters.values(id(parameters, &format!("{module}{TRAINS}")))
        };
        assert_eq!(trains(&parameters, "p."), [1.0, 1.0]);
        assert_eq!(trains(&parameters, "q."), [0.0, 0.0]);
        assert_eq!(parameters.values(importance), [0.0, 0.0]);

        // An optimiser that still moves them, by decay or momentum, is undone.
        for module in ["p.", "q."] {
            let moved = id(&parameters, &format!("{module}{A}"));
            parameters.update(moved, |values| values.fill(9.0));
        }
        options.weigh(&mut parts.view(3, 9, &mut parameters));
        let place = id(&parameters, &format!("q.{A}")).index();
        assert_eq!(parts.gradients[place].as_deref(), Some(&[0.0, 0.0][..]));
        options.allocate(&mut parts.view(3, 9, &mut parameters));
        assert_eq!(parameters.values(id(&parameters, &format!("p.{A}"))), [9.0, 9.0]);
        assert_eq!(parameters.values(id(&parameters, &format!("q.{A}"))), [1.0, 2.0]);
    }

    #[test]
    fn the_ramp_ends_at_what_was_asked_for() {
        let options = AdamssOptions { final_warmup: 5, ..options() };
        // 2 + 8 · (1 - (s - 1) / 4)³.
        assert_eq!([1, 2, 3, 4, 5].map(|step| options.left(step, 10)), [10, 5, 3, 2, 2]);
        let wrong = AdamssOptions { init_warmup: 3, final_warmup: 3, ..options };
        let error = wrong.allocation_slots(2, [[2, 1], [2, 1]]).unwrap_err().to_string();
        assert!(error.contains("final_warmup"), "{error}");
    }
}
