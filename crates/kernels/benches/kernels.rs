//! Kernels against their reference and against the machine's measured peak.
//!
//! `cargo xtask bench` runs this and lays its lines out as a table. A line is made of fields between
//! tabs: operation, shape, form, milliseconds, speed, its unit, percent of the matrix peak, times
//! the reference's speed; `-` where a field has no meaning. Shapes are those of SmolLM2-135M on
//! four documents of 256 tokens. A share above 100 % of the `f32` peak is possible where `f32`
//! products run on bf16 tiles. Arguments choose parts: `peak`, `products`, `few`, `attention`,
//! `head`, `element`, `optimizer`.

#![expect(clippy::print_stdout, reason = "a table for people")]
#![expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use retune_files::ggml::BlockType;
use retune_kernels as kernels;
use retune_kernels::matrix::{
    Arithmetic, Form, PackedMatrix, multiply_in_registers, product, product_nt, product_tn,
};
use retune_kernels::{Activation, AttentionOptions, HeadOptions, Rotation, Spans, Table};
use tensor::{Device, Tensor, TensorData};

const TOKENS: usize = 1024;
const DOCUMENT: usize = 256;
const WIDTH: usize = 576;
const INNER: usize = 1536;
const WORDS: usize = 49_152;
const RANK: usize = 8;
/// `(outputs, inputs)` of the linear layers, and of the head.
const SHAPES: [(usize, usize); 5] =
    [(WIDTH, WIDTH), (192, WIDTH), (INNER, WIDTH), (WIDTH, INNER), (WORDS, WIDTH)];

fn main() {
    // Cargo passes `--bench`.
    let parts: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|wanted| wanted == part);
    let peaks = [Arithmetic::F32, Arithmetic::Bf16].map(peak);
    let threads = rayon::current_num_threads();
    for (form, peak) in ["f32", "bf16"].into_iter().zip(peaks) {
        line("peak", &format!("{threads} threads"), form, 0.0, Some((peak, "GFLOP/s")), 100.0, 0.0);
    }
    for (part, run) in [
        ("products", &(|| products(peaks)) as &dyn Fn()),
        ("few", &few_rows),
        ("attention", &|| attention(peaks[0])),
        ("head", &|| head(peaks)),
        ("element", &element_wise),
        ("optimizer", &optimizer),
    ] {
        if wanted(part) {
            run();
        }
    }
}

/// Prints one line; what is 0 has no meaning.
fn line(
    name: &str,
    shape: &str,
    form: &str,
    seconds: f64,
    speed: Option<(f64, &str)>,
    share: f64,
    times: f64,
) {
    let field = |value: f64, digits: usize| {
        if value > 0.0 { format!("{value:.digits$}") } else { "-".to_owned() }
    };
    let (speed, unit) = speed.map_or(("-".to_owned(), "-"), |(x, unit)| (field(x, 1), unit));
    let (milliseconds, share, times) = (field(1e3 * seconds, 3), field(share, 0), field(times, 1));
    println!("{name}\t{shape}\t{form}\t{milliseconds}\t{speed}\t{unit}\t{share}\t{times}");
}

