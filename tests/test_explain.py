"""`radixgen explain`: pieces against whole prompts, each kind of divergence on a small log, counts against the tree."""

import json
import random
import uuid
from collections.abc import Callable
from pathlib import Path

import families
import numpy as np
import pytest
import texts
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from radixgen.cache import ExtentPool, RadixTree, as_tokens
from radixgen.cli import app
from radixgen.core import SegmentReuse
from radixgen.explain import PromptText, Report, explain
from radixgen.explain.divergences import _intervals
from radixgen.explain.kinds import common_len, difference
from radixgen.explain.pieces import Pieces, distinct_tokens
from radixgen.explain.segments import moved_tokens

DOCUMENT = Path("radixgen/demo/document.md").read_text(encoding="utf-8")
RULES = [f"- {line}" for line in DOCUMENT.split("\n") if line][:20]
CL100K = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def trained(pre_tokenizer: pre_tokenizers.PreTokenizer, *, special: bool) -> PreTrainedTokenizerFast:
    plain = Tokenizer(models.BPE(unk_token="?"))
    plain.pre_tokenizer = pre_tokenizer
    plain.decoder = decoders.ByteLevel()
    alphabet = ["▁", "\n", *pre_tokenizers.ByteLevel.alphabet()]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["?", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    plain.train_from_iterator([DOCUMENT], trainer)
    if special:
        plain.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=plain, chat_template=texts.TEMPLATE)


def gpt2(*, special: bool = False) -> PreTrainedTokenizerFast:
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False), special=special)


def llama3() -> PreTrainedTokenizerFast:
    split = pre_tokenizers.Split(Regex(CL100K), "isolated")
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return trained(pre_tokenizers.Sequence([split, byte]), special=True)


def sentencepiece() -> PreTrainedTokenizerFast:
    return trained(pre_tokenizers.Metaspace(), special=True)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return gpt2()


# -- pieces ----------------------------------------------------------------------------------------------------

PARTS = ["word", "Other", "end.", "x;", "7", "42", "(", '"', "é", "漢", " ", " ", "\n", "\n", "  ", "\t", "\r\n",
         "\xa0", "\x1c", "\u2028", "<s>", "'s", "- "]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "lines"),
    [
        (gpt2, ["end.", "\nword"]),
        (lambda: gpt2(special=True), ["end.", "\nword"]),
        (llama3, ["end.\n", "word"]),
        (sentencepiece, None),
    ],
)
def test_pieces_have_the_tokens_of_the_whole(make: Callable, lines: list[str] | None) -> None:
    tokenizer, rng = make(), random.Random(0)
    written = ["".join(rng.choices(PARTS, k=rng.randint(0, 40))) for _ in range(2_000)]
    written += [" ".join(["A long line."] * 80), "end.\nword"]
    for special in (True, False):
        pieces = Pieces(tokenizer)
        rows = pieces.rows([PromptText(text, special) for text in written])
        for text, row in zip(written, rows, strict=True):
            expected = tokenizer(text, add_special_tokens=special)["input_ids"]
            assert pieces.tokens_of(row).tolist() == expected, text
            assert not lines or pieces.text_of(row) == text
        assert bool(pieces._breaks) == (lines is None)
        if lines is not None:
            assert [pieces.texts[piece] for piece in rows[-1] if pieces.texts[piece]] == lines


def test_token_ids_are_cut_after_line_breaks(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("one line\nand another\n\nend")["input_ids"]
    pieces = Pieces(tokenizer)
    (row,) = pieces.rows([ids])
    assert pieces.tokens_of(row).tolist() == ids
    assert [pieces.texts[piece] for piece in row] == ["one line\n", "and another\n", "\n", "end"]


@given(st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=12))
def test_distinct_tokens_are_those_of_the_tree(rows: list[list[int]]) -> None:
    assert distinct_tokens(as_tokens(row) for row in rows) == counted(rows)
    assert counted(rows) == len({tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)})


