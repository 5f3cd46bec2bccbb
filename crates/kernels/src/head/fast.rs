//! The head and its soft-max in tiles of tokens and words: logits never leave the cache.

use std::ops::Range;
use std::sync::Arc;

use burn_flex::FlexTensor;

use super::HeadOptions;
use super::learned::SumGradients;
use crate::buffer::Buffer;
use crate::matrix::blocked;
use crate::matrix::operand::{Operand, Start, Term};
use crate::matrix::{Arithmetic, PackedMatrix};
use crate::parallel::each;
use crate::simd;
use crate::tape::{Operation, from_values, values};

/// Tokens and words of a tile: 2 MiB of logits. Each tile of words is packed once for so many
/// tokens.
const TOKENS: usize = 512;
const WORDS: usize = 1024;
/// Tokens one task of a pass over a tile takes.
pub(super) const ROWS: usize = 16;

/// Cross-entropy of `x` with a frozen head, or with the second input as head; the bias comes last.
#[derive(Clone, Debug)]
pub(super) struct Head {
    frozen: Option<Arc<PackedMatrix>>,
    /// Arithmetic of a head that is not frozen.
    arithmetic: Arithmetic,
    scale: f32,
    soft_cap: Option<f32>,
    /// Tokens with and without label.
    all: usize,
    /// Places of the tokens that have a label, and the labels.
    places: Arc<[usize]>,
    pub(super) labels: Arc<[usize]>,
}

/// What backward needs.
#[derive(Clone, Debug)]
pub(super) struct Saved<const N: usize> {
    inputs: [FlexTensor; N],
    /// `[labels, width]`: gradient of each loss by its token; empty if nobody wants it
    dx: Arc<Vec<f32>>,
    /// `[labels]`: log-sum-exp of the logits
    sums: Arc<[f32]>,
    /// Where weight or bias wants a gradient.
    learned: Option<SumGradients>,
}

/// The head's weight, wherever it lies.
#[derive(Clone, Copy)]
pub(super) enum Weight<'a> {
    Packed(&'a PackedMatrix),
    /// `[words, width]`
    Dense(&'a [f32], usize, Arithmetic),
}

impl<'a> Weight<'a> {
    pub(super) fn shape(self) -> [usize; 2] {
        match self {
            Self::Packed(matrix) => [matrix.rows(), matrix.columns()],
            Self::Dense(values, width, _) => [values.len() / width.max(1), width],
        }
    }

    pub(super) fn arithmetic(self) -> Arithmetic {
        match self {
            Self::Packed(matrix) => matrix.arithmetic(),
            Self::Dense(_, _, arithmetic) => arithmetic,
        }
    }

    /// Gives `[words, width]`, unpacked into `buffer` unless it lies ready.
    pub(super) fn tile<'b>(self, words: &Range<usize>, buffer: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        let [_, width] = self.shape();
        let numbers = words.start * width..words.end * width;
        let dense = match self {
            Self::Packed(matrix) => matrix.as_f32(),
            Self::Dense(values, ..) => Some(values),
        };
        if let Some(dense) = dense {
            return &dense[numbers];
        }
        buffer.resize(numbers.len(), 0.0);
        let rows = words.clone().step_by(ROWS).zip(buffer.chunks_mut((ROWS * width).max(1)));
        each(rows, |(first, out)| {
            for (row, out) in (first..).zip(out.chunks_exact_mut(width)) {
                self.row_into(row, out);
            }
        });
        buffer
    }

    fn row_into(self, row: usize, out: &mut [f32]) {
        match self {
            Self::Packed(matrix) => matrix.row_into(row, out),
            Self::Dense(values, width, _) => out.copy_from_slice(&values[row * width..][..width]),
        }
    }
}

/// What has been seen of one token's logits.
#[derive(Clone, Copy)]
pub(super) struct Seen {
    pub(super) largest: f32,
    /// Sum of exponentials above the largest.
    pub(super) sum: f32,
    /// Logit of the label, and its slope through scale and cap.
    label: f32,
    pub(super) label_slope: f32,
}

