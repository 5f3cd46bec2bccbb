//! The recipe: what a person wrote, with every mistake shown at once.

use std::path::{Path, PathBuf};

use retune_core::method::{Method, Part};
use retune_methods::registry;
use retune_methods::stack::stacked;
use retune_options::{Bytes, Document, Options, Reader, Report, Table, choice, options, to_toml};
use retune_train::settings::TrainOptions;

choice! {
    /// Which tokens of a row are learned.
    pub enum LossOn {
        /// What the assistant says, each turn with its end token.
        Assistant = "assistant",
        /// The completion of a prompt.
        Completion = "completion",
        /// Every token.
        All = "all",
    }
}

choice! {
    /// What happens to a row that is longer than `max_length`.
    pub enum OnLong {
        /// Its end is cut off, and counted.
        Cut = "cut",
        /// It is left out, and counted.
        Drop = "drop",
        /// The run stops.
        Error = "error",
    }
}

options! {
    /// Where rows come from and what is learned of them.
    pub struct DataOptions("data") {
        /// File of training rows: JSONL, JSON, CSV or Parquet; pictures also as a folder of one
        /// folder per class, or packed as IDX or CIFAR binary, a `*` standing for several files.
        train: PathBuf;
        /// File of rows the run is steered by (best checkpoint, early stopping).
        validation: Option<PathBuf> = None;
        /// Where there is no such file: fraction of the training rows held out.
        validation_fraction: f64 = 0.05, in 0.0..=0.9;
        /// File of rows that are only measured, before and after.
        test: Option<PathBuf> = None;
        /// Fields of a row, where they have other names: prompt, completion, text, label, messages,
        /// image.
        columns: std::collections::BTreeMap<String, String>;
        /// Field that holds a row's task, counted from 0, for methods that tell tasks apart.
        task: Option<String> = None;
        /// Text of the prompt, with fields in braces: `Question: {question}`; of a picture's class,
        /// for a model with a tower of texts: `a photo of a {label}.`.
        prompt: Option<String> = None;
        /// Texts of which one stands beside each training picture, with its class as `{label}`: a
        /// model with a tower of texts then learns pairs; without, it learns to choose the prompt.
        captions: Vec<String> = Vec::new();
        /// Pixels of black around training pictures before a window of their own size is cut out at
        /// random.
        crop_padding: usize = 0, in 0..=4096;
        /// Mirrors every second training picture, left to right.
        flip: bool = false;
        /// Which tokens are learned; by default assistant for conversations, completion for prompts,
        /// all for plain text.
        loss_on: Option<LossOn> = None;
        /// System message put before conversations that have none.
        system: Option<String> = None;
        /// Longest row in tokens; by default the model's own limit, at most 2048.
        max_length: Option<usize> = None, in 2..=1_048_576;
        /// What happens to longer rows.
        on_long: OnLong = OnLong::Cut;
        /// Lays several rows into one of `max_length` tokens, each with its own attention.
        packing: bool = false;
        /// Skips broken lines and counts them, instead of stopping.
        skip_broken: bool = false;
        /// Draws rows in a new order each epoch.
        shuffle: bool = true;
        /// Uses the first rows only; 0 means all.
        limit: usize = 0, in 0..=1_000_000_000;
    }
}

impl DataOptions {
    /// Takes relative paths as relative to `folder`, where the recipe lies.
    pub fn resolve_paths(&mut self, folder: &Path) {
        let paths = [Some(&mut self.train), self.validation.as_mut(), self.test.as_mut()];
        for path in paths.into_iter().flatten() {
            if path.is_relative() {
                *path = folder.join(&*path);
            }
        }
    }
}

choice! {
    /// How the result is measured.
    pub enum EvaluationKind {
        /// Loss and perplexity of the learned tokens.
        Loss = "loss",
        /// The answer is generated and compared.
        Generate = "generate",
        /// Each possible answer is scored, and the likeliest taken.
        Choice = "choice",
    }
}

