//! LoRA: a low-rank change beside each chosen weight, with rsLoRA and DoRA.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use retune_core::change::{Changes, Scope, SiteView, StateChange, WeightChange};
use retune_core::kernels::matrix::PackedMatrix;
use retune_core::kernels::{linear, linear_frozen, linear_low_rank};
use retune_core::method::{Card, FileTensors, Method, MethodPlan, PlannedParameter, Promises};
use retune_core::parameters::{ParameterId, Parameters};
use retune_core::random::{Random, Seed};
use retune_core::spec::{Kind, ModelSpec, WeightSpec};
use retune_core::targets::{Among, Targets, pattern_value};
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_options::{Choice, Options, Table, choice, options};
use serde_json::{Value, json};
use tensor::Tensor;

use crate::adapter::{PREFIX, peft_config};
use crate::factor_start;
use crate::registry::{self, Plugin};
use crate::replacement;

choice! {
    /// Which biases train beside the low-rank change.
    pub enum Bias {
        /// No bias trains.
        None = "none",
        /// The biases of the targeted layers train.
        LoraOnly = "lora_only",
        /// Every bias of the model trains.
        All = "all",
    }
}

choice! {
    /// Where the factors begin.
    pub enum Init {
        /// The first at random, the second at zero.
        Random = "random",
        /// At the weight's largest singular directions (PiSSA).
        Pissa = "pissa",
        /// At the weight's QR decomposition (OLoRA).
        Olora = "olora",
        /// The first normal with deviation 1 / rank, the second at zero.
        Gaussian = "gaussian",
        /// Both at random in directions orthogonal to each other.
        Orthogonal = "orthogonal",
        /// The first at zero, the second at the weight's smallest singular directions, where it stays
        /// (MiCA).
        Mica = "mica",
    }
}

impl Init {
    /// Returns whether the product does not begin at zero and is taken off the weight.
    fn is_taken_off(self) -> bool {
        matches!(self, Self::Pissa | Self::Olora)
    }
}

options! {
    /// Trains a low-rank product beside each targeted weight.
    pub struct LoraOptions("lora") {
        /// Rank of the change.
        rank: usize = 8, in 1..=65536;
        /// The change is scaled by alpha / rank (alpha / sqrt(rank) with rslora).
        alpha: f64 = 16.0, in 0.0..=1e6;
        /// Probability of zeroing an entry of the input of the change while training.
        dropout: f64 = 0.0, in 0.0..=0.99;
        /// Targeted modules: suffixes, one regular expression, or all-linear.
        targets: Vec<String> = vec!["all-linear".to_owned()];
        /// Modules left out again, matched the same way.
        exclude: Vec<String> = Vec::new();
        /// Only these layers, counted from 0; empty means all.
        layers: Vec<usize> = Vec::new();
        /// Scales by alpha / sqrt(rank) (Kalajdzievski, arXiv 2312.03732).
        rslora: bool = false;
        /// Learns a length per output row beside the direction (Liu et al., arXiv 2402.09353).
        dora: bool = false;
        /// Adds a bias to the change's second factor.
        lora_bias: bool = false;
        /// Which biases of the model train.
        bias: Bias = Bias::None;
        /// Ranks of modules that match a regular expression.
        rank_pattern: BTreeMap<String, usize>;
        /// Alphas of modules that match a regular expression.
        alpha_pattern: BTreeMap<String, f64>;
        /// Modules that train whole and are saved beside the change.
        modules_to_save: Vec<String> = Vec::new();
        /// Where the factors begin; what they begin with is taken off the weight.
        init: Init = Init::Random, also "init_lora_weights";
        /// Keeps the first factor as it was drawn (LoRA-FA; Zhang et al., arXiv 2308.03303).
        freeze_first: bool = false;
        /// Learning rate of the second factor over the first's; LoRA+ takes 16 (Hayou et al., arXiv 2402.12354).
        rate_ratio: f64 = 1.0, in 1e-3..=1e4, also "loraplus_lr_ratio";
    }
}

/// What help, documentation and model cards say.
pub const CARD: Card = Card {
    name: "lora",
    summary: "Trains a low-rank change beside each targeted weight; the base stays frozen.",
    source: "Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv 2106.09685",
    usual_learning_rates: (5e-5, 2e-3),
    options: registry::specs::<LoraOptions>,
};

