//! AdapterFusion: attention over several trained bottleneck adapters.

use std::path::Path;

use retune_core::change::{Changes, Scope, SiteView, StateChange};
use retune_core::kernels::linear;
use retune_core::method::{Card, Method, MethodPlan, PlannedParameter, Promises, StepView};
use retune_core::parameters::{ParameterId, Parameters};
use retune_core::random::Seed;
use retune_core::site::Site;
use retune_core::spec::{ModelSpec, WeightSpec};
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_options::{Options, Table, options, to_toml};
use serde_json::{Value, json};
use tensor::{Tensor, activation};

use crate::adapter::{Adapter as Folder, PREFIX, peft_config};
use crate::registry::{self, Plugin};
use crate::replacement;
use crate::state::block::Bottleneck;
use crate::state::keys::Keys;
use crate::state::sublayer::{Insertion, Through, read_of};
use crate::state::{FileTensors, Made, Needs, Slot, StateMethod};
use crate::unified_view::{Composition, Module, Placed, UnifiedView};

options! {
    /// Learns, for each token, how much of each adapter to take.
    pub struct FusionOptions("adapter-fusion") {
        /// Folders of trained adapters, each of bottlenecks at the outputs of sub-layers; they stay as
        /// they are.
        adapters: Vec<String> = Vec::new();
        /// Where none are named: how many begin at random behind the feed-forward networks and train
        /// along.
        untrained: usize = 2, in 2..=64;
        /// Width of those that train along.
        size: usize = 16, in 1..=65536;
        /// Weight of the values' squared distance from the identity in the loss.
        regularisation: f64 = 0.01, in 0.0..=1e3;
        /// Modules of the model that train whole and are saved beside.
        modules_to_save: Vec<String> = Vec::new();
    }
}

/// What help, documentation and model cards say.
pub const CARD: Card = Card {
    name: "adapter-fusion",
    summary: "Trains attention over the outputs of several adapters, which stay as they are.",
    source: "Pfeiffer et al., AdapterFusion: Non-Destructive Task Composition for Transfer Learning, 2021, arXiv 2005.00247",
    usual_learning_rates: (5e-6, 1e-3),
    options: registry::specs::<FusionOptions>,
};

/// The method's line in the registry.
pub const PLUGIN: Plugin = Plugin {
    card: CARD,
    read: |reader| Box::new(AdapterFusion { options: FusionOptions::read(reader), original: None }),
    adapter: Some((PEFT_TYPE, |config| Ok(Box::new(AdapterFusion::from_adapter(config)?)))),
};

const PEFT_TYPE: &str = "ADAPTER_FUSION";

/// The keys of the method's and of each adapter's options.
const OPTIONS: &str = "retune_options";
const ADAPTERS: &str = "retune_adapters";

/// What stands before the names of the fusion's tensors, and what its values' end with.
const ROOT: &str = "base_model.model.fusion.";
const VALUES: &str = ".value.weight";

/// AdapterFusion.
#[derive(Debug, Clone, Default)]
pub struct AdapterFusion {
    /// Which adapters, and how their values are held.
    pub options: FusionOptions,
    /// The adapter's own configuration where it was read from a file: written back as it was.
    pub original: Option<Value>,
}

/// One of the adapters: how it is built, and its tensors where it was trained before.
struct Member {
    view: UnifiedView,
    trained: Option<(String, FileTensors)>,
}

/// The bottlenecks of all adapters at one site.
struct Fused {
    site: Site,
    /// The place of each among the members.
    parts: Vec<(usize, Placed)>,
}

impl Fused {
    fn name(&self) -> String {
        format!("{ROOT}{}", self.site)
    }
}

fn wrong(what: &str, expected: &str, found: String) -> Error {
    Error::Setting {
        setting: "method.adapter-fusion.adapters".to_owned(),
        what: what.to_owned(),
        expected: expected.to_owned(),
        found,
        help:
            "name folders of adapters that `unified-view` trained, at the same places of the model"
                .to_owned(),
    }
}

impl AdapterFusion {
    fn from_adapter(config: &Value) -> Result<Self> {
        let text = Keys(config).text(OPTIONS)?.unwrap_or_default();
        let options = read_options::<FusionOptions>(config, OPTIONS, text)?;
        Ok(Self { options, original: Some(config.clone()) })
    }

