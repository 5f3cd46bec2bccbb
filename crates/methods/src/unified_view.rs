//! The unified view: adapters, prefix tuning and their mixtures as rows of one design table.

use retune_core::change::{Changes, Mode, Scope};
use retune_core::method::{Card, Promises};
use retune_core::parameters::{ParameterId, Parameters, to_vec};
use retune_core::site::{Site, Sublayer};
use retune_core::spec::ModelSpec;
use retune_core::{Error, Result};
use retune_options::{choice, options};

use crate::adapter::PREFIX;
use crate::prefix_tuning::{MadePrefix, key_width};
use crate::registry;
use crate::state::block::{Ends, Nonlinearity, Plan};
use crate::state::sublayer::{Adapter, Extra, HeadAdapter, Insertion, Queries, Through};
use crate::state::{FileTensors, Form, Made, Slot, Start, StateMethod, kaiming, layers, planned};

choice! {
    /// The functional form of a module.
    pub enum Function {
        /// `relu(x D) U`: an adapter.
        Relu = "relu",
        /// `gelu(x D) U`
        Gelu = "gelu",
        /// `silu(x D) U`
        Silu = "silu",
        /// `tanh(x D) U`
        Tanh = "tanh",
        /// `x D U`: no activation.
        Identity = "identity",
        /// `softmax(x D) U` in each head: a prefix.
        Softmax = "softmax",
    }
}

choice! {
    /// Which state a module changes.
    pub enum Place {
        /// What the feed-forward network puts out.
        FeedForward = "feed-forward",
        /// What attention puts out; a parallel module is added before the output projection.
        Attention = "attention",
        /// Each head by itself.
        Heads = "heads",
    }
}

choice! {
    /// How a module's result joins the state.
    pub enum Composition {
        /// `h + Δ`
        Add = "add",
        /// `h + s Δ`
        Scaled = "scaled",
        /// `(1 - g) h + g Δ`, with the gate of a shared soft-max.
        Gated = "gated",
    }
}

options! {
    /// One row of the design table.
    pub struct Module("modules") {
        /// The functional form.
        form: Function = Function::Relu;
        /// Where its input comes from.
        insertion: Insertion = Insertion::Parallel;
        /// Which state it changes.
        place: Place = Place::FeedForward;
        /// How its result joins the state.
        composition: Composition = Composition::Scaled;
        /// Width of the bottleneck, or number of a prefix's keys.
        size: usize = 64, in 1..=65536;
        /// The factor of a scaled composition.
        scale: f64 = 4.0, in -1e4..=1e4;
        /// How an adapter's two ends begin.
        start: Ends = Ends::Lora;
        /// Whether an adapter normalises its input.
        norm: bool = false;
        /// Norm of the model a sequential adapter reads through, together with the residual, with
        /// `{layer}` for the layer's number: AdapterHub's seq_bn; empty reads the state as it is.
        after_norm: String = String::new();
        /// Width of the network that makes a prefix while it trains; 0 trains it directly.
        reparameterise: usize = 0, in 0..=65536;
        /// Probability of dropping a number inside an adapter while training.
        dropout: f64 = 0.0, in 0.0..=0.99;
        /// Only these layers, counted from 0; empty means all.
        layers: Vec<usize> = Vec::new();
    }
}

options! {
    /// Trains modules that are each a row of the design table; without rows, the MAM adapter.
    pub struct UnifiedView("unified-view") {
        /// Number of keys of the MAM adapter's prefix.
        prefix: usize = 30, in 1..=4096;
        /// Width of the MAM adapter's bottleneck.
        bottleneck: usize = 512, in 1..=65536;
        /// The MAM adapter's factor on the feed-forward change.
        scale: f64 = 4.0, in -1e4..=1e4;
        /// Width of the network that makes the MAM adapter's prefix; 0 trains it directly.
        reparameterise: usize = 800, in 0..=65536;
        /// Rows of the design table; with any, nothing else is trained.
        modules: Vec<Module> = Vec::new();
        /// Modules of the model that train whole and are saved beside.
        modules_to_save: Vec<String> = Vec::new();
    }
}

crate::state_plugin!(UnifiedView);

const NAME: &str = "method.unified-view";

