"""`dtype="auto"` on a CPU is bfloat16 only where it is multiplied, and faster."""

import logging
from pathlib import Path

import families
import pytest
import torch

from radixgen import Engine
from radixgen.kernels import packed_linear
from radixgen.model import cpu_dtype, loader

PACKS = packed_linear.supports(torch.ones(8, 8, dtype=torch.bfloat16))


@pytest.mark.skipif(not PACKS, reason="products in bfloat16 are not packed here")
@pytest.mark.parametrize(
    ("has", "slower", "chosen"),
    [
        (True, torch.float32, torch.bfloat16),
        (True, torch.bfloat16, torch.float32),
        (False, torch.float32, torch.float32),
    ],
)
def test_choice(monkeypatch, caplog: pytest.LogCaptureFixture, has, slower, chosen) -> None:
    monkeypatch.setattr(cpu_dtype, "multiplies_bfloat16", lambda: has)
    monkeypatch.setattr(cpu_dtype, "_product_seconds", lambda dtype, _: 2.0 if dtype == slower else 1.0)
    with caplog.at_level(logging.INFO):
        assert cpu_dtype.fastest_dtype() == chosen
    assert len(caplog.records) == 1 and f"dtype='auto': {str(chosen).removeprefix('torch.')}" in caplog.text


def test_products_are_timed() -> None:
    weight = torch.ones(1024, 1024)
    if packed_linear.supports(weight):
        assert 0.0 < cpu_dtype._product_seconds(torch.float32, packed_linear.pack(weight)) < 1.0


@pytest.mark.parametrize("chosen", [torch.float32, torch.bfloat16])
def test_engines_by_name_take_it_and_model_objects_keep_theirs(monkeypatch, tmp_path: Path, chosen) -> None:
    monkeypatch.setattr(loader, "fastest_dtype", lambda: chosen)
    network = families.build("llama")
    network.save_pretrained(tmp_path)
    for model, expected in ((tmp_path, chosen), (network, torch.float32)):
        with Engine(model, kv_tokens=64, device="cpu") as engine:
            assert engine.dtype == str(expected).removeprefix("torch.")
            assert len(engine.generate([5, 6, 7])[0].outputs[0].token_ids) == 16
    with Engine(tmp_path, dtype="float32", kv_tokens=64, device="cpu") as engine:
        assert engine.dtype == "float32"
