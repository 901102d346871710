"""llama.cpp as an engine to compare with: its C interface through ctypes, on one shared library.

`pip install xllamacpp` brings such a library, built for AVX2. `--llama-library` takes another one, for example of a
build whose kernels are chosen for the processor it runs on; it was tried with versions 0.5 and 0.6.

llama.cpp is used as its documentation says to use it for prompts that overlap: what all prompts begin with is computed
once and copied to the other sequences, a conversation's tokens stay in its sequence, and all sequences are decoded in
one batch.
"""

import ctypes
import re
import struct
from collections.abc import Sequence
from ctypes import c_bool, c_char_p, c_float, c_int32, c_void_p
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize

from bench.workloads import Answers, Ask, Tokens
from radixgen.chat.history import num_common

BATCH = 2048
"""Tokens of one call of `llama_decode` at the most; llama.cpp's default"""
CONTEXT_FIELDS = {
    "n_ctx": (0, 512), "n_batch": (4, BATCH), "n_seq_max": (12, 1), "n_threads": (28, 4), "n_threads_batch": (32, 4),
    "flash_attn_type": (52, -1),
}  # fmt: skip
"""Offset in `llama_context_params`, and the default by which a library is recognized"""
SWITCHES = b"\0\1\1\1\1\0"
"""The booleans at the end of `llama_context_params`, by default; the last one is `kv_unified`"""

FILE_TYPES = {
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
}
REWRITTEN = {"general.architecture", "general.file_type"}
"""Keys that a converted file gets anew"""


class _Params(ctypes.Structure):
    """Parameters of a model or a context, as more bytes than they have: versions differ behind the fields set here."""

    _fields_ = (("data", ctypes.c_uint8 * 512),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        *((name, c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    )


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)
_SILENT = _Log(lambda *_: None)
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_load_all_from_path": (None, [c_char_p]),
    "llama_version": (c_char_p, []),
    "llama_print_system_info": (c_char_p, []),
    "llama_log_set": (None, [_Log, c_void_p]),
    "llama_model_default_params": (_Params, []),
    "llama_context_default_params": (_Params, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _Params]),
    "llama_init_from_model": (c_void_p, [c_void_p, _Params]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_model_free": (None, [c_void_p]),
    "llama_free": (None, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_memory_seq_cp": (None, [c_void_p, c_int32, c_int32, c_int32, c_int32]),
    "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_get_logits": (ctypes.POINTER(c_float), [c_void_p]),
}


def installed() -> Path | None:
    """The library of the package `xllamacpp`; None without it."""
    spec = find_spec("xllamacpp")
    folder = spec.submodule_search_locations if spec else None
    return next(Path(folder[0]).glob("xllamacpp*.so"), None) if folder else None


def load(path: Path) -> Any:
    """A library with `SIGNATURES`, which prints nothing, and its kernels. Raises `RuntimeError` for other versions."""
    library: Any = ctypes.CDLL(str(path))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_SILENT, None)
    library.ggml_backend_load_all_from_path(str(path.parent).encode())
    defaults = bytes(library.llama_context_default_params().data)
    found = {name: struct.unpack_from("i", defaults, offset)[0] for name, (offset, _) in CONTEXT_FIELDS.items()}
    if found != {name: default for name, (_, default) in CONTEXT_FIELDS.items()} or SWITCHES not in defaults:
        raise RuntimeError(f"{path}: llama.cpp {library.llama_version().decode()} has other parameters: {found}")
    return library


def features(path: Path) -> list[str]:
    """Instruction sets and options that a library uses on this machine."""
    return re.findall(r"(\w+) = 1", load(path).llama_print_system_info().decode())


