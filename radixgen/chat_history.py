"""Token-exact history of a chat: messages in, token ids out. Generated tokens are kept. Knows no engine.

A history is a chain of exchanges: what the template wrote, and what the model answered to it.

    template's render   |-- prompt 1 --|-- answer 1 --|-- prompt 2 --|-- answer 2 --|-- prompt 3 --|
    tokens              |  tokenized   |  generated   |  tokenized   |  generated   |  tokenized   |

Texts are compared, never tokens: while the render of a longer chat begins with what was rendered and answered before,
only what follows is tokenized. Where it does not, the template has rewritten history: a break.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Container, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import chain
from operator import eq
from typing import Any, Literal

from radixgen.chat_template import ChatTemplate, Message
from radixgen.core import CompletionOutput, InvalidRequest, check_integer, end_token

HistoryMode = Literal["template", "exact"]
HISTORY_MODES = ("template", "exact")
_EXCERPT = 160
"""Characters, and tokens, of either text that a break shows at the most."""
_REACH = 256
"""Turns that a shortened history can go back to."""
_MARK = "radixgen-answer"
_TAIL = 16


@dataclass(frozen=True, slots=True)
class HistoryBreak:
    """A place where the chat template writes an earlier turn otherwise than it stood.

    `turn`: the turn, from 1, whose prompt showed it. `position`: how many tokens from the beginning on stay as they
    were. `before`, `after`: what the history said from that token on and what the template writes, up to 160 characters
    of each. `followed`: whether the history is now what the template writes; else its tokens are kept.
    """

    turn: int
    position: int
    before: str
    after: str
    followed: bool


@dataclass(frozen=True, slots=True)
class Exchange:
    """The text that the template wrote since the answer before, and the answer; with the tokens of both.

    The texts are those that the template writes now. The tokens of an `"exact"` history may say something else.
    `at`: the answer's place among the messages.
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    answer: str
    answer_ids: tuple[int, ...]
    at: int

    @property
    def text(self) -> str:
        return self.prompt + self.answer

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.answer_ids


