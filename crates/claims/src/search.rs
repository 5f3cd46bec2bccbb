//! Searches of a finite space for its best trade-offs of two objectives: guided, evolved, random.

use retune_core::random::Random;

use crate::saas::Surrogate;

/// A space whose every point's two objectives are known; both are to be large.
#[derive(Debug)]
pub(crate) struct Space {
    /// Each point's genes, each below that gene's number of values.
    pub(crate) genes: Vec<Vec<usize>>,
    /// How many values each gene has.
    pub(crate) sizes: Vec<usize>,
    /// Each point's objectives.
    pub(crate) outcomes: Vec<[f64; 2]>,
}

/// Evaluations of one search.
const BUDGET: usize = 40;
/// Random points a guided search begins with, and those it chooses at a time.
const INITIAL: usize = 12;
const TOGETHER: usize = 4;
/// Joint draws for each setting of the surrogate.
const DRAWS: usize = 4;
/// Members of a generation.
const GENERATION: usize = 10;

impl Space {
    fn count(&self) -> usize {
        self.genes.len()
    }

    /// Returns the worst of both objectives over all points.
    pub(crate) fn nadir(&self) -> [f64; 2] {
        let least = |side: usize| self.outcomes.iter().map(move |o| o[side]);
        [0, 1].map(|side| least(side).fold(f64::INFINITY, f64::min))
    }

    /// Returns the hypervolume after each evaluation, as a share of that of all points.
    pub(crate) fn shares(&self, order: &[usize]) -> Vec<f64> {
        let nadir = self.nadir();
        let all = hypervolume(&self.outcomes, nadir);
        let of = |count: usize| {
            let seen: Vec<[f64; 2]> = order[..count].iter().map(|p| self.outcomes[*p]).collect();
            hypervolume(&seen, nadir) / all
        };
        (1..=order.len()).map(of).collect()
    }

    /// Evaluates different points at random.
    pub(crate) fn at_random(&self, random: &mut Random) -> Vec<usize> {
        random.choose(self.count(), BUDGET)
    }

    /// Lets a surrogate choose by noisy expected hypervolume improvement: both objectives are drawn
    /// at all points together, and the best point on average over draws is taken, four times.
    pub(crate) fn guided(&self, random: &mut Random) -> Vec<usize> {
        let input = |genes: &Vec<usize>| {
            let scaled = genes.iter().zip(&self.sizes);
            scaled.map(|(gene, size)| *gene as f64 / (size - 1) as f64).collect()
        };
        let points: Vec<Vec<f64>> = self.genes.iter().map(input).collect();
        let mut order = random.choose(self.count(), INITIAL);
        let mut last: [Option<Surrogate>; 2] = [None, None];
        while order.len() < BUDGET {
            let inputs: Vec<Vec<f64>> = order.iter().map(|point| points[*point].clone()).collect();
            let mut paths = Vec::new();
            for (side, last) in last.iter_mut().enumerate() {
                let seen: Vec<f64> = order.iter().map(|p| self.outcomes[*p][side]).collect();
                let fit =
                    Surrogate::fit(inputs.clone(), normal_scores(&seen), last.as_ref(), random);
                paths.push(fit.paths(&points, DRAWS, random));
                *last = Some(fit);
            }
            // Both reference objectives lie below whatever was seen.
            let reference = [quantile(1e-4); 2];
            for _ in 0..TOGETHER {
                let mut gains = vec![0.0; self.count()];
                for (first, second) in paths[0].iter().zip(&paths[1]) {
                    let at = |point: usize| [first[point], second[point]];
                    let front = front(order.iter().map(|point| at(*point)).collect());
                    for (point, gain) in gains.iter_mut().enumerate() {
                        *gain += improvement(&front, at(point), reference);
                    }
                }
                let free = (0..self.count()).filter(|point| !order.contains(point));
                let best = free.max_by(|a, b| gains[*a].total_cmp(&gains[*b]).then(b.cmp(a)));
                order.extend(best);
            }
        }
        order
    }

