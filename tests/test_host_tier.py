"""KV in host memory: it is copied whole, fetched where it helps, and changes no token."""

import families
import numpy as np
import pytest
import torch
from oracle import StampHostKV, StampModel
from test_exactness import greedy, oracle_of, prompts

from radixgen import CacheHint, Engine, InvalidRequest, SamplingParams
from radixgen.cache.host_tier import HostTier
from radixgen.cache.storage import KVStorage, LayerShape
from radixgen.kernels.kv_records import KVRecords
from radixgen.kernels.quantized import as_bytes
from radixgen.model.host_kv import HostKV, _FinishedCopy
from radixgen.model.rank_host_kv import SharedCopy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {
    "float32": [LayerShape(3, 33, 17, torch.float32), LayerShape(1, 5, 7, torch.float32)],
    "float16": [LayerShape(2, 64, 64, torch.float16)],
    "odd bytes": [LayerShape(1, 5, 3, torch.float16)],
    "int8": [LayerShape(3, 80, 64, torch.int8), LayerShape(3, 80, 64, torch.int8)],
    "fp8": [LayerShape(2, 64, 32, torch.float8_e4m3fn)],
    "both": [LayerShape(2, 600, 600, torch.float32), LayerShape(4, 16, 16, torch.int8)],
}


def filled(shapes: list[LayerShape], slots: int, seed: int = 0) -> tuple[KVStorage, list[torch.Tensor]]:
    """A pool of random bytes, and its tensors with slots first."""
    storage = KVStorage(shapes, slots, DEVICE)
    generator = torch.Generator().manual_seed(seed)
    tensors: list[torch.Tensor] = []
    for pool in (p for pair in zip(storage.keys, storage.values, strict=True) for p in pair):
        tensors += [pool] if isinstance(pool, torch.Tensor) else [as_bytes(pool.data), pool.scales.T]
    for tensor in tensors:
        tensor.copy_(torch.randint(-99, 99, tensor.shape, generator=generator).to(tensor.dtype))
    return storage, tensors


def pools_of(storage: KVStorage) -> list:
    return [pool for pair in zip(storage.keys, storage.values, strict=True) for pool in pair]


# -- records ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_the_kernel_equals_its_twin(shapes: list[LayerShape]) -> None:
    pytest.importorskip("triton")
    storage, _ = filled(shapes, 40)
    slots = torch.tensor([39, 0, 7, 8, 9, 30, 1], device=DEVICE)
    records = []
    for kernel in (True, False):
        packer = KVRecords(pools_of(storage), kernel=kernel)
        assert packer.size == sum(shape.bytes_per_token for shape in shapes)
        records.append(torch.zeros(7, packer.size, dtype=torch.uint8, device=DEVICE))
        packer.pack(slots, records[-1])
    assert torch.equal(*records)
    targets = [filled(shapes, 40, seed=1) for _ in range(2)]
    for (target, _), kernel in zip(targets, (True, False), strict=True):
        KVRecords(pools_of(target), kernel=kernel).unpack(records[0], slots)
    for ours, twin in zip(targets[0][1], targets[1][1], strict=True):
        assert torch.equal(ours, twin)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_copies_there_and_back(shapes: list[LayerShape], monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a staging buffer of three tokens; other slots stay as they are."""
    size = sum(shape.bytes_per_token for shape in shapes)
    monkeypatch.setattr("radixgen.model.host_kv._STAGING_BYTES", 3 * size)
    storage, tensors = filled(shapes, 30)
    before = [tensor.clone() for tensor in tensors]
    host = HostKV(storage, 20, DEVICE)
    slots, host_slots = np.array([3, 4, 5, 6, 20, 29, 0, 11]), np.array([9, 10, 11, 3, 2, 1, 19, 0])
    host.save(slots, host_slots).wait()
    for tensor in tensors:
        tensor.zero_()
    targets = np.array([8, 9, 1, 2, 3, 22, 23, 24])
    copy = host.load(host_slots, targets)
    copy.wait()
    assert copy.done() and copy.seconds >= 0
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor[targets], old[slots])
        assert not np.delete(tensor.cpu().numpy(), targets, 0).any()
    host.release()


def test_the_kernel_is_compiled_before_the_first_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """In both directions, and the pool stays as it is."""
    pytest.importorskip("triton")
    launched = []

    class Recorded(KVRecords):
        def __init__(self, pools: list) -> None:
            super().__init__(pools, kernel=True)

        def _launch(self, table: torch.Tensor, slots: torch.Tensor, records: torch.Tensor, *, pack: bool) -> None:
            launched.append((slots.tolist(), pack))
            super()._launch(table, slots, records, pack=pack)

    monkeypatch.setattr("radixgen.model.host_kv.KVRecords", Recorded)
    storage, tensors = filled(SHAPES["int8"], 30)
    before = [tensor.clone() for tensor in tensors]
    HostKV(storage, 20, DEVICE).release()
    assert launched == [([0], True), ([0], False)]
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_other_ranks_learn_of_the_end_of_a_copy(error: type[BaseException] | None) -> None:
    """Pins: an interrupt in the middle made the next steps of other ranks begin before their copies had finished."""
    calls: list[int] = []

    def tell() -> None:
        calls.append(1)
        if error is not None and len(calls) == 1:
            raise error

    copy = SharedCopy(_FinishedCopy(), tell)
    if error is not None:
        with pytest.raises(error):
            copy.wait()
    copy.wait()
    assert copy.done() and len(calls) == 1 + (error is not None)


# -- what is kept and fetched, by the oracle --------------------------------------------------------------


class Stamped:
    """An engine over the oracle's model with a host tier; a fetch may be of one token."""

    def __init__(self, slots: int = 64, host_slots: int = 400, **options) -> None:
        self.model = StampModel(3, 64)
        self.engine = Engine(
            self.model, kv_tokens=slots, host_kv_tokens=host_slots, max_step_tokens=32, debug=True, **options
        )
        assert self.engine._core.host is not None
        self.host: HostTier = self.engine._core.host
        self.host.fetches.min_fetch = 1
        copies = self.host._copies
        assert isinstance(copies, StampHostKV)
        self.copies = copies

    def run(self, prompts: list[list[int]], tokens: int = 4) -> list[int]:
        """Serve requests together, with every invariant checked after each step. Returns their cached tokens."""
        names = [self.engine.submit(prompt, greedy(tokens)) for prompt in prompts]
        cached = {}
        while self.engine.has_unfinished:
            for output in self.engine.step():
                cached[output.request_id] = output.num_cached_tokens
            self.engine.check()
        return [cached[name] for name in names]

    def empty_pool(self) -> None:
        self.host.saves.complete()
        self.engine._core.tree.reset()


def texts(count: int, length: int = 30, seed: int = 0) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, 3, (count, length)).tolist()


