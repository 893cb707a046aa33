"""Chat templates of many families, and the tokens that their real tokenizers name or hold as added ones."""

from __future__ import annotations

import re
from pathlib import Path

import trl

TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
# Of models that read pictures, and of one that writes all of an answer at once.
REFUSED = ("idefics3", "smolvlm", "llava_next", "qwen2_5_vl", "qwen3_vl", "lfm2_2_5_vl", "diffusion_gemma")

# BOS and EOS of the real tokenizers, by how a template's name begins. EOS is not always what closes an answer.
NAMED_TOKENS: dict[str, tuple[str | None, str]] = {
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "gemma": ("<bos>", "<eos>"),
    "glm4moe": (None, "<|endoftext|>"),
    "gptoss": ("<|startoftext|>", "<|return|>"),
    "lfm2": ("<|startoftext|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>"),
    "muse_glimmer": ("<|begin_of_text|>", "<|eot|>"),
    "nemotron": ("<s>", "<|im_end|>"),
    "phi3": ("<s>", "<|endoftext|>"),
    "qwen": (None, "<|im_end|>"),
}

# Families that trl does not hold, written the way that theirs write: template, BOS, EOS.
OTHERS: dict[str, tuple[str, str | None, str]] = {
    # Granite 3: the system prompt that it writes by itself names the day.
    "granite3": (
        "{% if messages[0].role != 'system' %}{{ '<|start_of_role|>system<|end_of_role|>Today is ' "
        "~ strftime_now('%B %d, %Y') ~ '.<|end_of_text|>\\n' }}{% endif %}"
        "{% for m in messages %}"
        "{{ '<|start_of_role|>' ~ m.role ~ '<|end_of_role|>' ~ m.content ~ '<|end_of_text|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}",
        "<|end_of_text|>", "<|end_of_text|>",
    ),
    # Mistral 7B v0.3 and Nemo: the last turn gets the system prompt, and loses it once an answer follows.
    "mistral": (
        "{{ bos_token }}"
        "{% set system = messages[0].content ~ '\\n\\n' if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}"
        "{% if m.role == 'user' %}{{ '[INST] ' ~ (system if loop.last else '') ~ m.content ~ '[/INST]' }}"
        "{% else %}{{ ' ' ~ m.content ~ eos_token }}{% endif %}"
        "{% endfor %}",
        "<s>", "</s>",
    ),
    "olmo2": (
        "{{ bos_token }}"
        "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\\n' ~ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% if m.role != 'assistant' or not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
        "<|endoftext|>", "<|endoftext|>",
    ),
    # The first templates of Phi-3 know no system message and say nothing of it.
    "phi3_first": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '<|user|>\\n' ~ m.content ~ '<|end|>\\n<|assistant|>\\n' }}"
        "{% elif m.role == 'assistant' %}{{ m.content ~ '<|end|>\\n' }}{% endif %}{% endfor %}",
        "<s>", "<|endoftext|>",
    ),
    "phi4": (
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '<|im_sep|>' ~ m.content ~ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
        "<|endoftext|>", "<|im_end|>",
    ),
    # EOS stands where no answer is asked for.
    "phi4_mini": (
        "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content ~ '<|end|>' }}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt else eos_token }}",
        "<|endoftext|>", "<|endoftext|>",
    ),
    "smollm2": (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        "<|im_start|>", "<|im_end|>",
    ),
    # The day and the mode of reasoning stand in its system turn; without reasoning each answer has an empty block.
    "smollm3": (
        "{% set thinks = enable_thinking is not defined or enable_thinking %}"
        "{% set start = '<|im_start|>assistant\\n' ~ ('' if thinks else '<think>\\n\\n</think>\\n') %}"
        "{{ '<|im_start|>system\\nToday Date: ' ~ strftime_now('%d %B %Y') ~ '\\nReasoning Mode: ' }}"
        "{{ ('/think' if thinks else '/no_think') ~ '\\n\\n' }}"
        "{% if messages[0].role == 'system' %}{{ messages[0].content ~ '\\n\\n' }}{% endif %}{{ '<|im_end|>\\n' }}"
        "{% for m in messages if m.role != 'system' %}"
        "{{ (start if m.role == 'assistant' else '<|im_start|>user\\n') ~ m.content ~ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ start }}{% endif %}",
        None, "<|im_end|>",
    ),
}  # fmt: skip
# What families hold as added tokens: anything with bars, and a few tags. `<tools>` or `<parameter>` are ordinary text.
MARKERS = re.compile(
    r"<\|[^\s<>|]+\|?>|<[^\s<>|]+\|>|<｜[^\s<>｜]+｜>|\[/?[A-Z_]+\]|\[gMASK\]|<(?:start_of_turn|end_of_turn|sop)>"
)
TAGS = re.compile(r"</?(?:think|tool_call|tool_response)>")  # added, but not special: an answer may hold them


def text_templates() -> list[str]:
    """Name every original template of text models in the installed trl."""
    names = sorted(path.stem for path in TRL_TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))
    return [name for name in names if name not in REFUSED]
