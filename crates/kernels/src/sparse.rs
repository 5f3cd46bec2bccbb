//! Frozen weights with a sparse change: a few entries, each with a trained number added to it.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use burn_flex::FlexTensor;
use tensor::{IndexingUpdateOp, Int, Tensor, TensorData};

use crate::buffer::Buffer;
use crate::linear::sum_of_rows;
use crate::matrix::{Arithmetic, PackedMatrix, product, product_nt, product_tn};
use crate::parallel::{each, rows_of};
use crate::recompute::Kept;
use crate::simd::{self, fma};
use crate::tape::{Operation, apply, from_values, is_fast, values};
use crate::turn::{self, BLOCK, STRIP, add_turned, turn, turned};

/// Looks at the whole gradient of a sparsely changed weight while it exists.
///
/// The gradient of one weight is computed in the backward pass where a tap is open, shown to it,
/// and dropped: no two weights' gradients ever exist at once. Once the tap has chosen which entries
/// it watches, theirs alone are computed.
pub trait GradientTap: Debug + Send + Sync {
    /// Returns whether the tap wants to see anything.
    fn is_open(&self) -> bool;

    /// Returns the only entries whose gradients the tap still wants, ascending; none while it wants
    /// all of them.
    fn watched(&self) -> Option<Vec<u32>>;

    /// Sees the gradients of the entries that [`GradientTap::watched`] gave, in their order.
    fn see_watched(&self, gradient: &[f32]);

    /// Sees the gradient of one backward pass.
    ///
    /// `gradient` is `[rows, columns]`, `weight` writes a row of the weight without its change, and
    /// `indices` are the entries that are changed.
    fn see(
        &self,
        gradient: &[f32],
        columns: usize,
        weight: &dyn Fn(usize, &mut [f32]),
        indices: &[u32],
    );
}

/// Which entries of a weight are changed, and who watches its gradient.
#[derive(Clone, Debug)]
pub struct SparseEntries {
    /// Places in the weight seen as one row-major list, ascending and each once.
    pub indices: Arc<[u32]>,
    /// Sees the weight's whole gradient while it is open.
    pub tap: Option<Arc<dyn GradientTap>>,
}

impl SparseEntries {
    fn open_tap(&self) -> Option<&dyn GradientTap> {
        self.tap.as_deref().filter(|tap| tap.is_open())
    }
}

/// Applies a frozen linear layer with a sparse change: `x · (W + S)ᵀ + b`.
///
/// `S` costs one multiplication per entry and token in each direction. Where more than one weight in
/// 32 is changed and tokens are many, the changed weight is formed instead, in each direction, and
/// dropped. The gradient is computed for the entries alone, unless the tap wants all.
///
/// # Shapes
/// - `x`: `[tokens, in]`; `weight`: `[out, in]`; `bias`: `[out]`; `changes`: one per index
/// - returns `[tokens, out]`
/// # Panics
/// If the shapes do not fit together or an index lies outside the weight.
/// # Source
/// Ansell et al., <https://arxiv.org/abs/2401.16405>.
pub fn linear_sparse(
    x: Tensor<2>,
    weight: &Arc<PackedMatrix>,
    bias: Option<Tensor<1>>,
    changes: Tensor<1>,
    entries: &SparseEntries,
) -> Tensor<2> {
    check(&changes, entries, [weight.rows(), weight.columns()]);
    assert_eq!(x.dims()[1], weight.columns(), "the width of a linear layer's input");
    let fast = is_fast(&x) && is_fast(&changes) && bias.as_ref().is_none_or(is_fast);
    if !fast {
        return linear_sparse_reference(x, weight, bias, changes, entries);
    }
    let operation = Linear { weight: Arc::clone(weight), entries: entries.clone() };
    let (x, changes) = (x.into_dispatch(), changes.into_dispatch());
    Tensor::from_dispatch(match bias {
        None => apply(operation, [x, changes]),
        Some(bias) => apply(operation, [x, changes, bias.into_dispatch()]),
    })
}

/// Computes [`linear_sparse`] out of tensor operations, with the changed weight formed.
pub fn linear_sparse_reference(
    x: Tensor<2>,
    weight: &PackedMatrix,
    bias: Option<Tensor<1>>,
    changes: Tensor<1>,
    entries: &SparseEntries,
) -> Tensor<2> {
    let data = TensorData::new(weight.to_f32(), [weight.rows(), weight.columns()]);
    let weight = Tensor::from_data(data, (&x.device(), x.dtype()));
    crate::linear_reference(x, add_sparse_reference(weight, changes, entries), bias)
}

