//! Structured export: heads and inner neurons that put out nothing are cut out of the matrices.
//!
//! A head does nothing where its columns of the attention's output projection are zero, a neuron
//! where its column of the narrowing projection is; how they came to be zero (DSEE, Chen et al.,
//! 2021, arXiv 2111.00160, or another way) does not matter. What is left is an ordinary model of
//! the same architecture, smaller, with the same outputs.

use std::path::Path;

use retune_core::model::{Model, Tuned};
use retune_core::spec::{Kind, ModelSpec, Role, WeightSpec};
use retune_files::Dtype;
use retune_models::config::Config;
use serde::Serialize;
use serde_json::json;

use crate::error::{Error, Result};
use crate::export::{Beside, merged, write_weights};

/// What stays of one block, each list ascending.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Kept {
    heads: Vec<usize>,
    groups: Vec<usize>,
    neurons: Vec<usize>,
}

/// What was cut, and what that saves.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cut {
    /// Query heads per block, before and after.
    pub heads: [usize; 2],
    /// Key and value heads per block, before and after.
    pub key_heads: [usize; 2],
    /// Width inside the feed-forward network, before and after.
    pub inner_width: [usize; 2],
    /// Heads of all blocks that put out nothing but stay, because a configuration has one number
    /// for all blocks and another block has fewer of them.
    pub dead_heads_left: usize,
    /// Number of values, before and after.
    pub num_values: [usize; 2],
    /// Floating-point operations of the products per token, before and after: two per entry of each
    /// matrix as it was written.
    pub flops_per_token: [u64; 2],
    /// The same where zeros are skipped, after.
    pub nonzero_flops_per_token: u64,
}

fn refuse(what: &str, help: &str) -> Error {
    Error::Core(retune_core::Error::Unsupported { what: what.to_owned(), help: help.to_owned() })
}

/// Finds the weight of a block that does something.
fn of_layer(spec: &ModelSpec, layer: usize, role: Role) -> Option<&WeightSpec> {
    spec.linears().find(|weight| weight.layer == Some(layer) && weight.role == role)
}

/// Says for each block of `width` columns whether it is all zero.
fn zero_blocks(values: &[f32], columns: usize, width: usize) -> Vec<bool> {
    let mut zero = vec![true; columns / width];
    for row in values.chunks_exact(columns) {
        for (zero, block) in zero.iter_mut().zip(row.chunks_exact(width)) {
            *zero &= block.iter().all(|value| *value == 0.0);
        }
    }
    zero
}

/// Decides what stays: as much is cut as every block can give.
fn decide(dead_heads: &[Vec<bool>], dead_neurons: &[Vec<bool>], group_size: usize) -> Vec<Kept> {
    let of_group = |dead: &[bool], group: usize| {
        dead[group * group_size..(group + 1) * group_size].iter().filter(|dead| **dead).count()
    };
    let num_groups = |dead: &[bool]| dead.len() / group_size;
    let is_gone = |dead: &[bool], group: usize| of_group(dead, group) == group_size;
    // At least one head and one neuron stay, so that the model keeps its form.
    let whole = dead_heads
        .iter()
        .map(|dead| (0..num_groups(dead)).filter(|g| is_gone(dead, *g)).count())
        .map(|gone| gone.min(num_groups(&dead_heads[0]) - 1));
    let whole = whole.min().unwrap_or(0);
    let neurons = dead_neurons.iter().map(|dead| dead.iter().filter(|dead| **dead).count());
    let neurons = neurons.min().unwrap_or(0).min(dead_neurons.first().map_or(1, Vec::len) - 1);
    let groups: Vec<Vec<usize>> = dead_heads
        .iter()
        .map(|dead| {
            let gone: Vec<usize> =
                (0..num_groups(dead)).filter(|g| is_gone(dead, *g)).take(whole).collect();
            (0..num_groups(dead)).filter(|g| !gone.contains(g)).collect()
        })
        .collect();
    let of_each = dead_heads
        .iter()
        .zip(&groups)
        .flat_map(|(dead, groups)| groups.iter().map(move |group| of_group(dead, *group)));
    let of_each = of_each.min().unwrap_or(0).min(group_size - 1);
    let without = |dead: &[bool], places: std::ops::Range<usize>, count: usize| {
        let gone: Vec<usize> = places.clone().filter(|p| dead[*p]).take(count).collect();
        places.filter(|place| !gone.contains(place)).collect::<Vec<_>>()
    };
    dead_heads
        .iter()
        .zip(groups)
        .enumerate()
        .map(|(layer, (dead, groups))| Kept {
            heads: groups
                .iter()
                .flat_map(|g| without(dead, g * group_size..(g + 1) * group_size, of_each))
                .collect(),
            neurons: dead_neurons
                .get(layer)
                .map(|dead| without(dead, 0..dead.len(), neurons))
                .unwrap_or_default(),
            groups,
        })
        .collect()
}