    /// Evolves generations of ten by NSGA-II (Deb et al., 2002): tournaments by front and crowding,
    /// uniform crossover, one gene in each changed on average; no point twice.
    pub(crate) fn evolved(&self, random: &mut Random) -> Vec<usize> {
        let mut order = random.choose(self.count(), GENERATION);
        let mut parents = order.clone();
        while order.len() < BUDGET {
            let ranks = self.ranked(&parents);
            let mut children = Vec::new();
            while children.len() < GENERATION {
                let mut parent = || {
                    let pair = random.choose(ranks.len(), 2);
                    ranks[pair[0].min(pair[1])]
                };
                let (one, other) = (parent(), parent());
                let genes: Vec<usize> = (0..self.sizes.len())
                    .map(|gene| {
                        let from = if random.below(2) == 0 { one } else { other };
                        let changes = random.below(self.sizes.len()) == 0;
                        let any = random.below(self.sizes[gene]);
                        if changes { any } else { self.genes[from][gene] }
                    })
                    .collect();
                let child = self.genes.iter().position(|known| *known == genes);
                let new = |child: &usize| !order.contains(child) && !children.contains(child);
                children.extend(child.filter(new));
            }
            order.extend(&children);
            parents.extend(children);
            parents = self.ranked(&parents);
            parents.truncate(GENERATION);
        }
        order
    }

    /// Sorts points by the front they are in, then by how far their neighbours in it are.
    fn ranked(&self, points: &[usize]) -> Vec<usize> {
        let mut left = points.to_vec();
        let mut ranked = Vec::new();
        while !left.is_empty() {
            let beaten = |point: &usize| {
                left.iter().any(|other| dominates(self.outcomes[*other], self.outcomes[*point]))
            };
            let (rest, mut own): (Vec<usize>, Vec<usize>) = left.iter().partition(|p| beaten(p));
            own.sort_by(|a, b| self.outcomes[*a][0].total_cmp(&self.outcomes[*b][0]));
            let span = |side: usize| {
                let values = || own.iter().map(|point| self.outcomes[*point][side]);
                values().fold(f64::MIN, f64::max) - values().fold(f64::MAX, f64::min)
            };
            let spans = [span(0).max(1e-12), span(1).max(1e-12)];
            let crowding = |place: usize| {
                if place == 0 || place + 1 == own.len() {
                    return f64::INFINITY;
                }
                let [before, after] = [own[place - 1], own[place + 1]].map(|p| self.outcomes[p]);
                (0..2).map(|side| (after[side] - before[side]).abs() / spans[side]).sum()
            };
            let mut places: Vec<usize> = (0..own.len()).collect();
            places.sort_by(|a, b| crowding(*b).total_cmp(&crowding(*a)));
            ranked.extend(places.into_iter().map(|place| own[place]));
            left = rest;
        }
        ranked
    }
}

fn dominates(a: [f64; 2], b: [f64; 2]) -> bool {
    a[0] >= b[0] && a[1] >= b[1] && a != b
}

/// Keeps what nothing dominates, the first objective falling and the second rising.
pub(crate) fn front(mut points: Vec<[f64; 2]>) -> Vec<[f64; 2]> {
    points.sort_by(|a, b| b[0].total_cmp(&a[0]).then(b[1].total_cmp(&a[1])));
    let mut best = f64::NEG_INFINITY;
    points.retain(|point| {
        let better = point[1] > best;
        best = best.max(point[1]);
        better
    });
    points
}

/// Measures the area between a reference and the front of points.
fn hypervolume(points: &[[f64; 2]], reference: [f64; 2]) -> f64 {
    let mut best = reference[1];
    let mut area = 0.0;
    for point in front(points.to_vec()) {
        if point[1] > best && point[0] > reference[0] {
            area += (point[0] - reference[0]) * (point[1] - best);
            best = point[1];
        }
    }
    area
}

/// Measures what a point adds to the area of a front.
fn improvement(front: &[[f64; 2]], point: [f64; 2], reference: [f64; 2]) -> f64 {
    // Between two members, the area reaches as far as the one with the higher second objective.
    let mut low = reference[1];
    let mut area = 0.0;
    for member in front.iter().map(Some).chain([None]) {
        let (reach, high) = member.map_or((reference[0], f64::INFINITY), |m| (m[0], m[1]));
        let height = high.min(point[1]) - low;
        if height > 0.0 {
            area += height * (point[0] - reach.max(reference[0])).max(0.0);
        }
        low = low.max(high.min(point[1]));
    }
    area
}

/// Brings values to those of a normal distribution with the same ranks, as far as 1e-4 allows.
pub(crate) fn normal_scores(values: &[f64]) -> Vec<f64> {
    let share = |value: &f64| {
        let at_most = values.iter().filter(|other| *other <= value).count();
        at_most as f64 / values.len() as f64
    };
    values.iter().map(|value| quantile(share(value).clamp(1e-4, 1.0 - 1e-4))).collect()
}

