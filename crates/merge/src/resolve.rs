//! From a plan and opened models to one job per tensor of the result.

use std::collections::{BTreeMap, BTreeSet};

use retune_files::Dtype;
use retune_files::safetensors::TensorSpec;
use serde_json::Value;

use crate::layers::{Layered, count, is_before, is_vocabulary};
use crate::methods::{Base, Resolved, Scope, Values};
use crate::model::Model;
use crate::plan::{Input, ModelName, Module, Plan, Settings, Slice};
use crate::vocabulary::Aligned;
use crate::{Error, Result};

/// One tensor of one model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) model: usize,
    pub(crate) tensor: String,
}

/// One tensor of the result.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) spec: TensorSpec,
    pub(crate) action: Action,
}

/// How a tensor of the result comes to be.
#[derive(Debug)]
pub(crate) enum Action {
    /// Its bytes are those of a model's.
    Copy(Part),
    /// It is merged.
    Merge {
        base: Option<Part>,
        inputs: Vec<Part>,
        shared: Resolved,
        own: Vec<Resolved>,
        /// Whether its rows stand for tokens and are brought to one vocabulary.
        by_token: bool,
    },
}

/// Everything that is to be done.
#[derive(Debug, Default)]
pub(crate) struct Jobs {
    pub(crate) list: Vec<Job>,
    /// The model and layer each layer of the result has its configuration from, for stacks.
    pub(crate) stacked: Option<Vec<(usize, usize)>>,
    /// What is worth knowing.
    pub(crate) notes: Vec<String>,
}

/// Makes the jobs, or says everything that does not fit.
pub(crate) fn resolve(plan: &Plan, models: &[Model], vocabulary: Option<&Aligned>) -> Result<Jobs> {
    let mut resolver = Resolver {
        plan,
        models,
        vocabulary,
        jobs: Jobs::default(),
        problems: Vec::new(),
        dropped: BTreeSet::new(),
        small: 0,
    };
    resolver.check_architectures();
    let names: Vec<&str> =
        plan.modules.iter().filter_map(|module| module.name.as_deref()).collect();
    for module in &plan.modules {
        resolver.module(module, &names);
    }
    resolver.finish()
}

struct Resolver<'a> {
    plan: &'a Plan,
    models: &'a [Model],
    vocabulary: Option<&'a Aligned>,
    jobs: Jobs,
    problems: Vec<String>,
    dropped: BTreeSet<String>,
    /// Tensors too small for one outlier.
    small: usize,
}

/// A model of a slice: the tensors it gives and its parameters.
struct Source<'a> {
    model: usize,
    /// Its first layer in this slice; `None` for all layers.
    first: Option<usize>,
    parameters: Option<&'a Settings>,
}

impl<'a> Resolver<'a> {
    fn index(&self, name: &ModelName) -> usize {
        // The models are those the plan names.
        self.models.iter().position(|model| model.name == *name).unwrap_or(0)
    }

    fn check_architectures(&mut self) {
        let architecture = |model: &Model| {
            let kind = model.config.get("model_type").and_then(Value::as_str).unwrap_or("none");
            let class = model.config.get("architectures").and_then(|list| list.get(0));
            (kind.to_owned(), class.and_then(Value::as_str).unwrap_or("none").to_owned())
        };
        let Some((first, others)) = self.models.split_first() else { return };
        let expected = architecture(first);
        for other in others {
            let found = architecture(other);
            if found != expected {
                self.problems.push(format!(
                    "{} is a {} ({}), {} a {} ({}): only models of one architecture can be merged",
                    first.name, expected.1, expected.0, other.name, found.1, found.0
                ));
            }
        }
    }

