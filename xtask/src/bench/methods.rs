//! What a step of each tuning method costs, beside one of LoRA and of full tuning.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Map, Value, json};

use super::cases::{Case, Inputs, ON_BLOCKS};
use super::table::Table;
use super::{Rounds, median, number};
use crate::output;

/// What a method's step may cost at most, in steps of another.
const GOALS: &[(&[&str], f64, &str)] = &[
    (&["spiel", "sara", "id3", "shira", "lt-sft", "dsee"], 1.3, "lora"),
    (&["prompt-tuning", "p-tuning", "prefix-tuning", "cpt", "dept", "ssf"], 1.1, "lora"),
    (&["hft"], 0.75, "full"),
];

/// How far the peak may lie from the forecast, as a fraction.
const MEMORY_GOAL: f64 = 0.2;

/// Measures methods beside LoRA and full tuning, adds them to the rows of the file, and returns the
/// table of all rows.
///
/// The file lets a long list be measured in pieces: ratios are taken within a round of one piece.
pub(crate) fn measure(
    program: &Path,
    inputs: &Inputs,
    names: &[String],
    (num_rounds, num_steps): (usize, usize),
    file: Option<&Path>,
) -> Result<(Value, String), String> {
    let names = if names.is_empty() { all(program)? } else { names.to_vec() };
    let mut list: Vec<&str> = names.iter().map(String::as_str).collect();
    let on_blocks = format!("lora{ON_BLOCKS}");
    if list.iter().any(|name| name.ends_with(ON_BLOCKS)) && !list.contains(&on_blocks.as_str()) {
        list.insert(0, &on_blocks);
    }
    for other in ["lora", "full"] {
        let asked = |goal: &(&[&str], f64, &str)| {
            goal.2 == other && goal.0.iter().any(|name| list.contains(name))
        };
        let beside = |name: &&str| other == "lora" && !name.ends_with(ON_BLOCKS);
        if !list.contains(&other) && (list.iter().any(beside) || GOALS.iter().any(asked)) {
            list.insert(0, other);
        }
    }
    let mut rounds = Rounds::new();
    let mut refused = Map::new();
    for round in 0..num_rounds {
        for name in &list {
            if refused.contains_key(*name) {
                continue;
            }
            match Case::of_method(name).run(program, inputs, num_steps) {
                Ok(measured) => {
                    eprintln(round, name, &measured);
                    rounds.entry((*name).to_owned()).or_default().push(measured);
                }
                Err(why) => {
                    refused.insert((*name).to_owned(), json!(reason(&why)));
                }
            }
        }
    }
    let mut rows = match file.map(fs::read_to_string) {
        Some(Ok(text)) => serde_json::from_str(&text).map_err(|error| error.to_string())?,
        _ => Map::new(),
    };
    for name in &list {
        rows.insert((*name).to_owned(), row(name, &rounds, refused.get(*name)));
    }
    if let Some(file) = file {
        let text = serde_json::to_string_pretty(&rows).unwrap_or_default();
        fs::write(file, text).map_err(|error| format!("{}: {error}", file.display()))?;
    }
    let text = table(&rows).to_string();
    Ok((Value::Object(rows), text))
}

#[expect(clippy::print_stderr, reason = "a command line tool")]
fn eprintln(round: usize, name: &str, measured: &super::Measured) {
    eprintln!(
        "round {}, {name}: {:.0} tokens/s, {:.0} MiB",
        round + 1,
        measured.tokens_per_second,
        measured.peak_bytes / f64::from(1 << 20)
    );
}

/// Lists the methods the program knows.
fn all(program: &Path) -> Result<Vec<String>, String> {
    let text = output(Command::new(program).args(["methods", "--json"]))?;
    let list: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    let name = |method: &Value| method["name"].as_str().map(str::to_owned);
    list.as_array().map(|list| list.iter().filter_map(name).collect()).ok_or(text)
}

/// Returns the line of an error that says what was wrong.
fn reason(why: &str) -> String {
    let line = why.lines().find(|line| line.starts_with("error")).or(why.lines().last());
    line.unwrap_or_default().trim_start_matches("error: ").to_owned()
}

