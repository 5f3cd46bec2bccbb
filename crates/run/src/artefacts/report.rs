//! The report of a run: `report.json` for machines and `report.md` for people.

use serde::{Deserialize, Serialize};
use std::fmt::Write;

/// Everything a run's report says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunReport {
    /// The run's name.
    pub name: String,
    /// How it ended.
    pub outcome: Outcome,
    /// The base model, as the recipe names it.
    pub model: String,
    /// The method's name.
    pub method: String,
    /// When it started, as text (ISO 8601).
    pub started: String,
    /// How many numbers were trained.
    pub num_trained: u64,
    /// How many numbers the model has, the trained ones included.
    pub num_total: u64,
    /// What was trained on.
    pub data: DataSummary,
    /// What it took.
    pub cost: Cost,
    /// Measures before and after.
    pub metrics: Vec<Metric>,
    /// Answers before and after.
    pub examples: Vec<Example>,
    /// The resolved plan, as dotted names and values.
    pub settings: Vec<(String, String)>,
    /// Seeds by what they are for.
    pub seeds: Vec<(String, u64)>,
    /// Versions of what took part.
    pub versions: Vec<(String, String)>,
    /// Where it ran.
    pub machine: Machine,
    /// Files the run left behind.
    pub files: Vec<File>,
    /// Charts: caption and path below the run folder.
    pub plots: Vec<(String, String)>,
    /// What went wrong without stopping the run.
    pub warnings: Vec<String>,
    /// What the numbers do not show.
    pub limits: Vec<String>,
}

/// How a run ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Outcome {
    /// It did all its steps.
    #[default]
    Finished,
    /// It was stopped; a later `resume` can go on.
    Stopped {
        /// What stopped it.
        reason: String,
    },
    /// It could not go on.
    Failed {
        /// The error.
        error: String,
    },
}

/// What was trained on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataSummary {
    /// Where it comes from.
    pub source: String,
    /// How many examples there are to train on.
    pub num_train: u64,
    /// How many examples are held back.
    pub num_held_out: u64,
    /// How many examples were left out, by reason.
    pub left_out: Vec<(String, u64)>,
    /// How many tokens one pass over the examples has.
    pub num_tokens: u64,
    /// How many of these the loss counts.
    pub num_loss_tokens: u64,
}

/// What a run took.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Optimiser steps.
    pub num_steps: u64,
    /// Tokens seen, repetitions included.
    pub num_tokens: u64,
    /// Time of training alone, in seconds.
    pub train_s: f64,
    /// Time of everything, in seconds.
    pub total_s: f64,
    /// Largest resident memory, in bytes; 0 when not measured.
    pub peak_bytes: u64,
    /// Energy in joules, when it was measured.
    pub energy_j: Option<f64>,
}

/// Which direction of a measure is good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Better {
    /// Less is better, as for a loss.
    #[default]
    Lower,
    /// More is better, as for a share of right answers.
    Higher,
}

/// A measure before and after.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// Its name.
    pub name: String,
    /// Which direction is good.
    pub better: Better,
    /// The base model's value.
    pub before: Option<Measured>,
    /// The tuned model's value.
    pub after: Option<Measured>,
    /// How many examples it was measured on.
    pub num_examples: u64,
    /// Whether these examples were held back from training.
    pub held_out: bool,
}

/// A measured value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// The value; JSON has no NaN, so that is written and read as `null`.
    #[serde(deserialize_with = "number_or_null")]
    pub value: f64,
    /// Its standard error over the examples, when known.
    pub std_error: Option<f64>,
}

fn number_or_null<'de, D: serde::Deserializer<'de>>(input: D) -> Result<f64, D::Error> {
    Option::<f64>::deserialize(input).map(|number| number.unwrap_or(f64::NAN))
}

/// What a comparison of two values allows to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Better than before.
    Better,
    /// Worse than before.
    Worse,
    /// Equal, or closer than two standard errors of the difference.
    Unclear,
    /// One of the two values is missing or no number.
    Unknown,
}