@given(st.lists(st.text("ab", max_size=5), min_size=1, max_size=10).map(sorted))
def test_intervals_are_the_branches_of_the_tree(rows: list[str]) -> None:
    common = [common_len(pair) for pair in zip(rows, rows[1:], strict=False)]
    expected = set()
    for depth in range(6):
        for head in {row[:depth] for row in rows if len(row) >= depth}:
            inside = [n for n, row in enumerate(rows) if row.startswith(head)]
            if len(inside) > 1 and (len({rows[n][depth : depth + 1] for n in inside}) > 1 or rows[inside[0]] == head):
                expected.add((depth, inside[0], inside[-1] + 1))
    assert set(_intervals(common)) == expected


@given(st.lists(st.text("a1: -", max_size=12), min_size=2, max_size=6, unique=True))
def test_a_difference_leaves_the_same_of_each_text(found: list[str]) -> None:
    differs = difference(found)
    assert all(differs.covers(text) for text in found)
    assert {differs.head + differs.tail for _ in found} == {
        text[: len(differs.head)] + text[len(text) - len(differs.tail) :] for text in found
    }
    assert len({differs.varying(text) for text in found}) == len(found)


# -- divergences -----------------------------------------------------------------------------------------------


def counted(rows: list[list[int]]) -> int:
    tree = RadixTree(ExtentPool(1))
    for row in rows:
        tree.insert(row)
    return sum(node.known for node in tree.nodes())


def prompt(*head: str, end: object = "") -> str:
    return "\n".join([*head, *RULES, f"Question: {end}"])


