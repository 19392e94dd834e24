"""A tiny Hugging Face tokenizer, written as a directory."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_directory(directory: Path, template: Any = CHATML, **config: Any) -> Path:
    """Write a byte-level BPE tokenizer of some 300 tokens as a Hugging Face directory."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    text = "hello good day system user assistant\n\n  [INST] a b\n\n [/INST] \n\n"
    tokenizer.train_from_iterator([text] * 20, trainer)
    tokenizer.add_special_tokens([AddedToken("<|pad|>", special=True)])
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    tokens = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens, **config}
    if template is not None:
        content["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    return directory
