//! Which modules a method changes, chosen the way the PEFT library chooses them.

use regex::Regex;

use crate::error::{Error, Result};
use crate::names::nearest_list;
use crate::spec::{Kind, ModelSpec, Role, WeightSpec};

/// A choice of modules.
///
/// `names` follows PEFT: a list matches by suffix (`q_proj` matches `…self_attn.q_proj`), a single
/// entry with regular-expression signs matches the whole path, and `all-linear` is every linear
/// layer except the output head. An empty list means the method's default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Targets {
    /// Suffixes, one regular expression, or `all-linear`.
    pub names: Vec<String>,
    /// Left out again, matched the same way.
    pub exclude: Vec<String>,
    /// Only these blocks; empty means all.
    pub layers: Vec<usize>,
}

/// Which weights a [`Targets`] looks among.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Among {
    /// Linear layers, the output head included.
    Linears,
    /// Linear layers and embeddings.
    LinearsAndEmbeddings,
    /// Every module with a weight.
    Modules,
}

impl Among {
    fn takes(self, weight: &WeightSpec) -> bool {
        match self {
            Self::Linears => weight.is_linear(),
            Self::LinearsAndEmbeddings => weight.is_linear() || weight.kind == Kind::Embedding,
            Self::Modules => weight.kind != Kind::Bias,
        }
    }

    fn what(self) -> &'static str {
        match self {
            Self::Linears => "linear layer",
            Self::LinearsAndEmbeddings => "linear layer or embedding",
            Self::Modules => "module",
        }
    }
}

/// Returns whether `pattern` holds regular-expression signs beyond the dots of a path.
fn is_regex(pattern: &str) -> bool {
    pattern.contains(['*', '+', '(', '[', '^', '$', '\\', '|', '?'])
}

fn compile(pattern: &str, setting: &str) -> Result<Regex> {
    Regex::new(&format!("^(?:{pattern})$")).map_err(|error| Error::Setting {
        setting: setting.to_owned(),
        what: "not a regular expression".to_owned(),
        expected: "a suffix such as `q_proj`, or a regular expression over the module's path"
            .to_owned(),
        found: format!("`{pattern}`: {}", reason(&error)),
        help: "any text is `.*`, and a dot itself `\\.`".to_owned(),
    })
}

/// Returns the last line of a mistake, which says what it is; those before it draw the place.
fn reason(error: &regex::Error) -> String {
    let text = error.to_string();
    let line = text.lines().last().unwrap_or_default();
    line.trim_start_matches("error: ").to_owned()
}

/// Returns whether `pattern` selects the module path, by suffix or as a regular expression.
///
/// # Errors
/// [`Error::Setting`] if the pattern is a malformed regular expression.
///
/// ```
/// use retune_core::targets::selects;
/// let path = "model.layers.3.self_attn.q_proj";
/// assert!(selects("q_proj", path, "targets")?);
/// assert!(selects(r".*layers\.[0-4]\..*q_proj", path, "targets")?);
/// assert!(!selects("proj", path, "targets")?);
/// # Ok::<(), retune_core::Error>(())
/// ```
pub fn selects(pattern: &str, path: &str, setting: &str) -> Result<bool> {
    if is_regex(pattern) {
        return Ok(compile(pattern, setting)?.is_match(path));
    }
    Ok(path == pattern || path.strip_suffix(pattern).is_some_and(|rest| rest.ends_with('.')))
}

