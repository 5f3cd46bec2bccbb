//! Merges of models in memory, by the program's own merge methods.

use retune_merge::methods::{Group, Method, Resolved, Scope, Values as Source};

use crate::lab::Values;
use crate::{Error, Result};

/// One tensor of a model in memory.
#[derive(Debug)]
struct Held<'a>(&'a [f32]);

impl Source for Held<'_> {
    fn read(&self, start: usize, out: &mut [f32]) -> retune_merge::Result<()> {
        out.copy_from_slice(&self.0[start..start + out.len()]);
        Ok(())
    }

    fn model(&self) -> String {
        "a model of a proof".to_owned()
    }
}

/// Merges models that were tuned from one base; `settings` are parameters of the method, the same for
/// every model, defaults elsewhere.
///
/// # Errors
/// If there is no such method, or it refuses the values.
pub(crate) fn merge(
    method: &str,
    settings: &[(&'static str, f64)],
    base: &Values,
    tuned: &[&Values],
) -> Result<Values> {
    let method = Method::find(method).ok_or_else(|| Error::NoMethod(method.to_owned()))?;
    let resolved = |scope: Scope| {
        let mut resolved = Resolved::default();
        for parameter in method.parameters.iter().filter(|known| known.scope == scope) {
            let given = settings.iter().find(|(name, _)| *name == parameter.name);
            // The one parameter without a default is the weight.
            let value = given.map(|(_, value)| *value).or(parameter.default).unwrap_or(1.0);
            resolved.set(parameter.name, value);
        }
        resolved
    };
    let (shared, own) = (resolved(Scope::Shared), vec![resolved(Scope::Input); tuned.len()]);
    let mut merged = Values::new();
    for (name, values) in base {
        let before = Held(values);
        let after: Vec<Held<'_>> = tuned.iter().map(|model| Held(&model[name])).collect();
        let group = Group {
            name,
            shape: &[values.len()],
            base: Some(&before),
            inputs: after.iter().map(|held| held as &dyn Source).collect(),
            shared: &shared,
            own: &own,
            seed: 0,
            compat: false,
        };
        let mut out = Vec::with_capacity(values.len());
        method.merge(&group, &mut |values| {
            out.extend_from_slice(values);
            Ok(())
        })?;
        merged.insert(name.clone(), out);
    }
    Ok(merged)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_add_up() {
        let model = |values: &[f32]| Values::from([("a".to_owned(), values.to_vec())]);
        let (base, one, other) = (model(&[1.0, 2.0]), model(&[1.5, 2.0]), model(&[1.0, 4.0]));
        let found = merge("task_arithmetic", &[("lambda", 0.5)], &base, &[&one, &other]).unwrap();
        assert_eq!(found["a"], [1.25, 3.0]);
        // Of four changes the largest is an outlier, and two of the rest are kept.
        let (base, one) = (model(&[0.0; 4]), model(&[9.0, 2.0, 3.0, 1.0]));
        let found = merge("breadcrumbs", &[("density", 0.5), ("gamma", 0.25)], &base, &[&one]);
        assert_eq!(found.unwrap()["a"], [0.0, 2.0, 3.0, 0.0]);
    }
}
