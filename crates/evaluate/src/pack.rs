//! Sequences laid into batches within a budget of tokens.

use std::ops::Range;

use crate::{Error, Result};
use retune_core::batch::Batch;
use retune_core::kernels::Spans;
use retune_core::model::Tuned;
use retune_core::spec::Head;

/// One sequence of a batch, or its part that a cache does not hold yet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece<'a> {
    /// The ids to read.
    pub(crate) tokens: &'a [u32],
    /// Position of the first of them.
    pub(crate) start: usize,
    /// The number messages call it by.
    pub(crate) row: usize,
    /// The task it belongs to, where the sequences of a batch say so.
    pub(crate) task: Option<usize>,
}

/// Lays pieces end to end, without targets.
pub(crate) fn lay(pieces: &[Piece<'_>]) -> Batch {
    let tokens: Vec<u32> = pieces.iter().flat_map(|piece| piece.tokens).copied().collect();
    Batch {
        spans: Spans::from_lengths(pieces.iter().map(|piece| piece.tokens.len())),
        positions: pieces
            .iter()
            .flat_map(|piece| piece.start..piece.start + piece.tokens.len())
            .collect(),
        pixels: Vec::new(),
        token_types: None,
        targets: vec![None; tokens.len()],
        classes: vec![None; pieces.len()],
        rows: pieces.iter().map(|piece| piece.row).collect(),
        tasks: pieces.iter().map(|piece| piece.task).collect(),
        tokens,
    }
}

/// Splits a list of lengths into runs of at most `budget` tokens, or of one sequence that alone
/// is longer.
pub(crate) fn within(lengths: &[usize], budget: usize) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut used = 0;
    for (place, length) in lengths.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if used + length <= budget => {
                run.end += 1;
                used += length;
            }
            _ => {
                runs.push(place..place + 1);
                used = *length;
            }
        }
    }
    runs
}

/// Returns the model's vocabulary and the longest sequence it can read behind what a method puts
/// before it, if it predicts the next token.
pub(crate) fn language_model(tuned: &Tuned<'_>) -> Result<(usize, usize)> {
    let spec = tuned.model.spec();
    if spec.causal && matches!(spec.head, Head::Language { .. }) {
        let room = spec.max_positions.saturating_sub(tuned.changes.num_positions());
        return Ok((spec.vocabulary, room));
    }
    Err(Error::Unsupported {
        what: format!("predicting the next token with {}", spec.class),
        help: "use a causal language model, or measure classes or vectors instead".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_keep_order_and_budget() {
        assert_eq!(within(&[3, 2, 5, 9, 1, 1], 5), [0..2, 2..3, 3..4, 4..6]);
        assert!(within(&[], 5).is_empty());
        assert_eq!(within(&[1, 1], 0), [0..1, 1..2]);
    }

    #[test]
    fn positions_go_on_where_the_cache_ends() {
        let batch = lay(&[
            Piece { tokens: &[7], start: 4, row: 2, task: None },
            Piece { tokens: &[8, 9], start: 0, row: 5, task: None },
        ]);
        assert_eq!(batch.tokens, [7, 8, 9]);
        assert_eq!(batch.positions, [4, 0, 1]);
        assert_eq!(batch.spans.iter().collect::<Vec<_>>(), [0..1, 1..3]);
        assert_eq!((batch.rows, batch.targets), (vec![2, 5], vec![None; 3]));
    }
}
