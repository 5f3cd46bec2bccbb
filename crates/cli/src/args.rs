//! Arguments. Help, completions and the man page follow from these definitions.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::commands::combine::CombineArguments;
use crate::commands::compress::{CompressArguments, DecompressArguments};
use crate::commands::crash::CrashCommand;
use crate::commands::diff::DiffArguments;
use crate::commands::extract::ExtractArguments;
use crate::commands::graft::GraftCommand;
use crate::commands::half_reset::HalfResetArguments;
use crate::commands::ship::ShipArguments;

/// Tunes pretrained models without Python: few parameters, chosen settings, an ordinary processor.
#[derive(Debug, Parser)]
#[command(name = "retune", version, propagate_version = true, arg_required_else_help = true)]
pub(crate) struct Arguments {
    /// Prints JSON for machines instead of text.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// One command.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Tunes a model as a recipe says: measures, trains, measures, reports.
    Run(RecipeArguments),
    /// Shows what a run would do, without doing it.
    Plan(RecipeArguments),
    /// Carries one recipe out under many methods, with the same steps, and compares them.
    ///
    /// Each run has a process of its own; one that fails does not stop the others. Called again, it
    /// keeps the runs that are finished and goes on with one that was interrupted.
    Compare {
        /// The recipe; it may have a table for each method, e.g. `[method.lora]`.
        #[command(flatten)]
        recipe: RecipeArguments,
        /// The methods, with commas between.
        #[arg(long, value_delimiter = ',', required = true)]
        methods: Vec<String>,
        /// Runs of each method: with the recipe's seed, the next one, and so on.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1000))]
        seeds: u64,
        /// What they are compared by; the recipe's own measure where absent.
        #[arg(long)]
        metric: Option<String>,
    },
    /// Finds the fewest random directions that do what tuning the whole model does (d90).
    ///
    /// Tunes the whole model, then along more and more directions (SAID) until one number of them
    /// reaches 90 % of its score, then along numbers between. Each run has a process of its own; called
    /// again, it keeps the runs that are finished. The recipe needs data that are scored.
    IntrinsicDimension {
        /// The recipe; `[method.full]` and `[method.said]` in it count.
        #[command(flatten)]
        recipe: RecipeArguments,
        /// What is searched.
        #[command(flatten)]
        probe: Probe,
    },
    /// Runs small-scale proofs of what the papers claim, and writes down what holds.
    ///
    /// Every proof is whole in itself: it makes its data from a seed and takes at most ten minutes
    /// on two cores.
    Claims {
        /// Numbers of the proofs; all where absent.
        numbers: Vec<u32>,
        /// Runs only the proofs that take seconds.
        #[arg(long)]
        quick: bool,
        /// The page to write; sections of proofs that are not run stay.
        #[arg(long, default_value = "docs/claims.md")]
        output: PathBuf,
    },
    /// Goes on with an interrupted run.
    Resume {
        /// The run's folder.
        run: PathBuf,
    },
    /// Measures a model, with or without an adapter, on a recipe's held-out rows.
    Eval {
        /// The recipe.
        #[command(flatten)]
        recipe: RecipeArguments,
        /// Adapter folders, each on top of those before it; the base alone where absent.
        #[arg(long = "adapter")]
        adapters: Vec<PathBuf>,
        /// Uses an adapter of another base.
        #[arg(long)]
        force: bool,
    },
    /// Talks with a model.
    Chat(ModelArguments),
    /// Continues a prompt.
    Generate {
        /// The model.
        #[command(flatten)]
        model: ModelArguments,
        /// The prompt; `-` reads standard input.
        #[arg(long)]
        prompt: String,
        /// Gives the prompt as it is, without the chat template.
        #[arg(long)]
        raw: bool,
    },
    /// Computes logits of token ids in a file, to compare with another tool.
    Logits {
        /// Catalogue name, hf:org/name, folder or .gguf file.
        #[arg(long)]
        model: String,
        /// Adapter folders, each on top of those before it.
        #[arg(long = "adapter")]
        adapters: Vec<PathBuf>,
        /// A safetensors file with `input_ids` [B, T] and, where needed, `attention_mask` and
        /// `token_type_ids`; for models that read images `pixel_values` [B, C, H, W].
        #[arg(long)]
        input_ids: PathBuf,
        /// The safetensors file to write: `logits`, F32.
        #[arg(long)]
        output: PathBuf,
        /// Uses an adapter of another base.
        #[arg(long)]
        force: bool,
    },
    /// Merges models as a plan says: mergekit's YAML, or `[merge]` of a recipe.
    Merge(MergeArguments),
    /// Merges adapters into their base and writes a Hugging Face folder.
    MergeAdapter {
        /// Catalogue name, hf:org/name, folder or .gguf file.
        #[arg(long)]
        model: String,
        /// The adapter folders, each on top of those before it.
        #[arg(long = "adapter", required = true)]
        adapters: Vec<PathBuf>,
        /// The folder to write.
        #[arg(long)]
        output: PathBuf,
        /// Number type of the weights.
        #[arg(long, default_value = "f32", value_parser = ["f32", "bf16", "f16"])]
        dtype: String,
        /// Overwrites the output, and uses an adapter of another base.
        #[arg(long)]
        force: bool,
    },
    /// Writes a model or an adapter in another tool's format.
    Export {
        /// Catalogue name, hf:org/name, folder or .gguf file.
        #[arg(long)]
        model: String,
        /// Adapter folders, merged in one after another (or one, written alone with `--format
        /// gguf-lora`).
        #[arg(long = "adapter")]
        adapters: Vec<PathBuf>,
        /// The format; `hf-pruned` cuts out heads and inner neurons that put out nothing.
        #[arg(long, value_parser = ["gguf-f16", "gguf-q8_0", "gguf-f32", "gguf-lora", "hf", "hf-pruned"])]
        format: String,
        /// The file or folder to write.
        #[arg(long)]
        output: PathBuf,
        /// Overwrites the output, and uses an adapter of another base.
        #[arg(long)]
        force: bool,
    },
    /// Compresses an adapter or a full change to signs and one scale (ComPEFT).
    Compress(CompressArguments),
    /// Writes a compressed adapter as an ordinary one.
    Decompress(DecompressArguments),
    /// Makes one adapter of several, or adds several to a model.
    Combine(CombineArguments),
    /// Extracts a LoRA adapter from a full tune.
    Extract(ExtractArguments),
    /// Puts a random half of a tuned model's matrices back to the base's values (HFT).
    HalfReset(HalfResetArguments),
    /// Tunes a model one does not hold, through an emulator of it (CRaSh, offsite tuning).
    #[command(subcommand)]
    Crash(CrashCommand),
    /// Finds, compares and adds up grafts: the few weights of a tuned model that carry its task.
    #[command(subcommand)]
    Graft(GraftCommand),
    /// Measures five ways to ship an adapter with a quantised base, and writes one.
    Ship(ShipArguments),
    /// Shows what changed between two models or two adapters, tensor by tensor.
    Diff(DiffArguments),
    /// Shows template, mask, trainable list and forecasts before step 1.
    Doctor {
        /// The recipe.
        #[command(flatten)]
        recipe: RecipeArguments,
        /// Rows shown token by token.
        #[arg(long, default_value_t = 1)]
        rows: usize,
    },
    /// Lists the tuning methods, or shows the options of one.
    Methods {
        /// A method's name.
        name: Option<String>,
    },
    /// Lists the models that have a name, and the architectures that can be read.
    Models,
    /// Draws the weights of a new model from a seed, to be trained from scratch.
    Init {
        /// A folder with `config.json` and what else the model needs: `tokenizer.json`,
        /// `preprocessor_config.json`.
        config: PathBuf,
        /// The folder to write.
        #[arg(long)]
        output: PathBuf,
        /// The seed.
        #[arg(long, default_value_t = 42)]
        seed: u64,
    },
    /// Writes a commented recipe.
    New {
        /// The file to write.
        #[arg(default_value = "recipe.toml")]
        path: PathBuf,
        /// The method.
        #[arg(long, default_value = "lora")]
        method: String,
        /// Overwrites the file.
        #[arg(long)]
        force: bool,
    },
    /// Prints completions for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Prints the man page.
    Man,
    /// Writes the pages that are made from the program's definitions, for maintainers.
    #[command(hide = true)]
    Docs {
        /// The folder they are written below.
        folder: PathBuf,
    },
}