options! {
    /// How the model is measured before and after.
    pub struct EvaluateOptions("evaluate") {
        /// How the result is measured, on the test rows (else the validation rows).
        kind: EvaluationKind = EvaluationKind::Loss;
        /// Rows measured at most.
        rows: usize = 200, in 1..=1_000_000_000;
        /// The answers a choice is made from; by default those seen in the training rows.
        choices: Vec<String> = Vec::new();
        /// Tokens generated at most.
        max_new_tokens: usize = 64, in 1..=1_048_576;
        /// Example answers shown before and after.
        examples: usize = 3, in 0..=100;
        /// Also measures the model before tuning.
        before: bool = true;
    }
}

choice! {
    /// The arithmetic of products with frozen weights.
    pub enum ArithmeticName {
        /// 32-bit floats.
        F32 = "f32",
        /// Inputs rounded to bfloat16, sums in 32 bits; f32 where the processor cannot.
        Bf16 = "bf16",
    }
}

choice! {
    /// In which form frozen weights stay in memory.
    pub enum WeightsName {
        /// 32-bit floats.
        F32 = "f32",
        /// bfloat16.
        Bf16 = "bf16",
        /// As the file stores them: the blocks of a GGUF file stay quantised.
        Stored = "stored",
    }
}

options! {
    /// What the run may use of the machine.
    pub struct ComputeOptions("compute") {
        /// Arithmetic of products with frozen weights.
        arithmetic: ArithmeticName = ArithmeticName::F32;
        /// Form of frozen weights in memory.
        weights: WeightsName = WeightsName::F32;
        /// Memory the run may take, e.g. "4GiB"; layers are recomputed, or the plan refused, beyond it.
        memory: Option<Bytes> = None;
        /// Threads; 0 means one per core. The numbers do not depend on it.
        threads: usize = 0, in 0..=4096;
    }
}

/// A recipe as written.
#[derive(Debug)]
pub struct Recipe {
    /// The run's name; runs are numbered beside it.
    pub name: String,
    /// A catalogue name, `hf:org/name`, a folder or a .gguf file.
    pub model: String,
    /// Adapters merged into the model before it trains.
    pub adapters: Vec<PathBuf>,
    /// Where runs are kept.
    pub runs: PathBuf,
    /// The seed every random draw comes from.
    pub seed: u64,
    /// The `[data]` table.
    pub data: DataOptions,
    /// The `[method.*]` tables: one method, or several stacked in the order they are written.
    pub method: Box<dyn Method>,
    /// The method's name, or the names joined by ` + `.
    pub method_name: String,
    /// The `[train]` table.
    pub train: TrainOptions,
    /// The `[evaluate]` table.
    pub evaluate: EvaluateOptions,
    /// The `[compute]` table.
    pub compute: ComputeOptions,
    /// Everything above with every default filled in.
    pub resolved: String,
}

options! {
    /// A whole recipe.
    pub struct RecipeHead("recipe") {
        /// A catalogue name, hf:org/name, a folder or a .gguf file.
        model: String;
        /// Adapter folders merged into the model before it trains, in this order.
        adapters: Vec<PathBuf> = Vec::new();
        /// The run's name; by default the recipe file's.
        name: Option<String> = None;
        /// Where runs are kept.
        runs: PathBuf = PathBuf::from("runs");
        /// The seed every random draw comes from.
        seed: u64 = 42;
        /// Where rows come from and what is learned of them.
        data: DataOptions;
        /// How the run trains.
        train: TrainOptions;
        /// How the model is measured before and after.
        evaluate: EvaluateOptions;
        /// What the run may use of the machine.
        compute: ComputeOptions;
    }
}

