"""Text as tokens come: whole characters only, in the end all of it, and none of it after a stop string."""

import re
from functools import cache
from itertools import product
from typing import Any

import families
import pytest
import texts
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sizes import size
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from radixgen.detokenize import Detokenizer
from radixgen.model.loader import load_tokenizer
from radixgen.text.vocabulary import Vocabulary

HALF = "\ufffd"
BEGINNING = re.compile(
    rb"(?:[\xC2-\xF4]|[\xE1-\xEF][\x80-\xBF]|\xE0[\xA0-\xBF]|[\xF1-\xF3][\x80-\xBF]{1,2}|\xF0[\x90-\xBF][\x80-\xBF]?"
    rb"|\xF4[\x80-\x8F][\x80-\xBF]?|)\Z"
)
"""Bytes that may become a character, at the end of some; Python thinks so of half a surrogate pair."""
CHARACTERS = st.one_of(
    st.sampled_from("ab ."),
    st.sampled_from(
        [
            "é",
            "e\u0301",
            "n\u0303\u0323",
            "漢",
            "字",
            "かな",
            "😀",
            "👩‍👩‍👧",
            "🇺🇳",
            "✌🏽",
            "Привет",
            "שלום",
            "\n\n",
            " 刂",
        ]
    ),
    st.characters(exclude_categories=("Cs",), exclude_characters=HALF),
)
TEXTS = st.lists(CHARACTERS, max_size=24).map("".join)


@cache
def smollm2() -> PreTrainedTokenizerFast:
    return load_tokenizer("smollm2")


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Every byte is a token, and no other is."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain)


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """As Llama 2 and Gemma: a word carries its space, the text's first is dropped, odd characters are bytes."""
    pieces = {"▁": -2.0, "▁a": -1.0, "▁ab": -1.5, "ba": -2.0} | dict.fromkeys("ab.é漢", -3.0)
    vocab = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256)), *pieces.items()]
    plain = Tokenizer(models.Unigram(vocab, 0, byte_fallback=True))
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    plain.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=plain)


@cache
def word_pieces() -> PreTrainedTokenizerFast:
    words = ["[UNK]", "a", "ab", "漢", "##a", "##b", "##ba", ".", "😀"]
    plain = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    plain.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=plain)


BYTES = [smollm2, byte_level]
ALL = [*BYTES, metaspace, word_pieces, ByT5Tokenizer]


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def whole(tokenizer: Any, ids: list[int]) -> str:
    """The text of `ids` without its unfinished end."""
    return tokenizer.decode(ids, skip_special_tokens=True).rstrip(HALF)


@cache
def vocabulary(tokenizer: Any) -> Vocabulary:
    return Vocabulary(tokenizer)


def certain(tokenizer: Any, ids: list[int]) -> str:
    """The text of `ids`, whose tokens are bytes, without an end that may become a character."""
    known = vocabulary(tokenizer)
    data = b"".join(known.bytes_of(token) for token in ids if token not in known.special)
    return data[: len(data) - len(BEGINNING.search(data)[0])].decode(errors="replace")


def push_all(stream: Detokenizer, ids: list[int]) -> str:
    for token in ids:
        stream.push(token)
    return stream.text


# -- text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["plain", "é and ü", "漢漢漢", "😀!😀", "a😀漢é z"])
def test_pieces_are_whole_characters_and_add_up(text: str) -> None:
    tokenizer = texts.tokenizer()
    ids = encode(tokenizer, text)
    assert len(ids) == len(text.encode())
    stream = Detokenizer(tokenizer, encode(tokenizer, "before"))
    for count, token in enumerate(ids, 1):
        stream.push(token)
        assert stream.text == text.encode()[:count].decode(errors="ignore")


def test_half_a_character_is_held_back_even_at_the_end() -> None:
    stream = Detokenizer(byte_level(), [])
    assert push_all(stream, encode(byte_level(), "x😀")[:-1]) == "x"
    stream.finish()
    assert stream.text == "x" and stream.safe_length == 1


