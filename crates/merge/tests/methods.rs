//! Every method on values worked out by hand.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as tests do")]

use retune_merge::Result;
use retune_merge::methods::{ALL, Group, Method, Resolved, Scope, Values};

#[derive(Debug)]
struct Held(Vec<f32>);

impl Values for Held {
    fn read(&self, start: usize, out: &mut [f32]) -> Result<()> {
        out.copy_from_slice(&self.0[start..start + out.len()]);
        Ok(())
    }

    fn model(&self) -> String {
        "held".to_owned()
    }
}

/// A merge of one tensor, defaults filled in.
struct Case<'a> {
    method: &'a str,
    shape: Vec<usize>,
    base: Option<Vec<f32>>,
    inputs: Vec<Vec<f32>>,
    parameters: Vec<(&'a str, f64)>,
    weights: Vec<f64>,
    seed: u64,
    tensor: &'a str,
    compat: bool,
}

impl Case<'_> {
    fn run(&self) -> Result<Vec<f32>> {
        let method = Method::find(self.method).unwrap();
        let resolve = |scope: Scope, input: Option<usize>| {
            let mut resolved = Resolved::default();
            for parameter in method.parameters.iter().filter(|p| p.scope == scope) {
                let given = self.parameters.iter().find(|(name, _)| *name == parameter.name);
                let weight = || match (parameter.name, input) {
                    ("weight", Some(i)) => self.weights.get(i).copied(),
                    _ => None,
                };
                let value = given.map(|(_, value)| *value).or_else(weight).or(parameter.default);
                resolved.set(parameter.name, value.unwrap_or(1.0));
            }
            resolved
        };
        let shared = resolve(Scope::Shared, None);
        let own: Vec<Resolved> =
            (0..self.inputs.len()).map(|i| resolve(Scope::Input, Some(i))).collect();
        let base = self.base.clone().map(Held);
        let inputs: Vec<Held> = self.inputs.iter().cloned().map(Held).collect();
        let group = Group {
            name: self.tensor,
            shape: &self.shape,
            base: base.as_ref().map(|base| base as &dyn Values),
            inputs: inputs.iter().map(|input| input as &dyn Values).collect(),
            shared: &shared,
            own: &own,
            seed: self.seed,
            compat: self.compat,
        };
        let mut out = Vec::new();
        method.merge(&group, &mut |values| {
            out.extend_from_slice(values);
            Ok(())
        })?;
        Ok(out)
    }
}

fn case<'a>(method: &'a str, base: Option<&[f32]>, inputs: &[&[f32]]) -> Case<'a> {
    Case {
        method,
        shape: vec![inputs[0].len()],
        base: base.map(<[f32]>::to_vec),
        inputs: inputs.iter().map(|input| input.to_vec()).collect(),
        parameters: Vec::new(),
        weights: Vec::new(),
        seed: 42,
        tensor: "w",
        compat: false,
    }
}

impl<'a> Case<'a> {
    fn with(mut self, name: &'a str, value: f64) -> Self {
        self.parameters.push((name, value));
        self
    }

    fn gives(&self, expected: &[f32]) {
        let found = self.run().unwrap();
        assert_eq!(found.len(), expected.len(), "{}", self.method);
        for (i, (x, y)) in found.iter().zip(expected).enumerate() {
            assert!(
                (x - y).abs() < 1e-6,
                "{} [{i}]: {found:?}, expected {expected:?}",
                self.method
            );
        }
    }
}

const ZERO: Option<&[f32]> = Some(&[0.0; 4]);
/// cos 45°.
const HALF: f32 = std::f32::consts::FRAC_1_SQRT_2;

#[test]
fn there_are_twenty_methods_with_names_of_their_own() {
    let mut names: Vec<&str> = ALL.iter().map(|method| method.name).collect();
    assert_eq!(names.len(), 20);
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), 20);
}

#[test]
fn linear_divides_unless_told_not_to() {
    let mut linear = case("linear", None, &[&[1.0, 2.0], &[3.0, 6.0]]);
    linear.weights = vec![1.0, 3.0];
    linear.gives(&[2.5, 5.0]);
    linear.with("normalize", 0.0).gives(&[10.0, 20.0]);
}

