//! Which blocks are kept, which train, and which runs at each place.

use std::ops::Range;

use retune_core::{Error, Result};
use serde::{Deserialize, Serialize};

/// What runs in place of a removed block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Share {
    /// The nearest block that was kept; of a trained one its values before training.
    All,
    /// The nearest block that was kept and does not train.
    Frozen,
    /// Nothing: the stand-in is shallower.
    None,
}

/// The blocks of a stand-in, by their number in the whole model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocks {
    /// Blocks of the whole model.
    pub depth: usize,
    /// What is stored, ascending.
    pub kept: Vec<usize>,
    /// Of these, what trains.
    pub trainable: Vec<usize>,
    /// Which runs at each place.
    pub order: Vec<usize>,
    /// What runs in place of a removed one.
    pub share: Share,
}

fn wrong(setting: &str, expected: String, found: String) -> Error {
    Error::Setting {
        setting: setting.to_owned(),
        what: "no emulator can be made".to_owned(),
        expected,
        found,
        help: "keep between a third and three quarters of the blocks, and train 2 to 8".to_owned(),
    }
}

impl Blocks {
    /// Chooses blocks by the similarity of their outputs, `[block][block]`: `num_clusters` are kept,
    /// `num_trainable` of them, evenly spread, train.
    ///
    /// # Errors
    /// [`Error::Setting`] if there are more clusters than blocks, or fewer than trainable ones.
    pub fn choose(
        similarity: &[Vec<f64>],
        num_clusters: usize,
        num_trainable: usize,
        share: Share,
    ) -> Result<(Self, Vec<Range<usize>>)> {
        let depth = similarity.len();
        if !(1..=depth).contains(&num_clusters) {
            return Err(wrong("clusters", format!("1 to {depth}"), num_clusters.to_string()));
        }
        if !(2..=num_clusters).contains(&num_trainable) {
            let expected = format!("2 to {num_clusters}, the number of clusters");
            return Err(wrong("trainable", expected, num_trainable.to_string()));
        }
        let clusters = clusters(similarity, num_clusters);
        let kept: Vec<usize> = clusters.iter().map(|c| c.start + c.len() / 2).collect();
        let place = |i: usize| (i * (num_clusters - 1)).div_ceil(num_trainable - 1);
        let trainable = (0..num_trainable).map(|i| kept[place(i)]).collect();
        Ok((Self::with_order(depth, kept, trainable, share)?, clusters))
    }

    /// Takes lists a person wrote: blocks that train, and blocks that are kept frozen.
    ///
    /// # Errors
    /// [`Error::Setting`] for a block that does not exist, stands twice or in both lists.
    pub fn given(
        depth: usize,
        trainable: &[usize],
        frozen: &[usize],
        share: Share,
    ) -> Result<Self> {
        let mut kept: Vec<usize> = trainable.iter().chain(frozen).copied().collect();
        kept.sort_unstable();
        if let Some(block) = kept.iter().find(|block| **block >= depth) {
            return Err(wrong("blocks", format!("0 to {}", depth - 1), block.to_string()));
        }
        if let Some([block, _]) = kept.array_windows().find(|[a, b]| a == b) {
            return Err(wrong("blocks", "each at most once".to_owned(), format!("{block} twice")));
        }
        if trainable.is_empty() {
            return Err(wrong("train", "at least one block".to_owned(), "none".to_owned()));
        }
        let mut trainable = trainable.to_vec();
        trainable.sort_unstable();
        Self::with_order(depth, kept, trainable, share)
    }

    fn with_order(
        depth: usize,
        kept: Vec<usize>,
        trainable: Vec<usize>,
        share: Share,
    ) -> Result<Self> {
        let candidates: Vec<usize> = kept
            .iter()
            .copied()
            .filter(|block| share == Share::All || !trainable.contains(block))
            .collect();
        let order = match share {
            Share::None => kept.clone(),
            Share::All | Share::Frozen => (0..depth)
                .map(|place| {
                    if kept.contains(&place) {
                        return Some(place);
                    }
                    // Of two that are equally near the later.
                    candidates.iter().rev().copied().min_by_key(|block| block.abs_diff(place))
                })
                .collect::<Option<Vec<usize>>>()
                .ok_or_else(|| {
                    let expected = "a kept block that does not train".to_owned();
                    wrong("share", expected, "only trainable ones".to_owned())
                })?,
        };
        Ok(Self { depth, kept, trainable, order, share })
    }

