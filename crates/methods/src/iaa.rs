//! IAA: adapters inside the layers, and aside of them branches that connect one to the next.

use retune_core::change::{Changes, Scope, SiteView, StateChange};
use retune_core::method::{Card, Promises};
use retune_core::parameters::ParameterId;
use retune_core::site::{Site, Sublayer};
use retune_core::spec::ModelSpec;
use retune_core::{Error, Result};
use retune_options::{choice, options};
use tensor::Tensor;

use crate::adapter::PREFIX;
use crate::registry;
use crate::state::block::{Bottleneck, Nonlinearity, Plan};
use crate::state::sublayer::{Adapter, Insertion};
use crate::state::{Form, Made, Needs, Slot, Start, StateMethod, layers};

choice! {
    /// Which modules stand inside the layers.
    pub enum Inside {
        /// Behind the feed-forward network (Pfeiffer).
        Pfeiffer = "pfeiffer",
        /// Behind attention and behind the feed-forward network (Houlsby).
        Houlsby = "houlsby",
        /// Beside the feed-forward network.
        Parallel = "parallel",
        /// None.
        None = "none",
    }
}

choice! {
    /// What one branch aside spans.
    pub enum Span {
        /// A layer.
        Layer = "layer",
        /// A sub-layer: attention and the feed-forward network have one each.
        SubLayer = "sub-layer",
        /// Several layers, as `block` says.
        Block = "block",
        /// No branch.
        None = "none",
    }
}

choice! {
    /// What a branch aside computes.
    pub enum Branch {
        /// A bottleneck that begins at zero.
        Bottleneck = "bottleneck",
        /// What it reads times one number that begins at zero.
        Skip = "skip",
    }
}

options! {
    /// Trains adapters inside the layers and connecting branches aside of them.
    pub struct Iaa("iaa") {
        /// Which modules stand inside the layers.
        inside: Inside = Inside::Pfeiffer;
        /// Width of the bottlenecks inside.
        inside_size: usize = 8, in 1..=65536;
        /// Only these layers have modules inside, counted from 0; empty means all.
        inside_layers: Vec<usize> = Vec::new();
        /// What one branch aside spans.
        aside: Span = Span::Layer;
        /// What a branch aside computes.
        branch: Branch = Branch::Bottleneck;
        /// Width of the bottlenecks aside.
        aside_size: usize = 8, in 1..=65536;
        /// Layers one branch spans, where it spans a block; 0 means all.
        block: usize = 0, in 0..=65536;
        /// The activation of all bottlenecks.
        activation: Nonlinearity = Nonlinearity::Gelu;
        /// Modules of the model that train whole and are saved beside.
        modules_to_save: Vec<String> = Vec::new();
    }
}

crate::state_plugin!(Iaa);

/// One module: where it hangs, what it reads, its tensors' names.
struct Unit {
    name: String,
    site: Site,
    kind: Kind,
}

enum Kind {
    Inside(Plan, Insertion),
    Bottleneck(Plan, Reads),
    Skip(Reads),
}

/// What a branch aside reads.
#[derive(Debug, Clone, Copy)]
enum Reads {
    SubLayer,
    Layer(usize),
}

impl Iaa {
    fn units(&self, spec: &ModelSpec) -> Result<Vec<Unit>> {
        let plan = |size: usize, key: &str| -> Result<Plan> {
            let width = spec.width;
            let plan = Plan { nonlinearity: self.activation, ..Plan::new(width, size, width) };
            match plan.check("method.iaa", spec.causal) {
                Err(Error::Setting { what, expected, found, help, .. }) => {
                    let setting = format!("method.iaa.{key}");
                    Err(Error::Setting { setting, what, expected, found, help })
                }
                other => other.map(|()| plan),
            }
        };
        if self.inside == Inside::None && self.aside == Span::None {
            return Err(Error::Setting {
                setting: "method.iaa.aside".to_owned(),
                what: "nothing is left to train".to_owned(),
                expected: "modules inside, or branches aside".to_owned(),
                found: "none of both".to_owned(),
                help: "set `aside` to layer".to_owned(),
            });
        }
        let mut units = Vec::new();
        let mut add = |layer: usize, sublayer: Sublayer, what: &str, kind: Kind| {
            let name = format!("{PREFIX}iaa.layers.{layer}.{}.{what}", sublayer.name());
            units.push(Unit { name, site: Site::Output(layer, sublayer), kind });
        };
        let both = [Sublayer::Attention, Sublayer::FeedForward];
        let with_inside = layers(spec, &self.inside_layers, "method.iaa.inside_layers")?;
        for layer in 0..spec.num_layers {
            for sublayer in both {
                let is_last = sublayer == Sublayer::FeedForward;
                let inside = match self.inside {
                    _ if !with_inside.contains(&layer) => None,
                    Inside::None => None,
                    Inside::Parallel => is_last.then_some(Insertion::Parallel),
                    Inside::Pfeiffer => is_last.then_some(Insertion::Sequential),
                    Inside::Houlsby => Some(Insertion::Sequential),
                };
                if let Some(insertion) = inside {
                    let plan = plan(self.inside_size, "inside_size")?;
                    add(layer, sublayer, "inside", Kind::Inside(plan, insertion));
                }
                let Some(reads) = self.reads(spec, layer, is_last) else { continue };
                let kind = match self.branch {
                    Branch::Skip => Kind::Skip(reads),
                    Branch::Bottleneck => {
                        Kind::Bottleneck(plan(self.aside_size, "aside_size")?, reads)
                    }
                };
                add(layer, sublayer, "aside", kind);
            }
        }
        Ok(units)
    }

