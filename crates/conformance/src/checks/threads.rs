//! The same bits on one thread and on two.

use crate::case::{Case, Failed, Source, all_values, folder, same_bits};
use crate::suite::Check;

/// A run gives the same bits on one and two threads, and a second time.
pub const CHECK: Check = Check {
    name: "threads",
    about: "a short run ends with the same bits on one thread and on two",
    run,
};

fn run(case: &Case<'_>) -> Result<(), Failed> {
    let (plugin, example, subject) = (case.plugin, case.example, case.subject);
    let on = |threads: usize| -> Result<Vec<f32>, Failed> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        let method = case.method.boxed_clone();
        pool.install(move || {
            let case = Case { plugin, example, subject, method };
            let (weights, folder) = (subject.weights()?, folder()?);
            let mut training = case.training(&weights, folder.path(), 0)?;
            let mut source = Source { subject, fails_at: Some(2) };
            match training.walk(&mut source, None, &mut retune_core::event::Silent) {
                Err(retune_train::Error::Data(_)) => Ok(all_values(&training.parameters)),
                Err(error) => Err(error.into()),
                Ok(()) => Err(Failed("the run ended before it was stopped".to_owned())),
            }
        })
    };
    same_bits("values after two steps on two threads", &on(2)?, &on(1)?)
}
