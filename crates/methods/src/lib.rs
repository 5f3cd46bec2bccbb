//! Tuning methods, one file each.
//!
//! A method knows no architecture: it looks at a model's [`ModelSpec`](retune_core::spec::ModelSpec)
//! and attaches changes at named places. Adding one is a file here and a line in [`registry`].

pub mod adalora;
pub mod adapter;
pub mod beft;
pub mod boft;
pub mod c3a;
pub mod cartridge;
pub mod checks;
pub mod compressed;
pub mod cpt;
pub mod deft;
pub mod delora;
pub mod difference;
pub mod fourierft;
pub mod frame;
pub mod full;
pub mod glora;
pub mod gralora;
pub mod hira;
pub mod hra;
pub mod ia3;
pub mod lily;
pub mod linear_algebra;
pub mod llama_adapter;
pub mod ln_tuning;
pub mod loha;
pub mod lokr;
pub mod lora;
pub mod miss;
pub mod multitask_prompt_tuning;
pub mod oft;
pub mod p_tuning;
pub mod peanut;
pub mod peft_config;
pub mod poly;
pub mod prefix_tuning;
pub mod prompt_tuning;
pub mod pvera;
pub mod randlora;
pub mod registry;
pub mod replacement;
pub mod road;
pub mod shira;
pub mod state;
pub mod supertuning;
pub mod torch;
pub mod trainable_tokens;
pub mod vblora;
pub mod vera;
pub mod waveft;
