//! What is to be merged and how: mergekit's YAML, or the `[merge]` table of a recipe.

use std::collections::BTreeMap;
use std::ops::Range;

use retune_files::Dtype;
use retune_options::{Diagnostic, Document, Item, Reader, Report, Span, Value, nearest};

use crate::methods::{ALL, Kind, Method, Parameter, Scope};
use crate::setting::Setting;

/// A model as the plan names it, with an adapter to be added where there is one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ModelName {
    /// Folder or name.
    pub path: String,
    /// Folder or name of a LoRA adapter.
    pub lora: Option<String>,
}

impl std::fmt::Display for ModelName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.lora {
            Some(lora) => write!(f, "{}+{lora}", self.path),
            None => f.write_str(&self.path),
        }
    }
}

/// Parameters by name.
pub type Settings = BTreeMap<&'static str, Setting>;

/// One model, or some of its layers, as an input.
#[derive(Debug, Clone)]
pub struct Input {
    /// The model.
    pub model: ModelName,
    /// Its layers; all where `None`.
    pub layers: Option<Range<usize>>,
    /// Parameters of this input.
    pub parameters: Settings,
    /// Where it stands in the plan.
    pub span: Option<Span>,
}

/// Layers of several models that become the next layers of the result.
#[derive(Debug, Clone)]
pub struct Slice {
    /// The models and their layers.
    pub sources: Vec<Input>,
    /// The base, where it is another than the plan's.
    pub base: Option<ModelName>,
    /// Parameters of this slice.
    pub parameters: Settings,
}

/// A part of a model with its own list of inputs; most models have one part.
#[derive(Debug, Clone)]
pub struct Module {
    /// Its name; `None` for the only one.
    pub name: Option<String>,
    /// The slices, stacked in this order. `models:` is one slice of all layers.
    pub slices: Vec<Slice>,
    /// Parameters of this module.
    pub parameters: Settings,
}

/// Where the embedding of a token comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenSource {
    /// Zeros.
    Zero,
    /// The same token of a model.
    Model(ModelName),
    /// Another token of a model, by its text.
    Token(ModelName, String),
    /// Another token of a model, by its number.
    Id(ModelName, usize),
}

/// What a plan says about one token.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenPlan {
    /// Where its embedding comes from; as for other tokens where `None`.
    pub source: Option<TokenSource>,
    /// Whether models that have the token take that embedding too.
    pub force: bool,
}

/// Which vocabulary the result has.
#[derive(Debug, Clone, PartialEq)]
pub enum Vocabulary {
    /// The base's, or that of the first model.
    Base,
    /// All tokens of all models.
    Union,
    /// That of one model.
    Model(ModelName),
}

/// How vocabularies are brought together.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenizerPlan {
    /// Which vocabulary the result has.
    pub source: Vocabulary,
    /// Tokens with rules of their own.
    pub tokens: BTreeMap<String, TokenPlan>,
    /// The number of embeddings is rounded up to a multiple of this.
    pub pad_to_multiple_of: usize,
}

/// A plan that was read and holds no mistake that can be seen without the models.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The method.
    pub method: &'static Method,
    /// The base.
    pub base: Option<ModelName>,
    /// The parts.
    pub modules: Vec<Module>,
    /// Parameters of everything.
    pub parameters: Settings,
    /// The type asked for; numbers are computed in F32 whatever it is.
    pub dtype: Option<Dtype>,
    /// The type stored, where it differs.
    pub out_dtype: Option<Dtype>,
    /// How vocabularies are brought together; they must agree where `None`.
    pub tokenizer: Option<TokenizerPlan>,
    /// `auto`, `chatml`, or a template.
    pub chat_template: Option<String>,
    /// Whether to do as mergekit 0.1.4 where it departs from a method's paper.
    pub compat: bool,
    /// Seed of the methods that draw.
    pub seed: u64,
    /// The plan's text.
    pub text: String,
}

