//! Attention over keys and values kept from earlier passes.

use tensor::{Device, Tensor, TensorData};

use super::block::Head;
use super::{AttentionOptions, fast, reference};
use crate::spans::Spans;
use crate::tape::{constant, from_constant, is_fast, values};

/// Keys and values of one document in one layer, appended to in place.
#[derive(Clone, Debug, Default)]
pub struct KeyValues {
    /// `[tokens, key_heads · head_width]`, with room behind.
    k: Vec<f32>,
    v: Vec<f32>,
    tokens: usize,
}

impl KeyValues {
    /// Gives the number of tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    fn append(&mut self, k: &[f32], v: &[f32], tokens: usize) {
        self.k.extend_from_slice(k);
        self.v.extend_from_slice(v);
        self.tokens += tokens;
    }
}

/// Appends to the cache of each document and computes [`attention`](super::attention()) over all
/// it holds, without a copy of what was there before.
///
/// Nothing gets a gradient.
///
/// # Shapes
/// - `q`: `[queries, heads · head_width]`; `k`, `v`: `[queries, key_heads · head_width]`
/// - `first`: keys and values `[any, key_heads · head_width]` that documents new to the cache
///   begin with, before their own
/// - `cache`: one per document of `queries`; missing ones are added
/// - returns as `q`
///
/// # Panics
/// When shapes, spans and options do not fit each other.
pub fn attention_over_cache(
    [q, k, v]: [Tensor<2>; 3],
    first: Option<&[Tensor<2>; 2]>,
    queries: &Spans,
    cache: &mut Vec<KeyValues>,
    options: &AttentionOptions,
) -> Tensor<2> {
    options.check(&q, &k, &v, queries, queries);
    let [q, k, v] = [q, k, v].map(Tensor::inner);
    if cache.len() < queries.documents() {
        let mut new = KeyValues::default();
        if let Some(first) = first {
            let [k, v] = first.each_ref().map(|x| numbers(x.clone().inner()));
            new.append(&k, &v, first[0].dims()[0]);
        }
        cache.resize(queries.documents(), new);
    }
    let stride = options.key_heads * options.head_width;
    let fast = is_fast(&q) && is_fast(&k) && is_fast(&v);
    let mut append = |k: &[f32], v: &[f32]| {
        for (document, rows) in cache.iter_mut().zip(queries.iter()) {
            let part = rows.start * stride..rows.end * stride;
            document.append(&k[part.clone()], &v[part], rows.len());
        }
    };
    if !fast {
        append(&numbers(k), &numbers(v));
        return over_tensors(q, queries, cache, options);
    }
    let [q, k, v] = [q, k, v].map(|x| constant(x.into_dispatch()));
    append(values(&k), values(&v));
    let width = options.head_width;
    let head = |document: usize, key_head: usize| {
        let KeyValues { k, v, tokens } = &cache[document];
        Head {
            k: &k[(key_head * width).min(k.len())..],
            v: &v[(key_head * width).min(v.len())..],
            stride,
            width,
            options,
            queries: queries.get(document).len(),
            keys: *tokens,
        }
    };
    let (output, _) = fast::attend(options, queries, values(&q), head);
    let shape = [queries.tokens(), options.heads * width];
    Tensor::from_dispatch(from_constant(output.into_tensor(shape)))
}

fn numbers(x: Tensor<2>) -> Vec<f32> {
    match x.try_into_vec_as::<f32>() {
        Ok(values) => values,
        Err(error) => unreachable!("float tensors are readable as f32: {error}"),
    }
}

/// Does the same on other devices and in other float types.
fn over_tensors(
    q: Tensor<2>,
    queries: &Spans,
    cache: &[KeyValues],
    options: &AttentionOptions,
) -> Tensor<2> {
    let device: Device = q.device();
    let cache = &cache[..queries.documents()];
    let keys = Spans::from_lengths(cache.iter().map(KeyValues::tokens));
    let joined = |pick: fn(&KeyValues) -> &[f32]| {
        let all: Vec<f32> = cache.iter().flat_map(|document| pick(document).to_vec()).collect();
        let shape = [keys.tokens(), options.key_heads * options.head_width];
        Tensor::<2>::from_data(TensorData::new(all, shape), (&device, q.dtype()))
    };
    let (k, v) = (joined(|document| &document.k), joined(|document| &document.v));
    reference::attention(q, k, v, queries, &keys, options)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention;
    use crate::check::{Numbers, close, numbers};
    use tensor::DType;

    /// Two documents read in parts of unequal lengths.
    const PARTS: [[usize; 2]; 4] = [[7, 3], [1, 1], [6, 1], [1, 70]];

    fn random(source: &mut Numbers, tokens: usize, width: usize, dtype: DType) -> Tensor<2> {
        let values: Vec<f32> = (0..tokens * width).map(|_| source.normal() as f32).collect();
        let data = TensorData::new(values, [tokens, width]);
        Tensor::from_data(data, (&Device::flex(), dtype))
    }

    #[test]
    fn parts_give_what_the_whole_gives() {
        let mut source = Numbers(31);
        for (window, dtype) in [(None, DType::F32), (Some(5), DType::F32), (None, DType::F64)] {
            let options = AttentionOptions { window, ..AttentionOptions::causal(4, 2, 8) };
            let mut cache = Vec::new();
            let mut seen: [Vec<[Tensor<2>; 4]>; 2] = [Vec::new(), Vec::new()];
            for lengths in PARTS {
                let spans = Spans::from_lengths(lengths);
                let q = random(&mut source, spans.tokens(), 32, dtype);
                let [k, v] = [(); 2].map(|()| random(&mut source, spans.tokens(), 16, dtype));
                let all = [q.clone(), k.clone(), v.clone()];
                let y = attention_over_cache([q, k, v], None, &spans, &mut cache, &options);
                for (document, rows) in spans.iter().enumerate() {
                    let cut = |x: &Tensor<2>| x.clone().slice_dim(0, rows.clone());
                    let [q, k, v] = all.each_ref().map(cut);
                    seen[document].push([q, k, v, cut(&y)]);
                }
            }
            for document in seen {
                let join = |part: usize| {
                    Tensor::cat(document.iter().map(|parts| parts[part].clone()).collect(), 0)
                };
                let [q, k, v, got] = [0, 1, 2, 3].map(join);
                let spans = Spans::from_lengths([q.dims()[0]]);
                let want = attention(q, k, v, &spans, &spans, &options);
                close("cached", &numbers(got), &numbers(want), 1e-5);
            }
        }
    }

    #[test]
    fn appending_leaves_room() {
        let options = AttentionOptions::causal(1, 1, 2);
        let mut cache = Vec::new();
        let one = Spans::from_lengths([1]);
        let mut moves = 0;
        let mut place = std::ptr::null();
        for _ in 0..1000 {
            let x = Tensor::<2>::from_floats([[1.0, 2.0]], &Device::flex());
            let y =
                attention_over_cache([(); 3].map(|()| x.clone()), None, &one, &mut cache, &options);
            close("alike values", &numbers(y), &[1.0, 2.0], 1e-6);
            moves += usize::from(place != cache[0].k.as_ptr());
            place = cache[0].k.as_ptr();
        }
        assert_eq!(cache[0].tokens(), 1000);
        assert!(moves <= 12, "{moves} moves of the whole cache in 1000 tokens");
    }
}
