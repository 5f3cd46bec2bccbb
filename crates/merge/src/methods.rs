//! Merge methods: what each one takes, and its one line in the list of all.
//!
//! A method sees one tensor of all models at a time, and of that only chunks: it sweeps over the
//! inputs as often as its rule needs sums, ranks or angles, and once more to write.

mod angles;
mod arcee_fusion;
mod elementwise;
mod gram;
mod group;
mod karcher;
mod linear;
mod model_stock;
mod multislerp;
mod nearswap;
mod nuslerp;
mod passthrough;
mod ram;
mod sce;
mod select;
mod slerp;
mod sparsify;
mod task_arithmetic;

pub use group::{Chunk, Group, Resolved, Values};

use crate::Result;

/// What a method does with the base model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// It is an input like the others, where the plan lists it; else it only lends its
    /// configuration and tokenizer.
    Ordinary,
    /// Changes are taken against it, where the plan names one.
    Optional,
    /// Changes are taken against it.
    Required,
}

/// Whether a parameter holds for a tensor or for each input of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// One value.
    Shared,
    /// One value per input that is not the base.
    Input,
}

/// What a parameter's values are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A number; a list is interpolated over the layers.
    Number,
    /// A whole number.
    Count,
    /// Yes or no; of a list the nearest entry before the layer holds.
    Flag,
}

/// One parameter of a method.
#[derive(Debug, Clone, Copy)]
pub struct Parameter {
    /// Its name in a plan.
    pub name: &'static str,
    /// What it means.
    pub about: &'static str,
    /// For what it holds.
    pub scope: Scope,
    /// What its values are.
    pub kind: Kind,
    /// The value where a plan gives none; without one it must be given.
    pub default: Option<f64>,
    /// Smallest value.
    pub low: f64,
    /// Largest value.
    pub high: f64,
}

impl Parameter {
    const fn new(name: &'static str, scope: Scope, kind: Kind, about: &'static str) -> Self {
        let (low, high) = (f64::MIN, f64::MAX);
        Self { name, about, scope, kind, default: None, low, high }
    }

    const fn shared(name: &'static str, about: &'static str) -> Self {
        Self::new(name, Scope::Shared, Kind::Number, about)
    }

    const fn flag(name: &'static str, default: bool, about: &'static str) -> Self {
        let mut parameter = Self::new(name, Scope::Shared, Kind::Flag, about);
        parameter.default = Some(if default { 1.0 } else { 0.0 });
        parameter.within(0.0, 1.0)
    }

    const fn input(name: &'static str, about: &'static str) -> Self {
        Self::new(name, Scope::Input, Kind::Number, about)
    }

    const fn or(mut self, default: f64) -> Self {
        self.default = Some(default);
        self
    }

    const fn within(mut self, low: f64, high: f64) -> Self {
        (self.low, self.high) = (low, high);
        self
    }
}

/// The share of each input in the result.
const WEIGHT: Parameter = Parameter::input("weight", "share of this model");

/// How a method merges one tensor: reads the group, pushes all values of the result in order.
type Run = fn(&Group<'_>, &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()>;

/// What is wrong with the values a tensor's parameters came to; `None` where nothing is.
type Check = fn(&Resolved, &[Resolved]) -> Option<String>;

/// A merge method.
#[derive(Debug)]
pub struct Method {
    /// Its name in a plan.
    pub name: &'static str,
    /// Its name in the literature.
    pub title: &'static str,
    /// Where it is described.
    pub source: &'static str,
    /// What it does, in one sentence.
    pub about: &'static str,
    /// What it does with the base model.
    pub base: Base,
    /// Fewest inputs besides the base.
    pub min_inputs: usize,
    /// Most inputs besides the base.
    pub max_inputs: usize,
    /// Its parameters.
    pub parameters: &'static [Parameter],
    check: Check,
    run: Run,
}

impl Method {
    /// Finds a method by its name in a plan.
    pub fn find(name: &str) -> Option<&'static Self> {
        ALL.iter().copied().find(|method| method.name == name)
    }

    /// Says what is wrong with parameters that are each within their range.
    pub fn check(&self, shared: &Resolved, own: &[Resolved]) -> Option<String> {
        (self.check)(shared, own)
    }

    /// Merges one tensor, pushing its values in order.
    ///
    /// # Errors
    /// If an input cannot be read or holds NaN or infinities, the method has no answer for these
    /// values, or `push` fails.
    pub fn merge(
        &self,
        group: &Group<'_>,
        push: &mut dyn FnMut(&[f32]) -> Result<()>,
    ) -> Result<()> {
        (self.run)(group, push)
    }
}

/// All methods, in the order they are listed to people.
pub const ALL: &[&Method] = &[
    &linear::LINEAR,
    &slerp::SLERP,
    &nuslerp::NUSLERP,
    &multislerp::MULTISLERP,
    &karcher::KARCHER,
    &task_arithmetic::TASK_ARITHMETIC,
    &task_arithmetic::TIES,
    &task_arithmetic::DARE_LINEAR,
    &task_arithmetic::DARE_TIES,
    &task_arithmetic::DELLA,
    &task_arithmetic::DELLA_LINEAR,
    &task_arithmetic::BREADCRUMBS,
    &task_arithmetic::BREADCRUMBS_TIES,
    &sce::SCE,
    &ram::RAM,
    &ram::RAMPLUS_TL,
    &model_stock::MODEL_STOCK,
    &nearswap::NEARSWAP,
    &arcee_fusion::ARCEE_FUSION,
    &passthrough::PASSTHROUGH,
];

fn nothing_to_check(_: &Resolved, _: &[Resolved]) -> Option<String> {
    None
}

/// Refuses weights that sum to zero where the result is divided by their sum.
fn check_sum(own: &[Resolved]) -> Option<String> {
    let weights: Vec<f64> = own.iter().map(|one| one.number("weight")).collect();
    let sum: f64 = weights.iter().sum();
    (sum.abs() < 1e-8).then(|| {
        format!("the weights {weights:?} sum to zero, and the result is divided by their sum")
    })
}