    fn module(&mut self, module: &'a Module, names: &[&str]) {
        let Some(first) = module.slices.first() else { return };
        let mut stacked = Vec::new();
        let is_stack = first.sources.iter().any(|source| source.layers.is_some());
        let base = self.plan.base.as_ref();
        let Some(reference) = first.sources.first() else { return };
        let reference = self.index(&reference.model);
        let mine = |name: &str| match &module.name {
            None => true,
            Some(module) => claims(module, name, names),
        };
        if !is_stack {
            let sources = self.sources(first, base, None);
            let all: BTreeSet<&str> =
                sources.iter().flat_map(|s| self.models[s.model].source.files().names()).collect();
            let layers = count(self.models[reference].source.files().names());
            for name in all.into_iter().filter(|name| mine(name)) {
                let place = match Layered::parse(name) {
                    Some(part) => place(part.layer, layers.get(part.stack).copied().unwrap_or(1)),
                    None => 0.0,
                };
                let parts = sources.iter().map(|_| name.to_owned()).collect();
                self.tensor(name, parts, &sources, first, module, place);
            }
            return;
        }
        let stacks = count(self.models[reference].source.files().names().filter(|name| mine(name)));
        let stack = match stacks.len() {
            1 => stacks.keys().next().map(|stack| (*stack).to_owned()).unwrap_or_default(),
            n => {
                self.problems.push(format!(
                    "{} has {n} stacks of layers; `slices` works on models with one, use `models` \
                     or name the modules",
                    self.models[reference].name
                ));
                return;
            }
        };
        let last = module.slices.len() - 1;
        let mut layer_out = 0;
        for (i, slice) in module.slices.iter().enumerate() {
            let base = slice.base.as_ref().or(base);
            let sources = self.sources(slice, base, Some(i));
            let length = slice
                .sources
                .first()
                .and_then(|s| s.layers.as_ref())
                .map_or(0, ExactSizeIterator::len);
            self.check_ranges(slice, &stack);
            for (when, before) in [(0, true), (last, false)] {
                if when != i {
                    continue;
                }
                let outside: BTreeSet<&str> = sources
                    .iter()
                    .flat_map(|source| self.models[source.model].source.files().names())
                    .filter(|name| Layered::parse(name).is_none() && is_before(name) == before)
                    .filter(|name| mine(name))
                    .collect();
                for name in outside {
                    let parts = sources.iter().map(|_| name.to_owned()).collect();
                    self.tensor(name, parts, &sources, slice, module, 0.0);
                }
            }
            for offset in 0..length {
                let mut rests: BTreeSet<&str> = BTreeSet::new();
                for source in &sources {
                    let wanted = source.first.unwrap_or(0) + offset;
                    let names = self.models[source.model].source.files().names();
                    let parts = names.filter_map(Layered::parse);
                    rests.extend(
                        parts.filter(|p| p.stack == stack && p.layer == wanted).map(|p| p.rest),
                    );
                }
                let at = place(offset, length);
                for rest in rests {
                    let name = format!("{stack}{layer_out}{rest}");
                    let part = |source: &Source<'_>| {
                        format!("{stack}{}{rest}", source.first.unwrap_or(0) + offset)
                    };
                    let parts = sources.iter().map(part).collect();
                    self.tensor(&name, parts, &sources, slice, module, at);
                }
                if let Some(source) = sources.first() {
                    stacked.push((source.model, source.first.unwrap_or(0) + offset));
                }
                layer_out += 1;
            }
        }
        self.jobs.stacked = Some(stacked);
    }

    /// Lists a slice's models, the base among them where the method needs it.
    fn sources(
        &mut self,
        slice: &'a Slice,
        base: Option<&ModelName>,
        number: Option<usize>,
    ) -> Vec<Source<'a>> {
        let source = |input: &'a Input| Source {
            model: self.index(&input.model),
            first: input.layers.as_ref().map(|layers| layers.start),
            parameters: Some(&input.parameters),
        };
        let mut sources: Vec<Source<'a>> = slice.sources.iter().map(source).collect();
        if let Some(base) = base
            && self.plan.method.base != Base::Ordinary
            && slice.sources.iter().all(|input| input.model != *base)
        {
            match number {
                None => {
                    let model = self.index(base);
                    sources.push(Source { model, first: None, parameters: None });
                }
                Some(i) => self.problems.push(format!(
                    "slice {} does not say which layers of the base {base} belong to it: list the \
                     base among its sources",
                    i + 1
                )),
            }
        }
        sources
    }

    fn check_ranges(&mut self, slice: &Slice, stack: &str) {
        for input in &slice.sources {
            let model = &self.models[self.index(&input.model)];
            let num_layers = count(model.source.files().names()).get(stack).copied().unwrap_or(0);
            if let Some(layers) = input.layers.as_ref().filter(|layers| layers.end > num_layers) {
                self.problems.push(format!(
                    "`layer_range` [{}, {}] of {}: it has {num_layers} layers",
                    layers.start, layers.end, model.name
                ));
            }
        }
    }

    /// Plans one tensor of the result from one tensor of each source.
    fn tensor(
        &mut self,
        name: &str,
        tensors: Vec<String>,
        sources: &[Source<'_>],
        slice: &Slice,
        module: &Module,
        place: f64,
    ) {
        let Some(parts) = self.parts(name, tensors, sources) else { return };
        let dtypes: Vec<Dtype> = parts.iter().filter_map(|part| self.dtype(part)).collect();
        if dtypes.iter().any(|dtype| !dtype.is_float()) {
            self.integers(name, parts, &dtypes);
            return;
        }
        let by_token = self.vocabulary.is_some() && is_vocabulary(name);
        let Some(mut shape) = self.shape(name, &parts, by_token) else { return };
        if let Some(vocabulary) = self.vocabulary.filter(|_| by_token)
            && let Some(rows) = shape.first_mut()
        {
            *rows = vocabulary.num_rows;
        }
        let method = self.plan.method;
        let base_name = slice.base.as_ref().or(self.plan.base.as_ref());
        let base_at = match base_name {
            Some(base) if method.base != Base::Ordinary => {
                let model = self.index(base);
                sources.iter().position(|source| source.model == model)
            }
            _ => None,
        };
        let mut shared = Resolved::default();
        for parameter in method.parameters.iter().filter(|p| p.scope == Scope::Shared) {
            let scopes = [&slice.parameters, &module.parameters, &self.plan.parameters];
            let value = scopes
                .iter()
                .find_map(|settings| settings.get(parameter.name)?.at(name, place, parameter.kind));
            match value.or(parameter.default) {
                Some(value) => shared.set(parameter.name, value),
                None => self.missing(parameter.name, None, name),
            }
        }
        let mut own = Vec::new();
        let mut inputs = Vec::new();
        let mut base = None;
        for (i, (part, source)) in parts.into_iter().zip(sources).enumerate() {
            if Some(i) == base_at {
                base = Some(part);
                continue;
            }
            let mut resolved = Resolved::default();
            for parameter in method.parameters.iter().filter(|p| p.scope == Scope::Input) {
                let scopes = [
                    source.parameters,
                    Some(&slice.parameters),
                    Some(&module.parameters),
                    Some(&self.plan.parameters),
                ];
                let value = scopes.into_iter().flatten().find_map(|settings| {
                    settings.get(parameter.name)?.at(&part.tensor, place, parameter.kind)
                });
                match value.or(parameter.default) {
                    Some(value) => resolved.set(parameter.name, value),
                    None => self.missing(parameter.name, Some(source.model), name),
                }
            }
            own.push(resolved);
            inputs.push(part);
        }
        if !self.problems.is_empty() {
            return;
        }
        if let Some(problem) = method.check(&shared, &own) {
            self.problems.push(format!("tensor '{name}': {problem}"));
            return;
        }
        self.note_small(&own, shape.iter().product());
        let dtype = self.plan.out_dtype.or(self.plan.dtype).unwrap_or_else(|| widest(&dtypes));
        let spec = TensorSpec::new(name, dtype, shape);
        let plain = method.name == "passthrough" && own.iter().all(|o| o.number("scale") == 1.0);
        let is_whole = |part: &Part| {
            let model = &self.models[part.model];
            model.name.lora.is_none() && self.dtype(part) == Some(dtype)
        };
        let action = match inputs.as_slice() {
            [only] if plain && !by_token && is_whole(only) => Action::Copy(only.clone()),
            _ => Action::Merge { base, inputs, shared, own, by_token },
        };
        self.jobs.list.push(Job { spec, action });
    }

    /// Finds each source's tensor; a tied head is its embedding.
    fn parts(
        &mut self,
        name: &str,
        tensors: Vec<String>,
        sources: &[Source<'_>],
    ) -> Option<Vec<Part>> {
        let mut parts = Vec::new();
        let mut without = Vec::new();
        for (tensor, source) in tensors.into_iter().zip(sources) {
            let model = &self.models[source.model];
            if model.source.get(&tensor).is_some() {
                parts.push(Part { model: source.model, tensor });
            } else if let Some(tied) = tied_to(model, &tensor) {
                parts.push(Part { model: source.model, tensor: tied });
            } else {
                without.push(model.name.to_string());
            }
        }
        if without.is_empty() {
            return Some(parts);
        }
        if is_buffer(name) {
            self.dropped.insert(name.to_owned());
            return None;
        }
        let with: Vec<String> =
            parts.iter().map(|part| self.models[part.model].name.to_string()).collect();
        self.problems.push(format!(
            "tensor '{name}' is in {}, not in {}",
            with.join(", "),
            without.join(", ")
        ));
        None
    }

    fn shape(&mut self, name: &str, parts: &[Part], by_token: bool) -> Option<Vec<usize>> {
        let shape_of = |part: &Part| {
            let view = self.models[part.model].source.get(&part.tensor);
            view.map(|view| view.shape.to_vec()).unwrap_or_default()
        };
        let first = parts.first()?;
        let shape = shape_of(first);
        let from = usize::from(by_token).min(shape.len());
        let other = parts.iter().find(|part| {
            let found = shape_of(part);
            found.len() != shape.len() || found[from..] != shape[from..]
        });
        let Some(other) = other else { return Some(shape) };
        let found = shape_of(other);
        let rows = is_vocabulary(name) && shape.get(1..) == found.get(1..);
        let help = if rows {
            "; the vocabularies differ: add `tokenizer: {source: base}` or `union`"
        } else {
            ""
        };
        self.problems.push(format!(
            "tensor '{name}' has shape {shape:?} in {}, {found:?} in {}{help}",
            self.models[first.model].name, self.models[other.model].name
        ));
        None
    }

    /// Takes over tensors of integers, which must agree.
    fn integers(&mut self, name: &str, parts: Vec<Part>, dtypes: &[Dtype]) {
        let view = |part: &Part| self.models[part.model].source.get(&part.tensor);
        let Some((first, others)) = parts.split_first() else { return };
        let Some(expected) = view(first) else { return };
        let differs = others.iter().find(|part| {
            view(part).is_none_or(|found| {
                found.dtype != expected.dtype
                    || found.shape != expected.shape
                    || found.bytes != expected.bytes
            })
        });
        if let Some(other) = differs {
            self.problems.push(format!(
                "tensor '{name}' of {} differs between {} and {}: integers cannot be merged",
                dtypes.first().map_or("", |dtype| dtype.name()),
                self.models[first.model].name,
                self.models[other.model].name
            ));
            return;
        }
        let spec = TensorSpec::new(name, expected.dtype, expected.shape);
        self.jobs.list.push(Job { spec, action: Action::Copy(first.clone()) });
    }

    fn dtype(&self, part: &Part) -> Option<Dtype> {
        Some(self.models[part.model].source.get(&part.tensor)?.dtype)
    }

    fn missing(&mut self, parameter: &str, model: Option<usize>, tensor: &str) {
        let whose = model.map_or(String::new(), |model| format!(" of {}", self.models[model].name));
        let problem =
            format!("`{}` needs the parameter `{parameter}`{whose}", self.plan.method.name);
        // One line for all tensors, unless only some lack it.
        if !self.problems.iter().any(|known| known.starts_with(&problem)) {
            self.problems.push(format!("{problem}: it has no value at tensor '{tensor}'"));
        }
    }

    fn note_small(&mut self, own: &[Resolved], n: usize) {
        let thin =
            |own: &Resolved| own.number("density") < 1.0 && (own.number("gamma") * n as f64) < 1.0;
        if self.plan.method.name.starts_with("breadcrumbs") {
            self.small += usize::from(own.iter().any(thin));
        }
    }

    fn finish(mut self) -> Result<Jobs> {
        if self.jobs.list.is_empty() && self.problems.is_empty() {
            self.problems.push("the plan gives no tensor at all".to_owned());
        }
        if !self.problems.is_empty() {
            return Err(Error::Misfit { problems: self.problems });
        }
        if !self.dropped.is_empty() {
            let names: Vec<String> = self.dropped.into_iter().collect();
            self.jobs.notes.push(format!(
                "left out, because only some models store them: {}",
                names.join(", ")
            ));
        }
        if self.small > 0 {
            let what = if self.plan.compat {
                "keep the base's values, as in mergekit 0.1.4; the paper keeps their band"
            } else {
                "lose no outlier, as in the paper; mergekit 0.1.4 drops their whole change \
                 (`compat: mergekit` does the same)"
            };
            self.jobs.notes.push(format!(
                "{} tensors have fewer than 1 / gamma values and {what}",
                self.small
            ));
        }
        self.jobs.notes.extend(self.vocabulary.iter().flat_map(|v| v.notes.iter().cloned()));
        Ok(self.jobs)
    }
}

/// Returns how far a layer is from the first (0) to the last (1).
fn place(layer: usize, num_layers: usize) -> f64 {
    if num_layers > 1 { layer as f64 / (num_layers - 1) as f64 } else { 1.0 }
}

/// Tells whether a tensor belongs to a module, which names one of its parts.
fn claims(module: &str, tensor: &str, modules: &[&str]) -> bool {
    let has = |module: &str| {
        let other = match module {
            "text_decoder" => "language_model",
            "vision_encoder" => "vision_tower",
            other => other,
        };
        tensor.split('.').any(|part| part == module || part == other)
    };
    let claimed = modules.iter().any(|module| has(module));
    // What no module names goes with the first.
    has(module) || (!claimed && modules.first() == Some(&module))
}

/// Finds the embedding that is a model's head, where it is tied and not stored.
fn tied_to(model: &Model, tensor: &str) -> Option<String> {
    let tied = model.config.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(true);
    if !tied || !tensor.ends_with("lm_head.weight") {
        return None;
    }
    let mut names = model.source.files().names();
    let found =
        names.find(|name| name.ends_with("embed_tokens.weight") || name.ends_with("wte.weight"));
    found.map(str::to_owned)
}

/// Tells whether a tensor is a constant that old checkpoints stored.
fn is_buffer(name: &str) -> bool {
    [".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias"]
        .iter()
        .any(|ending| name.ends_with(ending))
}

fn widest(dtypes: &[Dtype]) -> Dtype {
    match dtypes.first() {
        Some(first) if dtypes.iter().all(|dtype| dtype == first) => *first,
        _ if dtypes.contains(&Dtype::F64) => Dtype::F64,
        _ => Dtype::F32,
    }
}

/// Opens the values of one input, brought to the result's vocabulary where that is asked.
pub(crate) fn open<'a>(
    part: &'a Part,
    all: &[&'a Part],
    base: Option<usize>,
    models: &'a [Model],
    vocabulary: Option<&'a Aligned>,
) -> Result<Box<dyn Values + 'a>> {
    let values = |part: &'a Part| -> Result<Box<dyn Values + 'a>> {
        Ok(Box::new(models[part.model].values(&part.tensor)?))
    };
    let Some(vocabulary) = vocabulary else { return values(part) };
    let mut parts: BTreeMap<usize, (Box<dyn Values + 'a>, usize)> = BTreeMap::new();
    let mut width = 1;
    let lenders = vocabulary.lenders(models);
    for other in all {
        if let Some(view) = models[other.model].source.get(&other.tensor) {
            width = view.shape.get(1..).unwrap_or_default().iter().product();
            let rows = view.shape.first().copied().unwrap_or(0);
            parts.insert(other.model, (values(other)?, rows));
        }
    }
    for lender in lenders {
        if let Some(view) = models[lender].source.get(&part.tensor)
            && !parts.contains_key(&lender)
        {
            let rows = view.shape.first().copied().unwrap_or(0);
            parts.insert(lender, (Box::new(models[lender].values(&part.tensor)?), rows));
        }
    }
    Ok(Box::new(vocabulary.values(part.model, base, models, parts, width)?))
}