/// Returns the JSON Schema of a recipe, with one table of options per method.
pub fn schema() -> retune_options::Json {
    let mut schema = retune_options::schema(RecipeHead::specs());
    let methods: serde_json::Map<String, retune_options::Json> = registry::METHODS
        .iter()
        .map(|plugin| {
            let mut options = retune_options::schema(&(plugin.card.options)());
            options["description"] = plugin.card.summary.into();
            (plugin.card.name.to_owned(), options)
        })
        .collect();
    schema["properties"]["method"] = serde_json::json!({
        "type": "object",
        "description": "The tuning method: one table, named after it; several are stacked in their order.",
        "properties": methods,
        "additionalProperties": false,
        "minProperties": 1,
    });
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema".into();
    schema["title"] = "A recipe of retune".into();
    schema
}

impl Recipe {
    /// Returns every setting as a dotted name and its value, in the order of the resolved recipe.
    pub fn settings(&self) -> Vec<(String, String)> {
        let mut list = Vec::new();
        let mut section = String::new();
        for line in self.resolved.lines() {
            if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
                section = format!("{name}.");
            } else if let Some((key, value)) = line.split_once(" = ") {
                list.push((format!("{section}{key}"), value.to_owned()));
            }
        }
        list
    }

    /// Reads a recipe; `overrides` are `key.path=value` texts of the command line.
    ///
    /// # Errors
    /// A report of all mistakes.
    pub fn parse(
        file_name: &str,
        bytes: &[u8],
        overrides: &[String],
    ) -> Result<(Self, Report), Report> {
        Self::parse_as(file_name, bytes, overrides, None)
    }

    /// Reads a recipe as one of `method`, whose table may be absent or stand beside others.
    ///
    /// # Errors
    /// As [`Recipe::parse`].
    pub fn parse_as(
        file_name: &str,
        bytes: &[u8],
        overrides: &[String],
        method: Option<&str>,
    ) -> Result<(Self, Report), Report> {
        let mut document = Document::parse_bytes(file_name, bytes)?;
        for assignment in overrides {
            document.set("command line", assignment)?;
        }
        if let Some(method) = method {
            document.choose("method", method);
        }
        let default_name = Path::new(file_name)
            .file_stem()
            .map_or_else(|| "run".to_owned(), |stem| stem.to_string_lossy().into_owned());
        // Paths in a recipe are relative to it, so that it works from any folder.
        let folder = Path::new(file_name).parent().unwrap_or(Path::new("")).to_path_buf();
        document.read(|reader| Self::read(reader, default_name, &folder))
    }

    fn read(reader: &mut Reader<'_>, default_name: String, folder: &Path) -> Self {
        let mut head = RecipeHead::read(reader);
        head.data.resolve_paths(folder);
        for path in head.adapters.iter_mut().filter(|path| path.is_relative()) {
            *path = folder.join(&*path);
        }
        let name = head.name.get_or_insert(default_name).clone();
        let names: Vec<&str> = registry::names().collect();
        let mut resolved = head.write();
        let read = |(name, mut table): (String, Reader<'_>)| {
            let plugin = registry::find(&name)
                .unwrap_or_else(|| unreachable!("the reader only gives known names"));
            Part { name, method: (plugin.read)(&mut table) }
        };
        let mut parts: Vec<Part> =
            reader.variants("method", &names).into_iter().map(read).collect();
        if parts.is_empty() {
            // The reader has noted the mistake; this only lets it look for more.
            let method = Box::<retune_methods::lora::Lora>::default();
            parts.push(Part { name: "lora".to_owned(), method });
        }
        let mut methods = Table::default();
        for part in &parts {
            methods.insert(part.name.clone(), part.method.options());
        }
        resolved.insert("method", methods);
        let names: Vec<&str> = parts.iter().map(|part| part.name.as_str()).collect();
        let method_name = names.join(" + ");
        let method = stacked(parts);
        let resolved = to_toml(&resolved);
        Self {
            name,
            model: head.model.clone(),
            adapters: head.adapters.clone(),
            runs: head.runs.clone(),
            seed: head.seed,
            data: head.data,
            method,
            method_name,
            train: head.train,
            evaluate: head.evaluate,
            compute: head.compute,
            resolved,
        }
    }
}