impl Seen {
    pub(super) const NOTHING: Self =
        Self { largest: f32::NEG_INFINITY, sum: 0.0, label: 0.0, label_slope: 0.0 };
}

impl Head {
    pub(super) fn new(
        frozen: Option<Arc<PackedMatrix>>,
        labels: &[Option<u32>],
        options: &HeadOptions,
    ) -> Self {
        let (places, words): (Vec<_>, Vec<_>) = labels
            .iter()
            .enumerate()
            .filter_map(|(place, label)| label.map(|label| (place, label as usize)))
            .unzip();
        Self {
            frozen,
            arithmetic: options.arithmetic,
            scale: options.scale as f32,
            soft_cap: options.soft_cap.map(|cap| cap as f32),
            all: labels.len(),
            places: places.into(),
            labels: words.into(),
        }
    }

    fn weight<'a>(&'a self, inputs: &'a [FlexTensor]) -> Weight<'a> {
        if let Some(matrix) = &self.frozen {
            return Weight::Packed(matrix);
        }
        let width = inputs[1].layout().shape()[1];
        Weight::Dense(values(&inputs[1]), width, self.arithmetic)
    }

    /// Position of the bias among `count` inputs.
    fn bias_at(&self, count: usize) -> Option<usize> {
        let others = if self.frozen.is_some() { 1 } else { 2 };
        (count > others).then_some(others)
    }

