"""Conversations: templates in transformers' manner, and a cache that runs no token twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import bitskip_cpu
from bitskip.program import main
from bitskip_cpu.chat import Chat, chat_ids, render
from bitskip_cpu.generation_options import GenerationOptions
from bitskip_ref.folder import ChatForm, read_folder
from tests.cli.conftest import CONFIG, write_model

TEMPLATE = """\
{%- for m in messages %}
    {%- if m.role == 'system' and loop.index > 1 %}{{ raise_exception('system comes first') }}
    {%- endif %}
    {{- m.role ~ ': ' ~ m.content | trim ~ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}
"""
FORM = ChatForm(TEMPLATE, "<s>", "</s>")
OPTIONS = GenerationOptions(max_tokens=6)
LONG = CONFIG.replace(max_position_embeddings=512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("chat") / "m", LONG, chat=FORM)


def run(*arguments: object, typed: str = "") -> Result:
    return CliRunner().invoke(main, ["chat", *map(str, arguments)], input=typed)


def test_templates_are_rendered_as_transformers_does() -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    template = (
        "{{ bos_token }}\n  {% for m in messages %}\n{% if m.role == 'tool' %}{% continue %}"
        "{% endif %}\n<|{{ m['role'] }}|>{{ m['content'] | tojson }}{{ eos_token }}\n"
        "  {% endfor %}\n{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>"
    )
    theirs.chat_template = template
    messages = [
        {"role": "system", "content": "Be <b>brief</b> & 'kind'"},
        {"role": "tool", "content": "no"}, {"role": "user", "content": "ça\nva?"},
    ]  # fmt: skip
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert render(ChatForm(template, "<s>", "</s>"), messages) == expected


@pytest.mark.parametrize(("template", "words"), [
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{{ raise_exception('no system here') }}", "no system here"),
    ("{% if %}", "chat template"),
    ("{{ messages[0].x.y }}", "no attribute"),
    ("{{ 1 / 0 }}", "division"),
    ("{{ 'abcdef' | truncate(1) }}", "expected length"),
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "steps"),
    ("{% for a in range(9999) %}{{ 'x' * 99999 }}{% endfor %}", "writes more than"),
])  # fmt: skip
def test_a_bad_template_is_one_line(template: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        render(ChatForm(template), [{"role": "user", "content": "hi"}])
    assert "\n" not in str(caught.value)


def test_what_a_message_spells_is_text(folder: Path) -> None:
    tokenizer = bitskip_cpu.load(folder).tokenizer
    special = next(iter(tokenizer.special_tokens))
    id_ = tokenizer.token_id(special)
    form = ChatForm(TEMPLATE.replace("'\\n'", f"'{special}'"), "<s>", "</s>")
    plain = [{"role": "user", "content": "Hello, you"}]
    asked = [{"role": "user", "content": f"Hello{special}, {special}you"}]
    assert chat_ids(tokenizer, form, plain) == tokenizer.encode(render(form, plain), special=True)
    assert tokenizer.encode(render(form, asked), special=True).count(id_) == 3  # the way in
    ids = chat_ids(tokenizer, form, asked)
    assert ids.count(id_) == 1  # the template's own
    shown = tokenizer.decode(ids)
    assert f"Hello{special}, {special}you" in shown


def test_no_token_is_run_twice_and_the_text_is_the_same(folder: Path) -> None:
    model = bitskip_cpu.load(folder)
    talk = Chat(model, "Be brief.")
    for question in ("Hello", "And then?", "Why?"):
        stream = talk.ask(question, OPTIONS)
        for _ in stream:
            pass
        answer = talk.keep(stream)
        fresh = Chat(model)
        fresh.messages = list(talk.messages[:-2])
        other = fresh.ask(question, OPTIONS)
        assert "".join(piece.text for piece in other) == answer and fresh.reused == 0
        whole = model.tokenizer.encode(render(FORM, talk.messages[:-1]), special=True)
        if question != "Hello":
            assert talk.reused > len(whole) // 2
        assert stream.generation().prompt_tokens == len(whole) - talk.reused


def test_a_broken_off_answer_stays_in_the_conversation(folder: Path) -> None:
    talk = Chat(bitskip_cpu.load(folder))
    stream = talk.ask("Hello", OPTIONS.replace(max_tokens=40))
    for count, _ in enumerate(stream):
        if count == 2:
            break
    stream.finish()
    said = talk.keep(stream)
    assert talk.messages[-1] == {"role": "assistant", "content": said}
    follow = talk.ask("Go on", OPTIONS)
    assert talk.reused > 0
    fresh = Chat(talk.model)
    fresh.messages = list(talk.messages[:-1])
    assert [p.text for p in fresh.ask("Go on", OPTIONS)] == [p.text for p in follow]


def test_what_nobody_read_is_not_taken_for_run(folder: Path) -> None:
    talk = Chat(bitskip_cpu.load(folder))
    talk.ask("Hello", OPTIONS)
    again = talk.ask("Hello", OPTIONS)
    fresh = Chat(talk.model)
    fresh.messages = list(talk.messages[:-1])
    assert [p.text for p in fresh.ask("Hello", OPTIONS)] == [p.text for p in again]
    assert talk.reused == 0


def test_a_prompt_that_does_not_fit_changes_nothing(folder: Path) -> None:
    talk = Chat(bitskip_cpu.load(folder))
    with pytest.raises(ValueError, match="context"):
        talk.ask("word " * 4000, OPTIONS)
    assert talk.messages == []
    assert "".join(p.text for p in talk.ask("Hello", OPTIONS)) == "".join(
        p.text for p in Chat(talk.model).ask("Hello", OPTIONS)
    )


def test_the_verb(folder: Path) -> None:
    typed = (
        'Hello\\\nthere\n/exit 2\n"""\nmany\n/lines\n"""\n/exit 99\n/foo\n/clear\nHello\n/quit\nx'
    )
    result = run(folder, "-n", 5, typed=typed + "/quit\nx")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("[5 tokens")]
    assert len(lines) == 3 and "exit layer 2 of" in lines[1]
    assert "exit layer 99 is out of range" in result.stderr and "no command /foo" in result.stderr
    quiet = run(folder, "-n", 5, "-q", typed="Hello\n")
    assert quiet.exit_code == 0 and quiet.stderr == "" and quiet.stdout


def test_ctrl_c_stops_the_answer_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitskip_cpu.generate import TextStream

    whole, times = TextStream.__iter__, []

    def broken(self: TextStream) -> object:
        for piece in whole(self):
            yield piece
            times.append(piece)
            if len(times) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(TextStream, "__iter__", broken)
    result = run(folder, "-n", 5, typed="Hello\nAnd?\n")
    assert result.exit_code == 0, result.output
    counts = [line.split()[0] for line in result.stderr.splitlines() if line.startswith("[")]
    assert counts == ["[2", "[5"]


def test_a_model_without_a_template_is_refused(tmp_path: Path) -> None:
    result = run(write_model(tmp_path / "m"), typed="Hello\n")
    assert result.exit_code == 1 and "no chat_template.jinja" in result.stderr


def test_each_of_several_ids_ends_a_text(tmp_path: Path) -> None:
    plain = bitskip_cpu.load(write_model(tmp_path / "a", eos_token_id=None))
    ids = plain.generate("Hello", max_tokens=12).token_ids
    late = next(i for i in ids if ids.index(i) >= 3)
    path = write_model(tmp_path / "b", eos_token_id=[300, late], chat=FORM)
    read = read_folder(path)
    assert read.end_ids == (300, late) and read.eos_token_id == 300 and read.chat == FORM
    for options in ({}, {"speculate": 2}):
        told = bitskip_cpu.load(path).generate("Hello", max_tokens=12, **options)
        assert told.token_ids == ids[: ids.index(late)] and told.stop_reason == "end_of_text"
