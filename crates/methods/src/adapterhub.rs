//! Folders of the AdapterHub library (`adapters`): bottleneck adapters, read as rows of the design table;
//! Compacter's with their matrices multiplied out.
//!
//! A folder has `adapter_config.json`, whose `config` table says how the bottlenecks are wired, and
//! `adapter.safetensors`, whose keys carry the adapter's name behind the module's path.

use std::collections::BTreeMap;
use std::path::Path;

use retune_core::names::nearest_list;
use retune_core::{Error, Result};
use retune_files::safetensors::SafetensorsFile;
use retune_options::{Options, to_toml};
use serde_json::{Value, json};

use crate::adapter::{Adapter, PREFIX};
use crate::state::StateMethod;
use crate::state::sublayer::Insertion;
use crate::unified_view::{Composition, Function, Module, Place, UnifiedView};

mod phm;

/// The key of an adapter that has no head of its own, so that the base's stays: the library keeps heads
/// in a file of their own.
pub const KEEPS_HEAD: &str = "retune_keeps_head";

/// Name, shape and values of a tensor.
type Found = (String, Vec<usize>, Vec<f32>);

/// What stands before the names of a design table's tensors, behind the prefix.
const ROWS: &str = "unified.";

/// Returns whether a tensor is one of a bottleneck.
pub fn is_bottleneck(name: &str) -> bool {
    name.strip_prefix(PREFIX).is_some_and(|name| name.starts_with(ROWS))
}

const TENSORS: &str = "adapter.safetensors";
const PICKLE: &str = "pytorch_adapter.bin";

/// The wirings the library has a name for where `config` is a word: whether a bottleneck reads the sum
/// with the residual behind the norm, whether it works beside the sub-layer, its activation and its
/// factor.
const NAMED: &[(&str, bool, bool, &str, f64)] = &[
    ("seq_bn", true, false, "relu", 1.0),
    ("pfeiffer", true, false, "relu", 1.0),
    ("double_seq_bn", false, false, "swish", 1.0),
    ("houlsby", false, false, "swish", 1.0),
    ("par_bn", false, true, "relu", 4.0),
    ("parallel", false, true, "relu", 4.0),
    ("compacter++", true, false, "gelu", 1.0),
    ("compacter", false, false, "gelu", 1.0),
];

/// Returns whether a configuration is one of this library's.
pub fn is_config(config: &Value) -> bool {
    config.get("peft_type").is_none() && config.get("config").is_some()
}

/// How the bottlenecks of a folder are wired.
struct Wiring {
    after_norm: bool,
    parallel: bool,
    function: Function,
    scale: f64,
}

fn unsupported(what: String) -> Error {
    Error::Unsupported {
        what: format!("an AdapterHub adapter with {what}"),
        help:
            "what is read: bottlenecks behind or beside sub-layers (seq_bn, double_seq_bn, par_bn, \
             compacter)"
                .to_owned(),
    }
}

impl Wiring {
    fn read(config: &Value) -> Result<Self> {
        if let Some(word) = config.as_str() {
            let known = NAMED.iter().find(|(name, ..)| *name == word);
            let Some((_, after_norm, parallel, activation, scale)) = known else {
                let near = nearest_list(word, NAMED.iter().map(|(name, ..)| *name));
                return Err(unsupported(format!("the configuration `{word}` (nearest: {near})")));
            };
            let (function, scale) = (function(activation)?, *scale);
            return Ok(Self { after_norm: *after_norm, parallel: *parallel, function, scale });
        }
        let flag = |key: &str| config.get(key).and_then(Value::as_bool).unwrap_or(false);
        for key in ["ln_before", "ln_after", "use_gating", "cross_adapter"] {
            if flag(key) {
                return Err(unsupported(format!("`{key}`")));
            }
        }
        if config.get("inv_adapter").is_some_and(|value| !value.is_null()) {
            return Err(unsupported("`inv_adapter`".to_owned()));
        }
        let residual = config.get("residual_before_ln").is_none_or(|value| *value == json!(true));
        let (after_norm, parallel) = (flag("original_ln_before"), flag("is_parallel"));
        if after_norm && !parallel && !residual {
            return Err(unsupported("`residual_before_ln` = false".to_owned()));
        }
        if config.get("original_ln_after") == Some(&json!(false)) {
            return Err(unsupported("`original_ln_after` = false".to_owned()));
        }
        let scale = match config.get("scaling") {
            None | Some(Value::Null) => 1.0,
            Some(value) => {
                value.as_f64().ok_or_else(|| unsupported(format!("`scaling` = {value}")))?
            }
        };
        let activation = config.get("non_linearity").and_then(Value::as_str).unwrap_or("relu");
        Ok(Self {
            after_norm: after_norm && !parallel,
            parallel,
            function: function(activation)?,
            scale,
        })
    }
}

