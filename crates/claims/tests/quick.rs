//! The proofs that take seconds hold.

use retune_claims::{CLAIMS, Prove};

#[test]
fn quick_claims_hold() {
    for claim in CLAIMS.iter().filter(|claim| claim.quick) {
        // Nothing a quick proof asserts may hang on a time, or on a model that may not be there.
        let Prove::Alone(prove) = claim.prove else { panic!("{} asks for a model", claim.name) };
        let proof = prove(|| 0.0).unwrap_or_else(|error| panic!("{}: {error}", claim.name));
        let wrong: Vec<String> = proof
            .assertions
            .iter()
            .filter(|assertion| !assertion.holds)
            .map(|assertion| format!("{}: {}", assertion.says, assertion.found))
            .collect();
        assert!(wrong.is_empty(), "{:02} {}: {wrong:?}", claim.number, claim.name);
    }
}