def test_whole_characters_do_not_wait_for_half_a_character_of_the_same_token() -> None:
    """The token of a space and the first byte of 刂: the space came with the rest, and not at all at the end."""
    tokenizer = smollm2()
    ids = encode(tokenizer, "a 刂")
    cut = next(count for count in range(len(ids)) if tokenizer.decode(ids[:count]) == f"a {HALF}")
    stream = Detokenizer(tokenizer, [])
    assert push_all(stream, ids[:cut]) == "a "
    assert push_all(stream, ids[cut:]) == "a 刂"
    assert push_all(Detokenizer(tokenizer, ids[:cut]), ids[cut:]) == "刂"


@pytest.mark.parametrize("make", BYTES)
@given(text=TEXTS, data=st.data())
@settings(max_examples=150, deadline=None)
def test_of_bytes_every_whole_character_is_out(make: Any, text: str, data: st.DataObject) -> None:
    """After a prompt that ends anywhere, in half a character too."""
    tokenizer = make()
    ids = encode(tokenizer, text)
    assume(tokenizer.decode(ids) == text)  # SmolLM2 lacks some bytes
    cut = data.draw(st.integers(0, len(ids)))
    prompt = whole(tokenizer, ids[:cut])
    stream = Detokenizer(tokenizer, ids[:cut])
    for count in range(cut, len(ids)):
        stream.push(ids[count])
        assert prompt + stream.text == whole(tokenizer, ids[: count + 1])
        assert HALF not in stream.text and stream.safe_length == len(stream.text)
    assert prompt + stream.text == text


@pytest.mark.parametrize("make", [metaspace, word_pieces])
@given(
    text=st.lists(st.sampled_from(["a", "ab", "ba", " ", "a ", " 漢", ".", "é", "😀", "字"]), max_size=20).map("".join)
)
@settings(max_examples=150, deadline=None)
def test_text_whose_spaces_depend_on_the_tokens_before(make: Any, text: str) -> None:
    tokenizer = make()
    ids = encode(tokenizer, text)
    for cut in range(len(ids)):
        if HALF in tokenizer.decode(ids[:cut]):
            continue
        before, stream = "", Detokenizer(tokenizer, ids[:cut])
        for token in ids[cut:]:
            stream.push(token)
            assert stream.text.startswith(before) and HALF not in stream.text
            before = stream.text
        assert tokenizer.decode(ids[:cut]) + stream.text == tokenizer.decode(ids)


