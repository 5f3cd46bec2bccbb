//! Curves as SVG: readable on light and dark pages, and without any font or script of its own.

use std::fmt::Write;

/// A chart of curves over one common horizontal axis.
#[derive(Clone, Debug, PartialEq)]
pub struct Plot {
    /// What the chart shows.
    pub title: String,
    /// What is counted along the bottom, with its unit.
    pub x_label: String,
    /// What is measured upwards, with its unit.
    pub y_label: String,
    /// How the values are spaced upwards.
    pub scale: Scale,
    /// The curves; up to eight are told apart by colour.
    pub series: Vec<Series>,
}

/// How an axis is spaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Evenly.
    Linear,
    /// By factors of ten; values of 0 and below are left out.
    Log,
}

/// One curve.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// The points `(x, y)`, by increasing `x`. One whose `y` is not finite is marked at the top.
    pub points: Vec<(f64, f64)>,
    /// Whether to draw the running mean as the curve and the points faintly behind it.
    pub smooth: bool,
}

pub(super) const WIDTH: f64 = 760.0;
pub(super) const HEIGHT: f64 = 388.0;
/// Height of one row of the legend.
const ROW: f64 = 18.0;
pub(super) const LEFT: f64 = 64.0;
pub(super) const RIGHT: f64 = 736.0;
pub(super) const TOP: f64 = 84.0;
pub(super) const BOTTOM: f64 = 340.0;
/// Average width of a character of the 12-pixel sans-serif text, a little generously.
pub(super) const CHAR: f64 = 6.7;

/// Beyond these, spans and steps would no longer be finite numbers above 0.
const HUGE: f64 = 1e300;
const TINY: f64 = 1e-300;

/// Below this a running mean shows nothing the points do not.
const MIN_SMOOTHED: usize = 40;
/// Up to this many points each gets a dot.
const MAX_DOTS: usize = 40;

/// Plain colours, repeated for dark pages: many viewers know no CSS variables.
pub(super) const STYLE: &str = "\
svg{font:12px system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}\
.title{font-size:15px;font-weight:600}\
.line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}\
.raw{stroke-width:1;opacity:.35}.dot{fill:currentColor}.bad{stroke-width:1.5;fill:none}\
.page{fill:#fff}.ink{fill:#1f2328}.soft{fill:#59636e}\
.grid{stroke:#e4e8ec}.axis{stroke:#59636e}.bad{stroke:#c4320a}\
.c0{color:#0b67b2}.c1{color:#c2570c}.c2{color:#0f7b57}.c3{color:#a23b7a}\
.c4{color:#6b5bd2}.c5{color:#8a6d00}.c6{color:#1f8aa5}.c7{color:#6e6e6e}\
@media(prefers-color-scheme:dark){\
.page{fill:#15181c}.ink{fill:#e6e9ed}.soft{fill:#9aa4af}\
.grid{stroke:#2c3238}.axis{stroke:#9aa4af}.bad{stroke:#ff8a5c}\
.c0{color:#5aaef5}.c1{color:#f59e4c}.c2{color:#45c794}.c3{color:#ec8fc6}\
.c4{color:#a79bf7}.c5{color:#d9b93b}.c6{color:#5ec9e0}.c7{color:#b0b0b0}}";