#[test]
fn slerp_walks_the_circle_and_the_line_of_parallel_tensors() {
    case("slerp", Some(&[1.0, 0.0]), &[&[0.0, 1.0]]).with("t", 0.5).gives(&[HALF, HALF]);
    // 30° of 90°: cos 30° of the base, sin 30° of the other, with their own lengths.
    let third = case("slerp", Some(&[2.0, 0.0]), &[&[0.0, 4.0]]).with("t", 1.0 / 3.0);
    third.gives(&[2.0 * 0.75_f32.sqrt(), 4.0 * 0.5]);
    case("slerp", Some(&[1.0, 1.0]), &[&[3.0, 3.0]]).with("t", 0.25).gives(&[1.5, 1.5]);
    case("slerp", Some(&[0.0, 0.0]), &[&[0.0, 0.0]]).with("t", 0.3).gives(&[0.0, 0.0]);
}

#[test]
fn nuslerp_takes_tensors_rows_or_columns() {
    let merge = || {
        let mut case = case("nuslerp", None, &[&[1.0, 0.0, 1.0, 0.0], &[0.0, 1.0, 1.0, 0.0]]);
        case.shape = vec![2, 2];
        case
    };
    // cos = 1/2, 60°: sin 30° / sin 60° of each.
    let whole = 1.0 / 3.0_f32.sqrt();
    merge().gives(&[whole, whole, 2.0 * whole, 0.0]);
    // The second row is the same in both.
    merge().with("nuslerp_flatten", 0.0).gives(&[HALF, HALF, 1.0, 0.0]);
    // First column 45° apart: sin 22.5° / sin 45°. The second is zero in one model: 90°.
    let eighth = (std::f32::consts::PI / 8.0).sin() / HALF;
    let columns = merge().with("nuslerp_flatten", 0.0).with("nuslerp_row_wise", 1.0);
    columns.gives(&[eighth, HALF, 2.0 * eighth, 0.0]);
    // With a base, of the changes.
    let mut changes = case("nuslerp", Some(&[1.0, 1.0]), &[&[2.0, 1.0], &[1.0, 2.0]]);
    changes.gives(&[1.0 + HALF, 1.0 + HALF]);
    changes.weights = vec![1.0, -1.0];
    changes.gives(&[1.0 + HALF, 1.0 + HALF]);
}

#[test]
fn means_on_the_sphere() {
    let two: [&[f32]; 2] = [&[2.0, 0.0], &[0.0, 2.0]];
    case("multislerp", None, &two).gives(&[2.0 * HALF, 2.0 * HALF]);
    case("karcher", None, &two).gives(&[2.0 * HALF, 2.0 * HALF]);
    let based = case("multislerp", Some(&[1.0, 1.0]), &[&[3.0, 1.0], &[1.0, 3.0]]);
    based.gives(&[1.0 + 2.0 * HALF, 1.0 + 2.0 * HALF]);
    for method in ["multislerp", "karcher"] {
        case(method, None, &[&[1.0, -2.0]]).gives(&[1.0, -2.0]);
        case(method, None, &[&[0.0, 0.0], &[0.0, 0.0]]).gives(&[0.0, 0.0]);
    }
    // A zero tensor has no direction, but counts in the mean length.
    case("karcher", None, &[&[0.0, 0.0], &[0.0, 3.0]]).gives(&[0.0, 1.5]);
    let turned = 0.75_f32.sqrt();
    let star: [&[f32]; 3] = [&[1.0, 0.0], &[-0.5, turned], &[-0.5, -turned]];
    let error = case("multislerp", None, &star).run().unwrap_err().to_string();
    assert!(error.contains("'w'") && error.contains("cancel out"), "{error}");
}

#[test]
fn task_arithmetic_adds_weighted_changes() {
    let base = [1.0, 1.0];
    let mut sum = case("task_arithmetic", Some(&base), &[&[2.0, 1.0], &[1.0, 4.0]]);
    sum.weights = vec![0.5, 2.0];
    sum.gives(&[1.5, 7.0]);
    let normalized = Case { parameters: vec![("normalize", 1.0), ("lambda", 5.0)], ..sum };
    normalized.gives(&[2.0, 13.0]);
}

