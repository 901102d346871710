"""`radixgen explain --reading`: the share of attention that is not read, against softmax weights of transformers."""

import json
from pathlib import Path

import families
import numpy as np
import pytest
import texts
import torch
from numpy.typing import NDArray
from policies import reads
from typer.testing import CliRunner, Result

from radixgen import InvalidRequest
from radixgen.cli import app
from radixgen.core import PromptTooLong
from radixgen.core.reading import POLICIES
from radixgen.explain.reading import UnreadAttention, explain_reading
from radixgen.model.loader import LoadedModel
from radixgen.reading import BigBird, Exact, Fading, PositionPolicy, ReadingPolicy, TopBlocks, Window
from radixgen.scheduler import top_blocks

PROMPT = np.random.default_rng(3).integers(1, families.VOCAB, 101).tolist()
READ_ALL = [
    Exact(),
    Window(window=families.MAX_POSITIONS),
    Window(window=64, sinks=64, block=64, prompt=True),
    BigBird(block=8, window_blocks=40, prompt=True),
    Fading(window=200, levels=1),
    TopBlocks(budget=1.0),
]


def loaded(family: str = "llama") -> LoadedModel:
    return LoadedModel(family, families.build(family), None)


def call(*arguments: object, stdin: str) -> Result:
    return CliRunner().invoke(app, ["explain", *map(str, arguments)], input=stdin)


@pytest.mark.parametrize("reading", READ_ALL, ids=str)
def test_nothing_is_unread_where_all_keys_are_read(reading: ReadingPolicy) -> None:
    overall = explain_reading([PROMPT, PROMPT[:7]], loaded(), reading, rows=5).overall
    assert overall.unread == overall.worst_unread == 0.0
    assert overall.keys_read == overall.keys > 1 and overall.rows == 10


def weights(family: str, answer: int) -> tuple[list[int], NDArray[np.float64]]:
    """The prompt and its greedy answer, and transformers' attention weights `[layers, q_heads, rows, keys]`."""
    model, tokens = families.build(family), list(PROMPT)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for _ in range(answer):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            assert tokens[-1] != model.config.eos_token_id
        attentions = model(torch.tensor([tokens]), output_attentions=True).attentions
    return tokens, torch.stack([each[0] for each in attentions]).double().numpy()


def unread_by_softmax(attention: NDArray[np.float64], reading: ReadingPolicy, rows: list[int]) -> UnreadAttention:
    unread, keys_read = [], []
    for row in rows:
        hidden = np.array([not reads(reading, row, key) for key in range(attention.shape[-1])])
        seen = attention[:, :, row] / attention[:, :, row].sum(-1, keepdims=True)
        unread.append((seen * hidden).sum(-1))
        keys_read.append(int((~hidden).sum()))
    by_head = np.mean(unread, axis=0)
    layer, head = np.unravel_index(by_head.argmax(), by_head.shape)
    return UnreadAttention(
        len(rows), float(np.mean(rows)) + 1, float(np.mean(keys_read)), float(by_head.mean()), int(layer), int(head),
        float(by_head.max()),
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt-oss"])
@pytest.mark.parametrize(
    "reading",
    [
        Window(sinks=3, window=17, block=5),
        Window(sinks=0, window=3, block=1, prompt=True),
        BigBird(block=4, window_blocks=2, global_blocks=1, random_blocks=3, prompt=True),
        Fading(sinks=2, window=6, levels=3, block=7),
    ],
    ids=str,
)
def test_shares_are_those_of_softmax(family: str, reading: PositionPolicy) -> None:
    count = 6
    tokens, attention = weights(family, count)
    first = 0 if reading.prompt else len(PROMPT)
    rows = np.linspace(first, len(tokens) - 1, count).round().astype(int).tolist()
    expected = unread_by_softmax(attention, reading, rows)
    found = explain_reading([PROMPT], loaded(family), reading, rows=count).overall
    assert (found.rows, found.keys, found.keys_read) == (count, expected.keys, expected.keys_read)
    assert found.unread == pytest.approx(expected.unread, abs=1e-5)
    assert found.worst_unread == pytest.approx(expected.worst_unread, abs=1e-5)
    if family != "mistral":  # its own window is shorter than most that are read
        assert expected.unread > 0.01
        assert (found.worst_layer, found.worst_head) == (expected.worst_layer, expected.worst_head)


def test_chosen_blocks_leave_less_unread_the_more_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_blocks, "LEAST_CANDIDATES", 2)
    prompt = (PROMPT * 3)[:240]
    policies = [TopBlocks(budget=budget, recent=1, sinks=0) for budget in (0.3, 0.6, 1.0)]
    found = [explain_reading([prompt], loaded(), policy, rows=3).overall for policy in policies]
    assert found[0].keys_read < found[1].keys_read < found[2].keys_read == found[2].keys
    assert found[0].unread > found[1].unread > found[2].unread == 0.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("reading", [Window(window=17, block=5), TopBlocks(budget=0.3, recent=1, sinks=0)], ids=str)
