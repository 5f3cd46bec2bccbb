//! Prompt tuning: vectors before the input that train like words the model has yet to learn.

use retune_core::Result;
use retune_core::change::Changes;
use retune_core::method::{Card, Promises};
use retune_core::spec::ModelSpec;
use retune_options::options;
use serde_json::{Map, Value, json};

use crate::registry;
use crate::state::keys::Keys;
use crate::state::prompt::{self, Prompt};
use crate::state::{Form, Made, Needs, Slot, StateMethod};

options! {
    /// Trains vectors that stand before the words of every text.
    pub struct PromptTuning("prompt-tuning") {
        /// Number of virtual tokens.
        tokens: usize = 20, in 1..=4096, also "num_virtual_tokens";
        /// Ids of the tokens whose embeddings the prompt begins as, repeated as often as it takes;
        /// empty means tokens drawn from the vocabulary.
        init_tokens: Vec<usize> = Vec::new();
        /// Modules that train whole and are saved beside the prompt.
        modules_to_save: Vec<String> = Vec::new();
    }
}

crate::state_plugin!(PromptTuning);

impl StateMethod for PromptTuning {
    const CARD: Card = Card {
        name: "prompt-tuning",
        summary: "Trains vectors before the words of every text; the model stays frozen.",
        source: "Lester et al., The Power of Scale for Parameter-Efficient Prompt Tuning, 2021, arXiv 2104.08691",
        usual_learning_rates: (3e-3, 3e-1),
        options: registry::specs::<Self>,
    };
    const PEFT_TYPE: &'static str = "PROMPT_TUNING";
    const BESIDE: &'static str = prompt::BESIDE;

    fn needs(&self) -> Needs {
        Needs::Words
    }

    fn promises(&self) -> Promises {
        Promises { starts_at_base: false, ..Promises::default() }
    }

    fn examples() -> &'static [&'static str] {
        &["tokens = 3", "tokens = 3\ninit_tokens = [4, 5]"]
    }

    fn slots(&self, spec: &ModelSpec, _form: Form) -> Result<Vec<Slot>> {
        let setting = "method.prompt-tuning.init_tokens";
        Ok(vec![prompt::slot(spec, self.tokens, &self.init_tokens, setting)?])
    }

    fn build(&self, spec: &ModelSpec, _form: Form, made: &Made<'_>) -> Result<Changes> {
        let mut changes = Changes::default();
        let vectors = made.id(prompt::NAME);
        changes.change_input(Prompt { vectors, tokens: self.tokens, width: spec.width });
        Ok(changes)
    }

    fn modules_to_save(&self) -> &[String] {
        &self.modules_to_save
    }

    fn num_positions(&self) -> usize {
        self.tokens
    }

    fn write_config(&self, spec: &ModelSpec, config: &mut Map<String, Value>) {
        prompt::write_config(spec, self.tokens, config);
        config.insert("prompt_tuning_init".to_owned(), json!("RANDOM"));
    }

    fn read_config(keys: &Keys<'_>) -> Result<Self> {
        let modules_to_save = keys.modules_to_save()?;
        Ok(Self { tokens: prompt::read_tokens(keys)?, init_tokens: Vec::new(), modules_to_save })
    }
}
