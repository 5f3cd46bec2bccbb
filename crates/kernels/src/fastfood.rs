//! Fastfood: a random map of few numbers to many, without a matrix.

use std::sync::Arc;

use burn_flex::FlexTensor;
use tensor::{Tensor, TensorData};

use crate::tape::{Operation, apply, from_values, is_fast, values};

/// A fixed random map `P` from `d` numbers to `D`: `H·G·Π·H·B`, scaled to keep lengths.
///
/// `B` are signs, `Π` a permutation, `G` normal draws and `H` the Walsh-Hadamard transform. Held are
/// 8 bytes per number of the longer side; a product costs `L log L`, `L` the next power of two.
///
/// # Source
/// Le, Sarlós and Smola, Fastfood, 2013; the scale is that of Aghajanyan et al.,
/// <https://arxiv.org/abs/2012.13255>.
#[derive(Debug)]
pub struct Fastfood {
    few: usize,
    many: usize,
    signs: Vec<f32>,
    order: Vec<u32>,
    gaussian: Vec<f32>,
    divisor: f32,
}

impl Fastfood {
    /// Makes a map from `few` numbers to `many` out of a source of random 64-bit numbers.
    ///
    /// # Panics
    /// If one of the two is 0 or above 2³¹: both are mistakes of the caller.
    pub fn new(few: usize, many: usize, mut bits: impl FnMut() -> u64) -> Self {
        assert!(few > 0 && many > 0 && few.max(many) <= 1 << 31, "a map of {few} to {many}");
        let length = few.max(many).next_power_of_two();
        let signs: Vec<f32> =
            (0..few).map(|_| if bits() >> 63 == 0 { 1.0 } else { -1.0 }).collect();
        let mut order: Vec<u32> = (0..length as u32).collect();
        for i in (1..length).rev() {
            // The modulus favours no index by more than 2^-32.
            order.swap(i, (bits() % (i as u64 + 1)) as usize);
        }
        let uniform = |bits: u64| ((bits >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
        let gaussian: Vec<f32> = (0..length)
            .map(|_| {
                let radius = (-2.0 * uniform(bits()).ln()).sqrt();
                (radius * (std::f64::consts::TAU * uniform(bits())).cos()) as f32
            })
            .collect();
        let length_of_gaussian = gaussian.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        let divisor = ((many as f64).sqrt() * length_of_gaussian) as f32;
        Self { few, many, signs, order, gaussian, divisor }
    }

    /// Returns `P · v`.
    ///
    /// # Panics
    /// If `v` has another length than the map's shorter side.
    pub fn expand(&self, v: &[f32]) -> Vec<f32> {
        assert_eq!(v.len(), self.few, "numbers to expand");
        let mut x = vec![0.0; self.order.len()];
        x.iter_mut().zip(v.iter().zip(&self.signs)).for_each(|(x, (v, sign))| *x = v * sign);
        hadamard(&mut x);
        let mut y: Vec<f32> =
            self.order.iter().zip(&self.gaussian).map(|(from, g)| x[*from as usize] * g).collect();
        hadamard(&mut y);
        y.truncate(self.many);
        for y in &mut y {
            *y /= self.divisor;
        }
        y
    }

    /// Returns `Pᵀ · g`.
    ///
    /// # Panics
    /// If `g` has another length than the map's longer side.
    pub fn gather(&self, g: &[f32]) -> Vec<f32> {
        assert_eq!(g.len(), self.many, "numbers to gather");
        let mut y = vec![0.0; self.order.len()];
        y[..self.many].copy_from_slice(g);
        hadamard(&mut y);
        let mut x = vec![0.0; y.len()];
        for ((to, gaussian), y) in self.order.iter().zip(&self.gaussian).zip(&y) {
            x[*to as usize] = y * gaussian;
        }
        hadamard(&mut x);
        x.truncate(self.few);
        x.iter_mut().zip(&self.signs).for_each(|(x, sign)| *x *= sign / self.divisor);
        x
    }
}

/// Transforms in place by the Walsh-Hadamard matrix without its scale; the length is a power of two.
fn hadamard(x: &mut [f32]) {
    let mut half = 1;
    while half < x.len() {
        for block in x.chunks_exact_mut(2 * half) {
            let (low, high) = block.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
}

/// Applies a [`Fastfood`] map: `P · v`.
///
/// # Shapes
/// - `v`: `[few]`; returns `[many]`
/// # Panics
/// If `v` has another length.
pub fn fastfood(v: Tensor<1>, map: &Arc<Fastfood>) -> Tensor<1> {
    if !is_fast(&v) {
        return fastfood_reference(v, map);
    }
    let operation = Expand { map: Arc::clone(map) };
    Tensor::from_dispatch(apply(operation, [v.into_dispatch()]))
}

/// Computes [`fastfood`] as a product with the whole matrix, on every device and in every float type.
pub fn fastfood_reference(v: Tensor<1>, map: &Fastfood) -> Tensor<1> {
    let mut unit = vec![0.0; map.few];
    let columns: Vec<f32> = (0..map.few)
        .flat_map(|place| {
            unit[place] = 1.0;
            let column = map.expand(&unit);
            unit[place] = 0.0;
            column
        })
        .collect();
    let data = TensorData::new(columns, [map.few, map.many]);
    let matrix = Tensor::<2>::from_data(data, (&v.device(), v.dtype()));
    v.unsqueeze::<2>().matmul(matrix).reshape([map.many])
}

#[derive(Clone, Debug)]
struct Expand {
    map: Arc<Fastfood>,
}

impl Operation<1> for Expand {
    type Saved = ();

    fn forward(&self, [v]: [FlexTensor; 1], _: [bool; 1]) -> (FlexTensor, ()) {
        (from_values(self.map.expand(values(&v)), [self.map.many]), ())
    }

    fn backward(&self, (): (), gradient: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        [Some(from_values(self.map.gather(values(&gradient)), [self.map.few]))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{Numbers, agree, differences, vector};

    #[test]
    fn fast_is_the_reference() {
        let mut numbers = Numbers(41);
        for case in 0..200 {
            let few = numbers.pick(&[1, 3, 10, 16, 40]);
            let many = numbers.pick(&[1, 7, 16, 50, 130]);
            let mut source = Numbers(case);
            let map = Arc::new(Fastfood::new(few, many, || source.next()));
            agree(
                &format!("{few} to {many}"),
                |x| fastfood(vector(&x[0]), &map),
                |x| fastfood_reference(vector(&x[0]), &map),
                &[numbers.matrix(1, few)],
                1e-5,
            );
        }
    }

    #[test]
    fn the_reference_follows_its_differences() {
        let mut numbers = Numbers(43);
        for (few, many) in [(3, 10), (8, 5)] {
            let map = Fastfood::new(few, many, || numbers.next());
            let input = Numbers(44).matrix(1, few);
            differences("fastfood", |x| fastfood_reference(vector(&x[0]), &map), &[input]);
        }
    }

    #[test]
    fn gathering_is_the_adjoint_and_lengths_are_kept() {
        let mut numbers = Numbers(42);
        for (few, many) in [(200, 5000), (31, 3000), (500, 20_000)] {
            let map = Fastfood::new(few, many, || numbers.next());
            let mut draw =
                |count| -> Vec<f32> { (0..count).map(|_| numbers.normal() as f32).collect() };
            let (v, g) = (draw(few), draw(many));
            let dot = |a: &[f32], b: &[f32]| -> f64 {
                a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
            };
            let expanded = map.expand(&v);
            let (there, back) = (dot(&expanded, &g), dot(&v, &map.gather(&g)));
            let size = (dot(&expanded, &expanded) * dot(&g, &g)).sqrt();
            assert!((there - back).abs() < 1e-5 * size, "{there} {back}");
            let ratio = (dot(&expanded, &expanded) / dot(&v, &v)).sqrt();
            assert!((0.9..1.1).contains(&ratio), "{few} to {many}: {ratio}");
        }
    }

    #[test]
    fn a_transform_of_four_by_hand() {
        let mut x = [1.0, 2.0, 3.0, 4.0];
        hadamard(&mut x);
        assert_eq!(x, [10.0, -2.0, -4.0, 0.0]);
    }
}
