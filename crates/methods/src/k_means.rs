//! Clusters of vectors by Lloyd's algorithm, begun and ended as scikit-learn does, so that clusters
//! another library made of the same vectors can be made again.

use crate::torch::TorchGenerator;

/// Returns the cluster of each of `n` vectors, from 0; every cluster has at least one.
///
/// Begins at vectors drawn by NumPy's `RandomState(seed)` and ends after `most_rounds`, when no vector
/// moves, or when the centres moved by less than 10⁻⁴ of the vectors' mean variance.
///
/// # Shapes
/// - `vectors`: `[n, width]`
pub fn k_means(
    vectors: &[f64],
    width: usize,
    num_clusters: usize,
    most_rounds: usize,
    seed: u64,
) -> Vec<i32> {
    let n = vectors.len() / width.max(1);
    // Distances are between differences from the mean, which is what rounding is smallest for.
    let mean = |column: usize| vectors.iter().skip(column).step_by(width).sum::<f64>() / n as f64;
    let means: Vec<f64> = (0..width).map(mean).collect();
    let vectors: Vec<f64> =
        vectors.iter().enumerate().map(|(place, value)| value - means[place % width]).collect();
    let tolerance = vectors.iter().map(|v| v * v).sum::<f64>() / vectors.len().max(1) as f64 * 1e-4;
    let row = |index: usize| &vectors[index * width..(index + 1) * width];
    let seeds = choose(n, num_clusters, &mut TorchGenerator::new(seed));
    let mut centres: Vec<f64> = seeds.iter().flat_map(|index| row(*index).to_vec()).collect();
    let mut clusters = nearest(&vectors, &centres, width);
    for round in 0..most_rounds {
        if round > 0 {
            let next = nearest(&vectors, &centres, width);
            if next == clusters {
                return clusters;
            }
            clusters = next;
        }
        fill_empty(&vectors, &centres, width, num_clusters, &mut clusters);
        let mut sums = vec![0.0; num_clusters * width];
        let mut counts = vec![0.0; num_clusters];
        for (index, cluster) in clusters.iter().enumerate() {
            let cluster = *cluster as usize;
            counts[cluster] += 1.0;
            let sum = &mut sums[cluster * width..(cluster + 1) * width];
            sum.iter_mut().zip(row(index)).for_each(|(sum, value)| *sum += value);
        }
        sums.iter_mut().enumerate().for_each(|(place, sum)| *sum /= counts[place / width]);
        let moved: f64 = sums.iter().zip(&centres).map(|(new, old)| (new - old).powi(2)).sum();
        centres = sums;
        if moved <= tolerance {
            break;
        }
    }
    let mut last = nearest(&vectors, &centres, width);
    fill_empty(&vectors, &centres, width, num_clusters, &mut last);
    last
}

/// Draws different numbers below `n`, as `RandomState.choice(n, count, replace=False, p)` with equal
/// chances.
fn choose(n: usize, count: usize, generator: &mut TorchGenerator) -> Vec<usize> {
    let mut found: Vec<usize> = Vec::with_capacity(count);
    while found.len() < count.min(n) {
        let left: Vec<usize> = (0..n).filter(|index| !found.contains(index)).collect();
        let draws: Vec<f64> = (found.len()..count).map(|_| generator.double()).collect();
        for draw in draws {
            // The first whose share of the sum is above the draw.
            let index = left[((draw * left.len() as f64) as usize).min(left.len() - 1)];
            if !found.contains(&index) {
                found.push(index);
            }
        }
    }
    found
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| (x - y).powi(2)).sum()
}

/// Returns the nearest centre of each vector, the first of equals.
fn nearest(vectors: &[f64], centres: &[f64], width: usize) -> Vec<i32> {
    let of = |vector: &[f64]| {
        let mut best = (f64::INFINITY, 0);
        for (index, centre) in centres.chunks_exact(width).enumerate() {
            let distance = distance(vector, centre);
            if distance < best.0 {
                best = (distance, index);
            }
        }
        best.1 as i32
    };
    vectors.chunks_exact(width).map(of).collect()
}

/// Gives each empty cluster the vector that is farthest from its centre.
fn fill_empty(
    vectors: &[f64],
    centres: &[f64],
    width: usize,
    num_clusters: usize,
    clusters: &mut [i32],
) {
    for empty in 0..num_clusters as i32 {
        if clusters.contains(&empty) {
            continue;
        }
        let count = |cluster: i32| clusters.iter().filter(|other| **other == cluster).count();
        let apart = |index: usize| {
            let cluster = clusters[index] as usize;
            let centre = &centres[cluster * width..(cluster + 1) * width];
            distance(&vectors[index * width..(index + 1) * width], centre)
        };
        let others = (0..clusters.len()).filter(|index| count(clusters[*index]) > 1);
        let farthest = others.max_by(|a, b| apart(*a).total_cmp(&apart(*b)));
        if let Some(index) = farthest {
            clusters[index] = empty;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_heaps_are_told_apart_wherever_it_begins() {
        let heaps = [0.0, 0.1, 0.2, 9.0, 9.1];
        for seed in 0..20 {
            let found = k_means(&heaps, 1, 2, 10, seed);
            assert!(found[0] == found[1] && found[1] == found[2] && found[3] == found[4]);
            assert_ne!(found[0], found[3], "{found:?}");
        }
    }

    #[test]
    fn the_beginning_is_numpys() {
        // What NumPy 2.4 prints for `RandomState(s).choice(n, k, replace=False, p=ones(n) / n)`.
        let found = |n, count| choose(n, count, &mut TorchGenerator::new(123_456_789));
        assert_eq!(found(64, 5), [34, 32, 45, 16, 49]);
        assert_eq!(found(8, 6), [4, 5, 2, 6, 7, 0]);
    }

    #[test]
    fn no_cluster_is_empty_even_among_equal_vectors() {
        let found = k_means(&[1.0; 4], 1, 3, 10, 1);
        let mut seen = found.clone();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, [0, 1, 2], "{found:?}");
    }
}
