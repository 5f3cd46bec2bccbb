//! Everything that trains, and every buffer a method keeps, in one ordered list.

use crate::error::{Error, Result};
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
    /// Flat values; a leaf of the autodiff graph where it trains.
    value: Tensor<1>,
}

impl Parameter {
    /// Returns the number of values.
    pub fn count(&self) -> usize {
        self.shape.iter().product()
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

    fn push(
        &mut self,
        name: String,
        shape: &[usize],
        values: Vec<f32>,
        trains: bool,
    ) -> ParameterId {
        assert_eq!(values.len(), shape.iter().product::<usize>(), "values of parameter {name}");
        assert!(self.find(&name).is_none(), "parameter {name} exists already");
        let value = self.leaf(values, trains);
        self.list.push(Parameter {
            name,
            shape: shape.to_vec(),
            trains,
            rate_factor: 1.0,
            decays: true,
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
    /// If `shape` holds another number of values.
    pub fn tracked<const D: usize>(&self, id: ParameterId, shape: [usize; D]) -> Tensor<D> {
        self.list[id.0].value.clone().reshape(shape)
    }

    /// Returns the values as a constant tensor of rank `D`.
    ///
    /// # Panics
    /// If `shape` holds another number of values.
    pub fn constant<const D: usize>(&self, id: ParameterId, shape: [usize; D]) -> Tensor<D> {
        self.list[id.0].value.clone().inner().reshape(shape)
    }

    /// Copies the values out, in row-major order.
    pub fn values(&self, id: ParameterId) -> Vec<f32> {
        to_vec(self.list[id.0].value.clone().inner())
    }

    /// Replaces the values.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are too few or too many.
    pub fn set(&mut self, id: ParameterId, values: Vec<f32>) -> Result<()> {
        let parameter = &self.list[id.0];
        if values.len() != parameter.count() {
            return Err(Error::Shape {
                name: parameter.name.clone(),
                expected: parameter.shape.clone(),
                found: vec![values.len()],
                help: "the file belongs to another method or model".to_owned(),
            });
        }
        let trains = parameter.trains;
        self.list[id.0].value = self.leaf(values, trains);
        Ok(())
    }

    /// Lets `change` edit the values in place, without a copy where the device is the processor.
    pub fn update(&mut self, id: ParameterId, change: impl FnOnce(&mut [f32])) {
        let trains = self.list[id.0].trains;
        let hole = self.leaf(vec![0.0], false);
        let value = std::mem::replace(&mut self.list[id.0].value, hole);
        let mut values = to_vec(value.inner());
        change(&mut values);
        self.list[id.0].value = self.leaf(values, trains);
    }

    /// Takes a parameter's gradient out of `gradients`, if it has one.
    pub fn take_gradient(&self, id: ParameterId, gradients: &mut Gradients) -> Option<Vec<f32>> {
        self.list[id.0].value.grad_remove(gradients).map(to_vec)
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
}
