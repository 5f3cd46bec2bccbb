//! AdaLoRA: low-rank changes in the form of singular value decompositions, whose ranks are shared out
//! while they train.

use retune_core::Result;
use retune_core::method::{Card, FileTensors, StepView};
use retune_core::parameters::{Parameter, ParameterId, Parameters};
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_options::options;
use serde_json::{Map, Value, json};

use crate::adapter::PREFIX;
use crate::checks;
use crate::frame::{
    self, Addition, Built, Context, Delta, Facts, Slot, Target, View, WeightMethod,
};
use crate::linear_algebra::{product, transposed};
use crate::peft_config;
use crate::registry::{self, Plugin};
use crate::state::planned;

options! {
    /// Adds B·diag(E)·A to each targeted weight, and prunes ranks where they matter least.
    pub struct AdaloraOptions("adalora") {
        /// Rank each change begins with.
        rank: usize = 12, in 1..=65536;
        /// Rank that is left on average; at or above `rank` nothing is pruned.
        target_rank: usize = 8, in 1..=65536, also "target_r";
        /// Steps before the first rank is pruned.
        tinit: u64 = 0;
        /// Steps at the end with the ranks that are left.
        tfinal: u64 = 0;
        /// Steps between two prunings.
        delta_t: u64 = 1, in 1..=1000000, also "deltaT";
        /// Smoothing of the sensitivity, |value · gradient|.
        beta1: f64 = 0.85, in 0.0..=0.9999;
        /// Smoothing of its uncertainty.
        beta2: f64 = 0.85, in 0.0..=0.9999;
        /// Weight of the distance of AAᵀ and BᵀB from the identity in the loss.
        orth_reg_weight: f64 = 0.5, in 0.0..=1e3;
        /// The change is scaled by alpha / rank.
        alpha: f64 = 8.0, in 0.0..=1e6;
        /// Probability of zeroing an entry of the input of the change while training.
        dropout: f64 = 0.0, in 0.0..=0.99;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<AdaloraOptions>();

/// Returns how many ranks of a module a pruned adapter kept; its list says so one by one.
fn kept(config: Option<&Value>, module: &str) -> Option<usize> {
    let pattern = config?.get("rank_pattern")?.as_object()?;
    let alive = |mask: &Value| match mask {
        Value::Array(mask) => mask.iter().filter(|kept| **kept == Value::Bool(true)).count(),
        number => number.as_u64().unwrap_or_default() as usize,
    };
    let matches = |key: &str| {
        let key =
            key.strip_prefix("base_model.model.").or(key.strip_prefix("model.")).unwrap_or(key);
        let key = key.strip_suffix(".lora_E").unwrap_or(key);
        module == key || module.strip_prefix("model.") == Some(key)
    };
    pattern.iter().find(|(key, _)| matches(key)).map(|(_, mask)| alive(mask))
}

impl WeightMethod for AdaloraOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "adalora",
            summary: "Trains a low-rank change in the form of a singular value decomposition beside each targeted weight.",
            source: "Zhang et al., Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, 2023, arXiv 2303.10512",
            usual_learning_rates: (2e-4, 5e-3),
            options: registry::specs::<Self>,
        },
        peft_type: "ADALORA",
        keys: &[
            ("rank", "init_r"),
            ("target_rank", "target_r"),
            ("tinit", "tinit"),
            ("tfinal", "tfinal"),
            ("delta_t", "deltaT"),
            ("beta1", "beta1"),
            ("beta2", "beta2"),
            ("orth_reg_weight", "orth_reg_weight"),
            ("alpha", "lora_alpha"),
            ("dropout", "lora_dropout"),
        ],
        fixed: &[
            ("bias", "\"none\""),
            ("use_dora", "false"),
            ("lora_bias", "false"),
            ("trainable_token_indices", "null"),
        ],
        written: &[
            ("total_step", "1"),
            ("rank_pattern", "null"),
            ("use_rslora", "false"),
            ("init_lora_weights", "true"),
            ("fan_in_fan_out", "false"),
            ("exclude_modules", "null"),
            ("layers_to_transform", "null"),
            ("layers_pattern", "null"),
        ],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &[
            "rank = 3\ntarget_rank = 2",
            "rank = 2\ndropout = 0.1",
            "rank = 4\ntarget_rank = 1\ntinit = 1\ntfinal = 1\ndelta_t = 2\north_reg_weight = 0.0\nlayers = [1]",
        ],
    };

    fn layout(&self, target: &Target, context: &Context<'_>) -> Result<Vec<Slot>> {
        let [rows, columns] = target.shape();
        let rank = kept(context.original, &target.module).unwrap_or(self.rank);
        checks::rank("adalora", rank, target)?;
        let mut slots = vec![
            Slot::normal("lora_A", [rank, columns], 0.02),
            Slot::normal("lora_B", [rows, rank], 0.02),
            Slot::zeros("lora_E", [rank, 1]),
        ];
        if self.prunes() && context.original.is_none() {
            // What decides which ranks go is kept with the parameters, so that a run that is resumed
            // decides alike.
            let kept = |slot: Slot| slot.buffer().saved_if(false);
            slots.push(kept(Slot::constant(ALIVE, [rank], 1.0)));
            for (name, shape) in
                [("lora_A", [rank, columns]), ("lora_B", [rows, rank]), ("lora_E", [rank, 1])]
            {
                slots.push(kept(Slot::zeros(format!("{name}{SENSITIVITY}"), shape)));
                slots.push(kept(Slot::zeros(format!("{name}{UNCERTAINTY}"), shape)));
            }
        }
        Ok(slots)
    }

    fn build(
        &self,
        target: &Target,
        context: &Context<'_>,
        _weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        let alpha = if self.alpha > 0.0 { self.alpha } else { self.rank as f64 };
        // PEFT keeps the divisor away from zero, and as it was before anything was pruned.
        let scale = alpha / (self.rank as f64 + 1e-5);
        let built = Built::added(Adalora { scale, dropout: self.dropout });
        let nothing_left = kept(context.original, &target.module) == Some(0);
        Ok(if nothing_left { Built { weight: None, ..built } } else { built })
    }

    fn on_gradients(&self, step: &mut StepView<'_>) {
        if self.orth_reg_weight > 0.0 {
            self.keep_orthogonal(step);
        }
        if self.prunes() && step.step <= step.num_steps.saturating_sub(self.tfinal) {
            self.smooth(step);
        }
    }

    fn on_step(&self, step: &mut StepView<'_>) {
        if self.prunes() {
            self.prune(step);
        }
    }

    fn describe(&self, parameters: &Parameters, config: &mut Value) {
        let alive = parameters.iter().filter_map(|(id, parameter)| {
            let module = parameter.name.strip_suffix(ALIVE)?.strip_prefix(PREFIX)?;
            let mask: Vec<bool> = parameters.values(id).iter().map(|alive| *alive > 0.0).collect();
            Some((format!("{module}lora_E"), json!(mask)))
        });
        let pattern: Map<String, Value> = alive.collect();
        if !pattern.is_empty() {
            config["rank_pattern"] = pattern.into();
        }
    }

    fn fold(&self, parameters: &Parameters, tensors: &mut FileTensors) {
        for (id, parameter) in parameters.iter() {
            let Some(module) = parameter.name.strip_suffix(ALIVE) else { continue };
            let alive: Vec<bool> = parameters.values(id).iter().map(|a| *a > 0.0).collect();
            let count = alive.iter().filter(|alive| **alive).count();
            for part in ["lora_A", "lora_B", "lora_E"] {
                let Some((shape, values)) = tensors.get_mut(&format!("{module}{part}")) else {
                    continue;
                };
                let axis = usize::from(part == "lora_B");
                let width = shape[1];
                let rank_of = |place: usize| if axis == 1 { place % width } else { place / width };
                let mut place = 0;
                values.retain(|_| {
                    place += 1;
                    alive[rank_of(place - 1)]
                });
                shape[axis] = count;
            }
        }
    }

    fn finish_config(&self, config: &mut Map<String, Value>, _targets: &[Target]) {
        config.insert("r".to_owned(), json!(self.rank));
    }

    fn read_config(&mut self, config: &Value) -> Result<()> {
        match config.get("rank_pattern") {
            None | Some(Value::Null | Value::Object(_)) => Ok(()),
            Some(_) => Err(peft_config::error("rank_pattern", config, "a table of lists")),
        }
    }
}

