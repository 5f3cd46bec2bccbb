//! The sum of two tensors, as a residual connection has it.

use burn_flex::FlexTensor;
use tensor::Tensor;

use crate::buffer::Buffer;
use crate::parallel::{CHUNK, each};
use crate::tape::{Operation, apply, is_fast, values};

/// Adds two tensors of one shape, on all threads.
///
/// # Shapes
/// - `x`, `y`: `[tokens, width]`; returns the same
///
/// # Panics
/// If the shapes differ.
pub fn add(x: Tensor<2>, y: Tensor<2>) -> Tensor<2> {
    assert_eq!(x.dims(), y.dims(), "add: shapes of the two tensors");
    if is_fast(&x) && is_fast(&y) {
        return Tensor::from_dispatch(apply(Add, [x.into_dispatch(), y.into_dispatch()]));
    }
    x + y
}

#[derive(Clone, Debug)]
struct Add;

impl Operation<2> for Add {
    type Saved = ();

    fn forward(&self, [x, y]: [FlexTensor; 2], _: [bool; 2]) -> (FlexTensor, ()) {
        let mut out = Buffer::dirty(x.layout().num_elements());
        each(
            values(&x).chunks(CHUNK).zip(values(&y).chunks(CHUNK)).zip(out.chunks_mut(CHUNK)),
            |((x, y), out)| {
                for ((out, x), y) in out.iter_mut().zip(x).zip(y) {
                    *out = x + y;
                }
            },
        );
        (out.into_tensor(x.layout().shape().clone()), ())
    }

    fn backward(&self, (): (), gradient: FlexTensor, wanted: [bool; 2]) -> [Option<FlexTensor>; 2] {
        wanted.map(|wanted| wanted.then(|| gradient.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{Numbers, agree};

    #[test]
    fn fast_is_the_reference() {
        let mut numbers = Numbers(5);
        for case in 0..200 {
            let (tokens, width) = (numbers.between(1, 400), numbers.between(1, 90));
            let inputs = [
                numbers.matrix(tokens, width).tracked(case % 3 != 0),
                numbers.matrix(tokens, width).tracked(case % 4 != 0),
            ];
            let sum = |x: &[Tensor<2>]| x[0].clone() + x[1].clone();
            agree("add", |x| add(x[0].clone(), x[1].clone()), sum, &inputs, 1e-6);
        }
    }
}
