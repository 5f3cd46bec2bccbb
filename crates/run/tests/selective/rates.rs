//! Learning rates of single parameters.

use crate::common::{folder, method, open, sgd, trained, walk};
use retune_core::parameters::Parameters;

fn second_factors(parameters: &Parameters) -> Vec<f32> {
    let b = parameters.iter().filter(|(_, p)| p.name.ends_with("lora_B.weight"));
    b.flat_map(|(id, _)| parameters.values(id)).collect()
}

#[test]
fn lora_plus_moves_the_second_factor_by_its_ratio() {
    let (model, weights) = open();
    let moved = |options: &str| {
        let (_guard, root) = folder();
        let lora = method("lora", options);
        let done = trained((&*model, &weights), lora, sgd(), walk(&root, 1, 0.5));
        second_factors(&done.parameters)
    };
    let (plain, plus) = (moved(""), moved("rate_ratio = 16.0"));
    assert!(plain.iter().any(|v| *v != 0.0));
    // B starts at zero and A stands still in the first step, so the ratio is that of the rates.
    for (plain, plus) in plain.iter().zip(&plus) {
        assert!((plus - 16.0 * plain).abs() <= 1e-6 * plus.abs(), "{plain} {plus}");
    }
}