@dataclass(frozen=True, slots=True)
class State:
    """A history at one moment. `end`: the end-of-turn token that the model generated after the last answer."""

    messages: tuple[Message, ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    end: int | None = None

    @property
    def token_ids(self) -> list[int]:
        """Everything up to the end of the last answer."""
        ids = list(chain.from_iterable(exchange.token_ids for exchange in self.exchanges))
        return ids if self.end is None else [*ids, self.end]


@dataclass(frozen=True, slots=True)
class Draft:
    """A turn before its answer: the history that it goes on from, and the prompt that follows."""

    messages: tuple[Message, ...]
    exchanges: tuple[Exchange, ...]
    prompt: str
    prompt_ids: tuple[int, ...]
    found: HistoryBreak | None = None

    @property
    def text(self) -> str:
        """The template's whole render."""
        return "".join([*(exchange.text for exchange in self.exchanges), self.prompt])

    @property
    def token_ids(self) -> list[int]:
        """The whole prompt of the request."""
        return [*chain.from_iterable(exchange.token_ids for exchange in self.exchanges), *self.prompt_ids]


class ChatHistory:
    """What was said, turn by turn, and the tokens of it.

    mode: what is done where the template rewrites an earlier turn. `"template"` goes on with what the template writes,
        as the model was trained on it: tokens before the break stay, generated tokens after it stay where their text
        does, and the rest is tokenized anew. `"exact"` keeps every token as it was; where the template no longer shows
        where an answer stands, it is followed all the same.

    Drafts and states never change, so that a fork or a rollback copies nothing. A history that was shortened goes back
    256 turns, or as many as it holds messages; what is earlier is forgotten.
    """

    def __init__(
        self, template: ChatTemplate, messages: tuple[Message, ...] = (), mode: HistoryMode = "template"
    ) -> None:
        if mode not in HISTORY_MODES:
            raise InvalidRequest("history", mode, f"must be one of {', '.join(HISTORY_MODES)}")
        self.template = template
        self.mode: HistoryMode = mode
        self.state = State(messages)
        self.turns = [self.state]
        """The state at the end of each turn that can be gone back to; the first is that before any, or of turn
        `forgotten`.
        """
        self.forgotten = 0

    @property
    def num_turns(self) -> int:
        return self.forgotten + len(self.turns) - 1

    def fork(self) -> "ChatHistory":
        """A history of its own that goes on from here."""
        twin = ChatHistory(self.template, mode=self.mode)
        twin.state, twin.turns, twin.forgotten = self.state, self.turns.copy(), self.forgotten
        return twin

    def rollback(self, turn: int) -> None:
        """Back to the end of turn `turn`; 0: to the beginning. Raises `InvalidRequest`, also where it is forgotten."""
        check_integer("turn", turn, self.forgotten, self.num_turns)
        del self.turns[turn - self.forgotten + 1 :]
        self.state = self.turns[-1]

    def add(self, messages: tuple[Message, ...]) -> None:
        """Messages that the next turn's prompt will hold."""
        self._check_count(len(self.state.messages) + len(messages))
        self.state = replace(self.state, messages=self.state.messages + messages)

    def draft(self, messages: tuple[Message, ...] = ()) -> Draft:
        """The next turn, with `messages` after all others. Changes nothing. Raises `InvalidRequest`."""
        exact = self.mode == "exact"
        return self._draft(self.state.messages + messages, self.state.exchanges, self.state.end, exact=exact)

    def redraft(self, messages: tuple[Message, ...]) -> Draft:
        """The next turn, with `messages` in place of all that were said. The answers among them keep their tokens.
        Raises `InvalidRequest`.
        """
        exchanges = tuple(self._remaining(messages))
        kept = exchanges and exchanges[-1].answer_ids is self.state.exchanges[-1].answer_ids
        return replace(self._draft(messages, exchanges, self.state.end if kept else None, exact=False), found=None)

    def answer(
        self,
        draft: Draft,
        output: CompletionOutput,
        eos_token_ids: Container[int],
        *,
        include_stop: bool = False,
        show_special: bool = False,
    ) -> None:
        """The draft's answer: `output`, whole and ended, of a model with these end tokens. A turn ends here.

        The token that ended the answer is none of it: the template writes it, and it is kept where the template writes
        the same. Neither is a stop string: the tokens before it are kept, and where it begins inside a token, the rest
        of that is tokenized anew. An answer that ended otherwise gets its end from the template.
        """
        ids, end = self._cut(draft, output, eos_token_ids, include_stop, show_special)
        before = draft.token_ids[-_TAIL:]
        answer = self.template.text(ids, before)
        raw = answer if end is None else answer + self.template.text([end])
        if isinstance(output.stop_reason, str) and output.finish_reason == "stop":
            raw += output.text[len(self.template.text(ids, before, special=show_special)) :]
        message = self.template.message(output.text, raw, draft.text)
        exchange = Exchange(draft.prompt, draft.prompt_ids, answer, tuple(ids), len(draft.messages))
        self.state = State((*draft.messages, message), (*draft.exchanges, exchange), end)
        self.turns.append(self.state)
        self._forget()

    # -- the next prompt ----------------------------------------------------------------------------------

    def _draft(
        self, messages: tuple[Message, ...], exchanges: tuple[Exchange, ...], end: int | None, *, exact: bool
    ) -> Draft:
        self._check_count(len(messages) + 1)
        text = self.template.render(messages)
        said = "".join(exchange.text for exchange in exchanges)
        if text.startswith(said):
            prompt = text[len(said) :]
            return Draft(messages, exchanges, prompt, self._prompt_ids(prompt, said, end))
        parts = self._parts(messages, exchanges, text)
        if parts is None:
            followed, prompt = self._unchanged(exchanges, text)
        else:
            followed, prompt = self._follow(exchanges, parts), parts[-1]
        prompt_ids = self._prompt_ids(prompt, text.removesuffix(prompt), end)
        found = self._break(exchanges, Draft(messages, followed, prompt, prompt_ids))
        if parts is None or not exact:
            return Draft(messages, followed, prompt, prompt_ids, found)
        kept = tuple(
            _changed(exchange, prompt=now.prompt, answer=now.answer)
            for exchange, now in zip(exchanges, followed, strict=True)
        )
        return Draft(messages, kept, prompt, prompt_ids, replace(found, followed=False))

    def _prompt_ids(self, prompt: str, said: str, end: int | None) -> tuple[int, ...]:
        """Tokens of what follows the last answer; the end-of-turn token that the model generated is kept where the
        template writes it too.
        """
        written = "" if end is None else self.template.text([end])
        if end is None or not written or not prompt.startswith(written):
            return self.template.tokenize(prompt, said)
        return (end, *self.template.tokenize(prompt[len(written) :], said + written))

    def _parts(self, messages: Seq[Message], exchanges: Seq[Exchange], text: str) -> list[str] | None:
        """The template's render cut before and after each answer: prompt, answer, prompt, …, prompt. None where it
        cannot be told: the places are found by a render with marks in place of the answers.
        """
        mark = _MARK
        while mark in text:
            mark += "-"
        marks = [f"{mark}{index:06}" for index in range(len(exchanges))]
        marked = list(messages)
        for exchange, own in zip(exchanges, marks, strict=True):
            marked[exchange.at] = {"role": messages[exchange.at]["role"], "content": own}
        try:
            rest = self.template.render(marked)
        except InvalidRequest:
            return None
        prompts = []
        for own in marks:
            prompt, _, rest = rest.partition(own)
            prompts.append(prompt)
        return _between([*prompts, rest], exchanges, text)

    def _follow(self, exchanges: Seq[Exchange], parts: Seq[str]) -> tuple[Exchange, ...]:
        """The exchanges as the template writes them; tokens stay where their text does."""
        followed, said = [], ""
        for index, exchange in enumerate(exchanges):
            prompt, answer = parts[2 * index : 2 * index + 2]
            prompt_ids, answer_ids = exchange.prompt_ids, exchange.answer_ids
            if prompt + answer == exchange.text:
                prompt, answer = exchange.prompt, exchange.answer
            if prompt != exchange.prompt:
                prompt_ids = self.template.tokenize(prompt, said)
            if answer != exchange.answer:
                answer_ids = self._rewritten(exchange, answer, said + prompt)
            now = {"prompt": prompt, "prompt_ids": prompt_ids, "answer": answer, "answer_ids": answer_ids}
            followed.append(_changed(exchange, **now))
            said += prompt + answer
        return tuple(followed)

    def _unchanged(self, exchanges: Seq[Exchange], text: str) -> tuple[tuple[Exchange, ...], str]:
        """The exchanges that the template writes as they stood, and what it writes after them."""
        followed = []
        for exchange in exchanges:
            if not text.startswith(exchange.text):
                break
            followed.append(exchange)
            text = text[len(exchange.text) :]
        return tuple(followed), text

    def _rewritten(self, exchange: Exchange, text: str, said: str) -> tuple[int, ...]:
        """The answer's tokens where the template makes `text` of it: those that were generated as far as they say the
        same, the rest tokenized.
        """
        ids: tuple[int, ...] = ()
        done = 0
        for first, stop, place in self._kept(exchange, text):
            kept = exchange.answer_ids[first:stop]
            own = self.template.text(kept, exchange.prompt_ids + exchange.answer_ids[:first])
            if place < done or text[place : place + len(own)] != own:
                return self.template.tokenize(text, said)
            ids += self.template.tokenize(text[done:place], said + text[:done]) + kept
            done = place + len(own)
        return ids + self.template.tokenize(text[done:], said + text[:done])

    def _kept(self, exchange: Exchange, text: str) -> Iterator[tuple[int, int, int]]:
        """Runs of the answer's tokens that lie wholly in what `text` has of it, each with its place there: all of
        `text` where that is a part of the answer, else what both begin with and what both end with.
        """
        answer = exchange.answer
        begin = answer.rfind(text)
        if begin >= 0:
            runs = [(begin, begin + len(text), 0)]
        else:
            head = num_common(answer, text)
            tail = num_common(answer[head:][::-1], text[head:][::-1])
            runs = [(0, head, 0), (len(answer) - tail, len(answer), len(text) - tail)]

        def characters(count: int) -> int:
            return len(self.template.text(exchange.answer_ids[:count], exchange.prompt_ids))

        counts = range(len(exchange.answer_ids) + 1)
        for low, high, place in runs:
            first = bisect_left(counts, low, key=characters)
            last = characters(bisect_right(counts, high, key=characters) - 1)
            stop = bisect_left(counts, last, key=characters)
            if first < stop:
                yield first, stop, place + characters(first) - low

    def _break(self, exchanges: Seq[Exchange], now: Draft) -> HistoryBreak:
        same = num_common([one.text for one in exchanges], [one.text for one in now.exchanges])
        old = list(chain.from_iterable(exchange.token_ids for exchange in exchanges[same:]))
        new = [*chain.from_iterable(exchange.token_ids for exchange in now.exchanges[same:]), *now.prompt_ids]
        common = num_common(old, new)
        return HistoryBreak(
            turn=self.num_turns + 1,
            position=sum(len(exchange.token_ids) for exchange in exchanges[:same]) + common,
            before=self.template.text(old[common : common + _EXCERPT])[:_EXCERPT],
            after=self.template.text(new[common : common + _EXCERPT])[:_EXCERPT],
            followed=True,
        )

    def _remaining(self, messages: tuple[Message, ...]) -> Iterator[Exchange]:
        """The exchanges whose answers are still among `messages`, in order, at their new places."""
        at = 0
        for exchange in self.state.exchanges:
            answer = self.state.messages[exchange.at]
            place = next((i for i in range(at, len(messages)) if messages[i] == answer), None)
            if place is not None:
                yield _changed(exchange, at=place)
                at = place + 1

    # -- the answer ---------------------------------------------------------------------------------------

    def _cut(
        self,
        draft: Draft,
        output: CompletionOutput,
        eos_token_ids: Container[int],
        include_stop: bool,
        show_special: bool,
    ) -> tuple[list[int], int | None]:
        """The answer's tokens without what ended it; and the token that ended it."""
        ids, end = output.token_ids, end_token(output, eos_token_ids)
        if end is not None:
            visible = include_stop and self.template.text(ids[-1:], ids[:-1], special=show_special)
            return (ids, None) if visible else (ids[:-1], end)
        if output.finish_reason != "stop" or output.stop_reason is None:
            return ids, None
        before = draft.token_ids[-_TAIL:]
        while ids and not output.text.startswith(self.template.text(ids, before, special=show_special)):
            ids = ids[:-1]
        said = self.template.text(ids, before)
        if not include_stop and said.endswith(str(output.stop_reason)):  # it is special tokens, which have no text
            length = len(said) - len(str(output.stop_reason))
            while len(self.template.text(ids, before)) > length:
                ids = ids[:-1]
        return ids, None

    def _forget(self) -> None:
        """Each turn adds a message, so that only a shortened history has more turns than messages."""
        reach = max(len(self.state.messages), min(_REACH, self.template.limits.max_messages))
        excess = max(len(self.turns) - 1 - reach, 0)
        del self.turns[:excess]
        self.forgotten += excess

    def _check_count(self, count: int) -> None:
        most = self.template.limits.max_messages
        if count > most:
            raise InvalidRequest("len(messages)", count, f"a conversation holds at most {most} messages")


def _changed(exchange: Exchange, **now: Any) -> Exchange:
    """`exchange` as it is now; itself where nothing is otherwise, so that states share it."""
    found = replace(exchange, **now)
    return exchange if found == exchange else found


def _between(prompts: Seq[str], exchanges: Seq[Exchange], text: str) -> list[str] | None:
    """`text` as prompts with an answer between each two of them; None where it is not that."""
    parts, at = [prompts[0]], len(prompts[0])
    if not text.startswith(prompts[0]):
        return None
    for index, (exchange, prompt) in enumerate(zip(exchanges, prompts[1:], strict=True), 2):
        if index == len(prompts):
            stop = len(text) - len(prompt)
        elif text.startswith(exchange.answer + prompt, at):
            stop = at + len(exchange.answer)
        else:
            stop = text.find(prompt, at)
        if stop < at:
            return None
        parts += [text[at:stop], prompt]
        at = stop + len(prompt)
    return parts if "".join(parts) == text else None


def num_common(one: Seq[object], other: Seq[object], same: Callable[[object, object], bool] = eq) -> int:
    """How many of the first items of two sequences are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if not same(a, b)), min(len(one), len(other)))
