//! One recipe under many methods: which runs there are, and what their reports say together.
//!
//! The program carries each run out in a process of its own, so that memory is measured per run
//! and one that dies takes no other with it. Here is everything else.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::artefacts::plot::Scale;
use crate::artefacts::report::RunReport;
use crate::artefacts::scatter::{Panel, Point, Scatter};
use crate::error::{Error, Result};
use crate::recipe::Recipe;
use retune_options::Report;

/// One run of a comparison.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arm {
    /// The method's name.
    pub method: String,
    /// What tells it from other runs of the method, where there are any beside its seeds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// The run's seed.
    pub seed: u64,
}

impl Arm {
    /// Returns the run's name, which is that of its recipe too.
    pub fn name(&self) -> String {
        match &self.variant {
            Some(variant) => format!("{}-{variant}-seed{}", self.method, self.seed),
            None => format!("{}-seed{}", self.method, self.seed),
        }
    }
}

/// How far an arm got in an earlier attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// Nothing is there, or it belongs to another recipe.
    Absent,
    /// The run was interrupted.
    Cut(PathBuf),
    /// The run is over.
    Finished(PathBuf),
}

/// Makes the recipe of one arm: the method's own table where the recipe has one, else its
/// defaults, with every default filled in.
///
/// # Errors
/// A report of all mistakes.
pub fn arm_recipe(
    file_name: &str,
    bytes: &[u8],
    overrides: &[String],
    arm: &Arm,
    folder: &Path,
) -> Result<String, Report> {
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let mut overrides = overrides.to_vec();
    overrides.push(format!("seed={}", arm.seed));
    overrides.push(format!("name={}", quoted(&arm.name())));
    overrides.push(format!("runs={}", quoted(&folder.display().to_string())));
    let (recipe, _) = Recipe::parse_as(file_name, bytes, &overrides, Some(&arm.method))?;
    Ok(recipe.resolved)
}

/// Looks what an earlier attempt left of an arm with this very recipe.
///
/// # Errors
/// If the folder cannot be read.
pub fn standing(folder: &Path, arm: &Arm, recipe: &str) -> Result<Standing> {
    let mut found = Standing::Absent;
    for number in 1_u32.. {
        let run = folder.join(format!("{}-{number}", arm.name()));
        if !run.is_dir() {
            return Ok(found);
        }
        let same = std::fs::read_to_string(run.join("recipe.toml")).is_ok_and(|old| old == recipe);
        if same && run.join("report.json").is_file() {
            return Ok(Standing::Finished(run));
        }
        if same && run.join("plan.json").is_file() {
            found = Standing::Cut(run);
        }
    }
    Ok(found)
}

/// What one arm ended with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ArmResult {
    /// Which run.
    pub arm: Arm,
    /// Its folder, below the comparison's.
    pub folder: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
    /// Metrics after training.
    pub metrics: Vec<(String, f64)>,
    /// Metrics of the base.
    pub before: Vec<(String, f64)>,
    /// Values that trained.
    pub num_trained: u64,
    /// Optimiser steps.
    pub num_steps: u64,
    /// Seconds of training.
    pub train_s: f64,
    /// Largest resident memory of the run's process, in bytes; 0 where it is not known.
    pub peak_bytes: u64,
}

impl ArmResult {
    /// Reads the report of a finished run.
    ///
    /// # Errors
    /// If `report.json` is absent or not a report.
    pub fn read(arm: Arm, run: &Path) -> Result<Self> {
        let path = run.join("report.json");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, "read", e))?;
        let report: RunReport = serde_json::from_str(&text).map_err(|error| Error::Run {
            path: path.clone(),
            what: "the report cannot be read".to_owned(),
            expected: "the file `retune run` wrote".to_owned(),
            found: error.to_string(),
            help: "delete this run's folder and compare again".to_owned(),
        })?;
        let folder = run.file_name().map(|name| name.to_string_lossy().into_owned());
        let after =
            report.metrics.iter().filter_map(|m| Some((m.name.clone(), m.after.as_ref()?.value)));
        let before =
            report.metrics.iter().filter_map(|m| Some((m.name.clone(), m.before.as_ref()?.value)));
        Ok(Self {
            arm,
            folder,
            error: None,
            metrics: after.collect(),
            before: before.collect(),
            num_trained: report.num_trained,
            num_steps: report.cost.num_steps,
            train_s: report.cost.train_s,
            peak_bytes: report.cost.peak_bytes,
        })
    }

    /// Notes that an arm failed.
    pub fn failed(arm: Arm, error: String) -> Self {
        Self {
            arm,
            folder: None,
            error: Some(error),
            metrics: Vec::new(),
            before: Vec::new(),
            num_trained: 0,
            num_steps: 0,
            train_s: 0.0,
            peak_bytes: 0,
        }
    }

    /// Returns a metric after training.
    pub fn metric(&self, name: &str) -> Option<f64> {
        self.metrics.iter().find(|(known, _)| known == name).map(|(_, value)| *value)
    }
}

