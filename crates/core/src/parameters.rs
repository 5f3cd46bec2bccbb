//! Everything that trains, and every buffer a method keeps, in one ordered list.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::tap::{Scoring, Tap};
use retune_files::Dtype;
use retune_files::safetensors::{SafetensorsWriter, TensorView};
use retune_kernels::{GradientTap, SparseEntries};
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
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "each is a setting of its own, set by methods")]
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
    /// The method moves it itself: the optimiser leaves it alone and keeps no state for it.
    pub moved_by_method: bool,
    /// Elements come and go, so each has a step number of its own.
    pub counts_ages: bool,
    support: Option<Support>,
    tap: Option<Arc<Tap>>,
    value: Value,
}

#[derive(Debug, Clone)]
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

/// Which entries of a weight a sparse parameter stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Support {
    /// Places in the weight seen as one row-major list, ascending and each once.
    pub indices: Arc<[u32]>,
    /// Rows and columns of the weight.
    pub matrix: [usize; 2],
}

impl Support {
    fn check(&self, name: &str) -> Result<()> {
        let [rows, columns] = self.matrix;
        let ascending = self.indices.is_sorted_by(|a, b| a < b);
        let inside = self.indices.last().is_none_or(|last| (*last as usize) < rows * columns);
        if ascending && inside {
            return Ok(());
        }
        let what = if ascending {
            "an entry lies outside the weight"
        } else {
            "entries repeat or are out of order"
        };
        Err(Error::Input {
            what: format!("sparse change `{name}`: {what}"),
            expected: format!("ascending entries below {}", rows * columns),
            found: format!("{} entries up to {:?}", self.indices.len(), self.indices.last()),
            help: "the file is damaged, or belongs to another model".to_owned(),
        })
    }
}

/// The ordered list of parameters.
///
/// Saving, resuming, counting, moving and averaging are written once over this list: a change
/// holds only [`ParameterId`]s.
#[derive(Debug, Clone)]
pub struct Parameters {
    device: Device,
    /// The place of the first, where the list goes on from another.
    first: usize,
    list: Vec<Parameter>,
}

/// Returns the name a parameter of a part has in the whole list.
pub fn name_in_part(part: &str, name: &str) -> String {
    format!("{part}/{name}")
}

