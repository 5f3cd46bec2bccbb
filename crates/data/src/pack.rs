//! Packing: several documents in one row, so that short ones do not waste a batch on padding.
//!
//! Documents keep their identity: the model gets each row's documents apart, with attention and
//! positions inside each, so a packed row learns what its documents would learn alone.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Documents that share one row of a batch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackedRow {
    /// Numbers of the documents, ascending.
    pub documents: Vec<u32>,
    /// Tokens of all of them.
    pub tokens: u32,
}

/// Packs documents into rows of at most `max_tokens` by best-fit decreasing: the longest document
/// first, each into the fullest row that still has room.
///
/// # Errors
/// [`Error::Setting`] when a document is longer than a row.
/// # Cost and determinism
/// `O(n log n)`; the same lengths give the same rows.
/// # Source
/// Ding et al., <https://arxiv.org/abs/2404.10830>.
/// # Examples
/// ```
/// # use retune_data::pack::pack;
/// let rows = pack(&[5, 3, 4, 2, 1], 8)?;
/// let documents: Vec<_> = rows.iter().map(|row| row.documents.as_slice()).collect();
/// assert_eq!(documents, [&[0, 1][..], &[2, 3, 4]]);
/// # Ok::<(), retune_data::Error>(())
/// ```
pub fn pack(lengths: &[u32], max_tokens: u32) -> Result<Vec<PackedRow>> {
    let mut by_length: Vec<u32> = (0..lengths.len() as u32).collect();
    by_length.sort_by_key(|&document| (std::cmp::Reverse(lengths[document as usize]), document));
    let mut rows: Vec<PackedRow> = Vec::new();
    // Room left and row, for every row: the first entry at or above a length is the best fit.
    let mut room: BTreeSet<(u32, u32)> = BTreeSet::new();
    for document in by_length {
        let tokens = lengths[document as usize];
        if tokens > max_tokens {
            return Err(Error::Setting {
                setting: "max_tokens",
                problem: format!(
                    "document {document} has {tokens} tokens and does not fit a row of {max_tokens}"
                ),
                hint: "cut documents to the length of a row".to_owned(),
            });
        }
        let best = room.range((tokens, 0)..).next().copied();
        let (left, row) = if let Some(entry) = best {
            room.remove(&entry);
            entry
        } else {
            rows.push(PackedRow { documents: Vec::new(), tokens: 0 });
            (max_tokens, rows.len() as u32 - 1)
        };
        let packed = &mut rows[row as usize];
        packed.documents.push(document);
        packed.tokens += tokens;
        room.insert((left - tokens, row));
    }
    for row in &mut rows {
        row.documents.sort_unstable();
    }
    Ok(rows)
}

/// One row for each document.
pub fn unpacked(lengths: &[u32]) -> Vec<PackedRow> {
    let row =
        |(document, &tokens): (usize, &u32)| PackedRow { documents: vec![document as u32], tokens };
    lengths.iter().enumerate().map(row).collect()
}

/// How rows are put into batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Batching {
    /// A number of rows.
    Rows(usize),
    /// As many rows as fit a number of tokens when all are padded to the longest of them; at least
    /// one.
    Tokens(usize),
}