/// What a row of the table makes in one layer.
enum Kind {
    Bottleneck(Plan, Site),
    Heads,
    Prefix { beside: Option<f64> },
}

impl Module {
    fn kind(&self, spec: &ModelSpec, layer: usize, setting: &str) -> Result<Kind> {
        let refuse = |key: &str, what: &str, help: &str| {
            Err(Error::Setting {
                setting: format!("{setting}.{key}"),
                what: what.to_owned(),
                expected: "a combination of the paper's table that means something".to_owned(),
                found: format!(
                    "form {:?}, {:?}, at {:?}, {:?}",
                    self.form, self.insertion, self.place, self.composition
                )
                .to_lowercase(),
                help: help.to_owned(),
            })
        };
        let heads = self.place == Place::Heads;
        if heads && self.insertion == Insertion::Sequential {
            return refuse("insertion", "heads have no output of their own to work on", "parallel");
        }
        if self.form == Function::Softmax && !heads {
            return refuse("form", "a soft-max is over the keys of heads", "place = \"heads\"");
        }
        if self.composition == Composition::Gated && self.form != Function::Softmax {
            let what = "the gate is the share of a soft-max";
            return refuse("composition", what, "form = \"softmax\", or add or scaled");
        }
        if self.reparameterise > 0 && self.composition != Composition::Gated {
            let what = "only a gated prefix is made by a network";
            return refuse("reparameterise", what, "0");
        }
        let factor = self.factor();
        if self.form == Function::Softmax {
            let gated = self.composition == Composition::Gated;
            return Ok(Kind::Prefix { beside: (!gated).then_some(factor) });
        }
        if heads {
            if self.form != Function::Relu {
                return refuse("form", "the adapter of heads has a ReLU", "form = \"relu\"");
            }
            Plan::new(spec.width, self.size, spec.width).check(setting, spec.causal)?;
            return Ok(Kind::Heads);
        }
        let (site, outputs) = match (self.place, self.insertion) {
            (Place::FeedForward, _) => (Site::Output(layer, Sublayer::FeedForward), spec.width),
            (_, Insertion::Sequential) => (Site::Output(layer, Sublayer::Attention), spec.width),
            (_, Insertion::Parallel) => {
                (Site::Heads(layer, Sublayer::Attention), spec.num_heads * spec.head_width)
            }
        };
        let plan = Plan {
            nonlinearity: match self.form {
                Function::Gelu => Nonlinearity::Gelu,
                Function::Silu => Nonlinearity::Silu,
                Function::Tanh => Nonlinearity::Tanh,
                Function::Identity => Nonlinearity::Identity,
                _ => Nonlinearity::Relu,
            },
            ends: self.start,
            norm: self.norm,
            dropout: self.dropout,
            ..Plan::new(spec.width, self.size, outputs)
        };
        plan.check(setting, spec.causal)?;
        if !self.after_norm.is_empty() && self.insertion == Insertion::Parallel {
            return refuse("after_norm", "a parallel adapter reads no norm behind", "\"\"");
        }
        Ok(Kind::Bottleneck(plan, site))
    }

    fn factor(&self) -> f64 {
        if self.composition == Composition::Scaled { self.scale } else { 1.0 }
    }
}

/// One module in one layer.
struct Unit {
    row: usize,
    layer: usize,
    kind: Kind,
}

impl Unit {
    /// Returns what stands before the names of its tensors.
    fn name(&self) -> String {
        format!("{}.layers.{}", root(self.row), self.layer)
    }
}

/// Returns what stands before the names of a row's tensors.
fn root(row: usize) -> String {
    format!("{PREFIX}unified.{row}")
}

/// A bottleneck at its place, for what is built of such.
#[derive(Debug, Clone)]
pub struct Placed {
    /// What stands before the names of its tensors.
    pub name: String,
    /// The state it changes.
    pub site: Site,
    /// How it is made.
    pub plan: Plan,
    /// Where its input comes from.
    pub insertion: Insertion,
    /// Factor on its result.
    pub scale: f64,
    /// Norm of the model it reads through, and the layer; empty for none.
    pub after_norm: (String, usize),
}

