//! `cargo xtask bench`: kernels against the machine's peak, whole steps as users get them, and the
//! same steps in PyTorch + PEFT.
//!
//! Nothing is measured from inside: programs are started, and the times at which they report a
//! step, and the memory the system says they took, are noted from here. Subjects take turns
//! (A B A B), ratios are taken within a round, and medians over rounds are shown.

mod cases;
mod measure;
mod methods;
mod rows;
mod table;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::{Outcome, cargo, output};
use cases::{Case, Inputs, Side};
use measure::Measured;
use table::Table;

/// What is benched.
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of the command line")]
#[derive(Debug, Default)]
pub(crate) struct Options {
    json: bool,
    kernels: bool,
    steps: bool,
    lengths: bool,
    only: Vec<String>,
    peer: Option<PathBuf>,
    rounds: usize,
    num_steps: usize,
    chats: Option<PathBuf>,
    /// Methods whose steps are measured; an empty list means all.
    methods: Option<Vec<String>>,
    into: Option<PathBuf>,
    /// A program that is built already.
    program: Option<PathBuf>,
}

impl Options {
    /// Reads what follows `bench`.
    pub(crate) fn parse(arguments: &[&str]) -> Result<Self, String> {
        let mut options = Self { rounds: 3, num_steps: 6, ..Self::default() };
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            let mut value = || rest.next().copied().ok_or(format!("`{argument}` needs a value"));
            let number = |text: &str| {
                let number = text.parse().ok().filter(|number| (2..=10_000).contains(number));
                number.ok_or(format!("`{argument}` needs a number of 2 to 10000, got `{text}`"))
            };
            match *argument {
                "--json" => options.json = true,
                "--kernels" => options.kernels = true,
                "--steps" => options.steps = true,
                "--lengths" => options.lengths = true,
                "--only" => options.only.push(value()?.to_owned()),
                "--peer" => options.peer = Some(value()?.into()),
                "--methods" => {
                    let names = value()?.split(',').filter(|name| *name != "all");
                    options.methods = Some(names.map(str::to_owned).collect());
                }
                "--program" => options.program = Some(value()?.into()),
                "--into" => options.into = Some(value()?.into()),
                "--chats" => options.chats = Some(value()?.into()),
                "--rounds" => options.rounds = number(value()?)?,
                "--num-steps" => options.num_steps = number(value()?)?,
                other => return Err(format!("bench does not know `{other}`")),
            }
        }
        if options.lengths {
            options.steps = true;
        }
        if !options.kernels && !options.steps && options.methods.is_none() {
            (options.kernels, options.steps) = (options.only.is_empty(), true);
        }
        for name in &options.only {
            if !cases::all().iter().any(|case| case.name == name) {
                let names: Vec<_> = cases::all().iter().map(|case| case.name).collect();
                return Err(format!("no case `{name}`; there are: {}", names.join(", ")));
            }
        }
        Ok(options)
    }
}

/// Builds, measures, and prints a table or JSON.
#[expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line tool")]
pub(crate) fn run(root: &Path, options: &Options) -> Outcome {
    let mut found = json!({ "machine": machine() });
    if !options.json {
        println!("{}", found["machine"].as_str().unwrap_or_default());
    }
    if options.kernels {
        eprintln!("building and running the kernels");
        let rows = kernels(&[])?;
        if !options.json {
            println!("\n{}", kernel_table(&rows));
        }
        found["kernels"] = Value::Array(rows);
    }
    if let Some(names) = &options.methods {
        let (program, target) = program(options)?;
        let lora = Case::of_method("lora");
        let inputs = Inputs::make(&program, &target.join("bench"), None, &[&lora])?;
        let counts = (options.rounds, options.num_steps);
        let (rows, text) =
            methods::measure(&program, &inputs, names, counts, options.into.as_deref())?;
        if !options.json {
            println!("\n{text}");
        }
        found["methods"] = rows;
    }
    if options.steps {
        let (program, target) = program(options)?;
        let cases: Vec<&Case<'_>> = chosen(options).collect();
        let folder = target.join("bench");
        let inputs = Inputs::make(&program, &folder, options.chats.as_deref(), &cases)?;
        let peaks = peaks(&kernels(&["peak"])?);
        let rounds = rounds(root, &program, &inputs, options)?;
        let (summary, text) = summarise(options, &rounds, &peaks);
        if !options.json {
            println!("\n{text}");
        }
        found["steps"] = summary;
    }
    if options.json {
        println!("{found:#}");
    }
    Ok(())
}

