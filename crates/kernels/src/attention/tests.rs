use super::*;
use crate::check::{Input, Numbers, agree, close, differences, numbers, run};
use tensor::{DType, Device};

struct Case {
    options: AttentionOptions,
    queries: Spans,
    keys: Spans,
    inputs: [Input; 3],
}

fn options(source: &mut Numbers) -> AttentionOptions {
    let key_heads = source.between(1, 3);
    AttentionOptions {
        heads: key_heads * source.between(1, 3),
        key_heads,
        head_width: source.pick(&[1, 3, 8, 16, 20]),
        scale: 0.3,
        causal: source.chance(),
        window: source.pick(&[None, None, Some(1), Some(3), Some(17)]),
        soft_cap: source.pick(&[None, None, Some(2.0)]),
        prefix: source.pick(&[0, 0, 1, 4]),
    }
}

fn case(source: &mut Numbers, documents: usize, longest: usize) -> Case {
    let options = options(source);
    let lengths: Vec<_> = (0..documents).map(|_| source.between(0, longest)).collect();
    let more = source.pick(&[0, 0, 1, 5]);
    let queries = Spans::from_lengths(lengths.iter().copied());
    let keys = Spans::from_lengths(lengths.iter().map(|length| {
        if source.between(0, 9) == 0 { length / 2 } else { length + more + options.prefix }
    }));
    let key_width = options.key_heads * options.head_width;
    let inputs = [
        source.matrix(queries.tokens(), options.heads * options.head_width),
        source.matrix(keys.tokens(), key_width),
        source.matrix(keys.tokens(), key_width),
    ];
    Case { options, queries, keys, inputs }
}

impl Case {
    fn fast(&self, x: &[Tensor<2>]) -> Tensor<2> {
        let [q, k, v] = [0, 1, 2].map(|index| x[index].clone());
        attention(q, k, v, &self.queries, &self.keys, &self.options)
    }

    fn reference(&self, x: &[Tensor<2>]) -> Tensor<2> {
        let [q, k, v] = [0, 1, 2].map(|index| x[index].clone());
        reference::attention(q, k, v, &self.queries, &self.keys, &self.options)
    }
}

#[test]
fn fast_is_the_reference() {
    let mut source = Numbers(17);
    for index in 0..200 {
        let longest = source.pick(&[3, 20, 80]);
        let documents = source.between(1, 4);
        let mut case = case(&mut source, documents, longest);
        // Where no query has a key the output is a constant, which has no gradient.
        let sees = |case: &Case| {
            let mut documents = case.queries.iter().zip(case.keys.iter());
            documents.any(|(queries, keys)| !queries.is_empty() && !keys.is_empty())
        };
        while !sees(&case) {
            case = self::case(&mut source, documents, longest);
        }
        for input in &mut case.inputs {
            input.tracked = source.between(0, 3) > 0;
        }
        // With constants alone there is no gradient to compare.
        case.inputs[index % 3].tracked = true;
        agree(
            &format!("attention {index} {:?} {:?} {:?}", case.options, case.queries, case.keys),
            |x| case.fast(x),
            |x| case.reference(x),
            &case.inputs,
            5e-6,
        );
    }
}

#[test]
fn reference_follows_its_differences() {
    let mut source = Numbers(18);
    for _ in 0..12 {
        let mut case = case(&mut source, 2, 4);
        while case.queries.tokens() == 0 || case.keys.tokens() == 0 || case.options.head_width > 8 {
            case = self::case(&mut source, 2, 4);
        }
        differences("attention", |x| case.reference(x), &case.inputs);
    }
}

#[test]
fn packed_documents_are_separate_documents() {
    let mut source = Numbers(19);
    for _ in 0..20 {
        let packed = case(&mut source, 4, 70);
        if packed.queries.tokens() == 0 || packed.keys.tokens() == 0 {
            continue;
        }
        let together = run(|x| packed.fast(x), &packed.inputs, DType::F32);
        for (queries, keys) in packed.queries.iter().zip(packed.keys.iter()) {
            if queries.is_empty() || keys.is_empty() {
                continue;
            }
            let rows = [&queries, &keys, &keys];
            let mut index = 0;
            let inputs = packed.inputs.clone().map(|mut input| {
                let width = input.shape[1];
                let rows = rows[index].clone();
                index += 1;
                input.values = input.values[rows.start * width..rows.end * width].to_vec();
                input.shape[0] = rows.len();
                input
            });
            let alone = Case {
                options: packed.options.clone(),
                queries: Spans::from_lengths([queries.len()]),
                keys: Spans::from_lengths([keys.len()]),
                inputs,
            };
            let width = alone.inputs[0].shape[1];
            let (output, _) = run(|x| alone.fast(x), &alone.inputs, DType::F32);
            assert_eq!(output, together.0[queries.start * width..queries.end * width]);
        }
    }
}

#[test]
fn threads_do_not_change_bits() {
    let mut source = Numbers(20);
    let case = case(&mut source, 5, 150);
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run(|x| case.fast(x), &case.inputs, DType::F32))
    };
    assert_eq!(on(1), on(2));
    assert_eq!(on(1), on(5));
}

#[test]
fn sight_is_what_the_rule_says() {
    let options = AttentionOptions::causal(1, 1, 1);
    // A cache of 3 ahead of 2 queries.
    assert_eq!([options.visible(0, 2, 5), options.visible(1, 2, 5)], [0..4, 0..5]);
    // More queries than keys: the first ones see nothing.
    assert_eq!([0, 1, 2].map(|t| options.visible(t, 3, 1)), [0..0, 0..0, 0..1]);
    let window = AttentionOptions { window: Some(2), ..options.clone() };
    assert_eq!([0, 1, 2].map(|t| window.visible(t, 3, 3)), [0..1, 0..2, 1..3]);
    let around = AttentionOptions { causal: false, ..window };
    assert_eq!([0, 1, 2].map(|t| around.visible(t, 3, 3)), [0..2, 0..3, 1..3]);
    let all = AttentionOptions { causal: false, ..options };
    assert_eq!(all.visible(0, 3, 2), 0..2);
}

#[test]
fn scores_weigh_values() {
    // One head of one number: the second query sees scores ln 1 and ln 3 of values 8 and 4.
    let device = Device::flex();
    let q = Tensor::<2>::from_floats([[7.0], [1.0]], &device);
    let k = Tensor::<2>::from_floats([[0.0], [3.0f32.ln()]], &device);
    let v = Tensor::<2>::from_floats([[8.0], [4.0]], &device);
    let spans = Spans::from_lengths([2]);
    let y = attention(q, k, v, &spans, &spans, &AttentionOptions::causal(1, 1, 1));
    close("attention", &numbers(y), &[8.0, 5.0], 1e-6);
}

#[test]
fn a_query_that_sees_nothing_gives_zeros() {
    let device = Device::flex();
    let x = |tokens: usize| Tensor::<2>::ones([tokens, 2], &device);
    let options = AttentionOptions::causal(1, 1, 2);
    let [queries, keys] = [[3, 1], [1, 0]].map(Spans::from_lengths);
    let y = attention(x(4), x(1), x(1), &queries, &keys, &options);
    assert_eq!(numbers(y), [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]);
}
