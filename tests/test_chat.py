"""Chats: the text of any template, to a byte, which of it is learnt, and `python model.py DIR`.

The oracle is transformers' renderer. The templates are short forms of those that popular models
ship, written here with the quirks of each: defaults, dates, trimming, other last stop tokens,
refusals, thinking that is dropped, tool calls, generation blocks.

Run: python -m pytest tests/test_chat.py
"""

import functools
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model as code
from model import Tokenizer, generate, load_with_tokenizer

utils = pytest.importorskip("transformers.utils.chat_template_utils")

TEACHER = Path(__file__).parent / "teacher"
SPECIALS = ["<s>", "</s>", "<|begin_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|start_header_id|>",
            "<|end_header_id|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|user|>",
            "<|assistant|>", "<|end|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
            "[TOOL_CALLS]"]
ORDINARY = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
MARKS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|endoftext|>"}

CHATML = ("{% for message in messages %}"
          "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + tool_call.name + '", ' + '"parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- "}" }}{{- "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- endif %}{{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or \
(message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}{{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}
        {{- '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
QWEN3 = """{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" %}{%- set ns.last = index %}{%- break %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role != "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- else %}
        {%- set content, thought = message.content, message.reasoning_content or '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- set users = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if message == users[-1] and system_message is defined %}
            {{- "[INST]" + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST]" + message["content"] + "[/INST]" }}{%- endif %}
    {%- else %}{{- message["content"]|trim + eos_token }}{%- endif %}
{%- endfor %}"""
OLMO2 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}"
    "{% elif not loop.last %}{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}"
    "{% else %}{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}")
OLMO3 = """\
{%- set has_system = messages|selectattr('role', 'equalto', 'system')|list|length > 0 -%}
{%- if not has_system -%}{{- '<|im_start|>system
You are a function-calling AI. <functions></functions><|im_end|>
' -}}{%- endif -%}{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '
' + message['content'] -}}{%- if message['role'] != 'assistant' or not loop.last -%}
{{- '<|im_end|>
' -}}{%- else -%}{{- eos_token -}}{%- endif -%}
{%- if loop.last and add_generation_prompt -%}{{- '<|im_start|>assistant
' -}}{%- endif -%}{%- endfor -%}"""
PHI3 = ("{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] "
        "+ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
        "{% else %}{{ eos_token }}{% endif %}")
GEMMA = ("{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'assistant') %}"
         "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
         "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
         "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}")
BLOCKS = """{%- for message in messages %}
{%- if message.role == "assistant" %}
    {{- '<|im_start|>assistant\n' }}
    {%- generation %}
    {{- message.content + '<|im_end|>' }}
    {%- endgeneration %}
    {{- '\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
PLAIN = ("{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n\n{% endfor %}"
         "{% if add_generation_prompt %}ASSISTANT: {% endif %}")

# name -> (template, stop token of an earlier assistant turn, of the last one)
END, EOT = "<|im_end|>", "<|eot_id|>"
TEMPLATES = {
    "ChatML": (CHATML, END, END),
    "ChatML, bos_token first": ("{{ bos_token }}" + CHATML, END, END),
    "ChatML, a literal <s> first": ("<s>" + CHATML, END, END),
    "ChatML, eos after a turn": (CHATML.replace("+ '<|im_end|>'", "+ eos_token"), "</s>", "</s>"),
    "ChatML, eos at the end only": (CHATML + "{% if not add_generation_prompt %}</s>{% endif %}",
                                    END, END + "\n</s>"),
    "ChatML, text before": ("A chat.\n\n" + CHATML, END, END),
    "Llama 3.1": (LLAMA31, EOT, EOT),
    "Llama 3.2": (LLAMA31.replace('"26 Jul 2024"', 'strftime_now("%d %b %Y")'), EOT, EOT),
    "Qwen2.5": (QWEN25, END, END),
    "Mistral": (MISTRAL.replace("users[-1]", "users[0]"), "</s>", "</s>"),
    "OLMo 2": (OLMO2, "</s>", "</s>"),
    "Olmo 3": (OLMO3, END, "</s>"),
    "Phi-3": (PHI3, "<|end|>", "<|end|>\n</s>"),
    "Gemma": (GEMMA, "<end_of_turn>", "<end_of_turn>"),
    "generation blocks": (BLOCKS, END, END),
    "no stop token": (PLAIN, "\n\n", "\n\n"),
}
TURNS = [("system", " Be brief.\n"), ("user", "  Hi {there} <b>'you'</b> ünï\n"),
         ("assistant", "Hello. "), ("user", "2 + 2?"), ("assistant", "4\n\n— four")]
CONVERSATIONS = [[{"role": role, "content": text} for role, text in TURNS[a:b]]
                 for a, b in [(0, 2), (1, 2), (0, 3), (1, 4), (0, 4), (0, 5), (1, 5)]]
LONGEST = CONVERSATIONS[5]
WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a <city>, ü",
                                            "parameters": {"type": "object", "properties": {}}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}]}
TOOL_CHAT = [{"role": "user", "content": "Weather?"}, CALL,
             {"role": "tool", "name": "weather", "content": "rain"},
             {"role": "assistant", "content": "It rains.", "refusal": None}]


def expected(template, messages, generation_prompt, tools=None):
    """transformers' text."""
    messages = [{k: v for k, v in m.items() if v is not None} for m in messages]  # as it does first
    return utils.render_jinja_template([messages], tools=tools, chat_template=template,
                                       add_generation_prompt=generation_prompt, **MARKS)[0][0]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with a byte-level vocabulary and all special tokens of these templates."""
    folder = tmp_path_factory.mktemp("plain")
    vocab = {c: b for c, b in code._BYTE_OF.items()}
    added = [dict(id=256 + i, content=text, single_word=False, lstrip=False, rstrip=False,
                  normalized=False, special=text in SPECIALS)
             for i, text in enumerate(SPECIALS + ORDINARY)]
    (folder / "tokenizer.json").write_text(json.dumps({
        "added_tokens": added, "normalizer": None, "post_processor": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True,
                          "trim_offsets": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": []}}))
    return folder


@pytest.fixture
def chat(plain, tmp_path):
    """chat(template) -> Tokenizer of a folder with it."""
    def make(template, **config):
        shutil.copytree(plain, tmp_path / "m", dirs_exist_ok=True)
        (tmp_path / "m/tokenizer_config.json").write_text(
            json.dumps({**MARKS, "chat_template": template, **config}))
        return Tokenizer(tmp_path / "m")
    return make


def learnt(tokenizer, messages, **options):
    return [text for text, mine in tokenizer.render_chat_parts(messages, **options)[0] if mine]


# ------------------------------------------------------------------ text


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_transformers(chat, name):
    template = TEMPLATES[name][0]
    ours = chat(template)
    for messages in CONVERSATIONS:
        for prompt in (True, False):
            assert ours.render_chat(messages, generation_prompt=prompt) == expected(
                template, messages, prompt)


@pytest.mark.parametrize("template", [LLAMA31, QWEN25, QWEN3])
@pytest.mark.parametrize("tools", [None, [], [WEATHER]])
def test_tools_calls_and_reasoning_go_to_the_template_as_they_are(chat, template, tools):
    ours = chat(template)
    thinking = [[{"role": "user", "content": "2 + 2?"},
                 {"role": "assistant", key: "Easy.", "content": "4"}]
                for key in ("reasoning_content", "thinking", "reasoning")]  # data sets' names
    for messages in (TOOL_CHAT, TOOL_CHAT[:3], *thinking):
        assert ours.render_chat(messages, tools=tools) == expected(template, messages, True, tools)


def test_content_may_be_a_list_of_parts_if_the_template_takes_it(chat):
    template = ("{% for m in messages %}{% for part in m.content %}{{ part.text }}{% if part.text "
                "== 'b' %}{% break %}{% endif %}{% endfor %}<|end|>{% endfor %}")
    messages = [{"role": "user", "content": [{"type": "text", "text": t} for t in "abc"]}]
    assert chat(template).render_chat(messages) == "ab<|end|>" == expected(template, messages, True)
    with pytest.raises(ValueError, match="refuses this conversation: can only concatenate str"):
        chat(CHATML).render_chat(messages)


@pytest.mark.parametrize("content", [[{"type": "text", "text": "4"}], {"text": "4"}])
def test_a_content_that_is_written_as_python_shows_it_is_not_learnt(chat, content):
    whole = "{{ m.content | trim }}"
    for written in (whole, "{% for part in m.content %}{{ part }}{% endfor %}"):
        if written != whole and isinstance(content, dict):
            continue  # its keys are strings
        for said in (0, 1):  # the user's, the assistant's
            messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
            messages[said]["content"] = content
            with pytest.raises(ValueError, match="as Python shows it"):
                chat("{% for m in messages %}{{ m.role }}" + written + "<|end|>{% endfor %}"
                     ).render_chat_parts(messages)


@pytest.mark.parametrize("said", [0, 1])  # the user's, the assistant's
def test_parts_that_the_template_leaves_out_are_not_learnt(chat, said):
    """As Qwen 3's templates do, which write a content only if it is a string."""
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    tokenizer = chat("{% for m in messages %}<{{ m.role }}>{% if m.content is string %}"
                     "[{{ m.content }}]{% endif %}<|end|>{% endfor %}"
                     "{% if add_generation_prompt %}<assistant>{% endif %}")
    assert learnt(tokenizer, messages)
    messages[said]["content"] = [{"type": "text", "text": "4"}]
    with pytest.raises(ValueError, match="does not write the content of message"):
        tokenizer.render_chat_parts(messages)


def test_a_picture_beside_a_text_is_not_passed_by(chat):
    tokenizer = chat("{% for m in messages %}<{{ m.role }}>{% for p in m.content %}"
                     "{{ p.text }}{% endfor %}<|end|>{% endfor %}"
                     "{% if add_generation_prompt %}<assistant>{% endif %}")
    said = [{"type": "text", "text": "A cat."}, {"type": "text", "text": ""}]
    messages = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
    assert learnt(tokenizer, messages) == ["A cat.<|end|>"]
    messages[0] = {"role": "user", "content": [*said, {"type": "image", "url": "cat.png"}]}
    with pytest.raises(ValueError, match="does not write the content of message 0 .*, or not all"):
        tokenizer.render_chat_parts(messages)


@pytest.mark.parametrize("dropped, said", [
    ({"role": "developer", "content": "In French."}, {}),
    (None, {"reasoning_content": "Two and two."}), (None, {"thinking": "Two and two."}),
    (None, {"content": "", "function_call": {"name": "add", "arguments": "2"}})])
def test_what_the_template_leaves_out_is_not_passed_by(chat, dropped, said):
    """As Qwen 2.5's does with roles that it does not know and with thinking."""
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": " 4\n"}]
    tokenizer = chat("{% for m in messages %}{% if m.role in ('user', 'assistant') %}<{{ m.role }}>"
                     "{{ m.content | trim }}<|end|>{% endif %}{% endfor %}"
                     "{% if add_generation_prompt %}<assistant>{% endif %}")
    assert learnt(tokenizer, messages) == ["4<|end|>"]  # trimmed is not left out
    with pytest.raises(ValueError, match="does not write the " + [*(said or ["content"])][-1]):
        tokenizer.render_chat_parts([*([dropped] if dropped else []), messages[0],
                                     {**messages[1], **said}])


def test_the_environment_is_transformers(chat):
    template = ("{{ '<ü&>' | tojson }} {{ {'b': 1, 'a': [2]} | tojson(indent=2, sort_keys=true) }} "
                "{{ strftime_now('%Y %z') }} {{ [1] | tojson(true) }} {{ bos_token }}{{ eos_token }}{{ pad_token }} "
                "{{ tools is none }} {{ add_generation_prompt }} {{ unknown_token is defined }}")
    assert chat(template).render_chat([{"role": "user", "content": ""}]) == expected(
        template, [{"role": "user"}], True)


@pytest.mark.parametrize("escape", ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}",
                                    "{{ messages.__class__.__base__.__subclasses__() }}"])
def test_a_template_cannot_leave_its_sandbox(chat, escape):
    try:
        text = chat(escape).render_chat([{"role": "user", "content": ""}])
    except ValueError as error:
        text = str(error)
    assert "refuses" in text or text == ""


def test_where_the_template_stands(plain, tmp_path):
    """chat_template.jinja wins, then tokenizer_config.json, then chat_template.json."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "m"
    shutil.copytree(plain, folder)
    config, messages = folder / "tokenizer_config.json", [{"role": "user", "content": "x"}]
    marks = {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>",
             "tokenizer_class": "PreTrainedTokenizerFast"}

    def texts(tools=None):
        hf = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        return (Tokenizer(folder).render_chat(messages, tools=tools),
                hf.apply_chat_template(messages, tools=tools, tokenize=False,
                                       add_generation_prompt=True))

    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "last"}))
    config.write_text(json.dumps(marks))
    assert Tokenizer(folder).render_chat(messages) == "last"
    named = [{"name": "default", "template": "{{ bos_token }}D"},
             {"name": "tool_use", "template": "{{ tools[0].x }}{{ eos_token }}"}]
    config.write_text(json.dumps({**marks, "chat_template": named}))
    assert texts() == ("<s>D",) * 2 and texts([{"x": 7}]) == ("7</s>",) * 2
    config.write_text(json.dumps({**marks, "chat_template": "{{ bos_token }}string"}))
    assert texts() == ("<s>string",) * 2
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("{{ tools[0].x }}more")
    assert texts([{"x": 7}]) == ("7more",) * 2  # files alone: the string is not looked at
    with pytest.raises(ValueError, match="has no chat template"):
        texts()
    (folder / "chat_template.jinja").write_text("{{ eos_token }}file")
    assert texts() == ("</s>file",) * 2 and texts([{"x": 7}]) == ("7more",) * 2
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|eot_id|>"}')
    assert texts() == ("<|eot_id|>file",) * 2
    config.write_text(json.dumps({**marks, "added_tokens_decoder": {}}))
    assert texts() == ("</s>file",) * 2
    (folder / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="jinja.* is not UTF-8"):
        Tokenizer(folder)


# ------------------------------------------------------------------ what is learnt


@pytest.mark.parametrize("name", TEMPLATES)
def test_parts_mark_the_assistants_words_and_stop_token(chat, name):
    template, stop, last = TEMPLATES[name]
    ours, strip = chat(template), str.strip if name in (
        "Llama 3.1", "Llama 3.2", "Mistral", "Gemma") else str
    for messages in CONVERSATIONS:
        parts, skipped = ours.render_chat_parts(messages)
        whole = ours.render_chat(messages, generation_prompt=False)
        assert "".join(text for text, _ in parts) == whole and skipped == 0
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        stops = [stop] * len(answers)
        if messages[-1]["role"] == "assistant":
            stops[-1] = last
        assert [text for text, mine in parts if mine] == [
            strip(text) + mark for text, mark in zip(answers, stops)]
        if name != "no stop token":  # so that parts can be encoded one by one
            ids = [i for text, _ in parts for i in ours.encode(text, bos=False)]
            assert ids == ours.encode(whole, bos=False)


def test_a_stop_token_that_comes_with_the_next_turn_is_learnt_with_its_own(chat):
    ours = chat("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"  # Qwen 1.5
                "{% if add_generation_prompt or not loop.last %}{{ eos_token + '\n' }}{% endif %}"
                "{% endfor %}{% if add_generation_prompt and messages[-1].role != 'assistant' %}"
                "{{ '<|im_start|>assistant\n' }}{% endif %}")
    for messages in CONVERSATIONS:
        answers = [m["content"] + "</s>" for m in messages if m["role"] == "assistant"]
        assert "".join(learnt(ours, messages)) == "".join(answers)
        text = "".join(text for text, _ in ours.render_chat_parts(messages)[0])
        assert text in (whole := ours.render_chat(messages, generation_prompt=False),
                        whole + "</s>" * (messages[-1]["role"] == "assistant"))


@pytest.mark.parametrize("name", [n for n in TEMPLATES if n != "Mistral"])
def test_the_first_header_is_not_learnt_either(chat, name):
    template, stop, last = TEMPLATES[name]
    messages = [{"role": "assistant", "content": "Welcome."}, {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Yes?"}]
    ours = chat(template)
    assert learnt(ours, messages) == ["Welcome." + stop, "Yes?" + last]
    assert learnt(ours, messages[:1]) == ["Welcome." + last]


def test_the_first_header_behind_a_system_text_is_not_learnt(chat):
    """Granite's template writes the generation prompt in its loop, and not behind a system text."""
    ours = chat("{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>"
                "{% if loop.last and add_generation_prompt and m.role != 'system' %}<assistant>"
                "{% endif %}{% endfor %}")
    messages = [{"role": role, "content": text} for role, text in (
        ("system", "Say <assistant> often."), ("assistant", "Welcome."), ("user", "Hi"),
        ("assistant", "Yes?"))]
    assert learnt(ours, messages) == ["Welcome.<|end|>", "Yes?<|end|>"]
    assert learnt(chat(CHATML), messages) == ["Welcome.<|im_end|>", "Yes?<|im_end|>"]


def test_generation_blocks_are_learnt_as_transformers_masks_them(chat):
    template = BLOCKS.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n*' }}")
    for messages in CONVERSATIONS:
        text, spans = utils.render_jinja_template(
            [messages], chat_template=template, return_assistant_tokens_mask=True, **MARKS)
        assert learnt(chat(template), messages) == [text[0][a:b] for a, b in spans[0]]


def test_blocks_that_belong_to_no_turn_are_refused(chat):
    twice = BLOCKS.replace("{{- '\n' }}", "{%- generation %}{{- '\n' }}{%- endgeneration %}")
    with pytest.raises(ValueError, match="4 generation blocks for 2 assistant turns"):
        chat(twice).render_chat_parts(LONGEST)
    marked = [{"role": "user", "content": "\ufdd0"}, {"role": "assistant", "content": "x"}]
    with pytest.raises(ValueError, match="generation blocks"):
        chat(BLOCKS).render_chat_parts(marked)


def test_blocks_of_another_template_or_in_a_comment_do_not_matter(chat):
    plain = chat(CHATML).render_chat_parts(LONGEST)
    assert chat("{# endgeneration #}" + CHATML).render_chat_parts(LONGEST) == plain
    both = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": BLOCKS}]
    assert chat(both).render_chat_parts(LONGEST) == plain
    marked = [{"role": "user", "content": "\ufdd0"}, {"role": "assistant", "content": "x"}]
    assert learnt(chat(CHATML), marked) == ["x<|im_end|>"]


def test_a_turn_outside_of_the_templates_blocks_is_refused(chat):
    some = BLOCKS.replace("{%- generation %}", "{%- if message.final %}{%- generation %}").replace(
        "{%- endgeneration %}", "{%- endgeneration %}{%- endif %}")
    assert some != BLOCKS
    with pytest.raises(ValueError, match="0 generation blocks for 2 assistant turns"):
        chat(some).render_chat_parts(LONGEST)


def test_a_first_turn_whose_header_the_text_lacks_is_skipped_and_counted(chat):
    """The generation prompt of DeepSeek's and others' templates ends in "<think>"."""
    tokenizer = chat("{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
                     "{% if add_generation_prompt %}<assistant><think>{% endif %}")
    messages = [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "2+2?"},
                {"role": "assistant", "content": "<think>sum</think>4"}]
    parts, skipped = tokenizer.render_chat_parts(messages)
    assert skipped == 1
    assert [text for text, mine in parts if mine] == ["sum</think>4<|end|>"]


