"""Conversations on an engine: what is computed, kept and refused. Templates are `test_chat_history`'s."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import families
import pytest
import templates
import texts
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from names import name_of
from oracle import StampModel, expected_logits
from sizes import size

from radixgen import (
    AsyncConversation,
    AsyncEngine,
    BeamSearchParams,
    ContextOverflow,
    Conversation,
    Engine,
    HistoryBreak,
    InvalidRequest,
    LimitReached,
    Limits,
    RequestFailed,
    RequestOutput,
    SamplingParams,
)
from radixgen.cache.node import DEMOTED
from radixgen.model import smollm2

CHATML = templates.tokenizer(templates.FAMILIES["smollm2"])
VOCAB = len(CHATML)
END = CHATML.convert_tokens_to_ids("<|im_end|>")
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
PLAIN = dict.fromkeys((CHATML.convert_tokens_to_ids("<|im_start|>"), END), -100.0)
"""A bias against special tokens: an answer that holds one is not what a template writes of its text."""
TEXT = SamplingParams(temperature=0.0, max_tokens=6, logit_bias=PLAIN)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def serve(clock: Clock | None = None, **options: Any) -> Engine:
    """An engine whose model checks every slot that it is told to read."""
    model = StampModel(VOCAB, options.pop("context", 2048), frozenset([END]))
    options = {"tokenizer": CHATML, "kv_tokens": 4096, "debug": True} | options
    return Engine(model, clock=clock or Clock(), **options)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with serve() as engine:
        yield engine
        engine.check()


def ascii_only() -> SamplingParams:
    """Greedy answers of whole characters that no template could rewrite."""
    letters = {CHATML.convert_tokens_to_ids(letter) for letter in "abcdefghijklmnopqrstuvwxyz"}
    return SamplingParams(
        temperature=0.0, max_tokens=6, logit_bias={token: -100.0 for token in range(VOCAB) if token not in letters}
    )


LETTERS = ascii_only()


# -- what is computed -------------------------------------------------------------------------------------


@dataclass
class Log:
    """Turns of conversations on one engine, each held against what it must have cost."""

    engine: Engine
    outputs: list[RequestOutput] = field(default_factory=list)

    def say(self, talk: Conversation, message: str, params: SamplingParams | None = None) -> RequestOutput:
        earlier, before = talk.token_ids, self.engine.stats()
        output = talk.say(message, params)
        after, prompt, answer = self.engine.stats(), output.prompt_token_ids, output.outputs[0].token_ids
        assert prompt[: len(earlier)] == earlier and talk.token_ids == prompt + answer
        assert len(earlier) - 1 <= output.num_cached_tokens <= len(prompt)
        new = max(len(prompt) - output.num_cached_tokens, 1) + len(answer) - 1
        assert after.computed_rows - before.computed_rows == new
        assert after.computed_prompt_tokens - before.computed_prompt_tokens == len(prompt) - output.num_cached_tokens
        self.engine.check()
        self.outputs.append(output)
        return output

    def branch(self, talk: Conversation, turns: int, at: int) -> None:
        """`turns` turns, and from turn `at` on in three branches."""
        for turn in range(at):
            self.say(talk, f"say {turn}")
        before = self.engine.stats()
        branches = [talk, *talk.fork(2)]
        assert self.engine.stats().computed_rows == before.computed_rows, "a fork computes nothing"
        assert self.engine.stats().kv_tokens_used == before.kv_tokens_used, "a fork copies nothing"
        for turn in range(at, turns):
            for name, branch in zip("abc", branches, strict=True):
                self.say(branch, f"{name} {turn}")
        assert all(branch.num_turns == turns and not branch.breaks for branch in branches)
        assert len({tuple(branch.token_ids) for branch in branches}) == 3
        for branch in branches:
            branch.close()
        assert self.engine.stats().num_pins == 0

    def compare(self, fresh: Engine, params: SamplingParams, every: int) -> int:
        """Outputs, `every` one of so many, generated again by an engine that has cached nothing. Returns the number
        of ties; other differences fail.
        """
        ties = 0
        for output in self.outputs[::every]:
            (again,) = fresh.generate(output.prompt_token_ids, params)
            assert again.num_cached_tokens == 0
            got, want = output.outputs[0].token_ids, again.outputs[0].token_ids
            if got != want:
                place = next(i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b)
                first, second = list(again.outputs[0].logprobs[place].values())[:2]
                assert first - second < TIE
                ties += 1
        return ties

    def score(self, fresh: Engine) -> int:
        """Every token of every output held against the likeliest one, by one pass over each whole conversation in an
        engine that has cached nothing. Returns the number of ties; other differences fail.
        """
        ties = 0
        outputs = [(output.prompt_token_ids, output.outputs[0].token_ids) for output in self.outputs]
        whole = [prompt + answer for prompt, answer in outputs]
        for tokens in whole:
            if any(len(other) > len(tokens) and other[: len(tokens)] == tokens for other in whole):
                continue
            (scored,) = fresh.generate(tokens, SamplingParams(max_tokens=1, prompt_logprobs=1))
            for prompt, answer in outputs:
                if tokens[: len(prompt) + len(answer)] != prompt + answer:
                    continue
                for place, token in enumerate(answer, len(prompt)):
                    found = scored.prompt_logprobs[place]
                    assert max(found.values()) - found[token] < TIE
                    ties += max(found.values()) > found[token]
        return ties


TIE = 1e-4


def test_a_tiny_model_computes_each_token_once_in_twelve_turns_and_three_branches() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=1, ignore_eos=True)
    with Engine(families.build("llama"), tokenizer=texts.tokenizer(), kv_tokens=1024, debug=True) as engine:
        log = Log(engine)
        log.branch(engine.conversation(params=params), 12, 6)
        assert len(log.outputs) == 6 + 3 * 6
    with Engine(families.build("llama"), tokenizer=texts.tokenizer(), kv_tokens=1024, share=False) as fresh:
        assert log.compare(fresh, params, every=1) == log.score(fresh) == 0


@pytest.mark.slow
def test_smollm2_computes_each_token_once_in_many_turns_and_three_branches() -> None:
    path = smollm2.fetch()
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=1)
    with Engine(path, kv_tokens=2048, dtype="float32") as engine:
        log = Log(engine)
        log.branch(engine.conversation("Answer in one word.", params=params), size(8, 12), 5)
    with Engine(path, kv_tokens=2048, dtype="float32", share=False) as fresh:
        assert log.compare(fresh, params, every=12) <= 1
        assert log.score(fresh) <= 1


def test_turns_that_the_model_ends(engine: Engine) -> None:
    """The end-of-turn token was drawn but not computed; it is written once, and everything else is cached."""
    log = Log(engine)
    params = SamplingParams(temperature=0.0, max_tokens=9, min_tokens=3, logit_bias=LETTERS.logit_bias | {END: 100.0})
    talk = engine.conversation("Be kind.")
    for turn in range(4):
        output = log.say(talk, f"hi {turn}", params)
        assert output.outputs[0].finish_reason == "stop" and talk.token_ids[-1] == END
        assert len(output.outputs[0].text) == 3 == len(talk.last_message["content"])
    text = CHATML.decode(talk.token_ids)
    assert text.count("<|im_end|>") == 1 + 2 * 4 and not talk.breaks


def test_an_answer_is_what_the_model_says_of_the_history(engine: Engine) -> None:
    talk = engine.conversation(params=SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))
    tokens = talk.say("hi").prompt_token_ids
    for _ in range(5):
        tokens.append(int(expected_logits(tokens, VOCAB).argmax()))
    assert talk.token_ids == tokens


def test_a_tool_loop(engine: Engine) -> None:
    log = Log(engine)
    with engine.conversation("Use tools.", params=LETTERS) as talk:
        talk.say("what time is it?")
        talk.add({"role": "tool", "content": "noon"})
        talk.add([{"role": "tool", "content": "or later"}])
        output = log.say(talk, None)
        roles = [message["role"] for message in talk.messages]
        assert roles == ["system", "user", "assistant", "tool", "tool", "assistant"]
        assert "noon" in CHATML.decode(output.prompt_token_ids)
        assert talk.last_message == {"role": "assistant", "content": output.outputs[0].text}


def test_rollback_goes_back_to_the_very_tokens(engine: Engine) -> None:
    talk = engine.conversation(params=LETTERS)
    seen = [talk.token_ids]
    for turn in range(4):
        talk.say(f"hi {turn}")
        seen.append(talk.token_ids)
    for turn in (4, 3, 1, 0):
        talk.add("never asked")
        talk.rollback(turn)
        assert talk.token_ids == seen[turn] and talk.num_turns == turn and len(talk.messages) == 2 * turn
    rows = engine.stats().computed_rows
    for turn in range(4):
        assert talk.say(f"hi {turn}").num_cached_tokens >= len(seen[turn + 1]) - LETTERS.max_tokens
    assert talk.token_ids == seen[4]
    assert engine.stats().computed_rows == rows + 4 * LETTERS.max_tokens


def test_a_cache_that_was_reset_costs_time_alone(engine: Engine) -> None:
    with engine.conversation(params=LETTERS, retain=0) as talk:
        talk.say("hi")
        kept = talk.token_ids
        engine.reset_prefix_cache()
        output = talk.say("there")
        assert output.num_cached_tokens == 0 and output.prompt_token_ids[: len(kept)] == kept


def test_streams_add_up(engine: Engine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=1, logit_bias=LETTERS.logit_bias)
    one, other = engine.conversation(params=params), engine.conversation(params=params)
    whole = one.say("hi")
    deltas = list(other.stream("hi"))
    assert "".join(delta.outputs[0].text for delta in deltas) == whole.outputs[0].text
    assert len(whole.outputs[0].logprobs) == 6 and whole.finished
    assert other.messages == one.messages and other.token_ids == one.token_ids


def test_a_stream_that_is_left_keeps_what_it_gave(engine: Engine) -> None:
    talk = engine.conversation(params=LETTERS)
    with talk.stream("hi") as stream:
        given = [next(stream) for _ in range(3)]
    assert not engine.has_unfinished and talk.num_turns == 1
    assert talk.last_message["content"] == "".join(delta.outputs[0].text for delta in given)
    kept = talk.token_ids
    output = talk.say("there")
    assert output.prompt_token_ids[: len(kept)] == kept and output.num_cached_tokens >= len(kept) - 1
    for _ in talk.stream("bye"):
        break
    assert talk.num_turns == 3, "a stream that nobody holds is closed"
    stream = talk.stream("again")
    stream.close()
    assert talk.num_turns == 3, "without a token there is no turn"


def test_a_deadline_keeps_what_was_said() -> None:
    clock = Clock()
    with serve(clock) as engine:
        talk = engine.conversation(params=LETTERS)
        stream = talk.stream("hi", timeout=5)
        next(stream)
        clock.now = 6
        assert [delta.outputs[0].stop_reason for delta in stream] == ["deadline"]
        assert talk.num_turns == 1 and len(talk.last_message["content"]) == 1


def test_an_answer_that_fails_leaves_the_conversation_as_it_was(engine: Engine) -> None:
    talk = engine.conversation(params=LETTERS)
    talk.say("hi")
    before = talk.save()
    model: Any = engine._model
    plain = model.run

    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    model.run = fail
    with pytest.raises(RequestFailed, match="planted"):
        talk.say("there")
    model.run = plain
    assert talk.save() == before and talk.say("there").finished


# -- breaks -----------------------------------------------------------------------------------------------

THINKING = "<think>in the</think>"


def thinking_engine() -> Engine:
    tokenizer = templates.tokenizer(templates.FAMILIES["qwen3"])
    return Engine(StampModel(len(tokenizer), 2048), tokenizer=tokenizer, kv_tokens=4096, debug=True)


def scripted(tokenizer: Any, text: str) -> SamplingParams:
    """An answer of one token, which is what `text` is."""
    return SamplingParams(max_tokens=1, logit_bias={tokenizer.convert_tokens_to_ids(text): 100.0})


def test_a_break_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """The model says `</think>`, which the template leaves out of earlier turns."""
    told: list[HistoryBreak] = []
    with thinking_engine() as engine, caplog.at_level(logging.INFO, "radixgen.chat.dialogue"):
        params = scripted(engine.tokenizer, "</think>")
        talk = engine.conversation(params=params, on_break=told.append)
        kept = talk.say("hi").prompt_token_ids
        for _ in range(2):
            with pytest.raises(InvalidRequest):
                talk.say("there", SamplingParams(max_tokens=0))
        output = talk.say("there")
        assert output.prompt_token_ids[: len(kept)] == kept and output.num_cached_tokens == len(kept)
        assert [(one.turn, one.position, one.before) for one in told] == [(2, len(kept), "</think>")]
        assert talk.breaks == told and [record.levelname for record in caplog.records] == ["WARNING"]
        twin = talk.fork()[0]
        twin.say("on")
        assert len(twin.breaks) == 2 and len(talk.breaks) == 1
        talk.rollback(1)
        talk.say("there")
        assert len(talk.breaks) == 1
        engine.check()


def test_an_exact_history_keeps_its_tokens() -> None:
    with thinking_engine() as engine:
        talk = engine.conversation(params=scripted(engine.tokenizer, "</think>"), history="exact")
        for turn in range(4):
            kept = talk.token_ids
            output = talk.say("hi")
            assert output.prompt_token_ids[: len(kept)] == kept
            assert output.num_cached_tokens >= len(kept) - 1
            assert len(talk.breaks) == turn and not any(one.followed for one in talk.breaks)


def superseded(engine: Engine, talk: "Conversation | AsyncConversation", old: list[int]) -> int:
    """Demoted tokens, all of them on the old path, which are gone once so many are evicted, and nothing else."""
    tree = engine._core.tree
    demoted = [node for node in tree.nodes() if node.priority == DEMOTED]
    assert all(node.path_tokens().tolist() == old[: node.end] for node in demoted)
    count = sum(node.known for node in demoted)
    assert tree.evict(count) == count
    assert tree.match_prefix(talk.token_ids).computed == len(talk.token_ids) - 1
    assert tree.match_prefix(old).computed == len(old) - 1 - count
    engine.check()
    return count


@pytest.mark.parametrize("retain", [0, 300.0])
def test_the_path_that_a_break_leaves_is_demoted(retain: float) -> None:
    with thinking_engine() as engine:
        params = replace(scripted(engine.tokenizer, "</think>"), max_tokens=6)
        talk = engine.conversation(params=params, retain=retain)
        talk.say("hi")
        old = talk.token_ids
        assert all(node.priority == 0.0 for node in engine._core.tree.nodes())
        talk.say("there")
        assert len(talk.breaks) == 1 and superseded(engine, talk, old) == 5


def test_what_a_fork_still_holds_is_not_demoted() -> None:
    with thinking_engine() as engine:
        talk = engine.conversation(params=replace(scripted(engine.tokenizer, "</think>"), max_tokens=6))
        talk.say("hi")
        twin, old = talk.fork()[0], talk.token_ids
        talk.say("there")
        assert talk.breaks and superseded(engine, talk, old) == 0
        twin.close()


def test_the_path_that_an_overflow_leaves_is_demoted() -> None:
    async def main() -> None:
        engine = serve(context=120)
        async with AsyncEngine(engine) as served:
            talk = served.conversation("Be kind.", params=LETTERS, on_overflow="drop_oldest")
            old: list[int] = []
            while talk._history.forgotten + len(talk.messages) // 2 >= talk.num_turns:
                old = talk.token_ids
                await talk.say("hello")
            assert superseded(engine, talk, old) > 20
            await talk.close()

    asyncio.run(main())


# -- overflow ---------------------------------------------------------------------------------------------


def test_overflow_is_an_error_with_the_counts() -> None:
    with serve(context=120) as engine:
        talk = engine.conversation("Be kind.", params=LETTERS)
        talk.say("hi")
        before = talk.save()
        with pytest.raises(ContextOverflow, match="the context holds 120 tokens") as caught:
            talk.say("x" * 100)
        assert caught.value.value > 120 and talk.save() == before
        assert talk.say("there").finished


def test_overflow_of_a_pool() -> None:
    with serve(kv_tokens=80) as engine, pytest.raises(ContextOverflow, match="80 slots"):
        engine.conversation(params=LETTERS).say("x" * 80)


def test_the_oldest_turns_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    with serve(context=200) as engine:
        talk = engine.conversation("Be kind.", params=LETTERS, on_overflow="drop_oldest")
        answers = []
        for turn in range(8):
            output = talk.say(f"hi {turn}")
            assert len(output.prompt_token_ids) + LETTERS.max_tokens <= 200
            answers.append(tuple(output.outputs[0].token_ids))
        kept = [one["content"] for one in talk.messages if one["role"] == "user"]
        assert 1 < len(kept) < 8 and kept == [f"hi {turn}" for turn in range(8 - len(kept), 8)]
        assert talk.messages[0] == {"role": "system", "content": "Be kind."}
        said = [exchange.answer_ids for exchange in talk._history.state.exchanges]
        assert said == answers[8 - len(kept) :], "generated tokens stay"
        assert not talk.breaks and "history was shortened" in caplog.text
        assert CHATML.decode(output.prompt_token_ids) == talk._history.template.render(talk.messages[:-1])
        talk.rollback(1)
        assert [one["content"] for one in talk.messages if one["role"] == "user"] == ["hi 0"]
        with pytest.raises(ContextOverflow):
            talk.say("x" * 250)
        engine.check()


def test_a_shortened_history_is_bounded_and_is_loaded() -> None:
    """It goes back as many turns as may be kept; the turns keep their numbers."""
    with serve(context=200, limits=Limits(max_messages=20)) as engine:
        talk = engine.conversation("Be kind.", params=LETTERS, on_overflow="drop_oldest")
        ends = [talk.token_ids]
        for turn in range(60):
            talk.say(f"hi {turn}")
            ends.append(talk.token_ids)
        assert talk.num_turns == 60 and len(talk._history.turns) == 21
        talk = Conversation.load(engine, saved := talk.save(), params=LETTERS, on_overflow="drop_oldest")
        assert talk.save() == saved and talk.num_turns == 60 and talk.token_ids == ends[60]
        with pytest.raises(InvalidRequest, match="must be from 40 to 60") as caught:
            talk.rollback(39)
        assert caught.value.field == "turn"
        for turn in (55, 40):
            talk.rollback(turn)
            assert (talk.num_turns, talk.token_ids) == (turn, ends[turn])
        assert talk.fork()[0].say("on").finished and talk.say("on").finished and talk.num_turns == 41


def test_a_history_that_was_not_shortened_goes_back_to_its_beginning() -> None:
    with serve(limits=Limits(max_messages=9)) as engine:
        talk = engine.conversation(params=LETTERS)
        talk.say("hi")
        while len(talk.messages) < 9:
            talk.say()
        with pytest.raises(InvalidRequest, match="at most 9 messages"):
            talk.say()
        again = Conversation.load(engine, talk.save())
        assert again.token_ids == talk.token_ids and again.num_turns == 8
        again.rollback(0)
        assert not again.messages


def test_what_is_saved_is_as_much_as_is_loaded() -> None:
    options: dict[str, Any] = {"params": LETTERS, "on_overflow": "drop_oldest"}
    with serve(context=200) as engine:
        talk = engine.conversation("Be kind.", **options)
        for turn in range(60):
            talk.say(f"hi {turn}")
        whole = talk.save()
    with serve(context=200, limits=Limits(max_saved_chars=len(whole))) as engine:
        talk = Conversation.load(engine, whole, **options)
        talk.say("hi 60")
        saved = talk.save()
        assert len(saved) < len(whole)
        loaded = Conversation.load(engine, saved, **options)
        assert (loaded.token_ids, loaded.num_turns, loaded.save()) == (talk.token_ids, 61, saved)
        with pytest.raises(InvalidRequest, match="must be from 32 to 61"):
            loaded.rollback(31)
        for one in (talk, loaded):
            one.rollback(32)
        assert loaded.token_ids == talk.token_ids
    with serve(limits=Limits(max_saved_chars=500)) as engine:
        talk = engine.conversation("Be kind.", params=LETTERS)
        talk.say("hi")
        with pytest.raises(InvalidRequest, match="at most 500"):
            talk.save()


def test_breaks_are_bounded() -> None:
    with thinking_engine() as engine:
        talk = engine.conversation(params=scripted(engine.tokenizer, "</think>"), history="exact", retain=0)
        talk.say("hi")
        for turn in range(258):
            talk.rollback(1)
            talk.say(f"hi {turn}")
        assert len(talk.breaks) == 256 and talk.breaks[-1].after.count("hi 257")
        assert talk.breaks[0].after.count("hi 2")


def test_a_callers_own_way_to_shorten() -> None:
    asked: list[int] = []

    def shorten(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        asked.append(len(messages))
        return [messages[0], {"role": "user", "content": "in short"}, *messages[-2:]]

    with serve(context=200) as engine:
        talk = engine.conversation("Be kind.", params=LETTERS, on_overflow=shorten)
        while not asked:
            answer = talk.say("hi").outputs[0]
        assert len(talk.messages) == 5 and talk.messages[1]["content"] == "in short"
        before = talk.last_message
        for shortened in (lambda m: m, lambda m: 5, lambda m: []):
            broken = engine.conversation("x" * 120, params=LETTERS, on_overflow=shortened)
            with pytest.raises(InvalidRequest):
                broken.say("x" * 60)
        assert talk.last_message == before == {"role": "assistant", "content": answer.text}


# -- kept while the agent works ---------------------------------------------------------------------------


def test_a_path_is_retained_between_turns_and_let_go() -> None:
    clock = Clock()
    with serve(clock) as engine:
        talk = engine.conversation(params=LETTERS, retain=60)
        talk.say("hi")
        assert engine.stats().kv_tokens_pinned == len(talk.token_ids) - 1
        engine.reset_prefix_cache()
        assert talk.say("there").num_cached_tokens > 0
        assert engine.stats().num_pins == 1
        clock.now = 61
        engine.generate([1], LETTERS)
        assert engine.stats().num_pins == 0
        talk.say("back")
        assert engine.stats().num_pins == 1
        talk.close()
        talk.close()
        assert engine.stats().num_pins == 0
        engine.check()


@pytest.mark.parametrize(("retain", "pins"), [(0, 0), (None, 1), (5.0, 1)])
def test_how_long_it_is_retained(engine: Engine, retain: float | None, pins: int) -> None:
    with engine.conversation(params=LETTERS, retain=retain) as talk:
        talk.say("hi")
        assert engine.stats().num_pins == pins
        assert talk.preload() > 0 and engine.stats().num_pins == pins
    assert engine.stats().num_pins == 0


def test_what_is_retained_gives_way_to_requests() -> None:
    with serve(kv_tokens=256) as engine:
        talks = [engine.conversation(params=LETTERS, retain=None) for _ in range(12)]
        for turn in range(3):
            for name, talk in zip("abcdefghijkl", talks, strict=True):
                assert talk.say(name * 10 + str(turn)).outputs[0].finish_reason == "length"
                engine.check()
        assert engine.stats().num_pins < 12
        for talk in talks:
            talk.close()
        assert engine.stats().num_pins == 0


def test_a_conversation_without_a_pin_works_all_the_same() -> None:
    with serve(limits=Limits(max_pins=1)) as engine:
        first, second = engine.conversation(params=LETTERS), engine.conversation(params=LETTERS)
        first.say("hi")
        second.say("you")
        assert second.say("and you").num_cached_tokens > 0 and engine.stats().num_pins == 1
        first.close()
        second.say("at last")
        assert engine.stats().num_pins == 1
        second.close()
        assert engine.stats().num_pins == 0


def test_an_expired_pin_takes_no_place() -> None:
    """Pins that an expired pin was counted until the next step, however long the engine stood idle."""
    clock = Clock()
    with serve(clock, limits=Limits(max_pins=1)) as engine:
        engine.generate([[1, 2, 3], [4, 5, 6]], GREEDY)
        assert engine.pin([1, 2, 3], ttl=1) is not None
        with pytest.raises(LimitReached):
            engine.pin([4, 5, 6])
        clock.now = 2
        assert engine.pin([4, 5, 6]) is not None


def test_a_pin_replaces_another(engine: Engine) -> None:
    engine.generate([[1, 2, 3], [4, 5, 6]], GREEDY)
    first = engine.pin([1, 2, 3])
    second = engine.pin([4, 5, 6], replaces=first)
    assert engine.stats().num_pins == 1 and not engine.unpin(first) and engine.unpin(second)


def test_preload(engine: Engine) -> None:
    prompts = [[5, *range(20)], [5, *range(30)], "the rain"]
    before = engine.stats()
    pins = engine.preload(prompts, ttl=60)
    assert engine.stats().computed_rows - before.computed_rows == 31 + len(CHATML("the rain")["input_ids"])
    assert engine.stats().num_pins == 3 and None not in pins
    assert engine.stats().kv_tokens_used == engine.stats().kv_tokens_pinned, "nothing else stays"
    engine.reset_prefix_cache()
    assert engine.generate([prompts[1]], GREEDY)[0].num_cached_tokens == 31
    assert all(engine.unpin(pin) for pin in pins)


def test_preload_is_all_or_nothing() -> None:
    with serve(limits=Limits(max_pins=1)) as engine:
        with pytest.raises(LimitReached, match="at most 1"):
            engine.preload([[1, 2], [3, 4]])
        for prompts in ([[1, 2], []], [[1], [-1]], 5, [None]):
            with pytest.raises(InvalidRequest):
                engine.preload(prompts)
        for bad in ({"ttl": 0}, {"namespace": 5}, {"priority": "x"}):
            with pytest.raises(InvalidRequest):
                engine.preload([1, 2], **bad)
        assert engine.stats().computed_rows == 0 and engine.preload([]) == []


def test_a_conversation_is_preloaded_before_its_first_turn(engine: Engine) -> None:
    talks = [engine.conversation("Be very kind.", params=LETTERS) for _ in range(3)]
    prefix = talks[0].preload()
    rows = engine.stats().computed_rows
    assert rows == prefix and CHATML.decode(talks[0].say("hi").prompt_token_ids[:prefix]).endswith("user\n")
    assert talks[1].say("oh").num_cached_tokens >= prefix and talks[2].preload() == prefix


def test_namespaces_share_nothing(engine: Engine) -> None:
    outputs = []
    for namespace in ("a", "b", "a"):
        with engine.conversation(params=LETTERS, namespace=namespace) as talk:
            outputs.append(talk.say("hi").num_cached_tokens)
    assert outputs[:2] == [0, 0] and outputs[2] > 0


def test_an_engine_that_shares_nothing_serves_conversations() -> None:
    with serve(share=False) as engine, engine.conversation(params=LETTERS) as talk:
        talk.say("hi")
        assert talk.say("there").num_cached_tokens == 0 and engine.stats().num_pins == 0


# -- saved ------------------------------------------------------------------------------------------------


def test_what_is_saved_goes_on_in_another_engine(engine: Engine) -> None:
    talk = engine.conversation("Be kind.", params=LETTERS, namespace="mine")
    for turn in range(3):
        talk.say(f"hi {turn}")
    talk.rollback(2)
    talk.add({"role": "user", "content": "wait"})
    saved = talk.save()
    assert json.loads(saved)["version"] == 1
    with serve() as other:
        loaded = Conversation.load(other, saved, params=LETTERS)
        assert (loaded.messages, loaded.token_ids, loaded.num_turns) == (talk.messages, talk.token_ids, 2)
        assert loaded.save() == saved and loaded.namespace == "mine"
        prefix = loaded.preload()
        assert prefix > len(loaded.token_ids)
        output = loaded.say("now")
        assert output.num_cached_tokens >= len(talk.token_ids) - 1
        assert output.prompt_token_ids == talk.say("now").prompt_token_ids
        assert loaded.token_ids == talk.token_ids
        loaded.rollback(1)
        talk.rollback(1)
        assert loaded.token_ids == talk.token_ids
        other.check()


def test_an_exact_history_is_saved_with_its_tools() -> None:
    with thinking_engine() as engine:
        tools = [{"type": "function", "function": {"name": "clock"}}]
        params = scripted(engine.tokenizer, "</think>")
        talk = engine.conversation(
            tools=tools, params=params, history="exact", template_options={"enable_thinking": False}
        )
        for _ in range(3):
            talk.say("hi")
        loaded = Conversation.load(engine, talk.save(), params=params)
        assert loaded.save() == talk.save() and loaded.token_ids == talk.token_ids
        assert loaded.say("on").prompt_token_ids == talk.say("on").prompt_token_ids


def damaged(engine: Engine) -> dict[str, str]:
    with engine.conversation("Be kind.", params=LETTERS) as talk:
        for turn in range(2):
            talk.say(f"hi {turn}")
        good = talk.save()

    def changed(*path: Any, to: object) -> str:
        tree = value = json.loads(good)
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = to
        return json.dumps(tree)

    last = ("turns", 2, "exchanges", 0)
    found = {
        "no text": good.encode(),
        "no JSON": good[:-1],
        "deep": "[" * 100_000,
        "a list": "[]",
        "another version": changed("version", to=2),
        "a boolean version": changed("version", to=True),
        "an unknown field": changed("more", to=1),
        "an unknown mode": changed("history", to="vague"),
        "no turns": changed("turns", to=[]),
        "a turn that is none": changed("turns", 1, to=5),
        "keeps too much": changed("turns", 1, "kept_messages", to=9),
        "keeps less than nothing": changed("turns", 1, "kept_exchanges", to=-1),
        "fewer messages": changed("turns", 2, "messages", to=[]),
        "a message without a role": changed("turns", 2, "messages", 0, to={"content": "x"}),
        "ids that are none": changed(*last, "answer_ids", to=["a"]),
        "an id beyond the model": changed(*last, "prompt_ids", 0, to=VOCAB),
        "a negative id": changed(*last, "answer_ids", 0, to=-1),
        "a boolean id": changed(*last, "answer_ids", 0, to=True),
        "an end beyond the model": changed("turns", 2, "end", to=2**40),
        "an answer in no message": changed(*last, "at", to=99),
        "an answer before the one before": changed(*last, "at", to=1),
        "another text": changed(*last, "answer", to="other"),
        "a namespace that is none": changed("namespace", to=None),
        "a turn before the first": changed("forgotten", to=-1),
        "tools that are none": changed("tools", to=["x"]),
        "options of ours": changed("template_options", to={"tokenize": True}),
    }
    assert Conversation.load(engine, good).save() == good
    return found  # type: ignore[return-value]


def test_what_is_loaded_is_checked(engine: Engine) -> None:
    for name, saved in damaged(engine).items():
        with pytest.raises(InvalidRequest) as caught:
            Conversation.load(engine, saved)
        assert caught.value.field and caught.value.limit, name
    with serve(limits=Limits(max_saved_chars=10)) as small, pytest.raises(InvalidRequest, match="at most 10"):
        Conversation.load(small, " " * 11)


# -- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"system": 5}, "system"),
        ({"params": {}}, "params"),
        ({"namespace": None}, "namespace"),
        ({"namespace": "x" * 257}, "namespace"),
        ({"priority": 1.5}, "priority"),
        ({"priority": 2**31}, "priority"),
        ({"retain": -1}, "retain"),
        ({"retain": True}, "retain"),
        ({"retain": False}, "retain"),
        ({"retain": float("nan")}, "retain"),
        ({"retain": "soon"}, "retain"),
        ({"history": "vague"}, "history"),
        ({"history": None}, "history"),
        ({"tools": "clock"}, "tools"),
        ({"tools": [5]}, "tools"),
        ({"tools": [lambda x: x]}, "tools"),
        ({"tools": {"name": "x"}}, "tools"),
        ({"template_options": 5}, "template_options"),
        ({"template_options": {"tools": []}}, "template_options.tools"),
        ({"template_options": {"x": object()}}, "template_options"),
        ({"on_overflow": "hope"}, "on_overflow"),
        ({"on_overflow": None}, "on_overflow"),
        ({"on_break": 5}, "on_break"),
    ],
    ids=name_of,
)
def test_bad_options_are_named(engine: Engine, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        engine.conversation(**options)
    assert caught.value.field == field and caught.value.limit


BAD_MESSAGES = [
    5, b"hi", [5], [None], {}, {"content": "no role"}, {"role": 5, "content": "x"}, {1, 2}, [["hi"]],
    {"role": "user", "content": object()}, {"role": "user", "content": float("nan")},
    {"role": "user", "content": {"a": {1}}},
]  # fmt: skip


@pytest.mark.parametrize("message", BAD_MESSAGES, ids=name_of)
def test_bad_messages_are_named_and_change_nothing(engine: Engine, message: object) -> None:
    talk = engine.conversation(params=LETTERS)
    talk.say("hi")
    before = talk.save()
    for entry in (talk.say, talk.stream, talk.add):
        with pytest.raises(InvalidRequest):
            entry(message)
    assert talk.save() == before and talk.say("there").finished


def test_bad_turns_are_named_and_change_nothing(engine: Engine) -> None:
    talk = engine.conversation(params=LETTERS)
    with pytest.raises(InvalidRequest, match="messages"):
        talk.say()
    talk.say("hi")
    before = talk.save()
    for params in (SamplingParams(n=2), SamplingParams(max_tokens=0), BeamSearchParams(beam_width=2), {}, "x", 5):
        with pytest.raises(InvalidRequest):
            talk.say("there", params)
    for timeout in (0, -1, "x", float("nan")):
        with pytest.raises(InvalidRequest):
            talk.say("there", timeout=timeout)
    for turn in (-1, 2, 1.0, True, None, "1"):
        with pytest.raises(InvalidRequest, match="turn"):
            talk.rollback(turn)
    for n in (0, -1, 129, True, None, 1.5):
        with pytest.raises(InvalidRequest, match="n="):
            talk.fork(n)
    assert talk.save() == before
    with talk.stream("there") as stream:
        next(stream)
        for busy in (lambda: talk.say("x"), lambda: talk.add("x"), talk.fork, talk.preload, lambda: talk.rollback(0)):
            with pytest.raises(InvalidRequest, match="is not over"):
                busy()
    talk.close()
    for closed in (lambda: talk.say("x"), lambda: talk.add("x"), talk.fork, talk.preload, lambda: talk.rollback(0)):
        with pytest.raises(InvalidRequest, match="closed"):
            closed()
    assert talk.num_turns == 2 and talk.save() and talk.messages


def test_messages_are_copies(engine: Engine) -> None:
    said = {"role": "user", "content": "hi", "meta": ["x"]}
    talk = engine.conversation(params=LETTERS)
    talk.say(said)
    before = talk.save()
    said["meta"].append("y")
    talk.messages[0]["meta"].append("z")
    talk.last_message["content"] = "other"
    talk.token_ids.append(5)
    assert talk.save() == before


def test_a_model_without_a_chat_template_has_no_conversations() -> None:
    for tokenizer in (None, templates.tokenizer(templates.Family("", (), "a"))):
        engine = Engine(StampModel(VOCAB, 64), tokenizer=tokenizer, kv_tokens=64)
        with engine, pytest.raises(InvalidRequest, match="no chat template"):
            engine.conversation()


def test_a_function_is_a_tool() -> None:
    def clock(zone: str) -> str:
        """
        Tell the time.

        Args:
            zone: where
        """
        return zone

    tokenizer = templates.tokenizer(templates.FAMILIES["qwen2.5"])
    with Engine(StampModel(len(tokenizer), 2048), tokenizer=tokenizer, kv_tokens=2048) as engine:
        talk = engine.conversation(tools=[clock], params=SamplingParams(max_tokens=1))
        assert "Tell the time." in tokenizer.decode(talk.say("hi").prompt_token_ids)


# -- random histories -------------------------------------------------------------------------------------

SMALL = Limits(max_pins=3)
WORDS = st.sampled_from(["hi", "the rain", " ", "", "in Spain\n", "é漢"])
ANY_PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0]),
    max_tokens=st.integers(1, 6),
    seed=st.integers(0, 3),
    stop=st.sampled_from([(), ("a",), ("he", "n")]),
    include_stop_str_in_output=st.booleans(),
    stop_token_ids=st.sampled_from([(), (5, 6, 7)]),
    logit_bias=st.sampled_from([None, PLAIN, {END: 8.0}, LETTERS.logit_bias]),
)


class Talks(RuleBasedStateMachine):
    """Random turns, forks, rollbacks and cuts on one small engine, against lists of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.engine = serve(self.clock, kv_tokens=700, context=640, limits=SMALL)
        self.talks: list[Conversation] = []
        self.ends: list[list[list[int]]] = []
        """For each conversation its tokens at the end of every turn."""

    @initialize(mode=st.sampled_from(["template", "exact"]), overflow=st.sampled_from(["error", "drop_oldest"]))
    def begin(self, mode: str, overflow: str) -> None:
        self.exact = mode == "exact"
        self.talks = [self.engine.conversation("Be kind.", history=mode, on_overflow=overflow, retain=9)]
        self.ends = [[[]]]

    @rule(which=st.integers(0, 9), word=WORDS, params=ANY_PARAMS, steps=st.sampled_from([None, None, 0, 1, 3]))
    def say(self, which: int, word: str, params: SamplingParams, steps: int | None) -> None:
        which %= len(self.talks)
        talk, ends = self.talks[which], self.ends[which]
        kept, breaks, turns, whole = talk.token_ids, list(talk.breaks), talk.num_turns, len(talk.messages)
        try:
            stream = talk.stream(word, params)
        except ContextOverflow:
            assert talk.token_ids == kept and len(talk.messages) == whole
            return
        with stream:
            got = list(islice(stream, steps))
        if talk.num_turns == turns:
            assert not any(output.outputs[0].token_ids for output in got)
            return
        prompt = got[0].prompt_token_ids
        tokens = [token for output in got for token in output.outputs[0].token_ids]
        assert talk.num_turns == turns + 1 and talk.token_ids[: len(prompt)] == prompt
        assert tokens[: len(talk.token_ids) - len(prompt)] == talk.token_ids[len(prompt) :]
        fresh = [found for found in talk.breaks if found not in breaks]
        shortened = len(talk.messages) < whole + 2
        if not shortened and (self.exact or not fresh) and len(kept):
            assert prompt[: len(kept) - 1] == kept[:-1]
        text = CHATML.decode(prompt)
        if not self.exact and "\ufffd" not in text:
            assert text == talk._history.template.render(talk.messages[:-1])
        ends.append(talk.token_ids)

    @rule(which=st.integers(0, 9), word=WORDS)
    def add(self, which: int, word: str) -> None:
        self.talks[which % len(self.talks)].add({"role": "tool", "content": word})

    @precondition(lambda self: len(self.talks) < 5)
    @rule(which=st.integers(0, 9), n=st.integers(1, 2))
    def fork(self, which: int, n: int) -> None:
        which %= len(self.talks)
        rows = self.engine.stats().computed_rows
        self.talks += self.talks[which].fork(n)
        self.ends += [list(self.ends[which]) for _ in range(n)]
        assert self.engine.stats().computed_rows == rows

    @rule(which=st.integers(0, 9), back=st.integers(0, 3))
    def rollback(self, which: int, back: int) -> None:
        which %= len(self.talks)
        talk, ends = self.talks[which], self.ends[which]
        talk.rollback(max(talk.num_turns - back, 0))
        del ends[talk.num_turns + 1 :]
        assert talk.token_ids == ends[-1]

    @precondition(lambda self: len(self.talks) > 1)
    @rule(which=st.integers(0, 9))
    def close(self, which: int) -> None:
        which %= len(self.talks)
        self.talks.pop(which).close()
        self.ends.pop(which)

    @rule(which=st.integers(0, 9))
    def save_and_load(self, which: int) -> None:
        which %= len(self.talks)
        talk = self.talks[which]
        again = Conversation.load(self.engine, talk.save(), retain=9, on_overflow=talk._on_overflow)
        assert again.save() == talk.save() and again.token_ids == talk.token_ids
        again.breaks = talk.breaks
        talk.close()
        self.talks[which] = again

    @rule(seconds=st.integers(1, 10))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule()
    def forget(self) -> None:
        self.engine.reset_prefix_cache()

    @invariant()
    def sound(self) -> None:
        self.engine.check()
        assert not self.engine.has_unfinished
        assert all(talk.token_ids == ends[-1] for talk, ends in zip(self.talks, self.ends, strict=True))
        assert all(len(talk._history.turns) == len(ends) for talk, ends in zip(self.talks, self.ends, strict=True))

    def teardown(self) -> None:
        for talk in self.talks:
            talk.close()
        assert self.engine.stats().num_pins == 0
        self.engine.close()


