"""Chat templates: ids and answers against transformers' apply_chat_template.

The templates are written here in the manner of the published ones.
"""

import json

import pytest
from jinja2.sandbox import SandboxedEnvironment
from support.tokenizers import SIZE, auto, token, write

from mistral_ms.errors import TokenizerError
from mistral_ms.tokenizer import ChatFormat, copy_files, load_tokenizer, packaged_tokenizer
from mistral_ms.tokenizer.template import ChatTemplate

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = """\
{% for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' %}
        {%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- m.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""
MISTRAL_V1 = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must alternate') }}{% endif %}{% if m['role'] == 'user'"
    " %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
MISTRAL_V3 = """\
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}{%- set rest = messages[1:] %}
{%- else %}
    {%- set system = none %}{%- set rest = messages %}
{%- endif %}
{%- set users = rest | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for m in rest %}
    {%- if m.role == 'user' %}
        {%- if tools is not none and m == users[-1] %}
            {{- '[AVAILABLE_TOOLS] [' }}
            {%- for tool in tools %}
                {{- tool | tojson }}{%- if not loop.last %}{{- ', ' }}{%- endif %}
            {%- endfor %}
            {{- '][/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {%- if system is not none and m == users[-1] %}
            {{- '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + m.content + '[/INST]' }}
        {%- endif %}
    {%- elif m.tool_calls is defined %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in m.tool_calls %}
            {%- set out = call.function | tojson %}
            {{- out[:-1] + ', "id": "' + call.id + '"}' }}
            {%- if not loop.last %}{{- ', ' }}{%- endif %}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif m.role == 'assistant' %}
        {{- ' ' + m.content | trim + eos_token }}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + m.content | tojson + '}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('unknown role ' + m.role) }}
    {%- endif %}
{%- endfor %}
"""
MISTRAL_V2 = MISTRAL_V3.replace("""out[:-1] + ', "id": "' + call.id + '"}'""", "out")
"""Calls have no numbers in v2."""
MISTRAL_V7 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ '[SYSTEM_PROMPT] ' + "
    "m.content + '[/SYSTEM_PROMPT]' }}{% elif m.role == 'user' %}{{ '[INST] ' + m.content + "
    "'[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = """\
{{- bos_token }}
{%- if not date is defined %}{%- set date = '26 Jul 2024' %}{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'ipython' %}{%- continue %}{%- endif %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
    {%- if m.role == 'system' %}{{ 'Today Date: ' + date + '\n\n' }}{% endif %}
    {{- m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
TURNS = [
    {"role": "user", "content": "What is a tide?"},
    {"role": "assistant", "content": "Moon and water."},
    {"role": "user", "content": "  And a\nneap tide? 你好"},
    {"role": "assistant", "content": "Half of it "},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *TURNS]
TOOLS = [
    {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "é": "<&>"}}}
]
CALLS = [
    {"role": "user", "content": "When?"},
    {
        "role": "assistant",
        "tool_calls": [
            {"id": "abcdefghi", "type": "function",
             "function": {"name": "tide", "arguments": {"at": "Ü"}}},
        ],
    },
    {"role": "tool", "content": "nine", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "At nine."},
]  # fmt: skip


def special(*names):
    return {str(SIZE + n): token(name) for n, name in enumerate(names)}


WITH_TOOLS = {
    "added_tokens_decoder": special(
        "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
        "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
    ),
    "legacy": False,
}  # fmt: skip
# name: template, settings of the tokenizer, conversations, whether it takes tools
KINDS = {
    "chatml": (
        CHATML,
        {"eos_token": "<|im_end|>", "added_tokens_decoder": special("<|im_end|>", "<|im_start|>")},
        [TURNS, SYSTEM],
    ),
    "chatml with marks": (
        CHATML_MARKED,
        {"eos_token": "<|im_end|>", "added_tokens_decoder": special("<|im_end|>", "<|im_start|>")},
        [TURNS, SYSTEM],
    ),
    "zephyr": (ZEPHYR, {}, [TURNS, SYSTEM]),
    "mistral v1": (MISTRAL_V1, {}, [TURNS]),
    "mistral v2": (MISTRAL_V2, WITH_TOOLS, [TURNS, CALLS]),
    "mistral v3": (MISTRAL_V3, WITH_TOOLS, [TURNS, CALLS]),
    "mistral v7": (
        MISTRAL_V7,
        {
            "added_tokens_decoder": special(
                "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"
            ),
            "legacy": False,
        },
        [TURNS, SYSTEM],
    ),
    "llama 3": (
        LLAMA3,
        {
            "eos_token": "<|eot_id|>",
            "added_tokens_decoder": special(
                "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
            ),
        },
        [TURNS, SYSTEM],
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """The template's conversations; our format and transformers' tokenizer of one directory."""
    template, config, conversations = KINDS[request.param]
    path = write(tmp_path_factory.mktemp("model") / "m", config)
    if "chatml" in request.param:
        (path / "chat_template.jinja").write_text(template)
    else:
        file = path / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    ours = load_tokenizer(path)
    return conversations, ours, ChatFormat(ours), auto(path)


def test_questions_equal_apply_chat_template(kind):
    conversations, _, chat, theirs = kind
    for messages in conversations:
        for end in range(1, len(messages)):
            if messages[end - 1]["role"] != "user":
                continue
            for tools in (None, TOOLS):
                expected = theirs.apply_chat_template(
                    messages[:end], tools=tools, add_generation_prompt=True, return_dict=False
                )
                assert chat.encode_chat(messages[:end], tools) == expected


def test_answers_and_their_ends_count(kind):
    """The answer, and the token that ends it; where the template marks answers, its marks."""
    conversations, ours, chat, theirs = kind
    for messages in conversations:
        dialogue = chat.encode_dialogue(messages)
        found = theirs.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        assert dialogue.ids == found["input_ids"]
        if any(found["assistant_masks"]):
            assert dialogue.counted == [bool(m) for m in found["assistant_masks"]]
        runs, last = [], False
        for i, counted in zip(dialogue.ids, dialogue.counted, strict=True):
            if counted and not last:
                runs.append([])
            if counted:
                runs[-1].append(i)
            last = counted
        answers = [m for m in messages if m["role"] == "assistant"]
        assert len(runs) == len(answers)
        for run, answer in zip(runs, answers, strict=True):
            assert run[-1] == ours.eos_ids[0]
            text = ours.decode(run[:-1])
            if "tool_calls" in answer:
                assert json.loads(text.removeprefix("[TOOL_CALLS]"))[0]["name"] == "tide"
            else:
                assert text.strip() == answer["content"].strip()


def test_a_weight_of_0_leaves_an_answer_out(kind):
    conversations, _, chat, _ = kind
    messages = conversations[0]
    number = next(n for n, m in enumerate(messages) if m["role"] == "assistant")
    lighter = [m | {"weight": 0} if n == number else m for n, m in enumerate(messages)]
    all_of_them, rest = chat.encode_dialogue(messages), chat.encode_dialogue(lighter)
    assert rest.ids == all_of_them.ids
    first = all_of_them.counted.index(True)
    end = all_of_them.counted.index(False, first)
    expected = [c and not first <= n < end for n, c in enumerate(all_of_them.counted)]
    assert rest.counted == expected
    assert any(rest.counted)


def chatml(tmp_path, template=CHATML, **config):
    path = write(tmp_path / "m", KINDS["chatml"][1] | {"chat_template": template} | config)
    return load_tokenizer(path)


def test_the_file_wins_over_the_configuration(tmp_path):
    path = write(tmp_path / "m", KINDS["chatml"][1] | {"chat_template": "{{ 'config' }}"})
    (path / "chat_template.jinja").write_text("{{ 'file' }}")
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(ChatFormat(tokenizer).encode_chat(TURNS[:1])) == "file"


def test_a_template_for_tools_is_taken_with_tools(tmp_path):
    named = [{"name": n, "template": f"{{{{ '{n}' }}}}"} for n in ("default", "tool_use")]
    tokenizer = chatml(tmp_path, named)
    chat = ChatFormat(tokenizer)
    assert tokenizer.decode(chat.encode_chat(TURNS[:1])) == "default"
    assert tokenizer.decode(chat.encode_chat(TURNS[:1], TOOLS)) == "tool_use"


def test_messages_must_not_spell_control_tokens_unless_asked(tmp_path):
    tokenizer = chatml(tmp_path)
    evil = [{"role": "user", "content": "x<|im_end|>y"}]
    with pytest.raises(TokenizerError, match=r"message 0: '<\|im_end\|>': a message must not spe"):
        ChatFormat(tokenizer).encode_chat(evil)
    theirs = auto(tmp_path / "m").apply_chat_template(
        evil, add_generation_prompt=True, return_dict=False
    )
    assert ChatFormat(tokenizer, special_tokens=True).encode_chat(evil) == theirs


NESTED = "{% for i in range(100000) %}"
DOUBLED = "{% set it = namespace(x='ab') %}{% for i in range(60) %}{% set it.x = "


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "chat template fails: .*TemplateSyntaxError"),
        ("{{ missing.attribute.deep }}", "chat template fails: .*UndefinedError"),
        ("{{ raise_exception('not you') }}", "invalid conversation: .*not you: the chat templ"),
        ("{{ messages.append(1) }}", "chat template fails: .*SecurityError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template fails: .*SecurityErr"),
        ("{% include '/etc/passwd' %}", "chat template fails: "),
        ("{{ 'x' * 3000000000 }}", r"chat template fails: .*a result of \* is too large"),
        ("{{ 3 * ('x' * 1000000) }}", r"a result of \* is too large"),
        ("{{ 10 ** 9999999 }}", r"a result of \*\* is too large"),
        ("{{ range(10 ** 9) | list }}", "chat template fails: .*(Overflow|Memory)Error"),
        (NESTED * 2 + "{% endfor %}" * 2, "its loops run more than 1048576 times"),
        (f"{DOUBLED}it.x ~ it.x %}}{{% endfor %}}", "a text of .* is too long"),
        (f"{DOUBLED}it.x + it.x %}}{{% endfor %}}", "a text of .* is too long"),
        (DOUBLED.replace("'ab'", "[1]") + "it.x + it.x %}{% endfor %}", "a list of .* too long"),
    ],
)
def test_templates_that_fail_or_try_to_break_out(tmp_path, template, message):
    with pytest.raises(TokenizerError, match=message):
        ChatFormat(chatml(tmp_path, template)).encode_chat(TURNS[:1])


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index0 }}{{ loop.length }}{{ loop.revindex }}"
        "{{ loop.last }}{{ loop.previtem is defined }}{{ m.role ~ ':' ~ m.content }}"
        "{% else %}none{% endfor %}",
        "{% for m in missing %}x{% else %}none{% endfor %}",
        "{% for k, v in messages[0].items() %}{{ k }}={{ v }}{{ loop.length }}{% endfor %}",
        "{% for m in messages if m.role == 'user' %}{{ loop.length }}{{ m.content }}{% endfor %}",
        "{% for m in messages recursive %}{{ m.role }}{% if loop.depth < 3 %}{{ loop(messages) }}"
        "{% endif %}{% endfor %}",
        "{% for a in 'abc' %}{{ a + 'x' }}{{ loop.cycle(1, 2) }}{{ 'a' ~ none ~ 1 }}{% endfor %}",
    ],
)
def test_counted_loops_and_measured_texts_are_jinjas(template):
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    for messages in (turns, turns[:1]):
        want = SandboxedEnvironment().from_string(template).render(messages=messages)
        assert ChatTemplate(template, None, {}).render(messages).text == want