def test_thinking_that_is_dropped_leaves_the_last_turn(chat):
    ours = chat(QWEN3)
    messages = [{"role": "user", "content": "1?"},
                {"role": "assistant", "content": "<think>\nA\n</think>\n\none"},
                {"role": "user", "content": "2?"},
                {"role": "assistant", "reasoning_content": "B", "content": "two"}]
    parts, skipped = ours.render_chat_parts(messages)
    assert "".join(text for text, _ in parts) == expected(QWEN3, messages, False)
    assert learnt(ours, messages) == ["<think>\nB\n</think>\n\ntwo<|im_end|>"] and skipped == 1
    # Between the last question and the end nothing is dropped: a call and its answer are learnt.
    step = [messages[0], dict(messages[3], content="calling"),
            {"role": "tool", "content": "7"}, messages[3]]
    assert len(learnt(ours, step)) == 2 and ours.render_chat_parts(step)[1] == 0
    # The turn is followed by a question, so what generation wrote is nowhere in the text.
    with pytest.raises(ValueError, match="none of the assistant's 1 turns can be found"):
        ours.render_chat_parts(messages[:3])


def test_a_prompt_that_the_conversation_does_not_hold_is_refused(chat):
    """As DeepSeek-R1's: generation starts behind <think>, which the rendered turn does not have."""
    template = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    with pytest.raises(ValueError, match="can be found"):
        chat(template).render_chat_parts(LONGEST)
    assert chat(template).render_chat(LONGEST) == expected(template, LONGEST, True)