impl Plan {
    /// Reads a plan: YAML, or TOML where `file_name` ends in `.toml`.
    ///
    /// Returns the plan and a report that holds warnings only.
    ///
    /// # Errors
    /// A [`Report`] of every mistake.
    pub fn parse(file_name: &str, bytes: &[u8]) -> Result<(Self, Report), Report> {
        let is_recipe = file_name.to_ascii_lowercase().ends_with(".toml");
        let document = if is_recipe {
            Document::parse_bytes(file_name, bytes)?
        } else {
            Document::parse_yaml_bytes(file_name, bytes)?
        };
        let text = String::from_utf8_lossy(bytes).into_owned();
        let (plan, warnings) = document.read(|reader| {
            if !is_recipe {
                return read(reader, text);
            }
            // A recipe may hold a training too, which is none of the merge's business.
            reader.declare_all();
            let table = reader.table("merge");
            if table.is_none() && !reader.has("merge") {
                reader.report(
                    Diagnostic::error("the recipe has no table `[merge]`")
                        .help("add `[merge]` with `merge_method` and `models`"),
                );
            }
            table.and_then(|mut table| read(&mut table, text))
        })?;
        match plan {
            Some(plan) => Ok((plan, warnings)),
            // Cannot happen: without a plan there was an error.
            None => Err(warnings),
        }
    }

    /// Lists every model the plan names, each once, in order.
    pub fn models(&self) -> Vec<&ModelName> {
        let slices = || self.modules.iter().flat_map(|module| &module.slices);
        let mut found: Vec<&ModelName> = Vec::new();
        let sources = slices().flat_map(|slice| slice.sources.iter().map(|input| &input.model));
        let bases = slices().filter_map(|slice| slice.base.as_ref());
        let vocabulary = self.tokenizer.iter().filter_map(|tokenizer| match &tokenizer.source {
            Vocabulary::Model(model) => Some(model),
            _ => None,
        });
        let tokens = self.tokenizer.iter().flat_map(|tokenizer| tokenizer.tokens.values());
        let tokens = tokens.filter_map(|token| match &token.source {
            Some(
                TokenSource::Model(model)
                | TokenSource::Token(model, _)
                | TokenSource::Id(model, _),
            ) => Some(model),
            _ => None,
        });
        for model in self.base.iter().chain(sources).chain(bases).chain(vocabulary).chain(tokens) {
            if !found.contains(&model) {
                found.push(model);
            }
        }
        found
    }
}

const TOP_LEVEL: [&str; 3] = ["models", "slices", "modules"];

fn read(reader: &mut Reader<'_>, text: String) -> Option<Plan> {
    let method = read_method(reader);
    let base = read_model(reader, "base_model");
    let forms: Vec<&str> = TOP_LEVEL.into_iter().filter(|form| reader.has(form)).collect();
    match forms.as_slice() {
        [] => reader.report(
            Diagnostic::error("the plan lists no models")
                .help("add `models:`, `slices:` or `modules:`, one of the three"),
        ),
        [_] => {}
        [_, second, ..] => reader.error(
            second,
            format!("`{}` cannot stand together", forms.join("` and `")),
            "keep one of them; layers of several models go into `slices`",
        ),
    }
    let parameters = read_settings(reader, method);
    let slices = read_slices(reader, method);
    let modules = if reader.has("modules") {
        read_modules(reader, method)
    } else {
        vec![Module { name: None, slices, parameters: Settings::new() }]
    };
    let (dtype, out_dtype) = (read_dtype(reader, "dtype"), read_dtype(reader, "out_dtype"));
    let tokenizer = read_tokenizer(reader);
    let chat_template: Option<String> = reader.optional("chat_template");
    let compat = match reader.optional::<String>("compat").as_deref() {
        None => false,
        Some("mergekit") => true,
        Some(other) => {
            let help = "write `compat: mergekit`, or leave it out to follow the papers";
            reader.error("compat", format!("`{other}` is not known"), help);
            false
        }
    };
    let seed = reader.optional::<u64>("seed").unwrap_or(42);
    // A name for the result in files that describe several.
    reader.declare("name");
    let method = method?;
    check_inputs(reader, method, base.as_ref(), &modules);
    let plan = Plan {
        method,
        base,
        modules,
        parameters,
        dtype,
        out_dtype,
        tokenizer,
        chat_template,
        compat,
        seed,
        text,
    };
    Some(plan)
}