/// Adds numbers to some entries of a weight.
///
/// # Shapes
/// - `weight`: `[rows, columns]`; `changes`: one per index; returns `[rows, columns]`
/// # Panics
/// If an index lies outside the weight.
pub fn add_sparse(weight: Tensor<2>, changes: Tensor<1>, entries: &SparseEntries) -> Tensor<2> {
    check(&changes, entries, weight.dims());
    if !(is_fast(&weight) && is_fast(&changes)) {
        return add_sparse_reference(weight, changes, entries);
    }
    let operation = Add { entries: entries.clone() };
    Tensor::from_dispatch(apply(operation, [weight.into_dispatch(), changes.into_dispatch()]))
}

/// Computes [`add_sparse`] out of tensor operations, on every device and in every float type.
pub fn add_sparse_reference(
    weight: Tensor<2>,
    changes: Tensor<1>,
    entries: &SparseEntries,
) -> Tensor<2> {
    let count = entries.indices.len();
    if count == 0 {
        return weight;
    }
    let shape = weight.dims();
    let indices: Vec<i64> = entries.indices.iter().copied().map(i64::from).collect();
    let device = weight.device();
    let indices = Tensor::<1, Int>::from_data(TensorData::new(indices, [count]), &device);
    let flat: Tensor<1> = weight.reshape([shape[0] * shape[1]]);
    flat.select_assign(0, indices, changes, IndexingUpdateOp::Add).reshape(shape)
}

fn check(changes: &Tensor<1>, entries: &SparseEntries, [rows, columns]: [usize; 2]) {
    let indices = &entries.indices;
    assert_eq!(changes.dims(), [indices.len()], "one number per entry of a sparse change");
    assert!(indices.is_sorted_by(|a, b| a < b), "the entries of a sparse change ascend");
    if let Some(last) = indices.last() {
        assert!((*last as usize) < rows * columns, "entry {last} of a {rows} x {columns} weight");
    }
}

/// Tokens below which each entry is multiplied by itself.
const FEW: usize = 8;

/// The changed weight is formed where at least one entry in so many is changed.
const FORMED: usize = 32;

/// Entries of one task where their gradient is computed.
const TASK: usize = 1 << 11;

/// Entries of up to [`STRIP`] neighbouring rows of a weight.
struct Strip {
    /// The first row, a multiple of [`STRIP`].
    first: usize,
    /// Numbers of a turned strip: [`BLOCK`] for each row.
    length: usize,
    /// Places of the entries.
    entries: Range<usize>,
}

/// Splits entries into strips, those without entries left out.
fn strips(indices: &[u32], rows: usize, columns: usize) -> impl Iterator<Item = Strip> + use<'_> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let first = *indices.get(start)? as usize / columns / STRIP * STRIP;
        let next = ((first + STRIP) * columns) as u64;
        let count = indices[start..].partition_point(|index| u64::from(*index) < next);
        let entries = start..start + count;
        start += count;
        Some(Strip { first, length: STRIP.min(rows - first) * BLOCK, entries })
    })
}

#[inline(always)]
fn lane_row(block: &[f32], row: usize) -> &[f32] {
    &block[row * BLOCK..][..BLOCK]
}

/// Calls `visit` for each row that has entries: its place in the strip, the index of its first
/// number, and the places of its entries.
#[inline(always)]
fn for_rows(
    strip: Strip,
    indices: &[u32],
    columns: usize,
    mut visit: impl FnMut(usize, usize, Range<usize>),
) {
    let mut start = strip.entries.start;
    while start < strip.entries.end {
        let row = indices[start] as usize / columns;
        let next = ((row + 1) * columns) as u64;
        let rest = &indices[start..strip.entries.end];
        let count = rest.iter().take_while(|index| u64::from(**index) < next).count();
        visit(row - strip.first, row * columns, start..start + count);
        start += count;
    }
}