impl Metric {
    /// Compares after with before.
    ///
    /// The standard errors are taken as independent, which for the same examples before and after
    /// is cautious: a real change may be called unclear, hardly ever the reverse.
    pub fn verdict(&self) -> Verdict {
        let (Some(before), Some(after)) = (self.before, self.after) else {
            return Verdict::Unknown;
        };
        let gain = match self.better {
            Better::Lower => before.value - after.value,
            Better::Higher => after.value - before.value,
        };
        let error = before.std_error.unwrap_or(0.0).hypot(after.std_error.unwrap_or(0.0));
        if !gain.is_finite() || !error.is_finite() {
            Verdict::Unknown
        } else if gain == 0.0 || gain.abs() < 2.0 * error {
            Verdict::Unclear
        } else if gain > 0.0 {
            Verdict::Better
        } else {
            Verdict::Worse
        }
    }
}

/// One answer before and after.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Example {
    /// What was asked.
    pub prompt: String,
    /// The answer the data has, if any.
    pub reference: Option<String>,
    /// The base model's answer.
    pub before: String,
    /// The tuned model's answer.
    pub after: String,
}

/// Where a run ran.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Operating system and architecture.
    pub system: String,
    /// The processor's name.
    pub processor: String,
    /// How many threads were used.
    pub num_threads: u64,
    /// Memory in bytes; 0 when not known.
    pub memory_bytes: u64,
    /// The device that computed.
    pub device: String,
}

/// A file a run left behind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Path below the run folder.
    pub path: String,
    /// What it is.
    pub what: String,
    /// Size in bytes.
    pub num_bytes: u64,
}

/// Fewer examples than this make a share of right answers coarser than ten points either way.
const FEW_EXAMPLES: u64 = 100;

impl RunReport {
    /// Adds to `limits` what follows from the numbers themselves: few examples, one seed, measures
    /// on training data, nothing to compare with.
    pub fn infer_limits(&mut self) {
        let mut limits = Vec::new();
        if self.metrics.is_empty() {
            limits.push(
                "Nothing was measured: that training ran says nothing of the result.".to_owned(),
            );
        }
        for metric in &self.metrics {
            let name = &metric.name;
            if metric.before.is_none() {
                limits.push(format!(
                    "{name} was not measured before training, so no gain can be claimed."
                ));
            }
            if !metric.held_out {
                limits.push(format!(
                    "{name} was measured on training data: it shows memory, not generalisation."
                ));
            }
            if metric.num_examples < FEW_EXAMPLES {
                limits.push(format!(
                    "{name} rests on {} examples; small differences are chance.",
                    metric.num_examples
                ));
            }
        }
        let unsure = |m: &Measured| m.std_error.is_none();
        for metric in &self.metrics {
            if [&metric.before, &metric.after].into_iter().flatten().any(unsure) {
                limits.push(format!(
                    "{} has no standard error, so chance cannot be told from a gain.",
                    metric.name
                ));
            }
        }
        if !self.metrics.is_empty() {
            limits.push(
                "One run with one set of seeds: another seed gives other numbers.".to_owned(),
            );
        }
        if self.outcome != Outcome::Finished {
            limits.push(
                "The run did not finish; the numbers are those of the steps it did.".to_owned(),
            );
        }
        self.limits.extend(limits);
    }

