//! What was computed, counted: checks of cost that no clock can disturb.

use std::cell::Cell;

use crate::attention::AttentionOptions;
use crate::spans::Spans;

/// Multiply-adds of the products that were asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Those of matrix products.
    pub products: u64,
    /// Those of queries with keys and of shares with values, for what a query sees.
    pub attention: u64,
}

thread_local! {
    static WORK: Cell<Work> = const { Cell::new(Work { products: 0, attention: 0 }) };
}

/// Runs `work` and counts what it asked this thread for, however many threads computed it.
///
/// # Examples
/// ```
/// use retune_kernels::matrix::{Arithmetic, product};
/// use retune_kernels::work::counted;
/// let mut out = [0.0; 6];
/// let ((), work) = counted(|| {
///     product(Arithmetic::F32, [2, 4, 3], &[1.0; 8], &[1.0; 12], &mut out);
/// });
/// assert_eq!(work.products, 24);
/// ```
pub fn counted<R>(work: impl FnOnce() -> R) -> (R, Work) {
    let before = WORK.get();
    let result = work();
    let after = WORK.get();
    let found = Work {
        products: after.products - before.products,
        attention: after.attention - before.attention,
    };
    (result, found)
}

/// Notes a product of a `[rows, length]` with a `[length, columns]` matrix.
pub(crate) fn note(rows: usize, columns: usize, length: usize) {
    let work = WORK.get();
    let products = work.products + (rows * columns * length) as u64;
    WORK.set(Work { products, ..work });
}

/// Notes `count` products of all queries with what they see.
pub(crate) fn note_attention(
    options: &AttentionOptions,
    queries: &Spans,
    keys: impl Fn(usize) -> usize,
    count: usize,
) {
    let pairs: usize = queries
        .iter()
        .enumerate()
        .map(|(document, rows)| {
            let keys = keys(document);
            let prefix = options.prefix.min(keys);
            let seen = |t| {
                let visible = options.visible(t, rows.len(), keys);
                prefix + visible.end.max(prefix) - visible.start.max(prefix)
            };
            (0..rows.len()).map(seen).sum::<usize>()
        })
        .sum();
    let work = WORK.get();
    let attention = work.attention + (count * pairs * options.heads * options.head_width) as u64;
    WORK.set(Work { attention, ..work });
}