/// Adds `S · x` of one block of tokens: `x` is `[columns, BLOCK]`, `y` is `[tokens, rows]`.
#[inline(always)]
fn forward_body<const LANES: usize, const FMA: bool>(
    indices: &[u32],
    changes: &[f32],
    columns: usize,
    x: &[f32],
    y: &mut [f32],
    rows: usize,
) {
    for strip in strips(indices, rows, columns) {
        let mut sums = [0.0; STRIP * BLOCK];
        let (first, length) = (strip.first, strip.length);
        for_rows(strip, indices, columns, |row, start, places| {
            let mut sum = [0.0; BLOCK];
            for (index, change) in indices[places.clone()].iter().zip(&changes[places]) {
                let x = lane_row(x, *index as usize - start);
                for (sum, x) in sum.iter_mut().zip(x) {
                    *sum = fma::<FMA>(*change, *x, *sum);
                }
            }
            sums[row * BLOCK..][..BLOCK].copy_from_slice(&sum);
        });
        add_turned::<FMA>(&sums[..length], rows, first, y);
    }
}

/// Adds `Sᵀ · dy` of one block of tokens: `dy` is `[tokens, rows]`, `dx` is `[columns, BLOCK]`.
#[inline(always)]
fn input_body<const LANES: usize, const FMA: bool>(
    indices: &[u32],
    changes: &[f32],
    columns: usize,
    dy: &[f32],
    rows: usize,
    dx: &mut [f32],
) {
    let mut turned = [0.0; STRIP * BLOCK];
    for strip in strips(indices, rows, columns) {
        turn::<FMA>(dy, rows, strip.first, &mut turned[..strip.length]);
        for_rows(strip, indices, columns, |row, start, places| {
            let dy = lane_row(&turned, row);
            for (index, change) in indices[places.clone()].iter().zip(&changes[places]) {
                let dx = &mut dx[(*index as usize - start) * BLOCK..][..BLOCK];
                for (dx, dy) in dx.iter_mut().zip(dy) {
                    *dx = fma::<FMA>(*change, *dy, *dx);
                }
            }
        });
    }
}

/// Sums of one entry's gradient on their way; their total is the gradient.
const PARTS: usize = 8;

/// Adds each entry's gradient of one block of tokens to `sums`.
#[inline(always)]
fn entries_body<const LANES: usize, const FMA: bool>(
    indices: &[u32],
    columns: usize,
    x: &[f32],
    dy: &[f32],
    rows: usize,
    sums: &mut [[f32; PARTS]],
) {
    let mut turned = [0.0; STRIP * BLOCK];
    for strip in strips(indices, rows, columns) {
        turn::<FMA>(dy, rows, strip.first, &mut turned[..strip.length]);
        for_rows(strip, indices, columns, |row, start, places| {
            let dy = lane_row(&turned, row).as_chunks::<PARTS>().0;
            for (index, sums) in indices[places.clone()].iter().zip(&mut sums[places]) {
                let x = lane_row(x, *index as usize - start).as_chunks::<PARTS>().0;
                // Two chains: each addition waits for the one before it.
                let (mut even, mut odd) = (*sums, [0.0; PARTS]);
                for (x, dy) in x.as_chunks::<2>().0.iter().zip(dy.as_chunks::<2>().0) {
                    for part in 0..PARTS {
                        even[part] = fma::<FMA>(x[0][part], dy[0][part], even[part]);
                        odd[part] = fma::<FMA>(x[1][part], dy[1][part], odd[part]);
                    }
                }
                for part in 0..PARTS {
                    sums[part] = even[part] + odd[part];
                }
            }
        });
    }
}

simd::versions! {
    fn forward_block(
        indices: &[u32],
        changes: &[f32],
        columns: usize,
        x: &[f32],
        y: &mut [f32],
        rows: usize,
    ) = forward_body;
    fn input_block(
        indices: &[u32],
        changes: &[f32],
        columns: usize,
        dy: &[f32],
        rows: usize,
        dx: &mut [f32],
    ) = input_body;
    fn entries_block(
        indices: &[u32],
        columns: usize,
        x: &[f32],
        dy: &[f32],
        rows: usize,
        sums: &mut [[f32; PARTS]],
    ) = entries_body;
}

/// Inputs `x`, `changes` and perhaps `bias`.
#[derive(Clone, Debug)]
struct Linear {
    weight: Arc<PackedMatrix>,
    entries: SparseEntries,
}