TestTalks = Talks.TestCase
TestTalks.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)


# -- for coroutines ---------------------------------------------------------------------------------------


def run(test: Callable[[AsyncEngine], Awaitable[Any]], **options: Any) -> Any:
    async def whole() -> Any:
        async with AsyncEngine(serve(**options)) as engine:
            result = await test(engine)
            await engine.check()
            return result

    return asyncio.run(asyncio.wait_for(whole(), 60))


def test_async_conversations_are_those_of_the_engine() -> None:
    with serve() as plain:
        talk = plain.conversation("Be kind.", params=LETTERS)
        expected = [talk.say(f"hi {turn}").outputs[0].token_ids for turn in range(4)]
        saved = talk.save()

    async def test(engine: AsyncEngine) -> None:
        async with engine.conversation("Be kind.", params=LETTERS) as talk:
            for turn in range(4):
                kept = talk.token_ids
                output = await talk.say(f"hi {turn}")
                assert output.outputs[0].token_ids == expected[turn]
                assert output.prompt_token_ids[: len(kept)] == kept and output.num_cached_tokens >= len(kept) - 1
            assert talk.save() == saved and (await engine.stats()).num_pins == 1
            forks = await talk.fork(3)
            outputs = await asyncio.gather(*(fork.say("on") for fork in forks))
            assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
            talk.rollback(1)
            talk.add("wait")
            assert talk.num_turns == 1 and len(talk.messages) == 4
            for fork in forks:
                await fork.close()
        assert (await engine.stats()).num_pins == 0
        loaded = AsyncConversation.load(engine, saved, params=LETTERS)
        await engine.reset_prefix_cache()
        prefix = await loaded.preload()
        assert (await loaded.say("hi")).num_cached_tokens >= prefix > len(loaded.token_ids) // 2
        await loaded.close()

    run(test)