def test_a_system_text_in_the_last_user_turn_moves_as_turns_come(chat):
    """Mistral's: with a system text only the last turn's prompt is as generation saw it."""
    ours = chat(MISTRAL)
    assert learnt(ours, LONGEST) == ["4\n\n— four</s>"] and ours.render_chat_parts(LONGEST)[1] == 1
    assert len(learnt(ours, LONGEST[1:])) == 2 and ours.render_chat_parts(LONGEST[1:])[1] == 0
    drops = chat(MISTRAL.replace("message == users[-1]", "loop.last"))  # Mistral-Nemo's
    with pytest.raises(ValueError, match="does not write the content of message 0"):
        drops.render_chat_parts(LONGEST)


@pytest.mark.parametrize("template", [QWEN25, BLOCKS])
@pytest.mark.parametrize("no", [{"weight": 0}, {"train": False}, {"weight": 0.0}])
def test_turns_can_be_left_out(chat, template, no):
    ours = chat(template)
    messages = [*LONGEST[:2], {**LONGEST[2], **no}, LONGEST[3], {**LONGEST[4], "weight": 1}]
    parts, skipped = ours.render_chat_parts(messages)
    assert [text for text, mine in parts if mine] == ["4\n\n— four<|im_end|>"] and skipped == 0
    assert "".join(text for text, _ in parts) == expected(template, LONGEST, False)
    assert learnt(ours, messages[:4]) == [] and ours.render_chat_parts(messages[:4])[1] == 0
    with pytest.raises(ValueError, match='"train" and "weight"'):
        ours.render_chat_parts([{**m, "weight": 0.5} for m in messages])