/// What [`Linear`] keeps, each only where a gradient needs it.
#[derive(Clone, Debug)]
struct Saved {
    x: Option<Kept>,
    changes: Option<FlexTensor>,
}

impl Linear {
    /// Returns the gradient of the changes, after the tap has seen what it wants.
    fn entries_gradient(&self, x: &[f32], dy: &[f32]) -> Vec<f32> {
        let (rows, columns) = (self.weight.rows(), self.weight.columns());
        let indices = &self.entries.indices;
        let mut watched = None;
        if let Some(tap) = self.entries.open_tap() {
            watched = tap.watched().map(|indices| (tap, indices));
            if watched.is_none() {
                let tokens = dy.len() / rows.max(1);
                let mut whole = Buffer::dirty(rows * columns);
                product_tn(Arithmetic::F32, [rows, tokens, columns], dy, x, &mut whole);
                tap.see(&whole, columns, &|row, out| self.weight.row_into(row, out), indices);
                return indices.iter().map(|index| whole[*index as usize]).collect();
            }
        }
        let blocks = turned(x, columns);
        if let Some((tap, indices)) = watched {
            tap.see_watched(&gradient_at(&indices, &blocks, dy, [rows, columns]));
        }
        gradient_at(indices, &blocks, dy, [rows, columns])
    }

    /// Adds `Sᵀ · dy` to the gradient of the input.
    fn add_to_input(&self, changes: &[f32], dy: &[f32], dx: &mut [f32]) {
        let (rows, columns) = (self.weight.rows(), self.weight.columns());
        let indices = &self.entries.indices;
        each(dy.chunks(rows * BLOCK).zip(dx.chunks_mut(columns * BLOCK)), |(dy, dx)| {
            let mut block = Buffer::zeros(columns * BLOCK);
            input_block(indices, changes, columns, dy, rows, &mut block);
            turn::add_all(&block, columns, dx);
        });
    }

    /// Forms the changed weight, where that costs less than the changes by themselves: many tokens
    /// pay for one more pass over the weight.
    fn formed(&self, changes: &[f32], tokens: usize) -> Option<Buffer> {
        let (rows, columns) = (self.weight.rows(), self.weight.columns());
        let indices = &self.entries.indices;
        if tokens < BLOCK || indices.len() < rows * columns / FORMED {
            return None;
        }
        let mut whole = Buffer::dirty(rows * columns);
        let each_rows = rows_of(columns);
        each(whole.chunks_mut(each_rows * columns).enumerate(), |(chunk, whole)| {
            let first = chunk * each_rows;
            for (row, out) in whole.chunks_exact_mut(columns).enumerate() {
                self.weight.row_into(first + row, out);
            }
            let place = |index: usize| indices.partition_point(|i| (*i as usize) < index);
            let start = first * columns;
            let places = place(start)..place(start + whole.len());
            for (index, change) in indices[places.clone()].iter().zip(&changes[places]) {
                whole[*index as usize - start] += change;
            }
        });
        Some(whole)
    }
}

/// Returns the weight's gradient at some entries; `x` is in turned blocks, `dy` is `[tokens, rows]`.
fn gradient_at(indices: &[u32], x: &[f32], dy: &[f32], [rows, columns]: [usize; 2]) -> Vec<f32> {
    let mut gradient = vec![0.0; indices.len()];
    each(indices.chunks(TASK).zip(gradient.chunks_mut(TASK)), |(indices, gradient)| {
        let mut sums = vec![[0.0; PARTS]; indices.len()];
        for (x, dy) in x.chunks(columns * BLOCK).zip(dy.chunks(rows * BLOCK)) {
            entries_block(indices, columns, x, dy, rows, &mut sums);
        }
        gradient.iter_mut().zip(sums).for_each(|(gradient, sums)| *gradient = simd::sum(sums));
    });
    gradient
}

/// Adds `S · x` of a few tokens, which would leave most of a block idle.
fn add_few(
    indices: &[u32],
    changes: &[f32],
    x: &[f32],
    columns: usize,
    y: &mut [f32],
    rows: usize,
) {
    for (x, y) in x.chunks_exact(columns).zip(y.chunks_exact_mut(rows)) {
        let (mut row, mut start) = (0, 0);
        for (index, change) in indices.iter().zip(changes) {
            let index = *index as usize;
            if index >= start + columns {
                row = index / columns;
                start = row * columns;
            }
            y[row] += change * x[index - start];
        }
    }
}

