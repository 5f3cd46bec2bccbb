//! SSF: every operation's output is scaled and shifted, and the two fold into the weights.

use std::sync::Arc;

use retune_core::Result;
use retune_core::change::{Changes, Scope, SiteView, StateChange, WeightChange};
use retune_core::kernels::linear_frozen;
use retune_core::kernels::matrix::PackedMatrix;
use retune_core::method::{Card, Promises};
use retune_core::parameters::ParameterId;
use retune_core::spec::{Kind, ModelSpec, Role, WeightSpec};
use retune_core::targets::{Among, Targets};
use retune_options::{choice, options};
use tensor::Tensor;

use crate::adapter::PREFIX;
use crate::registry;
use crate::state::{Form, Made, Needs, Slot, Start, StateMethod};

choice! {
    /// Which operations are scaled and shifted.
    pub enum Places {
        /// Linear layers, the projection of patches, and norms.
        All = "all",
        /// Linear layers and the projection of patches only.
        Linear = "linear",
        /// Norms only.
        Norm = "norm",
    }
}

choice! {
    /// Where a shift trains beside the scale.
    pub enum Shift {
        /// Where the operation has a bias that the shift can fold into.
        WhereFolds = "where-folds",
        /// At every linear layer too; one without bias then cannot be merged.
        Always = "always",
        /// Nowhere.
        Never = "never",
    }
}

options! {
    /// Trains a scale and a shift for every channel behind every operation.
    pub struct Ssf("ssf") {
        /// Which operations are scaled and shifted.
        places: Places = Places::All;
        /// Where a shift trains beside the scale.
        shift: Shift = Shift::WhereFolds;
        /// Deviation of the first scales around 1 and shifts around 0; 0 starts at the base.
        deviation: f64 = 0.02, in 0.0..=1.0;
        /// Modules left out: suffixes or regular expressions.
        exclude: Vec<String> = Vec::new();
        /// Only these layers, counted from 0; empty means all, and the norms outside of layers.
        layers: Vec<usize> = Vec::new();
        /// Modules that train whole and are saved beside.
        modules_to_save: Vec<String> = Vec::new();
    }
}

crate::state_plugin!(Ssf);

/// One operation and whether its output is shifted too.
struct Operation<'a> {
    weight: &'a WeightSpec,
    bias: Option<&'a WeightSpec>,
    shifts: bool,
}

impl Operation<'_> {
    fn name(&self, part: &str) -> String {
        format!("{PREFIX}{}.ssf_{part}", self.weight.module())
    }
}

impl Ssf {
    fn operations<'a>(&self, spec: &'a ModelSpec) -> Result<Vec<Operation<'a>>> {
        // `.*` takes every module; exclusions and layers are then checked in one place.
        let targets = Targets {
            names: vec![".*".to_owned()],
            exclude: self.exclude.clone(),
            layers: self.layers.clone(),
        };
        let takes = |weight: &&WeightSpec| match (weight.kind, self.places) {
            // A head is new or tied, and a pooler belongs to it.
            _ if matches!(weight.role, Role::Head | Role::Pooler) => false,
            (Kind::Linear { .. } | Kind::Convolution, places) => places != Places::Norm,
            (Kind::Norm, places) => places != Places::Linear,
            _ => false,
        };
        let chosen = targets.select(spec, Among::Modules, "method.ssf.layers")?;
        let operation = |weight: &'a WeightSpec| {
            let bias = spec.weight(&format!("{}.bias", weight.module()));
            let shifts = match self.shift {
                Shift::Never => false,
                Shift::WhereFolds => bias.is_some(),
                // A norm without bias has no place for a shift in any checkpoint.
                Shift::Always => bias.is_some() || weight.kind != Kind::Norm,
            };
            Operation { weight, bias, shifts }
        };
        let found: Vec<_> = chosen.into_iter().filter(takes).map(operation).collect();
        if found.is_empty() {
            return Err(retune_core::Error::Setting {
                setting: "method.ssf.exclude".to_owned(),
                what: "no operation is left to scale".to_owned(),
                expected: "at least one linear layer or norm".to_owned(),
                found: self.exclude.join(", "),
                help: "exclude fewer modules, or choose other `places`".to_owned(),
            });
        }
        Ok(found)
    }
}

