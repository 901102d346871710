"""What a server keeps for its callers: bounds by count, bytes and age, and who loses what."""

from typing import NamedTuple

import pytest

from radixgen.serve.http import fair_cache
from radixgen.serve.http.fair_cache import FairCache


class Key(NamedTuple):
    key_id: str
    name: str


def names(cache: FairCache[Key, str], key_id: str) -> str:
    return "".join(key.name for key in cache if key.key_id == key_id)


def test_the_owner_with_the_most_loses_its_oldest() -> None:
    removed: list[Key] = []
    cache: FairCache[Key, str] = FairCache(4, 100, 60.0, lambda key, _: removed.append(key))
    cache.put(Key("b", "z"), "kept", 1)
    for name in "123":
        cache.put(Key("a", name), name, 1)
    cache.touch(Key("a", "1"))
    cache.put(Key("a", "4"), "4", 1)
    assert names(cache, "a") == "314" and names(cache, "b") == "z" and removed == [Key("a", "2")]
    cache.put(Key("a", "5"), "5", 98)
    assert names(cache, "a") == "45" and names(cache, "b") == "z" and cache.num_bytes == 100
    cache.put(Key("a", "6"), "6", 101)
    assert names(cache, "a") == "" and names(cache, "b") == "z", "larger than all of it"
    assert cache.remove(Key("b", "z")) == "kept" and cache.remove(Key("b", "z")) is None and not len(cache)


def test_old_entries_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000.0
    monkeypatch.setattr(fair_cache.time, "monotonic", lambda: now)
    cache: FairCache[Key, str] = FairCache(4, 100, 60.0)
    cache.put(Key("a", "1"), "one", 1)
    cache.put(Key("a", "2"), "two", 1)
    now += 50
    cache.touch(Key("a", "1"))
    now += 20
    assert cache.get(Key("a", "1")) == "one" and cache.get(Key("a", "2")) is None
    cache.put(Key("b", "3"), "three", 1)
    assert names(cache, "a") == "1"