    fn bias<'a>(&self, inputs: &'a [FlexTensor]) -> Option<&'a [f32]> {
        self.bias_at(inputs.len()).map(|at| values(&inputs[at]))
    }

    /// Gathers the tokens that have a label, `[labels, width]`.
    fn labelled(&self, x: &[f32], width: usize) -> Vec<f32> {
        let mut rows = Vec::with_capacity(self.places.len() * width);
        for place in self.places.iter() {
            rows.extend_from_slice(&x[place * width..][..width]);
        }
        rows
    }

    /// Cuts the labelled tokens into blocks.
    fn tokens(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let count = self.labels.len();
        (0..count).step_by(TOKENS).map(move |start| start..count.min(start + TOKENS))
    }

    /// Cuts the vocabulary into tiles.
    pub(super) fn words(words: usize) -> impl Iterator<Item = Range<usize>> {
        (0..words).step_by(WORDS).map(move |start| start..words.min(start + WORDS))
    }

    /// Sees all logits of the labelled tokens; leaves in `dx`, unless it is empty, the gradient of
    /// each token's loss.
    fn see(
        &self,
        weight: Weight<'_>,
        bias: Option<&[f32]>,
        x: &[f32],
        dx: &mut [f32],
    ) -> Vec<Seen> {
        let [words, width] = weight.shape();
        let mut seen = vec![Seen::NOTHING; self.labels.len()];
        let (mut unpacked, mut logits) = (Vec::new(), Vec::new());
        for words in Self::words(words) {
            let tile = weight.tile(&words, &mut unpacked);
            for tokens in self.tokens() {
                let numbers = tokens.start * width..tokens.end * width;
                let labels = &self.labels[tokens.clone()];
                let seen = &mut seen[tokens];
                logits.resize(labels.len() * words.len(), 0.0);
                Self::logits(
                    weight.arithmetic(),
                    &x[numbers.clone()],
                    tile,
                    bias,
                    &words,
                    &mut logits,
                );
                let rows = logits.chunks_mut(ROWS * words.len()).zip(labels.chunks(ROWS));
                let rows = rows.zip(seen.chunks_mut(ROWS));
                if dx.is_empty() {
                    each(rows, |((logits, labels), seen)| {
                        see_rows(self.scale, self.soft_cap, &words, labels, logits, seen, &mut []);
                    });
                    continue;
                }
                let dx = &mut dx[numbers];
                each(rows.zip(dx.chunks_mut(ROWS * width)), |(((logits, labels), seen), dx)| {
                    see_rows(self.scale, self.soft_cap, &words, labels, logits, seen, dx);
                });
                let term = Term {
                    left: Operand::rows(&logits, words.len()),
                    right: Operand::columns(tile, width),
                    length: words.len(),
                };
                let arithmetic = weight.arithmetic();
                blocked::multiply(arithmetic, labels.len(), width, &[term], Start::Output, dx);
            }
        }
        let rows = seen.chunks(ROWS).zip(self.labels.chunks(ROWS));
        each(rows.zip(dx.chunks_mut((ROWS * width).max(1))), |((seen, labels), dx)| {
            let mut row = vec![0.0; width];
            for ((seen, label), dx) in seen.iter().zip(labels).zip(dx.chunks_exact_mut(width)) {
                weight.row_into(*label, &mut row);
                let share = seen.sum.recip();
                for (dx, weight) in dx.iter_mut().zip(&row) {
                    *dx = *dx * share - seen.label_slope * weight;
                }
            }
        });
        seen
    }

    /// Takes in some rows of a tile, as [`see_rows`] does, with no gradient to fade.
    pub(super) fn see_tile(
        &self,
        words: &Range<usize>,
        labels: &[usize],
        logits: &mut [f32],
        seen: &mut [Seen],
    ) {
        see_rows(self.scale, self.soft_cap, words, labels, logits, seen, &mut []);
    }

    /// Computes `x · tileᵀ + bias[words]`.
    pub(super) fn logits(
        arithmetic: Arithmetic,
        x: &[f32],
        tile: &[f32],
        bias: Option<&[f32]>,
        words: &Range<usize>,
        out: &mut [f32],
    ) {
        let width = tile.len() / words.len();
        let start = bias.map_or(Start::Zero, |bias| Start::Bias(&bias[words.clone()]));
        let term = Term {
            left: Operand::rows(x, width),
            right: Operand::rows(tile, width),
            length: width,
        };
        blocked::multiply(arithmetic, out.len() / words.len(), words.len(), &[term], start, out);
    }

    /// Tells whether weight and bias want a gradient.
    fn wants<const N: usize>(&self, wanted: [bool; N]) -> [bool; 2] {
        let weight_at = self.frozen.is_none().then_some(1);
        [weight_at, self.bias_at(N)].map(|at| at.is_some_and(|at| wanted[at]))
    }

    /// Computes gradients of weight and bias, `[words, width]` and `[words]`, of losses that weigh
    /// differently: `factors`, one per label.
    fn weight_gradients<const N: usize>(
        &self,
        saved: &Saved<N>,
        factors: &[f32],
        wanted: [bool; 2],
    ) -> [Vec<f32>; 2] {
        let weight = self.weight(&saved.inputs);
        let bias = self.bias(&saved.inputs);
        let [words, width] = weight.shape();
        let x = self.labelled(values(&saved.inputs[0]), width);
        let mut dweight = vec![0.0; if wanted[0] { words * width } else { 0 }];
        let mut dbias = vec![0.0; words];
        let (mut unpacked, mut changes) = (Vec::new(), Vec::new());
        for words in Self::words(words) {
            let tile = weight.tile(&words, &mut unpacked);
            for tokens in self.tokens() {
                let x = &x[tokens.start * width..tokens.end * width];
                changes.resize(tokens.len() * words.len(), 0.0);
                Self::logits(weight.arithmetic(), x, tile, bias, &words, &mut changes);
                let rows = self.labels[tokens.clone()].chunks(ROWS);
                let rows = rows.zip(saved.sums[tokens.clone()].chunks(ROWS));
                let rows = rows.zip(factors[tokens.clone()].chunks(ROWS));
                each(
                    rows.zip(changes.chunks_mut(ROWS * words.len())),
                    |(((labels, sums), factors), changes)| {
                        let (scale, cap) = (self.scale, self.soft_cap);
                        change_rows(scale, cap, &words, labels, sums, factors, changes);
                    },
                );
                if wanted[1] {
                    for row in changes.chunks_exact(words.len()) {
                        for (sum, x) in dbias[words.clone()].iter_mut().zip(row) {
                            *sum += x;
                        }
                    }
                }
                if wanted[0] {
                    let out = &mut dweight[words.start * width..words.end * width];
                    let term = Term {
                        left: Operand::columns(&changes, words.len()),
                        right: Operand::columns(x, width),
                        length: tokens.len(),
                    };
                    let arithmetic = weight.arithmetic();
                    blocked::multiply(arithmetic, words.len(), width, &[term], Start::Output, out);
                }
            }
        }
        [dweight, dbias]
    }
}

