//! Dropout with a given mask.

use std::sync::Arc;

use burn_flex::FlexTensor;
use tensor::{Tensor, TensorData};

use crate::buffer::Buffer;
use crate::parallel::{CHUNK, each};
use crate::simd;
use crate::tape::{Operation, apply, is_fast, values};

/// Zeroes the elements whose mask is 0, and multiplies those whose mask is 1 by `scale`.
///
/// The mask is kept for the backward pass, a byte an element.
///
/// # Shapes
/// - `x`: any; `mask`: one number, 0 or 1, for each of its elements in row-major order
///
/// # Panics
/// If there are not as many numbers in the mask as elements.
///
/// # Source
/// Srivastava et al., Dropout, 2014, <https://jmlr.org/papers/v15/srivastava14a.html>.
pub fn dropout<const D: usize>(x: Tensor<D>, mask: Arc<[u8]>, scale: f32) -> Tensor<D> {
    assert_eq!(mask.len(), x.shape().num_elements(), "dropout: numbers of the mask");
    if is_fast(&x) {
        return Tensor::from_dispatch(apply(Dropout { mask, scale }, [x.into_dispatch()]));
    }
    reference(x, &mask, scale)
}

/// Computes [`dropout`] out of tensor operations, on every device and in every float type.
pub fn reference<const D: usize>(x: Tensor<D>, mask: &[u8], scale: f32) -> Tensor<D> {
    let factors: Vec<f32> = mask.iter().map(|kept| f32::from(*kept) * scale).collect();
    let factors = Tensor::from_data(TensorData::new(factors, x.shape()), (&x.device(), x.dtype()));
    x * factors
}

#[derive(Clone, Debug)]
struct Dropout {
    mask: Arc<[u8]>,
    scale: f32,
}

impl Dropout {
    fn masked(&self, x: &FlexTensor) -> FlexTensor {
        let mut out = Buffer::dirty(self.mask.len());
        each(
            values(x).chunks(CHUNK).zip(self.mask.chunks(CHUNK)).zip(out.chunks_mut(CHUNK)),
            |((x, mask), out)| mask_all(self.scale, x, mask, out),
        );
        out.into_tensor(x.layout().shape().clone())
    }
}

impl Operation<1> for Dropout {
    type Saved = ();

    fn forward(&self, [x]: [FlexTensor; 1], _: [bool; 1]) -> (FlexTensor, ()) {
        (self.masked(&x), ())
    }

    fn backward(&self, (): (), gradient: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        [Some(self.masked(&gradient))]
    }
}

#[inline(always)]
fn mask_body<const LANES: usize, const FMA: bool>(
    scale: f32,
    x: &[f32],
    mask: &[u8],
    out: &mut [f32],
) {
    for ((out, x), kept) in out.iter_mut().zip(x).zip(mask) {
        *out = x * (f32::from(*kept) * scale);
    }
}

simd::versions! {
    fn mask_all(scale: f32, x: &[f32], mask: &[u8], out: &mut [f32]) = mask_body;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{Numbers, agree, close, differences, numbers};

    fn mask(count: usize, case: usize) -> Arc<[u8]> {
        let mut numbers = Numbers(case as u64 + 1);
        (0..count).map(|_| u8::from(numbers.between(0, 3) > 0)).collect()
    }

    #[test]
    fn fast_is_the_reference() {
        let mut shapes = Numbers(11);
        for case in 0..200 {
            let (tokens, width) = (shapes.between(1, 400), shapes.between(1, 90));
            let mask = mask(tokens * width, case);
            let inputs = [shapes.matrix(tokens, width).tracked(case % 5 != 0)];
            agree(
                "dropout",
                |x| dropout(x[0].clone(), Arc::clone(&mask), 1.25),
                |x| reference(x[0].clone(), &mask, 1.25),
                &inputs,
                1e-6,
            );
        }
    }

    #[test]
    fn reference_follows_its_differences() {
        let mask = mask(15, 0);
        differences("dropout", |x| reference(x[0].clone(), &mask, 2.0), &[Numbers(8).matrix(3, 5)]);
    }

    #[test]
    fn worked_by_hand() {
        let x = Tensor::<2>::from_floats([[1.0, -2.0], [3.0, 4.0]], &tensor::Device::flex());
        let found = numbers(dropout(x, [1, 0, 1, 1].into(), 2.0));
        close("dropout", &found, &[2.0, 0.0, 6.0, 8.0], 0.0);
    }
}