class Slow:
    """A tokenizer that has no `backend_tokenizer`."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.longest = 0

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        self.longest = max(self.longest, len(ids))
        return self.inner.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("make", [*BYTES, ByT5Tokenizer])
@given(text=TEXTS)
@settings(max_examples=100, deadline=None)
def test_a_tokenizer_without_a_backend(make: Any, text: str) -> None:
    """It decodes a window of the tokens, not all of them. ByT5 is one; it leaves half characters out by itself."""
    tokenizer = make()
    ids = encode(tokenizer, text)
    assume(tokenizer.decode(ids) == text)  # SmolLM2 lacks some bytes
    for cut in (0, len(ids) // 2):
        slow = Slow(tokenizer)
        stream = Detokenizer(slow, ids[:cut])
        for count in range(cut, len(ids)):
            stream.push(ids[count])
            assert whole(tokenizer, ids[:cut]) + stream.text == whole(tokenizer, ids[: count + 1])
        assert slow.longest <= 12


@given(st.lists(st.integers(0, families.VOCAB + 9), max_size=9), st.lists(st.integers(0, families.VOCAB + 9)))
@settings(max_examples=300, deadline=None)
def test_any_tokens_at_all_only_add_text(prompt: list[int], output: list[int]) -> None:
    """Bytes that make no character, and ids that the tokenizer lacks, as a model may draw them."""
    stream = Detokenizer(texts.tokenizer(), prompt)
    for token in output:
        before = stream.text
        stream.push(token)
        assert stream.text.startswith(before)


@given(st.lists(st.one_of(st.integers(0, 49_151), st.integers(0, 400), st.sampled_from([13223, 28532, 10003]))))
@settings(max_examples=200, deadline=None)
def test_any_tokens_at_all_decode_as_a_whole(ids: list[int]) -> None:
    """Special tokens, stray bytes, and tokens of bytes of two characters among them."""
    stream = Detokenizer(smollm2(), [])
    for count, token in enumerate(ids, 1):
        stream.push(token)
        text = smollm2().decode(ids[:count], skip_special_tokens=True)
        assert text.startswith(stream.text) and set(text[len(stream.text) :]) <= {HALF}
        assert stream.text == certain(smollm2(), ids[:count])


@given(st.lists(st.sampled_from([*encode(metaspace(), " 字😀."), 1 + 0xE5, 1 + 0x80, 1 + 0x41])))
@settings(max_examples=200, deadline=None)
def test_a_stray_byte_takes_nothing_back(ids: list[int]) -> None:
    """With a byte to spare a run of byte tokens decodes to none of its characters. Of those that were out already
    the stream knew no more, and raised.
    """
    stream = Detokenizer(metaspace(), [])
    for token in ids:
        before = stream.text
        stream.push(token)
        assert stream.text.startswith(before)
        assert len(stream._stream._held) <= 16


def test_after_a_stray_byte_the_text_goes_on() -> None:
    tokenizer = metaspace()
    ids = [*encode(tokenizer, "ab字"), 1 + 0xE5, *encode(tokenizer, "ab a")]
    assert push_all(Detokenizer(tokenizer, []), ids) == f"ab字{HALF} ab a"


def test_what_the_tokenizer_raises_is_raised() -> None:
    stream = Detokenizer(byte_level(), [])
    with pytest.raises(OverflowError):
        stream.push(-1)


def test_without_a_tokenizer_there_is_no_text() -> None:
    stream = Detokenizer(None, [1], ("a",))
    assert stream.push(2) is None
    stream.finish()
    assert (stream.text, stream.safe_length, stream.fork().text) == ("", 0, "")


# -- stop strings -----------------------------------------------------------------------------------------


def first_stop(text: str, stops: tuple[str, ...], searched: int) -> tuple[int, str] | None:
    """The end and the string of the first match in `text` that ends after `searched` characters."""
    for end, stop in product(range(searched + 1, len(text) + 1), stops):
        if text[:end].endswith(stop):
            return end, stop
    return None


def held(text: str, stops: tuple[str, ...]) -> int:
    """The length of the longest end of `text` that begins a stop string."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


def check_stops(tokenizer: Any, ids: list[int], stops: tuple[str, ...], include: bool, free: int) -> None:
    """Against a search of the whole text after every token. The first `free` tokens may not stop."""
    stream = Detokenizer(tokenizer, [], stops, include)
    searched, sent = 0, ""
    for count, token in enumerate(ids, 1):
        text = certain(tokenizer, ids[:count])
        found = first_stop(text, stops, searched) if count > free else None
        if count <= free:
            searched = len(text)
        met = stream.push(token, count > free)
        if found is not None:
            end, stop = found
            assert met == stop
            assert stream.text == text[: end if include else end - len(stop)]
            assert stream.text.startswith(sent) and stream.safe_length == len(stream.text)
            return
        assert met is None and stream.text == text
        assert stream.text.startswith(sent)
        assert stream.safe_length == len(text) - (0 if include else held(text, stops))
        sent = text[: stream.safe_length]
    stream.finish()
    assert stream.text == certain(tokenizer, ids) and stream.safe_length == len(stream.text)


