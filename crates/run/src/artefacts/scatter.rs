//! One measure against several costs as SVG: a point per contestant, one panel per cost.

use std::fmt::Write;

use super::plot::{
    Axis, BOTTOM, CHAR, HEIGHT, LEFT, RIGHT, STYLE, Scale, TOP, WIDTH, axes, colour, escape,
    extent, text,
};

/// Panels below each other with one common vertical measure.
#[derive(Clone, Debug, PartialEq)]
pub struct Scatter {
    /// What the chart shows.
    pub title: String,
    /// What is measured upwards, with its unit.
    pub y_label: String,
    /// The panels, from top to bottom.
    pub panels: Vec<Panel>,
}

/// The measure against one cost.
#[derive(Clone, Debug, PartialEq)]
pub struct Panel {
    /// What is counted along the bottom, with its unit.
    pub x_label: String,
    /// How the values are spaced along the bottom.
    pub scale: Scale,
    /// The points.
    pub points: Vec<Point>,
}

/// One contestant.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// Its name, written beside it.
    pub name: String,
    /// Its cost.
    pub x: f64,
    /// Its measure: the mean.
    pub y: f64,
    /// Half the length of its error bar; 0 draws none.
    pub spread: f64,
}

/// Draws the panels; the result is one self-contained SVG file.
///
/// Points whose cost or measure is no finite number are left out, as are costs of 0 and below on
/// an axis by factors of ten.
pub fn svg(chart: &Scatter) -> String {
    let height = HEIGHT * chart.panels.len().max(1) as f64;
    let title = escape(&chart.title);
    let mut out = String::new();
    let _ = write!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         width=\"{WIDTH}\" height=\"{height}\" role=\"img\" aria-label=\"{title}\">\n\
         <title>{title}</title>\n<style>{STYLE}</style>\n\
         <rect class=\"page\" width=\"{WIDTH}\" height=\"{height}\" rx=\"6\"/>\n"
    );
    text(&mut out, "ink title", LEFT - 40.0, 26.0, "start", &chart.title);
    for (index, panel) in chart.panels.iter().enumerate() {
        let _ = writeln!(out, "<g transform=\"translate(0 {})\">", HEIGHT * index as f64);
        draw(&mut out, chart, panel);
        out.push_str("</g>\n");
    }
    out.push_str("</svg>\n");
    out
}

fn draw(out: &mut String, chart: &Scatter, panel: &Panel) {
    let drawable = |point: &&Point| {
        let places = point.x.is_finite() && (panel.scale == Scale::Linear || point.x > 0.0);
        places && point.y.is_finite() && point.spread.is_finite()
    };
    let points: Vec<&Point> = panel.points.iter().filter(drawable).collect();
    let ends = points.iter().flat_map(|p| [p.y - p.spread, p.y + p.spread]);
    let y_axis = Axis::linear(extent(ends), (BOTTOM, TOP), true);
    let xs = extent(points.iter().map(|p| p.x));
    let x_axis = match panel.scale {
        Scale::Linear => Axis::linear(xs, (LEFT, RIGHT), true),
        Scale::Log => Axis::log(xs, (LEFT, RIGHT)),
    };
    text(out, "soft", LEFT - 40.0, TOP - 14.0, "start", &chart.y_label);
    text(out, "soft", RIGHT, HEIGHT - 10.0, "end", &panel.x_label);
    axes(out, &x_axis, &y_axis);
    // Names stand at their points; where two would overlap, the lower one moves down.
    let mut taken: Vec<(f64, f64, f64)> = Vec::new();
    for (index, point) in points.iter().enumerate() {
        let (x, y) = (x_axis.place(point.x), y_axis.place(point.y));
        let class = colour(index);
        if point.spread > 0.0 {
            let (low, high) =
                (y_axis.place(point.y - point.spread), y_axis.place(point.y + point.spread));
            let _ =
                writeln!(out, "<path class=\"line {class}\" d=\"M{x:.1} {low:.1}V{high:.1}\"/>");
        }
        let _ =
            writeln!(out, "<circle class=\"dot {class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\"/>");
        let width = point.name.chars().count() as f64 * CHAR;
        let left = x + 8.0 + width > RIGHT;
        let start = if left { x - 8.0 - width } else { x + 8.0 };
        let mut line = y + 4.0;
        while taken
            .iter()
            .any(|(from, to, at)| start < *to && *from < start + width && (line - at).abs() < 12.0)
        {
            line += 12.0;
        }
        taken.push((start, start + width, line));
        text(out, "ink", start, line, "start", &point.name);
    }
    if points.is_empty() {
        text(out, "soft", f64::midpoint(LEFT, RIGHT), 200.0, "middle", "no values");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(name: &str, x: f64, y: f64) -> Point {
        Point { name: name.to_owned(), x, y, spread: 0.0 }
    }

    fn chart(scale: Scale, points: Vec<Point>) -> String {
        let panel = Panel { x_label: "values".to_owned(), scale, points };
        svg(&Scatter { title: "a < b".to_owned(), y_label: "loss".to_owned(), panels: vec![panel] })
    }

    #[test]
    fn points_land_where_the_axes_say() {
        // 10 and 1000 span the axis; 100 lies in its middle.
        let points = vec![point("a", 10.0, 0.0), point("b", 1000.0, 1.0), point("c", 100.0, 0.5)];
        let drawn = chart(Scale::Log, points);
        for expected in
            ["cx=\"64.0\" cy=\"340.0\"", "cx=\"736.0\" cy=\"84.0\"", "cx=\"400.0\" cy=\"212.0\""]
        {
            assert!(drawn.contains(expected), "{expected} in\n{drawn}");
        }
        assert!(drawn.contains("a &lt; b"));
    }

    #[test]
    fn names_do_not_cover_each_other() {
        let drawn = chart(Scale::Linear, vec![point("one", 1.0, 1.0), point("two", 1.0, 1.0)]);
        let line = |name: &str| {
            let at = drawn.find(&format!(">{name}<")).unwrap();
            let before = &drawn[..at];
            before[before.rfind(" y=\"").unwrap()..].to_owned()
        };
        assert_ne!(line("one"), line("two"));
    }

    #[test]
    fn what_is_no_number_is_left_out() {
        let points =
            vec![point("a", f64::NAN, 1.0), point("b", 0.0, 1.0), point("c", 1.0, f64::INFINITY)];
        let drawn = chart(Scale::Log, points);
        assert!(!drawn.contains("<circle") && drawn.contains("no values"), "{drawn}");
        assert!(!drawn.contains("NaN") && !drawn.contains("inf"));
    }
}