/// LoRA.
#[derive(Debug, Clone, Default)]
pub struct Lora {
    /// Rank, targets and variants.
    pub options: LoraOptions,
    /// The adapter's own configuration where it was read from a file: written back as it was.
    pub original: Option<Value>,
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = Plugin {
    card: CARD,
    read: |reader| Box::new(Lora { options: LoraOptions::read(reader), original: None }),
    adapter: Some(("LORA", |config| Ok(Box::new(Lora::from_adapter(config)?)))),
};

/// The place, rank and scale of one low-rank pair.
struct Pair<'a> {
    weight: &'a WeightSpec,
    rank: usize,
    scale: f64,
}

impl Lora {
    /// Reads an `adapter_config.json` of type LORA.
    ///
    /// # Errors
    /// If it asks for a variant that is not supported.
    pub fn from_adapter(config: &Value) -> Result<Self> {
        let off = |key: &str| match config.get(key) {
            None | Some(Value::Null | Value::Bool(false)) => true,
            Some(Value::Object(map)) => map.is_empty(),
            Some(Value::Array(list)) => list.is_empty(),
            Some(_) => false,
        };
        for key in [
            "alora_invocation_tokens",
            "arrow_config",
            "kasa_config",
            "layer_replication",
            "monteclora_config",
            "target_parameters",
            "trainable_token_indices",
            "use_bdlora",
            "use_qalora",
            "velora_config",
        ] {
            if !off(key) {
                return Err(Error::Unsupported {
                    what: format!("a LoRA adapter with `{key}`"),
                    help: "merge it with the tool that made it, and use the merged model"
                        .to_owned(),
                });
            }
        }
        let setting = |key: &str, expected: &str| Error::Setting {
            setting: format!("adapter_config.json: {key}"),
            what: "cannot be used".to_owned(),
            expected: expected.to_owned(),
            found: config.get(key).map_or_else(|| "nothing".to_owned(), Value::to_string),
            help: "the file is damaged, or of a newer PEFT".to_owned(),
        };
        let list = |key: &str| -> Result<Vec<String>> {
            match config.get(key) {
                None | Some(Value::Null) => Ok(Vec::new()),
                Some(Value::String(one)) => Ok(vec![one.clone()]),
                Some(Value::Array(items)) => items
                    .iter()
                    .map(|item| item.as_str().map(str::to_owned))
                    .collect::<Option<_>>()
                    .ok_or_else(|| setting(key, "a list of names")),
                Some(_) => Err(setting(key, "a name or a list of names")),
            }
        };
        let flag = |key: &str| config.get(key).and_then(Value::as_bool).unwrap_or(false);
        let pattern = |key: &str| -> Result<BTreeMap<String, f64>> {
            let Some(map) = config.get(key).and_then(Value::as_object) else {
                return Ok(BTreeMap::new());
            };
            let read = |(k, v): (&String, &Value)| Some((k.clone(), v.as_f64()?));
            map.iter().map(read).collect::<Option<_>>().ok_or_else(|| setting(key, "numbers"))
        };
        let whole = |rank: f64| (rank >= 1.0 && rank.fract() == 0.0).then_some(rank as usize);
        let rank = config
            .get("r")
            .and_then(Value::as_f64)
            .and_then(whole)
            .ok_or_else(|| setting("r", "a whole number above 0"))?;
        let rank_pattern = pattern("rank_pattern")?
            .into_iter()
            .map(|(key, rank)| Some((key, whole(rank)?)))
            .collect::<Option<_>>()
            .ok_or_else(|| setting("rank_pattern", "whole numbers above 0"))?;
        let layers = match config.get("layers_to_transform") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Number(one)) => vec![one.as_u64().unwrap_or_default() as usize],
            Some(Value::Array(items)) => items
                .iter()
                .map(|item| item.as_u64().map(|layer| layer as usize))
                .collect::<Option<_>>()
                .ok_or_else(|| setting("layers_to_transform", "layer numbers"))?,
            Some(_) => return Err(setting("layers_to_transform", "layer numbers")),
        };
        let bias = match config.get("bias").and_then(Value::as_str).unwrap_or("none") {
            "none" => Bias::None,
            "lora_only" => Bias::LoraOnly,
            "all" => Bias::All,
            _ => return Err(setting("bias", "none, lora_only or all")),
        };
        let targets = list("target_modules")?;
        if targets.is_empty() {
            return Err(setting("target_modules", "the modules the adapter changes"));
        }
        let mut modules_to_save = list("modules_to_save")?;
        let task = config.get("task_type").and_then(Value::as_str).unwrap_or_default();
        if matches!(task, "SEQ_CLS" | "TOKEN_CLS") {
            // PEFT writes both names whatever the head is called; the plan finds it by its role.
            modules_to_save.retain(|name| name != "classifier" && name != "score");
        }
        let options = LoraOptions {
            rank,
            alpha: config.get("lora_alpha").and_then(Value::as_f64).unwrap_or(8.0),
            dropout: config.get("lora_dropout").and_then(Value::as_f64).unwrap_or(0.0),
            targets,
            exclude: list("exclude_modules")?,
            layers,
            rslora: flag("use_rslora"),
            dora: flag("use_dora"),
            lora_bias: flag("lora_bias"),
            bias,
            rank_pattern,
            alpha_pattern: pattern("alpha_pattern")?,
            modules_to_save,
            ..LoraOptions::default()
        };
        Ok(Self { options, original: Some(config.clone()) })
    }

    fn targets(&self) -> Targets {
        Targets {
            names: self.options.targets.clone(),
            exclude: self.options.exclude.clone(),
            layers: self.options.layers.clone(),
        }
    }

    fn pairs<'a>(&self, spec: &'a ModelSpec) -> Result<Vec<Pair<'a>>> {
        let o = &self.options;
        let chosen =
            self.targets().select(spec, Among::LinearsAndEmbeddings, "method.lora.targets")?;
        let mut pairs = Vec::with_capacity(chosen.len());
        for weight in chosen {
            let ranks = o.rank_pattern.iter().map(|(k, v)| (k.as_str(), *v));
            let alphas = o.alpha_pattern.iter().map(|(k, v)| (k.as_str(), *v));
            let rank = pattern_value(ranks, weight.module(), "method.lora.rank_pattern")?
                .unwrap_or(o.rank);
            let alpha = pattern_value(alphas, weight.module(), "method.lora.alpha_pattern")?
                .unwrap_or(o.alpha);
            let [rows, columns] = weight.matrix();
            if rank > rows.min(columns) {
                return Err(Error::Setting {
                    setting: "method.lora.rank".to_owned(),
                    what: format!("the rank is above the full rank of {}", weight.module()),
                    expected: format!(
                        "at most {} for a {rows} x {columns} weight",
                        rows.min(columns)
                    ),
                    found: rank.to_string(),
                    help: "lower `rank`, or give this module its own in `rank_pattern`".to_owned(),
                });
            }
            let divisor = if o.rslora { (rank as f64).sqrt() } else { rank as f64 };
            let pair = Pair { weight, rank, scale: alpha / divisor };
            self.check_start(&pair)?;
            if o.dora && o.lora_bias {
                return Err(Error::Setting {
                    setting: "method.lora.lora_bias".to_owned(),
                    what: "not for DoRA, whose lengths are of the weight alone".to_owned(),
                    expected: "one of `dora` and `lora_bias`".to_owned(),
                    found: "both".to_owned(),
                    help: "set one of them to false".to_owned(),
                });
            }
            pairs.push(pair);
        }
        Ok(pairs)
    }

    /// Returns the factors a pair begins with, where they are the weight's own.
    fn start(
        &self,
        weights: &Weights,
        pair: &Pair<'_>,
        random: &mut Random,
    ) -> Result<Option<factor_start::Factors>> {
        let weight = || weights.dense(&pair.weight.name);
        let (rank, module) = (pair.rank, pair.weight.module());
        Ok(match self.options.init {
            Init::Random => None,
            Init::Gaussian => Some(factor_start::gaussian(pair.weight.matrix(), rank, random)),
            Init::Orthogonal => Some(factor_start::orthogonal(pair.weight.matrix(), rank, random)),
            Init::Mica => Some(factor_start::minor(
                &weights.values(&pair.weight.name)?,
                pair.weight.matrix(),
                rank,
            )),
            Init::Pissa => {
                Some(factor_start::principal(weight()?, rank, pair.scale, random, module)?)
            }
            Init::Olora => Some(factor_start::orthonormal_start(weight()?, rank, module)?),
        })
    }

    /// Checks that options which begin elsewhere than at zero go with the others.
    fn check_start(&self, pair: &Pair<'_>) -> Result<()> {
        if self.options.init == Init::Random {
            return Ok(());
        }
        let refuse = |what: &str, expected: String, help: &str| {
            Err(Error::Setting {
                setting: "method.lora.init".to_owned(),
                what: what.to_owned(),
                expected,
                found: self.options.init.name().to_owned(),
                help: help.to_owned(),
            })
        };
        let [rows, columns] = pair.weight.matrix();
        if pair.weight.kind == Kind::Embedding {
            let help = "set `init` to \"random\"";
            return refuse("not for embeddings", "linear layers".to_owned(), help);
        }
        match self.options.init {
            Init::Orthogonal if !pair.rank.is_multiple_of(2) => {
                let expected = "an even rank".to_owned();
                return refuse("half of the rank is for each factor", expected, "change `rank`");
            }
            Init::Mica if self.options.freeze_first => {
                let expected = "`freeze_first` = false".to_owned();
                return refuse("the second factor stays as it is", expected, "let the first train");
            }
            _ if !self.options.init.is_taken_off() => return Ok(()),
            _ => {}
        }
        if self.options.dora || pair.weight.kind == Kind::Embedding || pair.scale <= 0.0 {
            return refuse(
                "not for DoRA, embeddings, or a scale of 0",
                "plain LoRA of linear layers".to_owned(),
                "set `init` to \"random\"",
            );
        }
        if 2 * pair.rank > rows.min(columns) {
            // An adapter's file holds both pairs of factors as one of twice the rank.
            return refuse(
                "the rank is above half of the full rank",
                format!("a rank of at most {} for {}", rows.min(columns) / 2, pair.weight.module()),
                "lower `rank`",
            );
        }
        Ok(())
    }

    /// Returns each targeted weight with the rank and scale of its change.
    ///
    /// # Errors
    /// If a target matches nothing, or a rank is above the weight's.
    pub fn scales<'a>(&self, spec: &'a ModelSpec) -> Result<Vec<(&'a WeightSpec, usize, f64)>> {
        let pairs = self.pairs(spec)?;
        Ok(pairs.into_iter().map(|pair| (pair.weight, pair.rank, pair.scale)).collect())
    }

    /// Returns the weights that train whole: biases and `modules_to_save`.
    fn whole<'a>(
        &self,
        spec: &'a ModelSpec,
        pairs: &[Pair<'a>],
    ) -> Result<Vec<(String, &'a WeightSpec)>> {
        let mut whole = Vec::new();
        let targeted = |module: &str| pairs.iter().any(|pair| pair.weight.module() == module);
        for weight in spec.weights.iter().filter(|weight| weight.kind == Kind::Bias) {
            let inside = targeted(weight.module());
            let trains = match self.options.bias {
                Bias::None => false,
                Bias::LoraOnly => inside,
                Bias::All => true,
            };
            if trains {
                let wrapped = if inside { ".base_layer.bias" } else { ".bias" };
                whole.push((format!("{PREFIX}{}{wrapped}", weight.module()), weight));
            }
        }
        // PEFT trains and saves a new head whole by itself, and refuses one that is targeted too.
        let modules = replacement::with_new_head(spec, &self.options.modules_to_save, |_| false);
        let setting = "method.lora.modules_to_save";
        let saved = replacement::whole_modules(spec, modules, &targeted, setting)?;
        // With `bias = "all"` its bias is there already.
        whole.retain(|(_, weight)| {
            saved.iter().all(|(_, module)| module.module() != weight.module())
        });
        whole.extend(saved);
        Ok(whole)
    }
}

