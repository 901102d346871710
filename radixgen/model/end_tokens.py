"""End tokens of a model and of its chat template."""

import logging
import operator
from typing import TYPE_CHECKING, Any

from radixgen.core import UnsupportedModel
from radixgen.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_ANSWER = "radixgen-answer"


def end_tokens(name: str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None") -> frozenset[int]:
    """Return the end tokens of the generation config, or else of the config, like transformers' `generate`.

    Logs a warning if the model has none and its chat template has none either. Raises `UnsupportedModel` for values
    that are not token ids.
    """
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    listed = eos if isinstance(eos, list | tuple | set) else [] if eos is None else [eos]
    try:
        ids = set(map(operator.index, listed))
    except TypeError:
        raise UnsupportedModel(f"{name}: its eos_token_id={eos!r} is neither a token id nor a list of them") from None
    known = model.get_input_embeddings().weight.shape[0]
    ends = frozenset(token for token in ids if 0 <= token < known)
    if not ends and (tokenizer is None or not chat_end_tokens(tokenizer)):
        logger.warning("%s has no end token: every request runs until max_tokens or a stop string", name)
    return ends


def chat_end_tokens(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Return the additional end tokens of chats: the tokenizer's end token, and the special token after an answer in
    the chat template.
    """
    return frozenset({getattr(tokenizer, "eos_token_id", None), _end_of_turn(tokenizer)} - {None})  # type: ignore[arg-type]


def _end_of_turn(tokenizer: Any) -> int | None:
    """Return the special token after an answer in the chat template, or None without a template or such a token."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template may raise anything
        logger.debug("the end of a turn is not known: %s", error)
        return None
    _, answer, rest = text.rpartition(_ANSWER)
    ids = tokenizer.encode(rest.lstrip(), add_special_tokens=False) if answer else []
    return ids[0] if ids and ids[0] in Vocabulary(tokenizer).special else None