fn products([single, half]: [f64; 2]) {
    for (outputs, inputs) in SHAPES {
        // The head is multiplied in chunks of tokens.
        let n = if outputs == WORDS { DOCUMENT } else { TOKENS };
        let shape = format!("{n} x {inputs} -> {outputs}");
        for form in [Form::F32, Form::Bf16, Form::Blocks(BlockType::Q4_1)] {
            for (arithmetic, peak) in [(Arithmetic::F32, single), (Arithmetic::Bf16, half)] {
                let weight = matrix(outputs, inputs, form).with_arithmetic(arithmetic);
                let (x, dy) = (numbers(n * inputs), numbers(n * outputs));
                let (a, b) = (numbers(RANK * inputs), numbers(outputs * RANK));
                let (mut y, mut dx) = (vec![0.0; n * outputs], vec![0.0; n * inputs]);
                let (mut u, mut du) = (vec![0.0; n * RANK], vec![0.0; n * RANK]);
                let (mut da, mut db) = (vec![0.0; RANK * inputs], vec![0.0; outputs * RANK]);
                let dense = weight.to_f32();
                let forward = time(|| weight.multiply(&x, n, &mut y, None));
                check(&dense, &x, &y, inputs, outputs);
                let backward = time(|| weight.multiply_transposed(&dy, n, &mut dx));
                let low_rank = time(|| {
                    product_nt(arithmetic, [n, inputs, RANK], &x, &a, None, &mut u);
                    weight.multiply_low_rank(&x, (&u, &b, RANK), n, &mut y, None);
                });
                let low_rank_backward = time(|| {
                    product(arithmetic, [n, outputs, RANK], &dy, &b, &mut du);
                    weight.multiply_transposed_low_rank(&dy, (&du, &a, RANK), n, &mut dx);
                    product_tn(arithmetic, [RANK, n, inputs], &du, &x, &mut da);
                    product_tn(arithmetic, [outputs, n, RANK], &dy, &u, &mut db);
                });
                let kind = format!("{} in {arithmetic:?}", name(form)).to_lowercase();
                let operations = 2.0 * (n * outputs * inputs) as f64;
                for (what, seconds) in [
                    ("frozen", forward),
                    ("frozen, backward", backward),
                    ("low rank", low_rank),
                    ("low rank, backward", low_rank_backward),
                ] {
                    let speed = operations / seconds / 1e9;
                    let share = 100.0 * speed / peak;
                    line(what, &shape, &kind, seconds, Some((speed, "GFLOP/s")), share, 0.0);
                }
            }
        }
        for (arithmetic, peak) in [(Arithmetic::F32, single), (Arithmetic::Bf16, half)] {
            let (dy, x) = (numbers(n * outputs), numbers(n * inputs));
            let mut out = vec![0.0; outputs * inputs];
            let seconds = time(|| product_tn(arithmetic, [outputs, n, inputs], &dy, &x, &mut out));
            let speed = 2.0 * (n * outputs * inputs) as f64 / seconds / 1e9;
            let form = format!("{arithmetic:?}").to_lowercase();
            let share = 100.0 * speed / peak;
            let speed = Some((speed, "GFLOP/s"));
            line("weight gradient", &shape, &form, seconds, speed, share, 0.0);
        }
    }
}

/// Decoding: one to four rows, bound by reading the matrix.
fn few_rows() {
    for (outputs, inputs) in SHAPES {
        for form in [Form::F32, Form::Blocks(BlockType::Q8_0), Form::Blocks(BlockType::Q4_1)] {
            let weight = matrix(outputs, inputs, form);
            for n in [1, 4] {
                let (x, mut y) = (numbers(n * inputs), vec![0.0; n * outputs]);
                let seconds = time(|| weight.multiply(&x, n, &mut y, None));
                let speed = Some((weight.bytes() as f64 / seconds / 1e9, "GB/s"));
                let shape = format!("{n} x {inputs} -> {outputs}");
                line("few rows", &shape, name(form), seconds, speed, 0.0, 0.0);
            }
        }
    }
}

fn attention(peak: f64) {
    let options = AttentionOptions::causal(9, 3, 64);
    for document in [128, 256, 512, 1024, 2048] {
        let tokens = document.max(TOKENS);
        let spans = Spans::from_lengths(vec![document; tokens / document]);
        let inputs = [WIDTH, 192, 192].map(|width| leaf(tokens, width));
        let run = |fast: bool| {
            let [q, k, v] = inputs.clone();
            let y = if fast {
                kernels::attention(q, k, v, &spans, &spans, &options)
            } else {
                kernels::attention::reference::attention(q, k, v, &spans, &spans, &options)
            };
            black_box(y.sum().backward());
        };
        let fast = time(|| run(true));
        let slow = if document <= 512 { time(|| run(false)) } else { 0.0 };
        // Two products forward and five backward over half of all pairs.
        let operations = 7.0 * (tokens * document) as f64 * (9 * 64) as f64;
        let speed = operations / fast / 1e9;
        let shape = format!("{} x {document}", tokens / document);
        let share = 100.0 * speed / peak;
        let speed = Some((speed, "GFLOP/s"));
        line("attention, both ways", &shape, "f32", fast, speed, share, slow / fast);
    }
}