impl Parameters {
    /// Makes an empty list on `device` (without autodiff; leaves are put on its autodiff side).
    pub fn new(device: &Device) -> Self {
        Self { device: device.clone(), first: 0, list: Vec::new() }
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
            moved_by_method: false,
            counts_ages: false,
            support: None,
            tap: None,
            value,
        });
        ParameterId(self.first + self.list.len() - 1)
    }

    /// Adds a sparse parameter: `values` stand for the entries `indices` of a weight of the shape
    /// `matrix`. It may be empty, and its entries may change later.
    ///
    /// # Panics
    /// As [`Parameters::add`], or if the indices do not ascend inside the weight.
    pub fn add_sparse(
        &mut self,
        name: impl Into<String>,
        matrix: [usize; 2],
        indices: Vec<u32>,
        values: Vec<f32>,
    ) -> ParameterId {
        let name = name.into();
        let support = Support { indices: indices.into(), matrix };
        assert!(support.check(&name).is_ok(), "entries of sparse parameter {name}");
        let count = support.indices.len();
        let id = self.push(name, &[count], values, true);
        self.at_mut(id).support = Some(support);
        id
    }

    /// Replaces the entries of a sparse parameter, and with them its values.
    ///
    /// The optimiser's state is not touched: while a run is under way, methods use
    /// [`crate::method::StepView::reseat`].
    ///
    /// # Errors
    /// [`Error::Input`] if the indices do not ascend inside the weight; [`Error::Shape`] if there
    /// is not one value per index.
    ///
    /// # Panics
    /// If the parameter is not sparse: a mistake of a method.
    pub fn set_entries(
        &mut self,
        id: ParameterId,
        indices: Vec<u32>,
        values: Vec<f32>,
    ) -> Result<()> {
        let parameter = self.at(id);
        let Some(old) = &parameter.support else {
            unreachable!("parameter {} is not sparse", parameter.name)
        };
        let support = Support { indices: indices.into(), matrix: old.matrix };
        support.check(&parameter.name)?;
        if support.indices.len() != values.len() {
            return Err(Error::Shape {
                name: parameter.name.clone(),
                expected: vec![support.indices.len()],
                found: vec![values.len()],
                help: "a sparse change has one value per index".to_owned(),
            });
        }
        let value = Value::Floats(self.leaf(values, parameter.trains));
        let parameter = self.at_mut(id);
        parameter.shape = vec![support.indices.len()];
        parameter.support = Some(support);
        parameter.value = value;
        Ok(())
    }

    /// Returns the entries a sparse parameter stands for.
    pub fn support(&self, id: ParameterId) -> Option<&Support> {
        self.at(id).support.as_ref()
    }

    /// Returns the indices of a sparse parameter; none for others.
    pub fn indices(&self, id: ParameterId) -> Arc<[u32]> {
        self.support(id).map_or_else(|| Vec::new().into(), |support| Arc::clone(&support.indices))
    }

    /// Returns the entries of a sparse parameter in the form kernels take.
    pub fn entries(&self, id: ParameterId) -> SparseEntries {
        let tap = self.at(id).tap.clone().map(|tap| tap as Arc<dyn GradientTap>);
        SparseEntries { indices: self.indices(id), tap }
    }

    /// Puts a closed tap on the gradient of the weight a sparse parameter changes.
    pub fn add_tap(&mut self, id: ParameterId, scoring: Scoring) {
        self.at_mut(id).tap = Some(Arc::new(Tap::new(scoring)));
    }

    /// Returns the tap of a parameter, if it has one.
    pub fn tap(&self, id: ParameterId) -> Option<&Tap> {
        self.at(id).tap.as_deref()
    }

    /// Lets a parameter train from now on, or freezes it where it stands.
    pub fn set_trains(&mut self, id: ParameterId, trains: bool) {
        let parameter = self.at(id);
        if parameter.trains != trains && parameter.dtype() == Dtype::F32 {
            let value = Value::Floats(self.leaf(self.values(id), trains));
            let parameter = self.at_mut(id);
            parameter.value = value;
            parameter.trains = trains;
        }
    }

    /// Gives up the values of a dense parameter: it stays in the list, empty and frozen.
    pub fn release(&mut self, id: ParameterId) {
        let value = Value::Floats(self.leaf(Vec::new(), false));
        let parameter = self.at_mut(id);
        parameter.value = value;
        parameter.shape = vec![0];
        parameter.trains = false;
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
        let numbered = (self.first..).zip(&self.list);
        numbered.map(|(index, parameter)| (ParameterId(index), parameter))
    }

    fn at(&self, id: ParameterId) -> &Parameter {
        &self.list[id.0 - self.first]
    }

    fn at_mut(&mut self, id: ParameterId) -> &mut Parameter {
        &mut self.list[id.0 - self.first]
    }

    /// Makes an empty list whose places follow those of this one, so that what is made in it can be
    /// [appended](Parameters::append) without its changes noticing.
    #[must_use]
    pub fn continued(&self) -> Self {
        Self { device: self.device.clone(), first: self.first + self.list.len(), list: Vec::new() }
    }

    /// Takes over a list that was made by [`Parameters::continued`], as the part of this name.
    ///
    /// # Panics
    /// If anything was added in between, or the name is taken.
    pub fn append(&mut self, part: &str, list: Self) {
        assert_eq!(list.first, self.first + self.list.len(), "places of part {part}");
        for mut parameter in list.list {
            parameter.name = name_in_part(part, &parameter.name);
            assert!(self.find(&parameter.name).is_none(), "part {part} exists already");
            self.list.push(parameter);
        }
    }

    /// Returns the places of a part.
    pub fn part(&self, part: &str) -> Range<usize> {
        let belongs = |parameter: &Parameter| {
            parameter.name.strip_prefix(part).is_some_and(|rest| rest.starts_with('/'))
        };
        let start = self.list.iter().position(belongs).unwrap_or(self.list.len());
        start..start + self.list[start..].iter().take_while(|p| belongs(p)).count()
    }

    /// Takes a part out as a list of its own, whose places begin at 0 and whose names are those it
    /// was made with.
    #[must_use = "what is taken out must be put back"]
    pub fn take_part(&mut self, part: &str) -> Self {
        let mut list: Vec<Parameter> = self.list.drain(self.part(part)).collect();
        for parameter in &mut list {
            parameter.name.drain(..=part.len());
        }
        Self { device: self.device.clone(), first: 0, list }
    }

    /// Puts a part back that [`Parameters::take_part`] took out; its first parameter gets the place
    /// `start`.
    pub fn put_part(&mut self, part: &str, start: usize, list: Self) {
        let named = list.list.into_iter().map(|mut parameter| {
            parameter.name = name_in_part(part, &parameter.name);
            parameter
        });
        self.list.splice(start..start, named);
    }

    /// Returns one parameter.
    pub fn get(&self, id: ParameterId) -> &Parameter {
        self.at(id)
    }

    /// Returns one parameter's settings for change.
    pub fn get_mut(&mut self, id: ParameterId) -> &mut Parameter {
        self.at_mut(id)
    }

    /// Finds a parameter by name.
    pub fn find(&self, name: &str) -> Option<ParameterId> {
        self.iter().find(|(_, parameter)| parameter.name == name).map(|(id, _)| id)
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
        self.at(id).floats().clone().reshape(shape)
    }

    /// Returns the values as a constant tensor of rank `D`.
    ///
    /// # Panics
    /// As [`Parameters::tracked`].
    pub fn constant<const D: usize>(&self, id: ParameterId, shape: [usize; D]) -> Tensor<D> {
        self.at(id).floats().clone().inner().reshape(shape)
    }

    /// Copies the values out, in row-major order; whole numbers are rounded to `f32`.
    pub fn values(&self, id: ParameterId) -> Vec<f32> {
        match &self.at(id).value {
            Value::Floats(value) => to_vec(value.clone().inner()),
            Value::Integers(integers) => {
                integers.values.iter().map(|value| *value as f32).collect()
            }
        }
    }

    /// Returns the values of a buffer of whole numbers, in row-major order; none of any other.
    pub fn integers(&self, id: ParameterId) -> &[i32] {
        match &self.at(id).value {
            Value::Floats(_) => &[],
            Value::Integers(integers) => &integers.values,
        }
    }

    /// Writes the values into a file, in the parameter's own type and under its name.
    ///
    /// # Errors
    /// If the disk is full, or the file was not announced with this tensor.
    pub fn write(&self, id: ParameterId, writer: &mut SafetensorsWriter) -> Result<()> {
        let name = &self.at(id).name;
        match &self.at(id).value {
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
        match self.at(id).value {
            Value::Floats(_) => self.set(id, tensor.to_f32()?),
            Value::Integers(_) => self.set_integers(id, &tensor.to_i64()?),
        }
    }

    /// Replaces the values.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are too few or too many.
    pub fn set(&mut self, id: ParameterId, values: Vec<f32>) -> Result<()> {
        let parameter = self.at(id);
        if values.len() != parameter.count() || parameter.dtype() != Dtype::F32 {
            return Err(Error::Shape {
                name: parameter.name.clone(),
                expected: parameter.shape.clone(),
                found: vec![values.len()],
                help: "the file belongs to another method or model".to_owned(),
            });
        }
        let trains = parameter.trains;
        let value = Value::Floats(self.leaf(values, trains));
        self.at_mut(id).value = value;
        Ok(())
    }

    /// Replaces the values of a buffer of whole numbers.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are too few or too many, or one is beyond its limit.
    pub fn set_integers(&mut self, id: ParameterId, values: &[i64]) -> Result<()> {
        let parameter = self.at_mut(id);
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
    pub fn update(&mut self, id: ParameterId, change: impl FnOnce(&mut [f32]) + Send) {
        self.update_each([(id, change)]);
    }

    /// Lets each change edit the values of its parameter, many at a time; see [`Self::update`].
    ///
    /// What a change writes does not depend on the others, so the number of threads changes nothing.
    /// No parameter may come twice: its second change would see it empty.
    pub fn update_each<F>(&mut self, changes: impl IntoIterator<Item = (ParameterId, F)>)
    where
        F: FnOnce(&mut [f32]) + Send,
    {
        let mut taken = Vec::new();
        for (id, change) in changes {
            let hole = Value::Floats(self.leaf(Vec::new(), false));
            match std::mem::replace(&mut self.at_mut(id).value, hole) {
                Value::Floats(value) => taken.push((id, to_vec(value.inner()), Some(change))),
                whole @ Value::Integers(_) => self.at_mut(id).value = whole,
            }
        }
        retune_kernels::each(&mut taken, |(_, values, change)| {
            if let Some(change) = change.take() {
                change(values);
            }
        });
        for (id, values, _) in taken {
            let value = Value::Floats(self.leaf(values, self.at(id).trains));
            self.at_mut(id).value = value;
        }
    }

    /// Takes a parameter's gradient out of `gradients`, if it has one.
    pub fn take_gradient(&self, id: ParameterId, gradients: &mut Gradients) -> Option<Vec<f32>> {
        self.at(id).floats().grad_remove(gradients).map(to_vec)
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
    fn entries_of_a_sparse_parameter_change_with_their_values() {
        let mut parameters = Parameters::new(&Device::flex());
        let id = parameters.add_sparse("s", [2, 3], vec![1, 4], vec![0.5, -0.5]);
        assert_eq!(parameters.get(id).shape, [2]);
        parameters.set_entries(id, vec![0, 4, 5], vec![0.0, -0.5, 2.0]).unwrap();
        assert_eq!((parameters.num_trainable(), parameters.values(id)), (3, vec![0.0, -0.5, 2.0]));
        assert_eq!(*parameters.indices(id), [0, 4, 5]);
        for (indices, values) in [
            (vec![4, 0], vec![1.0; 2]),
            (vec![6], vec![1.0]),
            (vec![1, 1], vec![1.0; 2]),
            (vec![1], vec![1.0; 2]),
        ] {
            assert!(parameters.set_entries(id, indices, values).is_err());
        }
        parameters.set_trains(id, false);
        assert_eq!((parameters.num_trainable(), parameters.values(id)), (0, vec![0.0, -0.5, 2.0]));
    }

    #[test]
    fn a_part_is_taken_out_and_put_back_where_it_was() {
        let mut parameters = Parameters::new(&Device::flex());
        for part in ["a", "ab", "b"] {
            let mut list = parameters.continued();
            let id = list.add("x", &[2], vec![1.0, 2.0]);
            // The place is that of the whole list already.
            assert_eq!(list.values(id), [1.0, 2.0]);
            list.add_buffer("y", &[1], vec![3.0]);
            parameters.append(part, list);
            assert_eq!(parameters.values(id), [1.0, 2.0]);
        }
        assert_eq!((parameters.part("a"), parameters.part("ab")), (0..2, 2..4));
        let mut part = parameters.take_part("ab");
        let names: Vec<&str> = part.iter().map(|(_, p)| p.name.as_str()).collect();
        assert_eq!(names, ["x", "y"]);
        let id = part.find("x").unwrap();
        assert_eq!(id.index(), 0);
        part.update(id, |values| values[1] = 9.0);
        parameters.put_part("ab", 2, part);
        let names: Vec<&str> = parameters.iter().map(|(_, p)| p.name.as_str()).collect();
        assert_eq!(names, ["a/x", "a/y", "ab/x", "ab/y", "b/x", "b/y"]);
        let id = parameters.find("ab/x").unwrap();
        assert_eq!((id.index(), parameters.values(id)), (2, vec![1.0, 9.0]));
    }

    #[test]
    fn a_released_parameter_is_empty() {
        let mut parameters = list();
        let a = parameters.find("a").unwrap();
        parameters.release(a);
        assert_eq!((parameters.num_trainable(), parameters.get(a).count()), (0, 0));
        assert!(parameters.values(a).is_empty());
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