    /// Returns the place at which each block of the whole model is itself.
    pub fn own_places(&self) -> Vec<Option<usize>> {
        let place = |block: usize| match self.share {
            Share::None => self.order.iter().position(|known| *known == block),
            Share::All | Share::Frozen => self.kept.contains(&block).then_some(block),
        };
        (0..self.depth).map(place).collect()
    }

    /// Returns the number a block of the whole model has in the stand-in.
    pub fn stored(&self, block: usize) -> Option<usize> {
        self.kept.iter().position(|kept| *kept == block)
    }
}

/// Merges the two neighbouring clusters whose border is the most alike, until `count` are left.
///
/// A border is as alike as the last block before it and the first behind it; of equal ones the
/// earlier goes first.
fn clusters(similarity: &[Vec<f64>], count: usize) -> Vec<Range<usize>> {
    let mut clusters: Vec<Range<usize>> = (0..similarity.len()).map(|i| i..i + 1).collect();
    while clusters.len() > count {
        let alike =
            |border: usize| similarity[clusters[border].end - 1][clusters[border + 1].start];
        let better = |best: usize, border: usize| {
            if alike(border) > alike(best) { border } else { best }
        };
        let border = (0..clusters.len() - 1).fold(0, better);
        let right = clusters.remove(border + 1);
        clusters[border].end = right.end;
    }
    clusters
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Similarities of neighbours; all others are 1, which must not matter.
    fn neighbours(values: &[f64]) -> Vec<Vec<f64>> {
        let count = values.len() + 1;
        let of = |i: usize, j: usize| if i + 1 == j { values[i] } else { 1.0 };
        (0..count).map(|i| (0..count).map(|j| of(i.min(j), i.max(j))).collect()).collect()
    }

    #[test]
    fn the_most_alike_neighbours_are_merged() {
        let similarity = neighbours(&[0.5, 0.9, 0.8, 0.2, 0.9, 0.9]);
        // 0.9 three times, then 0.8: 0 | 1 2 3 | 4 5 6.
        let found = clusters(&similarity, 3);
        assert_eq!(found, [0..1, 1..4, 4..7]);
        let (blocks, _) = Blocks::choose(&similarity, 3, 2, Share::All).unwrap();
        assert_eq!(
            (blocks.kept.as_slice(), blocks.trainable.as_slice()),
            (&[0, 2, 5][..], &[0, 5][..])
        );
        // 1 lies between 0 and 2, 4 nearer to 5; 3 nearer to 2.
        assert_eq!(blocks.order, [0, 2, 2, 2, 5, 5, 5]);
        let frozen = Blocks::choose(&similarity, 3, 2, Share::Frozen).unwrap().0;
        assert_eq!(frozen.order, [0, 2, 2, 2, 2, 5, 2]);
        let none = Blocks::choose(&similarity, 3, 2, Share::None).unwrap().0;
        assert_eq!(none.order, [0, 2, 5]);
        assert_eq!(none.own_places(), [Some(0), None, Some(1), None, None, Some(2), None]);
        assert_eq!(blocks.own_places()[5], Some(5));
    }

    #[test]
    fn the_papers_lists_come_out() {
        // OPT-1.3B: of 24 layers these were kept; 0, 5, 18 and 23 were trained.
        let kept = [0, 1, 2, 3, 5, 9, 12, 15, 18, 20, 22, 23];
        let place = |i: usize| kept[(i * 11).div_ceil(3)];
        assert_eq!([0, 1, 2, 3].map(place), [0, 5, 18, 23]);
        let frozen = [1, 2, 3, 9, 12, 15, 20, 22];
        let blocks = Blocks::given(24, &[0, 5, 18, 23], &frozen, Share::All).unwrap();
        assert_eq!(blocks.kept, kept);
        assert_eq!(blocks.order[..8], [0, 1, 2, 3, 5, 5, 5, 9]);
    }

    #[test]
    fn impossible_lists_and_numbers_are_refused() {
        let similarity = neighbours(&[0.5; 5]);
        for (clusters, trainable) in [(0, 2), (7, 2), (3, 4), (3, 1)] {
            assert!(Blocks::choose(&similarity, clusters, trainable, Share::All).is_err());
        }
        for (train, frozen) in
            [(&[0, 6][..], &[1][..]), (&[0, 0], &[1]), (&[0, 1], &[1]), (&[], &[1])]
        {
            assert!(Blocks::given(6, train, frozen, Share::All).is_err(), "{train:?} {frozen:?}");
        }
        assert!(Blocks::given(6, &[0, 1], &[], Share::Frozen).is_err());
    }
}