/// Opens the stream the pair `index`, in the order of the forward pass, starts from.
fn stream(seed: Seed, index: u64) -> Random {
    seed.stream("lora", &[index])
}

/// Kaiming-uniform with a = √5 is U(±1/√inputs), as the reference implementation has it.
fn draw_a(random: &mut Random, values: &mut [f32], inputs: usize) {
    random.fill_uniform(values, (inputs as f64).powf(-0.5));
}

fn draw_embedding_b(random: &mut Random, values: &mut [f32]) {
    random.fill_normal(values, 1.0);
}

/// Draws again what a factor was before training, from the run's seed and the place of its pair
/// among all pairs; zeros where the factor starts as zero.
///
/// Needs no model, so that a compressed adapter that stores only what training changed can be read
/// alone.
pub fn initial_factor(seed: Seed, index: u64, name: &str, shape: &[usize]) -> Vec<f32> {
    let mut values = vec![0.0; shape.iter().product()];
    let mut random = stream(seed, index);
    if name.ends_with(".lora_A.weight") {
        draw_a(&mut random, &mut values, shape.get(1).copied().unwrap_or(1));
    } else if name.ends_with(".lora_embedding_B") {
        draw_embedding_b(&mut random, &mut values);
    }
    values
}

/// The factors as they began, where that was not at a product of zero.
const START_A: &str = "lora_A.start";
const START_B: &str = "lora_B.start";

