//! Every check, over every method of the registry and every tiny model.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fmt;

use retune_conformance::{CHECKS, check_all, subjects};
use retune_methods::registry::METHODS;

/// The failures of one check; a test that returns it shows one line for each and no backtrace.
struct Failures(String);

impl fmt::Debug for Failures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn holds(name: &str) -> Result<(), Failures> {
    let check = CHECKS.iter().find(|check| check.name == name).unwrap();
    let failures = check_all(check, METHODS, &subjects().unwrap());
    if failures.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> = failures.iter().map(|failure| format!("\n  {failure}")).collect();
    Err(Failures(format!("{}: {} failures{}", check.about, lines.len(), lines.concat())))
}

/// One test per check, so that they run beside each other and are named in a failure.
macro_rules! checks {
    ($($test:ident: $name:literal;)*) => {
        $(#[test]
        fn $test() -> Result<(), Failures> {
            holds($name)
        })*

        #[test]
        fn every_check_is_a_test() {
            let tested = [$($name),*];
            let listed: Vec<&str> = CHECKS.iter().map(|check| check.name).collect();
            assert_eq!(listed, tested);
        }
    };
}

checks! {
    plan: "plan";
    start: "start";
    fast_path: "fast path";
    merge: "merge";
    quantised_base: "quantised base";
    packing: "packing";
    accumulation: "accumulation";
    threads: "threads";
    moves: "moves";
    gradient: "gradient";
    options: "options";
    save_and_load: "save and load";
    resume: "resume";
}
