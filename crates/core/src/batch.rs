//! One batch: documents laid end to end, without padding.

use crate::error::{Error, Result};
use retune_kernels::Spans;

/// Documents laid end to end.
///
/// There is no padding in retune: the tokens of all documents lie in one row of length `N`, and
/// [`Spans`] say where each begins. Attention and positions never cross a border, so a packed
/// row and the same documents one by one give the same numbers.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Token ids, `[N]`.
    pub tokens: Vec<u32>,
    /// Where each document begins and ends.
    pub spans: Spans,
    /// Position of each token in its document, `[N]`.
    pub positions: Vec<usize>,
    /// Token types (segments) of encoders, `[N]`; zeros where absent.
    pub token_types: Option<Vec<u32>>,
    /// What each token should predict, `[N]`: for language models the *next* token of the same
    /// document where that one is learned, else nothing.
    pub targets: Vec<Option<u32>>,
    /// The class of each document, for classifiers.
    pub classes: Vec<Option<u32>>,
    /// Where each document came from (row numbers of the data), for messages.
    pub rows: Vec<usize>,
}

/// One document before it is laid into a [`Batch`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Document {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Whether each token is learned, i.e. predicted by the one before it.
    pub learn: Vec<bool>,
    /// Token types, where the model has them.
    pub token_types: Option<Vec<u32>>,
    /// The document's class, for classifiers.
    pub class: Option<u32>,
    /// Row number in the data.
    pub row: usize,
}

impl Batch {
    /// Lays documents end to end.
    ///
    /// # Errors
    /// [`Error::Input`] if a document is empty or `learn` has another length than `tokens`.
    pub fn new(documents: &[Document]) -> Result<Self> {
        let total = documents.iter().map(|d| d.tokens.len()).sum();
        let mut batch = Self {
            tokens: Vec::with_capacity(total),
            spans: Spans::from_lengths(documents.iter().map(|d| d.tokens.len())),
            positions: Vec::with_capacity(total),
            token_types: None,
            targets: Vec::with_capacity(total),
            classes: Vec::with_capacity(documents.len()),
            rows: Vec::with_capacity(documents.len()),
        };
        let typed = documents.iter().any(|d| d.token_types.is_some());
        let mut types = Vec::new();
        for document in documents {
            let length = document.tokens.len();
            if length == 0 || document.learn.len() != length {
                return Err(Error::Input {
                    what: format!("row {} cannot be laid into a batch", document.row),
                    expected: "at least one token, and one learn mark for each".to_owned(),
                    found: format!("{length} tokens, {} marks", document.learn.len()),
                    help: "drop empty rows before batching".to_owned(),
                });
            }
            batch.tokens.extend(&document.tokens);
            batch.positions.extend(0..length);
            batch.targets.extend((0..length).map(|t| {
                (t + 1 < length && document.learn[t + 1]).then(|| document.tokens[t + 1])
            }));
            if typed {
                match &document.token_types {
                    Some(row) => types.extend(row.iter().copied()),
                    None => types.extend(std::iter::repeat_n(0, length)),
                }
            }
            batch.classes.push(document.class);
            batch.rows.push(document.row);
        }
        batch.token_types = typed.then_some(types);
        Ok(batch)
    }

    /// Returns the number of tokens.
    pub fn num_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Returns how many labels carry a loss: learned tokens, or classified documents.
    pub fn num_labels(&self, head: &crate::spec::Head) -> usize {
        match head {
            crate::spec::Head::Language { .. } => self.targets.iter().flatten().count(),
            _ => self.classes.iter().flatten().count(),
        }
    }

    /// Checks that a model of this vocabulary and length can read the batch.
    ///
    /// # Errors
    /// [`Error::Input`] that names the row of the first token or document that does not fit.
    pub fn check(&self, spec: &crate::spec::ModelSpec) -> Result<()> {
        for (index, span) in self.spans.iter().enumerate() {
            let row = self.rows.get(index).copied().unwrap_or(index);
            if let Some(token) =
                self.tokens[span.clone()].iter().find(|t| **t as usize >= spec.vocabulary)
            {
                return Err(Error::Input {
                    what: format!("row {row} has a token the model does not know"),
                    expected: format!("ids below {}", spec.vocabulary),
                    found: token.to_string(),
                    help: "the tokenizer belongs to another model; use the one beside the weights"
                        .to_owned(),
                });
            }
            let last = self.positions[span].iter().max().copied().unwrap_or(0);
            if last >= spec.max_positions {
                return Err(Error::Input {
                    what: format!("row {row} is longer than the model can read"),
                    expected: format!("at most {} tokens", spec.max_positions),
                    found: format!("{} tokens", last + 1),
                    help: "set a smaller `data.max_length`, or split the row".to_owned(),
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(tokens: &[u32], learn: &[u8], row: usize) -> Document {
        Document {
            tokens: tokens.to_vec(),
            learn: learn.iter().map(|l| *l == 1).collect(),
            row,
            ..Document::default()
        }
    }

    #[test]
    fn targets_are_the_next_token_of_the_same_document() {
        let batch =
            Batch::new(&[document(&[5, 6, 7], &[0, 1, 1], 0), document(&[8, 9], &[1, 1], 1)])
                .unwrap();
        // 7 ends its document: it must not learn to predict 8.
        assert_eq!(batch.targets, [Some(6), Some(7), None, Some(9), None]);
        assert_eq!(batch.positions, [0, 1, 2, 0, 1]);
        assert_eq!(batch.spans.iter().collect::<Vec<_>>(), [0..3, 3..5]);
    }

    #[test]
    fn an_empty_document_is_refused() {
        let error = Batch::new(&[document(&[], &[], 17)]).unwrap_err();
        assert!(error.to_string().contains("row 17"), "{error}");
    }
}