fn function(name: &str) -> Result<Function> {
    Ok(match name {
        "relu" => Function::Relu,
        "gelu" => Function::Gelu,
        "swish" | "silu" => Function::Silu,
        "tanh" => Function::Tanh,
        "linear" => Function::Identity,
        _ => return Err(unsupported(format!("`non_linearity` = \"{name}\""))),
    })
}

/// Where a tensor of the file belongs.
#[derive(Debug, PartialEq, Eq)]
struct Address<'a> {
    layer: usize,
    place: Place,
    /// The norm behind the sub-layer with `{layer}` for the layer's number, in models that have it
    /// there.
    norm: Option<String>,
    part: &'a str,
}

/// Finds the layer, the sub-layer and the tensor in a key such as
/// `bert.encoder.layer.3.output.adapters.NAME.adapter_down.0.weight`.
fn address(key: &str) -> Option<Address<'_>> {
    let (module, rest) = key.split_once(".adapters.")?;
    let (_, part) = rest.split_once('.')?;
    let mut before = String::new();
    let mut parts = module.split('.');
    let layer = loop {
        let part = parts.next()?;
        if let Ok(layer) = part.parse() {
            break layer;
        }
        before.push_str(part);
        before.push('.');
    };
    let sub: Vec<&str> = parts.collect();
    let norm = |sub: &str| Some(format!("{before}{{layer}}.{sub}.LayerNorm"));
    let (place, norm) = match sub.as_slice() {
        ["output"] => (Place::FeedForward, norm("output")),
        ["attention", "output"] => (Place::Attention, norm("attention.output")),
        ["output_adapters"] => (Place::FeedForward, None),
        ["attention_adapters"] => (Place::Attention, None),
        _ => return None,
    };
    Some(Address { layer, place, norm, part })
}

