//! Models of different vocabularies brought to one: which row of which model stands for a token.
//!
//! A model that lacks a token takes its embedding from the base where that has it, from the only
//! model that has it, or from the mean of all that have it, as mergekit does.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::methods::Values;
use crate::model::Model;
use crate::plan::{ModelName, Plan, TokenPlan, TokenSource, Vocabulary};
use crate::source::read_json_object;
use crate::{Error, Result};

/// Numbers of a model's tokens by their text.
type Tokens = BTreeMap<String, usize>;

/// The vocabulary of the result.
#[derive(Debug)]
pub(crate) struct Aligned {
    /// Rows of the embeddings, padding included.
    pub(crate) num_rows: usize,
    /// The model whose tokenizer files are taken over.
    pub(crate) lender: usize,
    /// The tokenizer, where it is not the lender's as it is.
    pub(crate) tokenizer: Option<Value>,
    /// What is worth knowing.
    pub(crate) notes: Vec<String>,
    tokens: Tokens,
    of_models: Vec<Tokens>,
    plans: BTreeMap<String, TokenPlan>,
}

/// Where a row of an aligned embedding comes from.
#[derive(Debug, Clone, PartialEq)]
enum Row {
    Of {
        model: usize,
        row: usize,
    },
    Mean(Vec<(usize, usize)>),
    Zero,
    /// The mean of all rows that stand for a token.
    Padding,
}

impl Aligned {
    /// Reads the tokenizers and decides on the result's vocabulary; `None` if the plan does not ask.
    pub(crate) fn new(plan: &Plan, models: &[Model]) -> Result<Option<Self>> {
        let Some(wanted) = &plan.tokenizer else { return Ok(None) };
        let index = |name: &ModelName| models.iter().position(|model| model.name == *name);
        let base = plan.base.as_ref().and_then(index).unwrap_or(0);
        let mut notes = Vec::new();
        let mut files = Vec::with_capacity(models.len());
        for model in models {
            files.push(read_json_object(&model.source.folder().join("tokenizer.json"))?);
        }
        let lender = match &wanted.source {
            Vocabulary::Base | Vocabulary::Union => base,
            Vocabulary::Model(model) => index(model).unwrap_or(base),
        };
        let lent = |i: usize| {
            files[i].as_ref().ok_or_else(|| Error::Content {
                path: models[i].source.folder().to_path_buf(),
                what: "the plan takes its tokenizer from here".to_owned(),
                expected: "tokenizer.json".to_owned(),
                found: "none".to_owned(),
                help: "save the model's tokenizer in this form, or name another source".to_owned(),
            })
        };
        let mut of_models = Vec::with_capacity(models.len());
        for (i, file) in files.iter().enumerate() {
            if file.is_none() && i != base {
                notes.push(format!(
                    "{} has no tokenizer.json; its tokens are taken to be those of {}",
                    models[i].name, models[base].name
                ));
            }
            let file = if file.is_some() { i } else { base };
            of_models.push(tokens_of(lent(file)?));
        }
        let mut json = Value::Object(lent(lender)?.clone());
        let mut tokens = of_models[lender].clone();
        let before = tokens.len();
        if wanted.source == Vocabulary::Union {
            for (i, own) in of_models.iter().enumerate() {
                let mut in_order: Vec<(&String, &usize)> = own.iter().collect();
                in_order.sort_by_key(|(_, id)| **id);
                for (text, _) in in_order {
                    if !tokens.contains_key(text) {
                        let known = files[i].as_ref().and_then(|file| added(file, text));
                        add_token(&mut json, &mut tokens, text, known);
                    }
                }
            }
        }
        for text in wanted.tokens.keys() {
            if !tokens.contains_key(text) {
                add_token(&mut json, &mut tokens, text, None);
            }
        }
        let tokenizer = (tokens.len() != before).then_some(json);
        let size = tokens.values().map(|id| id + 1).max().unwrap_or(0);
        let num_rows = size.next_multiple_of(wanted.pad_to_multiple_of.max(1));
        let plans = wanted.tokens.clone();
        Ok(Some(Self { num_rows, lender, tokenizer, notes, tokens, of_models, plans }))
    }

