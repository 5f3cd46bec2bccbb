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
/// If a scaling is unknown or one of its numbers is missing or impossible.
pub(crate) fn read(config: &Config, rotated: usize) -> Result<Rope> {
    let part = config.part("rope_scaling")?;
    let part = if part.is_some() { part } else { config.part("rope_parameters")? };
    let inner = part.as_ref().map(|part| part.positive("rope_theta")).transpose()?.flatten();
    let theta = match inner {
        Some(theta) => theta,
        None => config.positive("rope_theta")?.unwrap_or(10_000.0),
    };
    build(config, part.as_ref(), theta, rotated)
}

/// Reads the rope of one of several kinds of layer.
///
/// Accepts `rope_parameters` by kind, and the older spelling in which each kind has a key for its
/// base and `rope_scaling` holds for full attention alone.
///
/// # Errors
/// As [`read`].
pub(crate) fn read_for(
    config: &Config,
    kind: &str,
    base_key: &str,
    usual: f64,
    rotated: usize,
) -> Result<Rope> {
    let by_kind = match config.part("rope_parameters")? {
        Some(parts) => parts.part(kind)?,
        None if kind == "full_attention" => config.part("rope_scaling")?,
        None => None,
    };
    let inner = by_kind.as_ref().map(|part| part.positive("rope_theta")).transpose()?.flatten();
    let theta = match inner {
        Some(theta) => theta,
        None => config.positive(base_key)?.unwrap_or(usual),
    };
    build(config, by_kind.as_ref(), theta, rotated)
}

fn build(config: &Config, part: Option<&Config>, theta: f64, rotated: usize) -> Result<Rope> {
    let base = |i: usize| theta.powf(-(2.0 * i as f64) / rotated as f64);
    let plain: Vec<f64> = (0..rotated / 2).map(base).collect();
    let Some(part) = part else { return Ok(rope(plain, 1.0)) };
    for place in [config, part] {
        if place.number("partial_rotary_factor")?.is_some_and(|share| share != 1.0) {
            return Err(place.unknown("partial_rotary_factor", "1: heads are rotated whole"));
        }
    }
    let kind = match part.text("rope_type")? {
        Some(kind) => kind,
        None => part.text("type")?.unwrap_or("default"),
    };
    let factor =
        || part.positive("factor")?.ok_or_else(|| part.unknown("factor", "the scaling's factor"));
    match kind {
        "default" => Ok(rope(plain, 1.0)),
        "linear" => {
            let factor = factor()?;
            Ok(rope(plain.into_iter().map(|f| f / factor).collect(), 1.0))
        }
        "llama3" => {
            let factor = factor()?;
            let low = part.positive("low_freq_factor")?.unwrap_or(1.0);
            let high = part.positive("high_freq_factor")?.unwrap_or(4.0);
            if high <= low {
                return Err(part.unknown("high_freq_factor", "more than low_freq_factor"));
            }
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
            let fast = part.positive("beta_fast")?.unwrap_or(32.0);
            let slow = part.positive("beta_slow")?.unwrap_or(1.0);
            if theta <= 1.0 {
                return Err(part.unknown("rope_theta", "more than 1, as yarn needs"));
            }
            // The pair that turns `rotations` times over the original length.
            let pair = |rotations: f64| {
                rotated as f64 * (original / (rotations * TAU)).ln() / (2.0 * theta.ln())
            };
            let (mut first, mut last) = (pair(fast), pair(slow));
            if part.switch("truncate", true)? {
                (first, last) = (first.floor(), last.ceil());
            }
            let (first, last) = (first.max(0.0), last.min(rotated as f64 - 1.0));
            let span = if first == last { 0.001 } else { last - first };
            let scaled = plain.into_iter().enumerate().map(|(i, f)| {
                let keep = 1.0 - ((i as f64 - first) / span).clamp(0.0, 1.0);
                f / factor * (1.0 - keep) + f * keep
            });
            let usual =
                |weight: f64| if factor > 1.0 { 0.1 * weight * factor.ln() + 1.0 } else { 1.0 };
            let weights = (part.positive("mscale")?, part.positive("mscale_all_dim")?);
            let attention = match (part.positive("attention_factor")?, weights) {
                (Some(attention), _) => attention,
                (None, (Some(weight), Some(all))) => usual(weight) / usual(all),
                (None, _) => usual(1.0),
            };
            Ok(rope(scaled.collect(), attention))
        }
        _ => {
            let key = if part.get("rope_type").is_some() { "rope_type" } else { "type" };
            Err(part.unknown(key, "default, linear, llama3 or yarn"))
        }
    }
}

fn original_length(config: &Config, part: &Config) -> Result<f64> {
    match part.positive("original_max_position_embeddings")? {
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
        let new =
            read_json(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}));
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
    fn kinds_of_layers_have_their_own_base() {
        let both = |value: serde_json::Value| {
            let config = Config::new(Path::new("config.json"), value);
            let read = |kind, key, usual| read_for(&config, kind, key, usual, 4).unwrap();
            [
                read("full_attention", "rope_theta", 1e6).inverse_frequencies[1],
                read("sliding_attention", "rope_local_base_freq", 1e4).inverse_frequencies[1],
            ]
        };
        let close = |found: [f64; 2], expected: [f64; 2]| {
            assert!(found.iter().zip(expected).all(|(f, e)| (f - e).abs() < 1e-15), "{found:?}");
        };
        close(both(json!({})), [1e-3, 1e-2]);
        close(both(json!({"rope_theta": 100.0, "rope_local_base_freq": 4.0})), [0.1, 0.5]);
        let linear = json!({"type": "linear", "factor": 4.0});
        close(both(json!({"rope_theta": 100.0, "rope_scaling": linear})), [0.025, 1e-2]);
        close(
            both(json!({"rope_parameters": {"full_attention": {"rope_theta": 100.0},
                "sliding_attention": {"rope_theta": 4.0}}})),
            [0.1, 0.5],
        );
    }

    #[test]
    fn an_unknown_scaling_is_named() {
        let error = read_json(json!({"rope_scaling": {"type": "spiral"}})).unwrap_err();
        assert!(error.to_string().contains("spiral"), "{error}");
    }
}
