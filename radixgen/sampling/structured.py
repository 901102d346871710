"""Structured output by llguidance: compiled grammars, and the state of each sequence in one.

llguidance is in the extra `structured`, and is imported by the first request with a grammar.
"""

import json
from collections import OrderedDict
from copy import copy
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np

from radixgen.core import AllowedTokens, GrammarFailed, GrammarKind, InvalidRequest, Limits, SamplingParams
from radixgen.sampling.json_numbers import NumberBounds, NumberState

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer
    from transformers import PreTrainedTokenizerBase

_END = "<|radixgen:end|>"
"""A token that no model has: a grammar allows it when the text may end."""
WHITE_SPACE = r"[ \n\r\t]{1,16}"
"""White space between JSON tokens. Bounded, so that a model that prefers white space still makes progress."""
_MOST_LEXER_STATES = 50_000
"""Maximum lexer states per grammar, 1 to 2 kB each."""
_MOST_ITEMS = 20_000
"""Maximum parser items per mask: about 15 ms."""
_LONGEST_MESSAGE = 400
_DEAD_END = "no token of the model goes on"


class Grammars:
    """Compiles grammars for one tokenizer and a model with `vocab_size` tokens. Thread-safe; compilation releases the
    GIL.

    Each grammar is compiled once while it is in use, and the last `Limits.max_grammars` are cached.

    A JSON schema may set options of llguidance by the key `x-guidance`: `{"whitespace_flexible": false}` for JSON
    without white space, `{"coerce_one_of": true}` to treat `oneOf` as `anyOf`, `{"lenient": true}` to ignore what
    llguidance does not support.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None", vocab_size: int, limits: Limits) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._limits = limits
        self._lock = Lock()
        self._turns: WeakValueDictionary[tuple[GrammarKind, str], Lock] = WeakValueDictionary()
        """Held while a grammar is being compiled, so that others wait for the same one."""
        self._alive: WeakValueDictionary[tuple[GrammarKind, str], CompiledGrammar] = WeakValueDictionary()
        self._kept: OrderedDict[tuple[GrammarKind, str], CompiledGrammar] = OrderedDict()

    def find(self, params: SamplingParams) -> "CompiledGrammar | None":
        """Return the compiled grammar of `params`; None if there is none. Raises `InvalidRequest`."""
        source = params.grammar_source(self._limits)
        if source is None:
            return None
        try:
            self._require(source.field, params)
            return self._compiled(source.kind, source.text)
        except (GrammarFailed, ValueError) as error:
            if isinstance(error, InvalidRequest):
                raise
            reason = " ".join(str(error).split())[:_LONGEST_MESSAGE]
            raise InvalidRequest(source.field, getattr(params, source.field), f"llguidance says: {reason}") from error

    def _require(self, field: str, params: SamplingParams) -> None:
        """Raise `InvalidRequest` without a tokenizer or without the library."""
        value = getattr(params, field)
        if self._tokenizer is None:
            raise InvalidRequest(field, value, "the model has no tokenizer, so its tokens have no text")
        if not hasattr(self._tokenizer, "backend_tokenizer"):
            raise InvalidRequest(field, value, "the model's tokenizer is not from the tokenizers library")
        try:
            import llguidance  # noqa: F401
        except ImportError as error:
            raise InvalidRequest(field, value, "needs llguidance: pip install 'radixgen[structured]'") from error

    def _compiled(self, kind: GrammarKind, text: str) -> "CompiledGrammar":
        """Return a cached grammar, or compile it. Raises as `_compile`."""
        key = kind, text
        with self._lock:
            turn = self._turns.get(key) or self._turns.setdefault(key, Lock())
        with turn:
            grammar = self._alive.get(key)
            if grammar is None:
                grammar = self._alive[key] = self._compile(kind, text)
        with self._lock:
            self._kept[key] = grammar
            self._kept.move_to_end(key)
            while len(self._kept) > self._limits.max_grammars:
                self._kept.popitem(last=False)
        return grammar

    def _compile(self, kind: GrammarKind, text: str) -> "CompiledGrammar":
        """Compile a grammar. Raises `GrammarFailed` or ValueError with llguidance's message."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens, _grammar(kind, text), log_level=0, limits=self._parser_limits)
        if matcher.is_error():
            raise _fault(matcher)
        bounds = self._number_bounds if kind == "json_schema" or "%json" in text else None
        grammar = CompiledGrammar(matcher, self._vocab_size, self._tokens.eos_token, bounds)
        state = grammar.start()
        state.allowed()
        if state.complete:
            raise GrammarFailed("nothing but the empty text fits")
        return grammar

    @cached_property
    def _parser_limits(self) -> "LLParserLimits":
        """Limits of llguidance, lowered for the work and memory of a mask."""
        from llguidance import LLParserLimits

        return LLParserLimits(max_lexer_states=_MOST_LEXER_STATES, step_max_items=_MOST_ITEMS, verbose_errors=False)

    @cached_property
    def _number_bounds(self) -> NumberBounds:
        tokens = self._tokens
        return NumberBounds(lambda token: tokens.decode_bytes([token]), self._vocab_size)

    @cached_property
    def _tokens(self) -> "LLTokenizer":
        """The tokenizer in llguidance's form, with `_END` as its only end. The sampler handles the end tokens."""
        from llguidance import LLTokenizer

        backend: Any = copy(self._tokenizer.backend_tokenizer)  # type: ignore[union-attr]
        backend.no_padding()
        backend.no_truncation()
        known = set(backend.get_vocab(with_added_tokens=True).values())
        backend.add_special_tokens([_END])
        end = backend.token_to_id(_END)
        if end in known:
            raise ValueError(f"the tokenizer's ids have holes: there is no room for a token {end}")
        return LLTokenizer(backend.to_str(), n_vocab=max(self._vocab_size, end + 1), eos_token=end)


