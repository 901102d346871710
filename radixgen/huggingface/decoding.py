"""`Decoding`: one call of `generate`, whose arguments transformers has prepared, on an engine."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from radixgen.core import BeamSearchParams, CompletionOutput, InvalidRequest, RequestFailed, SamplingParams
from radixgen.engine.core import EngineCore
from radixgen.engine.engine import Engine
from radixgen.model.base import Logits
from radixgen.scheduler.sequence import Sequence as EngineSequence

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList
    from transformers.generation import BaseStreamer
    from transformers.generation.stopping_criteria import StopStringCriteria
    from transformers.utils import ModelOutput


class Decoding:
    """Runs a request for each row of a batch, and lays out what they generate as transformers does."""

    def __init__(
        self,
        engine: Engine,
        input_ids: Tensor,
        *,
        stop_strings: "StopStringCriteria | None" = None,
        streamer: "BaseStreamer | None" = None,
        keep_logits: bool = False,
    ) -> None:
        """
        input_ids: the padded prompts, int64 `[rows, tokens]`.
        stop_strings: ends a row whose text it finds a stop string in.
        streamer: gets the tokens of the only row as they are generated.
        """
        self._engine = engine
        self._input_ids = input_ids
        self._stop_strings = stop_strings
        self._streamer = streamer
        self._keep_logits = keep_logits
        self._open: dict[str, int] = {}
        """Row of each request that has not ended."""
        self.token_ids: list[list[int]] = [[] for _ in range(input_ids.shape[0])]
        """Generated tokens of each row."""
        self._logits: list[list[Tensor]] = [[] for _ in self.token_ids]
        """Logits `[vocab]` from which each of them was drawn."""

    def run(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> None:
        """Generate one sequence for each prompt. Raises `RequestFailed`, and what `Engine.submit` raises."""
        try:
            self._listen(self._keep_logits)
            for row, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
                self._open[self._engine.submit(prompt, own, output_kind="delta")] = row
            while self._open:
                self._step()
        finally:
            self._listen(False)
            for request_id in list(self._open):
                self._cancel(request_id)
        if self._streamer is not None:
            self._streamer.end()

    def output(self, config: "GenerationConfig", processors: "LogitsProcessorList") -> "Tensor | ModelOutput":
        """Return prompts and generated tokens, int64 `[rows, tokens]` on the device of the prompts, alone or with what
        else `config` requests.

        Scores are logits as transformers' own `processors` change them. Logits and scores are float32 `[rows, vocab]`
        for each step; rows that had ended are 0. Raises `InvalidRequest` without a `pad_token_id` that is needed.
        """
        from transformers.generation import GenerateDecoderOnlyOutput

        pad = config._pad_token_tensor
        sequences = _lay_out(self._input_ids, self.token_ids, None if pad is None else int(pad))
        if not config.return_dict_in_generate:
            return sequences
        logits = self._logits_by_step() if self._keep_logits else ()
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=self._scores(logits, sequences, processors) if config.output_scores else None,
            logits=logits if config.output_logits else None,
        )

    def _scores(
        self, logits: Sequence[Tensor], sequences: Tensor, processors: "LogitsProcessorList"
    ) -> tuple[Tensor, ...]:
        """Return `logits` as transformers' own processors change them; 0 for rows that had ended."""
        prompt_len = self._input_ids.shape[1]
        lengths = torch.tensor([len(ids) for ids in self.token_ids], device=sequences.device)[:, None]
        return tuple(
            processors(sequences[:, : prompt_len + step], values.clone()).masked_fill(step >= lengths, 0.0)
            for step, values in enumerate(logits)
        )

    def _logits_by_step(self) -> tuple[Tensor, ...]:
        """Return the model's logits at each step, float32 `[rows, vocab]`; 0 for rows that had ended."""
        longest = max(map(len, self.token_ids))
        blank = torch.zeros_like(self._logits[0][0])
        return tuple(
            torch.stack(
                [own[step] if step < len(ids) else blank for own, ids in zip(self._logits, self.token_ids, strict=True)]
            ).to(self._input_ids.device)
            for step in range(longest)
        )

    def _listen(self, wanted: bool) -> None:
        def listen(core: EngineCore) -> None:
            core.on_draw = self._record if wanted else None

        self._engine.inspect(listen)

    def _record(self, drawing: Sequence[EngineSequence], logits: Logits, rows: Sequence[int]) -> None:
        """Keep a copy of the logits of each of our sequences that draws in this step."""
        for sequence, row in zip(drawing, rows, strict=True):
            own = self._open.get(sequence.request.id)
            if own is not None and isinstance(logits, Tensor):
                self._logits[own].append(logits[row].to(torch.float32, copy=True))

    def _step(self) -> None:
        """Run a step of the engine, and end the rows that it completes."""
        grown: list[tuple[str, int]] = []
        for output in self._engine.step():
            row = self._open.get(output.request_id)
            if row is None:
                continue
            (new,) = output.outputs
            self._append(row, new)
            if output.finished:
                del self._open[output.request_id]
            else:
                grown.append((output.request_id, row))
        for request_id in self._at_stop_string(grown):
            self._cancel(request_id)

    def _append(self, row: int, new: CompletionOutput) -> None:
        _check(new, row)
        self.token_ids[row] += new.token_ids
        if self._streamer is not None:
            for token in new.token_ids:
                self._streamer.put(torch.tensor([token]))

    def _at_stop_string(self, grown: list[tuple[str, int]]) -> list[str]:
        """Return the requests, of those that got a token, whose rows now end with a stop string."""
        if self._stop_strings is None:
            return []
        ended: list[str] = []
        by_length = sorted(grown, key=lambda item: len(self.token_ids[item[1]]))
        for _, group in groupby(by_length, key=lambda item: len(self.token_ids[item[1]])):
            ids, rows = zip(*group, strict=True)
            new = torch.tensor([self.token_ids[row] for row in rows], device=self._input_ids.device)
            hits = self._stop_strings(torch.cat([self._input_ids[list(rows)], new], 1), None).tolist()
            ended += [request_id for request_id, hit in zip(ids, hits, strict=True) if hit]
        return ended

    def _cancel(self, request_id: str) -> None:
        del self._open[request_id]
        if self._engine.knows(request_id):
            self._engine.cancel(request_id)


