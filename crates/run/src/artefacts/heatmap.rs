//! Heat maps as SVG: one cell per row and column, readable on light and dark pages.

use std::fmt::Write;

use super::plot::{STYLE, escape, short, text};

/// A table of numbers shown by how dark its cells are.
#[derive(Clone, Debug, PartialEq)]
pub struct HeatMap {
    /// What the map shows.
    pub title: String,
    /// What a cell measures, with its unit.
    pub value_label: String,
    /// What is counted along the top.
    pub column_label: String,
    /// Names of the rows, from the top.
    pub rows: Vec<String>,
    /// Names of the columns, from the left.
    pub columns: Vec<String>,
    /// `[rows][columns]`; a cell without a value stays empty, one that is not finite is marked.
    pub values: Vec<Vec<Option<f64>>>,
}

const CELL: f64 = 20.0;
const GAP: f64 = 1.0;
const TOP: f64 = 76.0;
const MARGIN: f64 = 24.0;
/// Average width of a character of the 12-pixel sans-serif text, a little generously.
const CHAR: f64 = 6.7;
/// The faintest cell that has a value, so that it differs from one that has none.
const FAINTEST: f64 = 0.06;
const LEGEND_CELLS: usize = 5;

/// Draws a heat map; the result is one self-contained SVG file.
///
/// The darkest cell is the largest value and the scale starts at 0, or at the least value where
/// there are values below it. Every cell carries its numbers as a tooltip.
pub fn svg(map: &HeatMap) -> String {
    let longest = map.rows.iter().map(|row| row.chars().count()).max().unwrap_or(0);
    let left = MARGIN + longest as f64 * CHAR + 8.0;
    let grid = map.columns.len() as f64 * CELL;
    let legend = map.value_label.chars().count() as f64 * CHAR + 260.0;
    let title_width = map.title.chars().count() as f64 * 8.4;
    let width = (left + grid).max(MARGIN + legend).max(MARGIN + title_width) + MARGIN;
    let bottom = TOP + map.rows.len() as f64 * CELL;
    let height = bottom + 56.0;
    let scale = Scale::of(map);

    let mut out = String::new();
    let title = escape(&map.title);
    let _ = write!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" \
         width=\"{width:.0}\" height=\"{height:.0}\" role=\"img\" aria-label=\"{title}\">\n\
         <title>{title}</title>\n<style>{STYLE}.cell{{fill:currentColor}}</style>\n\
         <rect class=\"page\" width=\"{width:.0}\" height=\"{height:.0}\" rx=\"6\"/>\n"
    );
    text(&mut out, "ink title", MARGIN, 28.0, "start", &map.title);
    text(&mut out, "soft", left, 50.0, "start", &map.column_label);
    columns(&mut out, map, left);
    for (row, name) in map.rows.iter().enumerate() {
        let y = TOP + row as f64 * CELL;
        text(&mut out, "ink", left - 8.0, y + 14.0, "end", name);
        for (column, value) in map.values.get(row).into_iter().flatten().enumerate() {
            let (Some(value), Some(place)) = (value, map.columns.get(column)) else { continue };
            let x = left + column as f64 * CELL;
            let tip = format!("{name}, {} {place}: {}", map.column_label, short(*value));
            cell(&mut out, x, y, scale.opacity(*value), &tip);
        }
    }
    if scale.largest.is_none() {
        text(&mut out, "soft", left + 8.0, TOP + 14.0, "start", "no values");
    } else {
        scale.legend(&mut out, &map.value_label, bottom + 24.0);
    }
    out.push_str("</svg>\n");
    out
}

/// Writes as many column names as there is room for.
fn columns(out: &mut String, map: &HeatMap, left: f64) {
    let longest = map.columns.iter().map(|name| name.chars().count()).max().unwrap_or(0);
    let every = ((longest as f64 * CHAR + 4.0) / CELL).ceil().max(1.0) as usize;
    for (column, name) in map.columns.iter().enumerate().step_by(every) {
        let x = left + (column as f64 + 0.5) * CELL;
        text(out, "soft", x, TOP - 6.0, "middle", name);
    }
}