def test_tool_calls_are_learnt_or_refused_never_dropped(chat):
    ours = chat(QWEN25)
    call, answer = learnt(ours, TOOL_CHAT, tools=[WEATHER])
    assert call == ('<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n'
                    "</tool_call><|im_end|>") and answer == "It rains.<|im_end|>"
    call = learnt(chat(LLAMA31), TOOL_CHAT)[0]
    assert call == '{"name": "weather", "parameters": {"city": "Zürich"}}<|eot_id|>'
    with pytest.raises(ValueError, match="does not write the tool call"):
        chat(CHATML).render_chat_parts(TOOL_CHAT)
    with pytest.raises(ValueError, match="does not write the tools"):
        chat(CHATML).render_chat_parts(LONGEST, tools=[WEATHER])
    with pytest.raises(ValueError, match="only supports single tool-calls at once!"):
        chat(LLAMA31).render_chat([{**CALL, "tool_calls": CALL["tool_calls"] * 2}])


# ------------------------------------------------------------------ refusals


def test_a_templates_own_refusal_is_the_message(chat):
    with pytest.raises(ValueError, match="roles must alternate user/assistant") as error:
        chat(MISTRAL).render_chat(LONGEST[1:2] * 2)
    assert "\n" not in str(error.value) and "/m refuses" in str(error.value)