fn read_method(reader: &mut Reader<'_>) -> Option<&'static Method> {
    let Some(name) = reader.optional::<String>("merge_method") else {
        if !reader.has("merge_method") {
            let names: Vec<&str> = ALL.iter().map(|method| method.name).collect();
            reader.report(
                Diagnostic::error("the plan needs the key `merge_method`")
                    .help(format!("the methods are {}", names.join(", "))),
            );
        }
        return None;
    };
    let found = Method::find(&name);
    if found.is_none() {
        let near = nearest(&name, ALL.iter().map(|method| method.name));
        let help = if near.is_empty() {
            let names: Vec<&str> = ALL.iter().map(|method| method.name).collect();
            format!("the methods are {}", names.join(", "))
        } else {
            format!("did you mean `{}`?", near.join("`, `"))
        };
        reader.error("merge_method", format!("`{name}` is no merge method"), help);
    }
    found
}

fn read_slices(reader: &mut Reader<'_>, method: Option<&'static Method>) -> Vec<Slice> {
    let mut slices = Vec::new();
    if reader.has("models") {
        let mut sources = Vec::new();
        for mut input in reader.tables("models") {
            let span = input.span("model");
            let model = read_required_model(&mut input, "model");
            let parameters = read_settings(&mut input, method);
            if let Some(model) = model {
                sources.push(Input { model, layers: None, parameters, span });
            }
        }
        slices.push(Slice { sources, base: None, parameters: Settings::new() });
    }
    if reader.has("slices") {
        for mut slice in reader.tables("slices") {
            let base = read_model(&mut slice, "base_model");
            let parameters = read_settings(&mut slice, method);
            let mut sources = Vec::new();
            for mut source in slice.tables("sources") {
                let span = source.span("model");
                let model = read_required_model(&mut source, "model");
                let layers = read_layers(&mut source);
                let parameters = read_settings(&mut source, method);
                if let (Some(model), Some(layers)) = (model, layers) {
                    sources.push(Input { model, layers: Some(layers), parameters, span });
                }
            }
            if sources.is_empty() && !slice.has_errors() {
                let help = "add `- model: …` with `layer_range: [first, end]`";
                slice.error("sources", "a slice has no sources", help);
            }
            let lengths = sources.iter().filter_map(|s| s.layers.as_ref()).map(Range::len);
            if let Some(first) = lengths.clone().next()
                && lengths.clone().any(|length| length != first)
            {
                let lengths: Vec<usize> = lengths.collect();
                slice.error(
                    "sources",
                    format!("the sources of a slice have {lengths:?} layers"),
                    "give every `layer_range` of a slice the same length",
                );
            }
            slices.push(Slice { sources, base, parameters });
        }
    }
    slices
}

fn read_modules(reader: &mut Reader<'_>, method: Option<&'static Method>) -> Vec<Module> {
    let Some(mut modules) = reader.table("modules") else { return Vec::new() };
    let names = modules.keys();
    let mut found = Vec::new();
    for name in &names {
        let Some(mut module) = modules.table(name) else { continue };
        match (module.has("models"), module.has("slices")) {
            (true, false) | (false, true) => {}
            (both, _) => {
                let message = if both {
                    "`models` and `slices` cannot stand together"
                } else {
                    "a module lists no models"
                };
                module.error("slices", message, "give every module either `models` or `slices`");
            }
        }
        let parameters = read_settings(&mut module, method);
        let slices = read_slices(&mut module, method);
        let name = (names.len() > 1).then(|| (*name).to_owned());
        found.push(Module { name, slices, parameters });
    }
    if names.is_empty() {
        reader.error("modules", "there is no module", "name at least one, such as `default`");
    }
    found
}

fn read_layers(reader: &mut Reader<'_>) -> Option<Range<usize>> {
    let range: Option<Vec<u64>> = reader.optional("layer_range");
    let help = "write `layer_range: [first, end]`, the end not included";
    match range.as_deref() {
        Some([first, end]) if first < end => Some(*first as usize..*end as usize),
        Some(other) => {
            reader.error("layer_range", format!("{other:?} is no range of layers"), help);
            None
        }
        None => {
            if !reader.has("layer_range") {
                reader.error("layer_range", "a source of a slice needs `layer_range`", help);
            }
            None
        }
    }
}

fn read_required_model(reader: &mut Reader<'_>, key: &str) -> Option<ModelName> {
    let model = read_model(reader, key);
    if model.is_none() && !reader.has(key) {
        reader.error(key, format!("`{key}` is missing"), "name a folder or a model");
    }
    model
}

/// Reads `path`, `path+lora`, or a table with `model` and `lora`.
fn read_model(reader: &mut Reader<'_>, key: &str) -> Option<ModelName> {
    let item = reader.item(key)?;
    if let Value::Table(_) = item.value {
        let mut table = reader.table(key)?;
        if table.has("path") {
            table.declare("revision");
            return table.optional::<String>("path").map(|path| ModelName { path, lora: None });
        }
        let model = read_model(&mut table, "model")?;
        let lora = read_model(&mut table, "lora").map(|lora| lora.path);
        return Some(ModelName { lora: lora.or(model.lora), ..model });
    }
    let text: String = reader.optional(key)?;
    let parts: Vec<&str> = text.split('+').collect();
    match parts.as_slice() {
        [path] if !path.is_empty() => Some(ModelName { path: (*path).to_owned(), lora: None }),
        [path, lora] if !path.is_empty() && !lora.is_empty() => {
            Some(ModelName { path: (*path).to_owned(), lora: Some((*lora).to_owned()) })
        }
        _ => {
            let help = "write a folder or name, or `model+adapter` with one `+`";
            reader.error(key, format!("`{text}` names no model"), help);
            None
        }
    }
}

fn read_dtype(reader: &mut Reader<'_>, key: &str) -> Option<Dtype> {
    const NAMES: [(&str, Dtype); 10] = [
        ("float32", Dtype::F32),
        ("bfloat16", Dtype::BF16),
        ("float16", Dtype::F16),
        ("float64", Dtype::F64),
        ("f32", Dtype::F32),
        ("fp32", Dtype::F32),
        ("bf16", Dtype::BF16),
        ("f16", Dtype::F16),
        ("fp16", Dtype::F16),
        ("half", Dtype::F16),
    ];
    let text: String = reader.optional(key)?;
    let name = text.strip_prefix("torch.").unwrap_or(&text);
    let found = NAMES.iter().find(|(known, _)| *known == name).map(|(_, dtype)| *dtype);
    if found.is_none() {
        let help = "one of float32, bfloat16, float16, float64";
        reader.error(key, format!("`{text}` is no number type of weights"), help);
    }
    found
}

fn read_tokenizer(reader: &mut Reader<'_>) -> Option<TokenizerPlan> {
    if reader.has("tokenizer") && reader.has("tokenizer_source") {
        let help = "keep `tokenizer`, and write the source into it";
        reader.error("tokenizer", "`tokenizer` and `tokenizer_source` say the same", help);
    }
    let plan = |source| TokenizerPlan { source, tokens: BTreeMap::new(), pad_to_multiple_of: 1 };
    if reader.has("tokenizer_source") {
        let source = read_vocabulary(reader, "tokenizer_source");
        reader.declare("tokenizer");
        return source.map(plan);
    }
    reader.declare("tokenizer_source");
    let mut table = reader.table("tokenizer")?;
    let source = if table.has("source") {
        read_vocabulary(&mut table, "source")?
    } else {
        Vocabulary::Union
    };
    let mut plan = plan(source);
    plan.pad_to_multiple_of = table.optional::<u64>("pad_to_multiple_of").unwrap_or(1) as usize;
    if plan.pad_to_multiple_of == 0 {
        table.error("pad_to_multiple_of", "a multiple of 0 is no size", "write 1 or more");
    }
    if let Some(mut tokens) = table.table("tokens") {
        for name in tokens.keys() {
            let Some(mut token) = tokens.table(name) else { continue };
            let force = token.optional("force").unwrap_or(false);
            let source = read_token_source(&mut token);
            plan.tokens.insert(name.to_owned(), TokenPlan { source, force });
        }
    }
    Some(plan)
}

fn read_vocabulary(reader: &mut Reader<'_>, key: &str) -> Option<Vocabulary> {
    let model = read_model(reader, key)?;
    Some(match model.path.as_str() {
        "base" => Vocabulary::Base,
        "union" => Vocabulary::Union,
        _ => Vocabulary::Model(model),
    })
}

fn read_token_source(reader: &mut Reader<'_>) -> Option<TokenSource> {
    let item = reader.item("source")?;
    let kind = match &item.value {
        Value::Table(table) => table.get("kind").map(|entry| &entry.item.value),
        _ => None,
    };
    let Some(kind) = kind else { return read_model(reader, "source").map(TokenSource::Model) };
    let kind = kind.clone();
    let mut table = reader.table("source")?;
    table.declare("kind");
    if kind == Value::from("zero") {
        return Some(TokenSource::Zero);
    }
    if kind != Value::from("model_token") {
        table.error("kind", "this kind of source is not known", "write `zero` or `model_token`");
        return None;
    }
    let model = read_required_model(&mut table, "model");
    let (id, text) = (table.optional::<u64>("token_id"), table.optional::<String>("token"));
    match (model?, id, text) {
        (model, Some(id), None) => Some(TokenSource::Id(model, id as usize)),
        (model, None, Some(text)) => Some(TokenSource::Token(model, text)),
        _ => {
            let help = "give one of `token` and `token_id`";
            table.error("kind", "the source names no token, or two", help);
            None
        }
    }
}

fn read_settings(reader: &mut Reader<'_>, method: Option<&'static Method>) -> Settings {
    let mut settings = Settings::new();
    let Some(mut table) = reader.table("parameters") else { return settings };
    let Some(method) = method else {
        // Which keys there may be depends on the method, whose mistake is noted already.
        table.declare_all();
        return settings;
    };
    for parameter in method.parameters {
        let Some(item) = table.item(parameter.name) else { continue };
        let path = format!("{}.{}", table.path(), parameter.name);
        if let Some(setting) = read_setting(&table, &path, item, parameter) {
            settings.insert(parameter.name, setting);
        }
    }
    let foreign = |name: &str| {
        ALL.iter().any(|other| other.parameters.iter().any(|parameter| parameter.name == name))
    };
    for name in table.keys() {
        let own = method.parameters.iter().any(|parameter| parameter.name == name);
        if !own && foreign(name) {
            table.declare(name);
            let help = "remove it, or choose the method it belongs to";
            table.warn(name, format!("`{name}` has no effect in `{}`", method.name), help);
        }
    }
    settings
}

fn read_setting(
    reader: &Reader<'_>,
    path: &str,
    item: &Item,
    parameter: &Parameter,
) -> Option<Setting> {
    match &item.value {
        Value::List(items) if items.is_empty() => {
            let help = "write a number, or numbers from the first layer to the last";
            reader.report(
                Diagnostic::error(format!("`{path}` is an empty list")).at(item.span).help(help),
            );
            None
        }
        Value::List(items) if items.iter().all(|item| matches!(item.value, Value::Table(_))) => {
            let cases = items.iter().enumerate();
            let cases: Option<Vec<_>> = cases
                .map(|(i, item)| read_case(reader, &format!("{path}[{i}]"), item, parameter))
                .collect();
            cases.map(Setting::Cases)
        }
        Value::List(items) => {
            let values: Option<Vec<f64>> =
                items.iter().map(|item| read_scalar(reader, path, item, parameter)).collect();
            values.map(Setting::Gradient)
        }
        Value::Table(_) => {
            read_case(reader, path, item, parameter).map(|case| Setting::Cases(vec![case]))
        }
        _ => read_scalar(reader, path, item, parameter).map(Setting::Value),
    }
}

/// Reads `{filter: …, value: …}`.
fn read_case(
    reader: &Reader<'_>,
    path: &str,
    item: &Item,
    parameter: &Parameter,
) -> Option<(Option<String>, Setting)> {
    let Value::Table(table) = &item.value else { return None };
    for (key, entry) in table.iter() {
        if !matches!(key, "filter" | "value") {
            let near = nearest(key, ["filter", "value"].into_iter());
            let help = match near.first() {
                Some(near) => format!("did you mean `{near}`?"),
                None => "the keys are `filter` and `value`".to_owned(),
            };
            let error = Diagnostic::error(format!("unknown key `{key}` in `{path}`"));
            reader.report(error.at(entry.key_span).help(help));
        }
    }
    let filter = match table.get("filter").map(|entry| &entry.item) {
        None => None,
        Some(Item { value: Value::String(text), .. }) => Some(text.clone()),
        Some(other) => {
            let error = Diagnostic::error(format!("`{path}.filter` must be a part of a name"));
            let found = format!("found {}", other.value.describe());
            reader.report(error.at(other.span).label(found).help("write it in quotes"));
            return None;
        }
    };
    let Some(value) = table.get("value") else {
        let error = Diagnostic::error(format!("`{path}` needs the key `value`"));
        reader.report(error.at(item.span).help("write `- filter: self_attn` and `value: 0.5`"));
        return None;
    };
    Some((filter, read_setting(reader, &format!("{path}.value"), &value.item, parameter)?))
}

fn read_scalar(reader: &Reader<'_>, path: &str, item: &Item, parameter: &Parameter) -> Option<f64> {
    let number = match &item.value {
        Value::Bool(value) => Some(f64::from(u8::from(*value))),
        Value::Integer(value) => Some(*value as f64),
        Value::Float(value) => Some(*value),
        // YAML 1.1 reads `1e-4` as text, so plans hold numbers in quotes.
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    let is_flag = matches!(item.value, Value::Bool(_));
    let of_kind = |number: &f64| match parameter.kind {
        Kind::Number => !is_flag && number.is_finite(),
        Kind::Count => !is_flag && number.fract() == 0.0,
        Kind::Flag => *number == 0.0 || *number == 1.0,
    };
    let kind = match parameter.kind {
        Kind::Number => "a number",
        Kind::Count => "a whole number",
        Kind::Flag => "true or false",
    };
    let found = format!("found {}", item.value.describe());
    match number.filter(of_kind) {
        Some(number) if (parameter.low..=parameter.high).contains(&number) => Some(number),
        Some(_) => {
            let bounds = if parameter.high == f64::MAX {
                format!("at least {}", parameter.low)
            } else {
                format!("from {} to {}", parameter.low, parameter.high)
            };
            let error = Diagnostic::error(format!("`{path}` must be {bounds}"));
            reader.report(error.at(item.span).label(found).help(parameter.about));
            None
        }
        None => {
            let error = Diagnostic::error(format!("`{path}` must be {kind}"));
            reader.report(error.at(item.span).label(found).help(parameter.about));
            None
        }
    }
}

/// Checks what a method asks of its inputs.
fn check_inputs(
    reader: &Reader<'_>,
    method: &Method,
    base: Option<&ModelName>,
    modules: &[Module],
) {
    for slice in modules.iter().flat_map(|module| &module.slices) {
        let base = slice.base.as_ref().or(base);
        let apart = method.base != crate::methods::Base::Ordinary;
        if method.base == crate::methods::Base::Required && base.is_none() {
            let error = Diagnostic::error(format!("`{}` needs `base_model`", method.name));
            reader.report(error.help("name the model the others were tuned from"));
        }
        let mut seen: Vec<&ModelName> = Vec::new();
        let mut others = 0;
        for input in &slice.sources {
            // Layers of one model may meet in a slice, a whole model only once.
            if input.layers.is_none() && seen.contains(&&input.model) {
                let error =
                    Diagnostic::error(format!("the model `{}` is listed twice", input.model));
                reader.report(error.at(input.span).help("list it once, with a larger weight"));
            }
            seen.push(&input.model);
            others += usize::from(!apart || Some(&input.model) != base);
        }
        let (low, high) = (method.min_inputs, method.max_inputs);
        if !reader.has_errors() && !(low..=high).contains(&others) {
            let wanted = match (low, high) {
                (low, high) if low == high => format!("{low}"),
                (low, usize::MAX) => format!("at least {low}"),
                (low, high) => format!("{low} to {high}"),
            };
            let besides = if apart && base.is_some() { " besides the base" } else { "" };
            let error = Diagnostic::error(format!(
                "`{}` takes {wanted} model{}{besides}, found {others}",
                method.name,
                if wanted == "1" { "" } else { "s" }
            ));
            let span = slice.sources.first().and_then(|input| input.span);
            reader.report(error.at(span).help("change the list of models, or the method"));
        }
        for parameter in method.parameters.iter().filter(|p| p.scope == Scope::Shared) {
            for input in &slice.sources {
                if input.parameters.contains_key(parameter.name) {
                    let message =
                        format!("`{}` holds for all models, and is not read here", parameter.name);
                    let warning = Diagnostic::warning(message).at(input.span);
                    reader.report(warning.help("move it to the plan's own `parameters`"));
                }
            }
        }
    }
}