/// Draws a cell; one without an opacity is a value that is not finite.
fn cell(out: &mut String, x: f64, y: f64, opacity: Option<f64>, tip: &str) {
    let side = CELL - GAP;
    let paint = match opacity {
        Some(opacity) => format!("class=\"cell c0\" fill-opacity=\"{opacity:.3}\""),
        None => "class=\"bad\"".to_owned(),
    };
    let _ = writeln!(
        out,
        "<rect {paint} x=\"{x:.1}\" y=\"{y:.1}\" width=\"{side}\" height=\"{side}\">\
         <title>{}</title></rect>",
        escape(tip)
    );
}

/// From values to how dark they are.
struct Scale {
    least: f64,
    largest: Option<f64>,
}

impl Scale {
    fn of(map: &HeatMap) -> Self {
        let values = map.values.iter().flatten().flatten().copied();
        let (mut least, mut largest) = (0.0f64, None::<f64>);
        for value in values.filter(|value| value.is_finite()) {
            least = least.min(value);
            largest = Some(largest.map_or(value, |l| l.max(value)));
        }
        Self { least, largest }
    }

    fn opacity(&self, value: f64) -> Option<f64> {
        let span = self.largest.unwrap_or(0.0) - self.least;
        let share = if span > 0.0 { (value - self.least) / span } else { 0.0 };
        value.is_finite().then_some(FAINTEST + (1.0 - FAINTEST) * share)
    }

    fn legend(&self, out: &mut String, label: &str, y: f64) {
        let largest = self.largest.unwrap_or(0.0);
        text(out, "soft", MARGIN, y + 14.0, "start", label);
        let mut x = MARGIN + label.chars().count() as f64 * CHAR + 16.0;
        let low = short(self.least);
        text(out, "soft", x, y + 14.0, "start", &low);
        x += low.chars().count() as f64 * CHAR + 6.0;
        for step in 0..LEGEND_CELLS {
            let share = step as f64 / (LEGEND_CELLS - 1) as f64;
            let value = self.least + share * (largest - self.least);
            cell(out, x, y, self.opacity(value), &short(value));
            x += CELL;
        }
        text(out, "soft", x + 6.0, y + 14.0, "start", &short(largest));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(values: Vec<Vec<Option<f64>>>) -> HeatMap {
        HeatMap {
            title: "a < b".to_owned(),
            value_label: "share".to_owned(),
            column_label: "block".to_owned(),
            rows: vec!["q".to_owned(), "k".to_owned()],
            columns: vec!["0".to_owned(), "1".to_owned()],
            values,
        }
    }

    #[test]
    fn the_darkest_cell_is_the_largest_value() {
        let drawn = svg(&map(vec![vec![Some(0.0), Some(4.0)], vec![None, Some(2.0)]]));
        assert!(drawn.contains("fill-opacity=\"1.000\" x=\"58.7\" y=\"76.0\""), "{drawn}");
        assert!(drawn.contains("<title>q, block 1: 4.000</title>"));
        // Half way between 0.06 and 1.
        assert!(drawn.contains("fill-opacity=\"0.530\""));
        assert!(!drawn.contains("k, block 0"), "an empty cell is not drawn");
        assert!(drawn.contains("a &lt; b") && !drawn.contains("a < b"));
        assert_eq!(drawn.matches("<rect").count(), 1 + 3 + LEGEND_CELLS);
    }

    #[test]
    fn odd_values_are_shown_as_such() {
        let drawn = svg(&map(vec![vec![Some(f64::NAN), Some(-1.0)], vec![Some(1.0)]]));
        assert!(drawn.contains("class=\"bad\""));
        assert!(drawn.contains("q, block 0: NaN"));
        let empty = svg(&map(vec![vec![None, None], vec![]]));
        assert!(empty.contains("no values"));
        let flat = svg(&map(vec![vec![Some(0.0), Some(0.0)]]));
        assert!(flat.contains("fill-opacity=\"0.060\"") && !flat.contains("NaN"));
        assert!(
            svg(&HeatMap { rows: vec![], columns: vec![], ..map(vec![]) }).ends_with("</svg>\n")
        );
    }
}