/// Names of what is kept beside a target's tensors while ranks are pruned: which are left, and the
/// smoothed importance of every value.
const ALIVE: &str = "lora_E.alive";
const SENSITIVITY: &str = ".sensitivity";
const UNCERTAINTY: &str = ".uncertainty";

/// One factor of a change in a step.
struct Factor {
    id: ParameterId,
    sensitivity: ParameterId,
    uncertainty: ParameterId,
}

impl AdaloraOptions {
    fn prunes(&self) -> bool {
        self.target_rank < self.rank
    }

    /// Returns how many ranks of all targets together may be left after a step, and whether it is one
    /// at which some are pruned (the paper's cubic schedule).
    fn budget(&self, step: u64, num_steps: u64, all: usize, targets: usize) -> Option<usize> {
        let last = num_steps.saturating_sub(self.tfinal);
        let end = self.target_rank * targets;
        if step >= last {
            return Some(end);
        }
        if step <= self.tinit {
            return None;
        }
        let left = 1.0 - (step - self.tinit) as f64 / (last - self.tinit) as f64;
        let budget = (all.saturating_sub(end) as f64 * left.powi(3) + end as f64) as usize;
        step.is_multiple_of(self.delta_t).then_some(budget)
    }

    /// Adds the gradient of `weight / n · Σ ‖P Pᵀ − I‖`, over all n factors A and Bᵀ.
    fn keep_orthogonal(&self, step: &mut StepView<'_>) {
        let factors: Vec<(ParameterId, [usize; 2], bool)> = step
            .parameters
            .iter()
            .filter_map(|(id, parameter)| {
                let is_b = parameter.name.ends_with(".lora_B");
                let is_factor = is_b || parameter.name.ends_with(".lora_A");
                let &[rows, columns] = parameter.shape.as_slice() else { return None };
                is_factor.then_some((id, [rows, columns], is_b))
            })
            .collect();
        let weight = self.orth_reg_weight / factors.len().max(1) as f64;
        for (id, [rows, columns], is_b) in factors {
            let Some(gradient) = &mut step.gradients[id.index()] else { continue };
            let values: Vec<f64> =
                step.parameters.values(id).iter().map(|value| f64::from(*value)).collect();
            let (p, rank, width) = if is_b {
                (transposed(&values, rows, columns), columns, rows)
            } else {
                (values, rows, columns)
            };
            let mut gap = product(&p, &transposed(&p, rank, width), width, rank);
            (0..rank).for_each(|i| gap[i * rank + i] -= 1.0);
            let length = gap.iter().map(|g| g * g).sum::<f64>().sqrt();
            if length == 0.0 {
                continue;
            }
            let slope = product(&gap, &p, rank, width);
            let slope = if is_b { transposed(&slope, rank, width) } else { slope };
            for (gradient, slope) in gradient.iter_mut().zip(slope) {
                *gradient += (2.0 * weight / length * slope) as f32;
            }
        }
    }

