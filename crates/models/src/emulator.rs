//! A model that runs some of its blocks more than once: the emulator of offsite tuning.
//!
//! The blocks are stored once. `retune_emulator` of the configuration says which of them runs at
//! each place (`order`) and at which place each is itself (`kept`); elsewhere it is repeated as the
//! base has it, whatever was tuned.

use std::sync::Arc;

use crate::config::{Config, MAX_LAYERS};
use retune_core::model::{Model, Output};
use retune_core::pass::Pass;
use retune_core::spec::ModelSpec;
use retune_core::{Error, Result};
use tensor::Tensor;

/// The key of a configuration that makes a model an emulator.
pub const EMULATOR_KEY: &str = "retune_emulator";

/// A model with a list of which block runs where.
#[derive(Debug)]
pub struct Emulator {
    model: Box<dyn Model>,
    /// The block of each place.
    order: Vec<usize>,
    /// The place at which each block is itself, if any.
    own: Vec<Option<usize>>,
}

impl Emulator {
    /// Lets `model` run the blocks `order`, each of which is itself at its place in `own`.
    ///
    /// # Errors
    /// [`Error::Input`] if a block or place does not exist; [`Error::Unsupported`] for models of two
    /// sides.
    pub fn new(model: Box<dyn Model>, order: Vec<usize>, own: Vec<Option<usize>>) -> Result<Self> {
        let count = model.spec().num_layers;
        let wrong = |expected: String, found: String| Error::Input {
            what: "the blocks of an emulator are out of order".to_owned(),
            expected,
            found,
            help: "make the emulator again".to_owned(),
        };
        if model.spec().has_sides() {
            return Err(Error::Unsupported {
                what: format!("an emulator of {}", model.spec().class),
                help: "use a model with one stack of blocks".to_owned(),
            });
        }
        if order.is_empty() || order.len() > MAX_LAYERS || order.iter().any(|b| *b >= count) {
            return Err(wrong(format!("blocks below {count}"), format!("{order:?}")));
        }
        let fits = |(block, place): (usize, &Option<usize>)| {
            place.is_none_or(|place| order.get(place) == Some(&block))
        };
        if own.len() != count || !own.iter().enumerate().all(fits) {
            let expected = format!("a place of its own for each of {count} blocks");
            return Err(wrong(expected, format!("{own:?}")));
        }
        Ok(Self { model, order, own })
    }
}

/// Makes a model the emulator its configuration asks for.
///
/// # Errors
/// If the lists of the configuration are damaged.
pub(crate) fn as_configured(model: Box<dyn Model>, config: &Config) -> Result<Box<dyn Model>> {
    let Some(part) = config.part(EMULATOR_KEY)? else { return Ok(model) };
    let list = |key: &str| -> Result<Vec<usize>> {
        let numbers = part.get(key).and_then(|list| list.as_array());
        let numbers = numbers.and_then(|list| {
            list.iter().map(|n| n.as_u64().map(|n| n.min(MAX_LAYERS as u64) as usize)).collect()
        });
        numbers.ok_or_else(|| part.unknown(key, "a list of blocks, counted from 0"))
    };
    let own = list("kept")?.into_iter().map(Some).collect();
    Ok(Box::new(Emulator::new(model, list("order")?, own)?))
}

impl Model for Emulator {
    fn spec(&self) -> &Arc<ModelSpec> {
        self.model.spec()
    }

    fn depth(&self) -> usize {
        self.order.len()
    }

    fn embed(&self, pass: &mut Pass<'_>) -> Result<Tensor<2>> {
        self.model.embed(pass)
    }

    fn layer(&self, pass: &mut Pass<'_>, index: usize, x: Tensor<2>) -> Result<Tensor<2>> {
        self.model.layer(pass, self.order[index], x)
    }

    fn finish(&self, pass: &mut Pass<'_>, x: Tensor<2>) -> Result<Output> {
        self.model.finish(pass, x)
    }

    fn block(&self, pass: &mut Pass<'_>, index: usize, x: Tensor<2>) -> Result<Tensor<2>> {
        let block = self.order[index];
        let is_repeat = self.own[block] != Some(index);
        pass.placed(index, is_repeat, |pass| self.model.block(pass, block, x))
    }
}