/// Returns the metric runs are measured by, and whether less of it is better: the first of their
/// reports' that is no loss, unless one is named.
///
/// # Errors
/// [`Error::Plan`] if no run has a metric of the name asked for.
pub fn usual_metric(runs: &[&ArmResult], metric: Option<&str>) -> Result<(String, bool)> {
    let mut known: Vec<&str> = Vec::new();
    for (name, _) in runs.iter().flat_map(|run| &run.metrics) {
        if !known.contains(&name.as_str()) {
            known.push(name);
        }
    }
    let is_loss = |name: &str| matches!(name, "loss" | "perplexity");
    let usual = known.iter().find(|name| !is_loss(name)).or(known.first()).copied();
    let chosen = metric.or(usual).unwrap_or("loss").to_owned();
    if !known.is_empty() && !known.contains(&chosen.as_str()) {
        return Err(Error::Plan {
            what: format!("no run measured `{chosen}`"),
            expected: format!("one of {}", known.join(", ")),
            found: chosen,
            help: "give another name with --metric, or none".to_owned(),
        });
    }
    let lower_is_better = is_loss(&chosen);
    Ok((chosen, lower_is_better))
}

/// All seeds of one method together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// The method's name.
    pub method: String,
    /// Seeds that finished.
    pub num_finished: usize,
    /// Seeds that failed.
    pub num_failed: usize,
    /// Mean of the metric over the finished seeds.
    pub mean: f64,
    /// Standard deviation of the metric over the finished seeds; 0 for one seed.
    pub deviation: f64,
    /// Values that trained.
    pub num_trained: u64,
    /// Mean seconds of training.
    pub train_s: f64,
    /// Largest memory of any seed, in bytes.
    pub peak_bytes: u64,
    /// The first error, if a seed failed.
    pub error: Option<String>,
}

/// A comparison that is over.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// The recipe's name.
    pub name: String,
    /// What the methods are compared by.
    pub metric: String,
    /// Whether less of it is better.
    pub lower_is_better: bool,
    /// The metric of the base, where it was measured.
    pub base: Option<f64>,
    /// One row per method, best first, those without a result last.
    pub rows: Vec<Row>,
    /// Every run.
    pub runs: Vec<ArmResult>,
}

impl Comparison {
    /// Puts results together; `metric` is the first of the reports' that is no loss, unless named.
    ///
    /// # Errors
    /// [`Error::Plan`] if no run has a metric of the name asked for.
    pub fn of(name: &str, metric: Option<&str>, runs: Vec<ArmResult>) -> Result<Self> {
        let (chosen, lower_is_better) = usual_metric(&runs.iter().collect::<Vec<_>>(), metric)?;
        let mut rows: Vec<Row> = Vec::new();
        for run in &runs {
            if !rows.iter().any(|row| row.method == run.arm.method) {
                rows.push(row(&runs, &run.arm.method, &chosen));
            }
        }
        rows.sort_by(|a, b| match (a.mean.is_nan(), b.mean.is_nan()) {
            (false, false) if lower_is_better => a.mean.total_cmp(&b.mean),
            (false, false) => b.mean.total_cmp(&a.mean),
            (a, b) => a.cmp(&b),
        });
        let base = runs
            .iter()
            .flat_map(|run| &run.before)
            .find(|(name, _)| *name == chosen)
            .map(|(_, value)| *value);
        Ok(Self { name: name.to_owned(), metric: chosen, lower_is_better, base, rows, runs })
    }