@st.composite
def cases(draw: st.DrawFn, tokenizer: Any, text: st.SearchStrategy[str]) -> tuple[list[int], tuple[str, ...]]:
    said = draw(text)
    places = st.tuples(st.integers(0, len(said)), st.integers(1, 9))
    parts = places.map(lambda place: said[place[0] : place[0] + place[1]]).filter(bool)
    others = st.one_of(st.text("ab", min_size=1, max_size=6), st.text("ab 漢😀", min_size=1, max_size=6))
    stops = draw(st.lists(st.one_of(parts, others) if said else others, min_size=1, max_size=4))
    if draw(st.booleans()):
        stops.append(stops[0] + draw(others))
    return encode(tokenizer, said), tuple(stops)


@pytest.mark.parametrize("make", BYTES)
@given(data=st.data(), include=st.booleans(), free=st.one_of(st.just(0), st.integers(0, 12)))
@settings(max_examples=300, deadline=None)
def test_stop_strings_as_a_search_of_the_whole_text(make: Any, data: st.DataObject, include: bool, free: int) -> None:
    few = st.one_of(st.text("ab", max_size=30), st.text("ab 漢😀", max_size=30))
    ids, stops = data.draw(cases(make(), st.one_of(few, TEXTS)))
    check_stops(make(), ids, stops, include, free)


@pytest.mark.parametrize(
    ("stops", "include", "text", "stop"),
    [
        (("lo", "ell"), False, "h", "ell"),
        (("lo", "ell"), True, "hell", "ell"),
        (("hello", "ell"), False, "h", "ell"),
        (("ell", "el"), True, "hel", "el"),
        (("llo", "lo"), False, "he", "llo"),
        (("lo", "llo"), False, "hel", "lo"),
        (("hello world",), False, "", "hello world"),
        (("hello w",), True, "hello w", "hello w"),
        (("hello.",), False, "hello world", None),
    ],
)
def test_the_stop_string_that_is_complete_first_wins(
    stops: tuple[str, ...], include: bool, text: str, stop: str | None
) -> None:
    """Whatever the tokens: SmolLM2 has one for each of the words, the other one for each byte."""
    for tokenizer in (smollm2(), byte_level()):
        stream = Detokenizer(tokenizer, [], stops, include)
        met = next(filter(None, map(stream.push, encode(tokenizer, "hello world"))), None)
        assert (stream.text, met) == (text, stop)


def test_a_stop_string_may_begin_but_not_end_in_what_may_not_stop() -> None:
    ids = encode(byte_level(), "abab")
    stream = Detokenizer(byte_level(), [], ("ab", "aba"))
    assert [stream.push(token, False) for token in ids[:2]] == [None, None]
    assert (stream.text, stream.safe_length) == ("ab", 0)
    assert stream.push(ids[2]) == "aba" and stream.text == ""


def test_a_prompt_begins_no_stop_string() -> None:
    tokenizer = byte_level()
    stream = Detokenizer(tokenizer, encode(tokenizer, "ab"), ("abc",))
    assert [stream.push(token) for token in encode(tokenizer, "cd")] == [None, None]
    assert stream.text == "cd"


def test_a_sequence_that_ends_otherwise_releases_what_is_held() -> None:
    stream = Detokenizer(byte_level(), [], ("\nUser:",))
    push_all(stream, encode(byte_level(), "hi\nUs"))
    assert (stream.text, stream.safe_length) == ("hi\nUs", 2)
    stream.finish()
    assert stream.safe_length == 5


# -- forks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ALL)
@given(text=TEXTS, other=TEXTS, stops=st.lists(st.text("ab 漢😀", min_size=1, max_size=4), max_size=2).map(tuple))
@settings(max_examples=size(25, 60), deadline=None)
def test_a_fork_goes_on_as_if_it_were_no_fork(make: Any, text: str, other: str, stops: tuple[str, ...]) -> None:
    """From every place, while the origin goes on another way."""
    tokenizer = make()
    ids, others = encode(tokenizer, text), encode(tokenizer, other)
    for place in range(len(ids) + 1):
        origin = Detokenizer(tokenizer, [], stops)
        if any(origin.push(token) for token in ids[:place]):
            return
        twin = origin.fork()
        assert run(origin, others) == run(unforked(tokenizer, stops, ids[:place]), others)
        assert run(twin, ids[place:]) == run(unforked(tokenizer, stops, ids[:place]), ids[place:])