    fn members(&self) -> Result<Vec<Member>> {
        if let Some(config) = &self.original {
            let views = Keys(config).names(ADAPTERS)?.into_iter();
            return views
                .map(|text| {
                    Ok(Member { view: read_options(config, ADAPTERS, &text)?, trained: None })
                })
                .collect();
        }
        if self.options.adapters.is_empty() {
            let row = Module {
                size: self.options.size,
                insertion: Insertion::Sequential,
                composition: Composition::Add,
                ..Module::default()
            };
            let view = UnifiedView { modules: vec![row], ..UnifiedView::default() };
            let member = |_| Member { view: view.clone(), trained: None };
            return Ok((0..self.options.untrained).map(member).collect());
        }
        let read = |path: &String| {
            let folder = Folder::read(Path::new(path))?;
            let kind = folder.config.get("peft_type").and_then(Value::as_str).unwrap_or_default();
            if kind != UnifiedView::PEFT_TYPE {
                let found = format!("{path}: an adapter of type `{kind}`");
                return Err(wrong("cannot be fused", "bottleneck adapters", found));
            }
            let view = UnifiedView::read_config(&Keys(&folder.config))?;
            Ok(Member { view, trained: Some((path.clone(), folder.tensors)) })
        };
        let members: Vec<Member> = self.options.adapters.iter().map(read).collect::<Result<_>>()?;
        if members.len() < 2 {
            let found = format!("{} adapter", members.len());
            return Err(wrong("one adapter has nothing to choose from", "two or more", found));
        }
        Ok(members)
    }

    /// Returns what is fused where, in the order of the members' sites.
    fn fused(spec: &ModelSpec, members: &[Member]) -> Result<Vec<Fused>> {
        let mut fused: Vec<Fused> = Vec::new();
        for (place, member) in members.iter().enumerate() {
            for placed in member.view.bottlenecks(spec)? {
                if !matches!(placed.site, Site::Output(..)) {
                    let found = format!("one at {}", placed.site);
                    return Err(wrong(
                        "cannot be fused",
                        "adapters at outputs of sub-layers",
                        found,
                    ));
                }
                match fused.iter_mut().find(|known| known.site == placed.site) {
                    Some(known) => known.parts.push((place, placed)),
                    None => fused.push(Fused { site: placed.site, parts: vec![(place, placed)] }),
                }
            }
        }
        let uneven = fused.iter().find(|of| {
            of.parts.len() != members.len()
                || of.parts.iter().enumerate().any(|(i, (m, _))| i != *m)
        });
        match uneven {
            None => Ok(fused),
            Some(of) => {
                let found = format!("{} at {}", of.parts.len(), of.site);
                Err(wrong(
                    "adapters stand at different places",
                    "one of each at every place",
                    found,
                ))
            }
        }
    }

    /// Returns the tensors of one bottleneck, each with its name in the adapter's own folder.
    fn slots_of(member: usize, placed: &Placed) -> Vec<(Slot, String)> {
        let name = Self::name_of(member, placed);
        let own = placed.plan.slots(&name, &placed.site.to_string());
        own.into_iter()
            .map(|slot| {
                let there = format!("{}{}", placed.name, &slot.name[name.len()..]);
                (slot, there)
            })
            .collect()
    }

    fn name_of(member: usize, placed: &Placed) -> String {
        let own = placed.name.strip_prefix(PREFIX).unwrap_or(&placed.name);
        format!("{ROOT}adapters.{member}.{own}")
    }

    /// Returns the names and shapes of a site's query, key and value.
    fn attention(of: &Fused, width: usize) -> [(String, Vec<usize>); 4] {
        // All keys of a token would shift by a key's bias alike, so there is none.
        [
            ("query.weight", vec![width, width]),
            ("query.bias", vec![width]),
            ("key.weight", vec![width, width]),
            ("value.weight", vec![width, width]),
        ]
        .map(|(part, shape)| (format!("{}.{part}", of.name()), shape))
    }

    fn whole<'a>(&self, spec: &'a ModelSpec) -> Result<Vec<(String, &'a WeightSpec)>> {
        let setting = "method.adapter-fusion.modules_to_save";
        replacement::saved_modules(spec, &self.options.modules_to_save, &|_| false, setting)
    }
}

fn read_options<T: Options>(config: &Value, key: &str, text: &str) -> Result<T> {
    let broken = |report: &retune_options::Report| {
        let first = report.diagnostics().first().map_or("", |d| d.message.as_str());
        Keys(config).error(key, first)
    };
    let document = retune_options::Document::parse("adapter_config.json", text);
    Ok(document.map_err(|r| broken(&r))?.read(T::read).map_err(|r| broken(&r))?.0)
}