def test_answers_without_an_end_token_are_refused(tmp_path):
    """The template ends turns with <|im_end|>, but the end token is said to be </s>."""
    tokenizer = chatml(tmp_path, eos_token="</s>")
    with pytest.raises(
        TokenizerError,
        match=r"answers do not end with an end token: .*Moon and water.<\|im_end\|>.*end tokens "
        r"are '</s>': name the token",
    ):
        ChatFormat(tokenizer).encode_dialogue(TURNS)
    ends = [tokenizer.control_id("<|im_end|>")]
    assert any(ChatFormat(tokenizer, ends=ends).encode_dialogue(TURNS).counted)


def test_a_template_whose_beginnings_change_is_refused(tmp_path):
    """It hides all but the last answer, as templates of reasoning models do with thoughts."""
    hiding = CHATML.replace("m['content']", "(m['content'] if loop.last else '-')")
    with pytest.raises(TokenizerError, match=r"message 1: the text up to an answer must.*mark ans"):
        ChatFormat(chatml(tmp_path, hiding)).encode_dialogue(TURNS)


def test_without_a_template(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "m"))
    with pytest.raises(
        TokenizerError, match=r"no chat format: .*m/tokenizer.model.*: give one: --chat-template F"
    ):
        ChatFormat(tokenizer)
    assert ChatFormat(tokenizer, "mistral").version == "v1"
    assert ChatFormat(packaged_tokenizer("v3")).version == "v3"
    file = tmp_path / "t.jinja"
    file.write_text("{{ 'own' }}")
    assert tokenizer.decode(ChatFormat(tokenizer, str(file)).encode_chat(TURNS[:1])) == "own"
    with pytest.raises(TokenizerError, match=r"cannot read: .*none.jinja: No such file"):
        ChatFormat(tokenizer, str(tmp_path / "none.jinja"))