    /// Returns the factors A, B and E of each target that is pruned, beside the mask of its ranks.
    fn triplets(parameters: &Parameters) -> Vec<(ParameterId, [Factor; 3])> {
        let find = |name: String| planned(parameters, &name);
        let of = |(id, parameter): (ParameterId, &Parameter)| {
            let module = parameter.name.strip_suffix(ALIVE)?;
            let factor = |part: &str| Factor {
                id: find(format!("{module}{part}")),
                sensitivity: find(format!("{module}{part}{SENSITIVITY}")),
                uncertainty: find(format!("{module}{part}{UNCERTAINTY}")),
            };
            Some((id, ["lora_A", "lora_B", "lora_E"].map(factor)))
        };
        parameters.iter().filter_map(of).collect()
    }

    /// Takes the sensitivity of this step into the smoothed ones (the paper's equations 8 to 10).
    fn smooth(&self, step: &mut StepView<'_>) {
        let (beta1, beta2) = (self.beta1 as f32, self.beta2 as f32);
        for factor in Self::triplets(step.parameters).into_iter().flat_map(|(_, all)| all) {
            let Some(gradient) = &step.gradients[factor.id.index()] else { continue };
            let values = step.parameters.values(factor.id);
            let now: Vec<f32> = values.iter().zip(gradient).map(|(v, g)| (v * g).abs()).collect();
            step.parameters.update(factor.sensitivity, |smooth| {
                for (smooth, now) in smooth.iter_mut().zip(&now) {
                    *smooth = beta1 * *smooth + (1.0 - beta1) * now;
                }
            });
            let smooth = step.parameters.values(factor.sensitivity);
            step.parameters.update(factor.uncertainty, |uncertain| {
                for ((uncertain, smooth), now) in uncertain.iter_mut().zip(&smooth).zip(&now) {
                    *uncertain = beta2 * *uncertain + (1.0 - beta2) * (now - smooth).abs();
                }
            });
        }
    }

