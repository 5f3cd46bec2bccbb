//! `crash`: tune a model one does not hold, through a stand-in of it.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use retune_evaluate::similarity::Pooling;
use retune_files::Dtype;
use retune_run::artefacts::heatmap;
use retune_run::artefacts::plot::svg;
use retune_run::crash::blocks::{Blocks, Share};
use retune_run::crash::emulator::{Choice, Probe, similarity, write};
use retune_run::crash::interpolate::{Line, Plane, line, plane};
use retune_run::crash::layers::{Moved, collect, plug_in};
use retune_run::export::Beside;
use retune_run::graft::job::open_tuned;
use retune_run::open::Located;
use retune_run::prepare::Prepared;
use serde_json::json;

use super::compress::check_new;
use super::run::read_recipe;
use super::session::{Session, with_environment};
use crate::args::RecipeArguments;
use crate::failure::Failure;
use crate::table::{grouped, number, table};

/// What `crash` does.
#[derive(Debug, Subcommand)]
pub(crate) enum CrashCommand {
    /// Makes the emulator of a model: a few blocks of it, clustered by what they put out.
    Emulate(EmulateArguments),
    /// Takes the trained blocks out of a tuned emulator.
    Collect {
        /// The emulator's folder, or one that was tuned whole from it.
        emulator: PathBuf,
        /// The adapter that was trained on it.
        #[arg(long)]
        adapter: Option<PathBuf>,
        /// The folder to write.
        #[arg(long)]
        output: PathBuf,
    },
    /// Puts trained blocks into the whole model.
    PlugIn {
        /// Catalogue name, hf:org/name or folder of the whole model.
        #[arg(long)]
        model: String,
        /// The folder of trained blocks.
        #[arg(long)]
        layers: PathBuf,
        /// The folder to write.
        #[arg(long)]
        output: PathBuf,
        /// Number type of the weights.
        #[arg(long, default_value = "f32", value_parser = ["f32", "bf16", "f16"])]
        dtype: String,
        /// Takes a model with another hash whose kept blocks are the same.
        #[arg(long)]
        force: bool,
    },
    /// Measures models on the straight line between two, or on the plane through three, to see whether
    /// a barrier of loss lies there.
    Interpolate {
        /// The recipe, for the rows that are measured on.
        #[command(flatten)]
        recipe: RecipeArguments,
        /// The first model's folder.
        #[arg(long)]
        from: String,
        /// The second model's folder.
        #[arg(long)]
        to: String,
        /// A third model's folder: the plane through all three is measured.
        #[arg(long)]
        third: Option<String>,
        /// Models measured, both ends included; on a plane as many each way.
        #[arg(long, default_value_t = 25)]
        points: usize,
        /// Writes the curve or the map.
        #[arg(long, value_name = "FILE")]
        svg: Option<PathBuf>,
    },
}