/// The names and shapes of one pair's tensors, in PEFT's layout.
fn pair_parameters(pair: &Pair<'_>, options: &LoraOptions) -> Vec<PlannedParameter> {
    let module = pair.weight.module();
    let [rows, columns] = pair.weight.matrix();
    let planned = |name: &str, shape: &[usize]| PlannedParameter {
        name: format!("{PREFIX}{module}.{name}"),
        shape: shape.to_vec(),
        place: pair.weight.name.clone(),
        trains: true,
    };
    if pair.weight.kind == Kind::Embedding {
        // An embedding is read by row, so PEFT sees it as [width, vocabulary]·one-hot.
        return vec![
            planned("lora_embedding_A", &[pair.rank, rows]),
            planned("lora_embedding_B", &[columns, pair.rank]),
        ];
    }
    let mut list = vec![
        planned("lora_A.weight", &[pair.rank, columns]),
        planned("lora_B.weight", &[rows, pair.rank]),
    ];
    list[0].trains = !options.freeze_first;
    list[1].trains = options.init != Init::Mica;
    if options.init.is_taken_off() {
        list.push(planned(START_A, &[pair.rank, columns]));
        list.push(planned(START_B, &[rows, pair.rank]));
        list[2..].iter_mut().for_each(|start| start.trains = false);
    }
    if options.lora_bias {
        list.push(planned("lora_B.bias", &[rows]));
    }
    if options.dora {
        list.push(planned("lora_magnitude_vector", &[rows]));
    }
    list
}