    /// Prunes the ranks of least importance over all targets, and holds those at zero that are gone
    /// for good.
    fn prune(&self, step: &mut StepView<'_>) {
        let triplets = Self::triplets(step.parameters);
        let ranks = |(alive, _): &(ParameterId, [Factor; 3])| step.parameters.get(*alive).count();
        let all = triplets.iter().map(ranks).sum();
        let Some(budget) = self.budget(step.step, step.num_steps, all, triplets.len()) else {
            return;
        };
        let last = step.num_steps.saturating_sub(self.tfinal);
        if step.step <= last {
            let scores: Vec<Vec<f64>> =
                triplets.iter().map(|(_, of)| importance(step.parameters, of)).collect();
            let mut order: Vec<(usize, usize)> = (0..scores.len())
                .flat_map(|target| (0..scores[target].len()).map(move |rank| (target, rank)))
                .collect();
            // A stable order, so that equals are kept from the first target on.
            order.sort_by(|a, b| scores[b.0][b.1].total_cmp(&scores[a.0][a.1]));
            let mut masks: Vec<Vec<f32>> =
                scores.iter().map(|ranks| vec![0.0; ranks.len()]).collect();
            order.iter().take(budget).for_each(|(target, rank)| masks[*target][*rank] = 1.0);
            for ((alive, _), mask) in triplets.iter().zip(masks) {
                step.parameters.update(*alive, |values| values.copy_from_slice(&mask));
            }
        }
        for (alive, [_, _, e]) in &triplets {
            let mask = step.parameters.values(*alive);
            step.parameters.update(e.id, |values| {
                values.iter_mut().zip(&mask).for_each(|(value, alive)| *value *= alive);
            });
        }
    }
}

/// Returns the importance of each rank of a target: that of its number in E, and on average of its
/// row of A and its column of B (equation 7).
fn importance(parameters: &Parameters, [a, b, e]: &[Factor; 3]) -> Vec<f64> {
    let of = |factor: &Factor| -> Vec<f64> {
        let smooth = parameters.values(factor.sensitivity);
        let uncertain = parameters.values(factor.uncertainty);
        smooth.iter().zip(uncertain).map(|(s, u)| f64::from(*s) * f64::from(u)).collect()
    };
    let (of_a, of_b, of_e) = (of(a), of(b), of(e));
    let rank = of_e.len();
    let (columns, rows) = (of_a.len() / rank.max(1), of_b.len() / rank.max(1));
    let score = |place: usize| {
        let row: f64 = of_a[place * columns..(place + 1) * columns].iter().sum();
        let column: f64 = of_b.iter().skip(place).step_by(rank).sum();
        of_e[place] + row / columns as f64 + column / rows as f64
    };
    (0..rank).map(score).collect()
}

#[derive(Debug)]
struct Adalora {
    scale: f64,
    dropout: f64,
}