@pytest.mark.parametrize("delay", [0, 1, 5])
def test_what_the_pool_evicted_is_fetched(delay: int) -> None:
    served = Stamped()
    served.copies.delay = delay
    first, second = texts(2)
    for prompt in (first, second, first):
        for other in texts(3, seed=1):
            served.run([other])
        cached = served.run([prompt])
    assert cached == [30]
    stats = served.engine.stats()
    assert stats.host_fetched_tokens >= 28 and stats.evicted_tokens > 0
    assert stats.kv_tokens_host_used == stats.host_saved_tokens - stats.host_evicted_tokens
    served.engine.close()


def test_requests_with_one_prefix_share_a_fetch() -> None:
    served = Stamped(slots=100)
    served.copies.delay = 3
    (prefix,) = texts(1, 40)
    served.run([prefix])
    served.empty_pool()
    assert min(served.run([[*prefix, token] for token in (0, 1, 2, 0)])) >= 40
    assert served.engine.stats().host_fetched_tokens <= 44


def test_a_fetch_for_another_is_followed_by_one_of_its_own() -> None:
    """Both wait for what they have in common; then the rest of the longer one is fetched, too."""
    served = Stamped(slots=120, host_slots=400)
    served.copies.delay = 2
    (system, own) = texts(2)
    for prompt in ([*system, 0], system + own):
        served.run([prompt])
        served.empty_pool()
    assert min(served.run([[*system, 0], system + own + [1]])) > 30
    stats = served.engine.stats()
    assert stats.host_fetched_tokens >= 60 and stats.host_recomputed_tokens == 0


def test_a_request_that_leaves_while_it_fetches_locks_nothing() -> None:
    served = Stamped()
    (prompt,) = texts(1)
    served.run([prompt])
    served.empty_pool()
    served.copies.delay = 3
    name = served.engine.submit(prompt, greedy(4))
    served.engine._core.scheduler.schedule()
    assert served.host.fetching
    served.engine.cancel(name)
    served.engine.check()
    served.run(texts(2, seed=3))
    served.host.saves.complete()
    assert not served.host.fetching and not list(served.host.locks())
    assert served.engine.reset_prefix_cache() > 0
    assert served.engine._core.tree.pool.free == 64 and not served.host.tree.pool.used


def test_a_preempted_sequence_comes_back_from_the_host() -> None:
    """Two that each need most of the pool, of which one is preempted: with a host, nothing is computed twice."""
    rows = {}
    for host_slots in (1, 400):
        served = Stamped(slots=48, host_slots=host_slots)
        served.run([[0] * 20, [1] * 20], tokens=20)
        stats = served.engine.stats()
        assert stats.preemptions > 0
        rows[host_slots] = stats.computed_rows
    assert rows[400] < rows[1] and rows[400] <= 2 * 39 + 4


