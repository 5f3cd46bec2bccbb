//! A batch as the model's blocks see it: with a method's virtual tokens before its documents.

use crate::batch::Batch;
use retune_kernels::Spans;

/// Where the rows of the states come from.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    /// Documents among the states, virtual tokens included.
    pub(crate) spans: Spans,
    /// Position of each row, `[states]`.
    pub(crate) positions: Vec<usize>,
    /// The position of a document's first row.
    pub(crate) prefix: usize,
    /// The row of each token of the batch; nothing where all rows are tokens.
    tokens: Option<Vec<usize>>,
}

impl Layout {
    /// Lays `num_virtual` rows before each document that begins in this pass.
    ///
    /// Positions of a document start behind its `prefix` of keys that take positions too. The
    /// first `begun` documents continue what a cache holds, and have their virtual tokens there.
    pub(crate) fn new(batch: &Batch, num_virtual: usize, prefix: usize, begun: usize) -> Self {
        let shift = num_virtual + prefix;
        let new = |document: usize| if document < begun { 0 } else { num_virtual };
        let lengths =
            batch.spans.iter().enumerate().map(|(document, span)| new(document) + span.len());
        let mut positions = Vec::with_capacity(batch.num_tokens());
        let mut tokens = Vec::new();
        for (document, span) in batch.spans.iter().enumerate() {
            positions.extend(prefix..prefix + new(document));
            tokens.extend(positions.len()..positions.len() + span.len());
            positions.extend(batch.positions[span].iter().map(|position| position + shift));
        }
        let tokens = (positions.len() > batch.num_tokens()).then_some(tokens);
        Self { spans: Spans::from_lengths(lengths), positions, prefix, tokens }
    }

    /// Returns the row of each token of the batch, or nothing where row `i` is token `i`.
    pub(crate) fn tokens(&self) -> Option<&[usize]> {
        self.tokens.as_deref()
    }

    /// Spreads values of the batch's tokens over the rows, `empty` at virtual tokens.
    pub(crate) fn spread<T: Clone>(&self, values: &[T], empty: T) -> Vec<T> {
        let Some(tokens) = &self.tokens else { return values.to_vec() };
        let mut rows = vec![empty; self.positions.len()];
        for (row, value) in tokens.iter().zip(values) {
            rows[*row] = value.clone();
        }
        rows
    }

    /// Returns, for each row, its place in `[virtual tokens of all new documents; tokens]`.
    ///
    /// # Shapes
    /// - returns: `[states]`, or nothing where there are no virtual tokens
    pub(crate) fn gather(&self) -> Option<Vec<usize>> {
        let tokens = self.tokens.as_ref()?;
        let mut is_token = vec![false; self.positions.len()];
        for row in tokens {
            is_token[*row] = true;
        }
        let num_virtual = self.positions.len() - tokens.len();
        let (mut next_virtual, mut next_token) = (0, num_virtual);
        let place = |is_token: bool| {
            let next = if is_token { &mut next_token } else { &mut next_virtual };
            *next += 1;
            *next - 1
        };
        Some(is_token.into_iter().map(place).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Document;

    fn batch() -> Batch {
        let document = |tokens: &[u32]| Document {
            tokens: tokens.to_vec(),
            learn: vec![true; tokens.len()],
            ..Document::default()
        };
        Batch::new(&[document(&[7, 8, 9]), document(&[5])]).unwrap()
    }

    #[test]
    fn virtual_tokens_stand_before_each_document() {
        let layout = Layout::new(&batch(), 2, 0, 0);
        assert_eq!(layout.spans.iter().collect::<Vec<_>>(), [0..5, 5..8]);
        assert_eq!(layout.positions, [0, 1, 2, 3, 4, 0, 1, 2]);
        assert_eq!(layout.tokens(), Some(&[2, 3, 4, 7][..]));
        assert_eq!(layout.spread(&[1, 2, 3, 4], 0), [0, 0, 1, 2, 3, 0, 0, 4]);
        // Rows 0 to 3 are the virtual tokens of both documents, 4 to 7 the words.
        assert_eq!(layout.gather().unwrap(), [0, 1, 4, 5, 6, 2, 3, 7]);
    }

    #[test]
    fn a_prefix_takes_positions_but_no_rows() {
        let layout = Layout::new(&batch(), 0, 3, 0);
        assert_eq!(layout.positions, [3, 4, 5, 3]);
        assert_eq!(layout.tokens(), None);
        assert_eq!(layout.spread(&[1, 2, 3, 4], 0), [1, 2, 3, 4]);
    }

    #[test]
    fn a_document_that_goes_on_keeps_its_place_without_new_rows() {
        let mut batch = batch();
        batch.positions = vec![4, 5, 6, 0];
        let layout = Layout::new(&batch, 2, 1, 1);
        assert_eq!(layout.positions, [7, 8, 9, 1, 2, 3]);
        assert_eq!(layout.tokens(), Some(&[0, 1, 2, 5][..]));
    }
}