/// What `crash emulate` is told.
#[derive(Debug, Args)]
pub(crate) struct EmulateArguments {
    /// The recipe, for the model and the texts its blocks are compared on.
    #[command(flatten)]
    recipe: RecipeArguments,
    /// Blocks that are kept; by default half of them.
    #[arg(long)]
    clusters: Option<usize>,
    /// Of these, blocks that train.
    #[arg(long, default_value_t = 4)]
    trainable: usize,
    /// How the states of a text become one vector.
    #[arg(long, value_enum, default_value = "weighted-mean")]
    pooling: PoolingName,
    /// Training rows the blocks are compared on.
    #[arg(long, default_value_t = 512)]
    samples: usize,
    /// What runs in place of a removed block.
    #[arg(long, value_enum, default_value = "all")]
    share: ShareName,
    /// Blocks that train, in place of clustering.
    #[arg(long, value_delimiter = ',', requires = "frozen", conflicts_with_all = ["clusters", "trainable"])]
    train: Vec<usize>,
    /// Blocks that are kept frozen, in place of clustering.
    #[arg(long, value_delimiter = ',', requires = "train")]
    frozen: Vec<usize>,
    /// The folder to write.
    #[arg(long)]
    output: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PoolingName {
    /// The mean, later tokens weighing more.
    WeightedMean,
    /// The mean.
    Mean,
    /// The largest of each channel.
    Max,
    /// The last token's.
    Last,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ShareName {
    /// The nearest block that was kept, as the base has it.
    All,
    /// The nearest of those that do not train.
    Frozen,
    /// None: the emulator is shallower.
    None,
}

/// Carries out `crash`.
pub(crate) fn run(command: &CrashCommand, json: bool) -> Result<(), Failure> {
    match command {
        CrashCommand::Emulate(arguments) => emulate(arguments, json),
        CrashCommand::Collect { emulator, adapter, output } => {
            check_new(output)?;
            let name = emulator.display().to_string();
            let adapters: Vec<PathBuf> = adapter.iter().cloned().collect();
            let session = Session::open(&name, &adapters, false, json)?;
            let origins =
                if adapters.is_empty() { std::slice::from_ref(emulator) } else { &adapters[..] };
            let moved = collect(emulator, &session.tuned(), origins, output)?;
            show(&moved, "collected", output, json);
            Ok(())
        }
        CrashCommand::PlugIn { model, layers, output, dtype, force } => {
            check_new(output)?;
            let session = Session::open(model, &[], false, json)?;
            // A folder without a tokenizer can still be tuned.
            let tokenizer = session.tokenizer().ok();
            let beside = Beside::of(&session.opened.checkpoint.path, tokenizer.as_ref())?;
            let dtype = match dtype.as_str() {
                "bf16" => Dtype::BF16,
                "f16" => Dtype::F16,
                _ => Dtype::F32,
            };
            let moved =
                plug_in(&session.opened, &session.tuned(), &beside, layers, dtype, *force, output)?;
            show(&moved, "plugged in", output, json);
            Ok(())
        }
        CrashCommand::Interpolate { recipe, from, to, third, points, svg } => {
            let names: Vec<&String> = [from, to].into_iter().chain(third).collect();
            interpolate(recipe, &names, *points, svg.as_deref(), json)
        }
    }
}

fn show(moved: &Moved, what: &str, output: &Path, json: bool) {
    if json {
        println!("{}", json!({"output": output, "moved": moved}));
        return;
    }
    println!(
        "{what}: blocks {:?}, {} tensors with {} values",
        moved.blocks,
        moved.num_tensors,
        grouped(moved.num_values as u64)
    );
    println!("written: {}", output.display());
}

fn emulate(arguments: &EmulateArguments, json: bool) -> Result<(), Failure> {
    check_new(&arguments.output)?;
    let (recipe, _) = read_recipe(&arguments.recipe, json)?;
    let prepared = with_environment(json, |environment| Ok(Prepared::make(recipe, environment)?))?;
    let share = match arguments.share {
        ShareName::All => Share::All,
        ShareName::Frozen => Share::Frozen,
        ShareName::None => Share::None,
    };
    let depth = prepared.opened.checkpoint.model.spec().num_layers;
    let choice = if arguments.train.is_empty() {
        let pooling = match arguments.pooling {
            PoolingName::WeightedMean => Pooling::WeightedMean,
            PoolingName::Mean => Pooling::Mean,
            PoolingName::Max => Pooling::Max,
            PoolingName::Last => Pooling::Last,
        };
        let similarity = similarity(&prepared, Probe { pooling, num_rows: arguments.samples })?;
        let count = arguments.clusters.unwrap_or(depth.div_ceil(2));
        let (blocks, clusters) = Blocks::choose(&similarity, count, arguments.trainable, share)?;
        let clusters = clusters.into_iter().map(|cluster| (cluster.start, cluster.end)).collect();
        Choice { blocks, clusters, similarity }
    } else {
        let blocks = Blocks::given(depth, &arguments.train, &arguments.frozen, share)?;
        Choice { blocks, clusters: Vec::new(), similarity: Vec::new() }
    };
    let manifest = write(&prepared, &choice, &arguments.output)?;
    if json {
        let value = json!({"output": arguments.output, "choice": choice, "emulator": manifest});
        println!("{value}");
        return Ok(());
    }
    for (start, end) in &choice.clusters {
        let kept = start + (end - start) / 2;
        let trains = if choice.blocks.trainable.contains(&kept) { ", which trains" } else { "" };
        println!("blocks {start} to {}: block {kept}{trains}", end - 1);
    }
    println!(
        "{} of {depth} blocks, of which {} train; {} run",
        choice.blocks.kept.len(),
        choice.blocks.trainable.len(),
        choice.blocks.order.len()
    );
    println!("\nin a recipe with this folder as `model`:\n");
    println!("{}", manifest.recipe(prepared.opened.checkpoint.model.spec()));
    println!("written: {}", arguments.output.display());
    Ok(())
}

fn interpolate(
    recipe: &RecipeArguments,
    names: &[&String],
    num_points: usize,
    drawing: Option<&Path>,
    json: bool,
) -> Result<(), Failure> {
    let (recipe, _) = read_recipe(recipe, json)?;
    let (prepared, paths) = with_environment(json, |environment| {
        let prepared = Prepared::make(recipe, environment)?;
        let find = |name: &&String| Ok::<_, Failure>(Located::find(name, environment)?.path);
        let paths: Vec<PathBuf> = names.iter().map(find).collect::<Result<_, _>>()?;
        Ok((prepared, paths))
    })?;
    let open = |path: &PathBuf| open_tuned(&prepared, path, true);
    let models = paths.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    let (rows, _) = prepared.measured();
    let batches = rows.batches(prepared.recipe.evaluate.rows, 2048)?;
    let model = prepared.opened.checkpoint.model.as_ref();
    let save = |path: &Path, drawn: &str| retune_files::atomic::write_file(path, drawn.as_bytes());
    if let ([first, second, third], [a, b, c]) = (&models[..], &paths[..]) {
        let found = plane(model, [first, second, third], &batches, num_points, [a, b, c])?;
        if let Some(path) = drawing {
            save(path, &heatmap::svg(&found.plot()))?;
        }
        show_plane(&found, json);
        return Ok(());
    }
    let found = line(model, [&models[0], &models[1]], &batches, num_points, &paths[1])?;
    if let Some(path) = drawing {
        save(path, &svg(&found.plot()))?;
    }
    show_line(&found, json);
    Ok(())
}

/// Shows the losses, a row per share of the third model.
fn show_plane(found: &Plane, json: bool) {
    if json {
        println!("{}", json!({"rows": found.rows}));
        return;
    }
    let shares = found.rows.first().into_iter().flatten();
    let mut head = vec!["third \\ second".to_owned()];
    head.extend(shares.map(|point| format!("{:.2}", point.shares[0])));
    let mut shown = table(&head.iter().map(String::as_str).collect::<Vec<_>>());
    for row in &found.rows {
        let third = row.first().map_or_else(String::new, |p| format!("{:.2}", p.shares[1]));
        let losses = row.iter().map(|point| number(point.loss));
        shown.add_row([third].into_iter().chain(losses).collect::<Vec<_>>());
    }
    println!("{shown}");
}

fn show_line(found: &Line, json: bool) {
    if json {
        println!("{}", json!({"points": found.points, "barrier": found.barrier()}));
        return;
    }
    let mut shown = table(&["share of the second", "loss", "accuracy"]);
    for point in &found.points {
        let accuracy = point.accuracy.map_or_else(|| "–".to_owned(), number);
        shown.add_row([format!("{:.3}", point.place), number(point.loss), accuracy]);
    }
    println!("{shown}");
    println!("the largest loss lies {:.2} % above the larger end", 100.0 * found.barrier());
}