def test_an_async_stream_that_is_left_keeps_what_it_gave() -> None:
    async def test(engine: AsyncEngine) -> None:
        talk = engine.conversation(
            params=SamplingParams(temperature=0.0, max_tokens=500, logit_bias=LETTERS.logit_bias)
        )
        given = ""
        async for delta in talk.stream("hi"):
            given += delta.outputs[0].text
            if len(given) > 3:
                break
        assert talk.num_turns == 1 and talk.last_message["content"] == given
        async with talk.stream("there") as stream:
            await anext(stream)
            for busy in (talk.say("x"), talk.fork(), talk.preload()):
                with pytest.raises(InvalidRequest, match="is not over"):
                    await busy
            with pytest.raises(InvalidRequest, match="is not over"):
                talk.stream("x")
        assert talk.num_turns == 2
        async with talk.stream("never asked for"):
            pass
        del stream
        assert talk.num_turns == 2
        while (await engine.stats()).num_running:
            await asyncio.sleep(0.001)
        await talk.close()
        assert (await engine.stats()).num_pins == 0

    run(test)


def test_a_cancelled_say_leaves_the_conversation_as_it_was() -> None:
    async def test(engine: AsyncEngine) -> None:
        talk = engine.conversation(
            params=SamplingParams(temperature=0.0, max_tokens=500, logit_bias=LETTERS.logit_bias)
        )
        await talk.say("hi", LETTERS)
        before = talk.save()
        for delay in (0, 0, 0.001, 0.01, 0.02):
            task = asyncio.create_task(talk.say("there"))
            await asyncio.sleep(delay)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert talk.save() == before
        assert (await talk.say("there", LETTERS)).finished
        await talk.close()
        assert (await engine.stats()).num_pins == 0

    run(test)


