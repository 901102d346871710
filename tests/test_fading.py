"""`Fading`: what rows stop reading, and which slots paths keep. What rows read is tested in `test_reading.py`."""

from dataclasses import replace

import pytest
from policies import PolicyModel, reads

from radixgen import Engine, Limits, RequestOutput, SamplingParams
from radixgen.core import InvalidRequest
from radixgen.reading import Fading, ReadingPolicy

POLICIES = [
    Fading(sinks=3, window=5, levels=3, ratio=2, block=4),
    Fading(sinks=0, window=7, levels=2, ratio=3, block=1),
    Fading(sinks=9, window=1, levels=5, ratio=2, block=3),
    Fading(sinks=40, window=6, levels=1, ratio=5, block=10),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_what_is_not_read_once_is_never_read_again(policy: Fading) -> None:
    for row in range(150):
        later = row + policy.block
        assert all(reads(policy, row, key) for key in range(row + 1) if reads(policy, later, key)), row


def test_the_largest_numbers_that_are_allowed() -> None:
    most = 2**31 - 1
    far = Fading(sinks=0, window=1, levels=31, ratio=most, block=most)
    assert far.visible(1).tolist() == [[0, 1], [most - 1, 2 * most]]
    assert Fading(sinks=most, window=most, levels=31, ratio=most).visible(3).tolist() == [[0, 256]]
    assert Fading(sinks=0, window=1, levels=31, ratio=2, block=1).visible(2**20)[0].tolist() == [0, 1]


def test_tokens_beyond_the_window_grow_with_the_logarithm() -> None:
    policy = Fading(sinks=4, window=64, levels=20, ratio=2, block=16)
    counts = [int((policy.visible(block) @ [-1, 1]).sum()) for block in (2**6, 2**8, 2**10, 2**12)]
    assert [b - a for a, b in zip(counts, counts[1:], strict=False)] == [64, 64, 64]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sinks", -1),
        ("window", 0),
        ("levels", 0),
        ("levels", 32),
        ("ratio", 1),
        ("block", 0),
        ("prompt", 1),
        ("free", 0),
    ],
)
def test_bad_values_are_named(field: str, value: int) -> None:
    with pytest.raises(InvalidRequest, match=f"reading.{field}"):
        Fading(**{field: value})


def serve(policy: ReadingPolicy, prompt: list[int]) -> list[int]:
    """The keys that the tree holds after each step of two sequences. Rows that read other keys than they must fail."""
    model = PolicyModel(5, 256)
    with Engine(model, kv_tokens=600, limits=Limits(max_num_seqs=2), max_step_tokens=24, debug=True) as engine:
        model.watch(engine._core)
        tree = engine._core.tree
        params = SamplingParams(n=2, max_tokens=90, seed=3, reading=policy)
        engine.submit(prompt, params, output_kind="final")
        held = []
        while True:
            outputs = engine.step()
            engine.check()
            for extent in tree.pool.free_extents():
                model.poison(range(extent.start, extent.end))
            held.append(sum(node.num_keys for node in tree.nodes()))
            if outputs:
                assert [output.finish_reason for output in outputs[0].outputs] == ["length"] * 2
                return held


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("block", [1, 4])
def test_tokens_that_are_not_read_again_give_up_their_slots(prompt: bool, block: int) -> None:
    policy = Fading(sinks=2, window=6, levels=3, block=block, prompt=prompt)
    tokens = [i * i % 5 for i in range(130)]
    all_keys, held = serve(policy, tokens), serve(replace(policy, free=True), tokens)
    read = policy.sinks + policy.window + policy.levels * policy.window // 2 + 2 * policy.block
    assert max(held[-60:]) <= 2 * read < min(all_keys[-60:]) and held[-1] == 0
    assert max(held) <= 2 * (read + 24) if prompt else max(held) >= 130


def test_a_preempted_path_is_computed_again() -> None:
    policy = Fading(sinks=1, window=20, levels=2, block=4, free=True)
    model = PolicyModel(5, 256)
    with Engine(model, kv_tokens=75, limits=Limits(max_num_seqs=3), max_step_tokens=24, debug=True) as engine:
        model.watch(engine._core)
        params = SamplingParams(max_tokens=60, seed=1, reading=policy)
        for _ in range(3):
            engine.submit([1, 2, 3, 4, 1, 2, 3, 4], params, output_kind="final")
        outputs: list[RequestOutput] = []
        while len(outputs) < 3:
            outputs += engine.step()
            engine.check()
        assert engine.stats().preemptions > 0
        (tokens,) = {tuple(output.outputs[0].token_ids) for output in outputs}
        assert len(tokens) == 60 and engine._core.tree.pool.used == 0
