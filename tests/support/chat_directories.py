"""A tiny Hugging Face tokenizer, written as a directory."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from tests.support.checkpoints import byte_level_bpe

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_directory(directory: Path, template: Any = CHATML, **config: Any) -> Path:
    """Write a byte-level BPE tokenizer of some 300 tokens as a Hugging Face directory."""
    text = "hello good day system user assistant\n\n  [INST] a b\n\n [/INST] \n\n"
    tokenizer = byte_level_bpe([text] * 20, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_special_tokens([AddedToken("<|pad|>", special=True)])
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    tokens = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens, **config}
    if template is not None:
        content["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    return directory