/// Keeps some blocks of `width` rows of a matrix or vector.
fn keep_rows(values: &[f32], columns: usize, width: usize, kept: &[usize]) -> Vec<f32> {
    let size = width * columns;
    kept.iter().flat_map(|block| values[block * size..(block + 1) * size].iter().copied()).collect()
}

/// Keeps some blocks of `width` columns of a matrix.
fn keep_columns(values: &[f32], columns: usize, width: usize, kept: &[usize]) -> Vec<f32> {
    let of_row = |row: &[f32]| keep_rows(row, 1, width, kept);
    values.chunks_exact(columns).flat_map(of_row).collect()
}

/// Finds what puts out nothing, and what stays.
fn find(tuned: &Tuned<'_>) -> Result<(Vec<Kept>, usize)> {
    let spec = tuned.model.spec();
    if spec.decoder_start().is_some() || of_layer(spec, 0, Role::Query).is_none() {
        return Err(refuse(
            &format!("cutting heads out of {}", spec.class),
            "it is for models whose blocks have their own query, key and value matrices, such as \
             Llama; `--format hf` writes the zeros",
        ));
    }
    let (mut heads, mut neurons) = (Vec::new(), Vec::new());
    for layer in 0..spec.num_layers {
        let read = |role: Role, width: usize| -> Result<Option<Vec<bool>>> {
            let Some(weight) = of_layer(spec, layer, role) else { return Ok(None) };
            Ok(Some(zero_blocks(&merged(tuned, weight)?, weight.matrix()[1], width)))
        };
        heads.extend(read(Role::AttentionOutput, spec.head_width)?);
        neurons.extend(read(Role::Down, 1)?);
    }
    let group_size = spec.num_heads / spec.num_key_heads.max(1);
    let dead = heads.iter().flatten().filter(|dead| **dead).count();
    let kept = decide(&heads, &neurons, group_size);
    let gone: usize = kept.iter().map(|kept| spec.num_heads - kept.heads.len()).sum();
    Ok((kept, dead - gone))
}

/// Makes the architecture of what stays.
fn smaller(spec: &ModelSpec, kept: &Kept, dtype: Dtype) -> Result<Box<dyn Model>> {
    let mut config = retune_models::export::config(spec, dtype);
    config["num_attention_heads"] = json!(kept.heads.len());
    config["num_key_value_heads"] = json!(kept.groups.len());
    config["head_dim"] = json!(spec.head_width);
    config["intermediate_size"] = json!(kept.neurons.len());
    retune_models::build(&Config::new(Path::new("config.json"), config))
        .map_err(|_| no_head_width(spec))
}

fn no_head_width(spec: &ModelSpec) -> Error {
    refuse(
        &format!("cutting heads out of {}", spec.class),
        "its configuration has no head width of its own, so it cannot say that heads are fewer; \
         `--format hf` writes the zeros",
    )
}

/// Cuts what stays out of one weight.
fn cut(weight: &WeightSpec, values: Vec<f32>, kept: &Kept, head_width: usize) -> Vec<f32> {
    let [_, columns] = weight.matrix();
    match (weight.role, weight.kind) {
        (_, Kind::Norm) => values,
        (Role::Query, _) => keep_rows(&values, columns, head_width, &kept.heads),
        (Role::Key | Role::Value, _) => keep_rows(&values, columns, head_width, &kept.groups),
        (Role::Gate | Role::Up, _) => keep_rows(&values, columns, 1, &kept.neurons),
        (Role::AttentionOutput, Kind::Linear { .. }) => {
            keep_columns(&values, columns, head_width, &kept.heads)
        }
        (Role::Down, Kind::Linear { .. }) => keep_columns(&values, columns, 1, &kept.neurons),
        _ => values,
    }
}

