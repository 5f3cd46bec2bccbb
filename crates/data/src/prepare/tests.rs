use super::*;
use crate::fixtures::{byte_level, byte_level_with_bos};
use crate::shape::LabelValue;
use crate::template::{CHATML, TemplateSettings};

fn preparer(template: Option<&str>, options: PrepareOptions) -> Preparer {
    let tokenizer = byte_level();
    let settings = TemplateSettings::of(&tokenizer, None);
    let template = template.map(|source| ChatTemplate::compile(source, settings).unwrap());
    Preparer::new(tokenizer, template, options).unwrap()
}

fn options(loss_on: LossOn) -> PrepareOptions {
    PrepareOptions { loss_on, ..PrepareOptions::default() }
}

fn chat() -> Example {
    Example::Chat(Chat {
        conversation: Conversation {
            messages: vec![
                json!({"role": "user", "content": "he"}),
                json!({"role": "assistant", "content": "hello"}),
                json!({"role": "user", "content": "1"}),
                json!({"role": "assistant", "content": "2"}),
            ],
            ..Conversation::default()
        },
        excluded: Vec::new(),
        plain: None,
    })
}

/// The row's text with what is learned in brackets.
fn shown(preparer: &Preparer, example: &Example) -> (String, Statistics) {
    let mut statistics = Statistics::default();
    let row = preparer.row(example, None, 1, &mut statistics).unwrap();
    let Some(row) = row else { return ("left out".into(), statistics) };
    let mut out = String::new();
    let mut before = false;
    for token in preparer.show(&row) {
        if token.learn != before {
            out.push(if token.learn { '[' } else { ']' });
            before = token.learn;
        }
        out.push_str(&token.text);
    }
    if before {
        out.push(']');
    }
    (out, statistics)
}