@pytest.mark.parametrize("template, words", [
    ("{% for %}", "refuses"), ("{{ 1 / 0 }}", "division"), ("{{ messages[0].a.b }}", "undefined|no"),
    ([{"name": "x"}], "chat_template is neither"), (None, "has no chat template"),
    ([{"name": "other", "template": ""}], "has no chat template")])
def test_broken_and_absent_templates_are_one_sentence(chat, template, words):
    with pytest.raises(ValueError, match=words) as error:
        chat(template).render_chat(LONGEST)
    assert "\n" not in str(error.value) and "/m" in str(error.value)


@pytest.mark.parametrize("messages, words", [
    ([], "at least one"), ("hi", "must be a list of objects"), (["hi"], "list of objects"),
    ([{"content": "x"}], '"role"'), ([{"role": 1, "content": "x"}], '"role"')])
def test_what_is_no_conversation_is_refused(chat, messages, words):
    for render in (chat(CHATML).render_chat, chat(CHATML).render_chat_parts):
        with pytest.raises(ValueError, match=words):
            render(messages)
    with pytest.raises(ValueError, match="tools must be a list of objects"):
        chat(QWEN25).render_chat(LONGEST, tools="[]")


# ------------------------------------------------------------------ python model.py DIR


def test_streamed_text_has_no_broken_characters(plain):
    ours = Tokenizer(plain)
    text = "aé你🙂e\u0301"
    pieces = list(ours.decode_stream(ours.encode(text)))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    cut = ours.encode(text)[:-1] + [10**6]
    assert "".join(ours.decode_stream(cut)) == ours.decode(cut)


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """The shipped teacher with a chat template of its own tokens."""
    folder = tmp_path_factory.mktemp("talk") / "m"
    shutil.copytree(TEACHER, folder)
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}")
    return folder