impl<const N: usize> Operation<N> for Linear {
    type Saved = Saved;

    fn forward(&self, inputs: [FlexTensor; N], wanted: [bool; N]) -> (FlexTensor, Saved) {
        let (rows, columns) = (self.weight.rows(), self.weight.columns());
        let (x, changes) = (values(&inputs[0]), values(&inputs[1]));
        let tokens = inputs[0].layout().shape()[0];
        let mut y = Buffer::dirty(tokens * rows);
        let indices = &self.entries.indices;
        let bias = inputs.get(2).map(values);
        if let Some(whole) = self.formed(changes, tokens) {
            let shape = [tokens, columns, rows];
            product_nt(self.weight.arithmetic(), shape, x, &whole, bias, &mut y);
        } else {
            self.weight.multiply(x, tokens, &mut y, bias);
            if tokens < FEW {
                add_few(indices, changes, x, columns, &mut y, rows);
            } else if !indices.is_empty() {
                let blocks = turned(x, columns);
                each(blocks.chunks(columns * BLOCK).zip(y.chunks_mut(rows * BLOCK)), |(x, y)| {
                    forward_block(indices, changes, columns, x, y, rows);
                });
            }
        }
        let saved = Saved {
            x: wanted[1].then(|| Kept::of(&inputs[0])),
            changes: wanted[0].then(|| inputs[1].clone()),
        };
        (y.into_tensor([tokens, rows]), saved)
    }

    fn backward(
        &self,
        saved: Saved,
        gradient: FlexTensor,
        wanted: [bool; N],
    ) -> [Option<FlexTensor>; N] {
        let (rows, columns) = (self.weight.rows(), self.weight.columns());
        let tokens = gradient.layout().shape()[0];
        let dy = values(&gradient);
        let indices = &self.entries.indices;
        let dx = saved.changes.map(|changes| {
            let changes = values(&changes);
            let mut dx = Buffer::dirty(tokens * columns);
            if let Some(whole) = self.formed(changes, tokens) {
                let shape = [tokens, rows, columns];
                product(self.weight.arithmetic(), shape, dy, &whole, &mut dx);
            } else {
                self.weight.multiply_transposed(dy, tokens, &mut dx);
                if !indices.is_empty() && tokens > 0 {
                    self.add_to_input(changes, dy, &mut dx);
                }
            }
            dx.into_tensor([tokens, columns])
        });
        let changes = saved
            .x
            .map(|x| from_values(self.entries_gradient(values(x.tensor()), dy), [indices.len()]));
        let bias = wanted.get(2).is_some_and(|wanted| *wanted).then(|| sum_of_rows(&gradient));
        let mut found = [dx, changes, bias].into_iter();
        std::array::from_fn(|_| found.next().flatten())
    }
}

/// Inputs `weight` and `changes`.
#[derive(Clone, Debug)]
struct Add {
    entries: SparseEntries,
}

impl Operation<2> for Add {
    type Saved = Option<FlexTensor>;

    fn forward(
        &self,
        [weight, changes]: [FlexTensor; 2],
        wanted: [bool; 2],
    ) -> (FlexTensor, Self::Saved) {
        let mut sum = values(&weight).to_vec();
        for (index, change) in self.entries.indices.iter().zip(values(&changes)) {
            sum[*index as usize] += change;
        }
        let out = from_values(sum, weight.layout().shape().clone());
        // The tap may want to compare the gradient with the weight.
        let keep = wanted[1] && self.entries.open_tap().is_some();
        (out, keep.then_some(weight))
    }