/// Returns the value below which a standard normal number lies with a probability, to 5e-4
/// (Abramowitz and Stegun, 26.2.23).
fn quantile(probability: f64) -> f64 {
    let t = (-2.0 * probability.min(1.0 - probability).ln()).sqrt();
    let above = 2.515_517 + t * (0.802_853 + t * 0.010_328);
    let below = 1.0 + t * (1.432_788 + t * (0.189_269 + t * 0.001_308));
    let size = t - above / below;
    if probability < 0.5 { -size } else { size }
}

/// Returns how likely a mean difference at least as large is if signs are chance: all signs are
/// tried.
pub(crate) fn sign_test(differences: &[f64]) -> f64 {
    let count = differences.len();
    let found: f64 = differences.iter().sum();
    let mut sum = found;
    let mut signs = vec![1.0; count];
    let mut at_least = 1_u64;
    // Each step turns one sign, so that all are tried once (Gray's code).
    for step in 1..1_u64 << count {
        let turned = step.trailing_zeros() as usize;
        signs[turned] = -signs[turned];
        sum += 2.0 * signs[turned] * differences[turned];
        at_least += u64::from(sum >= found - 1e-12);
    }
    at_least as f64 / (1_u64 << count) as f64
}

#[cfg(test)]
mod tests {
    use retune_core::random::Seed;

    use super::*;

    #[test]
    fn areas_are_those_worked_out_by_hand() {
        let points = [[3.0, 1.0], [2.0, 2.0], [1.0, 1.5], [1.0, 4.0]];
        assert_eq!(front(points.to_vec()), [[3.0, 1.0], [2.0, 2.0], [1.0, 4.0]]);
        // Layers of height 1, 1 and 2 reach 3, 2 and 1 far.
        assert!((hypervolume(&points, [0.0, 0.0]) - 7.0).abs() < 1e-12);
        let mut random = Seed(1).stream("area", &[]);
        for _ in 0..200 {
            let mut draw = || [5.0 * random.uniform() - 0.5, 5.0 * random.uniform() - 0.5];
            let others: Vec<[f64; 2]> = (0..6).map(|_| draw()).collect();
            let point = draw();
            let with = [others.clone(), vec![point]].concat();
            let reference = [0.0, 0.0];
            let gain = hypervolume(&with, reference) - hypervolume(&others, reference);
            let found = improvement(&front(others), point, reference);
            assert!((found - gain).abs() < 1e-9, "{found} {gain}");
        }
    }

    #[test]
    fn scores_are_quantiles_of_ranks() {
        assert!((quantile(0.975) - 1.959_964).abs() < 5e-4);
        assert!((quantile(0.1) + 1.281_552).abs() < 5e-4);
        let scores = normal_scores(&[5.0, -1.0, 5.0, 9.0]);
        assert!((scores[0] - 0.674_490).abs() < 5e-4 && scores[0] == scores[2]);
        assert!((scores[1] + 0.674_490).abs() < 5e-4 && scores[3] > 3.7);
    }

    #[test]
    fn signs_are_all_tried() {
        // Of eight sums only the found one, and those with the zero turned, are as large.
        assert!((sign_test(&[1.0, 2.0, 0.0]) - 0.25).abs() < 1e-12);
        assert!((sign_test(&[1.0, -1.0]) - 0.75).abs() < 1e-12);
    }

    #[test]
    fn searches_evaluate_no_point_twice() {
        let sizes = vec![2, 4, 4, 4];
        let genes: Vec<Vec<usize>> =
            (0..128).map(|n| vec![n % 2, n / 2 % 4, n / 8 % 4, n / 32]).collect();
        let outcomes = genes
            .iter()
            .map(|g| [-(g.iter().sum::<usize>() as f64), (g[1] as f64).sqrt() + 0.1 * g[2] as f64]);
        let space = Space { outcomes: outcomes.collect(), genes, sizes };
        for order in [
            space.at_random(&mut Seed(1).stream("search", &[])),
            space.guided(&mut Seed(1).stream("search", &[])),
            space.evolved(&mut Seed(1).stream("search", &[])),
        ] {
            let mut points = order.clone();
            points.sort_unstable();
            points.dedup();
            assert_eq!((order.len(), points.len()), (BUDGET, BUDGET));
            let shares = space.shares(&order);
            assert!(shares.windows(2).all(|pair| pair[0] <= pair[1]));
            assert!(shares[BUDGET - 1] <= 1.0);
        }
    }
}