def talk(capsys, monkeypatch, *arguments, lines=""):
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code.main([*map(str, arguments), "--device", "cpu"])
    return capsys.readouterr().out


def test_an_answer_is_generates(talker, capsys, monkeypatch):
    model, tokenizer = load_with_tokenizer(talker)
    ids = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": "copy: f k ="}]),
                           bos=False)
    new = generate(model, torch.tensor([ids]), max_new_tokens=12)[0, len(ids):].tolist()
    said = tokenizer.decode([i for i in new if i not in model.config.eos_ids])
    out = talk(capsys, monkeypatch, talker, "--prompt", "copy: f k =", "--max-new-tokens", 12)
    assert out.startswith(said + f"\n[{len(ids)} tokens read in ") and "a second; cache" in out
    assert f"{len(new)} written" in out and f"MB for {len(ids) + len(new) - 1} tokens]" in out


@pytest.mark.parametrize("raw", [False, True])
def test_a_conversation_is_read_once(talker, capsys, monkeypatch, raw):
    """Every prompt reads its own tokens only, and the answers are those to the whole text."""
    read, history, stream = [], [], code.stream

    def watched(model, tokens, *, cache, **options):
        history.extend(tokens[0].tolist())
        read.append(tokens.shape[1])
        whole = [int(i) for i in stream(model, torch.tensor([history]), **options)]
        new = [i for i in stream(model, tokens, cache=cache, **options)]
        assert [int(i) for i in new] == whole
        history.extend(whole[:-1])
        return new

    monkeypatch.setattr(code, "stream", watched)
    options = ["--raw"] * raw + ["--max-new-tokens", 7]
    out = talk(capsys, monkeypatch, talker, *options, lines="sort: d a c =\nand again\nonce more\n")
    assert "read again" not in out and len(read) == 3 and max(read) < 40
    assert f"for {len(history)} tokens]" in out