def test_a_fork_within_a_character_shares_nothing() -> None:
    """The first token is a space, which is out, and a third of 刂, which is not."""
    tokenizer = smollm2()
    first, *rest = tokenizer.convert_tokens_to_ids(["Ġå", "Ī", "Ĥ"])
    origin = Detokenizer(tokenizer, [])
    origin.push(first)
    twin = origin.fork()
    assert push_all(origin, encode(tokenizer, "a")) == f" {HALF}a"
    assert push_all(twin, rest) == " 刂"


def unforked(tokenizer: Any, stops: tuple[str, ...], ids: list[int]) -> Detokenizer:
    stream = Detokenizer(tokenizer, [], stops)
    push_all(stream, ids)
    return stream


def run(stream: Detokenizer, ids: list[int]) -> list[tuple[str | None, str, int]]:
    """What is seen after every token, up to the one that stops."""
    seen: list[tuple[str | None, str, int]] = [(None, stream.text, stream.safe_length)]
    for token in ids:
        stop = stream.push(token)
        seen.append((stop, stream.text, stream.safe_length))
        if stop is not None:
            break
    return seen


# -- tokens without text, and bytes that make no character -------------------------------------------------


class Counting(Slow):
    """Counts the tokens that are decoded."""

    decoded = 0

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        self.decoded += len(ids)
        return str(super().decode(ids, skip_special_tokens))


@pytest.mark.parametrize("make", [*BYTES, metaspace, ByT5Tokenizer])
@pytest.mark.parametrize("part", [slice(1), slice(-1, None), slice(-1)])
def test_halves_of_characters_cost_the_same_at_any_length(make: Any, part: slice) -> None:
    """Each of them decoded all that came since the last character."""
    tokenizer = Counting(make())
    tokens = encode(make(), "😀")[part]
    stream = Detokenizer(tokenizer, encode(make(), "ab"))
    push_all(stream, tokens * 60)
    assert tokenizer.decoded <= 60 * 100 * len(tokens) and tokenizer.longest <= 40


def test_tokens_without_text_are_not_kept() -> None:
    """Special tokens, and ids that the tokenizer lacks."""
    for tokenizer, special in ((smollm2(), "<|im_end|>"), (with_special(), "<end>")):
        for token in (tokenizer.convert_tokens_to_ids(special), len(tokenizer) + 5):
            stream = Detokenizer(tokenizer, [])
            assert push_all(stream, [*encode(tokenizer, "ab"), *[token] * 40]) == "ab"
            assert not getattr(stream._stream, "_held", None)
            assert push_all(stream, encode(tokenizer, " ab")).split() == ["ab", "ab"]


@pytest.mark.parametrize("make", BYTES)
def test_bytes_that_make_no_character_are_out_when_that_is_certain(make: Any) -> None:
    tokenizer = make()
    first, *_, last = encode(tokenizer, "😀")
    stream = Detokenizer(tokenizer, encode(tokenizer, "ab"))
    for count in range(1, 30):
        assert stream.push(last) is None and stream.text == HALF * count
    assert push_all(stream, [first]) == HALF * 29, "it may become a character"
    assert push_all(stream, [first]) == HALF * 30
    assert push_all(stream, encode(tokenizer, "é")) == HALF * 31 + "é"


