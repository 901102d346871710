"""Makes requests of checked prompts and parameters."""

from typing import Unpack

from radixgen.cache import TokenArray
from radixgen.core import BeamSearchParams, Grammar, SamplingParams, SamplingState
from radixgen.core.reading import Press, ReadingPolicy
from radixgen.engine.request_options import CoreOptions
from radixgen.model.base import Model, check_press
from radixgen.sampling.beam_search import BeamSearch
from radixgen.sampling.sampler import fork_seed
from radixgen.scheduler.sequence import Request, Sequence, prompt_namespace


def make_request(
    model: Model,
    prompt: TokenArray,
    params: SamplingParams | BeamSearchParams,
    *,
    request_id: str,
    serial: int,
    seed: int,
    share: bool,
    score_from: int | None,
    grammar: Grammar | None,
    reading: ReadingPolicy,
    mark: int,
    **options: Unpack[CoreOptions],
) -> Request:
    """As `EngineCore.make`. `seed`: the engine's, from which requests without a seed derive their own."""
    check_press(model, reading)
    beams, params = (params, params.sampling) if isinstance(params, BeamSearchParams) else (None, params)
    assert grammar is not None or not params.structured, "a grammar was not compiled"
    targets, first, max_output = None, 0, min(params.max_tokens, model.max_model_len - prompt.size)
    if score_from is not None:
        prompt, targets, first, max_output = prompt[:-1], prompt[1:], score_from, 0
    elif params.prompt_logprobs is not None:
        targets = prompt[1:]
    request = Request(
        id=request_id,
        serial=serial,
        prompt=prompt,
        params=params,
        max_output=max_output,
        targets=targets,
        next_scored=first,
        reading=reading,
        mark=mark,
        **options,
    )
    own_seed = params.seed if params.seed is not None else fork_seed(seed, serial)
    ends = frozenset(params.stop_token_ids)
    if not params.ignore_eos:
        ends |= model.eos_token_ids | frozenset(params.end_token_ids)
    if beams is not None:
        request.search = BeamSearch(beams, max_output, ends)
    share = share and not reading.frees
    share = share and not (isinstance(reading, Press) and targets is not None)
    share = share and not any(hint.action == "share" and hint.num_tokens == 0 for hint in request.hints)
    if share:
        request.namespace = prompt_namespace(prompt, reading, request.namespace)
    for index in range(params.n):
        own = request.namespace if share else request.private_namespace(index)
        state = SamplingState(params, own_seed, index, prompt, [], ends, grammar.start() if grammar else None)
        request.add_sequence(Sequence(request, index, own, state))
    return request
