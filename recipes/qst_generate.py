"""Answer prompts with a tuned model, or with the quantised base model alone.

Examples::

    tune run qst_generate --config smollm2/135M_qst_generate prompt="What does a with block do?"
    tune run qst_generate --config smollm2/135M_qst prompts='["What is a list?","And a dict?"]'
    tune run qst_generate --config smollm2/135M_peqa_4bit prompt="What does a with block do?"

The config may also be that of the training run, of qst_finetune or of peqa_finetune; then
``side_network`` or ``scales`` is what that run wrote into its ``output_dir``.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, ListConfig
from torchtune import training, utils
from torchtune.data import Message

from qst_tune.config.check import read_config
from qst_tune.config.cli import run_recipe
from qst_tune.config.keys import key
from qst_tune.config.schema import GenerationConfig
from qst_tune.data.values import kind_of
from qst_tune.errors import UserError
from qst_tune.generation.batch import answer_batch
from qst_tune.generation.conversation import prompt_tokens
from qst_tune.generation.sampling import Sampling
from qst_tune.generation.tools import read_tool_file
from qst_tune.results.loading import TunedModel, load_tuned_model


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(GenerationConfig):
    """The keys of this recipe."""

    prompt: str | None = key("what to answer", default=None)
    prompts: ListConfig | None = key("several prompts, answered in one batch", default=None)
    tools: Path | None = key(
        "JSON file with schemas of the functions that the model may call", default=None
    )
    compare_with_base: bool = key("print the base model's answer too", default=False)


log = utils.get_logger("INFO")


def read_prompts(cfg: GenerateConfig) -> list[str]:
    """Read ``prompt``, a text, or ``prompts``, a list; UserError if there is none."""
    one, many = cfg.prompt, cfg.prompts
    if many is not None and not isinstance(many, ListConfig):
        raise UserError(f'prompts={many} is not a list: write prompts=\'["first","second"]\'')
    if one and many:
        raise UserError("prompt and prompts are both set: use one of them")
    for prompt in many or []:
        if isinstance(prompt, bool) or not isinstance(prompt, str | int | float):
            raise UserError(f"prompts has {kind_of(prompt)}: each of them must be text")
    prompts = [str(prompt) for prompt in (many or [one or ""])]
    if not all(prompt.strip() for prompt in prompts):
        raise UserError('prompt is empty: add prompt="<your question>"')
    return prompts


def encode(cfg: GenerateConfig, tuned: TunedModel, prompts: list[str]) -> list[list[int]]:
    """Return the ids of each prompt as a chat with the config's system prompt and tools."""
    tools = read_tool_file(cfg.tools, tuned.tokenizer) if cfg.tools else None
    messages = [Message(role="user", content=prompt, masked=True) for prompt in prompts]
    return [
        prompt_tokens(tuned.tokenizer, [message], system_prompt=cfg.system_prompt, tools=tools)
        for message in messages
    ]


def answer(cfg: GenerateConfig, tuned: TunedModel, encoded: list[list[int]]) -> list[list[int]]:
    """Generate the answers to all prompts in one batch; returns the ids without a stop token."""
    longest, limit = max(map(len, encoded)), tuned.model.max_seq_len
    if longest + cfg.max_new_tokens > limit:
        raise UserError(
            f"prompt ({longest} tokens) and max_new_tokens={cfg.max_new_tokens} exceed the model's "
            f"max_seq_len {limit}: shorten one of them"
        )
    return answer_batch(
        tuned.model,
        encoded,
        sampling=Sampling.of_config(cfg),
        stop_tokens=tuned.tokenizer.stop_tokens,
        max_new_tokens=cfg.max_new_tokens,
    )


def decode(cfg: GenerateConfig, tuned: TunedModel, tokens: list[int]) -> str:
    """Return an answer as text."""
    # In many templates special tokens separate a call from text.
    text: str = tuned.tokenizer.decode(tokens, skip_special_tokens=cfg.tools is None)
    return text.strip()


def main(raw: DictConfig) -> None:
    """Run the recipe."""
    cfg = read_config(raw, GenerateConfig)
    training.set_seed(seed=cfg.seed)
    prompts = read_prompts(cfg)
    tuned = load_tuned_model(cfg)
    encoded = encode(cfg, tuned, prompts)

    def print_answers(title: str) -> None:
        start = time.perf_counter()
        answers = answer(cfg, tuned, encoded)
        elapsed = time.perf_counter() - start
        for prompt, tokens in zip(prompts, answers, strict=True):
            heading = title if len(prompts) == 1 else f"{title}: {prompt}"
            print(f"\n--- {heading} ---\n{decode(cfg, tuned, tokens)}\n")
        count = sum(map(len, answers))
        log.info(f"{count} tokens in {elapsed:.1f} s, {count / elapsed:.1f} tokens/s")

    if cfg.compare_with_base or not tuned.is_tuned:
        with tuned.untuned():
            print_answers("quantised base model")
    if tuned.is_tuned:
        print_answers(tuned.title)


if __name__ == "__main__":
    run_recipe(main, GenerateConfig, __doc__)