impl Addition for Adalora {
    fn delta(&self, tensors: &View<'_>) -> Delta {
        let a = tensors.get::<2>(0) * tensors.get::<2>(2);
        Delta::LowRank { a, b: tensors.get(1), scale: self.scale }
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use retune_core::step::StepParts;
    use tensor::Device;

    fn options() -> AdaloraOptions {
        AdaloraOptions { rank: 2, target_rank: 1, orth_reg_weight: 0.0, ..Default::default() }
    }

    /// One target of rank 2 over a weight of one row and one column, as `layout` has it.
    fn parameters(of: &[(&str, [f32; 2])]) -> Parameters {
        let mut parameters = Parameters::new(&Device::flex());
        for (module, e) in of {
            let name = |part: &str| format!("{PREFIX}{module}.{part}");
            parameters.add(name("lora_A"), &[2, 1], vec![1.0, 1.0]);
            parameters.add(name("lora_B"), &[1, 2], vec![1.0, 1.0]);
            parameters.add(name("lora_E"), &[2, 1], e.to_vec());
            parameters.add_buffer(name(ALIVE), &[2], vec![1.0; 2]);
            for (part, shape) in [("lora_A", [2, 1]), ("lora_B", [1, 2]), ("lora_E", [2, 1])] {
                for kept in [SENSITIVITY, UNCERTAINTY] {
                    parameters.add_buffer(name(&format!("{part}{kept}")), &shape, vec![0.0; 2]);
                }
            }
        }
        parameters
    }

    #[test]
    fn the_budget_falls_as_a_cube() {
        let options = AdaloraOptions {
            rank: 12,
            target_rank: 8,
            tinit: 10,
            tfinal: 20,
            delta_t: 5,
            ..Default::default()
        };
        let budget = |step| options.budget(step, 100, 120, 10);
        assert_eq!(budget(10), None);
        assert_eq!(budget(11), None);
        // 1 − (45 − 10) / 70 is one half: 80 + 40 / 8.
        assert_eq!(budget(45), Some(85));
        assert_eq!(budget(80), Some(80));
        assert_eq!(budget(97), Some(80));
    }

    #[test]
    fn importance_by_hand() {
        let mut parameters = parameters(&[("m", [0.5, -2.0])]);
        let mut parts = StepParts::new(&parameters);
        parts.gradients[0] = Some(vec![0.1, 0.2]);
        parts.gradients[1] = Some(vec![0.0, 0.4]);
        parts.gradients[2] = Some(vec![3.0, 1.0]);
        options().smooth(&mut parts.view(1, 9, &mut parameters));
        let (_, factors) = &AdaloraOptions::triplets(&parameters)[0];
        let found = importance(&parameters, factors);
        // A value's sensitivity x is smoothed to 0.15 x, its uncertainty to 0.15 · 0.85 x.
        let of = |x: f64| 0.15 * x * 0.15 * 0.85 * x;
        let expected = [of(1.5) + of(0.1), of(2.0) + of(0.2) + of(0.4)];
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() < 1e-7, "{found:?} {expected:?}");
        }
    }

    #[test]
    fn the_least_important_ranks_of_all_targets_are_pruned_and_left_out_of_the_file() {
        let mut parameters = parameters(&[("m", [0.1, 0.2]), ("n", [2.0, 3.0])]);
        let mut parts = StepParts::new(&parameters);
        for place in [2, 12] {
            parts.gradients[place] = Some(vec![1.0, 1.0]);
        }
        let options = options();
        options.smooth(&mut parts.view(9, 9, &mut parameters));
        options.prune(&mut parts.view(9, 9, &mut parameters));
        let values = |name: &str| parameters.values(parameters.find(name).unwrap());
        let (m, n) = (format!("{PREFIX}m.lora_E"), format!("{PREFIX}n.lora_E"));
        // Two ranks are left, one for each target on average, and both are the second's.
        assert_eq!((values(&m), values(&n)), (vec![0.0, 0.0], vec![2.0, 3.0]));
        let mut config = json!({});
        options.describe(&parameters, &mut config);
        let pattern = json!({"m.lora_E": [false, false], "n.lora_E": [true, true]});
        assert_eq!(config["rank_pattern"], pattern);
        let mut tensors = FileTensors::from([
            (format!("{PREFIX}m.lora_B"), (vec![3, 2], vec![1.0; 6])),
            (format!("{PREFIX}n.lora_A"), (vec![2, 1], vec![4.0, 5.0])),
        ]);
        options.fold(&parameters, &mut tensors);
        assert_eq!(tensors[&format!("{PREFIX}m.lora_B")], (vec![3, 0], vec![]));
        assert_eq!(tensors[&format!("{PREFIX}n.lora_A")], (vec![2, 1], vec![4.0, 5.0]));
    }

    #[test]
    fn the_distance_from_orthogonal_has_the_slope_of_finite_differences() {
        let values = [0.9_f64, 0.3, -0.2, 0.4, 1.1, 0.5];
        // ‖A Aᵀ − I‖ of A, `[2, 3]`.
        let distance = |a: &[f64]| -> f64 {
            let mut gap = product(a, &transposed(a, 2, 3), 3, 2);
            (gap[0], gap[3]) = (gap[0] - 1.0, gap[3] - 1.0);
            gap.iter().map(|g| g * g).sum::<f64>().sqrt()
        };
        for (name, shape) in [("m.lora_A", [2, 3]), ("m.lora_B", [3, 2])] {
            let is_b = name.ends_with('B');
            let own = if is_b { transposed(&values, 2, 3) } else { values.to_vec() };
            let mut parameters = Parameters::new(&Device::flex());
            parameters.add(name, &shape, own.iter().map(|v| *v as f32).collect());
            let mut parts = StepParts::new(&parameters);
            parts.gradients[0] = Some(vec![0.0; 6]);
            let options = AdaloraOptions { orth_reg_weight: 0.5, ..Default::default() };
            options.keep_orthogonal(&mut parts.view(1, 9, &mut parameters));
            let found = parts.gradients[0].clone().unwrap();
            for place in 0..6 {
                let at = |step: f64| {
                    let mut moved = values;
                    moved[place] += step;
                    distance(&moved)
                };
                let slope = 0.5 * (at(1e-5) - at(-1e-5)) / 2e-5;
                let own = if is_b { place % 3 * 2 + place / 3 } else { place };
                assert!((f64::from(found[own]) - slope).abs() < 1e-5, "{found:?} {slope}");
            }
        }
    }
}