    /// Returns the values of a tensor with one row per token, for input `own` of `inputs`.
    ///
    /// `parts` holds the tensor of every model that is needed: the inputs, the base, and the models
    /// the plan takes tokens from.
    pub(crate) fn values<'a>(
        &'a self,
        own: usize,
        base: Option<usize>,
        models: &[Model],
        parts: BTreeMap<usize, (Box<dyn Values + 'a>, usize)>,
        width: usize,
    ) -> Result<AlignedTensor<'a>> {
        let mut rows = vec![Row::Padding; self.num_rows];
        let size = self.tokens.values().map(|id| id + 1).max().unwrap_or(0);
        rows[..size].fill(Row::Zero);
        for (text, id) in &self.tokens {
            rows[*id] = self.row(text, own, base, models, &parts)?;
        }
        let mut tensor = AlignedTensor { own, parts, rows, width, padding: Vec::new() };
        if size < self.num_rows {
            tensor.padding = tensor.mean(size)?;
        }
        Ok(tensor)
    }

    fn row(
        &self,
        text: &str,
        own: usize,
        base: Option<usize>,
        models: &[Model],
        parts: &BTreeMap<usize, (Box<dyn Values + '_>, usize)>,
    ) -> Result<Row> {
        // A token beyond a model's embeddings is one the model does not have.
        let find = |model: usize| {
            let row = *self.of_models.get(model)?.get(text)?;
            (row < parts.get(&model)?.1).then_some(row)
        };
        let plan = self.plans.get(text);
        if let Some(row) = find(own)
            && !plan.is_some_and(|plan| plan.force)
        {
            return Ok(Row::Of { model: own, row });
        }
        if let Some(source) = plan.and_then(|plan| plan.source.as_ref()) {
            return self.planned(text, source, models, parts);
        }
        let holders: Vec<(usize, usize)> =
            parts.keys().filter_map(|model| Some((*model, find(*model)?))).collect();
        let of_base = base.and_then(|base| Some((base, find(base)?)));
        let of_base = of_base.as_ref();
        Ok(match (holders.as_slice(), of_base) {
            ([], _) => Row::Zero,
            ([(model, row)], _) | (_, Some((model, row))) => Row::Of { model: *model, row: *row },
            _ => Row::Mean(holders),
        })
    }

    fn planned(
        &self,
        text: &str,
        source: &TokenSource,
        models: &[Model],
        parts: &BTreeMap<usize, (Box<dyn Values + '_>, usize)>,
    ) -> Result<Row> {
        let (name, row) = match source {
            TokenSource::Zero => return Ok(Row::Zero),
            TokenSource::Model(name) => (name, Err(text)),
            TokenSource::Token(name, other) => (name, Err(other.as_str())),
            TokenSource::Id(name, id) => (name, Ok(*id)),
        };
        let model = models.iter().position(|model| model.name == *name);
        let found = model.and_then(|model| {
            let row = match row {
                Ok(id) => id,
                Err(text) => *self.of_models.get(model)?.get(text)?,
            };
            (row < parts.get(&model)?.1).then_some(Row::Of { model, row })
        });
        found.ok_or_else(|| Error::Misfit {
            problems: vec![format!(
                "the plan takes token `{text}` from {name}, which does not have it"
            )],
        })
    }

    /// Lists the models the plan takes tokens from.
    pub(crate) fn lenders(&self, models: &[Model]) -> Vec<usize> {
        let names = self.plans.values().filter_map(|plan| match &plan.source {
            Some(
                TokenSource::Model(name) | TokenSource::Token(name, _) | TokenSource::Id(name, _),
            ) => Some(name),
            _ => None,
        });
        names.filter_map(|name| models.iter().position(|model| model.name == *name)).collect()
    }
}

/// An embedding in the order of the result's vocabulary.
#[derive(Debug)]
pub(crate) struct AlignedTensor<'a> {
    own: usize,
    parts: BTreeMap<usize, (Box<dyn Values + 'a>, usize)>,
    rows: Vec<Row>,
    width: usize,
    padding: Vec<f32>,
}

impl AlignedTensor<'_> {
    fn mean(&self, size: usize) -> Result<Vec<f32>> {
        let mut sum = vec![0.0_f64; self.width];
        let mut row = vec![0.0; self.width];
        for i in 0..size {
            self.read(i * self.width, &mut row)?;
            sum.iter_mut().zip(&row).for_each(|(sum, x)| *sum += f64::from(*x));
        }
        Ok(sum.into_iter().map(|sum| (sum / size.max(1) as f64) as f32).collect())
    }

    /// Reads a part of one row, or of rows that follow one another in their model too.
    fn read_rows(&self, row: usize, column: usize, out: &mut [f32]) -> Result<()> {
        match &self.rows[row] {
            Row::Of { model, row } => match self.parts.get(model) {
                Some((values, _)) => values.read(row * self.width + column, out)?,
                None => out.fill(0.0),
            },
            Row::Zero => out.fill(0.0),
            Row::Padding => out.copy_from_slice(&self.padding[column..column + out.len()]),
            Row::Mean(holders) => {
                let mut one = vec![0.0; out.len()];
                out.fill(0.0);
                for (model, row) in holders {
                    if let Some((values, _)) = self.parts.get(model) {
                        values.read(row * self.width + column, &mut one)?;
                    }
                    out.iter_mut().zip(&one).for_each(|(sum, x)| *sum += x);
                }
                for x in out.iter_mut() {
                    *x /= holders.len() as f32;
                }
            }
        }
        Ok(())
    }

    /// Counts the rows from `row` on that follow one another in one model.
    fn run(&self, row: usize, most: usize) -> usize {
        let Row::Of { model, row: first } = self.rows[row] else { return 1 };
        let follows = |i: &usize| self.rows[row + i] == Row::Of { model, row: first + i };
        1 + (1..most.min(self.rows.len() - row)).take_while(follows).count()
    }
}

