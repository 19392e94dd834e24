"""Answer prompts with a tuned model, or with the quantised base model alone.

Examples::

    tune run qst_generate --config smollm2/135M_qst_generate prompt="What does a with block do?"
    tune run qst_generate --config smollm2/135M_qst prompts='["What is a list?","And a dict?"]'
    tune run qst_generate --config smollm2/135M_peqa_4bit prompt="What does a with block do?"

The config may also be that of the training run, of qst_finetune or of peqa_finetune; then
``side_network`` or ``scales`` is what that run wrote into its ``output_dir``.
"""

import time
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig
from torchtune import training, utils
from torchtune.data import Message, left_pad_sequence
from torchtune.generation import generate
from torchtune.modules.common_utils import local_kv_cache

from qst_tune.errors import UserError
from qst_tune.generation.conversation import prompt_tokens
from qst_tune.training.cli import run_recipe
from qst_tune.training.config_check import check_config, check_numbers
from qst_tune.training.tuned_model import MODEL_OPTIONAL, MODEL_REQUIRED, load_tuned_model

REQUIRED_KEYS = MODEL_REQUIRED
OPTIONAL_KEYS = (
    "prompt",
    "prompts",
    "system_prompt",
    "compare_with_base",
    "max_new_tokens",
    "temperature",
    "top_k",
    *MODEL_OPTIONAL,
)
NUMBERS: dict[str, tuple[type, int]] = {
    "max_new_tokens": (int, 1),
    "temperature": (float, 0),
    "top_k": (int, 1),
    "seed": (int, 0),
}

log = utils.get_logger("INFO")


class QSTGenerateRecipe:
    """Load a model once and answer a batch of prompts.

    Args:
        cfg (DictConfig): the merged config.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        training.set_seed(seed=cfg.get("seed"))
        self.prompts = read_prompts(cfg)
        self.tuned = load_tuned_model(cfg)
        self.model, self.tokenizer = self.tuned.model, self.tuned.tokenizer

    def run(self) -> None:
        """Print the answers, and the base model's before them if ``compare_with_base``."""
        if self.cfg.get("compare_with_base") or not self.tuned.is_tuned:
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
            print(f"\n--- {heading} ---\n{self.tokenizer.decode(tokens).strip()}\n")
        count = sum(map(len, answers))
        log.info(f"{count} tokens in {elapsed:.1f} s, {count / elapsed:.1f} tokens/s")

    def answer(self) -> list[list[int]]:
        """Generate, all prompts in one batch.

        Returns:
            list[list[int]]: for each prompt the ids that were generated, without a stop token.
        """
        encoded = [self._encode(prompt) for prompt in self.prompts]
        # generate() takes every token equal to pad_id for padding, and in many chat templates the
        # tokenizer's padding token also ends the turns of a prompt.
        used = set().union(*encoded)
        pad_id = next(token for token in range(len(used) + 1) if token not in used)
        device = self.model.tok_embeddings.weight.device
        prompts = left_pad_sequence(
            [torch.tensor(tokens, device=device) for tokens in encoded],
            batch_first=True,
            padding_value=pad_id,
        )
        output = self._generate(prompts, pad_id=pad_id)
        return [_until_stop(row, self.tokenizer.stop_tokens) for row in output.tolist()]

    def _encode(self, prompt: str) -> list[int]:
        message = Message(role="user", content=prompt, masked=True)
        system_prompt = self.cfg.get("system_prompt")
        return prompt_tokens(self.tokenizer, [message], system_prompt=system_prompt)

    def _generate(self, prompts: torch.Tensor, *, pad_id: int) -> torch.Tensor:
        """The generated tokens ``[B, T]``; whatever follows a row's first stop token is no text."""
        budget = self.cfg.get("max_new_tokens", 200)
        batch_size, longest = prompts.shape
        if longest + budget > self.model.max_seq_len:
            raise UserError(
                f"prompt ({longest} tokens) and max_new_tokens={budget} exceed the model's "
                f"max_seq_len {self.model.max_seq_len}: shorten one of them"
            )
        dtype = self.model.tok_embeddings.weight.dtype
        with (
            prompts.device,
            local_kv_cache(
                self.model,
                batch_size=batch_size,
                device=prompts.device,
                dtype=dtype,
                decoder_max_seq_len=longest + budget,
            ),
        ):
            output, _ = generate(
                self.model,
                prompts,
                max_generated_tokens=budget,
                pad_id=pad_id,
                temperature=self.cfg.get("temperature", 0.0) or 1.0,
                top_k=self.cfg.get("top_k") if self.cfg.get("temperature") else 1,
                stop_tokens=self.tokenizer.stop_tokens,
            )
        generated: torch.Tensor = output[:, longest:]
        return generated


def read_prompts(cfg: DictConfig) -> list[str]:
    """Read the prompts of a config.

    Args:
        cfg (DictConfig): has ``prompt``, a text, or ``prompts``, a list of them.

    Returns:
        list[str]: at least one.

    Raises:
        UserError: if there is none, an empty one, or both keys are used.
    """
    one: Any = cfg.get("prompt")
    many: Any = cfg.get("prompts")
    if many is not None and not isinstance(many, ListConfig):
        raise UserError(f'prompts={many} is not a list: write prompts=\'["first","second"]\'')
    if one and many:
        raise UserError("prompt and prompts are both set: use one of them")
    prompts = [str(prompt) for prompt in (many or [one or ""])]
    if not all(prompt.strip() for prompt in prompts):
        raise UserError('prompt is empty: add prompt="<your question>"')
    return prompts


def _until_stop(tokens: list[int], stop_tokens: list[int]) -> list[int]:
    ends = (index for index, token in enumerate(tokens) if token in stop_tokens)
    return tokens[: next(ends, len(tokens))]


def main(cfg: DictConfig) -> None:
    """Run the recipe.

    Args:
        cfg (DictConfig): the merged config.
    """
    check_config(cfg, known=[*REQUIRED_KEYS, *OPTIONAL_KEYS], required=REQUIRED_KEYS)
    check_numbers(cfg, NUMBERS)
    QSTGenerateRecipe(cfg).run()


if __name__ == "__main__":
    run_recipe(main)