def test_async_refusals() -> None:
    async def test(engine: AsyncEngine) -> None:
        talk = engine.conversation(params=LETTERS)
        await talk.say("hi")
        before = talk.save()
        for bad in (5, [None]):
            with pytest.raises(InvalidRequest):
                await talk.say(bad)
        with pytest.raises(InvalidRequest):
            await talk.say("x", SamplingParams(n=2))
        with pytest.raises(ContextOverflow):
            await talk.say("x" * 5000)
        with pytest.raises(InvalidRequest):
            await talk.fork(0)
        assert talk.save() == before and (await talk.say("there")).finished
        await talk.close()
        with pytest.raises(InvalidRequest, match="closed"):
            await talk.say("x")

    run(test)


def test_async_preload() -> None:
    async def test(engine: AsyncEngine) -> None:
        pins = await engine.preload([[1, 2, 3], [1, 2, 4], [9]], ttl=60)
        assert None not in pins and (await engine.stats()).computed_rows == 5
        assert all([await engine.unpin(pin) for pin in pins])
        for prompts, ttl in (([[1], []], None), ([[1]], -1), (5, None)):
            with pytest.raises(InvalidRequest):
                await engine.preload(prompts, ttl=ttl)
        assert (await engine.stats()).num_pins == 0
        for delay in (0, 0, 0.001, 0.003, 0.01):
            task = asyncio.create_task(engine.preload([[name, *range(40)] for name in range(6)]))
            await asyncio.sleep(delay)
            if not task.cancel():
                assert all([await engine.unpin(pin) for pin in await task])
            await asyncio.wait([task])
        assert (await engine.stats()).num_pins == 0

    run(test)

    async def crowded(engine: AsyncEngine) -> None:
        with pytest.raises(LimitReached):
            await engine.preload([[1], [2], [3]])
        assert (await engine.stats()).num_pins == 0

    run(crowded, limits=Limits(max_pins=2))


def test_agents_at_once() -> None:
    """Thirty agents with one system prompt, each with its own tool results; the pool holds far fewer pins."""

    async def agent(engine: AsyncEngine, name: int) -> list[int]:
        async with engine.conversation("Use tools well.", params=LETTERS) as talk:
            for turn in range(4):
                kept = talk.token_ids
                output = await talk.say(f"agent {name}" if turn == 0 else {"role": "tool", "content": f"{name} {turn}"})
                assert output.prompt_token_ids[: len(kept)] == kept
            return talk.token_ids

    async def test(engine: AsyncEngine) -> list[list[int]]:
        found = await asyncio.gather(*(agent(engine, name) for name in range(30)))
        assert (await engine.stats()).num_pins == 0
        return found

    assert run(test, limits=Limits(max_pins=8), kv_tokens=1500) == run(test)
