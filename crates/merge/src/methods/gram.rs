//! Products of every two inputs, from which lengths and angles of all combinations follow.

use super::elementwise::{combine, dot};
use super::{Chunk, Group};
use crate::Result;

/// Dot products of every two vectors, `[n, n]`, in double precision.
#[derive(Debug, Clone)]
pub(crate) struct Gram {
    n: usize,
    products: Vec<f64>,
}

impl Gram {
    /// Sweeps once over the inputs, or over their changes where there is a base.
    pub(crate) fn of(group: &Group<'_>) -> Result<Self> {
        let n = group.inputs.len();
        let mut gram = Self { n, products: vec![0.0; n * n] };
        group.sweep_changes(1, &mut |chunk| {
            gram.add(&chunk.inputs);
            Ok(())
        })?;
        Ok(gram)
    }

    /// Starts with vectors of length zero.
    pub(crate) fn empty(n: usize) -> Self {
        Self { n, products: vec![0.0; n * n] }
    }

    /// Adds the products of a run of values.
    pub(crate) fn add<V: AsRef<[f32]>>(&mut self, vectors: &[V]) {
        for i in 0..self.n {
            for j in i..self.n {
                let product = dot(vectors[i].as_ref(), vectors[j].as_ref());
                self.products[i * self.n + j] += product;
                if i != j {
                    self.products[j * self.n + i] += product;
                }
            }
        }
    }

    pub(crate) fn product(&self, i: usize, j: usize) -> f64 {
        self.products[i * self.n + j]
    }

    /// Returns the length of vector `i`.
    pub(crate) fn norm(&self, i: usize) -> f64 {
        self.product(i, i).sqrt()
    }

    /// Returns the dot product of two combinations.
    pub(crate) fn inner(&self, a: &[f64], b: &[f64]) -> f64 {
        let row = |i: usize| (0..self.n).map(|j| b[j] * self.product(i, j)).sum::<f64>();
        (0..self.n).map(|i| a[i] * row(i)).sum()
    }

    /// Returns the length of a combination. Rounding may make its square negative.
    pub(crate) fn length(&self, a: &[f64]) -> f64 {
        self.inner(a, a).max(0.0).sqrt()
    }
}

/// Writes the base, if any, plus a combination of the inputs or their changes.
pub(crate) fn write(
    group: &Group<'_>,
    coefficients: &[f64],
    push: &mut dyn FnMut(&[f32]) -> Result<()>,
) -> Result<()> {
    let mut sum = Vec::new();
    group.sweep_changes(1, &mut |chunk: &mut Chunk| {
        combine(&mut sum, coefficients, &chunk.inputs);
        sum.iter_mut().zip(&chunk.base).for_each(|(sum, base)| *sum += base);
        push(&sum)
    })
}