fn row(name: &str, rounds: &Rounds, refused: Option<&Value>) -> Value {
    let Some(own) = rounds.get(name) else { return json!({"refused": refused}) };
    let of = |what: &dyn Fn(&super::Measured) -> f64| median(own.iter().map(what).collect());
    let against = |other: &str| {
        let other = rounds.get(other).map(Vec::as_slice).unwrap_or_default();
        let ratio = own.iter().zip(other).map(|(m, o)| o.tokens_per_second / m.tokens_per_second);
        median(ratio.collect())
    };
    let base = if name.ends_with(ON_BLOCKS) { ON_BLOCKS } else { "" };
    let finite = |value: f64| if value.is_finite() { json!(value) } else { Value::Null };
    json!({
        "step_s": finite(of(&|m| 1024.0 / m.tokens_per_second)),
        "steps_of_lora": finite(against(&format!("lora{base}"))),
        "steps_of_full": finite(against("full")),
        "peak_mib": finite(of(&|m| m.peak_bytes / f64::from(1 << 20))),
        "forecast_mib": finite(of(&|m| m.forecast_bytes / f64::from(1 << 20))),
        "rounds": own.len(),
    })
}

fn goal(name: &str) -> Option<(f64, &'static str)> {
    let name = name.strip_suffix(ON_BLOCKS).unwrap_or(name);
    let found = GOALS.iter().find(|(names, ..)| names.contains(&name));
    found.map(|(_, most, other)| (*most, *other))
}

fn table(rows: &Map<String, Value>) -> Table {
    let mut table = Table::new(&[
        "method",
        "s a step",
        "of lora's",
        "of full's",
        "goal",
        "peak MiB",
        "forecast",
        "off by",
    ]);
    for (name, row) in rows {
        let value = |key: &str| row[key].as_f64().unwrap_or(f64::NAN);
        if let Some(why) = row["refused"].as_str() {
            table.row([name.clone(), "-".to_owned(), why.to_owned()]);
            continue;
        }
        let goal = goal(name).map(|(most, other)| {
            let found = value(&format!("steps_of_{other}"));
            let verdict = if found <= most { "met" } else { "missed" };
            format!("≤ {most} of {other}'s: {verdict}")
        });
        let off = value("forecast_mib") / value("peak_mib") - 1.0;
        let mark = if off.abs() <= MEMORY_GOAL { "" } else { " !" };
        table.row([
            name.clone(),
            number(value("step_s"), 2),
            number(value("steps_of_lora"), 2),
            number(value("steps_of_full"), 2),
            goal.unwrap_or_else(|| "-".to_owned()),
            number(value("peak_mib"), 0),
            number(value("forecast_mib"), 0),
            if off.is_nan() { "-".to_owned() } else { format!("{:+.0} %{mark}", 100.0 * off) },
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::Measured;

    fn measured(tokens_per_second: f64) -> Measured {
        let (peak_bytes, forecast_bytes) = (100.0 * f64::from(1 << 20), 125.0 * f64::from(1 << 20));
        let (first_step_s, flops_per_step) = (1.0, 1.0);
        Measured { tokens_per_second, peak_bytes, first_step_s, forecast_bytes, flops_per_step }
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        // The machine is half as fast in the second round.
        let rounds = Rounds::from([
            ("lora".to_owned(), vec![measured(1024.0), measured(512.0)]),
            ("ssf".to_owned(), vec![measured(1280.0), measured(640.0)]),
        ]);
        let row = row("ssf", &rounds, None);
        assert_eq!(row["steps_of_lora"], 0.8);
        let mut rows = Map::new();
        rows.insert("ssf".to_owned(), row);
        rows.insert("bitfit".to_owned(), json!({"refused": "no such bias"}));
        let text = table(&rows).to_string();
        assert!(text.contains("≤ 1.1 of lora's: met") && text.contains("+25 % !"), "{text}");
        assert!(text.contains("no such bias"), "{text}");
    }

    #[test]
    fn a_method_over_blocks_is_held_against_lora_over_blocks() {
        let rounds = Rounds::from([
            ("lora".to_owned(), vec![measured(999.0)]),
            ("lora@4bit".to_owned(), vec![measured(512.0)]),
            ("spiel@4bit".to_owned(), vec![measured(256.0)]),
        ]);
        let row = row("spiel@4bit", &rounds, None);
        assert_eq!(row["steps_of_lora"], 2.0);
        let text = table(&Map::from_iter([("spiel@4bit".to_owned(), row)])).to_string();
        assert!(text.contains("≤ 1.3 of lora's: missed"), "{text}");
    }

    #[test]
    fn a_reason_is_one_line() {
        assert_eq!(reason("retune run: exit 1\nerror: bitfit is not\n  help: x"), "bitfit is not");
    }
}
