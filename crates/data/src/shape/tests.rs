use serde_json::json;

use super::*;

fn row(line: usize, fields: Value) -> Row {
    let Value::Object(fields) = fields else { panic!("an object") };
    Row { fields, line }
}

fn shaper(rows: &[Value], options: &ShapeOptions) -> Result<Shaper, String> {
    let rows: Vec<Row> = rows.iter().enumerate().map(|(i, v)| row(i + 1, v.clone())).collect();
    Shaper::detect(Path::new("d.jsonl"), &rows, options).map_err(|e| e.to_string())
}

fn detected(fields: Value) -> (String, Example) {
    let shaper = shaper(std::slice::from_ref(&fields), &ShapeOptions::default()).unwrap();
    let example = shaper.example(&row(1, fields)).unwrap();
    (shaper.statement().to_owned(), example)
}

fn chat(example: Example) -> Chat {
    match example {
        Example::Chat(chat) => chat,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_shape_is_detected_and_stated() {
    let turn = json!({"role": "user", "content": "x"});
    let statements: Vec<String> = [
        json!({"messages": [turn], "id": 3}),
        json!({"conversations": [turn]}),
        json!({"conversations": [{"from": "human", "value": "x"}]}),
        json!({"instruction": "i", "input": "", "output": "o"}),
        json!({"prompt": "p", "completion": "c"}),
        json!({"question": "p", "answer": "c"}),
        json!({"sentence1": "a", "sentence2": "b", "label": 1}),
        json!({"text": "a", "label": "good"}),
        json!({"sentence": "a", "label": 0.5}),
        json!({"text": "a", "label": null}),
    ]
    .into_iter()
    .map(|fields| detected(fields).0)
    .collect();
    insta::assert_snapshot!(statements.join("\n"), @r"
    shape messages (detected): `messages`
    shape messages (detected): messages from `conversations`
    shape sharegpt (detected): `conversations`
    shape alpaca (detected): `instruction`, `output`
    shape prompt-completion (detected): `prompt`, `completion`
    shape prompt-completion (detected): prompt from `question`, completion from `answer`
    shape text-pair-label (detected): text1 from `sentence1`, text2 from `sentence2`, `label`
    shape text-label (detected): `text`, `label`
    shape text-label (detected): text from `sentence`, `label`
    shape text (detected): `text`
    ");
}

#[test]
fn openai_messages_are_normalised() {
    let (_, example) = detected(json!({
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
            {"role": "tool", "content": "7", "tool_call_id": "1"},
            {"role": "assistant", "content": "no", "weight": 0},
            {"role": "assistant", "content": "yes", "weight": 1},
        ],
        "tools": "[{\"name\": \"f\"}]",
    }));
    let chat = chat(example);
    let messages = &chat.conversation.messages;
    assert_eq!(messages[0]["content"], "ab");
    assert_eq!(messages[1]["content"], "");
    assert_eq!(messages[1]["tool_calls"][0]["function"]["arguments"], json!({"x": 1}));
    assert_eq!(chat.excluded, [3]);
    assert_eq!(chat.conversation.tools, Some(json!([{"name": "f"}])));
}

#[test]
fn sharegpt_becomes_messages() {
    let (_, example) = detected(json!({
        "system": "S", "tools": "",
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"x\": 1}}"},
            {"from": "observation", "value": "7"},
            {"from": "gpt", "value": "a"},
        ],
    }));
    let chat = chat(example);
    assert_eq!(
        Value::Array(chat.conversation.messages),
        json!([
            {"role": "system", "content": "S"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "",
             "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
            {"role": "tool", "content": "7"},
            {"role": "assistant", "content": "a"},
        ])
    );
    assert_eq!(chat.conversation.tools, None);
}

#[test]
fn alpaca_joins_instruction_and_input_and_learns_history() {
    let (_, example) = detected(json!({
        "instruction": "Add", "input": "1 2", "output": "3", "system": "S",
        "history": [["q", "a"]],
    }));
    let chat = chat(example);
    assert_eq!(
        Value::Array(chat.conversation.messages),
        json!([
            {"role": "system", "content": "S"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "Add\n1 2"},
            {"role": "assistant", "content": "3"},
        ])
    );
    assert!(chat.excluded.is_empty());
    assert_eq!(chat.plain, Some(("S\nq\na\nAdd\n1 2\n".into(), "3".into())));
}

#[test]
fn prompts_and_completions_as_text_and_as_messages() {
    let (_, example) = detected(json!({"prompt": "p", "completion": 7}));
    assert_eq!(example, Example::Completion { prompt: "p".into(), completion: "7".into() });
    let (_, example) = detected(json!({
        "prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "w"},
                   {"role": "user", "content": "r"}],
        "completion": [{"role": "assistant", "content": "a"}],
    }));
    let chat = chat(example);
    assert_eq!(chat.conversation.messages.len(), 4);
    assert_eq!(chat.excluded, [0, 1, 2]);
}