/// Reads a folder whose configuration [`is_config`].
///
/// # Errors
/// If its wiring or one of its tensors has no counterpart, or its tensors are a pickle.
pub fn read(folder: &Path, config: &Value) -> Result<Adapter> {
    if !folder.join(TENSORS).exists() && folder.join(PICKLE).exists() {
        return Err(Error::Content {
            path: folder.join(PICKLE),
            what: "the adapter's tensors are a Python pickle, which can run code".to_owned(),
            expected: TENSORS.to_owned(),
            found: PICKLE.to_owned(),
            help: "save it again with the library that made it: `save_adapter` writes safetensors"
                .to_owned(),
        });
    }
    let wiring = Wiring::read(config.get("config").unwrap_or(&Value::Null))?;
    let file = SafetensorsFile::open(folder.join(TENSORS))?;
    let mut tensors = Vec::new();
    for view in file.tensors() {
        tensors.push((view.name.to_owned(), view.shape.to_vec(), view.to_f32()?));
    }
    let tensors = phm::multiplied_out(tensors).map_err(|found| Error::Content {
        path: folder.join(TENSORS),
        what: "a layer of Kronecker products cannot be multiplied out".to_owned(),
        expected: "all factors of each layer, shared ones once".to_owned(),
        found,
        help: "save the adapter again with a newer version of the library".to_owned(),
    })?;
    // Bottlenecks of one place and one width are one row of the table.
    let mut rows: Vec<Module> = Vec::new();
    let mut found: BTreeMap<(usize, usize), Vec<Found>> = BTreeMap::new();
    let mut wrong = Vec::new();
    let mut sizes: BTreeMap<(usize, &'static str), usize> = BTreeMap::new();
    for (name, shape, _) in &tensors {
        if let Some(at) = address(name).filter(|at| at.part == "adapter_down.0.weight") {
            let size = shape.first().copied().unwrap_or(1);
            sizes.insert((at.layer, place_name(at.place)), size);
        }
    }
    for (name, shape, values) in tensors {
        let Some(at) = address(&name) else {
            wrong.push(format!("`{name}`"));
            continue;
        };
        let part = match at.part {
            "adapter_down.0.weight" => "down.weight",
            "adapter_down.0.bias" => "down.bias",
            "adapter_up.weight" => "up.weight",
            "adapter_up.bias" => "up.bias",
            _ => {
                wrong.push(format!("`{name}`"));
                continue;
            }
        };
        if wiring.parallel && at.place == Place::Attention {
            return Err(unsupported("`is_parallel` beside attention".to_owned()));
        }
        let norm = match (wiring.after_norm || wiring.parallel, at.norm) {
            (false, _) => String::new(),
            (true, Some(_)) if wiring.parallel => String::new(),
            (true, Some(norm)) => norm,
            (true, None) => {
                let what = "`original_ln_before` or `is_parallel` over a model whose norms stand \
                            before sub-layers: it reads the residual stream";
                return Err(unsupported(what.to_owned()));
            }
        };
        let module = Module {
            form: wiring.function,
            insertion: if wiring.parallel { Insertion::Parallel } else { Insertion::Sequential },
            place: at.place,
            composition: Composition::Scaled,
            size: sizes.get(&(at.layer, place_name(at.place))).copied().unwrap_or(1).max(1),
            scale: wiring.scale,
            after_norm: norm,
            ..Module::default()
        };
        let row =
            rows.iter().position(|row| Module { layers: Vec::new(), ..row.clone() } == module);
        let row = row.unwrap_or_else(|| {
            rows.push(module);
            rows.len() - 1
        });
        if !rows[row].layers.contains(&at.layer) {
            rows[row].layers.push(at.layer);
        }
        let of = found.entry((row, at.layer)).or_default();
        of.push((part.to_owned(), shape, values));
    }
    if !wrong.is_empty() || rows.is_empty() {
        let expected = "keys such as `….output.adapters.NAME.adapter_down.0.weight`";
        return Err(Error::Content {
            path: folder.join(TENSORS),
            what: "tensors that are no part of a bottleneck".to_owned(),
            expected: expected.to_owned(),
            found: if wrong.is_empty() { "no bottleneck".to_owned() } else { wrong.join(", ") },
            help: "only bottleneck adapters are read".to_owned(),
        });
    }
    for row in &mut rows {
        row.layers.sort_unstable();
    }
    let view = UnifiedView { modules: rows, ..UnifiedView::default() };
    let mut adapter = Adapter {
        config: json!({
            "peft_type": UnifiedView::PEFT_TYPE,
            "base_model_name_or_path": config.get("model_name").cloned().unwrap_or(Value::Null),
            "retune_options": to_toml(&view.write()),
            KEEPS_HEAD: true,
        }),
        ..Adapter::default()
    };
    for ((row, layer), tensors) in found {
        for (part, shape, values) in tensors {
            let name = format!("{PREFIX}{ROWS}{row}.layers.{layer}.{part}");
            adapter.tensors.insert(name, (shape, values));
        }
    }
    Ok(adapter)
}

fn place_name(place: Place) -> &'static str {
    if place == Place::Attention { "attention" } else { "feed-forward" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_say_where_a_tensor_belongs() {
        let found = address("bert.encoder.layer.3.output.adapters.sst-2.adapter_down.0.weight");
        let norm = Some("bert.encoder.layer.{layer}.output.LayerNorm".to_owned());
        let part = "adapter_down.0.weight";
        assert_eq!(found, Some(Address { layer: 3, place: Place::FeedForward, norm, part }));
        let found = address("model.layers.11.attention_adapters.adapters.a.adapter_up.bias");
        let (place, part) = (Place::Attention, "adapter_up.bias");
        assert_eq!(found, Some(Address { layer: 11, place, norm: None, part }));
        assert_eq!(address("bert.encoder.layer.3.output.dense.weight"), None);
        assert_eq!(address("bert.invertible_adapters.a.F.0.weight"), None);
    }

    #[test]
    fn wirings_without_a_counterpart_are_refused_by_name() {
        for (config, expected) in [
            (json!("seq_bm"), "nearest: seq_bn"),
            (json!({"ln_before": true}), "ln_before"),
            (json!({"inv_adapter": "nice"}), "inv_adapter"),
            (json!({"non_linearity": "leakyrelu"}), "leakyrelu"),
            (
                json!({"original_ln_before": true, "residual_before_ln": false}),
                "residual_before_ln",
            ),
            (json!({"scaling": "learned"}), "learned"),
        ] {
            let error = Wiring::read(&config).err().unwrap().to_string();
            assert!(error.contains(expected), "{config}: {error}");
        }
    }
}