impl Method for AdapterFusion {
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
        let starts_at_base = self.options.adapters.is_empty();
        Promises { starts_at_base, refuses: Needs::OneStack.refusal(), ..Promises::default() }
    }

    fn examples(&self) -> &'static [&'static str] {
        &["size = 4", "untrained = 3\nsize = 3\nregularisation = 0.0"]
    }

    fn plan(&self, spec: &ModelSpec) -> Result<MethodPlan> {
        Needs::OneStack.check(CARD.name, spec)?;
        let members = self.members()?;
        let trained = |member: usize| members[member].trained.is_some();
        let mut parameters = Vec::new();
        for of in Self::fused(spec, &members)? {
            let place = of.site.to_string();
            for (member, placed) in &of.parts {
                parameters.extend(Self::slots_of(*member, placed).into_iter().map(|(slot, _)| {
                    let (name, shape, place) = (slot.name, slot.shape, slot.place);
                    PlannedParameter { name, shape, place, trains: !trained(*member) }
                }));
            }
            parameters.extend(Self::attention(&of, spec.width).map(|(name, shape)| {
                PlannedParameter { name, shape, place: place.clone(), trains: true }
            }));
        }
        let whole = self.whole(spec)?;
        parameters.extend(whole.into_iter().map(|(name, weight)| replacement::plan(name, weight)));
        Ok(MethodPlan { parameters, notes: Vec::new() })
    }

    fn attach(
        &self,
        weights: &Weights,
        parameters: &mut Parameters,
        seed: Seed,
    ) -> Result<Changes> {
        let spec = weights.spec().clone();
        let members = self.members()?;
        let mut changes = Changes::default();
        for of in Self::fused(&spec, &members)? {
            for (member, placed) in &of.parts {
                for (slot, there) in Self::slots_of(*member, placed) {
                    let Some((path, tensors)) = &members[*member].trained else {
                        slot.add(weights, seed, parameters)?;
                        continue;
                    };
                    match tensors.get(&there) {
                        Some((shape, values)) if *shape == slot.shape => {
                            parameters.add_buffer(slot.name, &slot.shape, values.clone());
                        }
                        other => {
                            let found =
                                other.map_or("nothing".to_owned(), |o| format!("{:?}", o.0));
                            let expected = format!("`{there}` of shape {:?}", slot.shape);
                            let what = format!("{path} does not fit this model");
                            return Err(wrong(&what, &expected, found));
                        }
                    }
                }
            }
            let width = spec.width;
            let ids = Self::attention(&of, width).map(|(name, shape)| {
                let mut values = vec![0.0; shape.iter().product()];
                if name.ends_with(VALUES) {
                    (0..width).for_each(|i| values[i * width + i] = 1.0);
                } else if shape.len() > 1 {
                    seed.stream(&name, &[]).fill_normal(&mut values, 0.02);
                }
                parameters.add(name, &shape, values)
            });
            let made = Made::new(weights, seed, parameters);
            let parts = of.parts.iter().map(|(member, placed)| {
                let block = placed.plan.clone().build(&Self::name_of(*member, placed), &made);
                let (norm, layer) = &placed.after_norm;
                let through = Through::named(norm, *layer, weights)?;
                Ok(Part { block, insertion: placed.insertion, scale: placed.scale, through })
            });
            let parts = parts.collect::<Result<_>>()?;
            changes.change_state(of.site, Fusion { parts, ids, width });
        }
        for (name, weight) in self.whole(&spec)? {
            replacement::attach(&name, weight, weights, parameters, &mut changes)?;
        }
        Ok(changes)
    }

    fn on_gradients(&mut self, step: &mut StepView<'_>) -> Result<()> {
        let weight = 2.0 * self.options.regularisation as f32;
        for (id, parameter) in step.parameters.iter() {
            if !(parameter.name.starts_with(ROOT) && parameter.name.ends_with(VALUES)) {
                continue;
            }
            let Some(gradient) = &mut step.gradients[id.index()] else { continue };
            let width = parameter.shape[0];
            for (place, (g, value)) in
                gradient.iter_mut().zip(step.parameters.values(id)).enumerate()
            {
                let identity = if place.is_multiple_of(width + 1) { 1.0 } else { 0.0 };
                *g += weight * (value - identity);
            }
        }
        Ok(())
    }

    fn adapter_config(&self, spec: &ModelSpec) -> Option<Value> {
        if let Some(original) = &self.original {
            return Some(original.clone());
        }
        let mut config = peft_config(PEFT_TYPE, spec);
        config.insert(OPTIONS.to_owned(), json!(to_toml(&self.options.write())));
        let members = self.members().unwrap_or_default();
        let views: Vec<String> = members.iter().map(|m| to_toml(&m.view.write())).collect();
        config.insert(ADAPTERS.to_owned(), json!(views));
        Some(config.into())
    }
}

