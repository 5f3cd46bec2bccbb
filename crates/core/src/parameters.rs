//! Everything that trains, and every buffer a method keeps, in one ordered list.

use crate::error::{Error, Result};
use retune_files::Dtype;
use retune_files::safetensors::{SafetensorsWriter, TensorView};
use tensor::{Device, Gradients, Tensor, TensorData};

/// The place of a parameter in [`Parameters`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ParameterId(usize);

impl ParameterId {
    /// Returns the position in the list.
    pub fn index(self) -> usize {
        self.0
    }
}

/// A tensor that trains, or that a method keeps beside those that do.
#[derive(Debug)]
pub struct Parameter {
    /// The name it is saved under, e.g. PEFT's key or the checkpoint's own name.
    pub name: String,
    /// Its shape in the file.
    pub shape: Vec<usize>,
    /// Whether the optimiser may move it.
    pub trains: bool,
    /// Its learning rate is the run's times this.
    pub rate_factor: f64,
    /// Whether weight decay applies.
    pub decays: bool,
    /// Whether an adapter's file holds it; what is not there can be made again from a seed.
    pub saved: bool,
    value: Value,
}

#[derive(Debug)]
enum Value {
    /// Flat values; a leaf of the autodiff graph where it trains.
    Floats(Tensor<1>),
    /// Places and counts, which `f32` could not hold above 2²⁴.
    Integers(Integers),
}

/// Whole numbers that do not train, such as the places of a sparse change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Integers {
    /// The numbers, in row-major order.
    pub values: Vec<i32>,
    /// How a file holds them: `U8`, `I16`, `I32` or `I64`.
    pub dtype: Dtype,
    /// What the numbers have to stay below: one bound for all, or one per entry of the first axis.
    pub limits: Vec<i32>,
}

impl Integers {
    /// Returns the first number that is negative or not below its limit.
    fn beyond(&self, values: &[i64]) -> Option<i64> {
        let run = values.len().div_ceil(self.limits.len().max(1)).max(1);
        let limits = |place: usize| self.limits.get(place / run).copied().unwrap_or(i32::MAX);
        let numbers = values.iter().enumerate();
        numbers
            .map(|(place, v)| (*v, limits(place)))
            .find(|(v, l)| *v < 0 || v >= &i64::from(*l))
            .map(|(v, _)| v)
    }
}

impl Parameter {
    /// Returns the number of values.
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns the type the values have in a file.
    pub fn dtype(&self) -> Dtype {
        match self.value {
            Value::Floats(_) => Dtype::F32,
            Value::Integers(Integers { dtype, .. }) => dtype,
        }
    }

    fn floats(&self) -> &Tensor<1> {
        match &self.value {
            Value::Floats(value) => value,
            Value::Integers(_) => unreachable!("{} holds whole numbers", self.name),
        }
    }
}

/// The ordered list of parameters.
///
/// Saving, resuming, counting, moving and averaging are written once over this list: a change
/// holds only [`ParameterId`]s.
#[derive(Debug)]
pub struct Parameters {
    device: Device,
    list: Vec<Parameter>,
}

impl Parameters {
    /// Makes an empty list on `device` (without autodiff; leaves are put on its autodiff side).
    pub fn new(device: &Device) -> Self {
        Self { device: device.clone(), list: Vec::new() }
    }

    /// Adds a parameter that trains and returns its place.
    ///
    /// # Panics
    /// If `values` do not fill `shape`, or the name is taken: both are mistakes of a method.
    pub fn add(
        &mut self,
        name: impl Into<String>,
        shape: &[usize],
        values: Vec<f32>,
    ) -> ParameterId {
        self.push(name.into(), shape, values, true)
    }

    /// Adds a buffer: saved and resumed with the rest, never moved by the optimiser.
    ///
    /// # Panics
    /// As [`Parameters::add`].
    pub fn add_buffer(
        &mut self,
        name: impl Into<String>,
        shape: &[usize],
        values: Vec<f32>,
    ) -> ParameterId {
        self.push(name.into(), shape, values, false)
    }

    /// Adds a buffer of whole numbers, such as the places of a sparse change.
    ///
    /// # Panics
    /// As [`Parameters::add`].
    pub fn add_integers(
        &mut self,
        name: impl Into<String>,
        shape: &[usize],
        integers: Integers,
    ) -> ParameterId {
        let count = integers.values.len();
        self.insert(name.into(), shape, count, Value::Integers(integers), false)
    }

    fn push(
        &mut self,
        name: String,
        shape: &[usize],
        values: Vec<f32>,
        trains: bool,
    ) -> ParameterId {
        let count = values.len();
        let value = Value::Floats(self.leaf(values, trains));
        self.insert(name, shape, count, value, trains)
    }