def test_a_gpu_measures_what_a_cpu_does(reading: ReadingPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_blocks, "LEAST_CANDIDATES", 2)
    prompt = (PROMPT * 3)[:240]
    here = explain_reading([prompt], loaded(), reading, rows=3).overall
    there = explain_reading([prompt], LoadedModel("llama", families.build("llama").to("cuda"), None), reading, rows=3)
    assert there.overall.keys_read == here.keys_read
    assert there.overall.unread == pytest.approx(here.unread, abs=1e-3) and here.unread > 0.01


def test_prompts_are_spread_over_the_log() -> None:
    prompts = [PROMPT[: 4 + index] for index in range(9)]
    report = explain_reading(prompts, loaded(), Window(window=1, block=1), max_prompts=3, rows=2)
    assert [(one.prompt, one.tokens) for one in report.measured] == [(0, 4), (4, 8), (8, 12)]
    assert report.prompts == 9 and report.overall.rows == 6
    assert report.overall.unread == pytest.approx(np.mean([one.attention.unread for one in report.measured]))


def test_an_answer_ends_at_its_end_token() -> None:
    model = families.build("llama")
    first = int(model(torch.tensor([PROMPT])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = first
    report = explain_reading([PROMPT], LoadedModel("llama", model, None), Window(window=1, block=1), rows=5)
    assert report.overall.rows == 1


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        ([], {}, r"prompts=\[\]"),
        ([[1], []], {}, r"prompts\[1\]=\[\]: must be token ids below 160"),
        ([[families.VOCAB]], {}, r"prompts\[0\]=\[160\]"),
        ([[1]], {"rows": 0}, "rows=0: must be from 1 to 1024"),
        ([[1]], {"max_prompts": 1_025}, "max_prompts=1025: must be from 1 to 1024"),
    ],
)
def test_bad_input_is_named(prompts: list[list[int]], options: dict[str, int], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        explain_reading(prompts, loaded(), Window(), **options)


def test_a_policy_that_does_not_choose_by_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(ReadingPolicy):
        policy = "other"

    monkeypatch.setitem(POLICIES, "other", Other)
    with pytest.raises(InvalidRequest, match="is not measured"):
        explain_reading([[1]], loaded(), Other())


def test_a_prompt_that_fills_the_context_is_named() -> None:
    long = [1] * families.MAX_POSITIONS
    with pytest.raises(PromptTooLong, match=r"len\(prompts\[0\]\)=256: must leave 16 of the 256 tokens"):
        explain_reading([long], loaded(), Window())


def test_the_command(tmp_path: Path) -> None:
    model = texts.saved_model(tmp_path)
    lines = [
        "abc" * 20,
        json.dumps({"prompt": [5, 6, 7]}),
        json.dumps({"messages": [{"role": "user", "content": "hi"}]}),
    ]
    policy = json.dumps({"policy": "window", "window": 4, "block": 1, "sinks": 1})
    options = ("--model", model, "--reading", policy, "--rows", 2)
    stdin = "\n".join(lines)
    report = json.loads(call(*options, "--json", stdin=stdin).stdout)
    assert [one["tokens"] for one in report["measured"]] == [60, 3, len("u:hi;a:")]
    assert report["reading"]["window"] == 4 and report["overall"]["keys_read"] < report["overall"]["keys"]
    output = call(*options, "--max-prompts", 2, stdin=stdin).stdout
    assert "2 of 3 prompts" in output and "unread" in output
    result = call("--model", model, "--rows", 2, stdin=stdin)
    assert result.exit_code == 1 and "rows=2: needs --reading" in result.stderr
