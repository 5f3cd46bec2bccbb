//! Which values are the largest, found in two passes without holding or sorting them.

use crate::Result;

/// A magnitude's place in the order: the bits of a float without its sign grow with its size.
pub(crate) fn key(x: f32) -> u32 {
    x.to_bits() & 0x7fff_ffff
}

/// Where the largest `k` magnitudes end. Among equal ones the lower index comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cut {
    /// Keys above this are among the largest.
    pub(crate) threshold: u32,
    /// How many of those at the threshold are too.
    pub(crate) ties: usize,
    /// How many are at the threshold in all.
    pub(crate) equal: usize,
}

impl Cut {
    const NONE: Self = Self { threshold: u32::MAX, ties: 0, equal: 0 };
}

/// Goes over values: calls its argument with a lane and the next values of that lane.
pub(crate) type Sweep<'a> = &'a mut dyn FnMut(&mut dyn FnMut(usize, &[f32])) -> Result<()>;

const BINS: usize = 1 << 16;

/// Finds the cuts of several `(lane, k)` among `n` values per lane, in two sweeps.
pub(crate) fn largest(wanted: &[(usize, usize)], n: usize, sweep: Sweep<'_>) -> Result<Vec<Cut>> {
    let num_lanes = wanted.iter().map(|(lane, _)| lane + 1).max().unwrap_or(0);
    if n == 0 || wanted.iter().all(|(_, k)| *k == 0) {
        return Ok(vec![Cut::NONE; wanted.len()]);
    }
    let mut high = vec![vec![0_u32; BINS]; num_lanes];
    sweep(&mut |lane, values| {
        if let Some(bins) = high.get_mut(lane) {
            for x in values {
                bins[(key(*x) >> 16) as usize] += 1;
            }
        }
    })?;
    // The upper half of each threshold, and how many of that half are wanted.
    let upper: Vec<(usize, usize)> =
        wanted.iter().map(|(lane, k)| descend(&high[*lane], (*k).min(n))).collect();
    let mut low = vec![vec![0_u32; BINS]; wanted.len()];
    sweep(&mut |lane, values| {
        for (((wanted, _), (half, _)), bins) in wanted.iter().zip(&upper).zip(&mut low) {
            if *wanted == lane {
                let matching =
                    values.iter().map(|x| key(*x)).filter(|key| (key >> 16) as usize == *half);
                matching.for_each(|key| bins[(key & 0xffff) as usize] += 1);
            }
        }
    })?;
    let cut = |i: usize| {
        if wanted[i].1 == 0 {
            return Cut::NONE;
        }
        let (half, rest) = upper[i];
        let (lower, ties) = descend(&low[i], rest);
        Cut { threshold: (half << 16 | lower) as u32, ties, equal: low[i][lower] as usize }
    };
    Ok((0..wanted.len()).map(cut).collect())
}

/// Walks down from the highest bin until `k` are passed; returns the bin and how many of it count.
fn descend(bins: &[u32], k: usize) -> (usize, usize) {
    let mut rest = k;
    for (i, count) in bins.iter().enumerate().rev() {
        if *count as usize >= rest {
            return (i, rest);
        }
        rest -= *count as usize;
    }
    (0, rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cuts(values: &[f32], ks: &[usize]) -> Vec<Cut> {
        let wanted: Vec<_> = ks.iter().map(|k| (0, *k)).collect();
        let sweep = &mut |visit: &mut dyn FnMut(usize, &[f32])| {
            values.chunks(2).for_each(|part| visit(0, part));
            Ok(())
        };
        largest(&wanted, values.len(), sweep).unwrap()
    }

    #[test]
    fn cuts_agree_with_sorting() {
        let values = [0.5, -3.0, 2.0, -2.0, 0.0, 2.0, 1e-30, -0.5];
        let mut sorted: Vec<f32> = values.iter().map(|x: &f32| x.abs()).collect();
        sorted.sort_by(|a, b| b.total_cmp(a));
        for k in 1..=values.len() {
            let cut = cuts(&values, &[k])[0];
            let above = values.iter().filter(|x| key(**x) > cut.threshold).count();
            assert_eq!(f32::from_bits(cut.threshold), sorted[k - 1], "{k}");
            assert_eq!(above + cut.ties, k);
            assert_eq!(cut.equal, values.iter().filter(|x| key(**x) == cut.threshold).count());
        }
        let both = cuts(&values, &[2, 0, 99]);
        assert_eq!(both[0], Cut { threshold: 2.0_f32.to_bits(), ties: 1, equal: 3 });
        assert_eq!(both[1], Cut::NONE);
        assert_eq!(both[2].threshold, 0);
    }
}
