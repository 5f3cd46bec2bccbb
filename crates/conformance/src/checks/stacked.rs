//! What a stack writes is what is read.

use retune_core::change::Changes;
use retune_core::parameters::Parameters;
use retune_core::random::Seed;
use retune_methods::adapter::Adapter;
use retune_methods::stack;

use crate::case::{Attached, Case, Failed, folder, same_bits};
use crate::suite::Check;

/// One adapter folder per method, put in force in their order, gives the very same outputs.
pub const CHECK: Check = Check {
    name: "stacked adapters",
    about: "the adapters of stacked methods, read in their order, give the same bits",
    run,
};

fn run(case: &Case<'_>) -> Result<(), Failed> {
    let spec = case.subject.spec();
    let batch = case.subject.batch("saved")?;
    let mut attached = case.attach()?;
    attached.stir();
    if attached.parameters.iter().any(|(_, p)| p.trains && !p.saved && p.count() > 0) {
        // What trains on the way to the result is not in the file.
        return Ok(());
    }
    let expected = case.outputs(&attached, &batch)?;
    let folder = folder()?;
    let weights = case.subject.weights()?;
    let mut changes = Changes::default();
    let mut parameters = Parameters::new(weights.device());
    let adapters = match stack::adapters(&*case.method, spec, &attached.parameters, None) {
        Ok(adapters) => adapters,
        // Child-tuning's masks and the like have no file: said before the run's result is lost.
        Err(retune_core::Error::Unsupported { .. }) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    for (name, adapter) in adapters {
        let path = folder.path().join(&name);
        adapter.write(&path, "card")?;
        let adapter = Adapter::read(&path)?;
        let mut list = parameters.continued();
        // Whatever was drawn at random must come from the file.
        changes.extend(adapter.method()?.attach(&weights, &mut list, Seed(1234))?);
        adapter.fill(&path, &mut list)?;
        parameters.append(&name, list);
    }
    let loaded = Attached { weights, changes, parameters };
    same_bits("output of the adapters read back", &case.outputs(&loaded, &batch)?, &expected)
}