    fn backward(
        &self,
        weight: Self::Saved,
        gradient: FlexTensor,
        wanted: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let dw = values(&gradient);
        let indices = &self.entries.indices;
        if let (Some(tap), Some(weight)) = (self.entries.open_tap(), weight) {
            let columns = gradient.layout().shape()[1];
            let weight = values(&weight);
            let row = |row: usize, out: &mut [f32]| {
                out.copy_from_slice(&weight[row * out.len()..][..out.len()]);
            };
            tap.see(dw, columns, &row, indices);
        }
        let changes = wanted[1].then(|| {
            let picked: Vec<f32> = indices.iter().map(|index| dw[*index as usize]).collect();
            from_values(picked, [indices.len()])
        });
        [wanted[0].then(|| gradient.clone()), changes]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{Input, Numbers, agree, differences, vector};
    use crate::matrix::Form;
    use std::sync::Mutex;

    fn some_indices(numbers: &mut Numbers, count: usize) -> Arc<[u32]> {
        let one_in = numbers.pick(&[1, 3, 20, 100]);
        let mut indices: Vec<u32> =
            (0..count as u32).filter(|_| numbers.between(1, one_in) == 1).collect();
        if indices.is_empty() {
            indices.push(numbers.between(0, count - 1) as u32);
        }
        indices.into()
    }

    fn case(numbers: &mut Numbers) -> (Arc<PackedMatrix>, SparseEntries, Vec<Input>, String) {
        let [n, width, out] = [(); 3].map(|()| numbers.pick(&[1, 3, 8, 17, 70, 130]));
        let form = numbers.pick(&[Form::F32, Form::Bf16]);
        let weight: Vec<f32> = (0..out * width).map(|_| numbers.normal() as f32).collect();
        let weight = Arc::new(PackedMatrix::from_f32(out, width, weight, form).unwrap());
        let indices = some_indices(numbers, out * width);
        let inputs = vec![
            numbers.matrix(n, width),
            numbers.matrix(1, indices.len()),
            numbers.matrix(1, out),
        ];
        let what = format!("{n}x{width}x{out}, {} entries", indices.len());
        (weight, SparseEntries { indices, tap: None }, inputs, what)
    }

    #[test]
    fn fast_is_the_reference() {
        let mut numbers = Numbers(31);
        for round in 0..200 {
            let (weight, entries, mut inputs, what) = case(&mut numbers);
            inputs.truncate(if round % 5 < 2 { 2 } else { 3 });
            for (index, input) in inputs.iter_mut().enumerate() {
                input.tracked = round >> index & 1 == 0;
            }
            let bias = |x: &[Tensor<2>]| x.get(2).map(vector);
            agree(
                &what,
                |x| linear_sparse(x[0].clone(), &weight, bias(x), vector(&x[1]), &entries),
                |x| {
                    linear_sparse_reference(x[0].clone(), &weight, bias(x), vector(&x[1]), &entries)
                },
                &inputs,
                1e-5,
            );
        }
    }

    #[test]
    fn adding_fast_is_the_reference() {
        let mut numbers = Numbers(32);
        for round in 0..200 {
            let [rows, columns] = [(); 2].map(|()| numbers.pick(&[1, 3, 17]));
            let entries =
                SparseEntries { indices: some_indices(&mut numbers, rows * columns), tap: None };
            let inputs = [
                numbers.matrix(rows, columns).tracked(round % 2 == 0),
                numbers.matrix(1, entries.indices.len()).tracked(round % 3 == 0),
            ];
            agree(
                "add",
                |x| add_sparse(x[0].clone(), vector(&x[1]), &entries),
                |x| add_sparse_reference(x[0].clone(), vector(&x[1]), &entries),
                &inputs,
                1e-6,
            );
        }
    }

    #[test]
    fn the_reference_follows_its_differences() {
        let mut numbers = Numbers(33);
        let weight: Vec<f32> = (0..20).map(|_| numbers.normal() as f32).collect();
        let weight = PackedMatrix::from_f32(5, 4, weight, Form::F32).unwrap();
        let entries = SparseEntries { indices: [0, 3, 9, 19].into(), tap: None };
        let inputs = [numbers.matrix(3, 4), numbers.matrix(1, 4), numbers.matrix(1, 5)];
        differences(
            "sparse",
            |x| {
                let bias = Some(vector(&x[2]));
                linear_sparse_reference(x[0].clone(), &weight, bias, vector(&x[1]), &entries)
            },
            &inputs,
        );
        differences(
            "add",
            |x| add_sparse_reference(x[0].clone(), vector(&x[1]), &entries),
            &[numbers.matrix(5, 4), numbers.matrix(1, 4)],
        );
    }

    /// A gradient, the weight's first row, and the changed entries.
    type Sight = (Vec<f32>, Vec<f32>, Vec<u32>);

    #[derive(Debug, Default)]
    struct Seen(Mutex<Vec<Sight>>);

    impl GradientTap for Seen {
        fn is_open(&self) -> bool {
            true
        }

        fn watched(&self) -> Option<Vec<u32>> {
            None
        }

        fn see_watched(&self, _gradient: &[f32]) {
            unreachable!("nothing is watched");
        }

        fn see(
            &self,
            gradient: &[f32],
            columns: usize,
            weight: &dyn Fn(usize, &mut [f32]),
            indices: &[u32],
        ) {
            let mut first = vec![0.0; columns];
            weight(0, &mut first);
            self.0.lock().unwrap().push((gradient.to_vec(), first, indices.to_vec()));
        }
    }

    #[test]
    fn a_tap_sees_the_whole_gradient_and_an_empty_change_still_shows_it() {
        let weight = Arc::new(PackedMatrix::from_f32(2, 3, vec![1.0; 6], Form::F32).unwrap());
        let device = tensor::Device::flex().autodiff();
        let x = Tensor::<2>::from_floats([[1.0, 2.0, 3.0]], &device);
        for indices in [vec![], vec![4]] {
            let tap = Arc::new(Seen::default());
            let entries = SparseEntries {
                indices: indices.clone().into(),
                tap: Some(Arc::clone(&tap) as Arc<dyn GradientTap>),
            };
            let count = indices.len();
            let changes =
                Tensor::<1>::from_data(TensorData::new(vec![0.0_f32; count], [count]), &device)
                    .require_grad();
            let y = linear_sparse(x.clone(), &weight, None, changes.clone(), &entries);
            let scale = Tensor::<2>::from_floats([[10.0, 100.0]], &device);
            let gradients = (y * scale).sum().backward();
            let found: Vec<f32> =
                changes.grad(&gradients).unwrap().into_data().try_to_vec().unwrap();
            // dW = dyᵀ x; entry 4 is row 1, column 1.
            assert_eq!(found, if count == 0 { vec![] } else { vec![200.0] });
            let seen = tap.0.lock().unwrap();
            assert_eq!(seen.len(), 1);
            assert_eq!(seen[0].0, [10.0, 20.0, 30.0, 100.0, 200.0, 300.0]);
            assert_eq!((&seen[0].1, &seen[0].2), (&vec![1.0; 3], &indices));
        }
    }

    /// Watches entries whose gradients are then all it is shown.
    #[derive(Debug)]
    struct Watching(Vec<u32>, Mutex<Vec<Vec<f32>>>);

    impl GradientTap for Watching {
        fn is_open(&self) -> bool {
            true
        }

        fn watched(&self) -> Option<Vec<u32>> {
            Some(self.0.clone())
        }

        fn see_watched(&self, gradient: &[f32]) {
            self.1.lock().unwrap().push(gradient.to_vec());
        }

        fn see(&self, _: &[f32], _: usize, _: &dyn Fn(usize, &mut [f32]), _: &[u32]) {
            unreachable!("the whole gradient is not wanted");
        }
    }

    #[test]
    fn a_tap_that_has_chosen_sees_its_entries_alone() {
        let weight = Arc::new(PackedMatrix::from_f32(2, 3, vec![1.0; 6], Form::F32).unwrap());
        let device = tensor::Device::flex().autodiff();
        let x = Tensor::<2>::from_floats([[1.0, 2.0, 3.0], [1.0, 0.0, 0.5]], &device);
        let tap = Arc::new(Watching(vec![0, 2, 5], Mutex::default()));
        let entries = SparseEntries {
            indices: [4].into(),
            tap: Some(Arc::clone(&tap) as Arc<dyn GradientTap>),
        };
        let changes = Tensor::<1>::from_floats([0.5], &device).require_grad();
        let y = linear_sparse(x, &weight, None, changes.clone(), &entries);
        let scale = Tensor::<2>::from_floats([[10.0, 100.0]], &device);
        let gradients = (y * scale).sum().backward();
        let found: Vec<f32> = changes.grad(&gradients).unwrap().into_data().try_to_vec().unwrap();
        assert_eq!(found, [200.0]);
        // dW = dyᵀ x: 10 · (1 + 1), 10 · (3 + 0.5), 100 · (3 + 0.5).
        assert_eq!(*tap.1.lock().unwrap(), [[20.0, 35.0, 350.0]]);
    }
}
