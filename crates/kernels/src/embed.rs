//! Embedding lookup.

use std::sync::Arc;

use burn_flex::FlexTensor;
use tensor::{DType, Device, Int, Tensor, TensorData};

use crate::buffer::Buffer;
use crate::parallel::{each, rows_of};
use crate::table::Table;
use crate::tape::{Operation, apply, from_values, is_fast, values};

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
    match table {
        Table::Frozen(matrix) => {
            let width = matrix.columns();
            let mut out = vec![0.0; ids.len() * width];
            gather(ids, width, &mut out, |row, out| matrix.row_into(row, out));
            Tensor::from_data(TensorData::new(out, [ids.len(), width]), (device, DType::F32))
        }
        Table::Trainable(tensor) if is_fast(tensor) => {
            let operation = Embed { ids: ids.into() };
            Tensor::from_dispatch(apply(operation, [tensor.clone().into_dispatch()]))
        }
        Table::Trainable(_) => reference(ids, table, device),
    }
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

/// Writes the vector of every id.
fn gather(ids: &[u32], width: usize, out: &mut [f32], row: impl Fn(usize, &mut [f32]) + Sync) {
    let rows = rows_of(width);
    each(ids.chunks(rows).zip(out.chunks_mut((rows * width).max(1))), |(ids, out)| {
        for (id, out) in ids.iter().zip(out.chunks_exact_mut(width.max(1))) {
            row(*id as usize, out);
        }
    });
}

#[derive(Clone, Debug)]
struct Embed {
    ids: Arc<[u32]>,
}

impl Operation<1> for Embed {
    /// Shape of the table.
    type Saved = [usize; 2];

    fn forward(&self, [table]: [FlexTensor; 1], _: [bool; 1]) -> (FlexTensor, [usize; 2]) {
        let [rows, width]: [usize; 2] = table.layout().shape().dims();
        let table = values(&table);
        let mut out = Buffer::dirty(self.ids.len() * width);
        gather(&self.ids, width, &mut out, |row, out| {
            out.copy_from_slice(&table[row * width..][..width]);
        });
        (out.into_tensor([self.ids.len(), width]), [rows, width])
    }

    fn backward(
        &self,
        [rows, width]: [usize; 2],
        gradient: FlexTensor,
        _: [bool; 1],
    ) -> [Option<FlexTensor>; 1] {
        let gradient = values(&gradient);
        // Sorted by id and then by place, every row of the table has its gradients in a run, in
        // the order of the text.
        let mut places: Vec<(u32, usize)> = self.ids.iter().copied().zip(0..).collect();
        places.sort_unstable();
        let mut table = vec![0.0; rows * width];
        let (mut rest, mut next) = (&mut table[..], 0);
        let tasks: Vec<_> = places
            .chunk_by(|a, b| a.0 == b.0)
            .map(|run| {
                let id = run[0].0 as usize;
                let (row, after) =
                    std::mem::take(&mut rest)[(id - next) * width..].split_at_mut(width);
                (rest, next) = (after, id + 1);
                (run, row)
            })
            .collect();
        each(tasks, |(run, row)| {
            for (_, place) in run {
                for (sum, x) in row.iter_mut().zip(&gradient[place * width..][..width]) {
                    *sum += x;
                }
            }
        });
        [Some(from_values(table, [rows, width]))]
    }
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