#[test]
fn ties_keeps_the_largest_where_signs_agree() {
    let inputs: [&[f32]; 2] = [&[1.0, -2.0, 3.0, 0.1], &[-1.0, -3.0, 0.2, 4.0]];
    let half = || case("ties", ZERO, &inputs).with("density", 0.5);
    half().gives(&[0.0, -2.5, 3.0, 4.0]);
    half().with("normalize", 0.0).gives(&[0.0, -5.0, 3.0, 4.0]);
    // Signs of the sum: +0 is positive, so the first keeps the positive model's value.
    case("ties", ZERO, &inputs).gives(&[1.0, -2.5, 1.6, 2.05]);
    // At least one value stays, and of equal ones the lower index.
    let equal: [&[f32]; 1] = [&[1.0, -1.0, 1.0, 1.0]];
    case("ties", ZERO, &equal).with("density", 0.1).gives(&[1.0, 0.0, 0.0, 0.0]);
    case("ties", ZERO, &equal).with("density", 0.5).gives(&[1.0, -1.0, 0.0, 0.0]);
    case("ties", ZERO, &equal).with("density", 0.0).gives(&[0.0; 4]);
}

#[test]
fn breadcrumbs_keeps_the_middle_band() {
    let inputs: [&[f32]; 1] = [&[9.0, -0.1, 2.0, -3.0]];
    let band =
        |gamma: f64| case("breadcrumbs", ZERO, &inputs).with("density", 0.5).with("gamma", gamma);
    band(0.25).gives(&[0.0, 0.0, 2.0, -3.0]);
    band(0.0).gives(&[9.0, 0.0, 0.0, -3.0]);
    // Too small for one outlier: the paper keeps the band, mergekit 0.1.4 drops the change.
    band(0.2).gives(&[9.0, 0.0, 0.0, -3.0]);
    let mut reference = band(0.2);
    reference.compat = true;
    reference.gives(&[0.0; 4]);
    // Fewer outliers are dropped where density would not be reached else.
    band(0.9).gives(&[0.0, -0.1, 2.0, 0.0]);
    band(0.25).with("rescale", 1.0).gives(&[0.0, 0.0, 2.0 * 14.1 / 5.0, -3.0 * 14.1 / 5.0]);
    let equal: [&[f32]; 1] = [&[1.0, 1.0, -1.0, 1.0]];
    let equal = case("breadcrumbs", ZERO, &equal).with("density", 0.5).with("gamma", 0.25);
    equal.gives(&[1.0, 1.0, 0.0, 0.0]);
    let agreeing: [&[f32]; 2] = [&[9.0, -0.1, 2.0, -3.0], &[9.0, -0.1, 2.0, 1.0]];
    let with_signs = case("breadcrumbs_ties", ZERO, &agreeing).with("density", 0.5);
    with_signs.with("gamma", 0.25).gives(&[0.0, 0.0, 4.0, -3.0]);
}

/// A long change whose magnitudes all differ.
fn long() -> Vec<f32> {
    (0..100_000_u32).map(|i| 1.0 + (i.wrapping_mul(7919) % 100_003) as f32 * 1e-5).collect()
}

