"""Chat templates of model families in short, after their published form, over a byte-level tokenizer.

The tokenizer has a few merges, so that a text has more than one tokenization: one byte a token is another than its own.
"""

from dataclasses import dataclass, field
from typing import Any

import families
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MERGES = [("a", "n"), ("h", "e"), ("i", "n"), ("t", "he"), ("Ġ", "a"), ("r", "i")]
TEXT = "".join(chr(c) for c in range(32, 127)) + "\n\té漢"

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: ' }}"
    "{{ (date_string if date_string is defined else strftime_now('%d %b %Y')) + '\n\n' + system + '<|eot_id|>' }}"
    "{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN25 = (
    "{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content }}"
    "{% else %}You are Qwen, created by Alibaba Cloud.{% endif %}"
    "{% if tools %}{{ '\n\n# Tools\n<tools>' }}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}"
    "{{ '\n</tools>' }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) "
    "or (m.role == 'assistant' and not m.tool_calls) %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant' }}{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    "{% for call in m.tool_calls %}{% set call = call.function %}"
    '{{ \'\n<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' }}'
    "{{ call.arguments | tojson + '}\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "{{ '<|im_start|>user' }}{% endif %}{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set content = m.content %}{% set thought = '' %}"
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{% else %}{{ content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('After the optional system message, conversation roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "{{ '<|User|>' + m.content }}{% else %}{% set content = m.content %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
HARMONY = (
    "{{ '<|start|>system<|message|>You are ChatGPT.\nReasoning: medium<|end|>' }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ '<|start|>developer<|message|># Instructions\n\n' + m.content + '<|end|>' }}"
    "{% elif m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}"
    "{% elif loop.last and not add_generation_prompt %}{% if m.thinking %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
GRANITE = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|start_of_role|>system<|end_of_role|>Knowledge Cutoff Date: April 2024.<|end_of_text|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
MERGING = (
    "{% for m in messages %}{% if loop.first or messages[loop.index0 - 1].role != m.role %}"
    "{% if not loop.first %}{{ '<end>' }}{% endif %}{{ '<' + m.role + '>' }}{% else %}{{ ' ' }}{% endif %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ '<end><assistant>' }}{% endif %}"
)

HARMONY_RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|start|>assistant",
    "fields": {
        "reasoning_content": {"open": "<|channel|>analysis<|message|>", "close": "<|end|>", "content": "text"},
        "content": {
            "open": ["<|start|>assistant<|channel|>final<|message|>", "<|channel|>final<|message|>"],
            "close": ["<|return|>", "<|end|>"],
            "content": "text",
        },
    },
}
QWEN_RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>\n", "close_pattern": r"\n</think>\s*", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>", "close": "</tool_call>", "repeats": True, "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*<\|im_end\|>", "content": "text"},
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Family:
    """A chat template, the special tokens that it writes, and the one that ends a turn."""

    template: str
    specials: tuple[str, ...]
    end: str
    plain: tuple[str, ...] = ()
    """Added tokens that are not special."""
    system: bool = True
    bos: str | None = None
    response: dict[str, Any] | None = field(default=None, hash=False)


_IM = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
    "smollm2": Family(CHATML, _IM, "<|im_end|>"),
    "llama3": Family(
        LLAMA3, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    "qwen2.5": Family(QWEN25, _IM, "<|im_end|>", plain=("<tool_call>", "</tool_call>"), response=QWEN_RESPONSE),
    "qwen3": Family(QWEN3, _IM, "<|im_end|>", plain=("<think>", "</think>")),
    "gemma": Family(
        GEMMA, ("<bos>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", system=False, bos="<bos>"
    ),
    "mistral": Family(MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", system=False, bos="<s>"),
    "phi3": Family(PHI3, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
    "deepseek-r1": Family(
        DEEPSEEK_R1, ("<|begin_of_sentence|>", "<|User|>", "<|Assistant|>", "<|end_of_sentence|>"),
        "<|end_of_sentence|>", plain=("<think>", "</think>"), bos="<|begin_of_sentence|>",
    ),
    "harmony": Family(
        HARMONY, ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"), "<|return|>",
        response=HARMONY_RESPONSE,
    ),
    "granite": Family(GRANITE, ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"), "<|end_of_text|>"),
}  # fmt: skip
"""Ten families as they were published, in short."""


def tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Byte-level, with the family's template and special tokens; no more than `families.VOCAB` tokens."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    characters = sorted({character for piece, _ in splitter.pre_tokenize_str(TEXT) for character in piece})
    merged = [left + right for left, right in MERGES]
    plain = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*characters, *merged])}, merges=MERGES))
    plain.pre_tokenizer = splitter
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens([AddedToken(token, special=True) for token in family.specials])
    plain.add_tokens([AddedToken(token, special=False) for token in family.plain])
    made = PreTrainedTokenizerFast(
        tokenizer_object=plain, chat_template=family.template, bos_token=family.bos, eos_token=family.end
    )
    made.response_template = family.response
    assert len(made) <= families.VOCAB
    return made