fn head([single, half]: [f64; 2]) {
    let labels: Vec<Option<u32>> = (0..DOCUMENT as u32).map(|i| Some(i * 190)).collect();
    let operations = (DOCUMENT * WORDS * WIDTH) as f64;
    let x = leaf(DOCUMENT, WIDTH);
    let options = HeadOptions::default();
    let shape = format!("{DOCUMENT} x {WIDTH} -> {WORDS}");
    let mut slow = 0.0;
    for (arithmetic, peak) in [(Arithmetic::F32, single), (Arithmetic::Bf16, half)] {
        let weight = Arc::new(matrix(WORDS, WIDTH, Form::F32).with_arithmetic(arithmetic));
        let table = Table::Frozen(weight);
        let run = |table: &Table| {
            let losses = kernels::token_losses(x.clone(), table, &labels, &options);
            black_box(losses.sum().backward());
        };
        let fast = time(|| run(&table));
        if arithmetic == Arithmetic::F32 {
            slow = time(|| {
                let losses = kernels::head::reference(x.clone(), &table, &labels, &options);
                black_box(losses.sum().backward());
            });
        }
        let form = format!("{arithmetic:?}").to_lowercase();
        let speed = 4.0 * operations / fast / 1e9;
        let share = 100.0 * speed / peak;
        let speed = Some((speed, "GFLOP/s"));
        line("cross-entropy, frozen head", &shape, &form, fast, speed, share, slow / fast);
    }
    let weight = Tensor::<2>::from_data(
        TensorData::new(numbers(WORDS * WIDTH), [WORDS, WIDTH]),
        &Device::flex().autodiff(),
    )
    .require_grad();
    let table = Table::Trainable(weight);
    let fast = time(|| {
        let losses = kernels::token_losses(x.clone(), &table, &labels, &options);
        black_box(losses.sum().backward());
    });
    let slow = time(|| {
        let losses = kernels::head::reference(x.clone(), &table, &labels, &options);
        black_box(losses.sum().backward());
    });
    let speed = 8.0 * operations / fast / 1e9;
    let share = 100.0 * speed / single;
    let speed = Some((speed, "GFLOP/s"));
    line("cross-entropy, trainable head", &shape, "f32", fast, speed, share, slow / fast);
}

fn element_wise() {
    let vector = || {
        Tensor::<1>::from_data(TensorData::new(numbers(WIDTH), [WIDTH]), &Device::flex().autodiff())
            .require_grad()
    };
    let (x, gain) = (leaf(TOKENS, WIDTH), vector());
    let wide = [leaf(TOKENS, INNER), leaf(TOKENS, INNER)];
    let frequencies: Vec<f64> = (0..32).map(|i| 1e5_f64.powf(-f64::from(i) / 32.0)).collect();
    let positions: Vec<usize> = (0..TOKENS).map(|i| i % DOCUMENT).collect();
    let rotation = Rotation::new(&positions, &frequencies, 1.0);
    let silu = Activation::Silu;
    let both = |name: &str, width: usize, passes: usize, run: &dyn Fn(bool) -> Tensor<2>| {
        let [slow, fast] = [false, true].map(|fast| time(|| drop(run(fast).sum().backward())));
        let bytes = (4 * TOKENS * width * passes) as f64;
        let speed = Some((bytes / fast / 1e9, "GB/s"));
        let shape = format!("{TOKENS} x {width}");
        line(name, &shape, "f32", fast, speed, 0.0, slow / fast);
    };
    // Passes over memory: reads and writes of forward, of the sum and of backward.
    both("RMS norm, both ways", WIDTH, 6, &|fast| {
        let (x, gain) = (x.clone(), gain.clone());
        if fast {
            kernels::rms_norm(x, gain, 1e-5)
        } else {
            kernels::rms_norm::reference(x, gain, 1e-5)
        }
    });
    both("layer norm, both ways", WIDTH, 6, &|fast| {
        let (x, gain) = (x.clone(), gain.clone());
        if fast {
            kernels::layer_norm(x, gain, None, 1e-5)
        } else {
            kernels::layer_norm::reference(x, gain, None, 1e-5)
        }
    });
    both("rotary, both ways", WIDTH, 5, &|fast| {
        if fast {
            kernels::rotary(x.clone(), 9, &rotation)
        } else {
            kernels::rotary::reference(x.clone(), 9, &rotation)
        }
    });
    both("SwiGLU, both ways", INNER, 9, &|fast| {
        let [gate, up] = wide.clone();
        if fast {
            kernels::gated(gate, up, silu)
        } else {
            kernels::gated::reference(gate, up, silu)
        }
    });
}