/// A recipe and what the command line changes in it.
#[derive(Debug, Args)]
pub(crate) struct RecipeArguments {
    /// The recipe file.
    pub(crate) recipe: PathBuf,
    /// Changes one setting, e.g. `--set train.steps=100`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
}

/// Models to merge.
#[derive(Debug, Args)]
pub(crate) struct MergeArguments {
    /// The plan: mergekit's YAML, or a recipe (.toml) with `[merge]`.
    pub(crate) plan: PathBuf,
    /// The folder to write.
    pub(crate) output: PathBuf,
    /// Replaces the folder, once the merge is done.
    #[arg(long)]
    pub(crate) force: bool,
    /// Largest weight file, in millions of bytes.
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) max_shard_mb: u64,
    /// Threads; all where absent. The result does not depend on it.
    #[arg(long)]
    pub(crate) threads: Option<usize>,
}

/// A model to use.
#[derive(Debug, Args)]
pub(crate) struct ModelArguments {
    /// Catalogue name, hf:org/name, folder or .gguf file.
    #[arg(long)]
    pub(crate) model: String,
    /// Adapter folders, each on top of those before it.
    #[arg(long = "adapter")]
    pub(crate) adapters: Vec<PathBuf>,
    /// Tokens generated at most.
    #[arg(long, default_value_t = 256)]
    pub(crate) max_new_tokens: usize,
    /// 0 takes the likeliest token; higher is freer.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) temperature: f64,
    /// Keeps this many of the likeliest tokens.
    #[arg(long)]
    pub(crate) top_k: Option<usize>,
    /// Keeps the likeliest tokens until together they have this probability.
    #[arg(long, default_value_t = 1.0)]
    pub(crate) top_p: f64,
    /// Seed of sampling.
    #[arg(long, default_value_t = 42)]
    pub(crate) seed: u64,
    /// A system message.
    #[arg(long)]
    pub(crate) system: Option<String>,
    /// Multiplies quantised blocks with inputs as they are, as `logits` and `eval` do. Without it
    /// inputs are rounded to 8 bits, as llama.cpp does: faster, and a close choice between two
    /// tokens may fall the other way.
    #[arg(long)]
    pub(crate) exact: bool,
    /// Uses an adapter of another base.
    #[arg(long)]
    pub(crate) force: bool,
}

