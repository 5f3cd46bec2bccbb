//! Masks on changes: which values of a task vector stay.

use super::elementwise::{scale, sum_of_magnitudes};
use super::select::{Cut, key, largest};
use super::{Chunk, Group};
use crate::Result;

/// The rule by which a method thins out a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    /// Keeps everything.
    Nothing,
    /// TIES: the `density` largest of the tensor.
    Largest,
    /// DARE: each with probability `density`.
    Random,
    /// DELLA: with a probability that grows with the rank in the row, `density ± epsilon`.
    Ranked,
    /// Model Breadcrumbs: without the `gamma` largest, then the largest until `density` remain.
    Band,
}

/// A mask that is applied run after run, from the first value to the last.
#[derive(Debug, Clone)]
enum Mask {
    All,
    None,
    Largest { cut: Cut, seen: usize },
    Band { outliers: Cut, kept: Cut, seen: [usize; 2] },
    Random { stream: u64, density: f64 },
    Ranked { stream: u64, density: f64, epsilon: f64 },
}

/// A mask and the factor that makes up for what it drops.
#[derive(Debug, Clone)]
pub(crate) struct Sparse {
    mask: Mask,
    factor: f32,
}

impl Sparse {
    /// Thins out a run of changes that begins at index `start`.
    pub(crate) fn apply(&mut self, start: usize, row: usize, changes: &mut [f32]) {
        self.mask.apply(start, row, changes);
        if self.factor != 1.0 {
            scale(changes, self.factor);
        }
    }
}

/// Returns the length of the runs a rule needs.
pub(crate) fn unit(rule: Rule, group: &Group<'_>) -> usize {
    if rule == Rule::Ranked { group.row() } else { 1 }
}

/// Finds the mask of every input.
pub(crate) fn prepare(rule: Rule, rescale: bool, group: &Group<'_>) -> Result<Vec<Sparse>> {
    let masks = match rule {
        Rule::Nothing => vec![Mask::All; group.inputs.len()],
        Rule::Largest | Rule::Band => by_magnitude(rule, group)?,
        Rule::Random | Rule::Ranked => drawn(rule, group),
    };
    let mut sparse: Vec<Sparse> =
        masks.into_iter().map(|mask| Sparse { mask, factor: 1.0 }).collect();
    if rescale && sparse.iter().any(|one| !matches!(one.mask, Mask::All)) {
        rescale_by_magnitude(rule, group, &mut sparse)?;
    }
    Ok(sparse)
}

fn by_magnitude(rule: Rule, group: &Group<'_>) -> Result<Vec<Mask>> {
    let n = group.len();
    let mut wanted = Vec::new();
    let mut plans = Vec::new();
    for (lane, own) in group.own.iter().enumerate() {
        let density = own.number("density");
        let count = (density * n as f64) as usize;
        if density >= 1.0 || density <= 0.0 {
            plans.push(if density >= 1.0 { Mask::All } else { Mask::None });
        } else if rule == Rule::Largest {
            plans.push(Mask::Largest { cut: Cut { threshold: 0, ties: 0, equal: 0 }, seen: 0 });
            wanted.push((lane, count.max(1)));
        } else {
            let top = num_outliers(own.number("gamma"), density, n);
            if top == 0 && group.compat {
                plans.push(Mask::None);
                continue;
            }
            let empty = Cut { threshold: 0, ties: 0, equal: 0 };
            plans.push(Mask::Band { outliers: empty, kept: empty, seen: [0; 2] });
            wanted.extend([(lane, top), (lane, top + count)]);
        }
    }
    let cuts = largest(&wanted, n, &mut |visit| {
        group.sweep_changes(1, &mut |chunk: &mut Chunk| {
            chunk.inputs.iter().enumerate().for_each(|(lane, changes)| visit(lane, changes));
            Ok(())
        })
    })?;
    let mut cuts = cuts.into_iter();
    for plan in &mut plans {
        match plan {
            Mask::Largest { cut, .. } => *cut = cuts.next().unwrap_or(*cut),
            Mask::Band { outliers, kept, .. } => {
                *outliers = cuts.next().unwrap_or(*outliers);
                *kept = cuts.next().unwrap_or(*kept);
            }
            _ => {}
        }
    }
    Ok(plans)
}

/// Returns how many outliers are dropped: fewer where `density` would not be reached else.
pub(crate) fn num_outliers(gamma: f64, density: f64, n: usize) -> usize {
    let (top, count) = ((gamma * n as f64) as usize, (density * n as f64) as usize);
    top.min(n - count.min(n))
}