/// Draws a chart; the result is one self-contained SVG file.
///
/// Long curves are thinned to the lowest and highest value per pixel, so that the file stays
/// small and no spike is lost.
pub fn svg(plot: &Plot) -> String {
    let drawn: Vec<_> = plot.series.iter().map(|series| Drawn::of(series, plot.scale)).collect();
    let all = || drawn.iter().flat_map(|d| d.raw.iter().flatten());
    let xs = extent(plot.series.iter().flat_map(|s| &s.points).map(|p| p.0));
    let ys = extent(all().map(|p| p.1));
    let x_axis = Axis::linear(xs, (LEFT, RIGHT), false);
    let y_axis = match plot.scale {
        Scale::Linear => Axis::linear(ys, (BOTTOM, TOP), true),
        Scale::Log => Axis::log(ys, (BOTTOM, TOP)),
    };

    let mut legend = String::new();
    let num_rows = write_legend(&mut legend, plot, &drawn);
    let shift = (num_rows.max(1) - 1) as f64 * ROW;
    let height = HEIGHT + shift;

    let mut out = String::new();
    let title = escape(&plot.title);
    let _ = write!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         width=\"{WIDTH}\" height=\"{height}\" role=\"img\" aria-label=\"{title}\">\n\
         <title>{title}</title>\n<style>{STYLE}</style>\n\
         <rect class=\"page\" width=\"{WIDTH}\" height=\"{height}\" rx=\"6\"/>\n"
    );
    text(&mut out, "ink title", LEFT - 40.0, 26.0, "start", &plot.title);
    out.push_str(&legend);
    let _ = writeln!(out, "<g transform=\"translate(0 {shift})\">");
    text(&mut out, "soft", LEFT - 40.0, TOP - 14.0, "start", &plot.y_label);
    text(&mut out, "soft", RIGHT, HEIGHT - 10.0, "end", &plot.x_label);
    axes(&mut out, &x_axis, &y_axis);
    for (index, curve) in drawn.iter().enumerate() {
        curve.draw(&mut out, index, &x_axis, &y_axis);
    }
    if all().next().is_none() {
        text(&mut out, "soft", f64::midpoint(LEFT, RIGHT), 200.0, "middle", "no values");
    }
    out.push_str("</g>\n</svg>\n");
    out
}

/// Writes each curve's name and the value it ends at; returns how many rows that takes.
fn write_legend(out: &mut String, plot: &Plot, drawn: &[Drawn]) -> usize {
    let start = LEFT - 40.0;
    let (mut x, mut num_rows) = (start, 1);
    for (index, (series, curve)) in plot.series.iter().zip(drawn).enumerate() {
        let entry = match curve.last() {
            Some(last) => format!("{} {}", series.name, short(last)),
            None => series.name.clone(),
        };
        let width = 26.0 + entry.chars().count() as f64 * CHAR;
        if x + width > RIGHT && x > start {
            x = start;
            num_rows += 1;
        }
        let y = 46.0 + (num_rows - 1) as f64 * ROW;
        let _ =
            writeln!(out, "<path class=\"line {}\" d=\"M{x:.1} {}h14\"/>", colour(index), y - 4.0);
        text(out, "ink", x + 20.0, y, "start", &entry);
        x += width + 12.0;
    }
    num_rows
}

pub(super) fn axes(out: &mut String, x_axis: &Axis, y_axis: &Axis) {
    for (at, label) in y_axis.ticks() {
        let _ = writeln!(out, "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{RIGHT}\"/>");
        text(out, "soft", LEFT - 8.0, at + 4.0, "end", &label);
    }
    let _ = writeln!(out, "<path class=\"axis\" d=\"M{LEFT} {BOTTOM}H{RIGHT}\"/>");
    for (at, label) in x_axis.ticks() {
        let _ = writeln!(out, "<path class=\"axis\" d=\"M{at:.1} {BOTTOM}v4\"/>");
        text(out, "soft", at, BOTTOM + 18.0, "middle", &label);
    }
}

/// A series cut into runs of numbers that can be drawn, and the places of those that cannot.
struct Drawn {
    raw: Vec<Vec<(f64, f64)>>,
    smooth: Option<Vec<Vec<(f64, f64)>>>,
    bad: Vec<f64>,
}

impl Drawn {
    fn of(series: &Series, scale: Scale) -> Self {
        let mut raw: Vec<Vec<(f64, f64)>> = vec![Vec::new()];
        let mut bad = Vec::new();
        for &(x, y) in series.points.iter().filter(|(x, _)| drawable(*x)) {
            if drawable(y) && (scale == Scale::Linear || y > TINY) {
                if let Some(run) = raw.last_mut() {
                    run.push((x, y));
                }
            } else {
                if !drawable(y) {
                    bad.push(x);
                }
                raw.push(Vec::new());
            }
        }
        raw.retain(|run| !run.is_empty());
        let num_points = raw.iter().map(Vec::len).sum::<usize>();
        let smooth = (series.smooth && num_points >= MIN_SMOOTHED)
            .then(|| raw.iter().map(|run| running_mean(run, num_points / 20)).collect());
        Self { raw, smooth, bad }
    }

