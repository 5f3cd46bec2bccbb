use serde_json::json;

use super::*;

/// The test conversation: system, two exchanges.
fn talk() -> Conversation {
    Conversation {
        messages: vec![
            json!({"role": "system", "content": "Be brief."}),
            json!({"role": "user", "content": "Hi"}),
            json!({"role": "assistant", "content": "Hello."}),
            json!({"role": "user", "content": "2+2?"}),
            json!({"role": "assistant", "content": "4"}),
        ],
        ..Conversation::default()
    }
}

fn compile(source: &str) -> ChatTemplate {
    let settings = TemplateSettings {
        bos_token: Some("<s>".into()),
        eos_token: Some("</s>".into()),
        date: Date::new(2024, 7, 26),
        ..TemplateSettings::default()
    };
    ChatTemplate::compile(source, settings).unwrap()
}

fn learned(source: &str, talk: &Conversation) -> (String, Vec<String>) {
    let rendered = compile(source).render_with_spans(talk).unwrap();
    let spans = rendered.spans.iter().map(|s| rendered.text[s.bytes.clone()].to_owned()).collect();
    (rendered.text, spans)
}

/// Llama 3's format: headers, trimmed content, a date in the system turn.
const LLAMA3: &str = "{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Today Date: ' + strftime_now('%d %b %Y') + '\\n\\n' }}
{{- system_message + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}";

/// Gemma's format: no system turn, `model` for the assistant, alternation enforced.
const GEMMA: &str = "{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}";

/// Mistral's format: no header before an answer, so no generation prompt either.
const MISTRAL: &str = "{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}";

/// Qwen3's way: reasoning of earlier turns is dropped, the last turn keeps its own.
const THINKING: &str = "{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role != 'assistant' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
        {%- continue %}
    {%- endif %}
    {%- set content = message.content %}
    {%- set reasoning = '' %}
    {%- if '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if loop.index0 > ns.last %}
        {{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";

#[test]
fn chatml_marks_content_and_end_token() {
    let (text, spans) = learned(CHATML, &talk());
    insta::assert_snapshot!(text, @r"
    <|im_start|>system
    Be brief.<|im_end|>
    <|im_start|>user
    Hi<|im_end|>
    <|im_start|>assistant
    Hello.<|im_end|>
    <|im_start|>user
    2+2?<|im_end|>
    <|im_start|>assistant
    4<|im_end|>
    ");
    assert_eq!(spans, ["Hello.<|im_end|>", "4<|im_end|>"]);
    let prompt = compile(CHATML).render(&Conversation::default(), true).unwrap();
    assert_eq!(prompt, "<|im_start|>assistant\n");
}

#[test]
fn marks_and_prefixes_find_the_same_content() {
    let unmarked = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "");
    let (text, spans) = learned(&unmarked, &talk());
    assert_eq!(text, learned(CHATML, &talk()).0);
    assert_eq!(spans, ["Hello.<|im_end|>\n", "4<|im_end|>\n"]);
}

#[test]
fn llama3_style() {
    let (text, spans) = learned(LLAMA3, &talk());
    insta::assert_snapshot!(text, @r"
    <s><|start_header_id|>system<|end_header_id|>

    Today Date: 26 Jul 2024

    Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>

    Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>

    Hello.<|eot_id|><|start_header_id|>user<|end_header_id|>

    2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

    4<|eot_id|>
    ");
    assert_eq!(spans, ["Hello.<|eot_id|>", "4<|eot_id|>"]);
}

#[test]
fn gemma_style_refuses_a_system_turn_in_its_own_words() {
    let mut talk = talk();
    let error = compile(GEMMA).render(&talk, false).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the chat template refused the conversation: System role not supported; change the row \
         so that the template accepts it (order and names of roles are what templates check most)"
    );
    talk.messages.remove(0);
    let (text, spans) = learned(GEMMA, &talk);
    insta::assert_snapshot!(text, @r"
    <s><start_of_turn>user
    Hi<end_of_turn>
    <start_of_turn>model
    Hello.<end_of_turn>
    <start_of_turn>user
    2+2?<end_of_turn>
    <start_of_turn>model
    4<end_of_turn>
    ");
    assert_eq!(spans, ["Hello.<end_of_turn>\n", "4<end_of_turn>\n"]);
}

#[test]
fn mistral_style_has_no_generation_prompt() {
    let mut talk = talk();
    talk.messages.remove(0);
    // The content stands in the template's own text too: the first match would be wrong.
    talk.messages[1] = json!({"role": "assistant", "content": "INST"});
    let (text, spans) = learned(MISTRAL, &talk);
    assert_eq!(text, "<s>[INST] Hi [/INST] INST</s>[INST] 2+2? [/INST] 4</s>");
    assert_eq!(spans, ["INST</s>", "4</s>"]);
}

#[test]
fn reasoning_dropped_from_earlier_turns_does_not_move_spans() {
    let talk = Conversation {
        messages: vec![
            json!({"role": "user", "content": "Hi"}),
            json!({"role": "assistant", "content": "<think>\nGreet.\n</think>\n\nHello."}),
            json!({"role": "user", "content": "2+2?"}),
            json!({"role": "assistant", "content": "<think>\nSum.\n</think>\n\n4"}),
        ],
        ..Conversation::default()
    };
    let (text, spans) = learned(THINKING, &talk);
    insta::assert_snapshot!(text, @r"
    <|im_start|>user
    Hi<|im_end|>
    <|im_start|>assistant
    Hello.<|im_end|>
    <|im_start|>user
    2+2?<|im_end|>
    <|im_start|>assistant
    <think>
    Sum.
    </think>

    4<|im_end|>
    ");
    // The cut conversation still shows the reasoning, so only the content is found; the mask adds
    // the end token that follows it.
    assert_eq!(spans, ["Hello.", "<think>\nSum.\n</think>\n\n4<|im_end|>\n"]);
}

#[test]
fn end_token_on_the_last_turn_only() {
    let source = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}\
                  {% if loop.last %}{{ eos_token }}{% endif %}{% endfor %}\
                  {% if add_generation_prompt %}[assistant]{% endif %}";
    let (text, spans) = learned(source, &talk());
    assert_eq!(text, "[system]Be brief.[user]Hi[assistant]Hello.[user]2+2?[assistant]4</s>");
    assert_eq!(spans, ["Hello.", "4</s>"]);
}

#[test]
fn generation_marks_that_do_not_match_the_turns_are_an_error() {
    let source =
        "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}";
    let error = compile(source).render_with_spans(&talk()).unwrap_err();
    assert!(error.to_string().contains("1 generation blocks for 2 assistant messages"), "{error}");
}

#[test]
fn tools_are_written_as_python_writes_json() {
    let talk = Conversation {
        messages: vec![json!({"role": "user", "content": "Weather?"})],
        tools: Some(json!([{"type": "function", "function": {"name": "get_weather",
            "parameters": {"type": "object", "required": ["city"], "x": "<é>"}}}])),
        documents: None,
    };
    let source = "{%- if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}\n\
                  {{ tools[0].function.parameters | tojson(indent=2) }}{% endif %}";
    assert_eq!(
        compile(source).render(&talk, false).unwrap(),
        "{\"type\": \"function\", \"function\": {\"name\": \"get_weather\", \"parameters\": \
         {\"type\": \"object\", \"required\": [\"city\"], \"x\": \"<é>\"}}}{\n  \"type\": \
         \"object\",\n  \"required\": [\n    \"city\"\n  ],\n  \"x\": \"<é>\"\n}"
    );
}

/// Each expectation is what transformers 5.23 (Jinja2 3.1.6) prints for the same template.
#[test]
fn values_and_methods_behave_as_in_python() {
    for (source, expected) in [
        ("{{ none }}|{{ true }}|{{ 1.0 }}|{{ 2 }}|{{ undefined_name }}", "None|True|1.0|2|"),
        ("{{ 'a,b'.split(',')[-1] }}{{ ' x '.strip() }}{{ 'ab'.startswith('a') }}", "bxTrue"),
        ("{{ '\n x'.lstrip('\n') }}|{{ 'x\n'.rstrip('\n') }}", " x|x"),
        ("{% set d = {'a': 1} %}{% for k, v in d.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", "1"),
        (
            "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | length }}",
            "0",
        ),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('y') | upper }}", "<Y>"),
        ("{{ 'x' if messages is defined and 'a' is string and {} is mapping else 'y' }}", "x"),
        ("  {% if true %}\n  yes\n  {% endif %}\nend", "  yes\nend"),
        ("{{ ['a', 'b'] | join(', ') }}{{ [1, 2, 3][::-1] }}", "a, b[3, 2, 1]"),
        ("{{ {'a': none, 'b': [true, 'x']} }}", "{'a': None, 'b': [True, 'x']}"),
        ("{{ 'n: ' ~ true ~ none }}", "n: TrueNone"),
        ("{{ 'abc' | string }}{{ none | string }}", "abcNone"),
        ("{{ 'x' * 3 }}{{ 7 // 2 }}{{ 7 / 2 }}{{ 2 ** 3 }}{{ 7 % 3 }}", "xxx33.581"),
        (
            "{{ 'aXb'.replace('X', 'y') }}{{ 'abc'[1:] }}{{ 'abc'[-1] }}{{ 'a b'.title() }}",
            "aybbccA B",
        ),
        ("{{ ('a', 'b') }}{{ [1.5, 'it\\'s'] }}", "('a', 'b')[1.5, \"it's\"]"),
        (
            "{%- set ns = namespace(a=1) -%}{% for i in range(3) %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}",
            "4",
        ),
        ("{{ 'abc' in 'xabcx' }} {{ 'k' in {'k': 1} }} {{ not '' }}", "True True True"),
        (
            "{% for m in [{'r': 1}, {'r': 2}] %}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.previtem.r if not loop.first }}{% endfor %}",
            "0TrueFalse1FalseTrue1",
        ),
        (
            "{{ '  a\n b ' | trim }}|{{ 'abc' | length }}|{{ [3,1,2] | sort | first }}|{{ {'b':1,'a':2} | dictsort }}",
            "a\n b|3|1|[('a', 2), ('b', 1)]",
        ),
        ("{{ 'a' if false }}|{{ [] or 'x' }}|{{ undefined_name | default('d') }}", "|x|d"),
        (
            "{%- for k, v in {'a': {'b': 1}} | items %}{{ k }}={{ v | tojson }}{% endfor %}",
            "a={\"b\": 1}",
        ),
        ("{{ '%s-%d' | format('a', 3) }}{{ 'x{}y'.format(1) }}", "a-3x1y"),
        ("{% if messages %}a{% elif tools is none %}b{% endif %}", "b"),
        ("a\n{# comment #}\nb{#- c -#}\nd\n", "a\nbd"),
        ("{{ 'é😀<>&\"' | tojson }}{{ 'x' | e }}{{ '<' | safe }}", "\"é😀<>&\\\"\"x<"),
        ("{% set x %}block {{ 1 }}{% endset %}{{ x }}", "block 1"),
        ("{{ 1 == 1.0 }}{{ 'a' < 'b' }}{{ none == false }}{{ [1] + [2] }}", "TrueTrueFalse[1, 2]"),
        (
            "{{ 'a\tb'.split() }}{{ 'a.b.c'.split('.', 1) }}{{ 'ab'.find('b') }}{{ 'Ab'.lower() }}{{ 'ab'.endswith(('b', 'c')) }}",
            "['a', 'b']['a', 'b.c']1abTrue",
        ),
        (
            "{{ {'type': 'object', 'p': {'x': [1, 2]}} | tojson(indent=4) }}",
            "{\n    \"type\": \"object\",\n    \"p\": {\n        \"x\": [\n            1,\n            2\n        ]\n    }\n}",
        ),
    ] {
        let got = compile(source).render(&Conversation::default(), false).unwrap();
        assert_eq!(got, expected, "{source}");
    }
}

#[test]
fn templates_that_cannot_work_say_where() {
    let error = ChatTemplate::compile("a\n{% if %}", TemplateSettings::default()).unwrap_err();
    assert!(error.to_string().contains("does not compile (line 2)"), "{error}");
    let error = compile("a\n{{ messages[7].content }}").render(&talk(), false).unwrap_err();
    assert!(error.to_string().contains("failed (line 2)"), "{error}");
    let endless =
        "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}";
    let error = compile(endless).render(&talk(), false).unwrap_err();
    assert!(error.to_string().contains("loops without end"), "{error}");
    let dateless =
        ChatTemplate::compile("{{ strftime_now('%Y') }}", TemplateSettings::default()).unwrap();
    let error = dateless.render(&talk(), false).unwrap_err();
    assert!(error.to_string().contains("no date was given"), "{error}");
}

#[test]
fn a_row_with_the_reserved_character_is_refused() {
    let mut talk = talk();
    talk.messages[1] = json!({"role": "user", "content": "a\u{FDD0}b"});
    for source in [CHATML, MISTRAL.replace("raise_exception", "str").as_str()] {
        if let Ok(rendered) = compile(source).render_with_spans(&talk) {
            panic!("{rendered:?}");
        }
    }
}

proptest::proptest! {
    #[test]
    fn templates_and_rows_of_any_kind_never_panic(
        source in "(\\{%-?|\\{\\{|%\\}|-?%\\}|\\}\\}|\\{#|#\\}| |generation|endgeneration|for m in messages|endfor|if m|endif|m\\.content|\\[0\\]|\\||tojson|x|\n|'|\\(|\\)){0,14}",
        content in "\\PC{0,8}",
    ) {
        let settings = TemplateSettings::default();
        if let Ok(template) = ChatTemplate::compile(&source, settings) {
            let talk = Conversation {
                messages: vec![
                    json!({"role": "user", "content": content.clone()}),
                    json!({"role": "assistant", "content": content}),
                ],
                ..Conversation::default()
            };
            if let Ok(rendered) = template.render_with_spans(&talk) {
                for span in rendered.spans {
                    // Ranges are in bounds and on characters' borders.
                    proptest::prop_assert!(rendered.text.get(span.bytes).is_some());
                }
            }
        }
    }

    /// In every format, with any content, the spans are the answers.
    #[test]
    fn spans_hold_the_answers(
        answers in proptest::collection::vec("[a-zA-Z<>|é ]{0,6}[a-z]", 1..4),
    ) {
        for source in [CHATML, LLAMA3, GEMMA, MISTRAL, THINKING] {
            let mut messages = Vec::new();
            for answer in &answers {
                messages.push(json!({"role": "user", "content": "Q"}));
                messages.push(json!({"role": "assistant", "content": answer}));
            }
            let talk = Conversation { messages, ..Conversation::default() };
            let rendered = compile(source).render_with_spans(&talk).unwrap();
            proptest::prop_assert_eq!(rendered.spans.len(), answers.len());
            for (span, answer) in rendered.spans.iter().zip(&answers) {
                let text = &rendered.text[span.bytes.clone()];
                let body = text.trim_start_matches("<think>\n\n</think>\n\n").trim_start();
                let rest = body.strip_prefix(answer.trim_start());
                proptest::prop_assert!(rest.is_some(), "{:?} in {:?}", answer, text);
                let rest = rest.unwrap().trim_end();
                let ends = ["", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "</s>"];
                proptest::prop_assert!(ends.contains(&rest), "{:?}", text);
            }
        }
    }
}
