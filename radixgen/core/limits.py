"""Every bound on sizes that come from outside, in one object, checked before any allocation."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on one engine's requests. Counts unless a unit is given."""

    max_n: int = 128
    """Sequences of one request; beams of one search."""
    max_logprobs: int = 20
    """Alternatives reported for each token."""
    max_logprob_values: int = 1 << 20
    """Log-probabilities of all tokens that one request may have, each with its alternatives."""
    max_stop: int = 16
    """Stop strings."""
    max_stop_len: int = 1_024
    """Characters of a stop string."""
    max_stop_token_ids: int = 128
    max_logit_bias: int = 1_024
    """Tokens with a bias."""
    max_grammar_chars: int = 1 << 16
    """Characters of a schema, a regular expression or a grammar; of all choices together."""
    max_choices: int = 1_024
    max_grammars: int = 64
    """Compiled grammars that are kept for requests to come."""
    max_compiling: int = 1_024
    """Grammars of one caller of a server that wait to be compiled."""
    max_prompt_chars: int = 1 << 22
    """Characters of a text prompt, before it is tokenized."""
    max_request_id_len: int = 256
    """Characters of a request id or a namespace."""
    max_waiting: int = 16_384
    """Requests not yet admitted."""
    max_waiting_tokens: int = 1 << 24
    """Prompt tokens of requests not yet admitted; a single request may have more."""
    max_overtaken: int = 64
    """Later requests of its priority that may be admitted before a request."""
    max_num_seqs: int = 1_024
    """Sequences that run at the same time."""
    max_ranks: int = 64
    """Processes that one model is sharded over."""
    max_pins: int = 1_024
    """Pinned prefixes."""
    max_messages: int = 16_384
    """Messages of one conversation."""
    max_tools: int = 1_024
    """Tools of one conversation."""
    max_saved_chars: int = 1 << 26
    """Characters of a saved conversation."""
    max_thoughts: int = 1 << 20
    """Thoughts of one search."""
    max_body_bytes: int = 1 << 25
    """Bytes of one HTTP request's body."""
    max_reading_bytes: int = 1 << 29
    """Bytes of all bodies that are being read or decoded."""
    max_prompts: int = 128
    """Prompts of one HTTP request."""
    max_sessions: int = 1_024
    """Conversations that an HTTP server keeps; beyond, the caller that has the most loses its oldest."""
    max_session_bytes: int = 1 << 28
    """Bytes of memory that these hold; beyond, the caller that holds the most loses its oldest."""
    max_frame_bytes: int = 1 << 23
    """Bytes of one frame that a front end sends: a prompt of a million tokens has five millions."""
    max_frames: int = 64
    """Frames of one message."""
    max_backlog: int = 4_096
    """Messages of front ends that the engine has not taken yet; beyond, their sockets are not read."""
    max_backlog_bytes: int = 1 << 26
    """Bytes of such messages."""
    max_outbox_bytes: int = 1 << 24
    """Bytes that wait for one front end; beyond, its requests are aborted."""
    max_salt_len: int = 4_096
    """Characters of a cache salt."""
    max_method_len: int = 64
    """Characters of a utility's name."""
    max_viewers: int = 16
    """Who may watch the live page at the same time."""
    max_shown_nodes: int = 2_000
    """Nodes of the tree that the live page draws."""
    max_shown_chars: int = 1 << 20
    """Characters of their text in all that it is told."""
