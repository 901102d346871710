"""History under the chat templates of real families: generated tokens stay, breaks are found and told."""

import datetime
import re

import pytest
import templates
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from radixgen import InvalidRequest, Limits, PromptTooLong
from radixgen.chat.history import ChatHistory, Draft, HistoryMode
from radixgen.core import CompletionOutput
from radixgen.text.chat_template import ChatTemplate, as_messages

TOOL = {
    "type": "function",
    "function": {"name": "the", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}},
}
USER = {"role": "user", "content": "hi there"}
ANSWERS = {"mistral": " the rain"}
STRIPPED = {
    "qwen3": ("<think>\nin the\n</think>\n\nthe rain", "<think>\nin the\n</think>\n\nthe rain", "the rain"),
    "deepseek-r1": ("in the\n</think>\n\nthe rain", "<think>\nin the\n</think>\n\nthe rain", "\n\nthe rain"),
    "harmony": (
        "<|channel|>analysis<|message|>in the<|end|><|start|>assistant<|channel|>final<|message|>the rain",
        "analysis<|message|>in the<|end|><|start|>assistant<|channel|>final<|message|>the rain",
        "final<|message|>the rain<|end|>",
    ),
}
"""What the model says, and how history and template go on from where they part."""


def history(
    name: str, *, mode: HistoryMode = "template", tools: list | None = None, system: bool = True, **options: object
) -> ChatHistory:
    family = templates.FAMILIES[name]
    template = ChatTemplate(templates.tokenizer(family), tools, options)
    first = [{"role": "system", "content": "Be kind."}] if family.system and system else []
    return ChatHistory(template, as_messages("system", first, Limits()), mode)


