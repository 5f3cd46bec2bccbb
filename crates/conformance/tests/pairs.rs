//! Two methods at once: what a stack of them keeps, and which are refused.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use retune_conformance::pairs::{Outcome, check_pair};
use retune_conformance::{Subject, subjects};
use retune_methods::registry::{METHODS, Plugin, find};

fn plugin(name: &str) -> &'static Plugin {
    find(name).unwrap()
}

/// Checks pairs on one model; all failures are shown at once. Returns how many trained.
fn hold(pairs: &[(&Plugin, &Plugin)], subject: &Subject) -> usize {
    let (mut trained, mut failures) = (0, Vec::new());
    for (below, above) in pairs {
        match check_pair(below, above, subject) {
            Ok(Outcome::Inapplicable) => {}
            Ok(Outcome::Trained(failed)) => {
                trained += 1;
                failures.extend(failed.into_iter().map(|failure| failure.to_string()));
            }
            Ok(Outcome::Refused(why)) => {
                // A refusal names what is there and what to do instead.
                let names = [below.card.name, above.card.name];
                if !names.iter().all(|name| why.contains(name)) || !why.contains("help: ") {
                    failures.push(format!("{names:?} are refused without reason: {why}"));
                }
            }
            Err(failed) => failures.push(failed.to_string()),
        }
    }
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
    trained
}

fn llama() -> Subject {
    subjects().unwrap().remove(0)
}

/// Splits the registry, so that the parts are tried beside each other.
fn third(place: usize) -> Vec<&'static Plugin> {
    METHODS.iter().skip(place).step_by(3).filter(|plugin| plugin.card.name != "lora").collect()
}

fn on_lora(place: usize) {
    let pairs: Vec<_> = third(place).into_iter().map(|above| (plugin("lora"), above)).collect();
    assert!(hold(&pairs, &llama()) > 10);
}

fn under_lora(place: usize) {
    let pairs: Vec<_> = third(place).into_iter().map(|below| (below, plugin("lora"))).collect();
    assert!(hold(&pairs, &llama()) > 10);
}

#[test]
fn on_lora_first() {
    on_lora(0);
}

#[test]
fn on_lora_second() {
    on_lora(1);
}

#[test]
fn on_lora_third() {
    on_lora(2);
}

#[test]
fn under_lora_first() {
    under_lora(0);
}

#[test]
fn under_lora_second() {
    under_lora(1);
}

#[test]
fn under_lora_third() {
    under_lora(2);
}

#[test]
fn each_on_the_one_before_it() {
    let pairs: Vec<_> = METHODS.iter().zip(&METHODS[1..]).collect();
    assert!(hold(&pairs, &llama()) > 20);
}

#[test]
fn the_usual_ones_on_every_model() {
    let pairs = [
        ("lora", "bitfit"),
        ("lora", "prompt-tuning"),
        ("lora", "ia3"),
        ("lora", "ln_tuning"),
        ("prefix-tuning", "lora"),
        ("bitfit", "ia3"),
        ("shira", "lora"),
        ("hft", "prompt-tuning"),
    ];
    let pairs: Vec<_> = pairs.iter().map(|(a, b)| (plugin(a), plugin(b))).collect();
    for subject in subjects().unwrap() {
        assert!(hold(&pairs, &subject) > 4, "{}", subject.name);
    }
}

#[test]
fn what_fights_is_refused_before_the_first_step() {
    let refused = |below: &str, above: &str, model: &str| {
        let subject = subjects().unwrap().into_iter().find(|s| s.name == model).unwrap();
        match check_pair(plugin(below), plugin(above), &subject) {
            Ok(Outcome::Refused(why)) => why,
            other => panic!("{below} + {above} on {model}: {other:?}"),
        }
    };
    let why = refused("full", "lora", "llama");
    assert!(why.contains("full and lora fight over") && why.contains("full trains it whole"));
    assert!(why.contains("keep one of `[method.full]` and `[method.lora]`"), "{why}");
    let why = refused("lora", "full", "gpt2");
    assert!(why.contains("lora and full fight over"), "{why}");
    let why = refused("full", "ln_tuning", "gemma3");
    assert!(why.contains("both train it whole"), "{why}");
    let why = refused("lora", "lt-sft", "llama");
    assert!(why.contains("2 stages") && why.contains("adapters = ["), "{why}");
}