#[test]
fn masks_by_what_the_loss_is_on() {
    let masks = [LossOn::Assistant, LossOn::Completion, LossOn::All]
        .map(|loss_on| shown(&preparer(Some(CHATML), options(loss_on)), &chat()).0);
    insta::assert_snapshot!(masks.join("\n---\n"), @r"
    <|im_start|>user
    he<|im_end|>
    <|im_start|>assistant
    [hello<|im_end|>]
    <|im_start|>user
    1<|im_end|>
    <|im_start|>assistant
    [2<|im_end|>]

    ---
    <|im_start|>user
    he<|im_end|>
    <|im_start|>assistant
    hello<|im_end|>
    <|im_start|>user
    1<|im_end|>
    <|im_start|>assistant
    [2<|im_end|>]

    ---
    <|im_start|>[user
    he<|im_end|>
    <|im_start|>assistant
    hello<|im_end|>
    <|im_start|>user
    1<|im_end|>
    <|im_start|>assistant
    2<|im_end|>]
    ");
}

#[test]
fn excluded_messages_are_not_learned() {
    let Example::Chat(mut talk) = chat() else { panic!() };
    talk.excluded = vec![1];
    let preparer = preparer(Some(CHATML), PrepareOptions::default());
    let (text, statistics) = shown(&preparer, &Example::Chat(talk));
    assert!(text.contains("\nhello<|im_end|>\n") && text.contains("[2<|im_end|>]"), "{text}");
    assert_eq!(statistics.learned_tokens, 2);
}

#[test]
fn completions_with_and_without_a_template() {
    let example = Example::Completion { prompt: "1:".into(), completion: "hello".into() };
    let with = shown(&preparer(Some(CHATML), PrepareOptions::default()), &example).0;
    assert_eq!(with, "<|im_start|>user\n1:<|im_end|>\n<|im_start|>assistant\n[hello<|im_end|>]\n");
    let without = shown(&preparer(None, PrepareOptions::default()), &example).0;
    assert_eq!(without, "1:[hello<|im_end|>]");
    let all = shown(&preparer(None, options(LossOn::All)), &example).0;
    assert_eq!(all, "1[:hello<|im_end|>]");
}

#[test]
fn texts_are_learned_whole_and_end_once() {
    let preparer_of = |options| Preparer::new(byte_level_with_bos(), None, options).unwrap();
    let plain = preparer_of(PrepareOptions::default());
    for text in ["hello", "hello<|im_end|>"] {
        assert_eq!(shown(&plain, &Example::Text(text.into())).0, "<s>[hello<|im_end|>]");
    }
    let (text, statistics) = shown(&plain, &Example::Text("<s>hello".into()));
    assert_eq!((text.as_str(), statistics.double_bos), ("<s>[hello<|im_end|>]", 1));
    let open = preparer_of(PrepareOptions { end_texts: false, ..PrepareOptions::default() });
    assert_eq!(shown(&open, &Example::Text("hello".into())).0, "<s>[hello]");
}

// users-want 2.1.1
#[test]
fn a_row_with_nothing_to_learn_is_left_out_and_counted() {
    let preparer = preparer(Some(CHATML), PrepareOptions::default());
    let Example::Chat(mut talk) = chat() else { panic!() };
    talk.conversation.messages.truncate(1);
    let (text, statistics) = shown(&preparer, &Example::Chat(talk));
    assert_eq!((text.as_str(), statistics.rows_without_learned_token), ("left out", 1));
    assert_eq!(statistics.warnings(), ["1 row left out: no token of them would be learned"]);
}

#[test]
fn long_rows_are_cut_dropped_or_refused() {
    let text = Example::Text("hello hello 1234".into());
    // hello, Ġ, hello, Ġ, 1, 2, 3, 4, end.
    let with = |max_tokens, too_long| {
        preparer(None, PrepareOptions { max_tokens, too_long, ..PrepareOptions::default() })
    };
    let (shown_text, statistics) = shown(&with(4, TooLong::Cut), &text);
    assert_eq!(shown_text, "hello[ hello ]");
    assert_eq!(
        (statistics.rows_cut, statistics.tokens_cut, statistics.learned_tokens_cut),
        (1, 5, 5)
    );
    assert_eq!((statistics.longest, statistics.longest_uncut), (4, 9));
    assert_eq!(
        statistics.warnings(),
        ["1 row cut: 5 tokens lost, 5 of them to be learned (the longest row has 9 tokens)"]
    );
    let (shown_text, statistics) = shown(&with(8, TooLong::Drop), &text);
    assert_eq!((shown_text.as_str(), statistics.rows_too_long), ("left out", 1));
    let error = with(8, TooLong::Error).row(&text, None, 1, &mut Statistics::default());
    assert_eq!(
        error.unwrap_err().to_string(),
        "the row has 9 tokens, more than max_tokens = 8; raise max_tokens, shorten the row, or set \
         too_long = \"cut\" or \"drop\""
    );
    assert_eq!(shown(&with(9, TooLong::Error), &text).1.rows, 1);
}

#[test]
fn an_answer_behind_the_cut_leaves_nothing_to_learn() {
    let example = Example::Completion { prompt: "123456".into(), completion: "7".into() };
    let cut = PrepareOptions { max_tokens: 5, ..PrepareOptions::default() };
    let (text, statistics) = shown(&preparer(None, cut), &example);
    assert_eq!(text, "left out");
    assert_eq!((statistics.rows_without_learned_token, statistics.rows_cut_learned), (1, 1));
}

#[test]
fn conversations_need_a_template() {
    let preparer = preparer(None, PrepareOptions::default());
    let error = preparer.row(&chat(), None, 1, &mut Statistics::default()).unwrap_err();
    assert!(error.to_string().contains("the model has no chat template"), "{error}");
}

#[test]
fn labelled_rows_carry_labels_and_no_mask() {
    let preparer = preparer(None, PrepareOptions { max_tokens: 3, ..PrepareOptions::default() });
    let labels = Labels::Classes(vec!["a".into(), "b".into()]);
    let example = |second: Option<&str>| Example::Labelled {
        text: "hello1".into(),
        second: second.map(ToOwned::to_owned),
        label: LabelValue::Name("b".into()),
    };
    let mut statistics = Statistics::default();
    let row = preparer.row(&example(None), Some(&labels), 7, &mut statistics).unwrap().unwrap();
    assert_eq!((row.label, row.ids.len(), row.token_types), (Some(Label::Class(1)), 2, None));
    assert_eq!((row.learn, row.source_line), (vec![false; 2], 7));
    let row =
        preparer.row(&example(Some("1234")), Some(&labels), 8, &mut statistics).unwrap().unwrap();
    assert_eq!(row.ids.len(), 3);
    assert_eq!((statistics.rows_cut, statistics.tokens_cut), (1, 3));
    assert!(preparer.row(&example(None), None, 1, &mut statistics).is_err());
}

#[test]
fn settings_that_leave_nothing_are_refused() {
    let options = PrepareOptions { max_tokens: 1, ..PrepareOptions::default() };
    assert!(Preparer::new(byte_level(), None, options).is_err());
}

#[test]
fn the_sides_of_an_encoder_decoder_are_parted_by_its_start_token() {
    let example = Example::Completion { prompt: "3456789".into(), completion: "12".into() };
    let start = byte_level().encode("0", false).unwrap().ids[0];
    let of = |max_tokens| {
        let options =
            PrepareOptions { decoder_start: Some(start), max_tokens, ..PrepareOptions::default() };
        shown(&preparer(None, options), &example)
    };
    let end = byte_level().special().eos.map(|id| byte_level().token_text(id)).unwrap();
    assert_eq!(of(64).0, format!("3456789{end}0[12{end}]"));
    // Of the 6 tokens beside the start token the target keeps its 3; the source keeps its end.
    let (cut, statistics) = of(7);
    assert_eq!(cut, format!("34{end}0[12{end}]"));
    assert_eq!((statistics.rows_cut, statistics.learned_tokens_cut), (1, 0));

    let options = PrepareOptions { decoder_start: Some(start), ..PrepareOptions::default() };
    let preparer = preparer(None, options);
    let question = preparer.question(&example).unwrap().unwrap();
    let row = preparer.row(&example, None, 1, &mut Statistics::default()).unwrap().unwrap();
    assert!(row.ids.starts_with(&question.prompt), "trained and asked alike");
    assert!(row.learn[..question.prompt.len()].iter().all(|learn| !learn));
    let text = Example::Text("hello".into());
    let refused = preparer.row(&text, None, 1, &mut Statistics::default()).unwrap_err();
    assert!(refused.to_string().contains("prompt and completion"), "{refused}");
}