    /// Draws the metric against values that train, seconds and memory.
    pub fn chart(&self) -> Scatter {
        let panel = |x_label: &str, scale: Scale, cost: &dyn Fn(&Row) -> f64| Panel {
            x_label: x_label.to_owned(),
            scale,
            points: self
                .rows
                .iter()
                .filter(|row| row.num_finished > 0)
                .map(|row| Point {
                    name: row.method.clone(),
                    x: cost(row),
                    y: row.mean,
                    spread: row.deviation,
                })
                .collect(),
        };
        let better = if self.lower_is_better { "lower" } else { "higher" };
        Scatter {
            title: format!("{}: {} of each method", self.name, self.metric),
            y_label: format!("{} ({better} is better)", self.metric),
            panels: vec![
                panel("values that train", Scale::Log, &|row| row.num_trained as f64),
                panel("seconds of training", Scale::Linear, &|row| row.train_s),
                panel("peak memory, MiB", Scale::Linear, &|row| row.peak_bytes as f64 / MEBIBYTE),
            ],
        }
    }

    /// Writes the table and what goes with it as a page.
    pub fn to_markdown(&self) -> String {
        let mut out = format!("# {}: methods compared\n\n", self.name);
        let better = if self.lower_is_better { "Lower" } else { "Higher" };
        let steps = self.runs.iter().map(|run| run.num_steps).max().unwrap_or(0);
        let _ = writeln!(
            out,
            "{better} `{}` is better. Every method had {steps} steps on the same rows; ± is the \
             standard deviation over seeds.\n",
            self.metric
        );
        if let Some(base) = self.base {
            let _ = writeln!(out, "The base, untuned: {base:.4}.\n");
        }
        let _ = writeln!(
            out,
            "| method | {} | seeds | values that train | training | peak memory |",
            self.metric
        );
        out.push_str("|---|---|---|---|---|---|\n");
        for row in &self.rows {
            let _ = writeln!(out, "| {} |", row.cells().join(" | "));
        }
        out.push_str("\n![each method's measure against its costs](compare.svg)\n");
        let failed: Vec<&ArmResult> = self.runs.iter().filter(|run| run.error.is_some()).collect();
        if !failed.is_empty() {
            out.push_str("\n## Failed\n\n");
        }
        for run in failed {
            let error = run.error.as_deref().unwrap_or_default();
            let _ = writeln!(out, "### {}\n\n```text\n{}\n```\n", run.arm.name(), error.trim_end());
        }
        out
    }
}

const MEBIBYTE: f64 = 1024.0 * 1024.0;

impl Row {
    /// Returns the cells of the table's row.
    pub fn cells(&self) -> Vec<String> {
        let seeds = match (self.num_finished, self.num_failed) {
            (done, 0) => done.to_string(),
            (done, failed) => format!("{done} ({failed} failed)"),
        };
        if self.num_finished == 0 {
            let dash = "–".to_owned();
            return vec![
                self.method.clone(),
                "failed".to_owned(),
                seeds,
                dash.clone(),
                dash.clone(),
                dash,
            ];
        }
        let mean = if self.num_finished > 1 {
            format!("{:.4} ± {:.4}", self.mean, self.deviation)
        } else {
            format!("{:.4}", self.mean)
        };
        vec![
            self.method.clone(),
            mean,
            seeds,
            self.num_trained.to_string(),
            format!("{:.1} s", self.train_s),
            format!("{:.0} MiB", self.peak_bytes as f64 / MEBIBYTE),
        ]
    }
}