impl StateMethod for Ssf {
    const CARD: Card = Card {
        name: "ssf",
        summary: "Trains a scale and a shift behind every operation; both fold into the weights.",
        source: "Lian et al., Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning, 2022, arXiv 2210.08823",
        usual_learning_rates: (1e-3, 3e-2),
        options: registry::specs::<Self>,
    };
    const PEFT_TYPE: &'static str = "SSF";

    fn promises(&self) -> Promises {
        Promises { starts_at_base: self.deviation == 0.0, ..Promises::default() }
    }

    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    fn examples() -> &'static [&'static str] {
        &["", "deviation = 0.0\nshift = 'always'", "places = 'norm'\nshift = 'never'\nlayers = [1]"]
    }

    fn slots(&self, spec: &ModelSpec, _form: Form) -> Result<Vec<Slot>> {
        let mut slots = Vec::new();
        for operation in self.operations(spec)? {
            let [channels, _] = operation.weight.matrix();
            let mut add = |part: &str, start| {
                let slot =
                    Slot::new(operation.name(part), [channels], &operation.weight.name, start);
                // One number a channel has nothing to decay to.
                slots.push(Slot { decays: false, ..slot });
            };
            add("scale", Start::AroundOne(self.deviation));
            if operation.shifts {
                add("shift", Start::Normal(self.deviation));
            }
        }
        Ok(slots)
    }

    fn build(&self, spec: &ModelSpec, _form: Form, made: &Made<'_>) -> Result<Changes> {
        let mut changes = Changes::default();
        for operation in self.operations(spec)? {
            let [channels, _] = operation.weight.matrix();
            let scale = made.id(&operation.name("scale"));
            let shift = operation.shifts.then(|| made.id(&operation.name("shift")));
            let norm = operation.weight.kind == Kind::Norm;
            let offset = if norm { spec.norm_offset() } else { 0.0 };
            changes.change_weight(&operation.weight.name, Scaled { scale, channels, offset });
            match (operation.bias, shift) {
                (Some(bias), shift) => {
                    changes.change_weight(&bias.name, ScaledBias { scale, shift, channels });
                }
                (None, Some(shift)) => {
                    changes.change_output(operation.weight.module(), Shifted { shift, channels });
                }
                (None, None) => {}
            }
        }
        Ok(changes)
    }

    fn modules_to_save(&self) -> &[String] {
        &self.modules_to_save
    }
}

/// The rows of a weight, or the gains of a norm, times a scale each.
#[derive(Debug)]
struct Scaled {
    scale: ParameterId,
    channels: usize,
    /// What the model adds to the stored gain of a norm.
    offset: f64,
}

impl WeightChange for Scaled {
    fn parameters(&self) -> Vec<ParameterId> {
        vec![self.scale]
    }

    fn materialize(&self, base: Tensor<2>, scope: &Scope<'_>) -> Tensor<2> {
        let scale: Tensor<2> = scope.tensor(self.scale, [self.channels, 1]);
        (base + self.offset) * scale - self.offset
    }

    fn linear(
        &self,
        x: &Tensor<2>,
        base: &Arc<PackedMatrix>,
        bias: Option<&Tensor<1>>,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        let scale: Tensor<2> = scope.tensor(self.scale, [1, self.channels]);
        let y = linear_frozen(x.clone(), base, None) * scale;
        Some(match bias {
            Some(bias) => y + bias.clone().reshape([1, self.channels]),
            None => y,
        })
    }
}

/// A bias times the scale plus the shift.
#[derive(Debug)]
struct ScaledBias {
    scale: ParameterId,
    shift: Option<ParameterId>,
    channels: usize,
}

impl WeightChange for ScaledBias {
    fn parameters(&self) -> Vec<ParameterId> {
        [Some(self.scale), self.shift].into_iter().flatten().collect()
    }

    fn materialize(&self, base: Tensor<2>, scope: &Scope<'_>) -> Tensor<2> {
        let shape = [self.channels, 1];
        let scaled = base * scope.tensor(self.scale, shape);
        match self.shift {
            Some(shift) => scaled + scope.tensor(shift, shape),
            None => scaled,
        }
    }
}

/// A shift behind a linear layer that has no bias.
#[derive(Debug)]
struct Shifted {
    shift: ParameterId,
    channels: usize,
}

impl StateChange for Shifted {
    fn parameters(&self) -> Vec<ParameterId> {
        vec![self.shift]
    }

    fn apply(&self, y: Tensor<2>, _at: &SiteView<'_>, scope: &mut Scope<'_>) -> Tensor<2> {
        y + scope.tensor(self.shift, [1, self.channels])
    }
}
