"""Every bound on sizes that come from outside, in one object, checked before any allocation."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on one engine's requests. Counts unless a unit is given."""

    max_n: int = 128
    """Sequences of one request."""
    max_logprobs: int = 20
    """Alternatives reported for each token."""
    max_stop_token_ids: int = 128
    max_request_id_len: int = 256
    """Characters of a request id or a namespace."""
    max_waiting: int = 16_384
    """Requests not yet admitted."""
    max_num_seqs: int = 1_024
    """Sequences that run at the same time."""