impl Values for AlignedTensor<'_> {
    fn read(&self, start: usize, out: &mut [f32]) -> Result<()> {
        let mut at = start;
        let mut rest = out;
        while !rest.is_empty() {
            let (row, column) = (at / self.width, at % self.width);
            let most = (column + rest.len()).div_ceil(self.width);
            let n = (self.run(row, most) * self.width - column).min(rest.len());
            let (part, tail) = rest.split_at_mut(n);
            self.read_rows(row, column, part)?;
            rest = tail;
            at += n;
        }
        Ok(())
    }

    fn model(&self) -> String {
        self.parts.get(&self.own).map(|(values, _)| values.model()).unwrap_or_default()
    }
}

fn tokens_of(tokenizer: &serde_json::Map<String, Value>) -> Tokens {
    let mut tokens = Tokens::new();
    match tokenizer.get("model").and_then(|model| model.get("vocab")) {
        Some(Value::Object(vocabulary)) => {
            for (text, id) in vocabulary {
                if let Some(id) = id.as_u64() {
                    tokens.insert(text.clone(), id as usize);
                }
            }
        }
        // A Unigram model lists `[text, score]` in the order of the numbers.
        Some(Value::Array(vocabulary)) => {
            for (id, entry) in vocabulary.iter().enumerate() {
                if let Some(text) = entry.get(0).and_then(Value::as_str) {
                    tokens.insert(text.to_owned(), id);
                }
            }
        }
        _ => {}
    }
    for token in tokenizer.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
        let text = token.get("content").and_then(Value::as_str);
        if let (Some(text), Some(id)) = (text, token.get("id").and_then(Value::as_u64)) {
            tokens.insert(text.to_owned(), id as usize);
        }
    }
    tokens
}

/// Finds what a tokenizer says about an added token.
fn added(tokenizer: &serde_json::Map<String, Value>, text: &str) -> Option<Value> {
    let tokens = tokenizer.get("added_tokens")?.as_array()?;
    tokens.iter().find(|token| token.get("content").and_then(Value::as_str) == Some(text)).cloned()
}

/// Adds a token behind the last.
fn add_token(json: &mut Value, tokens: &mut Tokens, text: &str, known: Option<Value>) {
    let id = tokens.values().map(|id| id + 1).max().unwrap_or(0);
    tokens.insert(text.to_owned(), id);
    let mut token = known.unwrap_or_else(|| {
        json!({
            "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": true, "special": false
        })
    });
    token["id"] = json!(id);
    if !json["added_tokens"].is_array() {
        json["added_tokens"] = json!([]);
    }
    if let Some(list) = json["added_tokens"].as_array_mut() {
        list.push(token);
    }
}