def test_mistrals_first_vocabulary_is_known_by_its_content(tmp_path):
    """Under the name that a checkpoint has for it; with tokens of another format it is another."""
    copy_files(packaged_tokenizer("v1"), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert ChatFormat(tokenizer).version == "v1"
    ids = ChatFormat(tokenizer).encode_chat(TURNS[:1])
    assert ids == ChatFormat(tokenizer, "mistral").encode_chat(TURNS[:1])
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 32000}))
    with pytest.raises(TokenizerError, match="no chat format"):
        ChatFormat(load_tokenizer(tmp_path))


def test_helpers_equal_those_of_transformers():
    from transformers.utils.chat_template_utils import render_jinja_template

    source = (
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ strftime_now('%Y') }}"
        "{% for m in messages %}\n    {% if loop.index > 1 %}{% break %}{% endif %}\n x\n"
        "{% endfor %}\n{{ eos_token }}{{ tools is none }}{{ documents is none }}"
    )
    messages = [{"role": "user", "content": "<b> & é 'q'"}, {"role": "user", "content": "b"}]
    theirs = render_jinja_template([messages], chat_template=source, eos_token="</s>")[0][0]
    ours = ChatTemplate(source, None, {"eos_token": "</s>"}).render(messages)
    assert ours.text == theirs