    /// Returns the report as JSON, indented.
    ///
    /// Numbers that are not finite, which JSON has no form for, become `null`.
    ///
    /// # Errors
    /// None in practice: every field has a JSON form.
    pub fn to_json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self)
    }

    /// Returns the report as a Markdown page.
    pub fn to_markdown(&self) -> String {
        let mut out = String::new();
        let _ = writeln!(out, "# {}\n", inline(&self.name));
        self.write_summary(&mut out);
        self.write_metrics(&mut out);
        for (caption, path) in &self.plots {
            let _ = writeln!(out, "![{}]({})\n", inline(caption), path.replace(' ', "%20"));
        }
        self.write_examples(&mut out);
        list(&mut out, "Warnings", &self.warnings);
        list(&mut out, "What this does not show", &self.limits);
        self.write_data(&mut out);
        self.write_cost(&mut out);
        let text = |value: &String| format!("`{}`", value.replace('`', "'"));
        pairs(&mut out, "Settings", ["option", "value"], &self.settings, text);
        pairs(&mut out, "Seeds", ["for", "seed"], &self.seeds, u64::to_string);
        pairs(&mut out, "Versions", ["part", "version"], &self.versions, String::clone);
        self.write_machine(&mut out);
        self.write_files(&mut out);
        format!("{}\n", out.trim_end())
    }

    fn write_summary(&self, out: &mut String) {
        let share = self.num_trained as f64 / (self.num_total.max(1)) as f64 * 100.0;
        let _ = writeln!(
            out,
            "`{}` tuned with `{}`: {} of {} numbers trained ({share:.3} %), {} steps. Started {}.\n",
            inline(&self.model),
            inline(&self.method),
            grouped(self.num_trained),
            grouped(self.num_total),
            grouped(self.cost.num_steps),
            inline(&self.started),
        );
        match &self.outcome {
            Outcome::Finished => {}
            Outcome::Stopped { reason } => {
                let _ = writeln!(out, "**Stopped before the end:** {}\n", inline(reason));
            }
            Outcome::Failed { error } => {
                let _ = writeln!(out, "**Failed:** {}\n", inline(error));
            }
        }
    }

    fn write_metrics(&self, out: &mut String) {
        if self.metrics.is_empty() {
            return;
        }
        let _ = writeln!(out, "## Before and after\n");
        let mut rows = Vec::new();
        for metric in &self.metrics {
            let change = match (metric.before, metric.after) {
                (Some(before), Some(after)) => format!("{:+.4}", after.value - before.value),
                _ => "–".to_owned(),
            };
            let verdict = match metric.verdict() {
                Verdict::Better => "better",
                Verdict::Worse => "**worse**",
                Verdict::Unclear => "no clear change",
                Verdict::Unknown => "unknown",
            };
            rows.push([
                inline(&metric.name),
                measured(metric.before),
                measured(metric.after),
                change,
                verdict.to_owned(),
                format!(
                    "{} {}",
                    grouped(metric.num_examples),
                    if metric.held_out { "held out" } else { "from training" }
                ),
            ]);
        }
        table(out, ["measure", "before", "after", "change", "verdict", "examples"], &rows);
    }

    fn write_examples(&self, out: &mut String) {
        if self.examples.is_empty() {
            return;
        }
        let _ = writeln!(out, "## Examples\n");
        for (index, example) in self.examples.iter().enumerate() {
            let _ = writeln!(out, "### Example {}\n", index + 1);
            block(out, "Prompt", &example.prompt);
            if let Some(reference) = &example.reference {
                block(out, "Expected", reference);
            }
            block(out, "Before", &example.before);
            block(out, "After", &example.after);
        }
    }

    fn write_data(&self, out: &mut String) {
        let data = &self.data;
        let mut rows = vec![
            ["source".to_owned(), inline(&data.source)],
            ["examples trained on".to_owned(), grouped(data.num_train)],
            ["examples held out".to_owned(), grouped(data.num_held_out)],
            ["tokens in one pass".to_owned(), grouped(data.num_tokens)],
            ["of these in the loss".to_owned(), grouped(data.num_loss_tokens)],
        ];
        for (reason, num) in &data.left_out {
            rows.push([format!("left out: {}", inline(reason)), grouped(*num)]);
        }
        let _ = writeln!(out, "## Data\n");
        table(out, ["what", "value"], &rows);
    }

    fn write_cost(&self, out: &mut String) {
        let cost = &self.cost;
        let mut rows = vec![
            ["steps".to_owned(), grouped(cost.num_steps)],
            ["tokens seen".to_owned(), grouped(cost.num_tokens)],
            ["time training".to_owned(), duration(cost.train_s)],
            ["time in all".to_owned(), duration(cost.total_s)],
        ];
        if cost.train_s > 0.0 {
            let rate = cost.num_tokens as f64 / cost.train_s;
            rows.push(["tokens per second".to_owned(), format!("{rate:.1}")]);
        }
        if cost.peak_bytes > 0 {
            rows.push(["peak memory".to_owned(), bytes(cost.peak_bytes)]);
        }
        if let Some(energy) = cost.energy_j {
            rows.push(["energy".to_owned(), format!("{:.1} kJ", energy / 1e3)]);
        }
        let _ = writeln!(out, "## Cost\n");
        table(out, ["what", "value"], &rows);
    }

    fn write_machine(&self, out: &mut String) {
        let machine = &self.machine;
        let rows = [
            ["system".to_owned(), inline(&machine.system)],
            ["processor".to_owned(), inline(&machine.processor)],
            ["threads".to_owned(), grouped(machine.num_threads)],
            ["memory".to_owned(), bytes(machine.memory_bytes)],
            ["device".to_owned(), inline(&machine.device)],
        ];
        let _ = writeln!(out, "## Machine\n");
        table(out, ["what", "value"], &rows);
    }

    fn write_files(&self, out: &mut String) {
        if self.files.is_empty() {
            return;
        }
        let _ = writeln!(out, "## Files\n");
        let row = |file: &File| [inline(&file.path), inline(&file.what), bytes(file.num_bytes)];
        let rows: Vec<_> = self.files.iter().map(row).collect();
        table(out, ["file", "what", "size"], &rows);
    }
}