impl<const N: usize> Operation<N> for Head {
    type Saved = Saved<N>;

    fn forward(&self, inputs: [FlexTensor; N], wanted: [bool; N]) -> (FlexTensor, Saved<N>) {
        let weight = self.weight(&inputs);
        let [_, width] = weight.shape();
        let x = self.labelled(values(&inputs[0]), width);
        let bias = self.bias(&inputs);
        let [wants_weight, wants_bias] = self.wants(wanted);
        let (seen, dx, learned) = if wants_weight || wants_bias {
            let learned = self.learn(weight, bias, &x, [wanted[0], wants_weight, wants_bias]);
            (learned.seen, learned.dx, Some(learned.sums))
        } else {
            let mut dx = vec![0.0; if wanted[0] { x.len() } else { 0 }];
            (self.see(weight, bias, &x, &mut dx), dx, None)
        };
        let mut losses = vec![0.0; self.all];
        let mut sums = Vec::with_capacity(seen.len());
        for (place, seen) in self.places.iter().zip(seen) {
            let sum = seen.largest + seen.sum.ln();
            losses[*place] = sum - seen.label;
            sums.push(sum);
        }
        let saved = Saved { dx: Arc::new(dx), sums: sums.into(), learned, inputs };
        (from_values(losses, [self.all]), saved)
    }

    fn backward(
        &self,
        mut saved: Saved<N>,
        gradient: FlexTensor,
        wanted: [bool; N],
    ) -> [Option<FlexTensor>; N] {
        let gradient = values(&gradient);
        let [words, width] = self.weight(&saved.inputs).shape();
        let weight_at = self.frozen.is_none().then_some(1);
        let bias_at = self.bias_at(N);
        let mut found = [const { None }; N];
        if wanted[0] {
            let mut dx = Buffer::zeros(self.all * width);
            for (place, row) in self.places.iter().zip(saved.dx.chunks_exact(width.max(1))) {
                let factor = gradient[*place];
                for (dx, x) in dx[place * width..][..width].iter_mut().zip(row) {
                    *dx = x * factor;
                }
            }
            found[0] = Some(dx.into_tensor([self.all, width]));
        }
        let wanted = self.wants(wanted);
        if wanted != [false, false] {
            let factors: Vec<f32> = self.places.iter().map(|place| gradient[*place]).collect();
            let learned = saved.learned.take().and_then(|learned| learned.times(&factors));
            let [dweight, dbias] = learned.unwrap_or_else(|| {
                let [dweight, dbias] = self.weight_gradients(&saved, &factors, wanted);
                let dweight = wanted[0].then(|| from_values(dweight, [words, width]));
                [dweight, wanted[1].then(|| from_values(dbias, [words]))]
            });
            if let (Some(at), true) = (weight_at, wanted[0]) {
                found[at] = dweight;
            }
            if let (Some(at), true) = (bias_at, wanted[1]) {
                found[at] = dbias;
            }
        }
        found
    }
}