def spell(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """`text` one byte a token, but for added tokens: not its own tokenization."""
    added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    ids = []
    for piece in re.split(f"({'|'.join(map(re.escape, added))})", text):
        if piece in added:
            ids.append(tokenizer.convert_tokens_to_ids(piece))
        else:
            ids += [token for one in piece for token in tokenizer(one, add_special_tokens=False)["input_ids"]]
    return ids


def take(talk: ChatHistory, draft: Draft, output: CompletionOutput, *, include_stop: bool = False) -> None:
    """The answer of a model that may end with any of the tokenizer's added tokens."""
    ends = set(talk.template.tokenizer.get_added_vocab().values())
    talk.answer(draft, output, ends, include_stop=include_stop)


def reply(talk: ChatHistory, text: str, end: str | None = None, said: object = USER) -> list[int]:
    """One turn: `said`, and `text` spelled out as the answer, ended by the token `end` or by its length. Returns the
    prompt.
    """
    tokenizer = talk.template.tokenizer
    draft = talk.draft(as_messages("message", said, Limits()))
    ids = spell(tokenizer, text)
    plain = tokenizer.decode(ids, skip_special_tokens=True)
    if end is not None:
        ids.append(tokenizer.convert_tokens_to_ids(end))
    take(talk, draft, CompletionOutput(0, plain, ids, "length" if end is None else "stop"))
    return draft.token_ids


def written(talk: ChatHistory, token_ids: list[int]) -> str:
    return talk.template.tokenizer.decode(token_ids)


def test_spelling_is_no_tokenization() -> None:
    """Otherwise nothing here could tell kept tokens from tokens that were made anew."""
    tokenizer = templates.tokenizer(templates.FAMILIES["smollm2"])
    assert spell(tokenizer, "the rain") != tokenizer("the rain")["input_ids"]
    assert tokenizer.decode(spell(tokenizer, "<|im_start|>the rain")) == "<|im_start|>the rain"


# -- exactness --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["template", "exact"])
@pytest.mark.parametrize("ended", [True, False], ids=["stop", "length"])
@pytest.mark.parametrize("name", sorted(templates.FAMILIES.keys() - {"deepseek-r1", "harmony"}))
def test_generated_tokens_are_kept(name: str, ended: bool, mode: HistoryMode) -> None:
    """Answers that no template rewrites. That of two families never writes its own generation prompt again."""
    talk = history(name, mode=mode)
    family, answer = templates.FAMILIES[name], ANSWERS.get(name, "the rain")
    for _ in range(4):
        before = talk.state.token_ids
        prompt = reply(talk, answer, family.end if ended else None)
        draft = talk.draft((USER,))
        assert prompt[: len(before)] == before
        assert draft.history_break is None
        assert written(talk, draft.token_ids) == draft.text == talk.template.render(draft.messages)
    kept, tokenizer = talk.state.token_ids, talk.template.tokenizer
    assert draft.token_ids[: len(kept)] == kept
    assert draft.token_ids != tokenizer(draft.text, add_special_tokens=False)["input_ids"]
    assert spell(tokenizer, answer) == list(talk.state.exchanges[1].answer_ids)


@pytest.mark.parametrize("name", templates.FAMILIES)
def test_a_first_prompt_is_the_templates_own_tokenization(name: str) -> None:
    talk = history(name)
    messages = [*talk.state.messages, USER]
    own = talk.template.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert talk.draft((USER,)).token_ids == own


def test_another_end_of_turn_gives_way_to_the_templates() -> None:
    talk = history("smollm2")
    reply(talk, "the rain", "<|im_start|>")
    draft = talk.draft((USER,))
    assert draft.history_break is None and written(talk, draft.token_ids) == draft.text
    assert draft.token_ids[: len(talk.state.token_ids) - 1] == talk.state.token_ids[:-1]


def test_an_answer_without_a_token_of_its_own() -> None:
    talk = history("smollm2")
    reply(talk, "", "<|im_end|>")
    draft = talk.draft((USER,))
    assert draft.history_break is None and written(talk, draft.token_ids) == draft.text
    assert draft.token_ids[: len(talk.state.token_ids)] == talk.state.token_ids


@pytest.mark.parametrize(("text", "include", "kept"), [("the r", False, 5), ("the rain", True, 8), ("the", False, 3)])
def test_a_stop_string_is_cut_off(text: str, include: bool, kept: int) -> None:
    talk = history("smollm2")
    draft = talk.draft((USER,))
    ids = spell(talk.template.tokenizer, "the rain")
    take(talk, draft, CompletionOutput(0, text, ids, "stop", "ain"), include_stop=include)
    after = talk.draft((USER,))
    assert after.history_break is None and written(talk, after.token_ids) == after.text == talk.template.render(
        after.messages
    )
    assert talk.state.token_ids == draft.token_ids + ids[:kept] == after.token_ids[: len(draft.token_ids) + kept]


def test_a_stop_string_that_begins_inside_a_token() -> None:
    talk = history("smollm2")
    draft, tokenizer = talk.draft((USER,)), talk.template.tokenizer
    ids = tokenizer("in the rain")["input_ids"]
    assert tokenizer.decode(ids[2:3]) == "the"
    take(talk, draft, CompletionOutput(0, "in t", ids[:3], "stop", "he"))
    after = talk.draft((USER,))
    assert after.history_break is None and written(talk, after.token_ids) == after.text
    assert after.token_ids[: len(draft.token_ids) + 2] == draft.token_ids + ids[:2]


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_with_text(include: bool) -> None:
    talk = history("smollm2")
    draft = talk.draft((USER,))
    ids = spell(talk.template.tokenizer, "the rain\n")
    text = "the rain\n" if include else "the rain"
    take(talk, draft, CompletionOutput(0, text, ids, "stop", ids[-1]), include_stop=include)
    after = talk.draft((USER,))
    assert after.history_break is None and written(talk, after.token_ids) == after.text
    kept = ids if include else ids[:-1]
    assert after.token_ids[: len(draft.token_ids) + len(kept)] == draft.token_ids + kept


@pytest.mark.parametrize("mode", ["template", "exact"])
def test_an_answer_that_its_grammar_ended_has_no_end_token(mode: HistoryMode) -> None:
    talk = history("smollm2", mode=mode)
    draft = talk.draft((USER,))
    ids = spell(talk.template.tokenizer, '{"k":1}')
    take(talk, draft, CompletionOutput(0, '{"k":1}', ids, "stop"))
    assert talk.state.token_ids == draft.token_ids + ids
    after = talk.draft((USER,))
    assert after.history_break is None and written(talk, after.token_ids) == after.text == talk.template.render(
        after.messages
    )
    assert after.token_ids[: len(draft.token_ids) + len(ids)] == draft.token_ids + ids


@pytest.mark.parametrize("end", [None, "<|im_end|>"])
def test_half_a_character_is_kept_though_no_text_holds_it(end: str | None) -> None:
    talk = history("smollm2")
    draft, tokenizer = talk.draft((USER,)), talk.template.tokenizer
    ids = spell(tokenizer, "the é")[:-1]
    ends = [] if end is None else [tokenizer.convert_tokens_to_ids(end)]
    take(talk, draft, CompletionOutput(0, "the ", ids + ends, "stop" if ends else "length"))
    after = talk.draft((USER,))
    assert after.history_break is None and after.text == talk.template.render(after.messages)
    assert after.token_ids[: len(draft.token_ids) + len(ids)] == draft.token_ids + ids


def test_text_is_tokenized_as_it_follows() -> None:
    """Pins that a tokenizer which puts a space in front of every text does not do so in the middle of one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    characters = ["<unk>", *"▁abcdefghijklmnopqrstuvwxyz:;"]
    plain = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[], unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    plain.decoder = decoders.Metaspace(prepend_scheme="always")
    made = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m.role[0] + ':' + m.content + ';' }}{% endfor %}a:",
    )
    talk = ChatHistory(ChatTemplate(made))
    draft = talk.draft(({"role": "user", "content": "hi"},))
    assert made.convert_ids_to_tokens(draft.token_ids) == [*"▁u:hi;a:"]
    ids = made.convert_tokens_to_ids([*"yes▁so"])
    take(talk, draft, CompletionOutput(0, "yes so", ids, "length"))
    after = talk.draft(({"role": "user", "content": "ok"},))
    assert after.history_break is None
    assert made.convert_ids_to_tokens(after.token_ids) == [*"▁u:hi;a:yes▁so;u:ok;a:"]


# -- breaks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["template", "exact"])
@pytest.mark.parametrize("name", STRIPPED)
def test_thinking_that_a_template_drops(name: str, mode: HistoryMode) -> None:
    answer, before, after = STRIPPED[name]
    family = templates.FAMILIES[name]
    talk = history(name, mode=mode)
    for turn in range(2, 5):
        reply(talk, answer, family.end)
        kept, draft = talk.state.token_ids[:-1], talk.draft((USER,))
        found = draft.history_break
        assert found is not None and (found.turn, found.followed) == (turn, mode == "template")
        assert found.before == before and found.after.startswith(after)
        own = draft.token_ids
        assert draft.text == talk.template.render(draft.messages)
        generated = spell(talk.template.tokenizer, "the rain")
        if mode == "template":
            assert written(talk, own) == draft.text
            assert own[: found.position] == kept[: found.position] and own[found.position] != kept[found.position]
            assert written(talk, kept[found.position :]) in (before, before.removeprefix("analysis"))
            ids = own[found.position :]
            assert any(ids[i : i + len(generated)] == generated for i in range(len(ids))), "the answer was tokenized"
        else:
            assert draft.token_ids[: len(kept)] == kept
            rest = written(talk, draft.token_ids[len(kept) :])
            assert draft.text.endswith(rest) and rest.startswith((family.end, "<|end|>"))


def test_a_thinking_prompt_that_is_not_written_of_earlier_turns() -> None:
    """Qwen3 without thinking writes an empty thought before the answer, and none before an earlier one."""
    talk = history("qwen3", enable_thinking=False)
    prompt = reply(talk, "the rain", "<|im_end|>")
    draft = talk.draft((USER,))
    assert draft.history_break is not None and draft.history_break.before.startswith("<think>\n\n</think>\n\nthe rain")
    assert draft.history_break.position == len(prompt) - 6 and written(talk, draft.token_ids) == draft.text


@pytest.mark.parametrize("mode", ["template", "exact"])
def test_a_date_that_changes_at_midnight(monkeypatch: pytest.MonkeyPatch, mode: HistoryMode) -> None:
    class Calendar:
        day = 25

        @classmethod
        def now(cls) -> datetime.datetime:
            return datetime.datetime(2026, 11, cls.day)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Calendar)
    talk = history("llama3", mode=mode)
    for _ in range(3):
        reply(talk, "the rain", "<|eot_id|>")
    assert talk.draft((USER,)).history_break is None
    kept = talk.state.token_ids
    Calendar.day = 26
    draft = talk.draft((USER,))
    found = draft.history_break
    assert found is not None and found.before.startswith("5 Nov 2026\n\nBe kind") and found.after.startswith("6 Nov")
    assert written(talk, kept[: found.position]).endswith("Today Date: 2")
    if mode == "exact":
        assert draft.token_ids[: len(kept)] == kept
    else:
        changed = [i for i, (a, b) in enumerate(zip(kept, draft.token_ids, strict=False)) if a != b]
        assert changed == [found.position], "all but one token stays, generated ones among them"
    reply(talk, "the rain", "<|eot_id|>")
    assert talk.draft((USER,)).history_break is None, "reported once"


def test_a_date_that_is_fixed_never_breaks() -> None:
    talk = history("llama3", date_string="26 Jul 2024")
    assert "26 Jul 2024" in talk.draft((USER,)).text


@pytest.mark.parametrize(("answer", "position"), [("the rain \n", 8), (" the rain", 0)])
def test_spaces_that_a_template_trims(answer: str, position: int) -> None:
    talk = history("llama3", date_string="today")
    prompt = reply(talk, answer, "<|eot_id|>")
    draft = talk.draft((USER,))
    assert draft.history_break is not None and draft.history_break.position == len(prompt) + position
    assert written(talk, draft.token_ids) == draft.text
    generated = spell(talk.template.tokenizer, "the rain")
    assert draft.token_ids[len(prompt) : len(prompt) + 8] == generated


def test_consecutive_roles_that_a_template_merges() -> None:
    family = templates.Family(templates.MERGING, ("<user>", "<assistant>", "<end>"), "<end>")
    talk = ChatHistory(ChatTemplate(templates.tokenizer(family)))
    reply(talk, "the rain", "<end>")
    draft = talk.draft(({"role": "assistant", "content": "in Spain"},))
    assert draft.history_break is None or draft.history_break.followed
    assert written(talk, draft.token_ids) == draft.text == talk.template.render(draft.messages)
    again = talk.draft((USER, USER))
    assert again.history_break is None and again.token_ids[: len(talk.state.token_ids)] == talk.state.token_ids


def test_a_tool_call_that_is_written_otherwise() -> None:
    call = '<tool_call>\n{"name": "the", "arguments": {"n":1}}\n</tool_call>'
    talk = history("qwen2.5", tools=[TOOL])
    prompt = reply(talk, call, "<|im_end|>")
    message = talk.state.messages[-1]
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "the", "arguments": {"n": 1}}}]
    result = {"role": "tool", "content": "3"}
    draft = talk.draft((result,))
    assert draft.history_break is not None and draft.history_break.before.startswith("1}}\n</tool_call>")
    assert draft.history_break.after.startswith(" 1}}\n</tool_call>")
    assert prompt == draft.token_ids[: len(prompt)] and written(talk, draft.token_ids) == draft.text


@pytest.mark.parametrize("content", ["", "in the rain\n"])
def test_a_tool_call_as_the_template_writes_it(content: str) -> None:
    call = content + '<tool_call>\n{"name": "the", "arguments": {"n": 1}}\n</tool_call>'
    talk = history("qwen2.5", tools=[TOOL])
    reply(talk, call, "<|im_end|>")
    assert talk.state.messages[-1].get("content", "") == content.strip()
    draft = talk.draft(({"role": "tool", "content": "3"},))
    kept = talk.state.token_ids
    assert draft.history_break is None and draft.token_ids[: len(kept)] == kept


def test_reasoning_is_parsed() -> None:
    talk = history("harmony")
    reply(talk, STRIPPED["harmony"][0], "<|return|>")
    assert talk.state.messages[-1] == {"role": "assistant", "reasoning_content": "in the", "content": "the rain"}


def test_an_answer_that_cannot_be_parsed_is_text(caplog: pytest.LogCaptureFixture) -> None:
    talk = history("qwen2.5", tools=[TOOL])
    reply(talk, "<tool_call>\n{the\n</tool_call>", "<|im_end|>")
    assert talk.state.messages[-1] == {"role": "assistant", "content": "<tool_call>\n{the\n</tool_call>"}
    assert "could not be parsed" in caplog.text


def test_a_template_that_shows_no_answers_is_followed() -> None:
    """Where nothing tells how an answer stands in the render, even an exact history is what the template writes."""
    family = templates.Family(
        "{{ messages | length }}{% for m in messages %}{{ m.role + m.content[:3] }}{% endfor %}:", (), "a"
    )
    for mode in ("template", "exact"):
        talk = ChatHistory(ChatTemplate(templates.tokenizer(family)), mode=mode)
        reply(talk, "the rain")
        draft = talk.draft((USER,))
        assert draft.history_break is not None and draft.history_break.followed and draft.history_break.position == 0
        assert (
            written(talk, draft.token_ids)
            == draft.text
            == "3userhi assistantheuserhi :".replace("antheuser", "anttheuser")
        )


# -- bounds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_what_a_template_refuses_changes_nothing(name: str) -> None:
    talk = history(name)
    reply(talk, "the rain", templates.FAMILIES[name].end)
    before = talk.state
    with pytest.raises(InvalidRequest, match="alternate"):
        talk.draft(({"role": "assistant", "content": "no"},))
    assert talk.state is before


def test_states_share_what_does_not_change() -> None:
    talk = history("smollm2")
    for turn in range(4):
        reply(talk, f"the rain {turn}", "<|im_end|>")
    first, *rest = talk.state.exchanges
    fewer = talk.state.messages[:1] + talk.state.messages[3:]
    whole, shortened = talk.redraft(talk.state.messages).exchanges, talk.redraft(fewer).exchanges
    assert all(one is other for one, other in zip(whole, (first, *rest), strict=True))
    assert [one.at for one in shortened] == [one.at - 2 for one in rest]
    assert all(one.answer_ids is other.answer_ids for one, other in zip(shortened, rest, strict=True))


def test_sizes_are_bounded() -> None:
    family = templates.FAMILIES["smollm2"]
    small = Limits(max_prompt_chars=200, max_messages=3, max_tools=1)
    talk = ChatHistory(ChatTemplate(templates.tokenizer(family), limits=small))
    with pytest.raises(PromptTooLong):
        talk.draft(({"role": "user", "content": "x" * 150},))
    with pytest.raises(PromptTooLong):
        as_messages("message", "x" * 201, small)
    with pytest.raises(InvalidRequest, match="at most 3"):
        as_messages("message", [USER] * 4, small)
    with pytest.raises(InvalidRequest, match="at most 3"):
        talk.add((USER,) * 4)
    with pytest.raises(InvalidRequest, match="at most 3"):
        talk.draft((USER,) * 3)
    with pytest.raises(InvalidRequest, match="at most 1"):
        ChatTemplate(templates.tokenizer(family), [TOOL, TOOL], limits=small)


@given(
    st.sampled_from(sorted(templates.FAMILIES)),
    st.lists(
        st.tuples(st.text("the rain\n <>/", max_size=6), st.sampled_from([True, False]), st.booleans()), max_size=5
    ),
    st.sampled_from(["template", "exact"]),
)
@settings(max_examples=60, deadline=None)
def test_any_answers(name: str, answers: list[tuple[str, bool, bool]], mode: HistoryMode) -> None:
    """The render is always the template's; what stood before a break stays; without one everything does."""
    talk = history(name, mode=mode)
    family = templates.FAMILIES[name]
    for text, ended, thinks in answers:
        thought = {"qwen3": f"<think>\n{text}\n</think>\n\n", "deepseek-r1": f"{text}</think>"}.get(name, "")
        reply(talk, (thought if thinks else "") + text, family.end if ended else None)
        draft, kept = talk.draft((USER,)), talk.state.token_ids
        kept = kept[:-1] if talk.state.end is not None else kept
        assert draft.text == talk.template.render(draft.messages)
        if draft.history_break is None or not draft.history_break.followed:
            assert draft.token_ids[: len(kept)] == kept
        else:
            assert draft.token_ids[: draft.history_break.position] == kept[: draft.history_break.position]
        if mode == "template":
            assert written(talk, draft.token_ids) == draft.text


@pytest.mark.parametrize("name", templates.FAMILIES)
def test_tokens_are_counted_as_by_decoding_each_prefix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters of several tokens may lie on the end of a block."""
    template = ChatTemplate(templates.tokenizer(templates.FAMILIES[name]))
    text = "the r\u00e9\u6f22\u6f22 rain\n in the\u00e9" * 3
    ids = spell(template.tokenizer, text)
    lengths = [0, 1, 7, 7, 9, 23, len(text) - 1, len(text), len(text) + 5]
    sizes = [len(template.text(ids[:count])) for count in range(len(ids) + 1)]
    wanted = [max(count for count, size in enumerate(sizes) if size <= most) if most else 0 for most in lengths]
    for block in (1, 2, 3, 5, 256):
        monkeypatch.setattr("radixgen.text.chat_template._BLOCK", block)
        assert template.count_tokens(ids, lengths) == wanted
        assert template.count_tokens(ids, lengths[:2]) == wanted[:2]