    /// Returns what the branch that ends at this sub-layer reads, if one does.
    ///
    /// A branch around a layer ends at the feed-forward network's output: it is added there before
    /// the residual sum and so before the last norm of a layer that has one behind.
    fn reads(&self, spec: &ModelSpec, layer: usize, is_last: bool) -> Option<Reads> {
        match self.aside {
            Span::None => None,
            Span::SubLayer => Some(Reads::SubLayer),
            Span::Layer => is_last.then_some(Reads::Layer(layer)),
            Span::Block => {
                let span = if self.block == 0 { spec.num_layers } else { self.block };
                let ends = (layer + 1).is_multiple_of(span) || layer + 1 == spec.num_layers;
                (is_last && ends).then_some(Reads::Layer(layer / span * span))
            }
        }
    }
}

impl StateMethod for Iaa {
    const CARD: Card = Card {
        name: "iaa",
        summary: "Trains adapters inside the layers and branches aside that connect them.",
        source: "Ma et al., Scattered or Connected? An Optimized Parameter-efficient Tuning Approach for Information Retrieval, 2022, arXiv 2208.09847",
        usual_learning_rates: (5e-5, 2e-3),
        options: registry::specs::<Self>,
    };
    const PEFT_TYPE: &'static str = "IAA";

    fn promises(&self) -> Promises {
        Promises::default()
    }

    fn needs(&self) -> Needs {
        match self.aside {
            Span::None | Span::SubLayer => Needs::OneStack,
            // What enters a decoder's block is not what enters the encoder's.
            Span::Layer | Span::Block => Needs::OneText,
        }
    }

    fn examples() -> &'static [&'static str] {
        &[
            "inside_size = 4\naside_size = 3",
            "inside = 'houlsby'\ninside_size = 3\naside = 'sub-layer'\nbranch = 'skip'",
            "inside = 'parallel'\ninside_layers = [1]\naside = 'block'\naside_size = 4\nactivation = 'tanh'",
            "inside = 'none'\naside = 'block'\nblock = 1\nbranch = 'skip'",
        ]
    }

    fn slots(&self, spec: &ModelSpec, _form: Form) -> Result<Vec<Slot>> {
        let units = self.units(spec)?;
        let of_unit = |Unit { name, site, kind }: Unit| match kind {
            Kind::Inside(plan, _) | Kind::Bottleneck(plan, _) => {
                plan.slots(&name, &site.to_string())
            }
            Kind::Skip(_) => {
                vec![Slot::new(format!("{name}.gate"), [1], site, Start::Constant(0.0))]
            }
        };
        Ok(units.into_iter().flat_map(of_unit).collect())
    }

    fn build(&self, spec: &ModelSpec, _form: Form, made: &Made<'_>) -> Result<Changes> {
        let mut changes = Changes::default();
        for Unit { name, site, kind } in self.units(spec)? {
            match kind {
                Kind::Inside(plan, insertion) => changes.change_state(
                    site,
                    Adapter {
                        block: plan.build(&name, made),
                        insertion,
                        scale: 1.0,
                        residual: insertion == Insertion::Sequential,
                        through: None,
                    },
                ),
                Kind::Bottleneck(plan, reads) => {
                    let block = plan.build(&name, made);
                    changes.change_state(site, Aside { what: What::Bottleneck(block), reads });
                }
                Kind::Skip(reads) => {
                    let gate = made.id(&format!("{name}.gate"));
                    changes.change_state(site, Aside { what: What::Skip(gate), reads });
                }
            }
        }
        Ok(changes)
    }

    fn modules_to_save(&self) -> &[String] {
        &self.modules_to_save
    }
}

/// What a branch aside computes.
#[derive(Debug)]
enum What {
    Bottleneck(Bottleneck),
    Skip(ParameterId),
}

/// A branch around frozen blocks.
#[derive(Debug)]
struct Aside {
    what: What,
    reads: Reads,
}

impl StateChange for Aside {
    fn parameters(&self) -> Vec<ParameterId> {
        match &self.what {
            What::Bottleneck(block) => block.parameters(),
            What::Skip(gate) => vec![*gate],
        }
    }

    fn reads_layer(&self) -> Option<usize> {
        match self.reads {
            Reads::SubLayer => None,
            Reads::Layer(layer) => Some(layer),
        }
    }

    fn apply(&self, y: Tensor<2>, at: &SiteView<'_>, scope: &mut Scope<'_>) -> Tensor<2> {
        let read = match self.reads {
            Reads::SubLayer => at.input,
            Reads::Layer(layer) => at.layer_input(layer),
        };
        let Some(read) = read.cloned() else { return y };
        match &self.what {
            What::Bottleneck(block) => y + block.apply(read, at, scope),
            What::Skip(gate) => y + read * scope.tensor::<2>(*gate, [1, 1]),
        }
    }
}
