//! Rotary position embedding: the frequencies of each scaling in use.

use std::f64::consts::TAU;

use crate::config::Config;
use retune_core::Result;
use retune_core::pass::Rope;

/// Reads the rope of a model whose configuration has one kind of layer.
///
/// Accepts both spellings: `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling`.
///
/// # Errors
/// If a scaling is unknown or one of its numbers is missing.
pub(crate) fn read(config: &Config, rotated: usize) -> Result<Rope> {
    let parameters = config.part("rope_parameters").or_else(|| config.part("rope_scaling"));
    let theta = match &parameters {
        Some(part) => part.number("rope_theta")?,
        None => None,
    };
    let theta = match theta {
        Some(theta) => theta,
        None => config.number("rope_theta")?.unwrap_or(10_000.0),
    };
    build(config, parameters.as_ref(), theta, rotated)
}

/// Builds the rope for one base frequency and scaling.
///
/// # Errors
/// If the scaling is unknown or one of its numbers is missing.
pub(crate) fn build(
    config: &Config,
    parameters: Option<&Config>,
    theta: f64,
    rotated: usize,
) -> Result<Rope> {
    let plain: Vec<f64> =
        (0..rotated / 2).map(|i| theta.powf(-(2.0 * i as f64) / rotated as f64)).collect();
    let Some(part) = parameters else { return Ok(rope(plain, 1.0)) };
    let kind = match part.text("rope_type")? {
        Some(kind) => kind,
        None => part.text("type")?.unwrap_or("default"),
    };
    let factor = || {
        part.number("factor")?.ok_or_else(|| part.unknown("factor", "the scaling's factor"))
    };
    match kind {
        "default" => Ok(rope(plain, 1.0)),
        "linear" => {
            let factor = factor()?;
            Ok(rope(plain.into_iter().map(|f| f / factor).collect(), 1.0))
        }
        "llama3" => {
            let factor = factor()?;
            let low = part.number("low_freq_factor")?.unwrap_or(1.0);
            let high = part.number("high_freq_factor")?.unwrap_or(4.0);
            let original = original_length(config, part)?;
            let scaled = plain.into_iter().map(|f| {
                let wavelength = TAU / f;
                if wavelength < original / high {
                    f
                } else if wavelength > original / low {
                    f / factor
                } else {
                    let smooth = (original / wavelength - low) / (high - low);
                    (1.0 - smooth) * f / factor + smooth * f
                }
            });
            Ok(rope(scaled.collect(), 1.0))
        }
        "yarn" => {
            let factor = factor()?;
            let original = original_length(config, part)?;
            let fast = part.number("beta_fast")?.unwrap_or(32.0);
            let slow = part.number("beta_slow")?.unwrap_or(1.0);
            // The pair that turns `rotations` times over the original length.
            let pair = |rotations: f64| {
                rotated as f64 * (original / (rotations * TAU)).ln() / (2.0 * theta.ln())
            };
            let first = pair(fast).floor().max(0.0);
            let last = pair(slow).ceil().min(rotated as f64 - 1.0);
            let span = if last > first { last - first } else { 0.001 };
            let scaled = plain.into_iter().enumerate().map(|(i, f)| {
                let keep = 1.0 - ((i as f64 - first) / span).clamp(0.0, 1.0);
                f / factor * (1.0 - keep) + f * keep
            });
            let attention = match part.number("attention_factor")? {
                Some(attention) => attention,
                None if factor > 1.0 => 0.1 * factor.ln() + 1.0,
                None => 1.0,
            };
            Ok(rope(scaled.collect(), attention))
        }
        _ => Err(part.unknown("rope_type", "default, linear, llama3 or yarn")),
    }
}

fn original_length(config: &Config, part: &Config) -> Result<f64> {
    match part.number("original_max_position_embeddings")? {
        Some(length) => Ok(length),
        None => Ok(config.size("max_position_embeddings")? as f64),
    }
}

fn rope(frequencies: Vec<f64>, scale: f64) -> Rope {
    Rope { inverse_frequencies: frequencies.into(), scale }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::path::Path;

    fn read_json(value: serde_json::Value) -> Result<Rope> {
        read(&Config::new(Path::new("config.json"), value), 4)
    }

    #[test]
    fn both_spellings_give_the_same_frequencies() {
        let old = read_json(json!({"rope_theta": 100.0})).unwrap();
        let new = read_json(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}));
        assert_eq!(old, new.unwrap());
        assert!((old.inverse_frequencies[1] - 0.1).abs() < 1e-15);
    }

    #[test]
    fn llama3_scales_long_waves_only() {
        let rope = read_json(json!({"rope_theta": 10000.0, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}))
        .unwrap();
        // Wavelengths are 6.28 (shorter than 32/4 = 8: kept) and 628 (longer than 32: divided by 8).
        assert!((rope.inverse_frequencies[0] - 1.0).abs() < 1e-15);
        assert!((rope.inverse_frequencies[1] - 0.01 / 8.0).abs() < 1e-15);
    }

    #[test]
    fn an_unknown_scaling_is_named() {
        let error = read_json(json!({"rope_scaling": {"type": "spiral"}})).unwrap_err();
        assert!(error.to_string().contains("spiral"), "{error}");
    }
}
