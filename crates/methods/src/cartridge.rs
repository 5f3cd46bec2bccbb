//! Cartridges: a prefix that stands for a long text, its first rows held fixed.

use retune_core::change::Changes;
use retune_core::method::{Card, Promises};
use retune_core::parameters::Parameters;
use retune_core::spec::ModelSpec;
use retune_core::{Error, Result};
use retune_options::options;
use serde_json::{Map, Value, json};

use crate::prefix_tuning::{Prefix, key_width, write_config};
use crate::registry;
use crate::state::keys::Keys;
use crate::state::{FileTensors, Form, Made, Needs, Slot, Start, StateMethod, prompt};

options! {
    /// Trains keys and values that stand before those of every text, the first of them fixed.
    pub struct Cartridge("cartridge") {
        /// Number of keys and values per layer.
        tokens: usize = 128, in 1..=65536, also "num_virtual_tokens";
        /// How many of them, from the first, do not train: attention rests on them.
        frozen_tokens: usize = 1, in 0..=65535, also "num_frozen_tokens";
    }
}

crate::state_plugin!(Cartridge);

const FROZEN: &str = "cartridge.frozen";
const TRAINED: &str = "cartridge.trained";

impl StateMethod for Cartridge {
    const CARD: Card = Card {
        name: "cartridge",
        summary: "Trains keys and values that stand for a long text, the first of them fixed.",
        source: "Eyuboglu et al., Cartridges: Lightweight and general-purpose long context representations via self-study, 2025, arXiv 2506.06266",
        usual_learning_rates: (1e-3, 5e-2),
        options: registry::specs::<Self>,
    };
    const PEFT_TYPE: &'static str = "CARTRIDGE";
    const BESIDE: &'static str = prompt::BESIDE;

    fn promises(&self) -> Promises {
        Promises { starts_at_base: false, ..Promises::default() }
    }

    fn needs(&self) -> Needs {
        Needs::OneText
    }

    fn examples() -> &'static [&'static str] {
        &["tokens = 4", "tokens = 4\nfrozen_tokens = 0"]
    }

    fn slots(&self, spec: &ModelSpec, form: Form) -> Result<Vec<Slot>> {
        if self.frozen_tokens >= self.tokens {
            return Err(Error::Setting {
                setting: "method.cartridge.frozen_tokens".to_owned(),
                what: "nothing is left to train".to_owned(),
                expected: format!("below the {} tokens", self.tokens),
                found: self.frozen_tokens.to_string(),
                help: "freeze fewer".to_owned(),
            });
        }
        let side = 2 * spec.num_layers * key_width(spec);
        let slot =
            |name, count: usize| Slot::new(name, [count, side], "attention", Start::Normal(0.02));
        if form == Form::Saved {
            return Ok(vec![slot(prompt::NAME, self.tokens)]);
        }
        let trained = slot(TRAINED, self.tokens - self.frozen_tokens);
        Ok(match self.frozen_tokens {
            0 => vec![trained],
            count => vec![slot(FROZEN, count).frozen(), trained],
        })
    }

    fn build(&self, spec: &ModelSpec, form: Form, made: &Made<'_>) -> Result<Changes> {
        let mut changes = Changes::default();
        let slots = self.slots(spec, form)?;
        for layer in 0..spec.num_layers {
            changes.change_attention(
                layer,
                Prefix {
                    parts: slots.iter().map(|slot| made.id(&slot.name)).collect(),
                    counts: slots.iter().map(|slot| slot.shape[0]).collect(),
                    place: layer,
                    num_places: spec.num_layers,
                    width: key_width(spec),
                },
            );
        }
        Ok(changes)
    }

    fn num_positions(&self) -> usize {
        self.tokens
    }

    fn fold(&self, _parameters: &Parameters, tensors: &mut FileTensors) {
        let frozen = tensors.remove(FROZEN);
        let Some((mut shape, trained)) = tensors.remove(TRAINED) else { return };
        shape[0] = self.tokens;
        let mut values = frozen.map(|(_, values)| values).unwrap_or_default();
        values.extend(trained);
        tensors.insert(prompt::NAME.to_owned(), (shape, values));
    }

    fn write_config(&self, spec: &ModelSpec, config: &mut Map<String, Value>) {
        write_config(spec, self.tokens, config);
        config.insert("num_frozen_tokens".to_owned(), json!(self.frozen_tokens));
    }

    fn read_config(keys: &Keys<'_>) -> Result<Self> {
        let tokens = prompt::read_tokens(keys)?;
        // Only training asks how many are fixed.
        Ok(Self { tokens, frozen_tokens: 0 })
    }
}
