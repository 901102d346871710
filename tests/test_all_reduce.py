"""The all-reduce of GPUs that read each other's memory: one process plays all ranks, on one device."""

import pytest
import torch

from radixgen.kernels import all_reduce
from radixgen.kernels.all_reduce import AllReduce, shared_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Ranks:
    """Memory of all ranks, and a kernel that is one of them. The others have always been there before."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.memory = [torch.zeros(shared_bytes(size), dtype=torch.uint8, device=DEVICE) for _ in range(size)]
        self.sum = AllReduce([one.data_ptr() for one in self.memory], rank, DEVICE)
        self.rounds = 0

    def flags(self, rank: int) -> torch.Tensor:
        """Int64 `[programs, ranks]`."""
        return self.memory[rank][all_reduce._ROOMS :].view(torch.int64).view(all_reduce.MAX_PROGRAMS, self.size)

    def room(self, rank: int, dtype: torch.dtype, program: int, number: int) -> torch.Tensor:
        rooms = self.memory[rank][: all_reduce._ROOMS].view(all_reduce.MAX_PROGRAMS, 2, all_reduce._ROOM)
        return rooms[program, number % 2].view(dtype)

    def lend(self, data: list[torch.Tensor], block: int) -> None:
        """Put the data of all other ranks where this one looks for its next round, a block a program."""
        self.rounds += 1
        for rank in set(range(self.size)) - {self.rank}:
            for program, part in enumerate(data[rank].flatten().split(block)):
                self.room(rank, data[rank].dtype, program, self.rounds)[: part.numel()] = part
                self.flags(self.rank)[program, rank] = self.rounds


@pytest.mark.parametrize(
    ("rank", "size", "dtype", "count"),
    [
        (0, 2, torch.float32, 1),
        (1, 2, torch.float32, 513),
        (1, 2, torch.float16, 1_000),
        (2, 3, torch.float32, 700),
        (0, 2, torch.int32, 600),
    ],
)
def test_each_rank_adds_up_all_in_their_order(rank: int, size: int, dtype: torch.dtype, count: int) -> None:
    torch.manual_seed(0)
    ranks = Ranks(rank, size)
    for _ in range(3):
        data = [(100 * torch.randn(count, device=DEVICE)).to(dtype) for _ in range(size)]
        expected = sum((one.float() for one in data), torch.zeros(count, device=DEVICE)).to(dtype)
        ranks.lend(data, all_reduce._LEAST)
        own = data[rank].clone()
        assert ranks.sum.supports(dtype, own.nbytes)
        ranks.sum(own)
        assert torch.equal(own, expected)
        for program, part in enumerate(data[rank].split(all_reduce._LEAST)):
            assert torch.equal(ranks.room(rank, dtype, program, ranks.rounds)[: part.numel()], part)
            for peer in set(range(size)) - {rank}:
                assert ranks.flags(peer)[program, rank] == ranks.rounds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parts_are_added_up_and_rounded_before(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ranks, parts = Ranks(1, 2), torch.randn(4, 3, 300, device=DEVICE)
    other, found = parts[0].flip(1).to(dtype), torch.empty(3, 300, dtype=dtype, device=DEVICE)
    ranks.lend([other, found], all_reduce._LEAST)
    ranks.sum(found, parts)
    own = (parts[0] + parts[1] + parts[2] + parts[3]).to(dtype)
    assert torch.equal(found, (other.float() + own.float()).to(dtype))


def test_more_than_all_programs_sum_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then each sums several blocks, in both of its rooms in turn."""
    monkeypatch.setattr(all_reduce, "MAX_PROGRAMS", 2)
    monkeypatch.setattr(all_reduce, "_BLOCK", 512)
    monkeypatch.setattr(all_reduce, "_ROOMS", 2 * 2 * all_reduce._ROOM)
    own = torch.arange(1_800.0, device=DEVICE)
    ranks, data = Ranks(0, 2), [own.clone(), own * 10]
    for number, pair in enumerate(data[1].split(1_024), 1):
        for program, part in enumerate(pair.split(512)):
            ranks.room(1, torch.float32, program, number)[: part.numel()] = part
    ranks.flags(0)[:, 1] = 2
    ranks.sum(own)
    assert torch.equal(own, data[0] + data[1])
    assert ranks.flags(1)[:, 0].tolist() == [2, 2]


def test_nobody_waits_for_a_peer_once_told_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_reduce, "_LOOKS", 64)
    ranks = Ranks(0, 2)
    ranks.sum.stop()
    ranks.sum(torch.ones(5_000, device=DEVICE))
    assert ranks.flags(1)[0, 0] == 1


def test_what_it_is_not_made_for_is_left_to_the_library() -> None:
    two, three = Ranks(0, 2).sum, Ranks(0, 3).sum
    assert two.supports(torch.bfloat16, 4 << 20) and not two.supports(torch.bfloat16, (4 << 20) + 1)
    assert three.supports(torch.int32, 1 << 20) and not three.supports(torch.int32, 2 << 20)
    assert not two.supports(torch.float64, 8)
