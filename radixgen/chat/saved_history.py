"""JSON format of a chat's history, which is validated when it is read.

Each turn is encoded as a difference from the previous turn: the numbers of messages and exchanges that it keeps, and
the new ones.
"""

import json
from collections.abc import Sequence as Seq
from operator import is_
from typing import Any, cast

from radixgen.chat.history import ChatHistory, Exchange, HistoryMode, State, num_common
from radixgen.core import InvalidRequest, Limits, check_integer, check_texts
from radixgen.text.chat_template import ChatTemplate, Message, as_messages

VERSION = 1
_FIELDS = {
    "version": int, "history": str, "namespace": str, "tools": list, "template_options": dict, "turns": list,
    "forgotten": int,
}  # fmt: skip
_TURN = {"kept_messages": int, "messages": list, "kept_exchanges": int, "exchanges": list, "end": int}
_EXCHANGE = {"prompt": str, "prompt_ids": list, "answer": str, "answer_ids": list, "at": int}
_OPTIONAL = {"tools", "end"}


def dump(history: ChatHistory, namespace: str) -> str:
    """Encode messages and token ids of all turns, with tools and namespace, as JSON.

    If the text exceeds `Limits.max_saved_chars`, older turns are dropped. Raises `InvalidRequest` if the last turn
    alone exceeds it.
    """
    most, states = history.template.limits.max_saved_chars, [*history.turns, history.state]
    while len(text := _dump(history, namespace, states)) > most:
        if len(states) == 2:
            raise InvalidRequest("len(saved)", len(text), f"must be at most {most} characters")
        states = states[-max(len(states) // 2, 2) :]
    return text


def _dump(history: ChatHistory, namespace: str, states: Seq[State]) -> str:
    turns, before = [], State()
    for state in states:
        turns.append(_turn(state, before))
        before = state
    saved = {
        "version": VERSION,
        "history": history.mode,
        "namespace": namespace,
        "tools": history.template.tools,
        "template_options": history.template.options,
        "turns": turns,
        "forgotten": history.num_turns + 2 - len(states),
    }
    return json.dumps(saved, ensure_ascii=False)


def parse(text: object, limits: Limits) -> dict[str, Any]:
    """Decode the fields of a text that `dump` returned. Raises `InvalidRequest`."""
    if not isinstance(text, str):
        raise InvalidRequest("saved", text, "must be text, as returned by save()")
    if len(text) > limits.max_saved_chars:
        raise InvalidRequest("len(saved)", len(text), f"must be at most {limits.max_saved_chars} characters")
    try:
        saved = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("saved", text, f"is not JSON: {error}") from error
    check_texts("saved", saved)
    if isinstance(saved, dict):
        saved.setdefault("forgotten", 0)
    _check(saved, _FIELDS, "saved")
    if saved["version"] != VERSION:
        raise InvalidRequest("version", saved["version"], f"must be {VERSION}")
    return cast("dict[str, Any]", saved)


def restore(saved: dict[str, Any], template: ChatTemplate, vocab_size: int) -> ChatHistory:
    """Restore a history from its fields. Raises `InvalidRequest`, also if it was saved with another tokenizer."""
    history = ChatHistory(template, mode=cast("HistoryMode", saved["history"]))
    check_integer("len(turns)", len(saved["turns"]), 1, template.limits.max_messages + 2)
    check_integer("forgotten", saved["forgotten"], 0, 2**31 - 1)
    states, before = [], State()
    for turn in saved["turns"]:
        before = _state(turn, before, template, vocab_size)
        states.append(before)
    history.turns, history.state, history.forgotten = states[:-1] or [State()], states[-1], saved["forgotten"]
    if history.mode == "template":
        _check_answers(history, template)
    return history


def _turn(state: State, before: State) -> dict[str, Any]:
    messages = num_common(state.messages, before.messages, is_)
    exchanges = num_common(state.exchanges, before.exchanges, is_)
    return {
        "kept_messages": messages,
        "messages": state.messages[messages:],
        "kept_exchanges": exchanges,
        "exchanges": [{name: getattr(new, name) for name in _EXCHANGE} for new in state.exchanges[exchanges:]],
        "end": state.end,
    }


def _state(turn: object, before: State, template: ChatTemplate, vocab_size: int) -> State:
    fields = _check(turn, _TURN, "turns")
    messages = (
        *_kept(before.messages, fields["kept_messages"]),
        *as_messages("messages", fields["messages"], template.limits),
    )
    exchanges = list(_kept(before.exchanges, fields["kept_exchanges"]))
    for written in fields["exchanges"]:
        exchanges.append(_exchange(written, messages, vocab_size, exchanges[-1].at if exchanges else -1))
    if len(messages) > template.limits.max_messages:
        raise InvalidRequest("len(messages)", len(messages), f"at most {template.limits.max_messages}")
    if any(exchange.at >= len(messages) for exchange in exchanges):
        raise InvalidRequest("at", exchanges[-1].at, "must be the index of a message")
    end = fields["end"]
    if end is not None:
        _check_ids("end", [end], vocab_size)
    return State(messages, tuple(exchanges), end)


def _kept(before: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    if not 0 <= count <= len(before):
        raise InvalidRequest("kept", count, f"must be at most {len(before)}, as many as the previous turn has")
    return before[:count]


def _exchange(written: object, messages: Seq[Message], vocab_size: int, after: int) -> Exchange:
    fields = _check(written, _EXCHANGE, "exchanges")
    if not after < fields["at"] < len(messages):
        raise InvalidRequest("at", fields["at"], "must be the index of a message after the previous answer")
    for field in ("prompt_ids", "answer_ids"):
        _check_ids(field, fields[field], vocab_size)
        fields[field] = tuple(fields[field])
    return Exchange(**fields)


def _check(value: object, fields: dict[str, type], name: str) -> dict[str, Any]:
    """Check that `value` is an object with exactly these fields and types."""
    if not isinstance(value, dict) or value.keys() != fields.keys():
        raise InvalidRequest(name, value, f"must be an object of {', '.join(fields)}")
    for field, kind in fields.items():
        item = value[field]
        if type(item) is not kind and not (item is None and field in _OPTIONAL):
            raise InvalidRequest(field, item, f"must be {kind.__name__}")
    return value


def _check_ids(field: str, ids: list[Any], vocab_size: int) -> None:
    bad = next((token for token in ids if type(token) is not int or not 0 <= token < vocab_size), None)
    if bad is not None:
        raise InvalidRequest(field, bad, f"must be from 0 to {vocab_size - 1}")


def _check_answers(history: ChatHistory, template: ChatTemplate) -> None:
    """Raise `InvalidRequest` if tokens of answers do not match their text, because the tokenizer differs."""
    before: list[int] = []
    for exchange in history.state.exchanges:
        before += exchange.prompt_ids
        if template.text(exchange.answer_ids, before) != exchange.answer:
            raise InvalidRequest("answer_ids", exchange.answer, "was written with another tokenizer")
        before += exchange.answer_ids