    fn insert(
        &mut self,
        name: String,
        shape: &[usize],
        count: usize,
        value: Value,
        trains: bool,
    ) -> ParameterId {
        assert_eq!(count, shape.iter().product::<usize>(), "values of parameter {name}");
        assert!(self.find(&name).is_none(), "parameter {name} exists already");
        self.list.push(Parameter {
            name,
            shape: shape.to_vec(),
            trains,
            rate_factor: 1.0,
            decays: true,
            saved: true,
            value,
        });
        ParameterId(self.list.len() - 1)
    }

    fn leaf(&self, values: Vec<f32>, trains: bool) -> Tensor<1> {
        let count = values.len();
        let data = TensorData::new(values, [count]);
        if trains {
            Tensor::from_data(data, &self.device.clone().autodiff()).require_grad()
        } else {
            Tensor::from_data(data, &self.device)
        }
    }

    /// Returns the device the values lie on, without autodiff.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Returns the parameters in order.
    pub fn iter(&self) -> impl Iterator<Item = (ParameterId, &Parameter)> {
        self.list.iter().enumerate().map(|(index, parameter)| (ParameterId(index), parameter))
    }

    /// Returns one parameter.
    pub fn get(&self, id: ParameterId) -> &Parameter {
        &self.list[id.0]
    }

    /// Returns one parameter's settings for change.
    pub fn get_mut(&mut self, id: ParameterId) -> &mut Parameter {
        &mut self.list[id.0]
    }

    /// Finds a parameter by name.
    pub fn find(&self, name: &str) -> Option<ParameterId> {
        self.list.iter().position(|parameter| parameter.name == name).map(ParameterId)
    }

    /// Returns the number of values that train.
    pub fn num_trainable(&self) -> usize {
        self.list.iter().filter(|p| p.trains).map(Parameter::count).sum()
    }

    /// Returns the values as a tensor of rank `D`, tracked by autodiff where the parameter trains.
    ///
    /// # Panics
    /// If `shape` holds another number of values, or these are whole numbers.
    pub fn tracked<const D: usize>(&self, id: ParameterId, shape: [usize; D]) -> Tensor<D> {
        self.list[id.0].floats().clone().reshape(shape)
    }

    /// Returns the values as a constant tensor of rank `D`.
    ///
    /// # Panics
    /// As [`Parameters::tracked`].
    pub fn constant<const D: usize>(&self, id: ParameterId, shape: [usize; D]) -> Tensor<D> {
        self.list[id.0].floats().clone().inner().reshape(shape)
    }

    /// Copies the values out, in row-major order; whole numbers are rounded to `f32`.
    pub fn values(&self, id: ParameterId) -> Vec<f32> {
        match &self.list[id.0].value {
            Value::Floats(value) => to_vec(value.clone().inner()),
            Value::Integers(integers) => {
                integers.values.iter().map(|value| *value as f32).collect()
            }
        }
    }

    /// Returns the values of a buffer of whole numbers, in row-major order; none of any other.
    pub fn integers(&self, id: ParameterId) -> &[i32] {
        match &self.list[id.0].value {
            Value::Floats(_) => &[],
            Value::Integers(integers) => &integers.values,
        }
    }

    /// Writes the values into a file, in the parameter's own type and under its name.
    ///
    /// # Errors
    /// If the disk is full, or the file was not announced with this tensor.
    pub fn write(&self, id: ParameterId, writer: &mut SafetensorsWriter) -> Result<()> {
        let name = &self.list[id.0].name;
        match &self.list[id.0].value {
            Value::Floats(_) => writer.write_f32(name, &self.values(id))?,
            Value::Integers(Integers { values, dtype, .. }) => {
                writer.write(name, &integer_bytes(values, *dtype))?;
            }
        }
        Ok(())
    }

    /// Takes the values from a tensor of a file.
    ///
    /// # Errors
    /// If the tensor holds another kind of numbers, too few or too many, or ones above 32 bits.
    pub fn read(&mut self, id: ParameterId, tensor: &TensorView<'_>) -> Result<()> {
        match self.list[id.0].value {
            Value::Floats(_) => self.set(id, tensor.to_f32()?),
            Value::Integers(_) => self.set_integers(id, &tensor.to_i64()?),
        }
    }

    /// Replaces the values.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are too few or too many.
    pub fn set(&mut self, id: ParameterId, values: Vec<f32>) -> Result<()> {
        let parameter = &self.list[id.0];
        if values.len() != parameter.count() || parameter.dtype() != Dtype::F32 {
            return Err(Error::Shape {
                name: parameter.name.clone(),
                expected: parameter.shape.clone(),
                found: vec![values.len()],
                help: "the file belongs to another method or model".to_owned(),
            });
        }
        let trains = parameter.trains;
        self.list[id.0].value = Value::Floats(self.leaf(values, trains));
        Ok(())
    }