impl Method for Lora {
    fn options(&self) -> Table {
        self.options.write()
    }

    fn boxed_clone(&self) -> Box<dyn Method> {
        Box::new(self.clone())
    }

    fn card(&self) -> Card {
        CARD
    }

    fn promises(&self) -> Promises {
        // DoRA takes the length it divides by as a constant.
        Promises { exact_gradients: !self.options.dora, ..Promises::default() }
    }

    fn examples(&self) -> &'static [&'static str] {
        &[
            "rank = 2",
            "rank = 2\ninit = \"pissa\"",
            "rank = 2\ninit = \"olora\"\nfreeze_first = true\nrslora = true",
            "rank = 2\ninit = \"gaussian\"\nrate_ratio = 4.0",
            "rank = 2\ninit = \"orthogonal\"\nlora_bias = true",
            "rank = 2\ninit = \"mica\"\nexclude = [\"down_proj\", \"c_proj\"]",
            "rank = 2\ndora = true\ndropout = 0.1",
            "rank = 3\nrslora = true\nbias = \"all\"\nlayers = [1]",
            "rank = 2\ndora = true\nexclude = [\"down_proj\", \"c_proj\"]",
        ]
    }

    fn plan(&self, spec: &ModelSpec) -> Result<MethodPlan> {
        let pairs = self.pairs(spec)?;
        let mut parameters: Vec<PlannedParameter> =
            pairs.iter().flat_map(|pair| pair_parameters(pair, &self.options)).collect();
        let whole = self.whole(spec, &pairs)?;
        parameters.extend(whole.into_iter().map(|(name, weight)| replacement::plan(name, weight)));
        Ok(MethodPlan { parameters, notes: Vec::new() })
    }

    fn attach(
        &self,
        weights: &Weights,
        parameters: &mut Parameters,
        seed: Seed,
    ) -> Result<Changes> {
        let spec = Arc::clone(weights.spec());
        let mut changes = Changes::default();
        let pairs = self.pairs(&spec)?;
        let mut biases = Vec::new();
        for (index, pair) in pairs.iter().enumerate() {
            let mut random = stream(seed, index as u64);
            let [rows, columns] = pair.weight.matrix();
            let planned = pair_parameters(pair, &self.options);
            let mut add = |place: usize, fill: &mut dyn FnMut(&mut [f32])| {
                let mut values = vec![0.0; planned[place].shape.iter().product()];
                fill(&mut values);
                let (name, shape) = (planned[place].name.clone(), &planned[place].shape);
                if planned[place].trains {
                    parameters.add(name, shape, values)
                } else {
                    parameters.add_buffer(name, shape, values)
                }
            };
            if pair.weight.kind == Kind::Embedding {
                let a = add(0, &mut |_| {});
                let b = add(1, &mut |values| draw_embedding_b(&mut random, values));
                let change =
                    LowRankEmbedding { a, b, rank: pair.rank, rows, columns, scale: pair.scale };
                changes.change_weight(&pair.weight.name, change);
                continue;
            }
            let start = self.start(weights, pair, &mut random)?;
            let a = add(0, &mut |values| match &start {
                Some((a, _)) => values.copy_from_slice(a),
                None => draw_a(&mut random, values, columns),
            });
            let b = add(1, &mut |values| {
                if let Some((_, b)) = &start {
                    values.copy_from_slice(b);
                }
            });
            let mut next = 2;
            let taken_off = start.as_ref().filter(|_| self.options.init.is_taken_off());
            let start = taken_off.map(|(a, b)| {
                next += 2;
                (
                    add(2, &mut |values| values.copy_from_slice(a)),
                    add(3, &mut |values| values.copy_from_slice(b)),
                )
            });
            let bias = self.options.lora_bias.then(|| {
                next += 1;
                add(next - 1, &mut |_| {})
            });
            let magnitude = if self.options.dora {
                let lengths = row_lengths(&weights.values(&pair.weight.name)?, columns);
                Some(add(next, &mut |values| values.copy_from_slice(&lengths)))
            } else {
                None
            };
            if let Some(value) = bias {
                biases.push((pair.weight.module(), FactorBias { value, rows, scale: pair.scale }));
            }
            parameters.get_mut(b).rate_factor = self.options.rate_ratio;
            for id in start.iter().flat_map(|(a, b)| [*a, *b]) {
                parameters.get_mut(id).saved = false;
            }
            changes.change_weight(
                &pair.weight.name,
                LowRank {
                    a,
                    b,
                    start,
                    magnitude,
                    rank: pair.rank,
                    rows,
                    columns,
                    scale: pair.scale,
                    dropout: self.options.dropout,
                    base_lengths: OnceLock::new(),
                },
            );
        }
        for (name, weight) in self.whole(&spec, &pairs)? {
            replacement::attach(&name, weight, weights, parameters, &mut changes)?;
        }
        // Behind those that train whole, which would take the place of what is added before them.
        for (module, change) in biases {
            let own = format!("{module}.bias");
            if spec.weight(&own).is_some() {
                changes.change_weight(own, change);
            } else {
                changes.change_output(module, change);
            }
        }
        Ok(changes)
    }

    fn fold(&self, parameters: &Parameters, tensors: &mut FileTensors) {
        for (id, parameter) in parameters.iter() {
            let Some(module) = parameter.name.strip_suffix(START_A) else { continue };
            let Some(start_b) = parameters.find(&format!("{module}{START_B}")) else { continue };
            if let Some((shape, values)) = tensors.get_mut(&format!("{module}lora_A.weight")) {
                shape[0] *= 2;
                values.extend(parameters.values(id));
            }
            if let Some((shape, values)) = tensors.get_mut(&format!("{module}lora_B.weight")) {
                let (rank, start) = (shape[1], parameters.values(start_b));
                let rows = values.chunks_exact(rank).zip(start.chunks_exact(rank));
                let beside = |(now, start): (&[f32], &[f32])| {
                    now.iter().copied().chain(start.iter().map(|b| -b)).collect::<Vec<f32>>()
                };
                *values = rows.flat_map(beside).collect();
                shape[1] *= 2;
            }
        }
    }

    fn adapter_config(&self, spec: &ModelSpec) -> Option<Value> {
        if let Some(original) = &self.original {
            return Some(original.clone());
        }
        let o = &self.options;
        let list = |items: &[String]| if items.is_empty() { Value::Null } else { json!(items) };
        let targets = match o.targets.as_slice() {
            [one] if one == "all-linear" || one.contains(['*', '(', '[', '\\', '|', '^', '$']) => {
                json!(one)
            }
            many => json!(many),
        };
        let transposed = self
            .pairs(spec)
            .is_ok_and(|pairs| pairs.iter().any(|pair| replacement::is_transposed(pair.weight)));
        // Factors that did not begin at zero are saved with those they began with, as one pair of
        // twice the rank; alpha makes up for it.
        let (ranks, alphas) = match (o.init, o.rslora) {
            (init, _) if !init.is_taken_off() => (1, 1.0),
            (_, false) => (2, 2.0),
            (_, true) => (2, std::f64::consts::SQRT_2),
        };
        let mut config = peft_config("LORA", spec);
        config.extend([
            ("r".to_owned(), json!(o.rank * ranks)),
            ("lora_alpha".to_owned(), number(o.alpha * alphas)),
            ("lora_dropout".to_owned(), json!(o.dropout)),
            ("target_modules".to_owned(), targets),
            ("exclude_modules".to_owned(), list(&o.exclude)),
            (
                "layers_to_transform".to_owned(),
                if o.layers.is_empty() { Value::Null } else { json!(o.layers) },
            ),
            ("layers_pattern".to_owned(), Value::Null),
            ("use_rslora".to_owned(), json!(o.rslora)),
            ("use_dora".to_owned(), json!(o.dora)),
            ("lora_bias".to_owned(), json!(o.lora_bias)),
            ("bias".to_owned(), json!(o.bias.name())),
            (
                "rank_pattern".to_owned(),
                o.rank_pattern
                    .iter()
                    .map(|(k, v)| (k.clone(), json!(v * ranks)))
                    .collect::<serde_json::Map<_, _>>()
                    .into(),
            ),
            (
                "alpha_pattern".to_owned(),
                o.alpha_pattern
                    .iter()
                    .map(|(k, v)| (k.clone(), number(*v * alphas)))
                    .collect::<serde_json::Map<_, _>>()
                    .into(),
            ),
            ("modules_to_save".to_owned(), list(&o.modules_to_save)),
            ("fan_in_fan_out".to_owned(), json!(transposed)),
            ("init_lora_weights".to_owned(), json!(true)),
        ]);
        Some(config.into())
    }
}

