//! Work split into tasks whose borders depend on the shapes alone.

use rayon::prelude::*;

/// Numbers one task of an element-wise operation takes.
pub(crate) const CHUNK: usize = 1 << 14;

/// Runs work on a thread of the pool.
///
/// Every operation hands tasks to the pool. From a thread outside, each of them costs two changes
/// of threads; inside, the thread begins on the tasks itself.
pub fn in_pool<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| work())
}

/// Runs tasks on all threads; a single one stays on this thread.
pub fn each<T: Send>(tasks: impl IntoIterator<Item = T>, work: impl Fn(T) + Sync + Send) {
    let mut tasks: Vec<T> = tasks.into_iter().collect();
    if tasks.len() > 1 {
        tasks.into_par_iter().for_each(work);
    } else if let Some(task) = tasks.pop() {
        work(task);
    }
}

/// Gives how many rows of a width make a task, at least one.
pub(crate) fn rows_of(width: usize) -> usize {
    CHUNK.div_ceil(width.max(1))
}

/// Columns of a task that adds up rows: a few cache lines of each.
const STRIP: usize = 96;

/// Adds up rows of a width in their order.
pub(crate) fn add_rows(rows: &[f32], width: usize) -> Vec<f32> {
    let mut sums = vec![0.0; width];
    let strip = if rows.len() > CHUNK { STRIP } else { width.max(1) };
    each(sums.chunks_mut(strip).enumerate(), |(index, sums)| {
        for row in rows.chunks_exact(width) {
            for (sum, x) in sums.iter_mut().zip(&row[index * strip..]) {
                *sum += x;
            }
        }
    });
    sums
}