fn measured(value: Option<Measured>) -> String {
    match value {
        None => "–".to_owned(),
        Some(Measured { value, std_error: None }) => format!("{value:.4}"),
        Some(Measured { value, std_error: Some(error) }) => format!("{value:.4} ± {error:.4}"),
    }
}

fn pairs<T>(
    out: &mut String,
    title: &str,
    head: [&str; 2],
    pairs: &[(String, T)],
    show: impl Fn(&T) -> String,
) {
    if pairs.is_empty() {
        return;
    }
    let _ = writeln!(out, "## {title}\n");
    let rows: Vec<_> = pairs.iter().map(|(name, value)| [inline(name), show(value)]).collect();
    table(out, head, &rows);
}

fn table<const N: usize>(out: &mut String, head: [&str; N], rows: &[[String; N]]) {
    let _ = writeln!(out, "| {} |\n|{}", head.join(" | "), "---|".repeat(N));
    for row in rows {
        let cells: Vec<_> =
            row.iter().map(|cell| cell.replace('|', "\\|").replace(['\n', '\r'], " ")).collect();
        let _ = writeln!(out, "| {} |", cells.join(" | "));
    }
    out.push('\n');
}

fn list(out: &mut String, title: &str, items: &[String]) {
    if items.is_empty() {
        return;
    }
    let _ = writeln!(out, "## {title}\n");
    for item in items {
        let _ = writeln!(out, "- {}", inline(item));
    }
    out.push('\n');
}

/// Writes a text as it is, in a fence longer than any row of backticks in it.
fn block(out: &mut String, title: &str, text: &str) {
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest.max(2) + 1);
    let _ = writeln!(out, "{title}:\n\n{fence}text\n{}\n{fence}\n", text.trim_end());
}

/// Puts a text on one line.
fn inline(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Writes a count with a space between thousands.
fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    out
}

fn bytes(bytes: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.iter().find(|(_, shift)| bytes >> shift > 0) {
        _ if bytes == 0 => "–".to_owned(),
        Some((unit, shift)) => format!("{:.2} {unit}", bytes as f64 / (1u64 << shift) as f64),
        None => format!("{bytes} B"),
    }
}

fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "–".to_owned();
    }
    if seconds < 60.0 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    match whole / 3600 {
        0 => format!("{} min {} s", whole / 60, whole % 60),
        hours => format!("{hours} h {} min", whole % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metric(better: Better, before: (f64, f64), after: (f64, f64)) -> Metric {
        let measured = |(value, error)| Some(Measured { value, std_error: Some(error) });
        Metric {
            name: "loss".to_owned(),
            better,
            before: measured(before),
            after: measured(after),
            num_examples: 200,
            held_out: true,
        }
    }

    fn sample() -> RunReport {
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        RunReport {
            name: "people-1".to_owned(),
            model: "smollm2-135m-instruct".to_owned(),
            method: "lora".to_owned(),
            started: "2026-11-23T10:00:00Z".to_owned(),
            num_trained: 460_800,
            num_total: 134_975_808,
            data: DataSummary {
                source: "train.jsonl".to_owned(),
                num_train: 900,
                num_held_out: 50,
                left_out: vec![("longer than 256 tokens".to_owned(), 3)],
                num_tokens: 120_000,
                num_loss_tokens: 40_000,
            },
            cost: Cost {
                num_steps: 200,
                num_tokens: 204_800,
                train_s: 812.0,
                total_s: 4000.4,
                peak_bytes: 3 << 29,
                energy_j: Some(12_345.0),
            },
            metrics: vec![
                metric(Better::Lower, (3.0, 0.1), (1.5, 0.1)),
                Metric {
                    name: "exact | match".to_owned(),
                    better: Better::Higher,
                    before: None,
                    after: Some(Measured { value: 0.5, std_error: None }),
                    num_examples: 12,
                    held_out: false,
                },
            ],
            examples: vec![Example {
                prompt: "Who is Ada?\n".to_owned(),
                reference: Some("A ```counter```.".to_owned()),
                before: "I do not know.".to_owned(),
                after: "A counter.".to_owned(),
            }],
            settings: vec![pair("method.lora.rank", "8"), pair("data.loss_on", "\"assistant\"")],
            seeds: vec![("data".to_owned(), 7)],
            versions: vec![pair("retune", "0.1.0")],
            machine: Machine {
                system: "linux x86_64".to_owned(),
                processor: "EPYC".to_owned(),
                num_threads: 2,
                memory_bytes: 8 << 30,
                device: "cpu".to_owned(),
            },
            files: vec![File {
                path: "adapter/adapter_model.safetensors".to_owned(),
                what: "the adapter".to_owned(),
                num_bytes: 1_843_200,
            }],
            plots: vec![pair("Loss", "plots/loss.svg")],
            warnings: vec!["3 examples were\ntoo long".to_owned()],
            ..RunReport::default()
        }
    }

    #[test]
    fn verdict_needs_two_standard_errors() {
        let verdict = |better, before, after| metric(better, before, after).verdict();
        // Error of the difference: hypot(0.3, 0.4) = 0.5, so 1.0 is the border.
        assert_eq!(verdict(Better::Lower, (3.0, 0.3), (1.9, 0.4)), Verdict::Better);
        assert_eq!(verdict(Better::Lower, (3.0, 0.3), (2.1, 0.4)), Verdict::Unclear);
        assert_eq!(verdict(Better::Higher, (3.0, 0.3), (1.9, 0.4)), Verdict::Worse);
        assert_eq!(verdict(Better::Higher, (1.0, 0.0), (1.0, 0.0)), Verdict::Unclear);
        assert_eq!(verdict(Better::Higher, (1.0, 0.0), (f64::NAN, 0.0)), Verdict::Unknown);
    }

    #[test]
    fn limits_follow_from_the_numbers() {
        let mut report = sample();
        report.infer_limits();
        let limits = report.limits.join("\n");
        assert!(limits.contains("exact | match was not measured before training"));
        assert!(limits.contains("exact | match was measured on training data"));
        assert!(limits.contains("exact | match rests on 12 examples"));
        assert!(!limits.contains("loss rests on"));
        assert!(limits.contains("exact | match has no standard error"));
        assert_eq!(report.limits.len(), 5);

        let mut nothing = RunReport::default();
        nothing.infer_limits();
        assert_eq!(nothing.limits.len(), 1);
    }

    #[test]
    fn json_gives_the_same_report_back() {
        let mut report = sample();
        report.outcome = Outcome::Stopped { reason: "Ctrl-C".to_owned() };
        let json = report.to_json().unwrap();
        assert_eq!(serde_json::from_str::<RunReport>(&json).unwrap(), report);

        report.metrics[0].after = Some(Measured { value: f64::NAN, std_error: None });
        let json = report.to_json().unwrap();
        let read: RunReport = serde_json::from_str(&json).unwrap();
        assert!(read.metrics[0].after.unwrap().value.is_nan());
    }

    #[test]
    fn page_is_this() {
        let mut report = sample();
        report.infer_limits();
        insta::assert_snapshot!(report.to_markdown());
    }

    #[test]
    fn numbers_are_written_for_people() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1_234_567), "1\u{202f}234\u{202f}567");
        assert_eq!(duration(59.94), "59.9 s");
        assert_eq!(duration(61.0), "1 min 1 s");
        assert_eq!(duration(7260.0), "2 h 1 min");
        assert_eq!(bytes(1536), "1.50 KiB");
    }
}