class CompiledGrammar:
    """A compiled grammar and the state shared by its sequences: those with the same tokens share one `_GrammarNode`."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int, end: int, bounds: NumberBounds | None = None) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._end = end
        self._bounds = bounds
        self._root = _GrammarNode(NumberState())

    def start(self) -> "MatcherState":
        return MatcherState(self, self._matcher.deep_copy(), self._root)

    def after(self, number: NumberState, token: int) -> NumberState:
        """Return the number state after `token`."""
        return number if self._bounds is None else self._bounds.after(number, token)

    def bounded(self, allowed: AllowedTokens, number: NumberState) -> AllowedTokens:
        """Return `allowed` without tokens that would make the current number too long."""
        if self._bounds is None:
            return allowed
        return allowed._replace(mask=self._bounds.bound(allowed.mask, number, accepts=allowed.accepts))

    def read(self, matcher: "LLMatcher") -> AllowedTokens:
        """Return the tokens that `matcher` allows. Raises `GrammarFailed`."""
        packed = matcher.compute_bitmask()
        if matcher.is_error():  # its mask would allow the end
            raise _fault(matcher)
        mask = np.frombuffer(packed, np.int32)[: -(-self._vocab_size // 32)].copy()
        if self._vocab_size % 32:
            mask[-1] &= (1 << self._vocab_size % 32) - 1
        if self._end < self._vocab_size:
            mask[self._end // 32] &= ~np.int32(1 << self._end % 32)
        accepts = matcher.is_accepting()
        if not accepts and not mask.any():
            raise GrammarFailed(_DEAD_END)
        return AllowedTokens(mask, accepts)


class _GrammarNode:
    """The allowed tokens after some tokens of one grammar. It lives while a sequence refers to it."""

    def __init__(self, number: NumberState) -> None:
        self.allowed: AllowedTokens | None = None
        self.number = number
        self._next: WeakValueDictionary[int, _GrammarNode] = WeakValueDictionary()

    def after(self, token: int, grammar: CompiledGrammar) -> "_GrammarNode":
        place = self._next.get(token)
        if place is None:
            place = self._next[token] = _GrammarNode(grammar.after(self.number, token))
        return place


class MatcherState:
    """A `GrammarState` by llguidance's matcher. Sequences on the same node compute its mask once."""

    def __init__(self, grammar: CompiledGrammar, matcher: "LLMatcher", place: _GrammarNode) -> None:
        self._grammar = grammar
        self._matcher = matcher
        self._place = place

    @property
    def complete(self) -> bool:
        allowed = self._place.allowed
        return self._matcher.is_stopped() or (allowed is not None and not allowed.mask.any())

    def allowed(self) -> AllowedTokens:
        if self._place.allowed is None:
            self._place.allowed = self._grammar.bounded(self._grammar.read(self._matcher), self._place.number)
        return self._place.allowed

    def allows(self, token: int) -> bool:
        return self._matcher.validate_tokens([token]) == 1

    def accept(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise _fault(self._matcher)
        self._place = self._place.after(token, self._grammar)

    def fork(self) -> "MatcherState":
        return MatcherState(self._grammar, self._matcher.deep_copy(), self._place)


def _fault(matcher: "LLMatcher") -> GrammarFailed:
    """Return an error with the matcher's own message, or with ours if it has none."""
    words = matcher.get_error().replace("<non-verbose/>", "").strip()
    return GrammarFailed(_DEAD_END if words.startswith("NoExtension") else words)


def _sets_white_space(schema: str) -> bool:
    """Return whether a schema sets its own white space, which our pattern would override."""
    try:
        parsed = json.loads(schema)
    except (ValueError, RecursionError):
        return False
    own = parsed.get("x-guidance") if isinstance(parsed, dict) else None
    return isinstance(own, dict) and "whitespace_flexible" in own


def _grammar(kind: GrammarKind, text: str) -> str:
    """Convert a grammar to llguidance's form."""
    from llguidance import LLMatcher

    if kind == "json_schema":
        pattern = None if _sets_white_space(text) else WHITE_SPACE
        return LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": pattern} if pattern else {})
    return LLMatcher.grammar_from_regex(text) if kind == "regex" else LLMatcher.grammar_from_lark(text)