/// Writes whole numbers without a fraction, as PEFT does.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}

fn squared_row_lengths(base: &PackedMatrix) -> Vec<f32> {
    let mut row = vec![0.0; base.columns()];
    let length = |index| {
        base.row_into(index, &mut row);
        row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() as f32
    };
    (0..base.rows()).map(length).collect()
}

fn row_lengths(values: &[f32], columns: usize) -> Vec<f32> {
    let length = |row: &[f32]| row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt() as f32;
    values.chunks_exact(columns).map(length).collect()
}

/// The change of one linear layer.
#[derive(Debug)]
struct LowRank {
    a: ParameterId,
    b: ParameterId,
    /// The factors as they began; their product is taken off.
    start: Option<(ParameterId, ParameterId)>,
    magnitude: Option<ParameterId>,
    rank: usize,
    rows: usize,
    columns: usize,
    scale: f64,
    dropout: f64,
    /// Squared lengths of the base's rows; the base is frozen, so they are counted once.
    base_lengths: OnceLock<Vec<f32>>,
}

impl LowRank {
    /// Returns the factors; with those they began with beside them, negative in the second, so that
    /// their product is taken off.
    fn factors(&self, scope: &Scope<'_>) -> (Tensor<2>, Tensor<2>) {
        let of = |a: ParameterId, b: ParameterId| {
            let a: Tensor<2> = scope.tensor(a, [self.rank, self.columns]);
            let b: Tensor<2> = scope.tensor(b, [self.rows, self.rank]);
            (a, b)
        };
        let (a, b) = of(self.a, self.b);
        let Some((start_a, start_b)) = self.start else { return (a, b) };
        let (start_a, start_b) = of(start_a, start_b);
        (Tensor::cat(vec![a, start_a], 0), Tensor::cat(vec![b, start_b.neg()], 1))
    }

