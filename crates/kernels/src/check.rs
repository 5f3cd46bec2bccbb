//! Holds an operation's fast path against its reference and the reference against differences.

use tensor::{DType, Device, Tensor, TensorData};

use crate::simd::at_every_level;

/// A seeded source of test numbers (`SplitMix64`).
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A whole number of `low..=high`.
    pub(crate) fn between(&mut self, low: usize, high: usize) -> usize {
        low + (self.next() % (high - low + 1) as u64) as usize
    }

    pub(crate) fn chance(&mut self) -> bool {
        self.next() & 1 == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.between(0, choices.len() - 1)]
    }

    /// A number of roughly normal distribution.
    pub(crate) fn normal(&mut self) -> f64 {
        let sum: f64 = (0..12).map(|_| (self.next() >> 11) as f64 / (1u64 << 53) as f64).sum();
        sum - 6.0
    }

    pub(crate) fn matrix(&mut self, rows: usize, columns: usize) -> Input {
        let values = (0..rows * columns).map(|_| f64::from(self.normal() as f32)).collect();
        Input { values, shape: [rows, columns], tracked: true }
    }
}

/// One input of an operation; vectors are matrices of one row.
#[derive(Clone)]
pub(crate) struct Input {
    pub(crate) values: Vec<f64>,
    pub(crate) shape: [usize; 2],
    pub(crate) tracked: bool,
}

impl Input {
    pub(crate) fn tracked(mut self, tracked: bool) -> Self {
        self.tracked = tracked;
        self
    }

    /// `a · x + b` for every number.
    pub(crate) fn map(mut self, a: f64, b: f64) -> Self {
        self.values.iter_mut().for_each(|x| *x = f64::from((a * *x + b) as f32));
        self
    }

    pub(crate) fn tensor(&self, dtype: DType, autodiff: bool) -> Tensor<2> {
        let device = if autodiff { Device::flex().autodiff() } else { Device::flex() };
        let data = TensorData::new(self.values.clone(), self.shape).convert_dtype(dtype);
        let tensor = Tensor::from_data(data, (&device, dtype));
        if autodiff { tensor.require_grad() } else { tensor }
    }
}

/// Makes a vector of a matrix of one row.
pub(crate) fn vector(x: &Tensor<2>) -> Tensor<1> {
    x.clone().reshape([x.dims()[1]])
}

pub(crate) fn numbers<const D: usize>(x: Tensor<D>) -> Vec<f64> {
    x.cast(DType::F64).into_data().try_to_vec().unwrap()
}

/// Output and gradients of `sum(weights · output)`.
pub(crate) fn run<const D: usize>(
    operation: impl Fn(&[Tensor<2>]) -> Tensor<D>,
    inputs: &[Input],
    dtype: DType,
) -> (Vec<f64>, Vec<Option<Vec<f64>>>) {
    let tensors: Vec<_> = inputs.iter().map(|input| input.tensor(dtype, input.tracked)).collect();
    let output = operation(&tensors);
    let found = numbers(output.clone().without_autodiff());
    assert_eq!(output.dtype(), dtype);
    if !inputs.iter().any(|input| input.tracked) {
        assert!(!output.is_autodiff(), "constants make a constant");
        return (found, inputs.iter().map(|_| None).collect());
    }
    let weights = TensorData::new(upstream(found.len()), output.shape()).convert_dtype(dtype);
    let weights = Tensor::<D>::from_data(weights, (&Device::flex(), dtype));
    let gradients = (output * weights).sum().backward();
    let gradients = tensors.iter().map(|x| x.grad(&gradients).map(numbers)).collect();
    (found, gradients)
}

/// The gradient handed to the output: anything but ones, and the same for every run.
fn upstream(count: usize) -> Vec<f64> {
    let mut numbers = Numbers(count as u64);
    (0..count).map(|_| f64::from(numbers.normal() as f32)).collect()
}

/// Fails unless all of `got` lie within `tolerance` times the largest of `want`, or within
/// `tolerance` where all are smaller than 1: inputs are about 1, so what is smaller is a sum that
/// cancelled and has the rounding of its terms.
#[track_caller]
pub(crate) fn close(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}: how many numbers");
    let size = want.iter().fold(0.0f64, |size, x| size.max(x.abs())).max(1.0);
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(
            (got - want).abs() <= tolerance * size,
            "{what}[{index}]: got {got}, expected {want}, of at most {size}"
        );
    }
}

/// Compares the fast path in `f32`, at every instruction set there is, with the reference in `f64`, outputs and gradients.
#[track_caller]
pub(crate) fn agree<const D: usize>(
    what: &str,
    fast: impl Fn(&[Tensor<2>]) -> Tensor<D>,
    reference: impl Fn(&[Tensor<2>]) -> Tensor<D>,
    inputs: &[Input],
    tolerance: f64,
) {
    let (wanted_output, wanted_gradients) = run(reference, inputs, DType::F64);
    at_every_level(|level| {
        let what = format!("{what} at {level:?}");
        let (output, gradients) = run(&fast, inputs, DType::F32);
        close(&format!("{what}: output"), &output, &wanted_output, tolerance);
        for (index, (got, want)) in gradients.iter().zip(&wanted_gradients).enumerate() {
            match (got, want) {
                (Some(got), Some(want)) => {
                    close(&format!("{what}: gradient of input {index}"), got, want, tolerance);
                }
                (None, None) => {}
                _ => panic!("{what}: input {index} has a gradient in one form only"),
            }
        }
    });
}

/// Compares the gradients of the reference in `f64` with central differences.
#[track_caller]
pub(crate) fn differences<const D: usize>(
    what: &str,
    reference: impl Fn(&[Tensor<2>]) -> Tensor<D>,
    inputs: &[Input],
) {
    const STEP: f64 = 1e-5;
    let (_, gradients) = run(&reference, inputs, DType::F64);
    for (index, gradient) in gradients.iter().enumerate() {
        let Some(gradient) = gradient else { continue };
        let found: Vec<f64> = (0..gradient.len())
            .map(|place| {
                let value = |step: f64| {
                    let mut moved = inputs.to_vec();
                    moved[index].values[place] += step;
                    let tensors: Vec<_> =
                        moved.iter().map(|input| input.tensor(DType::F64, false)).collect();
                    let output = numbers(reference(&tensors));
                    let weights = upstream(output.len());
                    output.iter().zip(weights).map(|(x, w)| x * w).sum::<f64>()
                };
                (value(STEP) - value(-STEP)) / (2.0 * STEP)
            })
            .collect();
        close(&format!("{what}: differences of input {index}"), gradient, &found, 1e-6);
    }
}
