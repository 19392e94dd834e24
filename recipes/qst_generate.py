"""Answer a prompt with a side network, or with the quantised base model alone.

Example::

    tune run qst_generate --config smollm2/135M_qst_generate prompt="What does a with block do?"
"""

import time
from pathlib import Path

import torch
from omegaconf import DictConfig
from torchtune import training, utils
from torchtune.data import Message
from torchtune.generation import generate
from torchtune.modules.common_utils import local_kv_cache
from torchtune.modules.peft import disable_adapter

from qst_tune.errors import UserError
from qst_tune.training.cli import instantiate, run_recipe
from qst_tune.training.config_check import check_checkpoint_dir, check_config, check_numbers
from qst_tune.training.model_setup import (
    build_on_meta,
    choose_device,
    choose_dtype,
    load_frozen_backbone,
)
from qst_tune.training.side_checkpoint import load_side_network

REQUIRED_KEYS = ("model", "tokenizer", "checkpointer", "prompt", "device", "dtype")
OPTIONAL_KEYS = (
    "side_network",
    "system_prompt",
    "compare_with_base",
    "max_new_tokens",
    "temperature",
    "top_k",
    "seed",
    "output_dir",
)
NUMBERS: dict[str, tuple[type, int]] = {
    "max_new_tokens": (int, 1),
    "temperature": (float, 0),
    "top_k": (int, 1),
    "seed": (int, 0),
}

# generate() takes every token equal to pad_id for padding, and in many chat templates the padding
# token also ends the prompt's turns. One prompt needs no padding, so no token shall match.
NO_PADDING = -1

log = utils.get_logger("INFO")


class QSTGenerateRecipe:
    """Load a model once and answer one prompt.

    Args:
        cfg (DictConfig): the merged config.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.device = choose_device(cfg)
        self.dtype = choose_dtype(cfg, self.device)
        training.set_seed(seed=cfg.get("seed"))
        self.model = build_on_meta(cfg, self.dtype)
        self.tokenizer = instantiate(cfg.tokenizer, "tokenizer")
        backbone = load_frozen_backbone(self.model, cfg, dtype=self.dtype, device=self.device)
        self.model.side.materialize(self.device)
        if cfg.get("side_network"):
            load_side_network(Path(cfg.side_network), self.model.side, backbone=backbone)
        self.model.eval()

    def run(self) -> None:
        """Print the answer, and the base model's before it if ``compare_with_base``."""
        tuned = bool(self.cfg.get("side_network"))
        if self.cfg.get("compare_with_base") or not tuned:
            with disable_adapter(self.model):
                self._print_answer("quantised base model")
        if tuned:
            self._print_answer("with the side network")

    def _print_answer(self, title: str) -> None:
        start = time.perf_counter()
        tokens = self._answer()
        elapsed = time.perf_counter() - start
        text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        print(f"\n--- {title} ---\n{text}\n")
        log.info(f"{len(tokens)} tokens in {elapsed:.1f} s, {len(tokens) / elapsed:.1f} tokens/s")

    def _answer(self) -> list[int]:
        """Ids of the generated tokens, without the prompt and without a final stop token."""
        prompt = torch.tensor(self._prompt_tokens(), device=self.device)
        budget = self.cfg.get("max_new_tokens", 200)
        length = len(prompt) + budget
        if length > self.model.max_seq_len:
            raise UserError(
                f"prompt ({len(prompt)} tokens) and max_new_tokens={budget} exceed the model's "
                f"max_seq_len {self.model.max_seq_len}: shorten one of them"
            )
        with (
            self.device,
            local_kv_cache(
                self.model,
                batch_size=1,
                device=self.device,
                dtype=self.dtype,
                decoder_max_seq_len=length,
            ),
        ):
            output, _ = generate(
                self.model,
                prompt,
                max_generated_tokens=budget,
                pad_id=NO_PADDING,
                temperature=self.cfg.get("temperature", 0.0) or 1.0,
                top_k=self.cfg.get("top_k") if self.cfg.get("temperature") else 1,
                stop_tokens=self.tokenizer.stop_tokens,
            )
        answer: list[int] = output[0, len(prompt) :].tolist()
        return answer[:-1] if answer and answer[-1] in self.tokenizer.stop_tokens else answer

    def _prompt_tokens(self) -> list[int]:
        messages = [Message(role="user", content=str(self.cfg.prompt), masked=True)]
        if self.cfg.get("system_prompt"):
            messages.insert(0, Message(role="system", content=self.cfg.system_prompt, masked=True))
        # torchtune's tokenizers open the answer's turn for an empty assistant message.
        messages.append(Message(role="assistant", content=""))
        tokens: list[int] = self.tokenizer({"messages": messages}, inference=True)["tokens"]
        return tokens


def main(cfg: DictConfig) -> None:
    """Run the recipe.

    Args:
        cfg (DictConfig): the merged config.
    """
    check_config(cfg, known=[*REQUIRED_KEYS, *OPTIONAL_KEYS], required=REQUIRED_KEYS)
    check_numbers(cfg, NUMBERS)
    check_checkpoint_dir(cfg.checkpointer)
    if not str(cfg.prompt or "").strip():
        raise UserError('prompt is empty: add prompt="<your question>"')
    QSTGenerateRecipe(cfg).run()


if __name__ == "__main__":
    run_recipe(main)
