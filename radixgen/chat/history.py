"""Token-exact history of a chat: messages in, token ids out. Generated tokens are kept.

A history is a chain of exchanges: a prompt that the chat template wrote, and the model's answer.

    template's render   |-- prompt 1 --|-- answer 1 --|-- prompt 2 --|-- answer 2 --|-- prompt 3 --|
    tokens              |  tokenized   |  generated   |  tokenized   |  generated   |  tokenized   |

Texts are compared, never tokens: as long as the render of a longer chat starts with the previous prompts and answers,
only the rest is tokenized. Otherwise the template has rewritten history, which is called a break.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Container, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import chain
from operator import eq
from typing import Any, Literal, NamedTuple

from radixgen.core import CacheHint, CompletionOutput, InvalidRequest, check_integer, end_token
from radixgen.text.chat_template import ChatTemplate, Message

HistoryMode = Literal["template", "exact"]
HISTORY_MODES = ("template", "exact")
_EXCERPT = 160
"""Maximum number of characters, and of tokens, in the excerpts of a break"""
_REACH = 256
"""Number of turns that a shortened history can go back"""
_MARK = "radixgen-answer"
_TAIL = 16


@dataclass(frozen=True, slots=True)
class HistoryBreak:
    """Place where the chat template rewrites an earlier turn.

    turn: number of the turn, from 1, whose prompt was rewritten.
    position: number of tokens before it, which do not change.
    before: up to 160 characters of the history from `position` on.
    after: the same of the text that the template renders.
    followed: True if the history now follows the template; False if it keeps its own tokens.
    """

    turn: int
    position: int
    before: str
    after: str
    followed: bool


@dataclass(frozen=True, slots=True)
class Exchange:
    """Text that the template wrote after the previous answer, and the next answer, with the tokens of both.

    Texts are those of the latest render; tokens of an `"exact"` history may differ from them.
    at: index of the answer among the messages.
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    answer: str
    answer_ids: tuple[int, ...]
    at: int

    @property
    def text(self) -> str:
        """Prompt and answer."""
        return self.prompt + self.answer

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of prompt and answer."""
        return self.prompt_ids + self.answer_ids


@dataclass(frozen=True, slots=True)
class State:
    """State of a history after a turn. `end`: end token that the model generated after the last answer."""

    messages: tuple[Message, ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    end: int | None = None

    @property
    def token_ids(self) -> list[int]:
        """All tokens up to the end of the last answer."""
        ids = list(chain.from_iterable(exchange.token_ids for exchange in self.exchanges))
        return ids if self.end is None else [*ids, self.end]


@dataclass(frozen=True, slots=True)
class Draft:
    """A turn without its answer: the history, and the prompt that follows it."""

    messages: tuple[Message, ...]
    exchanges: tuple[Exchange, ...]
    prompt: str
    prompt_ids: tuple[int, ...]
    history_break: HistoryBreak | None = None

    @property
    def text(self) -> str:
        """The whole render of the template."""
        return "".join([*(exchange.text for exchange in self.exchanges), self.prompt])

    @property
    def token_ids(self) -> list[int]:
        """Prompt tokens of the request."""
        return [*chain.from_iterable(exchange.token_ids for exchange in self.exchanges), *self.prompt_ids]


class Superseded(NamedTuple):
    """Tokens of a path that a turn left, and the hints that demote what the new path does not share."""

    token_ids: list[int]
    hints: list[CacheHint]


class ChatHistory:
    """Messages and tokens of a chat, turn by turn.

    mode: what to do if the template rewrites an earlier turn. `"template"` follows the template, as the model was
        trained on it: tokens before the break are kept, generated tokens after it are kept where their text is
        unchanged, and the rest is tokenized again. `"exact"` keeps all tokens, unless the answers can't be located in
        the template's render; then it is followed, too.

    Drafts and states are immutable, so that forks and rollbacks copy nothing. A shortened history can go back 256
    turns, or as many as it has messages; earlier states are forgotten.
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
        """States to which `rollback` can go: that after turn `forgotten`, and those after each later turn"""
        self.forgotten = 0
        """Number of turns whose states are forgotten"""

    @property
    def num_turns(self) -> int:
        """Number of turns."""
        return self.forgotten + len(self.turns) - 1

    def fork(self) -> "ChatHistory":
        """Create an independent copy."""
        twin = ChatHistory(self.template, mode=self.mode)
        twin.state, twin.turns, twin.forgotten = self.state, self.turns.copy(), self.forgotten
        return twin

    def rollback(self, turn: int) -> None:
        """Go back to the end of a turn; 0 is the beginning. Raises `InvalidRequest`, also if its state is forgotten."""
        check_integer("turn", turn, self.forgotten, self.num_turns)
        del self.turns[turn - self.forgotten + 1 :]
        self.state = self.turns[-1]

    def add(self, messages: tuple[Message, ...]) -> None:
        """Add messages to the prompt of the next turn."""
        self._check_count(len(self.state.messages) + len(messages))
        self.state = replace(self.state, messages=self.state.messages + messages)

    def draft(self, messages: tuple[Message, ...] = ()) -> Draft:
        """Draft the next turn, with `messages` appended. Does not change the history. Raises `InvalidRequest`."""
        exact = self.mode == "exact"
        return self._draft(self.state.messages + messages, self.state.exchanges, self.state.end, exact=exact)

    def redraft(self, messages: tuple[Message, ...]) -> Draft:
        """Draft the next turn with `messages` instead of the history's. Answers among them keep their tokens.

        Raises `InvalidRequest`.
        """
        exchanges = tuple(self._remaining(messages))
        kept = exchanges and exchanges[-1].answer_ids is self.state.exchanges[-1].answer_ids
        return replace(
            self._draft(messages, exchanges, self.state.end if kept else None, exact=False), history_break=None
        )

    def answer(
        self,
        draft: Draft,
        output: CompletionOutput,
        eos_token_ids: Container[int],
        *,
        include_stop: bool = False,
        show_special: bool = False,
    ) -> None:
        """End the turn with an answer.

        draft: the turn.
        output: the whole answer.
        eos_token_ids: end tokens of the model.
        include_stop, show_special: whether `output.text` includes the stop string, and special tokens.

        The answer excludes its end token, which the template writes again, and its stop string. If the stop string
        starts inside a token, the text of that token before it is tokenized again.
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
        previous = "".join(exchange.text for exchange in exchanges)
        if text.startswith(previous):
            prompt = text[len(previous) :]
            return Draft(messages, exchanges, prompt, self._prompt_ids(prompt, previous, end))
        parts = self._parts(messages, exchanges, text)
        if parts is None:
            followed, prompt = self._unchanged(exchanges, text)
        else:
            followed, prompt = self._follow(exchanges, parts), parts[-1]
        prompt_ids = self._prompt_ids(prompt, text.removesuffix(prompt), end)
        history_break = self._break(exchanges, Draft(messages, followed, prompt, prompt_ids))
        if parts is None or not exact:
            return Draft(messages, followed, prompt, prompt_ids, history_break)
        kept = tuple(
            _changed(exchange, prompt=now.prompt, answer=now.answer)
            for exchange, now in zip(exchanges, followed, strict=True)
        )
        return Draft(messages, kept, prompt, prompt_ids, replace(history_break, followed=False))

    def _prompt_ids(self, prompt: str, previous: str, end: int | None) -> tuple[int, ...]:
        """Tokenize the prompt after the last answer. The generated end token is kept if the template writes it, too."""
        written = "" if end is None else self.template.text([end])
        if end is None or not written or not prompt.startswith(written):
            return self.template.tokenize(prompt, previous)
        return (end, *self.template.tokenize(prompt[len(written) :], previous + written))

    def _parts(self, messages: Seq[Message], exchanges: Seq[Exchange], text: str) -> list[str] | None:
        """Split a render at its answers: prompt, answer, prompt, …, prompt. None if answers cannot be located.

        Answers are located by a second render with marks in their place.
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
        """Exchanges as the template writes them; tokens are kept where their text is unchanged."""
        followed, previous = [], ""
        for index, exchange in enumerate(exchanges):
            prompt, answer = parts[2 * index : 2 * index + 2]
            prompt_ids, answer_ids = exchange.prompt_ids, exchange.answer_ids
            if prompt + answer == exchange.text:
                prompt, answer = exchange.prompt, exchange.answer
            if prompt != exchange.prompt:
                prompt_ids = self.template.tokenize(prompt, previous)
            if answer != exchange.answer:
                answer_ids = self._rewritten(exchange, answer, previous + prompt)
            now = {"prompt": prompt, "prompt_ids": prompt_ids, "answer": answer, "answer_ids": answer_ids}
            followed.append(_changed(exchange, **now))
            previous += prompt + answer
        return tuple(followed)

    def _unchanged(self, exchanges: Seq[Exchange], text: str) -> tuple[tuple[Exchange, ...], str]:
        """The first exchanges that the template writes unchanged, and the rest of its render."""
        followed = []
        for exchange in exchanges:
            if not text.startswith(exchange.text):
                break
            followed.append(exchange)
            text = text[len(exchange.text) :]
        return tuple(followed), text

    def _rewritten(self, exchange: Exchange, text: str, previous: str) -> tuple[int, ...]:
        """Tokens of an answer that the template rewrites as `text`: generated tokens where possible, else tokenized."""
        ids: tuple[int, ...] = ()
        done = 0
        for first, stop, offset in self._kept(exchange, text):
            kept = exchange.answer_ids[first:stop]
            own = self.template.text(kept, exchange.prompt_ids + exchange.answer_ids[:first])
            if offset < done or text[offset : offset + len(own)] != own:
                return self.template.tokenize(text, previous)
            ids += self.template.tokenize(text[done:offset], previous + text[:done]) + kept
            done = offset + len(own)
        return ids + self.template.tokenize(text[done:], previous + text[:done])

    def _kept(self, exchange: Exchange, text: str) -> Iterator[tuple[int, int, int]]:
        """Runs `[first, stop)` of an answer's tokens that `text` contains, each with its offset in `text`.

        If `text` is a part of the answer, that part; else the common prefix and the common suffix.
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
        for low, high, offset in runs:
            first = bisect_left(counts, low, key=characters)
            last = characters(bisect_right(counts, high, key=characters) - 1)
            stop = bisect_left(counts, last, key=characters)
            if first < stop:
                yield first, stop, offset + characters(first) - low

    def _break(self, exchanges: Seq[Exchange], now: Draft) -> HistoryBreak:
        same = num_common([exchange.text for exchange in exchanges], [exchange.text for exchange in now.exchanges])
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
        """Exchanges whose answers are among `messages`, with their new indices."""
        at = 0
        for exchange in self.state.exchanges:
            answer = self.state.messages[exchange.at]
            index = next((i for i in range(at, len(messages)) if messages[i] == answer), None)
            if index is not None:
                yield _changed(exchange, at=index)
                at = index + 1

    # -- the answer ---------------------------------------------------------------------------------------

    def _cut(
        self,
        draft: Draft,
        output: CompletionOutput,
        eos_token_ids: Container[int],
        include_stop: bool,
        show_special: bool,
    ) -> tuple[list[int], int | None]:
        """Tokens of an answer without its end token or stop string, and the end token."""
        ids, end = output.token_ids, end_token(output, eos_token_ids)
        if end is not None:
            visible = include_stop and self.template.text(ids[-1:], ids[:-1], special=show_special)
            return (ids, None) if visible else (ids[:-1], end)
        if output.finish_reason != "stop" or output.stop_reason is None:
            return ids, None
        before = draft.token_ids[-_TAIL:]
        while ids and not output.text.startswith(self.template.text(ids, before, special=show_special)):
            ids = ids[:-1]
        text = self.template.text(ids, before)
        if not include_stop and text.endswith(str(output.stop_reason)):  # of special tokens, which have no text
            length = len(text) - len(str(output.stop_reason))
            while len(self.template.text(ids, before)) > length:
                ids = ids[:-1]
        return ids, None

    def _forget(self) -> None:
        """Forget old states. Each turn adds a message, so only a shortened history has more turns than messages."""
        reach = max(len(self.state.messages), min(_REACH, self.template.limits.max_messages))
        excess = max(len(self.turns) - 1 - reach, 0)
        del self.turns[:excess]
        self.forgotten += excess

    def _check_count(self, count: int) -> None:
        most = self.template.limits.max_messages
        if count > most:
            raise InvalidRequest("len(messages)", count, f"a conversation has at most {most} messages")


def superseded(state: State, draft: Draft) -> Superseded | None:
    """What a draft leaves behind of the path of a state; None if it continues the path."""
    if draft.exchanges is state.exchanges:
        return None
    old = state.token_ids
    common = num_common(old, draft.token_ids)
    return Superseded(old, [CacheHint("demote", common)]) if common < len(old) else None


def _changed(exchange: Exchange, **now: Any) -> Exchange:
    """`exchange` with changed fields; the same object if nothing changes, so that states share it."""
    changed = replace(exchange, **now)
    return exchange if changed == exchange else changed


def _between(prompts: Seq[str], exchanges: Seq[Exchange], text: str) -> list[str] | None:
    """Split `text` into the prompts and the answers between them; None if that is impossible."""
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


def num_common(first: Seq[object], second: Seq[object], same: Callable[[object, object], bool] = eq) -> int:
    """Length of the common prefix of two sequences."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if not same(a, b)), min(len(first), len(second)))
