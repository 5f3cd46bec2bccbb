//! One tensor of all models, read in chunks.

use std::collections::BTreeMap;

use crate::{Error, Result};

/// Values of a chunk and input: few enough that those of several inputs lie in a core's own cache and
/// their memory is used again for the next tensor, enough to hide a read's cost.
const CHUNK: usize = 1 << 14;

/// The values of one input's tensor.
pub trait Values: Sync + std::fmt::Debug {
    /// Reads the values from index `start` on, until `out` is full.
    ///
    /// # Errors
    /// If the system refuses, or a value is beyond `f32`.
    fn read(&self, start: usize, out: &mut [f32]) -> Result<()>;

    /// Names the model in messages.
    fn model(&self) -> String;
}

/// Parameters with the values they have for one tensor. Flags are 0 or 1.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Resolved(BTreeMap<&'static str, f64>);

impl Resolved {
    /// Sets a parameter.
    pub fn set(&mut self, name: &'static str, value: f64) {
        self.0.insert(name, value);
    }

    /// Returns a number.
    ///
    /// # Panics
    /// If the method does not declare the parameter, which is a mistake of its author.
    pub fn number(&self, name: &str) -> f64 {
        self.0[name]
    }

    /// Returns a flag.
    ///
    /// # Panics
    /// As [`Self::number`].
    pub fn flag(&self, name: &str) -> bool {
        self.0[name] != 0.0
    }

    /// Lists names and values in alphabetical order.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, f64)> {
        self.0.iter().map(|(name, value)| (*name, *value))
    }
}

/// One tensor of all models.
#[derive(Debug)]
pub struct Group<'a> {
    /// The tensor's name in the result.
    pub name: &'a str,
    /// Its shape, slowest dimension first.
    pub shape: &'a [usize],
    /// The base's values, where the method knows a base.
    pub base: Option<&'a dyn Values>,
    /// The other models' values, in the plan's order.
    pub inputs: Vec<&'a dyn Values>,
    /// Parameters of the tensor.
    pub shared: &'a Resolved,
    /// Parameters of each input.
    pub own: &'a [Resolved],
    /// Seed of the methods that draw.
    pub seed: u64,
    /// Whether to do as mergekit 0.1.4 where it departs from a method's paper.
    pub compat: bool,
}

/// A run of values of all models.
#[derive(Debug)]
pub struct Chunk {
    /// Index of the first value in the flattened tensor.
    pub start: usize,
    /// The base's values; empty without one.
    pub base: Vec<f32>,
    /// The inputs' values, or their differences from the base.
    pub inputs: Vec<Vec<f32>>,
}

impl Group<'_> {
    /// Returns the count of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Tells whether there is no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the length of a row: the last dimension, or everything of a vector.
    pub fn row(&self) -> usize {
        self.shape.last().copied().unwrap_or(1).max(1)
    }

    /// Goes over all values in order, in chunks of whole units of `unit` values.
    ///
    /// # Errors
    /// If an input cannot be read or holds NaN or infinities, or `visit` fails.
    pub fn sweep(
        &self,
        unit: usize,
        visit: &mut dyn FnMut(&mut Chunk) -> Result<()>,
    ) -> Result<()> {
        self.sweep_unchecked(unit, &mut |chunk| {
            if let Some(base) = self.base {
                self.check(base, chunk.start, &chunk.base)?;
            }
            for (input, values) in self.inputs.iter().zip(&chunk.inputs) {
                self.check(*input, chunk.start, values)?;
            }
            visit(chunk)
        })
    }

    /// As [`Self::sweep`], for methods whose result is not finite where an input is not: they look
    /// at that alone, and [`Self::sweep`] again for whose fault it is.
    ///
    /// # Errors
    /// If an input cannot be read, or `visit` fails.
    pub(crate) fn sweep_unchecked(
        &self,
        unit: usize,
        visit: &mut dyn FnMut(&mut Chunk) -> Result<()>,
    ) -> Result<()> {
        let step = (CHUNK / unit).max(1) * unit;
        let num_values = self.len();
        let mut chunk =
            Chunk { start: 0, base: Vec::new(), inputs: vec![Vec::new(); self.inputs.len()] };
        let fill = |values: &dyn Values, start, n, out: &mut Vec<f32>| {
            out.resize(n, 0.0);
            values.read(start, out)
        };
        while chunk.start < num_values {
            let n = step.min(num_values - chunk.start);
            if let Some(base) = self.base {
                fill(base, chunk.start, n, &mut chunk.base)?;
            }
            for (input, out) in self.inputs.iter().zip(&mut chunk.inputs) {
                fill(*input, chunk.start, n, out)?;
            }
            visit(&mut chunk)?;
            chunk.start += n;
        }
        Ok(())
    }

    /// As [`Self::sweep`], with the inputs' differences from the base where there is one.
    ///
    /// # Errors
    /// As [`Self::sweep`].
    pub fn sweep_changes(
        &self,
        unit: usize,
        visit: &mut dyn FnMut(&mut Chunk) -> Result<()>,
    ) -> Result<()> {
        self.sweep(unit, &mut |chunk| {
            if self.base.is_some() {
                for input in &mut chunk.inputs {
                    input.iter_mut().zip(&chunk.base).for_each(|(x, b)| *x -= b);
                }
            }
            visit(chunk)
        })
    }

    /// Refuses NaN and infinities among the values of a model from `start` on.
    fn check(&self, values: &dyn Values, start: usize, found: &[f32]) -> Result<()> {
        if all_finite(found) {
            return Ok(());
        }
        let at = found.iter().position(|x| !x.is_finite()).unwrap_or(0);
        Err(Error::Values {
            tensor: self.name.to_owned(),
            model: values.model(),
            what: format!("value {} is {}", start + at, found[at]),
            help: "this model diverged or is damaged: leave it out".to_owned(),
        })
    }

    /// Makes an error of a tensor for which the method has no answer.
    pub(crate) fn no_answer(&self, what: &str, help: &str) -> Error {
        Error::Values {
            tensor: self.name.to_owned(),
            model: "all models".to_owned(),
            what: what.to_owned(),
            help: help.to_owned(),
        }
    }
}

/// Tells whether no value is NaN or infinite, without a branch per value.
pub(crate) fn all_finite(values: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    values.iter().fold(true, |all, x| all & (x.to_bits() & EXPONENT != EXPONENT))
}
