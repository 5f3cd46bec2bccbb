//! What several methods check about their options, with one wording.

use std::collections::BTreeMap;

use retune_core::targets::pattern_value;
use retune_core::{Error, Result};

use crate::frame::Target;

/// Returns the value of the first pattern that matches the target, or the usual one.
///
/// # Errors
/// [`Error::Setting`] if a pattern is a malformed regular expression; `setting` names the table.
pub fn by_pattern<T: Copy>(
    table: &BTreeMap<String, T>,
    target: &Target,
    usual: T,
    setting: &str,
) -> Result<T> {
    let entries = table.iter().map(|(key, value)| (key.as_str(), *value));
    let found = pattern_value(entries, &target.module, &format!("method.{setting}"))?;
    Ok(found.unwrap_or(usual))
}

/// Returns how many entries of the target's matrix train, by pattern or the usual number.
///
/// # Errors
/// [`Error::Setting`] if it is zero or more than the matrix has, or a pattern is malformed.
pub fn num_entries(
    method: &str,
    pattern: &BTreeMap<String, usize>,
    usual: usize,
    target: &Target,
) -> Result<usize> {
    let setting = format!("{method}.n_frequency");
    let count = by_pattern(pattern, target, usual, &format!("{setting}_pattern"))?;
    let most = target.rows * target.columns;
    if count > most || count == 0 {
        return Err(above(&setting, target, most, count));
    }
    Ok(count)
}

/// Returns the rank if the target's matrix can have it.
///
/// # Errors
/// [`Error::Setting`] if it is above the full rank.
pub fn rank(method: &str, rank: usize, target: &Target) -> Result<usize> {
    let most = target.rows.min(target.columns);
    if rank > most {
        return Err(above(&format!("{method}.rank"), target, most, rank));
    }
    Ok(rank)
}

/// Returns the error of a number that is too large for a target.
pub fn above(setting: &str, target: &Target, most: usize, found: usize) -> Error {
    let name = setting.rsplit('.').next().unwrap_or(setting);
    Error::Setting {
        setting: format!("method.{setting}"),
        what: format!("too large for {}", target.module),
        expected: format!("at most {most} for a {} x {} weight", target.rows, target.columns),
        found: found.to_string(),
        help: format!("lower `{name}`, or leave this module out with `exclude`"),
    }
}

/// Checks that `number` divides `width`, one of the target's two.
///
/// # Errors
/// [`Error::Setting`] that names the nearest divisors.
pub fn divides(setting: &str, target: &Target, number: usize, width: usize) -> Result<()> {
    if number > 0 && width.is_multiple_of(number) {
        return Ok(());
    }
    let below = (1..number.min(width + 1)).rev().find(|n| width.is_multiple_of(*n)).unwrap_or(1);
    let after = (number + 1..=width).find(|n| width.is_multiple_of(*n));
    let after = after.map(|after| format!(" or {after}")).unwrap_or_default();
    let name = setting.rsplit('.').next().unwrap_or(setting);
    Err(Error::Setting {
        setting: format!("method.{setting}"),
        what: format!("does not divide the width {width} of {}", target.module),
        expected: format!("a divisor, such as {below}{after}"),
        found: number.to_string(),
        help: format!("change `{name}`, or leave this module out with `exclude`"),
    })
}

/// Returns the most outputs and the most inputs any target has.
pub fn widest(targets: &[Target]) -> (usize, usize) {
    let most = |side: fn(&Target) -> usize| targets.iter().map(side).max().unwrap_or(0);
    (most(|target| target.rows), most(|target| target.columns))
}

/// Returns the number of entries of a target, which places of single entries stay below.
///
/// # Errors
/// [`Error::Setting`] if 32 bits do not count them.
pub fn index_limit(method: &str, target: &Target) -> Result<i32> {
    let count = target.rows * target.columns;
    i32::try_from(count).map_err(|_| Error::Setting {
        setting: format!("method.{method}.targets"),
        what: format!("{} has too many entries", target.module),
        expected: format!("at most {}", i32::MAX),
        found: count.to_string(),
        help: "leave this module out with `exclude`".to_owned(),
    })
}
