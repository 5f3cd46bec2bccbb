//! `chat`.

use std::ops::ControlFlow;

use retune_core::random::Seed;
use retune_data::template::Conversation;
use retune_evaluate::generate::{Dialogue, Generation, Prompt};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use serde_json::json;

use super::generate::{print_new, sampling};
use super::session::Session;
use crate::args::ModelArguments;
use crate::failure::Failure;

/// Talks with a model until the input ends.
pub(crate) fn chat(model: &ModelArguments, json: bool) -> Result<(), Failure> {
    let session = Session::to_answer(model, json)?;
    let preparer = session.preparer()?;
    let tokenizer = preparer.tokenizer();
    if preparer.template().is_none() {
        return Err(Failure::Failed(
            "the model has no chat template\n  help: use `retune generate --raw`".to_owned(),
        ));
    }
    let options = Generation {
        sampling: sampling(model),
        end_tokens: preparer.end_tokens(),
        max_new_tokens: model.max_new_tokens,
        ..Generation::default()
    };
    let failed = |error: ReadlineError| Failure::Failed(format!("input cannot be read: {error}"));
    let mut editor = DefaultEditor::new().map_err(failed)?;
    let mut messages = Vec::new();
    if let Some(system) = &model.system {
        messages.push(json!({"role": "system", "content": system}));
    }
    if !json {
        eprintln!("/new begins anew, /quit or Ctrl-D ends");
    }
    let mut dialogue = Dialogue::default();
    for turn in 0.. {
        let line = match editor.readline("> ") {
            Ok(line) => line,
            Err(ReadlineError::Eof | ReadlineError::Interrupted) => return Ok(()),
            Err(error) => return Err(failed(error)),
        };
        match line.trim() {
            "" => continue,
            "/quit" => return Ok(()),
            "/new" => {
                messages.retain(|message| message["role"] == "system");
                dialogue.forget();
                continue;
            }
            text => messages.push(json!({"role": "user", "content": text})),
        }
        let _ = editor.add_history_entry(&line);
        let talk = Conversation { messages: messages.clone(), ..Conversation::default() };
        let (ids, _) = preparer.chat_prompt(&talk)?;
        let prompt = Prompt::new(ids, Seed(model.seed), turn);
        let mut shown = 0;
        let answer = dialogue.reply(&session.tuned(), prompt, &options, &mut |_, tokens| {
            if !json && let Ok(text) = tokenizer.decode(tokens, true) {
                shown = print_new(&text, shown);
            }
            ControlFlow::Continue(())
        })?;
        let text = tokenizer.decode(&answer.tokens, true)?;
        if json {
            println!("{}", json!({"role": "assistant", "content": text}));
        } else {
            print_new(&text, shown);
            println!();
        }
        messages.push(json!({"role": "assistant", "content": text}));
    }
    Ok(())
}