fn row(runs: &[ArmResult], method: &str, metric: &str) -> Row {
    let of: Vec<&ArmResult> = runs.iter().filter(|run| run.arm.method == method).collect();
    let finished: Vec<&&ArmResult> = of.iter().filter(|run| run.error.is_none()).collect();
    let values: Vec<f64> = finished.iter().filter_map(|run| run.metric(metric)).collect();
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let middle = mean(&values);
    let deviation = match values.len() {
        0 | 1 => 0.0,
        n => (values.iter().map(|v| (v - middle).powi(2)).sum::<f64>() / (n - 1) as f64).sqrt(),
    };
    let times: Vec<f64> = finished.iter().map(|run| run.train_s).collect();
    Row {
        method: method.to_owned(),
        num_finished: finished.len(),
        num_failed: of.len() - finished.len(),
        mean: middle,
        deviation,
        num_trained: finished.iter().map(|run| run.num_trained).max().unwrap_or(0),
        train_s: if times.is_empty() { 0.0 } else { mean(&times) },
        peak_bytes: finished.iter().map(|run| run.peak_bytes).max().unwrap_or(0),
        error: of.iter().find_map(|run| run.error.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arm(method: &str, seed: u64) -> Arm {
        Arm { method: method.to_owned(), variant: None, seed }
    }

    fn result(method: &str, seed: u64, loss: f64, accuracy: f64) -> ArmResult {
        ArmResult {
            metrics: vec![("loss".to_owned(), loss), ("accuracy".to_owned(), accuracy)],
            before: vec![("accuracy".to_owned(), 0.25)],
            error: None,
            num_trained: 100,
            num_steps: 10,
            train_s: seed as f64,
            peak_bytes: 1 << 20,
            ..ArmResult::failed(arm(method, seed), String::new())
        }
    }

    #[test]
    fn rows_hold_mean_and_deviation_best_first() {
        let runs = vec![
            result("lora", 1, 2.0, 0.5),
            result("lora", 2, 1.0, 0.7),
            result("full", 1, 0.5, 0.9),
            ArmResult::failed(arm("full", 2), "no".to_owned()),
            ArmResult::failed(arm("ssf", 1), "never".to_owned()),
        ];
        let found = Comparison::of("people", None, runs.clone()).unwrap();
        assert_eq!((found.metric.as_str(), found.base), ("accuracy", Some(0.25)));
        let names: Vec<&str> = found.rows.iter().map(|row| row.method.as_str()).collect();
        assert_eq!(names, ["full", "lora", "ssf"]);
        let lora = &found.rows[1];
        // Mean of 0.5 and 0.7; their deviation is sqrt(2 · 0.1² / 1).
        assert!(
            (lora.mean - 0.6).abs() < 1e-12 && (lora.deviation - 0.02_f64.sqrt()).abs() < 1e-12
        );
        assert_eq!((lora.train_s, found.rows[0].num_failed), (1.5, 1));
        let page = found.to_markdown();
        assert!(page.contains("| full | 0.9000 | 1 (1 failed) | 100 | 1.0 s | 1 MiB |"), "{page}");
        assert!(page.contains("| ssf | failed | 0 (1 failed) | – | – | – |"), "{page}");
        assert!(page.contains("never"), "{page}");
        let by_loss = Comparison::of("people", Some("loss"), runs.clone()).unwrap();
        assert!(by_loss.lower_is_better && by_loss.rows[0].method == "full");
        let error = Comparison::of("people", Some("f1"), runs).unwrap_err().to_string();
        assert!(error.contains("loss, accuracy"), "{error}");
    }

    #[test]
    fn an_arm_takes_its_own_table_and_nobody_elses() {
        let recipe = b"model = \"builtin:tiny\"\n[data]\ntrain = \"rows.jsonl\"\n[method.lora]\nrank = 3\n[method.full]\nfreeze = [\"lm_head\"]\n";
        let arm = |method: &str| arm(method, 7);
        let folder = Path::new("/tmp/compare");
        let lora = arm_recipe("/tmp/r.toml", recipe, &[], &arm("lora"), folder).unwrap();
        assert!(lora.contains("rank = 3") && lora.contains("seed = 7"), "{lora}");
        assert!(lora.contains("name = \"lora-seed7\"") && !lora.contains("lm_head"), "{lora}");
        let full = arm_recipe("/tmp/r.toml", recipe, &[], &arm("full"), folder).unwrap();
        assert!(full.contains("lm_head") && !full.contains("rank"), "{full}");
        assert!(arm_recipe("/tmp/r.toml", recipe, &[], &arm("nothing"), folder).is_err());
        // What is written is read back the same, which is how a finished run is found again.
        let again = Recipe::parse("/tmp/r.toml", lora.as_bytes(), &[]).unwrap().0;
        assert_eq!(again.resolved, lora);
    }

    #[test]
    fn an_earlier_attempt_is_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let arm = arm("lora", 1);
        let make = |number: u32, recipe: &str, files: &[&str]| {
            let run = folder.path().join(format!("lora-seed1-{number}"));
            std::fs::create_dir(&run).unwrap();
            std::fs::write(run.join("recipe.toml"), recipe).unwrap();
            for file in files {
                std::fs::write(run.join(file), "{}").unwrap();
            }
            run
        };
        let found = || standing(folder.path(), &arm, "new").unwrap();
        assert_eq!(found(), Standing::Absent);
        make(1, "old", &["plan.json", "report.json"]);
        assert_eq!(found(), Standing::Absent);
        let cut = make(2, "new", &["plan.json"]);
        assert_eq!(found(), Standing::Cut(cut));
        let whole = make(3, "new", &["plan.json", "report.json"]);
        assert_eq!(found(), Standing::Finished(whole));
    }
}
