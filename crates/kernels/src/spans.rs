//! Where the documents of a batch begin and end in its flattened tokens.

use std::ops::Range;
use std::sync::Arc;

/// Holds the cumulative starts of documents: `[0, n1, n1 + n2, …]`.
///
/// A clone is a reference count.
///
/// ```
/// use retune_kernels::Spans;
/// let spans = Spans::new(vec![0, 3, 5])?;
/// assert_eq!(spans.iter().collect::<Vec<_>>(), [0..3, 3..5]);
/// assert_eq!(spans, Spans::from_lengths([3, 2]));
/// # Ok::<(), retune_kernels::SpansError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spans(Arc<[usize]>);

/// Says why a list of starts describes no documents.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpansError {
    /// The list is empty or begins elsewhere.
    #[error("spans must begin with 0, got {got:?}")]
    NotFromZero {
        /// The first number, if there is one.
        got: Option<usize>,
    },
    /// A start lies before the one ahead of it.
    #[error("spans must ascend: start {index} is {got}, below the {before} ahead of it")]
    Descending {
        /// Position of the offending start.
        index: usize,
        /// The start ahead of it.
        before: usize,
        /// The offending start.
        got: usize,
    },
}

impl Spans {
    /// Takes cumulative starts; the last is the number of tokens. Documents may be empty.
    ///
    /// # Errors
    /// [`SpansError`] when the list does not begin with 0 or descends.
    pub fn new(starts: impl Into<Arc<[usize]>>) -> Result<Self, SpansError> {
        let starts = starts.into();
        if starts.first() != Some(&0) {
            return Err(SpansError::NotFromZero { got: starts.first().copied() });
        }
        match starts.windows(2).position(|pair| pair[0] > pair[1]) {
            None => Ok(Self(starts)),
            Some(at) => Err(SpansError::Descending {
                index: at + 1,
                before: starts[at],
                got: starts[at + 1],
            }),
        }
    }

    /// Adds lengths up.
    pub fn from_lengths(lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut starts = vec![0];
        let mut end = 0;
        starts.extend(lengths.into_iter().map(|length| {
            end += length;
            end
        }));
        Self(starts.into())
    }

    /// Gives the number of documents.
    pub fn documents(&self) -> usize {
        self.0.len() - 1
    }

    /// Gives the number of tokens of all documents.
    pub fn tokens(&self) -> usize {
        self.0[self.0.len() - 1]
    }

    /// Gives the tokens of document `index`.
    ///
    /// # Panics
    /// When there is no such document.
    pub fn get(&self, index: usize) -> Range<usize> {
        self.0[index]..self.0[index + 1]
    }

    /// Iterates over the tokens of each document.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Range<usize>> + '_ {
        self.0.windows(2).map(|pair| pair[0]..pair[1])
    }

    /// Gives the cumulative starts.
    pub fn starts(&self) -> &[usize] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_that_descend_are_named() {
        let error = Spans::new(vec![0, 4, 2]).unwrap_err();
        assert_eq!(error, SpansError::Descending { index: 2, before: 4, got: 2 });
        assert_eq!(error.to_string(), "spans must ascend: start 2 is 2, below the 4 ahead of it");
    }

    #[test]
    fn starts_begin_with_zero() {
        assert_eq!(Spans::new(vec![]).unwrap_err(), SpansError::NotFromZero { got: None });
        assert_eq!(Spans::new(vec![1, 2]).unwrap_err(), SpansError::NotFromZero { got: Some(1) });
    }

    #[test]
    fn documents_may_be_empty() {
        let spans = Spans::new(vec![0, 0, 3, 3]).unwrap();
        assert_eq!((spans.documents(), spans.tokens()), (3, 3));
        assert_eq!(spans.get(1), 0..3);
        assert_eq!(spans, Spans::from_lengths([0, 3, 0]));
    }
}
