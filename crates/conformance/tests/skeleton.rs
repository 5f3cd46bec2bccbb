//! What `cargo xtask new method` writes compiles and keeps what every method must keep.

use retune_conformance::{CHECKS, check_all, subjects};
use retune_methods::registry;

#[path = "../../../xtask/templates/method.rs"]
#[expect(unreachable_pub, reason = "the template is a module of a library")]
mod skeleton;

#[test]
fn the_skeleton_passes_every_check() {
    let subjects = subjects().unwrap();
    for check in CHECKS {
        let failures = check_all(check, &[skeleton::PLUGIN], &subjects);
        let text: Vec<String> = failures.iter().map(ToString::to_string).collect();
        assert!(text.is_empty(), "{}", text.join("\n"));
    }
}
