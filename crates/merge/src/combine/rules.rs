//! The rules that merge tensors of several tasks, as PEFT's `merge_utils` has them.

/// A tensor of one task and its weight.
pub(super) type Task<'a> = (&'a [f32], f32);

/// How tensors of several tasks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Merge {
    /// The weighted sum (task arithmetic).
    Linear,
    /// The largest entries of each, then the weighted sum.
    MagnitudePrune,
    /// The largest entries of each, a sign elected per entry, the weighted mean of those that have
    /// it.
    Ties,
    /// Entries dropped at random and the others scaled up, then the weighted sum.
    DareLinear,
    /// Entries dropped at random and the others scaled up, then signs and mean of TIES.
    DareTies,
}

/// How TIES elects a sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MajoritySign {
    /// By the sum of the entries, before weights.
    #[default]
    Total,
    /// By the count of the signs.
    Frequency,
}

/// Uniform numbers as a function of seed, place, task and index.
#[derive(Debug, Clone, Copy)]
pub(super) struct Draw {
    state: u64,
}

impl Draw {
    pub(super) fn new(seed: u64, place: &str) -> Self {
        let start = mix(seed ^ 0x9e37_79b9_7f4a_7c15);
        let state = place.bytes().fold(start, |state, byte| mix(state ^ u64::from(byte)));
        Self { state }
    }

    /// Returns a number from 0 up to 1.
    fn uniform(self, task: usize, index: usize) -> f64 {
        let task = mix(self.state.wrapping_add(task as u64 + 1));
        (mix(task ^ (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)) >> 11) as f64
            / (1u64 << 53) as f64
    }
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Merges tensors of the same length.
pub(super) fn merge(
    tasks: &[Task<'_>],
    rule: Merge,
    density: Option<f64>,
    majority_sign: MajoritySign,
    draw: Draw,
) -> Vec<f32> {
    let density = density.unwrap_or(1.0);
    let thinned: Vec<Vec<f32>> = tasks
        .iter()
        .enumerate()
        .map(|(task, (values, _))| match rule {
            Merge::Linear => values.to_vec(),
            Merge::MagnitudePrune | Merge::Ties => prune(values, density),
            Merge::DareLinear | Merge::DareTies => drop(values, density, draw, task),
        })
        .collect();
    let weights: Vec<f32> = tasks.iter().map(|(_, weight)| *weight).collect();
    let len = tasks.first().map_or(0, |(values, _)| values.len());
    let elects = matches!(rule, Merge::Ties | Merge::DareTies);
    let entry = |index: usize| {
        let entries = || thinned.iter().map(|values| values[index]);
        let weighted = entries().zip(&weights).map(|(value, weight)| value * weight);
        if !elects {
            return weighted.sum::<f32>();
        }
        let size: f32 = match majority_sign {
            MajoritySign::Total => entries().sum(),
            MajoritySign::Frequency => entries().map(sign).sum(),
        };
        let elected = if size >= 0.0 { 1.0 } else { -1.0 };
        let mut sum = 0.0f32;
        let mut count = 0.0f32;
        for (value, weighted) in entries().zip(weighted) {
            if sign(value) == elected {
                sum += weighted;
                count += 1.0;
            }
        }
        sum / count.max(1.0)
    };
    (0..len).map(entry).collect()
}

/// The sign of zero is zero, unlike `f32::signum`.
fn sign(value: f32) -> f32 {
    if value == 0.0 { 0.0 } else { value.signum() }
}

/// Keeps the largest entries by magnitude; of equal ones the first.
fn prune(values: &[f32], density: f64) -> Vec<f32> {
    let kept = (density * values.len() as f64) as usize;
    if density >= 1.0 {
        return values.to_vec();
    }
    let mut order: Vec<usize> = (0..values.len()).collect();
    let larger =
        |a: &usize, b: &usize| values[*b].abs().total_cmp(&values[*a].abs()).then_with(|| a.cmp(b));
    if kept < order.len() {
        order.select_nth_unstable_by(kept, larger);
    }
    let mut out = vec![0.0; values.len()];
    for place in &order[..kept] {
        out[*place] = values[*place];
    }
    out
}

/// Drops entries at random and scales the others, so that the mean stays.
fn drop(values: &[f32], density: f64, draw: Draw, task: usize) -> Vec<f32> {
    if density >= 1.0 {
        return values.to_vec();
    }
    let keep = |(index, value): (usize, &f32)| {
        if draw.uniform(task, index) < density { value / density as f32 } else { 0.0 }
    };
    values.iter().enumerate().map(keep).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(tasks: &[Task<'_>], rule: Merge, density: f64, sign: MajoritySign) -> Vec<f32> {
        merge(tasks, rule, Some(density), sign, Draw::new(1, "x"))
    }

    #[test]
    fn rules_worked_out_by_hand() {
        let a = [1.0, -2.0, 3.0, 0.5];
        let b = [-4.0, -1.0, 1.0, 0.25];
        let tasks: [Task<'_>; 2] = [(&a, 1.0), (&b, 2.0)];
        let total = MajoritySign::Total;
        assert_eq!(run(&tasks, Merge::Linear, 1.0, total), [-7.0, -4.0, 5.0, 1.0]);
        // The two largest of each: [0 -2 3 0] and [-4 -1 0 0]; of 1 and 1 the first.
        assert_eq!(run(&tasks, Merge::MagnitudePrune, 0.5, total), [-8.0, -4.0, 3.0, 0.0]);
        assert_eq!(run(&tasks, Merge::Ties, 0.5, total), [-8.0, -2.0, 3.0, 0.0]);
        // All entries: signs of the sums are -, -, +, +.
        assert_eq!(run(&tasks, Merge::Ties, 1.0, total), [-8.0, -2.0, 2.5, 0.5]);
        // By count the first entry is a draw, which counts as plus.
        assert_eq!(run(&tasks, Merge::Ties, 1.0, MajoritySign::Frequency), [1.0, -2.0, 2.5, 0.5]);
        assert_eq!(run(&tasks, Merge::DareTies, 1.0, total), [-8.0, -2.0, 2.5, 0.5]);
        assert_eq!(run(&tasks, Merge::DareLinear, 1.0, total), [-7.0, -4.0, 5.0, 1.0]);
    }

    #[test]
    fn dropping_keeps_the_mean_and_depends_on_the_seed_alone() {
        let ones = vec![1.0f32; 100_000];
        let tasks: [Task<'_>; 2] = [(&ones, 1.0), (&ones, 0.0)];
        let found = run(&tasks, Merge::DareLinear, 0.2, MajoritySign::Total);
        let kept = found.iter().filter(|value| **value != 0.0).count();
        assert!(found.iter().all(|value| *value == 0.0 || *value == 5.0));
        // Five standard deviations of the binomial law around 20 000.
        assert!(kept.abs_diff(20_000) < 633, "{kept}");
        assert_eq!(found, run(&tasks, Merge::DareLinear, 0.2, MajoritySign::Total));
        let other =
            merge(&tasks, Merge::DareLinear, Some(0.2), MajoritySign::Total, Draw::new(2, "x"));
        assert_ne!(found, other);
        // Tasks are dropped independently of one another.
        let draw = Draw::new(1, "x");
        let both =
            (0..100_000).filter(|i| draw.uniform(0, *i) < 0.2 && draw.uniform(1, *i) < 0.2).count();
        assert!(both.abs_diff(4_000) < 310, "{both}");
    }
}