/// Looks a module up in a table of patterns, as PEFT does for `rank_pattern` and `alpha_pattern`:
/// a key matches as `(.*\.)?(key)$`. The first match counts.
///
/// # Errors
/// [`Error::Setting`] if a key is a malformed regular expression.
pub fn pattern_value<'a, T>(
    table: impl IntoIterator<Item = (&'a str, T)>,
    path: &str,
    setting: &str,
) -> Result<Option<T>> {
    for (pattern, value) in table {
        if compile(&format!(r"(?:.*\.)?(?:{pattern})"), setting)?.is_match(path) {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

impl Targets {
    /// Targets every linear layer except the output head.
    pub fn all_linear() -> Self {
        Self { names: vec!["all-linear".to_owned()], ..Self::default() }
    }

    /// Selects the weights of this model, in the order of the forward pass.
    ///
    /// # Errors
    /// [`Error::NoTarget`] for every-match-nothing names, each checked on its own: a typo beside a
    /// good name is an error too. [`Error::Setting`] for layers the model does not have.
    pub fn select<'a>(
        &self,
        spec: &'a ModelSpec,
        among: Among,
        setting: &str,
    ) -> Result<Vec<&'a WeightSpec>> {
        let candidates: Vec<&WeightSpec> =
            spec.weights.iter().filter(|weight| among.takes(weight)).collect();
        for layer in &self.layers {
            if *layer >= spec.num_layers {
                return Err(Error::Setting {
                    // `layers` stands beside `targets`.
                    setting: setting
                        .rsplit_once('.')
                        .map_or(setting, |(table, _)| table)
                        .to_owned()
                        + ".layers",
                    what: "no such layer".to_owned(),
                    expected: format!("0 to {}", spec.num_layers.saturating_sub(1)),
                    found: layer.to_string(),
                    help: "layers are counted from 0".to_owned(),
                });
            }
        }
        let mut chosen = vec![false; candidates.len()];
        for name in &self.names {
            let mut found = false;
            for (index, weight) in candidates.iter().enumerate() {
                let hit = if name == "all-linear" {
                    weight.is_linear() && weight.role != Role::Head
                } else {
                    selects(name, weight.module(), setting)?
                };
                chosen[index] |= hit;
                found |= hit;
            }
            if !found {
                let mut paths: Vec<&str> = Vec::new();
                for weight in &candidates {
                    let last = weight.module().rsplit('.').next().unwrap_or_default();
                    if !paths.contains(&last) {
                        paths.push(last);
                    }
                }
                return Err(Error::NoTarget {
                    target: name.clone(),
                    kind: among.what(),
                    nearest: nearest_list(name, paths.iter().copied()),
                    help: format!("this model has: {}", paths.join(", ")),
                });
            }
        }
        for name in &self.exclude {
            for (index, weight) in candidates.iter().enumerate() {
                if selects(name, weight.module(), setting)? {
                    chosen[index] = false;
                }
            }
        }
        let kept: Vec<&WeightSpec> = candidates
            .into_iter()
            .zip(chosen)
            .filter(|(weight, chosen)| {
                *chosen
                    && (self.layers.is_empty()
                        || weight.layer.is_some_and(|layer| self.layers.contains(&layer)))
            })
            .map(|(weight, _)| weight)
            .collect();
        if self.names.is_empty() {
            return Err(Error::Unsupported {
                what: format!(
                    "the method on {} (it has no {} of this kind)",
                    spec.class,
                    among.what()
                ),
                help: "use another method, or name modules in `targets`".to_owned(),
            });
        }
        if kept.is_empty() {
            return Err(Error::NoTarget {
                target: self.names.join(", "),
                kind: among.what(),
                nearest: "none".to_owned(),
                help: "`exclude` or `layers` leaves nothing; widen one of them".to_owned(),
            });
        }
        Ok(kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Head;

    fn spec() -> ModelSpec {
        let weight = |name: &str, kind, role, layer| WeightSpec {
            name: name.to_owned(),
            shape: vec![4, 4],
            kind,
            role,
            layer,
        };
        let linear = Kind::Linear { transposed: false };
        ModelSpec {
            architecture: "llama".into(),
            class: "LlamaForCausalLM".into(),
            num_layers: 2,
            width: 4,
            inner_width: 4,
            num_heads: 1,
            num_key_heads: 1,
            head_width: 4,
            vocabulary: 4,
            max_positions: 8,
            causal: true,
            towers: Vec::new(),
            weights: vec![
                weight("model.embed_tokens.weight", Kind::Embedding, Role::Embedding, None),
                weight("model.layers.0.self_attn.q_proj.weight", linear, Role::Query, Some(0)),
                weight("model.layers.0.mlp.up_proj.weight", linear, Role::Up, Some(0)),
                weight("model.layers.1.self_attn.q_proj.weight", linear, Role::Query, Some(1)),
                weight("model.layers.1.mlp.up_proj.weight", linear, Role::Up, Some(1)),
                weight("lm_head.weight", linear, Role::Head, None),
            ],
            head: Head::Language { weight: "lm_head.weight".into(), bias: None, soft_cap: None },
            config: serde_json::Value::Null,
        }
    }

    fn names(targets: &Targets) -> Vec<String> {
        let spec = spec();
        let chosen = targets.select(&spec, Among::Linears, "method.lora.targets").unwrap();
        chosen.iter().map(|w| w.module().to_owned()).collect()
    }

    #[test]
    fn all_linear_spares_the_head() {
        assert_eq!(names(&Targets::all_linear()).len(), 4);
    }

    #[test]
    fn suffixes_layers_exclusions_and_regexes() {
        let mut targets = Targets { names: vec!["q_proj".into()], ..Targets::default() };
        assert_eq!(names(&targets).len(), 2);
        targets.layers = vec![1];
        assert_eq!(names(&targets), ["model.layers.1.self_attn.q_proj"]);
        let targets = Targets { names: vec![r".*\.0\..*".into()], ..Targets::default() };
        assert_eq!(names(&targets).len(), 2);
        let targets = Targets { exclude: vec!["up_proj".into()], ..Targets::all_linear() };
        assert_eq!(names(&targets).len(), 2);
    }

    #[test]
    fn a_typo_beside_a_good_name_is_an_error_with_the_nearest_name() {
        let targets =
            Targets { names: vec!["up_proj".into(), "q_porj".into()], ..Targets::default() };
        let error = targets.select(&spec(), Among::Linears, "targets").unwrap_err().to_string();
        assert!(error.contains("`q_porj`") && error.contains("nearest names: q_proj"), "{error}");
    }
}