def test_a_template_that_rewrites_is_said_and_read_again(talker, tmp_path, capsys, monkeypatch):
    shutil.copytree(talker, tmp_path / "m")
    (tmp_path / "m/chat_template.jinja").write_text(
        "{{ messages | length }}{% for m in messages %} {{ m.content }}{% endfor %}")
    out = talk(capsys, monkeypatch, tmp_path / "m", "--max-new-tokens", 3, lines="one\ntwo\n")
    assert out.count("(the chat template rewrote what was said: all is read again)") == 1


def test_an_empty_line_ends_no_raw_conversation(talker, capsys, monkeypatch):
    monkeypatch.setattr(code, "stream", lambda model, *_, **__: iter(
        torch.tensor([model.config.eos_ids[:1]])))
    out = talk(capsys, monkeypatch, talker, "--raw", lines="one\n\ntwo\n")
    assert out.count("tokens read in") == 2 and out.count("(nothing to read)") == 1


def test_an_answer_cut_inside_a_character_is_read_whole_by_the_next_turn(
        talker, capsys, monkeypatch):
    emoji = load_with_tokenizer(talker)[1].encode("😀", bos=False)
    read = []

    def two_bytes(model, tokens, **options):
        read.append(tokens.shape[1])
        options["cache"].position += 1  # as if it had read something
        yield from torch.tensor(emoji[:2])[:, None]

    assert len(emoji) == 4
    monkeypatch.setattr(code, "stream", two_bytes)
    talk(capsys, monkeypatch, talker, "--raw", lines="one\ntwo\n")
    assert read[1] > read[0] + 2  # "one", what was said of the character, "two"


