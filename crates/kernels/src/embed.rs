//! Embedding lookup.

use tensor::{DType, Device, Int, Tensor, TensorData};

use crate::table::Table;

/// Looks up the vectors of words.
///
/// # Shapes
/// - `table`: `[vocabulary, width]`; returns `[ids, width]`, on the table's device if it is
///   trainable and else in `f32` on `device`
///
/// # Panics
/// When an id is outside the vocabulary; ids that come from a file are checked before.
pub fn embed(ids: &[u32], table: &Table, device: &Device) -> Tensor<2> {
    let rows = table.rows();
    if let Some(id) = ids.iter().max() {
        assert!((*id as usize) < rows, "embed: id {id} in a vocabulary of {rows}");
    }
    reference(ids, table, device)
}

/// Computes [`embed`] out of tensor operations, on every device and in every float type.
pub fn reference(ids: &[u32], table: &Table, device: &Device) -> Tensor<2> {
    let table = table.dense(device, DType::F32);
    if ids.is_empty() {
        return table.slice_dim(0, 0..0);
    }
    let ids: Vec<i64> = ids.iter().copied().map(i64::from).collect();
    let count = ids.len();
    let ids = Tensor::<1, Int>::from_data(TensorData::new(ids, [count]), &table.device());
    table.select(0, ids)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::check::{Numbers, agree, differences};
    use crate::matrix::{Form, PackedMatrix};

    fn ids(numbers: &mut Numbers, count: usize, rows: usize) -> Vec<u32> {
        (0..count).map(|_| numbers.between(0, rows - 1) as u32).collect()
    }

    #[test]
    fn fast_is_the_reference() {
        let mut numbers = Numbers(11);
        for case in 0..200 {
            let (rows, width) = (numbers.between(1, 50), numbers.between(1, 70));
            let count = numbers.between(1, 60);
            let ids = ids(&mut numbers, count, rows);
            let inputs = [numbers.matrix(rows, width).tracked(case % 4 != 0)];
            let device = Device::flex();
            agree(
                &format!("embed {count} of {rows}x{width}"),
                |x| embed(&ids, &Table::Trainable(x[0].clone()), &device),
                |x| reference(&ids, &Table::Trainable(x[0].clone()), &device),
                &inputs,
                1e-6,
            );
        }
    }

    #[test]
    fn reference_follows_its_differences() {
        let inputs = [Numbers(12).matrix(4, 3)];
        differences(
            "embed",
            |x| reference(&[2, 0, 2], &Table::Trainable(x[0].clone()), &Device::flex()),
            &inputs,
        );
    }

    #[test]
    fn frozen_rows_come_as_they_are() {
        let matrix =
            PackedMatrix::from_f32(3, 2, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], Form::F32).unwrap();
        let table = Table::Frozen(Arc::new(matrix));
        let y = embed(&[2, 0, 2], &table, &Device::flex());
        assert_eq!(y.dims(), [3, 2]);
        assert_eq!(crate::check::numbers(y), [5.0, 6.0, 1.0, 2.0, 5.0, 6.0]);
    }

    #[test]
    fn no_ids_give_no_rows() {
        let matrix = PackedMatrix::from_f32(1, 2, [1.0, 2.0], Form::F32).unwrap();
        let y = embed(&[], &Table::Frozen(Arc::new(matrix)), &Device::flex());
        assert_eq!(y.dims(), [0, 2]);
    }
}