/// Builds the program; returns it and the folder cargo builds in.
#[expect(clippy::print_stderr, reason = "a command line tool")]
fn program(options: &Options) -> Result<(PathBuf, PathBuf), String> {
    let target = target()?;
    if let Some(program) = &options.program {
        return Ok((program.clone(), target));
    }
    eprintln!("building the program");
    output(&mut cargo(&["build", "--release", "--quiet", "--package", "retune"]))?;
    Ok((target.join("release").join("retune"), target))
}

/// All measurements by subject, one per round.
type Rounds = BTreeMap<String, Vec<Measured>>;

#[expect(clippy::print_stderr, reason = "a command line tool")]
fn rounds(
    root: &Path,
    program: &Path,
    inputs: &Inputs,
    options: &Options,
) -> Result<Rounds, String> {
    let mut rounds = Rounds::new();
    for round in 0..options.rounds {
        for case in chosen(options) {
            for side in [Side::Retune, Side::Peer] {
                let subject = case.subject(side);
                let known = rounds.get(&subject).map_or(0, Vec::len);
                // Several cases have the same peer, which runs once a round.
                if known > round {
                    continue;
                }
                let measured = match (side, &options.peer) {
                    (Side::Retune, _) => case.run(program, inputs, options.num_steps)?,
                    (Side::Peer, Some(python)) => {
                        case.run_peer(python, root, inputs, options.num_steps)?
                    }
                    (Side::Peer, None) => continue,
                };
                eprintln!(
                    "round {}, {subject}: {:.0} tokens/s, {:.0} MiB, first step after {:.2} s",
                    round + 1,
                    measured.tokens_per_second,
                    measured.peak_bytes / f64::from(1 << 20),
                    measured.first_step_s
                );
                rounds.entry(subject).or_default().push(measured);
            }
        }
    }
    Ok(rounds)
}

fn chosen(options: &Options) -> impl Iterator<Item = &'static Case<'static>> {
    let wanted = |case: &&Case<'_>| match options.only.as_slice() {
        [] => case.of_lengths == options.lengths,
        only => only.iter().any(|name| name == case.name),
    };
    cases::all().iter().filter(wanted)
}

/// Lays out medians, and ratios within rounds.
fn summarise(options: &Options, rounds: &Rounds, peaks: &BTreeMap<String, f64>) -> (Value, String) {
    let mut table = Table::new(&[
        "case",
        "tokens/s",
        "peer",
        "ratio",
        "goal",
        "MiB",
        "peer",
        "ratio",
        "goal",
        "forecast",
        "first step s",
        "peer",
        "ratio",
        "GFLOP/s",
        "% of peak",
    ]);
    let mut list = Vec::new();
    for case in chosen(options) {
        let Some(own) = rounds.get(&case.subject(Side::Retune)) else { continue };
        let peer = rounds.get(&case.subject(Side::Peer)).map(Vec::as_slice).unwrap_or_default();
        let of =
            |side: &[Measured], what: fn(&Measured) -> f64| median(side.iter().map(what).collect());
        let ratio = |what: fn(&Measured) -> f64| {
            median(own.iter().zip(peer).map(|(own, peer)| what(own) / what(peer)).collect())
        };
        let speed: fn(&Measured) -> f64 = |m| m.tokens_per_second;
        let peak: fn(&Measured) -> f64 = |m| m.peak_bytes / f64::from(1 << 20);
        let first: fn(&Measured) -> f64 = |m| m.first_step_s;
        let forecast: fn(&Measured) -> f64 = |m| m.forecast_bytes / f64::from(1 << 20);
        let gflops = median(own.iter().map(|m| case.flops(m)).collect()) / 1e9;
        let share = 100.0 * gflops / peaks.get(case.arithmetic()).copied().unwrap_or(f64::NAN);
        table.row([
            case.name.to_owned(),
            number(of(own, speed), 0),
            number(of(peer, speed), 0),
            number(ratio(speed), 2),
            case.speed_goal.map_or_else(|| "-".to_owned(), |goal| format!("≥ {goal}")),
            number(of(own, peak), 0),
            number(of(peer, peak), 0),
            number(ratio(peak), 2),
            case.memory_goal.map_or_else(|| "-".to_owned(), |goal| format!("≤ {goal}")),
            number(of(own, forecast), 0),
            number(of(own, first), 2),
            number(of(peer, first), 2),
            number(ratio(first), 2),
            number(gflops, 0),
            number(share, 0),
        ]);
        list.push(json!({
            "case": case.name,
            "peer": case.subject(Side::Peer),
            "tokens_per_second": of(own, speed),
            "peer_tokens_per_second": of(peer, speed),
            "speed_ratio": ratio(speed),
            "speed_goal": case.speed_goal,
            "peak_mib": of(own, peak),
            "peer_peak_mib": of(peer, peak),
            "peak_ratio": ratio(peak),
            "peak_goal": case.memory_goal,
            "forecast_mib": of(own, forecast),
            "first_step_s": of(own, first),
            "peer_first_step_s": of(peer, first),
            "first_step_ratio": ratio(first),
            "gflops": gflops,
            "percent_of_peak": share,
            "rounds": own.len(),
        }));
    }
    (Value::Array(list), table.to_string())
}