fn drawn(rule: Rule, group: &Group<'_>) -> Vec<Mask> {
    let mask = |(lane, own): (usize, &super::Resolved)| {
        let density = own.number("density");
        let stream = stream(group.seed, group.name, lane);
        match rule {
            _ if density >= 1.0 => Mask::All,
            _ if density <= 0.0 => Mask::None,
            Rule::Random => Mask::Random { stream, density },
            _ => Mask::Ranked { stream, density, epsilon: own.number("epsilon") },
        }
    };
    group.own.iter().enumerate().map(mask).collect()
}

/// Makes the sum of magnitudes after the mask that of before.
fn rescale_by_magnitude(rule: Rule, group: &Group<'_>, sparse: &mut [Sparse]) -> Result<()> {
    let mut masks: Vec<Mask> = sparse.iter().map(|one| one.mask.clone()).collect();
    let mut sums = vec![[0.0; 2]; sparse.len()];
    let row = group.row();
    group.sweep_changes(unit(rule, group), &mut |chunk| {
        for ((mask, changes), sums) in masks.iter_mut().zip(&mut chunk.inputs).zip(&mut sums) {
            sums[0] += sum_of_magnitudes(changes);
            mask.apply(chunk.start, row, changes);
            sums[1] += sum_of_magnitudes(changes);
        }
        Ok(())
    })?;
    for (one, [before, after]) in sparse.iter_mut().zip(sums) {
        if before >= SMALLEST_SUM && after >= SMALLEST_SUM {
            one.factor = (before / after) as f32;
        }
    }
    Ok(())
}

/// Sums below this are not made up for.
const SMALLEST_SUM: f64 = 1e-7;

impl Mask {
    fn apply(&mut self, start: usize, row: usize, changes: &mut [f32]) {
        match self {
            Self::All => {}
            Self::None => changes.fill(0.0),
            Self::Largest { cut, seen } => keep(changes, |key| match key.cmp(&cut.threshold) {
                std::cmp::Ordering::Greater => true,
                std::cmp::Ordering::Equal => {
                    *seen += 1;
                    *seen <= cut.ties
                }
                std::cmp::Ordering::Less => false,
            }),
            Self::Band { outliers, kept, seen } => keep(changes, |key| {
                let one_value = outliers.threshold == kept.threshold;
                if key == outliers.threshold {
                    seen[0] += 1;
                    // Outliers are taken from the end of equal values, the kept from their start.
                    let kept = if one_value { kept.ties } else { outliers.equal };
                    seen[0] <= kept.saturating_sub(outliers.ties)
                } else if key == kept.threshold {
                    seen[1] += 1;
                    seen[1] <= kept.ties
                } else {
                    kept.threshold < key && key < outliers.threshold
                }
            }),
            Self::Random { stream, density } => {
                for (i, x) in changes.iter_mut().enumerate() {
                    if uniform(*stream, start + i) >= *density {
                        *x = 0.0;
                    }
                }
            }
            Self::Ranked { stream, density, epsilon } => {
                let mut order: Vec<usize> = Vec::new();
                for (i, part) in changes.chunks_mut(row).enumerate() {
                    order.clear();
                    order.extend(0..part.len());
                    // Stable: among equal magnitudes the lower index has the lower rank.
                    order.sort_by_key(|at| key(part[*at]));
                    let last = part.len().saturating_sub(1);
                    for (rank, at) in order.iter().enumerate() {
                        let place = if last == 0 { 0.5 } else { rank as f64 / last as f64 };
                        let probability = *density - *epsilon + place * 2.0 * *epsilon;
                        if uniform(*stream, start + i * row + at) >= probability {
                            part[*at] = 0.0;
                        }
                    }
                }
            }
        }
    }
}

fn keep(changes: &mut [f32], mut keeps: impl FnMut(u32) -> bool) {
    for x in changes {
        if !keeps(key(*x)) {
            *x = 0.0;
        }
    }
}

/// Names the draws of one tensor and input: they depend on nothing else.
fn stream(seed: u64, tensor: &str, input: usize) -> u64 {
    let digest = retune_files::sha256(format!("merge mask\0{seed}\0{input}\0{tensor}").as_bytes());
    u64::from_str_radix(&digest[..16], 16).unwrap_or_default()
}

/// Draws from `[0, 1)` for one index (SplitMix64 at that place of its sequence).
fn uniform(stream: u64, index: usize) -> f64 {
    let mut z = stream.wrapping_add((index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 * (1.0 / (1_u64 << 53) as f64)
}
