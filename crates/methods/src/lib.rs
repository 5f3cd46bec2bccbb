//! Tuning methods, one file each.
//!
//! A method knows no architecture: it looks at a model's [`ModelSpec`](retune_core::spec::ModelSpec)
//! and attaches changes at named places. Adding one is a file here and a line in [`registry`].

pub mod adalora;
pub mod adapter;
pub mod beft;
pub mod cartridge;
pub mod checks;
pub mod compressed;
pub mod cpt;
pub mod difference;
pub mod frame;
pub mod full;
pub mod hft;
pub mod hra;
pub mod ia3;
pub mod id3;
pub mod lily;
pub mod llama_adapter;
pub mod ln_tuning;
pub mod loha;
pub mod lokr;
pub mod lora;
pub mod lt_sft;
pub mod multitask_prompt_tuning;
pub mod p_tuning;
pub mod peft_config;
pub mod poly;
pub mod prefix_tuning;
pub mod prompt_tuning;
pub mod registry;
pub mod replacement;
pub mod road;
pub mod sara;
pub mod sparse;
pub mod spiel;
pub mod state;
