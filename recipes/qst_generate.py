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
from qst_tune.results.loading import load_tuned_model


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


class QSTGenerateRecipe:
    """Load a model once and answer a batch of prompts."""

    def __init__(self, cfg: GenerateConfig) -> None:
        self.cfg = cfg
        training.set_seed(seed=cfg.seed)
        self.prompts = read_prompts(cfg)
        self.tuned = load_tuned_model(cfg)
        self.model, self.tokenizer = self.tuned.model, self.tuned.tokenizer
        self.tools = read_tool_file(cfg.tools, self.tokenizer) if cfg.tools else None

    def run(self) -> None:
        """Print the answers, and the base model's before them if ``compare_with_base``."""
        if self.cfg.compare_with_base or not self.tuned.is_tuned:
            with self.tuned.untuned():
                self._print_answers("quantised base model")
        if self.tuned.is_tuned:
            self._print_answers(self.tuned.title)

    def _print_answers(self, title: str) -> None:
        start = time.perf_counter()
        answers = self.answer()
        elapsed = time.perf_counter() - start
        for prompt, tokens in zip(self.prompts, answers, strict=True):
            heading = title if len(self.prompts) == 1 else f"{title}: {prompt}"
            print(f"\n--- {heading} ---\n{self._text(tokens).strip()}\n")
        count = sum(map(len, answers))
        log.info(f"{count} tokens in {elapsed:.1f} s, {count / elapsed:.1f} tokens/s")

    def answer(self) -> list[list[int]]:
        """Generate all prompts in one batch; returns the ids without a stop token."""
        encoded = [self._encode(prompt) for prompt in self.prompts]
        budget = self.cfg.max_new_tokens
        longest = max(map(len, encoded))
        if longest + budget > self.model.max_seq_len:
            raise UserError(
                f"prompt ({longest} tokens) and max_new_tokens={budget} exceed the model's "
                f"max_seq_len {self.model.max_seq_len}: shorten one of them"
            )
        return answer_batch(
            self.model,
            encoded,
            sampling=Sampling.of_config(self.cfg),
            stop_tokens=self.tokenizer.stop_tokens,
            max_new_tokens=budget,
        )

    def _encode(self, prompt: str) -> list[int]:
        message = Message(role="user", content=prompt, masked=True)
        system_prompt = self.cfg.system_prompt
        return prompt_tokens(
            self.tokenizer, [message], system_prompt=system_prompt, tools=self.tools
        )

    def _text(self, tokens: list[int]) -> str:
        # In many templates special tokens separate a call from text.
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=self.tools is None)
        return text


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


def main(raw: DictConfig) -> None:
    """Run the recipe."""
    QSTGenerateRecipe(read_config(raw, GenerateConfig)).run()


if __name__ == "__main__":
    run_recipe(main, GenerateConfig, __doc__)
