//! Frozen weight matrices.

/// The form in which a [`PackedMatrix`] keeps its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// 32-bit floats.
    F32,
}

/// A frozen matrix `[rows, columns]` = `[out, in]`.
#[derive(Clone, Debug)]
pub struct PackedMatrix {
    rows: usize,
    columns: usize,
    values: Vec<f32>,
}

impl PackedMatrix {
    /// Packs numbers in row-major order.
    pub fn from_f32(rows: usize, columns: usize, values: &[f32], form: Form) -> Self {
        assert_eq!(values.len(), rows * columns, "a matrix [{rows}, {columns}] in {form:?}");
        Self { rows, columns, values: values.to_vec() }
    }

    /// Gives the number of rows, the width of `x · Wᵀ`.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Gives the number of columns, the width of `x`.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Writes one row.
    pub fn row_into(&self, row: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.values[row * self.columns..][..self.columns]);
    }

    /// Gives all numbers in row-major order.
    pub fn to_f32(&self) -> Vec<f32> {
        self.values.clone()
    }
}
