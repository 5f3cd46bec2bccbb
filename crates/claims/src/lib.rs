//! Small-scale proofs of what the papers claim, run on retune itself.
//!
//! One file per claim. A proof makes its data from seeds, runs in minutes on two cores, and says
//! what must appear and whether it did. What does not hold is reported as such: a proof asserts
//! what its paper or the retelling of it claims at this scale, and nothing is tuned until it fits.

mod apet;
mod aside;
mod ast_petl;
mod audio;
mod bottleneck_shapes;
mod breadcrumbs;
mod chains;
mod code_generation;
mod compeft;
mod configurations;
mod contest;
mod crash;
mod crash_language;
mod critical_review;
mod dept;
mod design_table;
mod dsee;
mod encoder;
mod error;
mod families;
mod grafting;
mod grafting_language;
mod hft;
mod id3;
mod lab;
mod language;
mod locft;
mod lt_sft;
mod mask_tuning;
mod merging;
mod mlp;
mod page;
mod pictures;
mod prefix_identity;
mod regression;
mod residual;
mod retrieval;
mod rotated;
mod saas;
mod said;
mod sara;
mod search;
mod sentences;
mod shipping;
mod snippets;
mod spiel;
mod ssf;
mod survey;

pub use configurations::table as configurations;
pub use error::{Error, Result};
pub use page::page;
use retune_run::open::Located;

/// One claim of one paper.
#[derive(Debug, Clone, Copy)]
pub struct Claim {
    /// The number it is called by.
    pub number: u32,
    /// The method's or paper's name.
    pub name: &'static str,
    /// Authors, title, year, address.
    pub source: &'static str,
    /// What the paper claims.
    pub claims: &'static str,
    /// What is run here, and how it differs from the paper.
    pub run: &'static str,
    /// Whether it takes seconds.
    pub quick: bool,
    /// Runs it.
    pub prove: Prove,
}

/// How a claim is proved.
#[derive(Debug, Clone, Copy)]
pub enum Prove {
    /// On models the proof makes itself.
    Alone(fn(Clock) -> Result<Proof>),
    /// On the pretrained model of this name.
    On(&'static str, fn(&Located) -> Result<Proof>),
}

/// Gives the seconds since some moment, for proofs that measure how long something takes.
pub type Clock = fn() -> f64;

/// What a proof found.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Proof {
    /// The figures, as a Markdown table.
    pub figures: String,
    /// What had to appear.
    pub assertions: Vec<Assertion>,
    /// What a reader should know: limits, and why something does not hold.
    pub notes: Vec<String>,
}

/// One thing that had to appear.
#[derive(Debug, Clone, PartialEq)]
pub struct Assertion {
    /// What must hold.
    pub says: String,
    /// What was found.
    pub found: String,
    /// Whether it held.
    pub holds: bool,
}

impl Proof {
    /// Returns whether everything held.
    pub fn holds(&self) -> bool {
        self.assertions.iter().all(|assertion| assertion.holds)
    }

    /// Notes one thing that had to appear.
    fn assert(&mut self, says: impl Into<String>, found: impl Into<String>, holds: bool) {
        self.assertions.push(Assertion { says: says.into(), found: found.into(), holds });
    }
}

/// All claims, by number; what was tried on two kinds of model is two of them.
pub const CLAIMS: &[Claim] = &[
    configurations::CLAIM,
    hft::CLAIM,
    id3::CLAIM,
    families::CLAIM,
    aside::CLAIM,
    apet::CLAIM,
    code_generation::CLAIM,
    ast_petl::CLAIM,
    survey::CLAIM,
    grafting::CLAIM,
    grafting_language::CLAIM,
    spiel::CLAIM,
    shipping::CLAIM,
    bottleneck_shapes::CLAIM,
    dsee::CLAIM,
    design_table::CLAIM,
    critical_review::CLAIM,
    said::CLAIM,
    crash::CLAIM,
    crash_language::CLAIM,
    ssf::CLAIM,
    mask_tuning::CLAIM,
    compeft::CLAIM,
    locft::CLAIM,
    breadcrumbs::CLAIM,
    lt_sft::CLAIM,
    dept::CLAIM,
    sara::CLAIM,
];

/// Runs a proof's seeds side by side, each on one thread: on tensors this small, handing work from
/// thread to thread takes longer than the work.
fn side_by_side<T: Send>(count: u64, run: impl Fn(u64) -> Result<T> + Sync) -> Result<Vec<T>> {
    let alone = |number| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
        pool.install(|| run(number))
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..count).map(|number| scope.spawn(move || alone(number))).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<T>>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(join).collect()
    })
}

/// Writes figures of several seeds, to three places.
fn each(values: &[f64]) -> String {
    let shown: Vec<String> = values.iter().map(|value| format!("{value:.3}")).collect();
    shown.join(", ")
}

/// Returns the mean; not a number for no values.
fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_sorted_and_titles_unique() {
        let key = |claim: &Claim| (claim.number, claim.name);
        assert!(CLAIMS.windows(2).all(|pair| key(&pair[0]) < key(&pair[1])));
    }
}