/// One adapter at a site.
#[derive(Debug)]
struct Part {
    block: Bottleneck,
    insertion: Insertion,
    scale: f64,
    through: Option<Through>,
}

/// Attention of each token over the adapters at a site.
#[derive(Debug)]
struct Fusion {
    parts: Vec<Part>,
    /// Query with its bias, key, value.
    ids: [ParameterId; 4],
    width: usize,
}

impl StateChange for Fusion {
    fn parameters(&self) -> Vec<ParameterId> {
        let of_parts = self.parts.iter().flat_map(|part| part.block.parameters());
        of_parts.chain(self.ids).collect()
    }

    fn reads_documents(&self) -> bool {
        self.parts.iter().any(|part| part.block.reads_documents())
    }

    fn apply(&self, y: Tensor<2>, at: &SiteView<'_>, scope: &mut Scope<'_>) -> Tensor<2> {
        let mut added = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            let read = read_of(part.insertion, part.through.as_ref(), &y, at);
            added.push(part.block.apply(read, at, scope).mul_scalar(part.scale));
        }
        self.mix(y, added, scope)
    }
}

impl Fusion {
    /// Mixes what adapters add to `y`, `[tokens, width]` each.
    fn mix(&self, y: Tensor<2>, added: Vec<Tensor<2>>, scope: &Scope<'_>) -> Tensor<2> {
        let square = [self.width, self.width];
        let [query, bias, key, value] = self.ids;
        let bias = scope.tensor(bias, [self.width]);
        let query = linear(y.clone(), scope.tensor(query, square), Some(bias));
        let key: Tensor<2> = scope.tensor(key, square);
        // What an adapter adds to y is all that tells its key from another's.
        let score = |added: &Tensor<2>| {
            (query.clone() * linear(added.clone(), key.clone(), None)).sum_dim(1)
        };
        let scores = Tensor::cat(added.iter().map(score).collect(), 1);
        let shares = activation::softmax(scores, 1);
        let mixed = added
            .into_iter()
            .enumerate()
            .fold(y, |sum, (place, added)| sum + added * shares.clone().narrow(1, place, 1));
        // Shares sum up to 1, so the value of the mixture is the mixture of the values.
        linear(mixed, scope.tensor(value, square), None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use retune_core::change::Mode;
    use retune_core::parameters::to_vec;
    use retune_core::step::StepParts;
    use tensor::Device;

    #[test]
    fn adapters_are_mixed_by_hand() {
        let device = Device::flex();
        let mut parameters = Parameters::new(&device);
        let ids = [
            parameters.add("q", &[2, 2], vec![1.0, 0.0, 0.0, 0.0]),
            parameters.add("b", &[2], vec![0.0, 1.0]),
            parameters.add("k", &[2, 2], vec![0.0, 1.0, 1.0, 0.0]),
            parameters.add("v", &[2, 2], vec![1.0, 0.0, 0.0, 2.0]),
        ];
        let fusion = Fusion { parts: Vec::new(), ids, width: 2 };
        let y = Tensor::<2>::from_data([[2.0, 5.0]], &device);
        let added = [[0.0, 1.0], [2.0, 0.0]].map(|row| Tensor::<2>::from_data([row], &device));
        // The query is (2, 1), the keys are (1, 0) and (0, 2): both score 2, so each counts half.
        let scope = Scope::new(&parameters, Mode::Evaluate);
        let found = to_vec(fusion.mix(y, added.to_vec(), &scope));
        assert_eq!(found, [3.0, 11.0]);
    }

    #[test]
    fn values_are_drawn_to_the_identity() {
        let mut parameters = Parameters::new(&Device::flex());
        let name = format!("{ROOT}layers.0.feed_forward.output{VALUES}");
        parameters.add(name, &[2, 2], vec![1.5, 0.0, -1.0, 1.0]);
        let mut parts = StepParts::new(&parameters);
        parts.gradients[0] = Some(vec![1.0; 4]);
        let options = FusionOptions { regularisation: 0.25, ..Default::default() };
        let mut fusion = AdapterFusion { options, original: None };
        fusion.on_gradients(&mut parts.view(1, 9, &mut parameters)).unwrap();
        assert_eq!(parts.gradients[0], Some(vec![1.25, 1.0, 0.5, 1.0]));
    }

    #[test]
    fn folders_that_are_no_adapters_are_named() {
        let adapters = vec!["no/such/folder".to_owned()];
        let options = FusionOptions { adapters, ..Default::default() };
        let fusion = AdapterFusion { options, original: None };
        let error = fusion.members().err().unwrap().to_string();
        assert!(error.contains("no/such/folder"), "{error}");
    }
}