    /// Returns the value the bold curve ends at.
    fn last(&self) -> Option<f64> {
        self.smooth.as_ref().unwrap_or(&self.raw).last()?.last().map(|point| point.1)
    }

    fn draw(&self, out: &mut String, index: usize, x_axis: &Axis, y_axis: &Axis) {
        let _ = writeln!(out, "<g class=\"{}\">", colour(index));
        let place = |&(x, y): &(f64, f64)| (x_axis.place(x), y_axis.place(y));
        let layers = match &self.smooth {
            Some(smooth) => vec![("line raw", &self.raw), ("line", smooth)],
            None => vec![("line", &self.raw)],
        };
        for (class, runs) in layers {
            for run in runs {
                let placed: Vec<_> = run.iter().map(place).collect();
                let mut path = String::new();
                for (x, y) in thin(&placed) {
                    let step = if path.is_empty() { 'M' } else { 'L' };
                    let _ = write!(path, "{step}{x:.1} {y:.1}");
                }
                let _ = writeln!(out, "<path class=\"{class}\" d=\"{path}\"/>");
            }
        }
        let dots: Vec<_> = self.raw.iter().flatten().map(place).collect();
        if dots.len() <= MAX_DOTS {
            for (x, y) in dots {
                let _ =
                    writeln!(out, "<circle class=\"dot\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>");
            }
        }
        for x in self.bad.iter().map(|x| x_axis.place(*x)).take(200) {
            let _ = writeln!(
                out,
                "<path class=\"bad\" d=\"M{:.1} {:.1}l7 7m0-7l-7 7\"><title>not a finite \
                 number</title></path>",
                x - 3.5,
                TOP - 3.5
            );
        }
        out.push_str("</g>\n");
    }
}

/// An axis: which values it spans and where they go.
pub(super) struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    step: f64,
    scale: Scale,
}

impl Axis {
    pub(super) fn linear(
        (mut low, mut high): (f64, f64),
        (from, to): (f64, f64),
        widen: bool,
    ) -> Self {
        if high - low < TINY {
            let room = if low.abs() < TINY { 1.0 } else { low.abs() * 0.1 };
            (low, high) = (low - room, high + room);
        }
        let step = nice_step((high - low) / 6.0);
        if widen {
            (low, high) = ((low / step).floor() * step, (high / step).ceil() * step);
        }
        Self { low, high, from, to, step, scale: Scale::Linear }
    }

    /// Spans whole powers of ten.
    pub(super) fn log((low, high): (f64, f64), (from, to): (f64, f64)) -> Self {
        // Nothing drawable gives the extent of an empty set, which starts at 0.
        let (low, high) = if low > 0.0 { (low, high) } else { (0.1, 1.0) };
        let (mut low, mut high) = (low.log10().floor(), high.log10().ceil());
        if low == high {
            (low, high) = (low - 1.0, high + 1.0);
        }
        let step = ((high - low) / 6.0).ceil();
        Self { low, high, from, to, step, scale: Scale::Log }
    }

    pub(super) fn place(&self, value: f64) -> f64 {
        self.at(if self.scale == Scale::Log { value.log10() } else { value })
    }

    /// Places what is already on the axis's scale.
    fn at(&self, value: f64) -> f64 {
        self.from + (value - self.low) / (self.high - self.low) * (self.to - self.from)
    }

    fn ticks(&self) -> Vec<(f64, String)> {
        let first = (self.low / self.step - 1e-9).ceil();
        let last = (self.high / self.step + 1e-9).floor();
        let num = if last >= first { (last - first) as usize + 1 } else { 0 };
        let tick = |n: usize| {
            let value = (first + n as f64) * self.step;
            match self.scale {
                Scale::Linear => (self.place(value), label(value, self.step)),
                Scale::Log => (self.at(value), power_label(value as i32)),
            }
        };
        (0..num.min(20)).map(tick).collect()
    }
}

/// Rounds up to 1, 2 or 5 times a power of ten.
fn nice_step(rough: f64) -> f64 {
    let power = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0]
        .into_iter()
        .map(|n| n * power)
        .find(|step| *step >= rough)
        .unwrap_or(10.0 * power)
}