fn optimizer() {
    let count = 1 << 22;
    let gradient = numbers(count);
    let (mut value, mut m, mut v) = (numbers(count), vec![0.0; count], vec![0.0; count]);
    let step = kernels::AdamwStep {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
        step: 1,
        gradient_scale: 1.0,
    };
    let seconds = time(|| kernels::adamw(&step, &mut value, &gradient, &mut m, &mut v));
    let speed = Some(((28 * count) as f64 / seconds / 1e9, "GB/s"));
    line("AdamW", &format!("{count}"), "f32", seconds, speed, 0.0, 0.0);
}

fn name(form: Form) -> &'static str {
    match form {
        Form::F32 => "f32",
        Form::Bf16 => "bf16",
        Form::Blocks(kind) => kind.name(),
    }
}

/// Operations a second of all threads, in GFLOP/s.
fn peak(arithmetic: Arithmetic) -> f64 {
    let rounds = 1_000_000;
    let operations = multiply_in_registers(arithmetic, rounds);
    operations as f64 / time(|| _ = multiply_in_registers(arithmetic, rounds)) / 1e9
}

/// The shortest of several runs, in seconds.
fn time(mut work: impl FnMut()) -> f64 {
    let (mut best, begin) = (f64::INFINITY, Instant::now());
    let mut runs = 0;
    while runs < 3 || (begin.elapsed() < Duration::from_millis(200) && runs < 200) {
        let start = Instant::now();
        work();
        black_box(());
        best = best.min(start.elapsed().as_secs_f64());
        runs += 1;
    }
    best
}

fn matrix(rows: usize, columns: usize, form: Form) -> PackedMatrix {
    match PackedMatrix::from_f32(rows, columns, numbers(rows * columns), form) {
        Ok(matrix) => matrix,
        Err(error) => unreachable!("the shapes are whole blocks: {error}"),
    }
}

fn leaf(rows: usize, columns: usize) -> Tensor<2> {
    let data = TensorData::new(numbers(rows * columns), [rows, columns]);
    Tensor::from_data(data, &Device::flex().autodiff()).require_grad()
}

/// Numbers in `-0.5..0.5` (a linear congruence; only their spread matters).
fn numbers(count: usize) -> Vec<f32> {
    let mut state = 1_u64;
    let next = |_| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1_u64 << 24) as f32 - 0.5
    };
    (0..count).map(next).collect()
}

/// Panics where a product is plainly wrong: a speed of wrong numbers is none.
fn check(dense: &[f32], x: &[f32], y: &[f32], inputs: usize, outputs: usize) {
    for output in [0, outputs / 2, outputs - 1] {
        let row = &dense[output * inputs..][..inputs];
        let want: f64 = x.iter().zip(row).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
        let got = f64::from(y[output]);
        assert!((got - want).abs() < 0.1, "output {output}: got {got}, expected {want}");
    }
}
