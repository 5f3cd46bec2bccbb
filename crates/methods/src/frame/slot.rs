//! One tensor a method keeps: its name, its shape and how it begins.

use retune_core::method::PlannedParameter;
use retune_core::parameters::{Integers, ParameterId, Parameters};
use retune_core::random::Random;
use retune_files::Dtype;

/// How a tensor begins.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Start {
    Constant(f32),
    /// Uniform within plus and minus the bound.
    Uniform(f64),
    /// Normal with this deviation.
    Normal(f64),
    Computed,
}

/// One tensor a method keeps: how it is called, its shape and how it begins.
#[derive(Debug, Clone, PartialEq)]
pub struct Slot {
    name: String,
    shape: Vec<usize>,
    start: Start,
    trains: bool,
    saved: bool,
    /// Type in a file and limits, where it holds whole numbers.
    integers: Option<(Dtype, Vec<i32>)>,
}

impl Slot {
    fn new(name: impl Into<String>, shape: impl Into<Vec<usize>>, start: Start) -> Self {
        let (name, shape) = (name.into(), shape.into());
        Self { name, shape, start, trains: true, saved: true, integers: None }
    }

    /// Begins as zeros.
    pub fn zeros(name: impl Into<String>, shape: impl Into<Vec<usize>>) -> Self {
        Self::new(name, shape, Start::Constant(0.0))
    }

    /// Begins as one number everywhere.
    pub fn constant(name: impl Into<String>, shape: impl Into<Vec<usize>>, value: f64) -> Self {
        Self::new(name, shape, Start::Constant(value as f32))
    }

    /// Begins uniform within plus and minus `bound`.
    pub fn uniform(name: impl Into<String>, shape: impl Into<Vec<usize>>, bound: f64) -> Self {
        Self::new(name, shape, Start::Uniform(bound))
    }

    /// Begins uniform within ±1/√(last dimension): Kaiming's rule with a = √5.
    pub fn kaiming(name: impl Into<String>, shape: impl Into<Vec<usize>>) -> Self {
        let shape = shape.into();
        let inputs = shape.last().copied().unwrap_or(1).max(1);
        Self::new(name, shape, Start::Uniform((inputs as f64).powf(-0.5)))
    }

    /// Begins normal with this deviation.
    pub fn normal(name: impl Into<String>, shape: impl Into<Vec<usize>>, deviation: f64) -> Self {
        Self::new(name, shape, Start::Normal(deviation))
    }

    /// Begins as [`Built::computed`](super::formula::Built::computed) says.
    pub fn computed(name: impl Into<String>, shape: impl Into<Vec<usize>>) -> Self {
        Self::new(name, shape, Start::Computed)
    }

    /// Holds whole numbers that do not train; begins as [`Built::computed`](super::formula::Built::computed) says.
    ///
    /// `limits` are those of [`Integers`]: what a file holds is checked against them.
    pub fn integers(
        name: impl Into<String>,
        shape: impl Into<Vec<usize>>,
        dtype: Dtype,
        limits: Vec<i32>,
    ) -> Self {
        let integers = Some((dtype, limits));
        Self { trains: false, integers, ..Self::new(name, shape, Start::Computed) }
    }

    /// Is in an adapter's file only if `saved`; else it is made again when the file is read.
    #[must_use]
    pub fn saved_if(self, saved: bool) -> Self {
        Self { saved, ..self }
    }

    /// Is saved but does not train.
    #[must_use]
    pub fn buffer(self) -> Self {
        Self { trains: false, ..self }
    }
}

/// Values of a tensor that is computed.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// Floats.
    Floats(Vec<f32>),
    /// Whole numbers.
    Integers(Vec<i32>),
}

impl Slot {
    /// Describes the parameter for a plan.
    pub(super) fn planned(&self, prefix: &str, place: &str) -> PlannedParameter {
        PlannedParameter {
            name: format!("{prefix}{}", self.name),
            shape: self.shape.clone(),
            place: place.to_owned(),
            trains: self.trains,
        }
    }

    /// Adds the parameter with its first values.
    pub(super) fn add(
        &self,
        parameters: &mut Parameters,
        prefix: &str,
        random: &mut Random,
        computed: &mut std::vec::IntoIter<Values>,
    ) -> ParameterId {
        let name = format!("{prefix}{}", self.name);
        let mut values = vec![0.0; self.shape.iter().product()];
        match self.start {
            Start::Constant(value) => values.fill(value),
            Start::Uniform(bound) => random.fill_uniform(&mut values, bound),
            Start::Normal(deviation) => random.fill_normal(&mut values, deviation),
            Start::Computed => match (computed.next(), &self.integers) {
                (Some(Values::Floats(floats)), None) => values = floats,
                (Some(Values::Integers(values)), Some((dtype, limits))) => {
                    let integers = Integers { values, dtype: *dtype, limits: limits.clone() };
                    let id = parameters.add_integers(name, &self.shape, integers);
                    parameters.get_mut(id).saved = self.saved;
                    return id;
                }
                _ => unreachable!("{name} is computed, but has no values of its kind"),
            },
        }
        let id = if self.trains {
            parameters.add(name, &self.shape, values)
        } else {
            parameters.add_buffer(name, &self.shape, values)
        };
        parameters.get_mut(id).saved = self.saved;
        id
    }
}