impl UnifiedView {
    /// Returns the bottlenecks of all rows.
    ///
    /// # Errors
    /// If a row is impossible for this model, or makes something else.
    pub fn bottlenecks(&self, spec: &ModelSpec) -> Result<Vec<Placed>> {
        let rows = self.rows();
        let placed = |unit: Unit| {
            let module = &rows[unit.row];
            let name = unit.name();
            match unit.kind {
                Kind::Bottleneck(plan, site) => {
                    let (insertion, scale) = (module.insertion, module.factor());
                    let after_norm = (module.after_norm.clone(), unit.layer);
                    Ok(Placed { name, site, plan, insertion, scale, after_norm })
                }
                _ => Err(Error::Setting {
                    setting: format!("{NAME}.modules[{}]", unit.row),
                    what: "no bottleneck".to_owned(),
                    expected: "an adapter behind or beside a sub-layer".to_owned(),
                    found: format!("form {:?} at {:?}", module.form, module.place).to_lowercase(),
                    help: "train adapters with place = \"feed-forward\" or \"attention\""
                        .to_owned(),
                }),
            }
        };
        self.units(spec)?.into_iter().map(placed).collect()
    }

    /// Returns the rows of the table.
    fn rows(&self) -> Vec<Module> {
        if !self.modules.is_empty() {
            return self.modules.clone();
        }
        let prefix = Module {
            form: Function::Softmax,
            place: Place::Heads,
            composition: Composition::Gated,
            size: self.prefix,
            reparameterise: self.reparameterise,
            ..Module::default()
        };
        let adapter = Module { size: self.bottleneck, scale: self.scale, ..Module::default() };
        vec![prefix, adapter]
    }

    fn units(&self, spec: &ModelSpec) -> Result<Vec<Unit>> {
        let mut units = Vec::new();
        for (row, module) in self.rows().iter().enumerate() {
            let setting = if self.modules.is_empty() {
                format!("{NAME} (MAM)")
            } else {
                format!("{NAME}.modules[{row}]")
            };
            for layer in layers(spec, &module.layers, &format!("{setting}.layers"))? {
                units.push(Unit { row, layer, kind: module.kind(spec, layer, &setting)? });
            }
        }
        Ok(units)
    }

    fn network(
        module: &Module,
        unit: &Unit,
        width: usize,
        find: impl Fn(&str) -> ParameterId,
    ) -> MadePrefix {
        let shared = |part: &str| find(&format!("{}.{part}", root(unit.row)));
        let own = |part: &str| find(&format!("{}.{part}", unit.name()));
        MadePrefix {
            embedding: shared("embedding"),
            inner: [shared("in.weight"), shared("in.bias")],
            outer: [own("weight"), own("bias")],
            tokens: module.size,
            hidden: module.reparameterise,
            width,
            takes_positions: false,
        }
    }
}

impl StateMethod for UnifiedView {
    const CARD: Card = Card {
        name: "unified-view",
        summary: "Trains adapters and prefixes as rows of one design table; by default the MAM adapter.",
        source: "He et al., Towards a Unified View of Parameter-Efficient Transfer Learning, 2022, arXiv 2110.04366",
        usual_learning_rates: (5e-5, 3e-3),
        options: registry::specs::<Self>,
    };
    const PEFT_TYPE: &'static str = "UNIFIED_VIEW";

    fn promises(&self) -> Promises {
        let starts = |module: &Module| {
            module.form != Function::Softmax
                && (module.start == Ends::Lora || module.place == Place::Heads)
        };
        let starts_at_base = self.rows().iter().all(starts);
        Promises { starts_at_base, ..Promises::default() }
    }