    /// Returns magnitude / ‖W + sBA‖ per row, the length a constant in the backward pass.
    ///
    /// ‖W + sBA‖² = ‖W‖² + 2s (WAᵀ)·B + s² B(AAᵀ)·B, row by row, which never needs the sum itself.
    fn direction_scale(&self, base: &Arc<PackedMatrix>, scope: &Scope<'_>) -> Option<Tensor<1>> {
        let magnitude = scope.tensor::<1>(self.magnitude?, [self.rows]);
        let a = scope.parameters().constant::<2>(self.a, [self.rank, self.columns]);
        let b = scope.parameters().constant::<2>(self.b, [self.rows, self.rank]);
        let wa = linear_frozen(a.clone(), base, None).transpose();
        let aa = a.clone().matmul(a.transpose());
        let cross = (wa * b.clone()).sum_dim(1).mul_scalar(2.0 * self.scale);
        let square = (b.clone().matmul(aa) * b).sum_dim(1).mul_scalar(self.scale * self.scale);
        let lengths = self.base_lengths.get_or_init(|| squared_row_lengths(base)).clone();
        let count = lengths.len();
        let own = Tensor::<1>::from_data(
            tensor::TensorData::new(lengths, [count]),
            scope.parameters().device(),
        );
        let length = (own.reshape([count, 1]) + cross + square).sqrt().reshape([count]);
        Some(magnitude / length)
    }
}

