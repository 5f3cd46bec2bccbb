//! Proofs on several seeds.

use retune_core::random::Seed;

use crate::Result;

/// Runs `work` for each seed, two at a time; results are in the order of the seeds.
///
/// # Errors
/// That of the first seed that failed.
pub(crate) fn each_seed<T: Send>(
    seeds: std::ops::Range<u64>,
    work: impl Fn(Seed) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let seeds: Vec<u64> = seeds.collect();
    let work = &work;
    let mut found = Vec::new();
    for pair in seeds.chunks(2) {
        let results: Vec<Result<T>> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                pair.iter().map(|seed| scope.spawn(move || work(Seed(*seed)))).collect();
            let joined = threads.into_iter().map(|thread| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            joined.collect()
        });
        for result in results {
            found.push(result?);
        }
    }
    Ok(found)
}