/// Puts rows, in the order given, into batches. The last may be smaller.
///
/// # Errors
/// [`Error::Setting`] when a batch would hold nothing.
pub fn batches(
    order: impl IntoIterator<Item = usize>,
    rows: &[PackedRow],
    batching: Batching,
) -> Result<Vec<Vec<usize>>> {
    let (Batching::Rows(size) | Batching::Tokens(size)) = batching;
    if size == 0 {
        return Err(Error::Setting {
            setting: "batch size",
            problem: "0 leaves batches empty".to_owned(),
            hint: "set at least 1".to_owned(),
        });
    }
    let mut out: Vec<Vec<usize>> = Vec::new();
    let mut longest = 0;
    for row in order {
        let tokens = rows[row].tokens as usize;
        let fits = out.last().is_some_and(|batch| match batching {
            Batching::Rows(size) => batch.len() < size,
            Batching::Tokens(size) => longest.max(tokens) * (batch.len() + 1) <= size,
        });
        if let Some(batch) = out.last_mut().filter(|_| fits) {
            batch.push(row);
            longest = longest.max(tokens);
        } else {
            out.push(vec![row]);
            longest = tokens;
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn documents(rows: &[PackedRow]) -> Vec<Vec<u32>> {
        rows.iter().map(|row| row.documents.clone()).collect()
    }

    #[test]
    fn takes_the_fullest_row_with_room() {
        // 6 | 5 | 4 opens a third (room 4, 5, 6); 4 fits best with 6, then 3 with 5, then 1.
        let rows = pack(&[6, 5, 4, 3, 1], 10).unwrap();
        assert_eq!(documents(&rows), [vec![0, 2], vec![1, 3, 4]]);
        assert_eq!(rows[1].tokens, 9);
    }

    #[test]
    fn documents_longer_than_a_row_are_refused() {
        assert!(pack(&[3, 11], 10).unwrap_err().to_string().contains("document 1 has 11 tokens"));
        assert!(pack(&[], 10).unwrap().is_empty());
    }

    #[test]
    fn batches_of_rows_and_of_tokens() {
        let rows = unpacked(&[3, 5, 2, 9, 1]);
        assert_eq!(
            batches([4, 0, 1, 2, 3], &rows, Batching::Rows(2)).unwrap(),
            [vec![4, 0], vec![1, 2], vec![3]]
        );
        // 2·3 ≤ 9; with 5 it would be 15. 2·5 > 9 alone. 9 alone.
        assert_eq!(
            batches([4, 0, 1, 2, 3], &rows, Batching::Tokens(9)).unwrap(),
            [vec![4, 0], vec![1], vec![2], vec![3]]
        );
        // A row above the budget still gets its batch.
        assert_eq!(batches([3], &rows, Batching::Tokens(2)).unwrap(), [vec![3]]);
        assert!(batches([3], &rows, Batching::Rows(0)).is_err());
    }

    proptest! {
        #[test]
        fn every_document_once_and_no_row_too_full(
            lengths in proptest::collection::vec(0u32..=64, 0..200),
        ) {
            let rows = pack(&lengths, 64).unwrap();
            let mut seen: Vec<u32> = rows.iter().flat_map(|r| r.documents.clone()).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len() as u32).collect::<Vec<_>>());
            for row in &rows {
                let tokens: u32 = row.documents.iter().map(|&d| lengths[d as usize]).sum();
                prop_assert_eq!(tokens, row.tokens);
                prop_assert!(tokens <= 64 && !row.documents.is_empty());
            }
            // No two rows could be joined: best-fit never opens a row in vain.
            let half_empty = rows.iter().filter(|r| r.tokens <= 32).count();
            prop_assert!(half_empty <= 1);
        }

        #[test]
        fn every_row_is_in_one_batch(
            lengths in proptest::collection::vec(1u32..=64, 0..100),
            size in 1usize..200,
            by_tokens: bool,
        ) {
            let rows = unpacked(&lengths);
            let batching = if by_tokens { Batching::Tokens(size) } else { Batching::Rows(size) };
            let made = batches(0..rows.len(), &rows, batching).unwrap();
            prop_assert_eq!(made.concat(), (0..rows.len()).collect::<Vec<_>>());
            for batch in made {
                let longest = batch.iter().map(|&r| rows[r].tokens as usize).max().unwrap();
                match batching {
                    Batching::Rows(size) => prop_assert!(batch.len() <= size),
                    Batching::Tokens(size) => {
                        prop_assert!(batch.len() == 1 || longest * batch.len() <= size);
                    }
                }
            }
        }
    }
}