def test_fetching_that_takes_longer_than_computing_is_not_done() -> None:
    served = Stamped()
    (prompt,) = texts(1)
    served.run([prompt])
    served.empty_pool()
    costs = served.host.fetches.costs
    costs.seconds_per_computed, costs.seconds_per_fetched = 1e-3, 2e-3
    assert served.run([prompt]) == [0]
    stats = served.engine.stats()
    assert stats.host_fetched_tokens == 0 and stats.host_recomputed_tokens == 30


def test_what_is_computed_again_counts_once() -> None:
    """Pins: each sequence and each hint counted a prefix that it shared with others."""
    served = Stamped(slots=200)
    (prompt,) = texts(1)
    served.run([prompt])
    served.empty_pool()
    costs = served.host.fetches.costs
    costs.seconds_per_computed, costs.seconds_per_fetched = 1e-3, 2e-3
    served.engine.apply_hints(prompt, [CacheHint("prefetch")])
    assert served.engine.stats().host_recomputed_tokens == 0
    for sampling in (SamplingParams(n=3, max_tokens=2), greedy(4), greedy(5)):
        served.engine.submit(prompt, sampling)
    served.run([prompt[:20] + [0] * 5])
    stats = served.engine.stats()
    assert stats.host_fetched_tokens == 0 and stats.host_recomputed_tokens == 30
    served.empty_pool()
    served.run([prompt, prompt])
    assert served.engine.stats().host_recomputed_tokens == 60


def test_one_slow_copy_does_not_end_fetching() -> None:
    """Pins: the rate of a first copy that compiled its kernel was never measured again."""
    now = 0.0
    served = Stamped(clock=lambda: now)
    (prompt,) = texts(1)
    served.run([prompt])
    costs = served.host.fetches.costs
    costs.seconds_per_computed, costs.seconds_per_fetched = 1e-3, 2e-3
    fetched = []
    for now in (1.0, 60.0, 61.0, 62.0):  # noqa: B007
        served.empty_pool()
        fetched.append(served.run([prompt])[0])
    assert fetched == [0, 0, 30, 30]


def test_a_host_that_is_full_evicts_what_was_used_least_recently() -> None:
    served = Stamped(host_slots=70)
    prompts = texts(3)
    for prompt in (prompts[0], prompts[1], prompts[0], prompts[2]):
        served.run([prompt])
    served.host.saves.complete()
    kept = [served.host.tree.match_prefix(prompt) for prompt in prompts]
    assert [match.computed if match else 0 for match in kept][::2] == [30, 30]
    served.run([[0] * 60])
    assert served.engine.stats().host_evicted_tokens > 0
    served.engine.check()


def test_what_belongs_to_one_sequence_alone_is_not_kept() -> None:
    served = Stamped(share=False)
    served.run(texts(3))
    assert served.host.tree.num_nodes == 0 and served.engine.stats().host_saved_tokens == 0


# -- whole engines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tokens_equal_those_of_transformers(family: str) -> None:
    """In a pool that holds a part of the prompts, twice in a row."""
    options = {"kv_tokens": 96, "host_kv_tokens": 2_000, "max_step_tokens": 32, "debug": True}
    with oracle_of(family) as oracle, Engine(families.build(family), **options) as engine:
        engine._core.host.fetches.min_fetch = 1
        for _ in range(2):
            for prompt in prompts(families.VOCAB):
                (output,) = engine.generate(prompt, greedy(16))
                oracle.expect(engine, prompt, output.outputs[0].token_ids, 16)
            engine.check()
        assert engine.stats().host_fetched_tokens > 50


def test_8_bit_kv_keeps_its_scales() -> None:
    answers = []
    for host in (0, 2_000):
        with Engine(families.build("llama"), kv_tokens=96, host_kv_tokens=host, kv_dtype="int8") as engine:
            if engine._core.host is not None:
                engine._core.host.fetches.min_fetch = 1
            answers.append([engine.generate(p, greedy(8))[0].outputs[0].token_ids for p in 2 * prompts(160)])
            assert bool(engine.stats().host_fetched_tokens) == bool(host)
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("host_kv_tokens", -1, "must be"),
        ("host_kv_tokens", 2**60, "free memory holds 1 to"),
        ("host_kv_tokens", True, "must be an integer"),
        ("kv_offloading_size", -0.5, "from 0 to"),
        ("kv_offloading_size", float("nan"), "from 0 to"),
        ("kv_offloading_size", 1e-9, "is for 0 tokens"),
        ("kv_offloading_size", 1e6, "free memory holds"),
    ],
)
def test_bad_sizes(field: str, value: float, limit: str) -> None:
    with pytest.raises(InvalidRequest, match=limit) as error:
        Engine(StampModel(), kv_tokens=64, **{field: value})
    assert field in str(error.value)


def test_one_size_only() -> None:
    with pytest.raises(InvalidRequest, match="not both"):
        Engine(StampModel(), kv_tokens=64, host_kv_tokens=8, kv_offloading_size=1e-6)
