//! What is written is what is read.

use retune_core::random::Seed;
use retune_methods::adapter::Adapter;

use crate::case::{Case, Failed, folder, same_bits};
use crate::suite::Check;

/// An adapter folder, read by another process, gives the very same outputs.
pub const CHECK: Check = Check {
    name: "save and load",
    about: "an adapter that is written and read gives the same bits",
    run,
};

fn run(case: &Case<'_>) -> Result<(), Failed> {
    let spec = case.subject.spec();
    let Some(config) = case.method.adapter_config(spec) else { return Ok(()) };
    let batch = case.subject.batch("saved")?;
    let mut attached = case.attach()?;
    attached.stir();
    if attached.parameters.iter().any(|(_, p)| p.trains && !p.saved && p.count() > 0) {
        // What trains on the way to the result is not in the file.
        return Ok(());
    }
    let expected = case.outputs(&attached, &batch)?;
    let folder = folder()?;
    let path = folder.path().join("adapter");
    Adapter::collect(&*case.method, spec, &attached.parameters, None)?.write(&path, "card")?;
    let adapter = Adapter::read(&path)?;
    let Some((kind, make)) = case.plugin.adapter else {
        return Err(Failed("an adapter is written, but the registry reads none".to_owned()));
    };
    if config.get("peft_type").and_then(|kind| kind.as_str()) != Some(kind) {
        return Err(Failed(format!(
            "`peft_type` of the adapter is {:?}, the registry reads {kind}",
            config.get("peft_type")
        )));
    }
    let method = make(&adapter.config)?;
    let again = Case { plugin: case.plugin, example: case.example, subject: case.subject, method };
    // Whatever was drawn at random must come from the file.
    let mut loaded = again.attach_with(Seed(1234))?;
    adapter.fill_as(&*again.method, &path, &mut loaded.parameters)?;
    // What only helps training is not in the file: the files are compared, not the parameters.
    let written = Adapter::collect(&*again.method, spec, &loaded.parameters, None)?;
    let names = |adapter: &Adapter| adapter.tensors.keys().cloned().collect::<Vec<_>>();
    if names(&written) != names(&adapter) || written.integers != adapter.integers {
        return Err(Failed(format!(
            "{:?} are written of an adapter that holds {:?}",
            names(&written),
            names(&adapter)
        )));
    }
    for ((name, (_, found)), (_, kept)) in written.tensors.iter().zip(adapter.tensors.values()) {
        same_bits(&format!("`{name}` read back"), found, kept)?;
    }
    same_bits("output of the adapter read back", &again.outputs(&loaded, &batch)?, &expected)
}