#[test]
fn labels_are_classes_or_scores() {
    for (written, expected) in [
        (json!(1), LabelValue::Index(1)),
        (json!("1"), LabelValue::Index(1)),
        (json!("good"), LabelValue::Name("good".into())),
        (json!(true), LabelValue::Index(1)),
        (json!(2.5), LabelValue::Score(2.5)),
        (json!("2.5"), LabelValue::Score(2.5)),
        (json!("v2.5"), LabelValue::Name("v2.5".into())),
    ] {
        let (_, example) = detected(json!({"text": "t", "label": written}));
        let Example::Labelled { label, .. } = example else { panic!("{example:?}") };
        assert_eq!(label, expected);
    }
    for bad in [json!(-1), json!(""), json!([1]), json!(5_000_000_000u64)] {
        assert!(label(&bad).is_err(), "{bad}");
    }
}

#[test]
fn columns_and_a_prompt_template_name_other_fields() {
    let columns = |pairs: &[(&str, &str)]| {
        pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
    };
    let fields = json!({"frage": "1+1?", "antwort": "2", "fach": "Rechnen"});
    let options = ShapeOptions {
        columns: columns(&[("prompt", "frage"), ("completion", "antwort")]),
        ..ShapeOptions::default()
    };
    let mapped = shaper(std::slice::from_ref(&fields), &options).unwrap();
    assert_eq!(
        mapped.statement(),
        "shape prompt-completion (set): prompt from `frage`, completion from `antwort`"
    );
    let options = ShapeOptions {
        columns: columns(&[("completion", "antwort")]),
        prompt_template: Some("{fach}: {frage} {{x}}\n".into()),
        ..ShapeOptions::default()
    };
    let templated = shaper(std::slice::from_ref(&fields), &options).unwrap();
    assert_eq!(
        templated.statement(),
        "shape prompt-completion (set): prompt from `fach`, `frage`, completion from `antwort`"
    );
    assert_eq!(
        templated.example(&row(1, fields)).unwrap(),
        Example::Completion { prompt: "Rechnen: 1+1? {x}\n".into(), completion: "2".into() }
    );
}

#[test]
fn a_set_shape_is_not_overruled_by_names() {
    let options = ShapeOptions { shape: Some(Shape::Text), ..ShapeOptions::default() };
    let fields = json!({"text": "t", "label": 1});
    let shaper = shaper(std::slice::from_ref(&fields), &options).unwrap();
    assert_eq!(shaper.example(&row(1, fields)).unwrap(), Example::Text("t".into()));
}

#[test]
fn mixtures_and_unknown_shapes_are_named() {
    let fails = |rows: &[Value], options: &ShapeOptions| shaper(rows, options).unwrap_err();
    let none = ShapeOptions::default();
    let options = |columns: &[(&str, &str)], template: Option<&str>| ShapeOptions {
        columns: columns.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect(),
        prompt_template: template.map(ToOwned::to_owned),
        ..ShapeOptions::default()
    };
    let text = json!({"text": "a"});
    let messages = [
        fails(&[text.clone(), json!({"messages": []})], &none),
        fails(&[json!({"foo": 1, "bar": 2})], &none),
        fails(std::slice::from_ref(&text), &options(&[("promt", "text")], None)),
        fails(std::slice::from_ref(&text), &options(&[("text", "body")], None)),
        fails(std::slice::from_ref(&text), &options(&[("completion", "text")], Some("{x}"))),
        fails(std::slice::from_ref(&text), &options(&[], Some("{text} {x"))),
        fails(std::slice::from_ref(&text), &options(&[], Some("no field"))),
        fails(std::slice::from_ref(&text), &options(&[], Some("a}"))),
    ];
    insta::assert_snapshot!(messages.join("\n"));
}

#[test]
fn rows_that_break_their_shape_are_errors() {
    let fails = |fields: Value| {
        let shaper = shaper(std::slice::from_ref(&fields), &ShapeOptions::default()).unwrap();
        shaper.example(&row(1, fields)).unwrap_err().to_string()
    };
    let turn = |message: Value| json!({"messages": [message]});
    let messages = [
        fails(json!({"messages": []})),
        fails(json!({"messages": "hi"})),
        fails(json!({"messages": ["hi"]})),
        fails(turn(json!({"content": "x"}))),
        fails(turn(json!({"role": "user"}))),
        fails(turn(json!({"role": "user", "content": 7}))),
        fails(turn(json!({"role": "user", "content": [{"type": "image", "url": "x"}]}))),
        fails(turn(json!({"role": "assistant", "content": "x", "weight": 2}))),
        fails(json!({"conversations": [{"from": "alien", "value": "x"}]})),
        fails(json!({"conversations": [{"from": "human"}]})),
        fails(json!({"instruction": "i", "output": "o", "history": [["a"]]})),
        fails(json!({"text": 5})),
        fails(json!({"text": "a", "label": {}})),
        fails(json!({"messages": [{"role": "user", "content": "x"}], "tools": "nonsense"})),
    ];
    insta::assert_snapshot!(messages.join("\n"));
}