    /// Replaces the values of a buffer of whole numbers.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are too few or too many, or one is beyond its limit.
    pub fn set_integers(&mut self, id: ParameterId, values: &[i64]) -> Result<()> {
        let parameter = &mut self.list[id.0];
        let wrong = |help: String| Error::Shape {
            name: parameter.name.clone(),
            expected: parameter.shape.clone(),
            found: vec![values.len()],
            help,
        };
        let count = parameter.count();
        match &mut parameter.value {
            Value::Integers(integers) if values.len() == count => {
                if let Some(beyond) = integers.beyond(values) {
                    return Err(wrong(format!(
                        "it holds {beyond}, expected numbers from 0 and below {:?}: the file is \
                         damaged, or of another model",
                        integers.limits
                    )));
                }
                integers.values = values.iter().map(|value| *value as i32).collect();
                Ok(())
            }
            _ => Err(wrong("the file belongs to another method or model".to_owned())),
        }
    }

    /// Lets `change` edit the values in place, without a copy where the device is the processor.
    ///
    /// Whole numbers do not change.
    pub fn update(&mut self, id: ParameterId, change: impl FnOnce(&mut [f32])) {
        let trains = self.list[id.0].trains;
        let hole = Value::Floats(self.leaf(vec![0.0], false));
        let value = std::mem::replace(&mut self.list[id.0].value, hole);
        let Value::Floats(value) = value else {
            self.list[id.0].value = value;
            return;
        };
        let mut values = to_vec(value.inner());
        change(&mut values);
        self.list[id.0].value = Value::Floats(self.leaf(values, trains));
    }

    /// Takes a parameter's gradient out of `gradients`, if it has one.
    pub fn take_gradient(&self, id: ParameterId, gradients: &mut Gradients) -> Option<Vec<f32>> {
        self.list[id.0].floats().grad_remove(gradients).map(to_vec)
    }
}

/// Returns whole numbers as a file holds them.
pub fn integer_bytes(values: &[i32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::U8 => values.iter().map(|v| *v as u8).collect(),
        Dtype::I16 => values.iter().flat_map(|v| (*v as i16).to_le_bytes()).collect(),
        Dtype::I64 => values.iter().flat_map(|v| i64::from(*v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// Copies (or moves, where nobody else holds it) a tensor's values out in row-major order.
pub fn to_vec<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor
        .try_into_vec_as::<f32>()
        .unwrap_or_else(|error| unreachable!("f32 tensors are readable: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list() -> Parameters {
        let mut parameters = Parameters::new(&Device::flex());
        parameters.add("a", &[2, 2], vec![1.0, 2.0, 3.0, 4.0]);
        parameters.add_buffer("mask", &[2], vec![1.0, 0.0]);
        parameters
    }

    #[test]
    fn a_gradient_reaches_its_parameter() {
        let parameters = list();
        let a = parameters.find("a").unwrap();
        let loss = (parameters.tracked(a, [2, 2]) * parameters.tracked(a, [2, 2])).sum();
        let mut gradients = loss.backward();
        assert_eq!(parameters.take_gradient(a, &mut gradients).unwrap(), [2.0, 4.0, 6.0, 8.0]);
    }

    #[test]
    fn updates_stay_and_buffers_do_not_train() {
        let mut parameters = list();
        let a = parameters.find("a").unwrap();
        parameters.update(a, |values| values[0] = 9.0);
        assert_eq!(parameters.values(a), [9.0, 2.0, 3.0, 4.0]);
        assert!(
            parameters.tracked(a, [4]).is_require_grad() || parameters.tracked(a, [4]).is_tracked()
        );
        assert_eq!(parameters.num_trainable(), 4);
        assert!(parameters.set(a, vec![0.0]).is_err());
    }

    #[test]
    fn whole_numbers_keep_every_bit() {
        let mut parameters = list();
        let integers =
            Integers { values: vec![16_777_217, 1], dtype: Dtype::I64, limits: vec![1 << 25, 10] };
        let id = parameters.add_integers("places", &[2], integers);
        let bytes = integer_bytes(parameters.integers(id), Dtype::I64);
        assert_eq!(bytes[..8], 16_777_217_i64.to_le_bytes());
        assert_eq!(parameters.get(id).dtype(), Dtype::I64);
        parameters.update(id, |_| unreachable!("no floats"));
        parameters.set_integers(id, &[50, 9]).unwrap();
        assert_eq!(parameters.integers(id), [50, 9]);
        // Each entry of the first axis has its own limit.
        for wrong in [[50, 10], [1 << 25, 0], [-1, 0], [1 << 40, 0]] {
            assert!(parameters.set_integers(id, &wrong).is_err(), "{wrong:?}");
        }
        assert!(parameters.set_integers(id, &[1]).is_err());
        assert!(parameters.set(id, vec![0.0, 0.0]).is_err());
        assert_eq!(parameters.num_trainable(), 4);
    }
}
