//! Copies.

use super::elementwise::scale;
use super::{Base, Group, Method, Parameter, nothing_to_check};
use crate::Result;

/// One model's tensor, scaled: for stacking layers.
pub(super) const PASSTHROUGH: Method = Method {
    name: "passthrough",
    title: "Passthrough",
    source: "https://github.com/arcee-ai/mergekit",
    about: "copies layers, to stack them in another order",
    base: Base::Ordinary,
    min_inputs: 1,
    max_inputs: 1,
    parameters: &[Parameter::input("scale", "factor on the tensor").or(1.0)],
    check: nothing_to_check,
    run,
};

fn run(group: &Group<'_>, push: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
    let factor = group.own[0].number("scale") as f32;
    group.sweep(1, &mut |chunk| {
        scale(&mut chunk.inputs[0], factor);
        push(&chunk.inputs[0])
    })
}