/// Writes a tick with as many digits as its step needs.
fn label(value: f64, step: f64) -> String {
    let value = if value.abs() < step * 1e-6 { 0.0 } else { value };
    if value == 0.0 {
        return "0".to_owned();
    }
    if step < 1e-3 || value.abs() >= 1e9 {
        let digits = (value.abs().log10().floor() - step.log10().floor()).clamp(0.0, 6.0);
        return format!("{value:.*e}", digits as usize).replace(".0e", "e");
    }
    for (size, unit) in [(1e6, "M"), (1e3, "k")] {
        if step >= size / 10.0 && value.abs() >= size {
            let digits = usize::from((value / size).fract().abs() > 1e-9);
            return format!("{:.digits$}{unit}", value / size);
        }
    }
    let digits = (-step.log10().floor()).max(0.0) as usize;
    format!("{value:.digits$}")
}

/// Writes a power of ten.
fn power_label(power: i32) -> String {
    match power {
        -3..0 => format!("{:.*}", power.unsigned_abs() as usize, 10f64.powi(power)),
        0..=4 => 10u32.pow(power as u32).to_string(),
        _ => format!("1e{power}"),
    }
}

/// Writes a value with four significant digits.
pub(super) fn short(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    let power = value.abs().log10().floor();
    if (-3.0..6.0).contains(&power) {
        format!("{value:.*}", (3.0 - power).max(0.0) as usize)
    } else {
        format!("{value:.3e}")
    }
}

fn drawable(value: f64) -> bool {
    value.abs() < HUGE
}

/// Returns the smallest and the largest drawable value; `(0, 1)` when there is none.
pub(super) fn extent(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let start = (f64::INFINITY, f64::NEG_INFINITY);
    let (low, high) = values
        .filter(|value| drawable(*value))
        .fold(start, |(low, high), v| (low.min(v), high.max(v)));
    if low <= high { (low, high) } else { (0.0, 1.0) }
}

/// Returns the exponential mean over about `window` points, without the pull towards its start.
fn running_mean(points: &[(f64, f64)], window: usize) -> Vec<(f64, f64)> {
    let keep = 1.0 - 2.0 / (window.max(1) as f64 + 1.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    points
        .iter()
        .map(|&(x, y)| {
            sum = keep * sum + y;
            weight = keep * weight + 1.0;
            (x, sum / weight)
        })
        .collect()
}

/// Keeps the first, lowest, highest and last point of each pixel column.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= 2 * (RIGHT - LEFT) as usize {
        return points.to_vec();
    }
    let mut out = Vec::new();
    for column in points.chunk_by(|a, b| a.0.floor() == b.0.floor()) {
        let by_height = |a: &usize, b: &usize| column[*a].1.total_cmp(&column[*b].1);
        let low = (0..column.len()).min_by(by_height).unwrap_or(0);
        let high = (0..column.len()).max_by(by_height).unwrap_or(0);
        let mut keep = [0, low, high, column.len() - 1];
        keep.sort_unstable();
        let mut last = None;
        for index in keep {
            if last != Some(index) {
                out.push(column[index]);
            }
            last = Some(index);
        }
    }
    out
}

pub(super) fn colour(index: usize) -> String {
    format!("c{}", index % 8)
}

pub(super) fn text(out: &mut String, class: &str, x: f64, y: f64, anchor: &str, text: &str) {
    let text = escape(text);
    let _ = writeln!(
        out,
        "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"
    );
}

