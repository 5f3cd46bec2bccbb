//! The list of methods: one line each, in the order they are shown to people.

use retune_core::method::{Card, Method};
use retune_core::names::nearest_list;
use retune_core::{Error, Result};
use retune_options::{OptionSpec, Options, Reader};
use serde_json::Value;

use crate::peft_config;
use crate::{
    adalora, adamss, adapter_fusion, apet, autopeft, beft, bitfit, boft, c3a, cartridge,
    child_tuning, compacter, cpt, deft, delora, dept, diff_pruning, dsee, fourierft, frod, full,
    glora, gralora, hft, hira, hra, ia3, iaa, id3, lily, llama_adapter, ln_tuning, locft, loftq,
    loha, lokr, lora, loretta_adp, loretta_rep, lt_sft, miss, multitask_prompt_tuning, oft, osf,
    p_tuning, peanut, poly, prefix_tuning, prompt_tuning, psoft, pvera, r_amt, randlora, reft,
    road, said, sara, shira, spiel, ssf, supertuning, tinylora, trainable_tokens, unified_view,
    unilora, unipelt, vblora, vera, waveft,
};

/// Makes a method from an `adapter_config.json`.
pub type FromAdapter = fn(&Value) -> Result<Box<dyn Method>>;

/// One method: what it is, how a recipe and an adapter file make it.
#[derive(Debug, Clone, Copy)]
pub struct Plugin {
    /// Name, source, options.
    pub card: Card,
    /// Reads the method's table of a recipe.
    pub read: fn(&mut Reader<'_>) -> Box<dyn Method>,
    /// PEFT's name of the adapter type, and how its configuration is read.
    pub adapter: Option<(&'static str, FromAdapter)>,
}

/// All methods.
pub const METHODS: &[Plugin] = &[
    lora::PLUGIN,
    full::PLUGIN,
    adalora::PLUGIN,
    beft::PLUGIN,
    boft::PLUGIN,
    c3a::PLUGIN,
    deft::PLUGIN,
    delora::PLUGIN,
    fourierft::PLUGIN,
    glora::PLUGIN,
    gralora::PLUGIN,
    hira::PLUGIN,
    hra::PLUGIN,
    ia3::PLUGIN,
    ln_tuning::PLUGIN,
    loha::PLUGIN,
    lokr::PLUGIN,
    miss::PLUGIN,
    oft::PLUGIN,
    peanut::PLUGIN,
    pvera::PLUGIN,
    randlora::PLUGIN,
    road::PLUGIN,
    prompt_tuning::PLUGIN,
    p_tuning::PLUGIN,
    prefix_tuning::PLUGIN,
    multitask_prompt_tuning::PLUGIN,
    cpt::PLUGIN,
    cartridge::PLUGIN,
    llama_adapter::PLUGIN,
    poly::PLUGIN,
    lily::PLUGIN,
    shira::PLUGIN,
    supertuning::PLUGIN,
    trainable_tokens::PLUGIN,
    vblora::PLUGIN,
    vera::PLUGIN,
    waveft::PLUGIN,
    ssf::PLUGIN,
    unified_view::PLUGIN,
    dept::PLUGIN,
    iaa::PLUGIN,
    reft::PLUGIN,
    autopeft::PLUGIN,
    hft::PLUGIN,
    spiel::PLUGIN,
    sara::PLUGIN,
    lt_sft::PLUGIN,
    id3::PLUGIN,
    compacter::PLUGIN,
    unipelt::PLUGIN,
    bitfit::PLUGIN,
    child_tuning::PLUGIN,
    r_amt::PLUGIN,
    apet::PLUGIN,
    locft::PLUGIN,
    diff_pruning::PLUGIN,
    adamss::PLUGIN,
    frod::PLUGIN,
    osf::PLUGIN,
    psoft::PLUGIN,
    tinylora::PLUGIN,
    unilora::PLUGIN,
    said::PLUGIN,
    dsee::PLUGIN,
    adapter_fusion::PLUGIN,
    loftq::PLUGIN,
    loretta_rep::PLUGIN,
    loretta_adp::PLUGIN,
];

/// Finds a method by the name a recipe uses.
pub fn find(name: &str) -> Option<&'static Plugin> {
    METHODS.iter().find(|plugin| plugin.card.name == name)
}

/// Returns all names, in the order they are shown.
pub fn names() -> impl Iterator<Item = &'static str> {
    METHODS.iter().map(|plugin| plugin.card.name)
}

/// Makes the method of an `adapter_config.json`.
///
/// # Errors
/// If the type is unknown, or asks for something that is not supported.
pub fn from_adapter(config: &Value) -> Result<Box<dyn Method>> {
    let Some(wanted) = config.get("peft_type").and_then(Value::as_str) else {
        return Err(peft_config::error(
            "peft_type",
            config,
            "the adapter's type, such as \"LORA\"",
        ));
    };
    let known = || METHODS.iter().filter_map(|plugin| plugin.adapter.map(|(name, _)| name));
    let found =
        METHODS.iter().find_map(|plugin| plugin.adapter.filter(|(name, _)| *name == wanted));
    match found {
        Some((_, make)) => make(config),
        None => Err(Error::Unsupported {
            what: format!("an adapter of type `{wanted}`"),
            help: format!(
                "nearest: {}; this version reads {}",
                nearest_list(wanted, known()),
                known().collect::<Vec<_>>().join(", ")
            ),
        }),
    }
}

/// Copies the specs of an options struct, in the form a [`Card`] holds.
pub fn specs<T: Options>() -> Vec<OptionSpec> {
    T::specs().to_vec()
}
