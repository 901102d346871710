"""Limits on all sizes that come from outside, checked before any allocation."""

from dataclasses import dataclass

DEFAULT_KV_DIR_BYTES = 16 << 30
"""Default bound on the files of a KV folder."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one engine. Counts unless a unit is given."""

    max_n: int = 128
    """Sequences per request; beams per beam search."""
    max_logprobs: int = 20
    """Alternatives reported per token."""
    max_logprob_values: int = 1 << 20
    """Log-probabilities per request, over all tokens and their alternatives."""
    max_stop: int = 16
    """Stop strings per request."""
    max_stop_len: int = 1_024
    """Characters per stop string."""
    max_stop_token_ids: int = 128
    max_logit_bias: int = 1_024
    """Tokens with a bias per request."""
    max_grammar_chars: int = 1 << 16
    """Characters of a schema, regular expression or grammar; of all choices together."""
    max_choices: int = 1_024
    max_grammars: int = 64
    """Compiled grammars kept for later requests."""
    max_compiling: int = 1_024
    """Grammars per caller of a server that wait to be compiled."""
    max_prompt_chars: int = 1 << 22
    """Characters of a text prompt, before tokenization."""
    max_request_id_len: int = 256
    """Characters of a request id or namespace."""
    max_waiting: int = 16_384
    """Requests waiting for admission."""
    max_waiting_tokens: int = 1 << 24
    """Prompt tokens of the requests waiting for admission. A single request may exceed it."""
    max_overtaken: int = 64
    """Later requests of the same priority that may be admitted before a request. 0: in the order of arrival."""
    max_num_seqs: int = 1_024
    """Sequences running at the same time."""
    max_ranks: int = 64
    """Processes over which one model is sharded."""
    max_pins: int = 1_024
    """Pinned prefixes. Beyond it, the owner whose cache hints retain the most loses the weakest pin."""
    max_cache_hints: int = 16
    """Cache hints per request."""
    max_hint_seconds: float = 3_600.0
    """Lifetime of what a cache hint retains, in seconds."""
    max_hint_pins: int = 64
    """Prefixes that the cache hints of one owner retain."""
    max_hint_pool_share: float = 0.25
    """Fraction of the pool's slots that the cache hints of one owner retain."""
    max_messages: int = 16_384
    """Messages per conversation."""
    max_tools: int = 1_024
    """Tools per conversation."""
    max_saved_chars: int = 1 << 26
    """Characters of a saved conversation."""
    max_thoughts: int = 1 << 20
    """Thoughts per search."""
    max_body_bytes: int = 1 << 25
    """Bytes of the body of one HTTP request."""
    max_reading_bytes: int = 1 << 29
    """Bytes of all bodies being read or decoded at the same time."""
    max_prompts: int = 128
    """Prompts per HTTP request."""
    max_sessions: int = 1_024
    """Conversations stored by an HTTP server. Beyond it, the caller with the most loses its oldest."""
    max_session_bytes: int = 1 << 28
    """Bytes of memory of all stored conversations. Beyond it, the caller with the most bytes loses its oldest
    conversation.
    """
    max_responses: int = 4_096
    """Responses stored by an HTTP server. Beyond it, the caller with the most loses its oldest."""
    max_response_bytes: int = 1 << 28
    """Bytes of memory of all stored responses, each with the conversation before it. Beyond it, the caller with the
    most bytes loses its oldest response.
    """
    max_frame_bytes: int = 1 << 23
    """Bytes of one frame from a front end. A prompt of a million tokens takes about five million."""
    max_frames: int = 64
    """Frames per message."""
    max_backlog: int = 4_096
    """Messages from front ends that wait for the engine. Beyond it, their sockets are not read."""
    max_backlog_bytes: int = 1 << 26
    """Bytes of the messages that wait for the engine."""
    max_outbox_bytes: int = 1 << 24
    """Bytes waiting to be sent to one front end. Beyond it, its requests are aborted."""
    max_salt_len: int = 4_096
    """Characters of a cache salt."""
    max_method_len: int = 64
    """Characters of a utility method's name."""
    max_viewers: int = 16
    """Viewers of the live page at the same time."""
    max_shown_nodes: int = 2_000
    """Nodes that the live page draws."""
    max_shown_chars: int = 1 << 20
    """Characters of node text sent to the live page, over all nodes."""
