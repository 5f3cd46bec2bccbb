//! What state changes keep of the text before, while a model reads it piece by piece.

use std::collections::BTreeMap;

use crate::parameters::ParameterId;
use retune_kernels::Spans;
use tensor::Tensor;

/// Earlier rows of each document, by the parameter whose change keeps them.
#[derive(Debug, Default)]
pub(crate) struct History(BTreeMap<ParameterId, Vec<Tensor<2>>>);

impl History {
    /// Appends each document's new rows to those kept, and returns all of them.
    ///
    /// # Shapes
    /// - `rows`: `[tokens, width]`, as `spans` lay them
    /// - returns: `[all tokens, width]` and where each document begins among them
    pub(crate) fn extend(
        &mut self,
        key: ParameterId,
        rows: &Tensor<2>,
        spans: &Spans,
    ) -> (Tensor<2>, Spans) {
        let documents = self.0.entry(key).or_default();
        for (place, span) in spans.iter().enumerate() {
            let new = rows.clone().narrow(0, span.start, span.len());
            match documents.get_mut(place) {
                Some(old) => *old = Tensor::cat(vec![old.clone(), new], 0),
                None => documents.push(new),
            }
        }
        let spans = Spans::from_lengths(documents.iter().map(|rows| rows.dims()[0]));
        (Tensor::cat(documents.clone(), 0), spans)
    }

    /// Keeps only the documents whose place is in `keep`, in that order.
    pub(crate) fn select(&mut self, keep: &[usize]) {
        for documents in self.0.values_mut() {
            *documents = keep.iter().map(|place| documents[*place].clone()).collect();
        }
    }
}
