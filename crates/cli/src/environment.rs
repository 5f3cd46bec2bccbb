//! Clock, folders and machine, read once for the libraries.

use std::time::{SystemTime, UNIX_EPOCH};

use retune_hub::HubEnvironment;
use retune_run::artefacts::report::Machine;

use crate::failure::Failure;

/// Returns seconds since 1970.
pub(crate) fn clock() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// Reads where models are kept and how the hub is reached.
pub(crate) fn hub() -> Result<HubEnvironment, Failure> {
    let folder = std::env::current_dir()
        .map_err(|error| Failure::Failed(format!("the working folder cannot be read: {error}")))?;
    Ok(HubEnvironment::from_variables(folder, |name| std::env::var_os(name))?)
}

/// Returns the peak resident memory of this process in bytes, where Linux tells.
pub(crate) fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kibibytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kibibytes * 1024)
}

/// Describes the machine for the report.
pub(crate) fn machine() -> Machine {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, key: &str| {
        text.lines()
            .find(|line| line.starts_with(key))
            .and_then(|line| line.split(':').nth(1))
            .map(|value| value.trim().to_owned())
    };
    let processor = field(&read("/proc/cpuinfo"), "model name")
        .unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let memory = field(&read("/proc/meminfo"), "MemTotal")
        .and_then(|value| value.split_whitespace().next()?.parse::<u64>().ok())
        .map_or(0, |kibibytes| kibibytes * 1024);
    Machine {
        system: std::env::consts::OS.to_owned(),
        processor,
        num_threads: rayon::current_num_threads() as u64,
        memory_bytes: memory,
        device: "processor".to_owned(),
    }
}