/// Which dimensions are tried, and what counts as reached.
#[derive(Debug, clap::Args)]
pub(crate) struct Probe {
    /// Share of full tuning's score to reach.
    #[arg(long, default_value_t = 0.9)]
    pub(crate) share: f64,
    /// The first number of directions; it is doubled from there.
    #[arg(long, default_value_t = 10)]
    pub(crate) from: usize,
    /// The last number of directions.
    #[arg(long, default_value_t = 10_000)]
    pub(crate) to: usize,
    /// How far apart, as a factor, the answer and the next fewer directions tried may be.
    #[arg(long, default_value_t = 1.25)]
    pub(crate) precision: f64,
    /// Learning rates of the directions, with commas between; the best counts.
    #[arg(long, value_delimiter = ',', default_value = "0.03,0.1")]
    pub(crate) rates: Vec<f64>,
    /// Learning rates of full tuning, with commas between; the recipe's own where absent.
    #[arg(long, value_delimiter = ',')]
    pub(crate) full_rates: Vec<f64>,
    /// Runs of each: with the recipe's seed, the next one, and so on; their mean counts.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub(crate) seeds: u64,
    /// The score; the recipe's own where absent.
    #[arg(long)]
    pub(crate) metric: Option<String>,
    /// Moves all weights alike (DID), without a scale of its own for each.
    #[arg(long)]
    pub(crate) direct: bool,
}