#[test]
fn dare_keeps_its_density_and_the_sum_of_magnitudes() {
    let change = long();
    let base = vec![0.0; change.len()];
    let merge = || case("dare_linear", Some(&base), &[&change]).with("density", 0.3);
    let plain = merge().with("rescale", 0.0).run().unwrap();
    let kept = plain.iter().filter(|x| **x != 0.0).count();
    assert!((29_300..30_700).contains(&kept), "{kept}");
    assert!(plain.iter().zip(&change).all(|(x, y)| *x == 0.0 || x == y));
    let rescaled = merge().run().unwrap();
    let sum = |values: &[f32]| values.iter().map(|x| f64::from(x.abs())).sum::<f64>();
    assert!((sum(&rescaled) / sum(&change) - 1.0).abs() < 1e-5);
    // The draws depend on seed, tensor and input, and on nothing else.
    assert_eq!(rescaled, merge().run().unwrap());
    assert_ne!(rescaled, Case { seed: 43, ..merge() }.run().unwrap());
    assert_ne!(rescaled, Case { tensor: "v", ..merge() }.run().unwrap());
    let twice = case("dare_linear", Some(&base), &[&change, &change]).with("density", 0.3);
    let both = twice.with("rescale", 0.0).run().unwrap();
    let alone = both.iter().zip(&change).filter(|(x, y)| x == y).count();
    assert!((41_000..43_000).contains(&alone), "2 · 0.3 · 0.7 of 100,000, not {alone}");
    for method in ["dare_linear", "dare_ties", "della", "della_linear"] {
        case(method, Some(&[1.0, 2.0]), &[&[2.0, 4.0]]).gives(&[2.0, 4.0]);
    }
}

#[test]
fn della_keeps_the_largest_of_a_row_most_often() {
    let rows = 20_000;
    let change: Vec<f32> = (0..rows).flat_map(|_| [0.5, -0.1, 1.0]).collect();
    let base = vec![0.0; change.len()];
    let mut merge = case("della_linear", Some(&base), &[&change]).with("density", 0.5);
    merge.shape = vec![rows, 3];
    merge.parameters.extend([("epsilon", 0.4), ("rescale", 0.0)]);
    let out = merge.run().unwrap();
    let share = |column: usize| {
        out.iter().skip(column).step_by(3).filter(|x| **x != 0.0).count() as f64 / rows as f64
    };
    for (column, expected) in [(0, 0.5), (1, 0.1), (2, 0.9)] {
        assert!((share(column) - expected).abs() < 0.015, "{column}: {}", share(column));
    }
    let method = Method::find("della").unwrap();
    let mut own = Resolved::default();
    for (name, value) in [("density", 0.9), ("epsilon", 0.15), ("weight", 1.0)] {
        own.set(name, value);
    }
    assert!(method.check(&Resolved::default(), &[own]).unwrap().contains("0.9 ± epsilon 0.15"));
}

#[test]
fn sce_selects_weighs_and_erases() {
    let inputs: [&[f32]; 2] = [&[1.0, 0.0, 4.0, 0.0], &[1.0, 2.0, -4.0, 0.0]];
    // Two values vary; half of them is the third. The sum is +0, so the positive change stays.
    case("sce", ZERO, &inputs).with("select_topk", 0.5).gives(&[0.0, 0.0, 4.0, 0.0]);
    // Mean squares 17/4 and 21/4; every value is the mean of those that agree.
    case("sce", ZERO, &inputs).gives(&[1.0, 2.0, 4.0, 0.0]);
    let different: [&[f32]; 2] = [&[1.0, 0.0], &[3.0, 0.0]];
    // Weights 1/10 and 9/10.
    case("sce", Some(&[0.0; 2]), &different).gives(&[2.8, 0.0]);
    let tiny: [&[f32]; 2] = [&[1e-4, 0.0], &[3e-4, 0.0]];
    // Too little energy to weigh by: equal weights.
    let found = case("sce", Some(&[0.0; 2]), &tiny).run().unwrap();
    assert!((found[0] - 2e-4).abs() < 1e-9, "{found:?}");
    case("sce", ZERO, &inputs).with("select_topk", 0.0).gives(&[0.0; 4]);
}

#[test]
fn ram_adds_what_is_unique_and_averages_what_is_shared() {
    let inputs: [&[f32]; 2] = [&[1.0, 0.0, 3.0, 1e-6], &[0.0, 2.0, 5.0, 0.0]];
    case("ram", ZERO, &inputs).gives(&[1.0, 2.0, 4.0, 0.0]);
    // Shared and unique are one each: 1 + 0.1 · min(1, 0.2).
    case("ramplus_tl", ZERO, &inputs).gives(&[1.02, 2.04, 4.0, 0.0]);
    case("ramplus_tl", ZERO, &inputs)
        .with("r", 1.0)
        .with("alpha", 9.0)
        .gives(&[2.0, 4.0, 4.0, 0.0]);
}

