//! Using a model as it was trained: prompts whose tokens are those before the answer in training.

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::prepare::Preparer;
use crate::shape::{Chat, Example};
use crate::statistics::Statistics;
use crate::template::Conversation;

/// A held-out row as a question: what the model is given and what it should answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Tokens to continue.
    pub prompt: Vec<u32>,
    /// The prompt as text, special tokens included.
    pub text: String,
    /// The answer the row holds.
    pub answer: String,
}

impl Preparer {
    /// Turns an example into a question: everything before the last answer is given. `None` for
    /// examples that hold no answer (running text, labels, a last answer that is a tool call).
    ///
    /// # Errors
    /// [`Error::Template`] when the template refuses the conversation; [`Error::Tokenizer`].
    pub fn question(&self, example: &Example) -> Result<Option<Question>> {
        match (example, self.template().is_some()) {
            (Example::Chat(chat), true) => self.chat_question(&chat.conversation),
            (Example::Completion { prompt, completion }, true) => {
                let messages = vec![
                    json!({"role": "user", "content": prompt}),
                    json!({"role": "assistant", "content": completion}),
                ];
                self.chat_question(&Conversation { messages, ..Conversation::default() })
            }
            (
                Example::Completion { prompt, completion }
                | Example::Chat(Chat { plain: Some((prompt, completion)), .. }),
                false,
            ) => Ok(Some(Question {
                prompt: self.plain_prompt(prompt)?,
                text: prompt.clone(),
                answer: completion.clone(),
            })),
            _ => Ok(None),
        }
    }

    /// Encodes a text that the model is to continue or, with two sides, to answer.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn plain_prompt(&self, text: &str) -> Result<Vec<u32>> {
        match self.options().decoder_start {
            Some(start) => self.source(text, start),
            None => self.tokenizer().encode_open(text, true),
        }
    }

    /// Encodes a conversation up to where the model speaks next.
    ///
    /// # Errors
    /// [`Error::Example`] if there is no chat template; [`Error::Template`] when it refuses the
    /// conversation.
    pub fn chat_prompt(&self, conversation: &Conversation) -> Result<(Vec<u32>, String)> {
        let Some(template) = self.template() else {
            return Err(Error::example(
                "the model has no chat template",
                "set one (template = \"chatml\", or a Jinja file), or give a plain prompt",
            ));
        };
        let text = template.render(conversation, true)?;
        Ok((self.tokenizer().encode_open(&text, false)?, text))
    }

    fn chat_question(&self, conversation: &Conversation) -> Result<Option<Question>> {
        let role = |m: &Value| m.get("role").and_then(Value::as_str) == Some("assistant");
        let Some(last) = conversation.messages.iter().rposition(role) else { return Ok(None) };
        let content = conversation.messages[last].get("content").and_then(Value::as_str);
        let Some(answer) = content.filter(|text| !text.is_empty()) else { return Ok(None) };
        let messages = conversation.messages[..last].to_vec();
        let (prompt, text) =
            self.chat_prompt(&Conversation { messages, ..conversation.clone() })?;
        Ok(Some(Question { prompt, text, answer: answer.to_owned() }))
    }

    /// The tokens at which generation stops: the tokenizer's end token, and the one that ends the
    /// assistant's turn in the chat template where that is another.
    pub fn end_tokens(&self) -> Vec<u32> {
        let mut ends: Vec<u32> = self.tokenizer().special().eos.into_iter().collect();
        let example = Example::Completion { prompt: "a".to_owned(), completion: "b".to_owned() };
        // A template that refuses this conversation teaches no further end token.
        if let Ok(Some(row)) = self.row(&example, None, 0, &mut Statistics::default())
            && let Some(at) = row.learn.iter().rposition(|learn| *learn)
            && self.tokenizer().is_special(row.ids[at])
            && !ends.contains(&row.ids[at])
        {
            ends.push(row.ids[at]);
        }
        ends
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{byte_level, byte_level_metadata, byte_level_with_bos};
    use crate::prepare::PrepareOptions;
    use crate::template::{CHATML, ChatTemplate, TemplateSettings};
    use crate::tokenizer::Tokenizer;

    fn preparer(tokenizer: Tokenizer, template: Option<&str>) -> Preparer {
        let settings = TemplateSettings::of(&tokenizer, None);
        let template = template.map(|t| ChatTemplate::compile(t, settings).unwrap());
        Preparer::new(tokenizer, template, PrepareOptions::default()).unwrap()
    }

    #[test]
    fn the_prompt_is_what_stands_before_the_answer_in_training() {
        let example = Example::Completion { prompt: "he".into(), completion: "hello".into() };
        for (tokenizer, template) in
            [(byte_level(), Some(CHATML)), (byte_level_with_bos(), None), (byte_level(), None)]
        {
            let preparer = preparer(tokenizer, template);
            let question = preparer.question(&example).unwrap().unwrap();
            let row = preparer.row(&example, None, 1, &mut Statistics::default()).unwrap().unwrap();
            let first = row.learn.iter().position(|learn| *learn).unwrap();
            assert_eq!(question.prompt, row.ids[..first]);
            assert_eq!(question.answer, "hello");
        }
    }

    #[test]
    fn the_last_answer_of_a_conversation_is_asked_for() {
        let turn = |role: &str, content: &str| json!({"role": role, "content": content});
        let mut chat = Chat {
            conversation: Conversation {
                messages: vec![
                    turn("user", "1"),
                    turn("assistant", "2"),
                    turn("user", "3"),
                    turn("assistant", "4"),
                    turn("user", "5"),
                ],
                ..Conversation::default()
            },
            excluded: Vec::new(),
            plain: None,
        };
        let preparer = preparer(byte_level(), Some(CHATML));
        let question = preparer.question(&Example::Chat(chat.clone())).unwrap().unwrap();
        assert_eq!(question.answer, "4");
        assert!(
            question.text.ends_with("3<|im_end|>\n<|im_start|>assistant\n"),
            "{}",
            question.text
        );
        chat.conversation.messages.truncate(1);
        assert_eq!(preparer.question(&Example::Chat(chat)).unwrap(), None);
        assert_eq!(preparer.question(&Example::Text("x".into())).unwrap(), None);
    }

    #[test]
    fn generation_stops_at_the_end_token_and_at_the_end_of_a_turn() {
        let mut metadata = byte_level_metadata();
        metadata.eos = Some(0);
        metadata.bos = None;
        let tokenizer = Tokenizer::from_gguf(metadata, "x").unwrap();
        assert_eq!(preparer(tokenizer.clone(), Some(CHATML)).end_tokens(), [0, 2]);
        assert_eq!(preparer(tokenizer, None).end_tokens(), [0]);
        assert_eq!(preparer(byte_level(), Some(CHATML)).end_tokens(), [2]);
    }

    #[test]
    fn one_bos_in_prompts() {
        let tokenizer = byte_level_with_bos();
        assert_eq!(tokenizer.encode_open("<s>he", true).unwrap(), [0, 260]);
        assert_eq!(tokenizer.encode_open("<s>he", false).unwrap(), [0, 260]);
        assert_eq!(tokenizer.encode_open("he", true).unwrap(), [0, 260]);
    }
}