/// Takes in a tile of logits, `[labels, words]`, and leaves their exponentials above the largest
/// seen, times their slope, for the product with the head; fades `dx` where the largest grew.
#[inline(always)]
fn see_body<const LANES: usize, const FMA: bool>(
    scale: f32,
    soft_cap: Option<f32>,
    words: &Range<usize>,
    labels: &[usize],
    logits: &mut [f32],
    seen: &mut [Seen],
    dx: &mut [f32],
) {
    let width = dx.len() / labels.len();
    let rows = logits.chunks_exact_mut(words.len()).zip(labels);
    for (index, ((row, label), seen)) in rows.zip(seen).enumerate() {
        cap::<FMA>(scale, soft_cap, row);
        if words.contains(label) {
            seen.label = row[label - words.start];
            seen.label_slope = slope(scale, soft_cap, seen.label);
        }
        let largest = simd::larger(largest::<LANES>(row), seen.largest);
        if largest > seen.largest {
            let fade = simd::exp::<FMA>(seen.largest - largest);
            seen.sum *= fade;
            seen.largest = largest;
            for x in &mut dx[index * width..(index + 1) * width] {
                *x *= fade;
            }
        }
        let (chunks, rest) = row.as_chunks_mut::<LANES>();
        let mut sums = [0.0; LANES];
        for chunk in chunks {
            for (x, sum) in chunk.iter_mut().zip(&mut sums) {
                let share = simd::exp::<FMA>(*x - largest);
                *sum += share;
                *x = share * slope(scale, soft_cap, *x);
            }
        }
        for (x, sum) in rest.iter_mut().zip(&mut sums) {
            let share = simd::exp::<FMA>(*x - largest);
            *sum += share;
            *x = share * slope(scale, soft_cap, *x);
        }
        seen.sum += simd::sum(sums);
    }
}

/// Turns a tile of logits into the gradient of the losses by them, before scale and cap.
#[inline(always)]
fn change_body<const LANES: usize, const FMA: bool>(
    scale: f32,
    soft_cap: Option<f32>,
    words: &Range<usize>,
    labels: &[usize],
    sums: &[f32],
    factors: &[f32],
    tile: &mut [f32],
) {
    let rows = tile.chunks_exact_mut(words.len()).zip(labels);
    for ((row, label), (sum, factor)) in rows.zip(sums.iter().zip(factors)) {
        cap::<FMA>(scale, soft_cap, row);
        let own = words.contains(label).then(|| {
            let logit = row[label - words.start];
            factor * slope(scale, soft_cap, logit)
        });
        for x in row.iter_mut() {
            *x = simd::exp::<FMA>(*x - sum) * slope(scale, soft_cap, *x) * factor;
        }
        if let Some(own) = own {
            row[label - words.start] -= own;
        }
    }
}

/// Scales and caps logits.
#[inline(always)]
fn cap<const FMA: bool>(scale: f32, soft_cap: Option<f32>, row: &mut [f32]) {
    if let Some(cap) = soft_cap {
        let inner = scale / cap;
        for x in row {
            *x = cap * simd::tanh::<FMA>(*x * inner);
        }
    } else if scale != 1.0 {
        for x in row {
            *x *= scale;
        }
    }
}

/// Gives the slope of a logit that scale and cap have gone over.
#[inline(always)]
fn slope(scale: f32, soft_cap: Option<f32>, logit: f32) -> f32 {
    match soft_cap {
        Some(cap) => {
            let tanh = logit / cap;
            scale * (1.0 - tanh * tanh)
        }
        None => scale,
    }
}

#[inline(always)]
fn largest<const LANES: usize>(row: &[f32]) -> f32 {
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut largest = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (largest, x) in largest.iter_mut().zip(chunk) {
            *largest = simd::larger(*x, *largest);
        }
    }
    largest.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| simd::larger(*b, a))
}

simd::versions! {
    fn see_rows(
        scale: f32,
        soft_cap: Option<f32>,
        words: &Range<usize>,
        labels: &[usize],
        logits: &mut [f32],
        seen: &mut [Seen],
        dx: &mut [f32],
    ) = see_body;
    fn change_rows(
        scale: f32,
        soft_cap: Option<f32>,
        words: &Range<usize>,
        labels: &[usize],
        sums: &[f32],
        factors: &[f32],
        tile: &mut [f32],
    ) = change_body;
}