#[test]
fn model_stock_goes_by_the_angle_of_the_changes() {
    let inputs: [&[f32]; 2] = [&[1.0, 0.0, 1.0, 0.0], &[1.0, 0.0, 0.0, 1.0]];
    // cos 1/2: t = 2/3 of the mean.
    let third = 1.0 / 3.0;
    let mut stock = case("model_stock", ZERO, &inputs);
    stock.shape = vec![2, 2];
    stock.gives(&[2.0 * third, 0.0, third, third]);
    // Row by row: one direction, then a right angle.
    stock.with("filter_wise", 1.0).gives(&[1.0, 0.0, 0.0, 0.0]);
    let opposed: [&[f32]; 2] = [&[1.0, 0.0], &[-1.0, 0.0]];
    case("model_stock", Some(&[0.0; 2]), &opposed).gives(&[0.0, 0.0]);
}

#[test]
fn nearswap_moves_by_at_most_t() {
    let near = case("nearswap", Some(&[0.0, 1.0, 2.0]), &[&[0.004, 1.5, 2.0]]).with("t", 0.005);
    near.gives(&[0.004, 1.005, 2.0]);
}

#[test]
fn arcee_fusion_takes_over_outliers_of_importance() {
    let base = [0.0; 8];
    // One row, so importance grows with the change: quartiles at .2, .4, .6 set the bar at 1.0.
    let even = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8];
    case("arcee_fusion", Some(&base), &[&even]).gives(&base);
    let mut outlier = even;
    outlier[7] = 5.0;
    let mut expected = base;
    expected[7] = 5.0;
    case("arcee_fusion", Some(&base), &[&outlier]).gives(&expected);
    // Three of four importances are zero, and zero reaches a bar of zero.
    let mut rows = case("arcee_fusion", ZERO, &[&[0.0, 0.0, 2.0, 0.0]]);
    rows.shape = vec![2, 2];
    rows.gives(&[0.0, 0.0, 2.0, 0.0]);
}

#[test]
fn passthrough_scales() {
    case("passthrough", None, &[&[1.0, -2.0]]).with("scale", 0.5).gives(&[0.5, -1.0]);
}

#[test]
fn values_that_are_no_numbers_are_named() {
    for bad in [f32::NAN, f32::INFINITY] {
        let error = case("linear", None, &[&[1.0, 2.0], &[0.0, bad]]).run().unwrap_err();
        let message = error.to_string();
        assert!(message.contains("tensor 'w' of held: value 1"), "{message}");
    }
}

/// Chunks must not show: a tensor longer than one gives what its parts give.
#[test]
fn chunks_leave_no_seam() {
    let n = 200_001;
    let wave = |f: f32| -> Vec<f32> { (0..n).map(|i| (i as f32 * f).sin()).collect() };
    let (base, a, b) = (wave(0.001), wave(0.0017), wave(0.0023));
    let found = case("ties", Some(&base), &[&a, &b]).with("density", 0.4).run().unwrap();
    let top = |x: &[f32]| -> Vec<f32> {
        let mut changes: Vec<f32> = x.iter().zip(&base).map(|(x, b)| x - b).collect();
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|i, j| changes[*j].abs().total_cmp(&changes[*i].abs()).then(i.cmp(j)));
        for i in &order[(0.4 * n as f64) as usize..] {
            changes[*i] = 0.0;
        }
        changes
    };
    let (a, b) = (top(&a), top(&b));
    for i in 0..n {
        let positive = a[i] + b[i] >= 0.0;
        let agree = |x: f32| x != 0.0 && (x > 0.0) == positive;
        let chosen: Vec<f32> = [a[i], b[i]].into_iter().filter(|x| agree(*x)).collect();
        let mean = chosen.iter().sum::<f32>() / chosen.len().max(1) as f32;
        assert!((found[i] - base[i] - mean).abs() < 1e-6, "{i}");
    }
}