/// Writes a tuned model without the heads and neurons that put out nothing, as a Hugging Face
/// folder of the same architecture.
///
/// # Errors
/// If the architecture's configuration has no head width of its own, a change cannot be merged, or
/// the disk is full.
pub fn write_structured(
    tuned: &Tuned<'_>,
    beside: &Beside,
    dtype: Dtype,
    card: &dyn Fn(&Cut) -> String,
    path: &Path,
) -> Result<Cut> {
    crate::export::check_mergeable(tuned)?;
    let spec = tuned.model.spec();
    let (kept, dead_heads_left) = find(tuned)?;
    let first = kept.first().ok_or_else(|| refuse("a model without blocks", "give another"))?;
    let model = smaller(spec, first, dtype)?;
    let values = |weight: &WeightSpec| -> retune_core::Result<Vec<f32>> {
        let own = spec.weight(&weight.name).unwrap_or(weight);
        let values = merged(tuned, own)?;
        let Some(layer) = own.layer.and_then(|layer| kept.get(layer)) else { return Ok(values) };
        Ok(cut(own, values, layer, spec.head_width))
    };
    let mut nonzero = 0;
    for weight in &model.spec().weights {
        let values = values(weight)?;
        if values.len() != weight.count() {
            return Err(no_head_width(spec));
        }
        if weight.is_linear() {
            nonzero += values.iter().filter(|value| **value != 0.0).count() as u64;
        }
    }
    let entries = |spec: &ModelSpec| spec.linears().map(|w| w.count() as u64).sum::<u64>();
    let report = Cut {
        heads: [spec.num_heads, first.heads.len()],
        key_heads: [spec.num_key_heads, first.groups.len()],
        inner_width: [spec.inner_width, first.neurons.len()],
        dead_heads_left,
        num_values: [spec.count(), model.spec().count()],
        flops_per_token: [2 * entries(spec), 2 * entries(model.spec())],
        nonzero_flops_per_token: 2 * nonzero,
    };
    let card = card(&report);
    write_weights(&[tuned], model.spec(), beside, dtype, &card, path, values)?;
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dead(text: &str) -> Vec<bool> {
        text.chars().map(|c| c == 'x').collect()
    }

    #[test]
    fn as_much_is_cut_as_every_block_can_give() {
        // Four heads of their own: block 0 could give two, block 1 one.
        let kept = decide(&[dead("x.x."), dead("..x.")], &[dead("x.x"), dead("xx.")], 1);
        assert_eq!((&*kept[0].heads, &*kept[1].heads), (&[1, 2, 3][..], &[0, 1, 3][..]));
        assert_eq!((&*kept[0].groups, &*kept[1].groups), (&[1, 2, 3][..], &[0, 1, 3][..]));
        assert_eq!((&*kept[0].neurons, &*kept[1].neurons), (&[1][..], &[2][..]));
    }

    #[test]
    fn shared_keys_go_with_their_whole_group() {
        let kept = decide(&[dead("xx...."), dead("....xx")], &[], 2);
        assert_eq!((&*kept[0].heads, &*kept[0].groups), (&[2, 3, 4, 5][..], &[1, 2][..]));
        assert_eq!((&*kept[1].heads, &*kept[1].groups), (&[0, 1, 2, 3][..], &[0, 1][..]));
        // One of each group, the keys stay.
        let kept = decide(&[dead("x..x"), dead(".xx.")], &[], 2);
        assert_eq!((&*kept[0].heads, &*kept[0].groups), (&[1, 2][..], &[0, 1][..]));
        assert_eq!(kept[1].heads, [0, 3]);
        // Neither: one head of one group.
        let kept = decide(&[dead("x...")], &[], 2);
        assert_eq!(kept[0].heads, [0, 1, 2, 3]);
    }

    #[test]
    fn something_always_stays() {
        let kept = decide(&[dead("xxxx")], &[dead("xx")], 2);
        assert_eq!((kept[0].heads.len(), kept[0].groups.len(), kept[0].neurons.len()), (1, 1, 1));
    }

    #[test]
    fn blocks_of_rows_and_columns_are_kept() {
        let values: Vec<f32> = (0..8).map(|i| i as f32).collect();
        assert_eq!(keep_rows(&values, 2, 2, &[1]), [4.0, 5.0, 6.0, 7.0]);
        assert_eq!(keep_columns(&values, 4, 2, &[1]), [2.0, 3.0, 6.0, 7.0]);
        assert_eq!(zero_blocks(&[0.0, 0.0, 1.0, 0.0, 0.0, 0.0], 3, 1), [true, true, false]);
    }
}
