//! `generate`.

use std::io::{Read, Write};
use std::ops::ControlFlow;

use retune_core::random::Seed;
use retune_data::template::Conversation;
use retune_evaluate::generate::{Generation, Prompt, generate as answer};
use retune_evaluate::sampling::Sampling;
use serde_json::json;

use super::session::Session;
use crate::args::ModelArguments;
use crate::environment::clock;
use crate::failure::Failure;

/// Returns how tokens are chosen, as the command line says.
pub(crate) fn sampling(model: &ModelArguments) -> Sampling {
    Sampling {
        temperature: model.temperature,
        top_k: model.top_k,
        top_p: model.top_p,
        ..Sampling::greedy()
    }
}

/// Continues a prompt.
pub(crate) fn generate(
    model: &ModelArguments,
    prompt: &str,
    raw: bool,
    json: bool,
) -> Result<(), Failure> {
    let mut text = prompt.to_owned();
    if prompt == "-" {
        text.clear();
        std::io::stdin()
            .read_to_string(&mut text)
            .map_err(|error| Failure::Failed(format!("standard input cannot be read: {error}")))?;
    }
    let session = Session::to_answer(model, json)?;
    let preparer = session.preparer()?;
    let tokenizer = preparer.tokenizer();
    let ids = if raw || preparer.template().is_none() {
        preparer.plain_prompt(&text)?
    } else {
        let mut messages = Vec::new();
        if let Some(system) = &model.system {
            messages.push(json!({"role": "system", "content": system}));
        }
        messages.push(json!({"role": "user", "content": text}));
        preparer.chat_prompt(&Conversation { messages, ..Conversation::default() })?.0
    };
    let options = Generation {
        sampling: sampling(model),
        end_tokens: preparer.end_tokens(),
        max_new_tokens: model.max_new_tokens,
        ..Generation::default()
    };
    let prompts = vec![Prompt::new(ids.clone(), Seed(model.seed), 0)];
    let started = clock();
    let mut shown = 0;
    let mut first = None;
    let answers = answer(&session.tuned(), prompts, &options, &mut |_, tokens| {
        first.get_or_insert_with(clock);
        if !json && let Ok(text) = tokenizer.decode(tokens, true) {
            shown = print_new(&text, shown);
        }
        ControlFlow::Continue(())
    })?;
    let Some(answer) = answers.first() else { return Ok(()) };
    let whole = tokenizer.decode(&answer.tokens, true)?;
    let first = first.unwrap_or(started);
    if json {
        let decode_s = clock() - first;
        let speed = (answer.tokens.len().saturating_sub(1)) as f64 / decode_s.max(1e-9);
        println!(
            "{}",
            json!({
                "text": whole, "tokens": answer.tokens, "prompt_tokens": ids.len(),
                "stop": format!("{:?}", answer.stop), "prefill_s": first - started,
                "decode_tokens_per_s": speed,
            })
        );
    } else {
        print_new(&whole, shown);
        println!();
    }
    Ok(())
}

/// Prints what of `text` was not shown yet; half a character waits for its other half.
pub(crate) fn print_new(text: &str, shown: usize) -> usize {
    let end = text.trim_end_matches('\u{fffd}').len();
    if let Some(new) = text.get(shown..end) {
        print!("{new}");
        let _ = std::io::stdout().flush();
        return end;
    }
    shown
}
