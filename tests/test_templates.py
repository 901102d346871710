"""What callers may give to a chat template, and what a template may take of the server."""

import inspect
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import templates
from transformers import PreTrainedTokenizerBase

from radixgen import EngineClosed, InvalidRequest
from radixgen.core import PromptTooLong
from radixgen.engine.input_processor import through_template
from radixgen.serve.http import template_process
from radixgen.serve.http.templates import TemplateRenderer
from radixgen.text.chat_template import ChatTemplate
from radixgen.text.template_variables import template_variables

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": []}]
QWEN3 = templates.tokenizer(templates.FAMILIES["qwen3"])


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    one = TemplateRenderer(QWEN3, 100_000)
    one.start()
    yield one
    one.close()


def with_template(text: str | dict[str, str]) -> Any:
    made = templates.tokenizer(templates.FAMILIES["qwen3"])
    made.chat_template = text
    return made


def test_variables_of_a_template() -> None:
    text = (
        "{% if date is not defined %}{% set date = strftime_now('%d') %}{% endif %}{{ date }}"
        "{% for m in messages %}{% generation %}{{ m.role + other.name | trim }}{% break %}"
        "{% endgeneration %}{% endfor %}"
    )
    assert template_variables(text) == {"date", "strftime_now", "messages", "other"}
    assert template_variables({"default": "{{ a }}", "tool_use": "{{ b }}"}) == {"a", "b"}
    assert template_variables("{% if %}") == frozenset()


def test_an_option_of_the_template_has_its_effect() -> None:
    plain = ChatTemplate(QWEN3).render(HI[:1])
    assert ChatTemplate(QWEN3, options={"enable_thinking": False}).render(HI[:1]) != plain


@pytest.mark.parametrize(
    "name",
    [
        *sorted(set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"kwargs"}),
        "messages", "conversations", "loop", "range", "raise_exception", "bos_token", "unknown", "",
    ],
)  # fmt: skip
def test_nothing_else_is_taken(name: str) -> None:
    """Not even where the template reads it."""
    made = with_template("{{ messages[0].content ~ bos_token ~ documents ~ chat_template ~ loop ~ padding ~ self }}")
    with pytest.raises(InvalidRequest, match="must be a variable of the chat template") as refused:
        ChatTemplate(made, options={name: 1})
    assert refused.value.field == f"template_options.{name}"


@pytest.mark.parametrize("family", sorted(templates.FAMILIES))
def test_a_process_renders_what_transformers_renders(family: str, renderer: TemplateRenderer) -> None:
    tokenizer = templates.tokenizer(templates.FAMILIES[family])
    for messages in (HI[:1], [*HI[:1], {"role": "assistant", "content": "é\ud800", "name": None}, *HI[:1]]):
        assert renderer(tokenizer, messages, tools=None) == through_template(tokenizer, messages, tokenize=False)


def test_options_and_tools_go_to_the_process(renderer: TemplateRenderer) -> None:
    made = with_template({"default": "{{ mood }}{{ bos_token }}", "tool_use": "{{ tools[0].name }}"})
    made.add_special_tokens({"bos_token": "<s>"})
    assert ChatTemplate(made, options={"mood": "é"}, render=renderer).render(HI) == "é<s>"
    assert ChatTemplate(made, [{"name": "clock"}], render=renderer).render(HI) == "clock"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('no such role') }}", "refuses them: no such role"),
        ("{{ messages[9].content.x }}", "refuses them"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{{ 'a'.ljust(90000000000) }}", "MemoryError"),
        ("{% if %}", "refuses them"),
    ],
)
def test_what_a_template_raises_is_the_callers(text: str, says: str, renderer: TemplateRenderer) -> None:
    with pytest.raises(InvalidRequest, match=says):
        renderer(with_template(text), HI, tools=None)
    if "ljust" not in text:
        with pytest.raises(InvalidRequest, match="refuses them"):
            through_template(with_template(text), HI, tokenize=False)


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{{ 10 ** 999999999 }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_a_template_that_runs_on_is_ended(
    text: str, renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own processor time; the process renders for others as before."""
    with pytest.raises(InvalidRequest, match="takes more than 2 s or 512 MiB"):
        renderer(with_template(text), HI, tools=None)
    assert renderer(QWEN3, HI[:1], tools=None)


def test_a_long_text_stays_there(renderer: TemplateRenderer) -> None:
    with pytest.raises(PromptTooLong, match="at most 100000 characters"):
        renderer(with_template("{{ 'a' * 20000000 }}"), HI, tools=None)


def test_another_process_begins_where_one_has_ended() -> None:
    renderer = TemplateRenderer(QWEN3, 1 << 22)
    expected = renderer(QWEN3, HI[:1], tools=None)
    assert renderer._process is not None
    os.kill(renderer._process.pid, signal.SIGKILL)
    renderer._process.wait()
    assert renderer(QWEN3, HI[:1], tools=None) == expected
    renderer.close()
    renderer.close()
    with pytest.raises(EngineClosed):
        renderer(QWEN3, HI[:1], tools=None)


def test_a_renderer_of_its_own_stays_here(renderer: TemplateRenderer) -> None:
    made = with_template("{{ 1 }}")

    class Own(type(made)):  # type: ignore[misc]
        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            return str(os.getpid())

    made.__class__ = Own
    assert renderer(made, HI, tools=None) == str(os.getpid())


def test_the_process_says_what_is_wrong_with_its_bounds_only() -> None:
    answer = template_process._render("{{ x }}", HI[:1], None, {"x": "abc"}, 2)
    assert answer == {"length": 3}