/// Returns the middle value, or NaN of none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => values[count / 2],
        count => f64::midpoint(values[count / 2 - 1], values[count / 2]),
    }
}

fn number(value: f64, digits: usize) -> String {
    if value.is_nan() { "-".to_owned() } else { format!("{value:.digits$}") }
}

/// The machine's peak by arithmetic, in GFLOP/s.
fn peaks(rows: &[Value]) -> BTreeMap<String, f64> {
    let peak = |row: &Value| Some((row["form"].as_str()?.to_owned(), row["speed"].as_f64()?));
    rows.iter().filter(|row| row["kernel"] == "peak").filter_map(peak).collect()
}

/// Runs the kernels' bench, or some of its parts, and reads its lines.
fn kernels(parts: &[&str]) -> Result<Vec<Value>, String> {
    let mut bench =
        cargo(&["bench", "--quiet", "--package", "retune-kernels", "--bench", "kernels", "--"]);
    let text = output(bench.args(parts))?;
    let rows = text.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split('\t').collect();
        let [name, shape, form, ms, speed, unit, share, times] = fields[..] else { return None };
        let number = |text: &str| text.parse::<f64>().ok();
        Some(json!({
            "kernel": name,
            "shape": shape,
            "form": form,
            "milliseconds": number(ms),
            "speed": number(speed),
            "unit": unit,
            "percent_of_peak": number(share),
            "times_reference": number(times),
        }))
    });
    Ok(rows.collect())
}

fn kernel_table(rows: &[Value]) -> Table {
    let mut table =
        Table::new(&["kernel", "shape", "form", "ms", "speed", "unit", "% of peak", "× reference"]);
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    };
    for row in rows {
        table.row(
            ["kernel", "shape", "form", "milliseconds", "speed", "unit"]
                .into_iter()
                .chain(["percent_of_peak", "times_reference"])
                .map(|key| text(&row[key])),
        );
    }
    table
}

/// Where cargo builds.
fn target() -> Result<PathBuf, String> {
    let text = output(&mut cargo(&["metadata", "--no-deps", "--format-version=1"]))?;
    let metadata: Value =
        serde_json::from_str(&text).map_err(|error| format!("cargo metadata: {error}"))?;
    let path = metadata["target_directory"].as_str();
    path.map(PathBuf::from).ok_or_else(|| "cargo metadata names no target folder".to_owned())
}

/// Names the processor, its cores and the date.
fn machine() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find(|line| line.starts_with("model name"));
    let name = name.and_then(|line| line.split(": ").nth(1)).unwrap_or(std::env::consts::ARCH);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default().to_owned();
    format!("{name}, {cores} cores, load before {load}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_even_and_none() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(Vec::new()).is_nan());
    }

    #[test]
    fn wrong_use_is_named() {
        let problem = |arguments: &[&str]| Options::parse(arguments).unwrap_err();
        assert!(problem(&["--only", "nothing"]).contains("lora-f32"));
        assert!(problem(&["--rounds", "1"]).contains("2 to 10000"));
        assert!(problem(&["--peer"]).contains("needs a value"));
        assert!(problem(&["--fast"]).contains("--fast"));
        let options = Options::parse(&["--only", "lora-f32"]).unwrap();
        assert!(options.steps && !options.kernels);
    }
}