def test_a_run_of_bytes_is_out_at_four() -> None:
    """Of tokenizers whose text alone can be read: three of them may be the beginning of a character."""
    tokenizer = metaspace()
    last = encode(tokenizer, "😀")[-1]
    stream = Detokenizer(tokenizer, [])
    for count in range(1, 60):
        stream.push(last)
        assert count - 3 <= len(stream.text) <= count and set(stream.text) <= {HALF}
    assert push_all(stream, encode(tokenizer, "ab")) == HALF * 59 + " ab"


@pytest.mark.parametrize("make", [*BYTES, metaspace])
@given(st.lists(st.integers(0, 3), max_size=40))
@settings(max_examples=150, deadline=None)
def test_bytes_in_any_order_decode_as_a_whole(make: Any, parts: list[int]) -> None:
    """The first makes no character, so that what a run decodes to does not change with its end."""
    tokenizer = make()
    face = encode(tokenizer, "😀")[-4:]
    ids = [*encode(tokenizer, "ab"), face[-1], *(face[part % len(face)] for part in parts), *encode(tokenizer, "ab")]
    assert push_all(Detokenizer(tokenizer, []), ids) == tokenizer.decode(ids)


# -- special tokens ---------------------------------------------------------------------------------------


def with_special() -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = metaspace.__wrapped__()
    tokenizer.add_special_tokens({"eos_token": "<end>", "additional_special_tokens": ["<turn>"]})
    return tokenizer


def special(name: str) -> int:
    token: int = smollm2().convert_tokens_to_ids(name)
    return token


def test_special_tokens_have_no_text_unless_it_is_asked_for() -> None:
    for tokenizer, names in ((smollm2(), ["<|im_start|>", "<|im_end|>"]), (with_special(), ["<end>", "<turn>"])):
        tokens = [*encode(tokenizer, "ab é"), *tokenizer.convert_tokens_to_ids(names), *encode(tokenizer, " ab")]
        for skip in (True, False):
            stream = Detokenizer(tokenizer, [], skip_special=skip)
            assert push_all(stream, tokens) == tokenizer.decode(tokens, skip_special_tokens=skip)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize(
    ("stops", "met"),
    [
        (("<|im_end|>",), "<|im_end|>"),
        (("<|im_end|><|im_start|>",), "<|im_end|><|im_start|>"),
        (("<|im_end|><|im_start|>", "<|im_end|>"), "<|im_end|>"),
        (("nothing", "<|im_start|>"), "<|im_start|>"),
        (("<|im_start|><|im_end|>",), None),
    ],
)
def test_stop_strings_of_special_tokens(stops: tuple[str, ...], met: str | None, include: bool, skip: bool) -> None:
    """Their text is left out, so that no stop string was ever found in it."""
    stream = Detokenizer(smollm2(), [special("<|im_end|>")], stops, include, skip)
    tokens = [*encode(smollm2(), "ab"), special("<|im_end|>"), special("<|im_start|>"), *encode(smollm2(), "ab")]
    found = next(filter(None, map(stream.push, tokens)), None)
    assert found == met
    if met is not None:
        whole_text = "ab<|im_end|><|im_start|>" if not skip else "ab" + met
        end = whole_text.index(met) + len(met)
        assert stream.text == whole_text[: end if include else end - len(met)]
        assert stream.safe_length == len(stream.text)


def test_a_stop_string_of_special_tokens_may_not_end_in_what_may_not_stop() -> None:
    stream = Detokenizer(smollm2(), [], ("<|im_end|>",))
    assert stream.push(special("<|im_end|>"), False) is None
    twin = stream.fork()
    assert stream.push(special("<|im_end|>")) == twin.push(special("<|im_end|>")) == "<|im_end|>"


def test_a_fork_is_within_the_same_stop_string() -> None:
    stream = Detokenizer(smollm2(), [], ("<|im_end|><|im_start|>",))
    stream.push(special("<|im_end|>"))
    twin = stream.fork()
    assert twin.push(special("<|im_end|>")) is None and stream.push(special("<|im_start|>")) is not None
    assert twin.push(special("<|im_start|>")) is not None