/// Escapes text for XML; characters XML has no form for are left out.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if (c.is_control() && !matches!(c, '\n' | '\t'))
                || matches!(c, '\u{fffe}' | '\u{ffff}') => {}
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plot(scale: Scale, series: Vec<Series>) -> Plot {
        Plot {
            title: "Loss".to_owned(),
            x_label: "step".to_owned(),
            y_label: "cross-entropy (nats)".to_owned(),
            scale,
            series,
        }
    }

    fn series(name: &str, points: Vec<(f64, f64)>) -> Series {
        Series { name: name.to_owned(), points, smooth: false }
    }

    #[test]
    fn points_land_where_the_axes_say() {
        // x spans 0..10 over 64..736; y spans 0..4 over 340..84.
        let chart =
            svg(&plot(Scale::Linear, vec![series("a", vec![(0.0, 0.0), (5.0, 4.0), (10.0, 2.0)])]));
        assert!(chart.contains("d=\"M64.0 340.0L400.0 84.0L736.0 212.0\""), "{chart}");
        assert!(chart.contains(">a 2.000</text>"), "{chart}");
    }

    #[test]
    fn log_axis_has_one_tick_per_power() {
        let axis = Axis::log((2e-5, 3e-3), (100.0, 0.0));
        let ticks = axis.ticks();
        let labels: Vec<_> = ticks.iter().map(|(_, label)| label.as_str()).collect();
        assert_eq!(labels, ["1e-5", "1e-4", "0.001", "0.01"]);
        let places: Vec<_> = ticks.iter().map(|(at, _)| at.round()).collect();
        assert_eq!(places, [100.0, 67.0, 33.0, 0.0]);
    }

    #[test]
    fn steps_and_labels_are_round() {
        assert_eq!(nice_step(0.3), 0.5);
        assert_eq!(nice_step(7.0), 10.0);
        assert_eq!(label(0.30000000000000004, 0.1), "0.3");
        assert_eq!(label(-0.0, 0.5), "0");
        assert_eq!(label(2e-4, 5e-5), "2e-4");
        assert_eq!(label(1.5e-4, 5e-5), "1.5e-4");
        assert_eq!(label(1500.0, 500.0), "1.5k");
        assert_eq!(label(2000.0, 500.0), "2k");
        assert_eq!(label(800.0, 200.0), "800");
        assert_eq!(short(0.000123456), "1.235e-4");
        assert_eq!(short(2.5), "2.500");
        assert_eq!(short(123456.0), "123456");
    }

    #[test]
    fn values_that_are_no_numbers_break_the_line_and_are_marked() {
        let points = vec![(0.0, 1.0), (1.0, 2.0), (2.0, f64::NAN), (3.0, 1.0), (4.0, 2.0)];
        let chart = svg(&plot(Scale::Linear, vec![series("a", points)]));
        assert_eq!(chart.matches("class=\"line\" d=\"M").count(), 2);
        assert!(chart.contains(">a 2.000</text>"));
        assert_eq!(chart.matches("class=\"bad\"").count(), 1);
    }

    #[test]
    fn thinning_keeps_every_spike() {
        let mut points: Vec<_> = (0..100_000).map(|n| (f64::from(n), 1.0)).collect();
        points[54_321].1 = 9.0;
        let chart = svg(&plot(Scale::Linear, vec![series("a", points)]));
        assert!(chart.len() < 60_000, "{}", chart.len());
        // The axis ends at 9 or just above; the spike reaches the height of 9.
        let top = Axis::linear((1.0, 9.0), (BOTTOM, TOP), true).place(9.0);
        assert!(chart.contains(&format!(" {top:.1}L")), "{top}");
    }

    #[test]
    fn running_mean_of_a_constant_is_that_constant() {
        let flat: Vec<_> = (0..50).map(|n| (f64::from(n), 3.0)).collect();
        assert!(running_mean(&flat, 5).iter().all(|(_, y)| (y - 3.0).abs() < 1e-12));
        // Window 3 keeps half: (1, then (0.5 + 3) / 1.5).
        let mean = running_mean(&[(0.0, 1.0), (1.0, 3.0)], 3);
        assert_eq!(mean, [(0.0, 1.0), (1.0, 3.5 / 1.5)]);
    }

    #[test]
    fn text_is_escaped() {
        let mut chart = plot(Scale::Linear, vec![]);
        chart.title = "a<b & \"c\"\u{1}".to_owned();
        let chart = svg(&chart);
        assert!(chart.contains("<title>a&lt;b &amp; &quot;c&quot;</title>"));
        assert!(chart.contains(">no values<"));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn any_points_give_a_drawing_without_nan(points in prop::collection::vec((any::<f64>(), any::<f64>()), 0..60), log: bool, smooth: bool) {
            let scale = if log { Scale::Log } else { Scale::Linear };
            let chart = svg(&plot(scale, vec![Series { smooth, ..series("a", points) }]));
            let numbers = chart.clone();
            for bad in ["NaN", "inf "] {
                let drawn = numbers.lines().filter(|line| !line.starts_with("<text class=\"ink\""));
                prop_assert!(!drawn.clone().any(|line| line.contains(bad)), "{}", chart);
            }
        }
    }
}