def told(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> Report:
    report = explain([PromptText(one) for one in prompts], tokenizer)
    rows = tokenizer(prompts)["input_ids"]
    assert (report.prompts, report.tokens) == (len(prompts), sum(map(len, rows)))
    assert report.distinct_tokens == counted(rows)
    for one in report.divergences:
        assert 0 < one.saved_tokens < report.distinct_tokens and one.saved_alone <= report.distinct_tokens
    return report


MOMENTS = [(f"{hour:02}", f"{minute:02}") for hour in (8, 9, 11) for minute in range(0, 60, 7)]
VARYING = {
    "iso": ("timestamp", [f"2026-01-05T{h}:{m}:10Z" for h, m in MOMENTS]),
    "clock": ("timestamp", [f"{h}:{m}" for h, m in MOMENTS]),
    "words": ("timestamp", [f"Monday, January {d}, 2026 at 10:{d:02} AM" for d in range(1, 28)]),
    "day": ("timestamp", [f"{d} March 2026" for d in range(1, 28)]),
    "date": ("timestamp", [f"2026-03-{d:02}" for d in range(1, 28)]),
    "epoch": ("timestamp", [str(1_767_600_000 + 977 * n) for n in range(25)]),
    "uuid": ("id", [str(uuid.UUID(int=random.Random(n).getrandbits(128), version=4)) for n in range(25)]),
    "key": ("id", [f"req_{random.Random(n).getrandbits(48):012x}" for n in range(25)]),
    "number": ("number", [str(17 * n) for n in range(25)]),
    "decimal": ("number", [f"{n / 7:.3f}" for n in range(25)]),
    "name": ("text", ["Ada Byron", "Grace Hopper", "Alan Turing", "Emmy Noether", "Kurt Goedel", "Mary Cartwright"]),
}


@pytest.mark.parametrize("name", VARYING)
def test_what_varies_is_named_and_the_saving_counted(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    kind, values = VARYING[name]
    prompts = [prompt("You help.", f"Now = {value} (given)", end=n) for n, value in enumerate(values)]
    (found,) = told(tokenizer, prompts).divergences
    assert (found.kind, found.line, found.prompts, found.variants) == (kind, 2, len(values), len(values))
    assert found.remedy == "moved to the end" and found.frame == "Now = … (given)"
    assert found.here != found.there and {found.here, found.there} <= set(values)
    moved = [f"{prompt('You help.', 'Now =  (given)', end=n)}\n{value}" for n, value in enumerate(values)]
    before, after = (counted(tokenizer(one)["input_ids"]) for one in (prompts, moved))
    assert found.saved_tokens == found.saved_alone == before - after
    one, two = (tokenizer(prompts[values.index(value)])["input_ids"] for value in (found.here, found.there))
    assert one[: found.position] == two[: found.position] and one[found.position] != two[found.position]


def test_one_behind_the_other(tokenizer: PreTrainedTokenizerFast) -> None:
    """Alone, moving the second saves nothing."""
    times, keys = VARYING["iso"][1], VARYING["uuid"][1]
    prompts = [
        "\n".join(["You help.", f"Time: {time}", *RULES[:10], f"Session: {key}", *RULES[10:]])
        for time, key in zip(times, keys, strict=False)
    ]
    first, second = told(tokenizer, prompts).divergences
    assert (first.kind, first.line, second.kind, second.line) == ("timestamp", 2, "id", 13)
    assert second.saved_alone < second.saved_tokens and second.frame == "Session: …"
    one, two = (tokenizer(prompts[keys.index(key)])["input_ids"] for key in (second.here, second.there))
    assert second.position > 300 and one[: second.position] != two[: second.position]


def test_the_same_in_several_families_is_one(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = [
        "\n".join([f"You are helper {name}.", f"Time: {time}", *RULES[first : first + 5], name * n])
        for first, name in ((0, "Ada"), (5, "Bob"), (10, "Cid"))
        for n, time in enumerate(VARYING["clock"][1])
    ]
    found = told(tokenizer, prompts).divergences
    assert [(one.kind, one.prompts, one.line) for one in found] == [("timestamp", len(prompts), 2)]


def test_prompts_without_it_stay_as_they_are(tokenizer: PreTrainedTokenizerFast) -> None:
    times = VARYING["iso"][1]
    prompts = [prompt("You help.", f"Time: {time}", end=time) for time in times]
    prompts += [prompt("You help.", end=n) for n in range(4)]
    found = told(tokenizer, prompts).divergences[0]
    assert (found.kind, found.prompts, found.frame) == ("timestamp", len(times), "Time: …")


def test_a_line_that_some_have(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = [prompt("You help.", *(["Be brief, and kind."] if n % 3 else []), end=n) for n in range(12)]
    (found,) = told(tokenizer, prompts).divergences
    assert (found.kind, found.variants, found.line) == ("text", 2, 2)
    assert "Be brief, and kind." in (found.here, found.there)


TOOLS = [{"name": name, "parameters": {"path": "string", "limit": 3}} for name in ("read", "write", "list", "search")]


@pytest.mark.parametrize("indent", [None, 2])
def test_tools_in_another_order(tokenizer: PreTrainedTokenizerFast, indent: int | None) -> None:
    prompts = []
    for n in range(12):
        tools = random.Random(n % 5).sample(TOOLS, len(TOOLS))
        prompts.append(prompt("You help.", json.dumps(tools, indent=indent), end=n))
    (found,) = told(tokenizer, prompts).divergences
    assert (found.kind, found.remedy) == ("order", "brought into one order")
    inner = [prompt("You help.", json.dumps(TOOLS, indent=indent), end=n) for n in range(12)]
    before, after = (counted(tokenizer(one)["input_ids"]) for one in (prompts, inner))
    assert found.saved_tokens == pytest.approx(before - after, abs=4)


def test_one_tool_a_line_in_another_order(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = []
    for n in range(12):
        tools = random.Random(n % 4).sample(TOOLS, len(TOOLS))
        prompts.append(prompt("<tools>", *map(json.dumps, tools), "</tools>", end=n))
    (found,) = told(tokenizer, prompts).divergences
    assert (found.kind, found.prompts) == ("order", 12) and found.line >= 2


def test_keys_in_another_order(tokenizer: PreTrainedTokenizerFast) -> None:
    settings = {"language": "en", "tone": "plain", "length": 3, "format": "markdown"}
    prompts = []
    for n in range(12):
        keys = random.Random(n % 5).sample(sorted(settings), len(settings))
        prompts.append(prompt("You help.", json.dumps({key: settings[key] for key in keys}), end=n))
    (found,) = told(tokenizer, prompts).divergences
    assert (found.kind, found.line) == ("order", 2)


@pytest.mark.parametrize(
    "variants",
    [
        ["Answer in  one sentence.", "Answer in one sentence."],
        ["Answer in one sentence. ", "Answer in one sentence."],
        ["Answer in one sentence.\n", "Answer in one sentence."],
        ["Answer in one sentence.\r", "Answer in one sentence.", "Answer\tin one sentence."],
        [json.dumps(TOOLS, indent=2), json.dumps(TOOLS), json.dumps(TOOLS, indent=4)],
    ],
)
def test_white_space(tokenizer: PreTrainedTokenizerFast, variants: list[str]) -> None:
    prompts = [prompt("You help.", variants[n % len(variants)], end=n) for n in range(12)]
    (found,) = told(tokenizer, prompts).divergences
    assert (found.kind, found.remedy) == ("white space", "made the same")
    same = [prompt("You help.", variants[0], end=n) for n in range(12)]
    before, after = (counted(tokenizer(one)["input_ids"]) for one in (prompts, same))
    assert found.saved_tokens == pytest.approx(before - after, rel=0.3)


def test_nothing_to_say(tokenizer: PreTrainedTokenizerFast) -> None:
    assert told(tokenizer, [prompt(end=f"{n} and {n * n}?") for n in range(20)]).divergences == []
    assert told(tokenizer, [prompt()] * 5).divergences == []
    assert told(tokenizer, [prompt(), "", prompt(), "x", ""]).divergences == []
    report = explain([], tokenizer)
    assert (report.tokens, report.saving, report.saving_remedied) == (0, 0, 0)


def test_prompts_of_one_line(tokenizer: PreTrainedTokenizerFast) -> None:
    """A line that no other prompt has hid what it shares with them."""
    keys = VARYING["uuid"][1]
    prompts = [f"You help user {key}: {' '.join(RULES[:4])} Now answer. Number {n}?" for n, key in enumerate(keys)]
    (found,) = told(tokenizer, prompts).divergences
    assert (found.kind, found.line, found.here in keys) == ("id", 1, True)
    assert found.saved_tokens > found.blocked_tokens / 2 > 0


def test_token_ids_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    values = VARYING["uuid"][1]
    prompts = [tokenizer(prompt("You help.", f"Id: {value}", end=n))["input_ids"] for n, value in enumerate(values)]
    report = explain(prompts, tokenizer)
    assert report.distinct_tokens == counted(prompts)
    assert [(one.kind, one.line, one.prompts) for one in report.divergences] == [("id", 2, len(values))]


@given(st.lists(st.lists(st.sampled_from(["a", "b", "c 1", "c 2", "d  e", "d e", ""]), max_size=7), max_size=9))
def test_any_log_is_explained(tokenizer: PreTrainedTokenizerFast, log: list[list[str]]) -> None:
    prompts = ["\n".join(lines) for lines in log]
    report = explain([PromptText(one) for one in prompts], tokenizer)
    assert report.distinct_tokens == counted(tokenizer(prompts)["input_ids"] if prompts else [])
    assert report.saving <= report.saving_remedied <= 1


# -- the command -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    families.build("llama").config.save_pretrained(path)
    gpt2().save_pretrained(path)
    return path


def log() -> str:
    lines = []
    for n, time in enumerate(VARYING["iso"][1]):
        system = "\n".join(["You help.", f"Time: {time}", *RULES])
        lines.append({"messages": [{"role": "system", "content": system}, {"role": "user", "content": f"No. {n}?"}]})
    return "\n".join(map(json.dumps, lines))


def test_the_command(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text(log())
    result = CliRunner().invoke(app, ["explain", str(file), "--model", str(model)], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    count = len(log().split("\n"))
    for said in (f"{count} prompts of", "radix tree", "timestamp", "line 2", "Time: …", "2026-01-05T", "%"):
        assert said in result.stdout, result.stdout


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = [
    "Where is my order?",
    "I want a refund.",
    "Do you ship to Norway?",
    "It is broken",
    "May I pay later?",
    "Hello",
]


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chatml")
    families.build("llama").config.save_pretrained(path)
    plain = gpt2()
    plain.chat_template = CHATML
    plain.save_pretrained(path)
    return path


def explained(model: Path, chats: list[list[str]]) -> dict:
    roles = ["system", *["user", "assistant"] * 4]
    written = [[{"role": role, "content": said} for role, said in zip(roles, chat, strict=False)] for chat in chats]
    log = "\n".join(json.dumps({"messages": messages}) for messages in written)
    result = CliRunner().invoke(app, ["explain", "--model", str(model), "--json"], input=log)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "chats",
    [
        [["You help.\nBe brief.", asked] for asked in ASKED],
        [["You help.\nBe brief.", f"Hi {n}\n{asked}"] for n, asked in enumerate(ASKED)],
        [["You help.", asked, asked[::-1], f"And {n}?"] for n, asked in enumerate(ASKED)],
    ],
    ids=["one question", "two lines", "turns"],
)
def test_what_the_template_writes_is_not_shared(chatml: Path, chats: list[list[str]]) -> None:
    """Questions were to be moved behind `<|im_start|>assistant`, which then was shared."""
    found = explained(chatml, chats)
    assert found["divergences"] == [] and found["saving_remedied"] == found["saving"] > 0


@pytest.mark.parametrize("asked", [ASKED, ASKED[:1]], ids=["different", "the same"])
def test_a_timestamp_before_questions(chatml: Path, tokenizer: PreTrainedTokenizerFast, asked: list[str]) -> None:
    """What moves goes behind what is said last: the template's tail behind it is nothing saved."""
    times = VARYING["iso"][1]
    rules = "\n".join(RULES)
    chats = [[f"You help.\nTime: {time}\n{rules}", asked[n % len(asked)]] for n, time in enumerate(times)]
    found = explained(chatml, chats)
    (one,) = found["divergences"]
    assert (one["kind"], one["line"], one["frame"]) == ("timestamp", 3, "Time: …")
    text = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>{}\n<|im_start|>assistant\n"
    before = [tokenizer(text.format(*chat, ""))["input_ids"] for chat in chats]
    moved = [
        tokenizer(text.format(f"You help.\nTime: \n{rules}", said, f"\n{time}"))["input_ids"]
        for time, (_, said) in zip(times, chats, strict=True)
    ]
    assert one["saved_tokens"] == one["saved_alone"] == counted(before) - counted(moved)


def test_the_command_for_machines(model: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    result = CliRunner().invoke(app, ["explain", "--model", str(model), "--json"], input=log())
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    messages = [json.loads(line)["messages"] for line in log().split("\n")]
    rows = [
        tokenizer.apply_chat_template(one, add_generation_prompt=True, tokenize=True, return_dict=False)
        for one in messages
    ]
    assert (found["tokens"], found["distinct_tokens"]) == (sum(map(len, rows)), counted(rows))
    assert found["divergences"][0]["kind"] == "timestamp" and found["saving_remedied"] > found["saving"]


def test_runs_that_are_no_prefix() -> None:
    """Each prompt finds all that are before it; those that take runs are found, too."""
    generator = np.random.default_rng(0)
    first, second, third = (generator.integers(0, 5_000, 100).astype(np.int32) for _ in range(3))
    rows = [np.concatenate(order) for order in ((first, second), (second, first), (third, second), (second, third))]
    moved, inexact = moved_tokens(rows, SegmentReuse(min_run=20, recompute=0.25))
    assert (moved, inexact) == (75 + 74 + 74 + 74, 3)
    assert moved_tokens(rows, SegmentReuse(min_run=101)) == (0, 0) == moved_tokens([], SegmentReuse())