    fn examples() -> &'static [&'static str] {
        &[
            "prefix = 3\nbottleneck = 8\nreparameterise = 6",
            "[[modules]]\nsize = 4\n\
             [[modules]]\nsize = 3\nplace = 'attention'\ncomposition = 'add'\nlayers = [1]",
            "[[modules]]\nsize = 4\ninsertion = 'sequential'\nnorm = true\n\
             [[modules]]\nsize = 3\nplace = 'attention'\ninsertion = 'sequential'\nform = 'gelu'\nstart = 'bert'",
            "[[modules]]\nsize = 3\nplace = 'heads'\n\
             [[modules]]\nsize = 4\nplace = 'heads'\nform = 'softmax'\n\
             [[modules]]\nsize = 2\nplace = 'heads'\nform = 'softmax'\ncomposition = 'gated'",
        ]
    }

    fn slots(&self, spec: &ModelSpec, form: Form) -> Result<Vec<Slot>> {
        let rows = self.rows();
        let mut slots: Vec<Slot> = Vec::new();
        for unit in self.units(spec)? {
            let module = &rows[unit.row];
            let name = unit.name();
            let place = match &unit.kind {
                Kind::Bottleneck(_, site) => site.to_string(),
                _ => Site::Heads(unit.layer, Sublayer::Attention).to_string(),
            };
            let slot = |part: &str, shape: &[usize], start| {
                Slot::new(format!("{name}.{part}"), shape, &place, start)
            };
            let (size, width) = (module.size, key_width(spec));
            match &unit.kind {
                Kind::Bottleneck(plan, _) => slots.extend(plan.slots(&name, &place)),
                Kind::Heads => {
                    let side = spec.num_heads * spec.head_width;
                    slots.extend([
                        slot("norm.weight", &[spec.width], Start::Constant(1.0)),
                        slot("norm.bias", &[spec.width], Start::Constant(0.0)),
                        slot("down", &[size, side], kaiming(side)),
                        slot("up", &[size, side], Start::Constant(0.0)),
                    ]);
                }
                Kind::Prefix { .. } if module.reparameterise == 0 || form == Form::Saved => {
                    for part in ["keys", "values"] {
                        slots.push(slot(part, &[size, width], Start::Normal(0.02)));
                    }
                }
                Kind::Prefix { .. } => {
                    let hidden = module.reparameterise;
                    let root = root(unit.row);
                    if !slots.iter().any(|known| known.name == format!("{root}.embedding")) {
                        let shared = |part: &str, shape: &[usize], start| {
                            Slot::new(format!("{root}.{part}"), shape, "attention", start)
                        };
                        slots.extend([
                            shared("embedding", &[size, width], Start::Normal(1.0)),
                            shared("in.weight", &[hidden, width], kaiming(width)),
                            shared("in.bias", &[hidden], kaiming(width)),
                        ]);
                    }
                    slots.push(slot("weight", &[2 * width, hidden], kaiming(hidden)));
                    slots.push(slot("bias", &[2 * width], kaiming(hidden)));
                }
            }
        }
        Ok(slots)
    }

    fn build(&self, spec: &ModelSpec, form: Form, made: &Made<'_>) -> Result<Changes> {
        let mut changes = Changes::default();
        let rows = self.rows();
        for unit in self.units(spec)? {
            let module = &rows[unit.row];
            let (name, layer) = (unit.name(), unit.layer);
            let id = |part: &str| made.id(&format!("{name}.{part}"));
            match &unit.kind {
                Kind::Bottleneck(plan, site) => {
                    changes.change_state(
                        *site,
                        Adapter {
                            block: plan.clone().build(&name, made),
                            insertion: module.insertion,
                            scale: module.factor(),
                            residual: module.insertion == Insertion::Sequential,
                            through: Through::named(&module.after_norm, layer, made.weights)?,
                        },
                    );
                }
                Kind::Heads => {
                    let site = Site::Heads(layer, Sublayer::Attention);
                    changes.change_state(
                        site,
                        HeadAdapter {
                            queries: Queries::of(spec, layer, made.weights)?,
                            norm: [id("norm.weight"), id("norm.bias")],
                            down: id("down"),
                            up: id("up"),
                            size: module.size,
                            inputs: spec.width,
                            heads: spec.num_heads,
                            head_width: spec.head_width,
                            scale: module.factor(),
                        },
                    );
                }
                Kind::Prefix { beside } if module.reparameterise == 0 || form == Form::Saved => {
                    changes.change_attention(
                        layer,
                        Extra {
                            keys: id("keys"),
                            values: id("values"),
                            tokens: module.size,
                            width: key_width(spec),
                            beside: *beside,
                        },
                    );
                }
                Kind::Prefix { .. } => {
                    let width = key_width(spec);
                    let network = Self::network(module, &unit, width, |name| made.id(name));
                    changes.change_attention(layer, network);
                }
            }
        }
        Ok(changes)
    }

    fn modules_to_save(&self) -> &[String] {
        &self.modules_to_save
    }

    fn notes(&self, spec: &ModelSpec) -> Vec<String> {
        let network = self.rows().iter().any(|module| module.reparameterise > 0);
        let saved: usize = match self.slots(spec, Form::Saved) {
            Ok(slots) if network => {
                slots.iter().map(|slot| slot.shape.iter().product::<usize>()).sum()
            }
            _ => return Vec::new(),
        };
        vec![format!(
            "the network that makes the prefix trains and is dropped at the end: {saved} values \
             are saved"
        )]
    }

    fn fold(&self, parameters: &Parameters, tensors: &mut FileTensors) {
        let scope = Scope::new(parameters, Mode::Evaluate);
        for (row, module) in self.rows().iter().enumerate() {
            let root = root(row);
            let Some(embedding) = parameters.find(&format!("{root}.embedding")) else { continue };
            let width = parameters.get(embedding).shape[1];
            let prefix = format!("{root}.layers.");
            let number = |name: &str| -> Option<usize> {
                name.strip_prefix(&prefix)?.strip_suffix(".bias")?.parse().ok()
            };
            let own: Vec<usize> = parameters.iter().filter_map(|(_, p)| number(&p.name)).collect();
            tensors.retain(|name, _| !name.starts_with(&format!("{root}.")));
            for layer in own {
                let unit = Unit { row, layer, kind: Kind::Prefix { beside: None } };
                let network = Self::network(module, &unit, width, |n| planned(parameters, n));
                let both = network.make(&scope);
                for (place, part) in ["keys", "values"].into_iter().enumerate() {
                    let values = to_vec(both.clone().narrow(1, place * width, width));
                    let name = format!("{}.{part}", unit.name());
                    tensors.insert(name, (vec![module.size, width], values));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use retune_core::spec::Head;

    fn spec() -> ModelSpec {
        ModelSpec {
            architecture: "llama".to_owned(),
            class: "LlamaForCausalLM".to_owned(),
            num_layers: 2,
            width: 1024,
            inner_width: 4096,
            num_heads: 16,
            num_key_heads: 16,
            head_width: 64,
            vocabulary: 10,
            max_positions: 2048,
            causal: true,
            towers: Vec::new(),
            weights: Vec::new(),
            head: Head::Embedding,
            config: serde_json::Value::Null,
        }
    }

    #[test]
    fn the_mam_adapter_has_the_papers_count() {
        let mam = UnifiedView { reparameterise: 0, ..UnifiedView::default() };
        let slots = mam.slots(&spec(), Form::Training).unwrap();
        let count: usize = slots.iter().map(|slot| slot.shape.iter().product::<usize>()).sum();
        // Per layer: 2 l d of the prefix, 2 r d + r + d of the adapter.
        assert_eq!(count, 2 * (2 * 30 * 1024 + 2 * 512 * 1024 + 512 + 1024));
        let network = UnifiedView::default().slots(&spec(), Form::Saved).unwrap();
        assert_eq!(network, slots, "what a network makes is saved as what trains directly");
    }

    #[test]
    fn combinations_without_meaning_are_refused() {
        let row = Module::default();
        let rows = [
            (
                "insertion",
                Module { place: Place::Heads, insertion: Insertion::Sequential, ..row.clone() },
            ),
            ("form", Module { form: Function::Softmax, ..row.clone() }),
            ("composition", Module { composition: Composition::Gated, ..row.clone() }),
            ("size", Module { size: 1025, ..row.clone() }),
            ("size", Module { size: 1025, place: Place::Heads, ..row.clone() }),
            ("reparameterise", Module { reparameterise: 8, ..row.clone() }),
            ("layers", Module { layers: vec![2], ..row }),
        ];
        for (key, module) in rows {
            let method = UnifiedView { modules: vec![module], ..UnifiedView::default() };
            let error = method.slots(&spec(), Form::Training).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{NAME}.modules[0].{key}")), "{key}: {error}");
        }
    }
}
