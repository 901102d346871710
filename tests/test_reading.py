"""Reading policies of position: what rows read under them, what they share, and what their outputs are."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import StampModel
from policies import reads
from test_planner import COSTS, forests, keys_read
from test_revise import grown, step
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from radixgen import BeamSearchParams, Engine, InvalidRequest, Limits, SamplingParams
from radixgen.cache import BlockProjection, BlocksAdded, RadixTree, marked, marks, token_ids
from radixgen.core.errors import QueueFull
from radixgen.reading import (
    BigBird,
    Exact,
    Fading,
    PositionPolicy,
    ReadingPolicy,
    Window,
    reading_from_json,
    reading_to_json,
)
from radixgen.scheduler.planner import PLAN_MODES, PlanMode, Planner, plan
from radixgen.scheduler.reading import restrict, row_views
from radixgen.scheduler.revise import StepRows

WINDOW = Window(sinks=3, window=9, block=8)
EVERYWHERE = Window(sinks=2, window=5, block=4, prompt=True)
FADING = Fading(sinks=1, window=4, levels=2, block=4)
FADING_EVERYWHERE = Fading(sinks=3, window=3, levels=2, ratio=3, block=2, prompt=True)
BIRD = BigBird(block=4, window_blocks=2, global_blocks=1, random_blocks=1, seed=5)
BIRD_EVERYWHERE = BigBird(block=4, window_blocks=1, global_blocks=0, random_blocks=2, seed=9, prompt=True)
POLICIES: tuple[ReadingPolicy, ...] = (
    Exact(), WINDOW, EVERYWHERE, FADING, FADING_EVERYWHERE, BIRD, BIRD_EVERYWHERE,
)  # fmt: skip
ANY_POLICY = st.one_of(
    st.just(Exact()),
    st.builds(Window, sinks=st.integers(0, 9), window=st.integers(0, 12), block=st.integers(1, 7)),
    st.builds(
        Fading,
        sinks=st.integers(0, 9),
        window=st.integers(1, 12),
        levels=st.integers(1, 5),
        ratio=st.integers(2, 4),
        block=st.integers(1, 7),
    ),
    st.builds(
        BigBird,
        block=st.integers(1, 5),
        window_blocks=st.integers(1, 3),
        global_blocks=st.integers(0, 3),
        random_blocks=st.integers(0, 3),
        seed=st.integers(0, 2**64 - 1),
    ),
)


# -- what rows read ---------------------------------------------------------------------------------------


@given(ANY_POLICY, st.integers(0, 300))
def test_visible_ranges_are_what_the_policy_says(policy: ReadingPolicy, row: int) -> None:
    if not isinstance(policy, PositionPolicy):
        return
    ranges = policy.visible(row // policy.block)
    assert (np.diff(ranges.reshape(-1)) > 0).all() and ranges[-1, 1] == (row // policy.block + 1) * policy.block
    keys = {key for first, stop in ranges.tolist() for key in range(first, stop) if key <= row}
    assert keys == {key for key in range(row + 1) if reads(policy, row, key)}


@pytest.mark.parametrize(
    ("kind", "options", "count", "most"),
    [
        (Fading, {"block": 1, "window": 256, "levels": 1}, 130, 64),
        (Fading, {"window": 8_200, "levels": 1, "block": 2_048, "free": True}, 4_102, 4_096),
        (Fading, {"window": 2**31 // 4_096, "levels": 31}, 262_143, 4_096),
        (BigBird, {"block": 2, "random_blocks": 127}, 129, 128),
    ],
)
def test_rows_do_not_read_too_many_ranges(kind: Any, options: dict[str, Any], count: int, most: int) -> None:
    block = options.get("block", 64)
    with pytest.raises(InvalidRequest, match=f"reading.block={block}: rows would read {count} .* may read {most} "):
        kind(**options)
    with pytest.raises(InvalidRequest, match=r"reading\.block"):
        reading_from_json({"policy": kind.policy, **options})


@given(st.integers(1, 70), st.integers(1, 5_000), st.integers(1, 31), st.integers(2, 5), st.integers(0, 2**20))
def test_ranges_are_bounded_at_all_positions(block: int, window: int, levels: int, ratio: int, row: int) -> None:
    """Where a level begins shifts by less than its stride, so each can have one range more than at the far end."""
    try:
        policy = Fading(window=window, levels=levels, ratio=ratio, block=block)
    except InvalidRequest:
        assert window * levels > min(60 * block, 4_000)
        return
    assert len(policy.visible(row // block)) <= min(64 * block, 4_096) + levels


@settings(max_examples=150, deadline=None)
@given(st.data(), forests(), st.sampled_from(PLAN_MODES), st.sampled_from(COSTS), st.lists(ANY_POLICY, min_size=1))
def test_each_row_reads_what_its_policy_says(
    data: Any, case: Any, mode: PlanMode, cost: Any, policies: list[ReadingPolicy]
) -> None:
    forest, nodes, positions = case
    nodes, positions = nodes[positions >= 0], positions[positions >= 0]
    assume(nodes.size)
    choices = st.lists(st.integers(0, len(policies) - 1), min_size=nodes.size, max_size=nodes.size)
    own = np.array(data.draw(choices), np.int32)
    exact = plan(forest, nodes, positions, mode="unshared")
    paths = dict(zip(exact.row_order.tolist(), keys_read(exact), strict=True))
    views = row_views(policies, own, positions)
    assert (views is None) == all(policies[i].exact for i in own.tolist())
    if views is not None:
        forest, nodes = restrict(forest, nodes, views)
    found = plan(forest, nodes, positions, mode=mode, cost=cost)
    for row, keys in zip(found.row_order.tolist(), keys_read(found), strict=True):
        assert keys == [key for key in paths[row] if reads(policies[own[row]], int(positions[row]), key[0])]


def test_rows_that_read_alike_share_their_reads() -> None:
    """Sixty leaves below a trunk, all in one block: what they read of the trunk is read once."""
    tree, cursors = grown(60, 1)
    nodes = [cursor.held for cursor in cursors]
    rows = np.array([n.id for n in nodes], np.int32), np.array([n.end - 1 for n in nodes], np.int32)
    planner = Planner(tree, mode="naive")
    planner.policies = [Exact(), Window(sinks=5, window=10, block=1_000)]
    slots = np.full(60, -1)
    exact = planner.plan(*rows, slots)
    sparse = planner.plan(*rows, slots, np.ones(60, np.int32))
    assert sparse.kv_tokens_read == exact.kv_tokens_read
    planner.policies = [Exact(), Window(sinks=5, window=10, block=4)]
    assert planner.build_plan(StepRows(*rows, slots, np.ones(60, np.int32))).kv_tokens_read < exact.kv_tokens_read


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(2, 16), st.integers(1, 4), st.sampled_from(PLAN_MODES), st.lists(ANY_POLICY, min_size=1))
def test_a_plan_that_is_carried_over_reads_what_a_new_one_does(
    data: Any, leaves: int, branches: int, mode: PlanMode, policies: list[ReadingPolicy]
) -> None:
    policies = [Exact(), *policies]
    tree, cursors = grown(leaves, branches)
    own = {id(cursor): index % len(policies) for index, cursor in enumerate(cursors)}

    def rows() -> StepRows:
        nodes = [cursor.held for cursor in cursors]
        return StepRows(
            np.array([n.id for n in nodes], np.int32),
            np.array([n.end - 1 for n in nodes], np.int32),
            np.concatenate([n.slots(n.known - 1, n.known) for n in nodes]),
            np.array([own[id(cursor)] for cursor in cursors], np.int32),
        )

    planner, fresh = Planner(tree, mode=mode), Planner(tree, mode=mode)
    planner.policies = fresh.policies = policies
    planner.plan(*rows())
    for _ in range(data.draw(st.integers(1, 12))):
        if data.draw(st.booleans()) and len(cursors) > 1:
            tree.unlock(cursors.pop(data.draw(st.integers(0, len(cursors) - 1))))
        if data.draw(st.integers(0, 3)) == 0:
            cursor = data.draw(st.sampled_from(cursors))
            own[id(cursor)] = data.draw(st.integers(0, len(policies) - 1))
        step(tree, cursors, data.draw(st.integers(0, 3)))
        carried, anew = planner.plan(*rows()), fresh.build_plan(rows())
        found, wanted = ([keys_read(p)[i] for i in np.argsort(p.row_order)] for p in (carried, anew))
        assert found == wanted


def test_a_plan_holds_within_a_block() -> None:
    tree, cursors = grown(8, 2)
    planner = Planner(tree)
    planner.policies = [Exact(), Window(window=4, block=16)]
    ages = []
    for _ in range(40):
        step(tree, cursors, 40)
        nodes = [cursor.held for cursor in cursors]
        positions = np.array([n.end - 1 for n in nodes], np.int32)
        slots = np.concatenate([n.slots(n.known - 1, n.known) for n in nodes])
        ones = np.ones(8, np.int32)
        ages.append(planner.plan(np.array([n.id for n in nodes], np.int32), positions, slots, ones).age)
    assert max(ages) > 5 and ages.count(0) > 2


# -- what the outputs are ---------------------------------------------------------------------------------


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, attn_implementation="eager", initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config).float().eval()


def mistral() -> MistralForCausalLM:
    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, attn_implementation="eager", initializer_range=0.4,
        sliding_window=17,
    )  # fmt: skip
    return MistralForCausalLM(config).float().eval()


def expected(model: Any, prompt: list[int], policy: ReadingPolicy, count: int) -> list[int]:
    """Greedy tokens of transformers under an explicit mask."""
    tokens, first = list(prompt), 0 if policy.reads_prompt else len(prompt)
    width = getattr(model.config, "sliding_window", None) or len(prompt) + count
    for _ in range(count):
        size = len(tokens)
        mask = torch.full((size, size), -torch.inf)
        for row in range(size):
            for key in range(max(row - width + 1, 0), row + 1):
                if row < first or reads(policy, row, key):
                    mask[row, key] = 0.0
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens]), attention_mask=mask[None, None]).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("make", [llama, mistral])
def test_outputs_are_those_of_an_explicit_mask(make: Any) -> None:
    """Alone and batched, in one step and in chunks, cold and cached, with every policy beside every other."""
    model, rng, count = make(), np.random.default_rng(1), 24
    base = rng.integers(0, 97, 50).tolist()
    prompts = [base, base[:37] + rng.integers(0, 97, 9).tolist()]
    wanted = {(i, p): expected(model, prompts[i], p, count) for i in range(len(prompts)) for p in POLICIES}
    assert len({tuple(tokens) for tokens in wanted.values()}) == len(wanted)
    options: list[dict[str, Any]] = [{}, {"max_step_tokens": 13}, {"plan": "unshared"}]
    for own in options:
        with Engine(model, kv_tokens=2_000, debug=True, **own) as engine:
            for _ in range(2):
                each = [greedy(policy, count) for _, policy in wanted]
                outputs = engine.generate([prompts[i] for i, _ in wanted], each)
                for (index, policy), output in zip(wanted, outputs, strict=True):
                    assert output.outputs[0].token_ids == wanted[index, policy], (index, policy, own)
                    assert output.exact == (policy == Exact())
            for (index, policy), tokens in wanted.items():
                (output,) = engine.generate(prompts[index], greedy(policy, count))
                assert output.outputs[0].token_ids == tokens
            engine.check()


def greedy(policy: ReadingPolicy | None, count: int = 8, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, reading=policy, **more)


# -- what is shared ---------------------------------------------------------------------------------------


PROMPT = list(range(1, 15)) * 3


@pytest.fixture
def engine() -> Any:
    with Engine(llama(), kv_tokens=600, debug=True) as engine:
        yield engine


def test_exact_prompts_are_shared_and_inexact_output_is_not(engine: Engine) -> None:
    (first,) = engine.generate(PROMPT, greedy(WINDOW))
    (again,) = engine.generate(PROMPT, greedy(None))
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, len(PROMPT))
    longer = PROMPT + first.outputs[0].token_ids
    (after,) = engine.generate(longer, greedy(None))
    assert after.num_cached_tokens <= len(PROMPT) + common(first, again)
    (other,) = engine.generate(PROMPT, greedy(BIRD))
    assert other.num_cached_tokens == len(PROMPT)
    assert (first.exact, again.exact, after.exact, other.exact) == (False, True, True, False)


def common(a: Any, b: Any) -> int:
    pairs = zip(a.outputs[0].token_ids, b.outputs[0].token_ids, strict=True)
    return next((index for index, (x, y) in enumerate(pairs) if x != y), len(a.outputs[0].token_ids))


def test_a_prompt_that_is_read_inexactly_is_shared_under_its_policy_alone(engine: Engine) -> None:
    (first,) = engine.generate(PROMPT, greedy(EVERYWHERE))
    found = [engine.generate(PROMPT, greedy(p))[0].num_cached_tokens for p in (EVERYWHERE, None, BIRD_EVERYWHERE)]
    assert found == [len(PROMPT), 0, 0]
    longer = PROMPT + first.outputs[0].token_ids
    (turn,) = engine.generate(longer, greedy(EVERYWHERE))
    assert turn.num_cached_tokens == len(longer) - 1
    assert engine.pin(PROMPT, reading=EVERYWHERE) and engine.pin([5, 5], reading=EVERYWHERE) is None
    engine.check()


def test_samples_of_one_policy_share(engine: Engine) -> None:
    engine.generate(PROMPT, greedy(BIRD, n=4))
    nodes = engine.stats().num_nodes
    engine.generate(PROMPT, greedy(BIRD, n=2))
    assert engine.stats().num_nodes == nodes


def test_an_engine_has_a_default(engine: Engine) -> None:
    (wanted,) = engine.generate(PROMPT, greedy(EVERYWHERE))
    beams = engine.beam_search(PROMPT, BeamSearchParams(beam_width=2, max_tokens=4, reading=EVERYWHERE))[0]
    with Engine(llama(), kv_tokens=600, reading=EVERYWHERE) as other:
        (found,) = other.generate(PROMPT, greedy(None))
        assert found.outputs == wanted.outputs and not found.exact
        assert other.generate(PROMPT, greedy(Exact()))[0].exact
        assert other.pin(PROMPT) is not None
        assert other.preload([9, 8, 7])[0] is not None
        assert other.beam_search(PROMPT, BeamSearchParams(beam_width=2, max_tokens=4))[0].outputs == beams.outputs
    assert not beams.exact


def test_forks_read_as_their_origin(engine: Engine) -> None:
    (wanted,) = engine.generate(PROMPT, greedy(WINDOW, 20))
    name = engine.submit(PROMPT, greedy(WINDOW, 20))
    for _ in range(5):
        engine.step()
    (fork,) = engine.fork(name)
    last = {}
    while engine.has_unfinished:
        last |= {output.request_id: output for output in engine.step()}
    assert last[name].outputs == last[fork].outputs == wanted.outputs and not last[fork].exact


def test_preempted_requests_go_on_under_their_policy() -> None:
    model = llama()
    prompts = [[i, *PROMPT[:20]] for i in range(5)]
    with Engine(model, kv_tokens=600) as engine:
        wanted = [engine.generate(p, greedy(q, 30))[0].outputs for p in prompts for q in (WINDOW, EVERYWHERE)]
    with Engine(model, kv_tokens=110, debug=True) as engine:
        each = [greedy(q, 30) for _ in prompts for q in (WINDOW, EVERYWHERE)]
        outputs = engine.generate([p for p in prompts for _ in range(2)], each)
        assert [output.outputs for output in outputs] == wanted
        assert engine.stats().preemptions


def test_keys_of_eight_bits_are_read_alike_alone_and_together() -> None:
    with Engine(llama(), kv_tokens=900, kv_dtype="int8", debug=True) as engine:
        alone = [engine.generate(PROMPT, greedy(policy))[0].outputs[0].token_ids for policy in POLICIES]
        together = engine.generate([PROMPT] * len(POLICIES), [greedy(policy) for policy in POLICIES])
        assert [output.outputs[0].token_ids for output in together] == alone


# -- marks ------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 2**20 - 1), st.integers(0, 2_047))))
def test_marks_come_off(pairs: list[tuple[int, int]]) -> None:
    tokens = np.array([marked(token, mark) if mark else token for token, mark in pairs], np.int32)
    assert token_ids(tokens).tolist() == [token for token, _ in pairs]
    assert marks(tokens).tolist() == [mark for _, mark in pairs if mark]
    assert (tokens != -1).all(), "-1 stands for no token"


def test_marks_are_used_again(engine: Engine) -> None:
    policies = engine._core._policies
    policies.max_mark = 2
    for window in range(5):
        engine.generate(PROMPT, greedy(Window(window=window)))
        engine.check()
    names = [engine.submit(PROMPT, greedy(Window(window=window))) for window in (10, 11)]
    with pytest.raises(QueueFull, match="at most 2 different policies are in use"):
        engine.submit(PROMPT, greedy(Window(window=12)))
    for name in names:
        engine.cancel(name)
    engine.generate(PROMPT, greedy(Window(window=12)))


def test_nothing_is_evicted_if_all_marks_stay_in_use(engine: Engine) -> None:
    """Requests that wait hold two marks, and locked tokens of a pin the third."""
    policies, cached = engine._core._policies, [9, 8, 7, 6]
    policies.max_mark = 3
    engine.generate(PROMPT, greedy(EVERYWHERE))
    engine.pin(PROMPT, reading=EVERYWHERE)
    engine.generate(cached, greedy(None))
    names = [engine.submit(PROMPT, greedy(Window(window=window))) for window in (10, 11)]
    for window in (12, 13):
        with pytest.raises(QueueFull, match="at most 3 different policies are in use"):
            engine.submit(PROMPT, greedy(Window(window=window)))
    assert engine.stats().evicted_tokens == 0
    for name in names:
        engine.cancel(name)
    (output,) = engine.generate(cached, greedy(None))
    assert output.num_cached_tokens == len(cached)
    engine.generate(PROMPT, greedy(Window(window=12)))


def test_one_eviction_finds_all_free_marks(engine: Engine) -> None:
    engine._core._policies.max_mark = 3
    for window in range(4):
        engine.generate(PROMPT, greedy(Window(window=window)))
    for window in (4, 5):
        engine.generate(PROMPT, greedy(None))
        engine.generate(PROMPT, greedy(Window(window=window)))
        (output,) = engine.generate(PROMPT, greedy(None))
        assert output.num_cached_tokens == len(PROMPT)
        engine.check()


@pytest.mark.parametrize("reading", [ReadingPolicy(), PositionPolicy(block=4, prompt=False), Window])
def test_base_classes_are_no_policies(engine: Engine, reading: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"must be a policy of radixgen\.reading: exact, window"):
        engine.generate(PROMPT, greedy(reading))


def test_large_vocabularies_are_only_read_exactly() -> None:
    with Engine(StampModel(2**20 + 1, 64), kv_tokens=100) as engine:
        engine.generate([2**20], greedy(None, 1))
        with pytest.raises(InvalidRequest, match="a vocabulary of 1048577 tokens"):
            engine.generate([1], greedy(WINDOW))


def test_inexact_blocks_are_not_reported(engine: Engine) -> None:
    events: list[Any] = []
    projection = BlockProjection(tree_of(engine), lambda event: events.append(event) or True, 4)
    engine.generate(PROMPT, greedy(WINDOW, 20))
    engine.generate(PROMPT, greedy(EVERYWHERE))
    added = [event for event in events if isinstance(event, BlocksAdded)]
    assert sum(event.tokens.size for event in added) == len(PROMPT) // 4 * 4
    assert all((event.tokens >= 0).all() for event in added)
    projection.check()
    engine.reset_prefix_cache()
    projection.check()
    assert not len(projection) and not projection._inexact


def tree_of(engine: Engine) -> RadixTree:
    return engine.inspect(lambda core: core.tree)


# -- as JSON, and out of range ----------------------------------------------------------------------------


@given(ANY_POLICY)
def test_json_gives_the_same_policy(policy: ReadingPolicy) -> None:
    assert reading_from_json(reading_to_json(policy)) == policy
    assert reading_from_json({"policy": policy.policy}) == type(policy)()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "reading=3: must be an object"),
        ({}, "reading.policy=None: must be one of exact, window, bigbird"),
        ({"policy": ["window"]}, "must be one of exact, window, bigbird"),
        ({"policy": "windows"}, "reading.policy='windows': must be one of"),
        ({"policy": "window", "sink": 3}, "reading.sink=3: the policy window has no such field"),
        ({"policy": "window", "sinks": -1}, "reading.sinks=-1: must be from 0"),
        ({"policy": "window", "window": 1.5}, "reading.window=1.5: must be an integer"),
        ({"policy": "window", "block": 0}, "reading.block=0: must be from 1"),
        ({"policy": "window", "prompt": 1}, "reading.prompt=1: must be true or false"),
        ({"policy": "bigbird", "window_blocks": 0}, "reading.window_blocks=0: must be from 1"),
        ({"policy": "bigbird", "global_blocks": True}, "reading.global_blocks=True: must be an integer"),
        ({"policy": "bigbird", "random_blocks": 2**40}, "reading.random_blocks=1099511627776: must be from 0"),
        ({"policy": "bigbird", "seed": -1}, "reading.seed=-1: must be from 0"),
    ],
)
def test_bad_json_is_refused_by_field(value: object, message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        reading_from_json(value)
    assert message in str(refused.value)


def test_what_is_no_policy_is_refused(engine: Engine) -> None:
    for params in (SamplingParams(reading="window"), BeamSearchParams(beam_width=1, reading={})):  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="must be a policy of"):
            engine.submit(PROMPT, params)
    with pytest.raises(InvalidRequest, match="must be a policy of"):
        engine.pin(PROMPT, reading="exact")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="must be a policy of"):
        Engine(StampModel(), kv_tokens=10, reading=None)  # type: ignore[arg-type]
    SamplingParams(reading=WINDOW).validate(Limits(), 100)