impl WeightChange for LowRank {
    fn parameters(&self) -> Vec<ParameterId> {
        let start = self.start.into_iter().flat_map(|(a, b)| [a, b]);
        [self.a, self.b].into_iter().chain(start).chain(self.magnitude).collect()
    }

    fn materialize(&self, base: Tensor<2>, scope: &Scope<'_>) -> Tensor<2> {
        let (a, b) = self.factors(scope);
        let changed = base + b.matmul(a).mul_scalar(self.scale);
        let Some(magnitude) = self.magnitude else { return changed };
        let length = changed.clone().powi_scalar(2).sum_dim(1).sqrt().detach();
        changed * (scope.tensor::<2>(magnitude, [self.rows, 1]) / length)
    }

    fn linear(
        &self,
        x: &Tensor<2>,
        base: &Arc<PackedMatrix>,
        bias: Option<&Tensor<1>>,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        let (a, b) = self.factors(scope);
        let dropped = scope.trains() && self.dropout > 0.0;
        let direction = self.direction_scale(base, scope);
        if !dropped && direction.is_none() {
            return Some(linear_low_rank(x.clone(), base, bias.cloned(), a, b, self.scale));
        }
        let input = scope.dropout(x.clone(), self.dropout);
        let low = linear(linear(input, a, None), b, None).mul_scalar(self.scale);
        let plain = linear_frozen(x.clone(), base, None);
        let y = match direction {
            Some(direction) => (plain + low) * direction.reshape([1, self.rows]),
            None => plain + low,
        };
        Some(match bias {
            Some(bias) => y + bias.clone().reshape([1, self.rows]),
            None => y,
        })
    }

    fn addition(&self, x: &Tensor<2>, scope: &mut Scope<'_>) -> Option<Tensor<2>> {
        if self.magnitude.is_some() {
            return None;
        }
        let (a, b) = self.factors(scope);
        let input = scope.dropout(x.clone(), self.dropout);
        Some(linear(linear(input, a, None), b, None).mul_scalar(self.scale))
    }
}

/// The bias of a change's second factor, which becomes part of the layer's own where it has one.
#[derive(Debug)]
struct FactorBias {
    value: ParameterId,
    rows: usize,
    scale: f64,
}

impl FactorBias {
    fn added(&self, scope: &Scope<'_>) -> Tensor<1> {
        scope.tensor::<1>(self.value, [self.rows]).mul_scalar(self.scale)
    }
}

impl WeightChange for FactorBias {
    fn parameters(&self) -> Vec<ParameterId> {
        vec![self.value]
    }

    fn materialize(&self, base: Tensor<2>, scope: &Scope<'_>) -> Tensor<2> {
        base + self.added(scope).reshape([self.rows, 1])
    }
}

impl StateChange for FactorBias {
    fn parameters(&self) -> Vec<ParameterId> {
        vec![self.value]
    }

    fn apply(&self, x: Tensor<2>, _at: &SiteView<'_>, scope: &mut Scope<'_>) -> Tensor<2> {
        x + self.added(scope).reshape([1, self.rows])
    }
}

/// The change of one embedding: rows of `E + s·(B·A)ᵀ`.
#[derive(Debug)]
struct LowRankEmbedding {
    a: ParameterId,
    b: ParameterId,
    rank: usize,
    rows: usize,
    columns: usize,
    scale: f64,
}

impl WeightChange for LowRankEmbedding {
    fn parameters(&self) -> Vec<ParameterId> {
        vec![self.a, self.b]
    }

    fn materialize(&self, base: Tensor<2>, scope: &Scope<'_>) -> Tensor<2> {
        let a: Tensor<2> = scope.tensor(self.a, [self.rank, self.rows]);
        let b: Tensor<2> = scope.tensor(self.b, [self.columns, self.rank]);
        base + b.matmul(a).transpose().mul_scalar(self.scale)
    }

    fn follows_tie(&self) -> bool {
        // PEFT changes the embedding's own module only; a tied head keeps the base weight.
        false
    }
}