def search_beams(
    engine: Engine,
    input_ids: Tensor,
    prompts: Sequence[list[int]],
    params: BeamSearchParams,
    config: "GenerationConfig",
) -> tuple[Tensor, Tensor]:
    """Search with beams from each prompt, which has as many rows in `input_ids` `[rows, tokens]` as there are beams.

    Returns the `num_return_sequences` best sequences of each prompt, int64 `[prompts × best, tokens]`, and their
    scores, float32 `[prompts × best]`. Raises `RequestFailed`, and what `Engine.generate` raises.
    """
    width, best = params.beam_width, config.num_return_sequences or 1
    hypotheses: list[CompletionOutput] = []
    for row, output in enumerate(engine.generate(prompts[::width], params)):
        _check(output.outputs[0], row)
        hypotheses += output.outputs[:best]
    scores = torch.tensor([hypothesis.score for hypothesis in hypotheses], dtype=torch.float32)
    rows = input_ids[::width].repeat_interleave(best, 0)
    ends, pad = config._eos_token_tensor, config._pad_token_tensor
    fill = None if ends is None else int(pad or ends[0])  # as transformers pads beams: 0 counts as no token
    return _lay_out(rows, [hypothesis.token_ids for hypothesis in hypotheses], fill), scores.to(input_ids.device)


def _check(output: CompletionOutput, row: int) -> None:
    if output.finish_reason in ("error", "abort"):
        raise RequestFailed(f"row {row} of input_ids: {output.stop_reason or output.finish_reason}")


def _lay_out(prompts: Tensor, token_ids: Sequence[list[int]], fill: int | None) -> Tensor:
    """Append to each row of `prompts` `[rows, tokens]` its tokens, with `fill` behind those that are shorter."""
    longest = max(map(len, token_ids))
    if fill is None and any(len(own) < longest for own in token_ids):
        raise InvalidRequest("pad_token_id", None, "must be a token id: the sequences have different lengths")
    padded = torch.full((len(token_ids), longest), 0 if fill is None else fill, dtype=torch.int64)
    for row, own in enumerate(token_ids):
        padded[row, : len(own)] = torch.tensor(own)
    return torch.cat([prompts, padded.to(prompts.device)], 1)