def test_bos_is_read_once(tmp_path, capsys, monkeypatch):
    read = []

    def silent(model, tokens, **options):
        read.append(tokens[0].tolist())
        yield torch.tensor(model.config.eos_ids[:1])

    monkeypatch.setattr(code, "stream", silent)
    talk(capsys, monkeypatch, TEACHER, lines="\none\n")
    bos = load_with_tokenizer(TEACHER)[1].bos_id
    assert read[0] == [bos] and bos not in read[1]


def test_without_a_template_it_continues_text_and_says_so(capsys, monkeypatch):
    out = talk(capsys, monkeypatch, TEACHER, "--prompt", "a", "--max-new-tokens", 2)
    assert out.startswith("(no chat template in this folder: plain continuation")


def test_faults_are_one_sentence_and_exit_2(tmp_path, capsys):
    for arguments, words in (([tmp_path], "config.json does not exist"),
                             ([TEACHER, "--prompt", "x", "--top-p", "0"], "top_p"),
                             ([TEACHER, "--prompt", "x", "--device", "mps"], "--device mps"),
                             ([TEACHER, "--prompt", "x", "--max-new-tokens", "0"], "from 1 to"),
                             ([TEACHER, "--prompt", "x", "--max-new-tokens", "1" + "0" * 12],
                              "out of memory: shorter texts and fewer new")):
        with pytest.raises(SystemExit) as left:
            code.run_command(functools.partial(code.main, [*map(str, arguments)]))
        assert left.value.code == 2 and words in capsys.readouterr().err

    def full():
        raise MemoryError  # as Python's own allocator raises it, without a word

    with pytest.raises(SystemExit) as left:
        code.run_command(full, "buy more")
    assert left.value.code == 2 and capsys.readouterr().err == "error: out of memory: buy more\n"


def test_a_terminal_of_another_encoding_ends_no_conversation(talker):
    done = subprocess.run([sys.executable, code.__file__, str(talker), "--max-new-tokens", "2"],
                          input="ü 你\n".encode(), capture_output=True,
                          env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
                               "PATH": "/usr/bin"})
    assert done.returncode == 0, done.stderr