def convert(source: Path, target: Path, dtype: GGMLQuantizationType) -> None:
    """Write the GGUF file `source` again, with its matrices in `dtype`, one of `FILE_TYPES`."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    writer.add_file_type(FILE_TYPES[dtype])
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in REWRITTEN:
            items = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], items)
    for tensor in reader.tensors:
        numbers = dequantize(tensor.data, tensor.tensor_type)
        kept = dtype if numbers.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, quantize(numbers, kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """One model in one context. Greedy, or drawn from the softmax."""

    def __init__(
        self, library: Any, model: Path, *, sequences: int, length: int, threads: int, unified: bool, flash: bool
    ) -> None:
        """sequences, length: how many there are at a time, and tokens of the longest. unified: one KV buffer for all
        sequences, instead of one each. flash: by the flash attention kernel.
        """
        self._library = library
        self._model = library.llama_model_load_from_file(str(model).encode(), library.llama_model_default_params())
        params = library.llama_context_default_params()
        given = {
            "n_ctx": sequences * -(-length // 256) * 256, "n_seq_max": sequences,
            "n_threads": threads, "n_threads_batch": threads, "flash_attn_type": int(flash),
        }  # fmt: skip
        for name, value in given.items():
            struct.pack_into("i", params.data, CONTEXT_FIELDS[name][0], value)
        params.data[bytes(params.data).index(SWITCHES) + len(SWITCHES) - 1] = unified
        self._context = self._model and library.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp did not load {model}")
        self._memory = library.llama_get_memory(self._context)
        self._vocab = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        self._generator = np.random.default_rng(0)
        self._held: list[Tokens] = [[] for _ in range(sequences)]
        """Tokens whose keys each sequence holds"""
        self.about = {"engine": "llama.cpp", "version": library.llama_version().decode(), "step_tokens": BATCH}

    def close(self) -> None:
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def reset(self) -> None:
        self._library.llama_memory_clear(self._memory, False)
        self._held = [[] for _ in self._held]

    def answer(self, ask: Ask) -> Answers:
        """Raises `RuntimeError` if the context is full."""
        rows = {place * ask.n: prompt for place, prompt in enumerate(ask.prompts)}
        if len(rows) > 1:
            self._share(rows)
        for slot, row in rows.items():
            self._cut(slot, num_common(self._held[slot], row[:-1]))
        pending = {slot: row[len(self._held[slot]) :] for slot, row in rows.items()}
        answers = [[token] for token in self._compute(pending, ask.temperature, ask.n)]
        for slot in rows:
            for sample in range(slot + 1, slot + ask.n):
                self._copy(slot, sample)
        for _ in range(ask.new - 1):
            drawn = self._compute({slot: answer[-1:] for slot, answer in enumerate(answers)}, ask.temperature)
            for answer, token in zip(answers, drawn, strict=True):
                answer.append(token)
        return [answers[first : first + ask.n] for first in rows]

    def _share(self, rows: dict[int, Tokens]) -> None:
        """Let the sequence of each row hold what all rows begin with, computed once."""
        first = next(iter(rows.values()))[:-1]
        shared = first[: min(num_common(first, row[:-1]) for row in rows.values())]
        lacking = [slot for slot in rows if num_common(self._held[slot], shared) < len(shared)]
        if not lacking:
            return
        source = max(range(len(self._held)), key=lambda slot: num_common(self._held[slot], shared))
        if missing := shared[num_common(self._held[source], shared) :]:
            self._cut(source, len(shared) - len(missing))
            self._compute({source: missing}, 0.0)
        for slot in lacking:
            if slot != source:
                self._copy(source, slot)

    def _copy(self, source: int, target: int) -> None:
        """Whole: where each sequence has a buffer of its own, llama.cpp copies no part of one."""
        self._cut(target, 0)
        self._library.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        self._held[target] = list(self._held[source])

    def _cut(self, slot: int, length: int) -> None:
        """Keep only the first tokens of a sequence."""
        if length < len(self._held[slot]):
            assert self._library.llama_memory_seq_rm(self._memory, slot, length, -1)
            del self._held[slot][length:]

    def _compute(self, pending: dict[int, Tokens], temperature: float, draws: int = 1) -> Tokens:
        """Append to each sequence, and draw tokens behind each."""
        entries = [
            (token, len(self._held[slot]) + place, slot, place + 1 == len(tokens))
            for slot, tokens in pending.items()
            for place, token in enumerate(tokens)
        ]
        drawn = list[int]()
        for first in range(0, len(entries), BATCH):
            logits = self._decode(entries[first : first + BATCH])
            drawn += self._draw(logits, temperature, draws)
        for slot, tokens in pending.items():
            self._held[slot] += tokens
        return drawn

    def _decode(self, entries: Sequence[tuple[int, int, int, bool]]) -> torch.Tensor:
        """Compute tokens, each with its position, its sequence, and whether its logits are wanted.

        Returns `[wanted, vocabulary]` float32, which the next call overwrites.
        """
        tokens, positions, slots, last = (np.array(column, np.int32) for column in zip(*entries, strict=True))
        counts, wanted = np.ones_like(tokens), last.astype(np.int8)
        slot_pointers = slots.ctypes.data + slots.itemsize * np.arange(len(slots), dtype=np.uint64)
        arrays = [array.ctypes.data for array in (tokens, positions, counts, slot_pointers, wanted)]
        status = self._library.llama_decode(self._context, _Batch(len(tokens), arrays[0], None, *arrays[1:]))
        if status:
            raise RuntimeError(f"llama_decode: status {status}")
        rows = int(wanted.sum())
        if not rows:
            return torch.empty(0, self._vocab)
        logits = np.ctypeslib.as_array(self._library.llama_get_logits(self._context), (rows, self._vocab))
        return torch.from_numpy(logits)

    def _draw(self, logits: torch.Tensor, temperature: float, draws: int) -> Tokens:
        """`draws` tokens of each row of logits."""
        if not temperature:
            return logits.argmax(-1).repeat_interleave(draws).tolist()
        sums = (logits / temperature).softmax(-1).cumsum(-1)
        points = torch.from_numpy(self._generator.random((len(logits), draws), np.float32)) * sums[:, -1:]
        return torch.searchsorted(sums, points).clamp_(max=self._vocab - 1).flatten().tolist()
