//! Compacter's layers (parametrised hypercomplex multiplication), multiplied out.

use std::collections::BTreeMap;

use super::Found;

/// The tensors of one such layer, by what stands behind its name, or those that all layers share.
type Parts = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// What a layer is called behind its adapter's name, and the word for it among what is shared.
const LAYERS: &[(&str, &str)] = &[("adapter_down.0", "down"), ("adapter_up", "up")];

/// What layers of this kind are made of; a plain one has weight and bias.
const OWN: &[&str] =
    &["W", "W_left", "W_right", "phm_rule", "phm_rule_left", "phm_rule_right", "b"];

/// Returns the tensors with every layer that is a sum of Kronecker products as weight and bias.
///
/// # Errors
/// What a layer lacks, or which of its tensors does not fit the others.
pub(super) fn multiplied_out(tensors: Vec<Found>) -> Result<Vec<Found>, String> {
    let mut plain = Vec::new();
    let mut shared = Parts::new();
    let mut layers: BTreeMap<String, (&str, Parts)> = BTreeMap::new();
    for (name, shape, values) in tensors {
        if let Some((_, rest)) = name.split_once("shared_parameters.") {
            let part = rest.rsplit('.').next().unwrap_or(rest);
            shared.insert(part.to_owned(), (shape, values));
            continue;
        }
        let of_layer = name.rsplit_once('.').and_then(|(layer, part)| {
            let (_, word) = LAYERS.iter().find(|(end, _)| layer.ends_with(end))?;
            OWN.contains(&part).then(|| (layer.to_owned(), *word, part.to_owned()))
        });
        match of_layer {
            Some((layer, word, part)) => {
                let (_, parts) = layers.entry(layer).or_insert((word, Parts::new()));
                parts.insert(part, (shape, values));
            }
            None => plain.push((name, shape, values)),
        }
    }
    for (layer, (word, parts)) in layers {
        let large = sum_terms(&layer, &parts, &shared, "W", &format!("W_{word}"))?;
        let small = sum_terms(&layer, &parts, &shared, "phm_rule", "phm_rule")?;
        let ([n, p, q], [terms, rows, columns]) = (large.0, small.0);
        if (terms, rows, columns) != (n, n, n) {
            return Err(format!(
                "`{layer}`: the small matrices have shape {:?}, expected [{n}, {n}, {n}]",
                small.0
            ));
        }
        let (inputs, outputs) = (n * p, n * q);
        // The library multiplies from the right: its matrix is [inputs, outputs].
        let mut weight = vec![0.0; outputs * inputs];
        for term in 0..n {
            for (row, column) in (0..n).flat_map(|row| (0..n).map(move |column| (row, column))) {
                let factor = small.1[(term * n + row) * n + column];
                for (i, j) in (0..p).flat_map(|i| (0..q).map(move |j| (i, j))) {
                    let (input, output) = (row * p + i, column * q + j);
                    weight[output * inputs + input] += factor * large.1[(term * p + i) * q + j];
                }
            }
        }
        let bias = match parts.get("b") {
            Some((shape, values)) if *shape == [outputs] => values.clone(),
            Some((shape, _)) => {
                return Err(format!("`{layer}.b` has shape {shape:?}, expected [{outputs}]"));
            }
            None => vec![0.0; outputs],
        };
        plain.push((format!("{layer}.weight"), vec![outputs, inputs], weight));
        plain.push((format!("{layer}.bias"), vec![outputs], bias));
    }
    Ok(plain)
}

/// Returns the matrices of all terms, whole or from their two factors, the layer's own or shared.
fn sum_terms(
    layer: &str,
    own: &Parts,
    shared: &Parts,
    name: &str,
    shared_name: &str,
) -> Result<([usize; 3], Vec<f32>), String> {
    let find = |end: &str| {
        own.get(&format!("{name}{end}")).or_else(|| shared.get(&format!("{shared_name}{end}")))
    };
    let three = |(shape, values): &(Vec<usize>, Vec<f32>)| {
        let shape = <[usize; 3]>::try_from(shape.as_slice())
            .map_err(|_| format!("`{layer}`: `{name}` has shape {shape:?}, expected three axes"))?;
        Ok::<_, String>((shape, values.clone()))
    };
    if let Some(whole) = find("") {
        return three(whole);
    }
    let (Some(left), Some(right)) = (find("_left"), find("_right")) else {
        return Err(format!(
            "`{layer}`: no `{name}`, neither its own nor shared; some versions of the library do \
             not save what layers share"
        ));
    };
    let ([n, p, rank], left) = three(left)?;
    let ([terms, inner, q], right) = three(right)?;
    if (terms, inner) != (n, rank) {
        return Err(format!(
            "`{layer}`: the factors of `{name}` have shapes {:?} and {:?}",
            [n, p, rank],
            [terms, inner, q]
        ));
    }
    let mut out = vec![0.0; n * p * q];
    for (term, i, j) in
        (0..n).flat_map(|t| (0..p).flat_map(move |i| (0..q).map(move |j| (t, i, j))))
    {
        out[(term * p + i) * q + j] = (0..rank)
            .map(|r| left[(term * p + i) * rank + r] * right[(term * rank + r) * q + j])
            .sum();
    }
    Ok(([n, p, q], out))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, shape: &[usize], values: &[f32]) -> Found {
        (name.to_owned(), shape.to_vec(), values.to_vec())
    }

    #[test]
    fn a_layer_is_its_sum_of_kronecker_products_transposed() {
        // A₁ = [[1, 2], [0, 1]], A₂ = [[0, 1], [1, 0]]; s₁ t₁ = [3, 4], s₂ t₂ = [5, 6]:
        // [[3, 4, 6 + 5, 8 + 6], [5, 6, 3, 4]] from two inputs to four outputs.
        let given = vec![
            tensor("x.shared_parameters.a.phm_rule", &[2, 2, 2], &[1., 2., 0., 1., 0., 1., 1., 0.]),
            tensor("l.adapters.a.adapter_down.0.W_left", &[2, 1, 1], &[1., 1.]),
            tensor("l.adapters.a.adapter_down.0.W_right", &[2, 1, 2], &[3., 4., 5., 6.]),
            tensor("l.adapters.a.adapter_down.0.b", &[4], &[7., 8., 9., 10.]),
            tensor("l.adapters.a.adapter_up.weight", &[1, 1], &[2.]),
        ];
        let found = multiplied_out(given.clone()).unwrap();
        let weight = [3., 5., 4., 6., 11., 3., 14., 4.];
        let expected = vec![
            tensor("l.adapters.a.adapter_up.weight", &[1, 1], &[2.]),
            tensor("l.adapters.a.adapter_down.0.weight", &[4, 2], &weight),
            tensor("l.adapters.a.adapter_down.0.bias", &[4], &[7., 8., 9., 10.]),
        ];
        assert_eq!(found, expected);

        let without = multiplied_out(given[1..].to_vec()).unwrap_err();
        assert!(without.contains("`phm_rule`") && without.contains("shared"), "{without}");
        let mut other = given;
        other[2].1 = vec![2, 2, 1];
        let error = multiplied_out(other).unwrap_err();
        assert!(error.contains("factors of `W`"), "{error}");
    }
}
