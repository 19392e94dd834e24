"""Fine-tune a language model with Quantized Side Tuning (QST), on one device or on many.

Examples::

    tune run qst_finetune --config smollm2/135M_qst
    tune run --nproc_per_node 8 qst_finetune --config llama3_1/8B_qst

The backbone is frozen in NF4 and only runs forward; a small side network trains. The config keys
are torchtune's: a LoRA config becomes a QST config by changing its ``model`` block.
"""

import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import config, training, utils
from tqdm import tqdm

from qst_tune.errors import UserError
from qst_tune.training.cli import instantiate, run_recipe
from qst_tune.training.config_check import check_checkpoint_dir, check_config, check_numbers
from qst_tune.training.data import (
    DEFAULT_COLLATE,
    build_collate,
    build_dataloader,
    build_dataset,
    check_length,
)
from qst_tune.training.distributed import (
    broadcast_tensors,
    process_group,
    rank_and_world_size,
    sum_gradients,
    sum_over_ranks,
)
from qst_tune.training.loss import build_loss, connect_loss, next_token_loss
from qst_tune.training.memory import (
    GIB,
    count_saved_activations,
    optimizer_bytes,
    parameter_bytes,
    peak_memory_bytes,
)
from qst_tune.training.model_setup import (
    build_on_meta,
    choose_device,
    choose_dtype,
    load_frozen_backbone,
)
from qst_tune.training.output_folder import output_folder
from qst_tune.training.parameter_groups import parameter_groups
from qst_tune.training.run_summary import RunSummary
from qst_tune.training.side_checkpoint import save_side_network
from qst_tune.training.validation import held_out_loss

REQUIRED_KEYS = (
    "model",
    "tokenizer",
    "checkpointer",
    "dataset",
    "batch_size",
    "optimizer",
    "loss",
    "epochs",
    "output_dir",
    "metric_logger",
    "device",
    "dtype",
)
OPTIONAL_KEYS = (
    "seed",
    "shuffle",
    "collate_fn",
    "lr_scheduler",
    "max_steps_per_epoch",
    "gradient_accumulation_steps",
    "clip_grad_norm",
    "compile",
    "dataset_val",
    "batch_size_val",
    "run_val_every_n_steps",
    "log_every_n_steps",
    "log_peak_memory_stats",
    "enable_activation_checkpointing",
    "enable_activation_offloading",
    "profiler",
    "resume_from_checkpoint",
    "save_adapter_weights_only",
    "cudnn_deterministic_mode",
    "low_cpu_ram",
)
# Kind and least value; null, where a key is optional, is always allowed.
NUMBERS: dict[str, tuple[type, int]] = {
    "batch_size": (int, 1),
    "batch_size_val": (int, 1),
    "epochs": (int, 1),
    "max_steps_per_epoch": (int, 1),
    "gradient_accumulation_steps": (int, 1),
    "run_val_every_n_steps": (int, 1),
    "log_every_n_steps": (int, 1),
    "seed": (int, 0),
    "clip_grad_norm": (float, 0),
}

log = utils.get_logger("INFO")


class QSTFinetuneRecipe:
    """One training run: ``setup`` builds everything, ``train`` runs, the side network is saved.

    Args:
        cfg (DictConfig): the merged config.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.device = choose_device(cfg)
        self.dtype = choose_dtype(cfg, self.device)
        self.output_dir = Path(cfg.output_dir)
        self.accumulation = cfg.get("gradient_accumulation_steps") or 1
        self.global_step = 0
        self.num_tokens = 0
        self.step_seconds = 0.0

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes."""
        return rank_and_world_size()[0] == 0

    def setup(self) -> None:
        """Build data, model, optimizer and loggers; what can fail cheaply comes first."""
        cfg = self.cfg
        self.seed = training.set_seed(
            seed=cfg.get("seed"), debug_mode=cfg.get("cudnn_deterministic_mode")
        )
        self.tokenizer = instantiate(cfg.tokenizer, "tokenizer")
        self.loss = build_loss(cfg.loss)
        self.model = build_on_meta(cfg, self.dtype)
        self._setup_data()
        self._setup_model()
        self._setup_optimizer()
        if self.is_main:
            self.metric_logger = instantiate(cfg.metric_logger, "metric_logger")
            self.metric_logger.log_config(cfg)
        self.profiler, _ = config.instantiate(
            cfg.get("profiler")
            or OmegaConf.create(
                {"_component_": "torchtune.training.setup_torch_profiler", "enabled": False}
            )
        )

    def _setup_data(self) -> None:
        cfg = self.cfg
        dataset = build_dataset(cfg.dataset, "dataset", self.tokenizer)
        self.batches = self._dataloader(dataset, cfg.batch_size, shuffle=cfg.get("shuffle", True))
        self.steps_per_epoch = len(self.batches) // self.accumulation
        if cfg.get("max_steps_per_epoch"):
            self.steps_per_epoch = min(self.steps_per_epoch, cfg.max_steps_per_epoch)
        if self.steps_per_epoch == 0:
            raise UserError(
                f"dataset: {len(dataset)} rows do not fill one step of batch_size={cfg.batch_size} "
                f"x gradient_accumulation_steps={self.accumulation}: lower one of them"
            )
        self.held_out = None
        if cfg.get("dataset_val"):
            held_out = build_dataset(cfg.dataset_val, "dataset_val", self.tokenizer)
            batch_size = cfg.get("batch_size_val") or cfg.batch_size
            self.held_out = self._dataloader(held_out, batch_size, shuffle=False, drop_last=False)

    def _dataloader(
        self, dataset: Any, batch_size: int, *, shuffle: bool, drop_last: bool = True
    ) -> Any:
        collate = build_collate(
            self.tokenizer,
            ignore_index=self.loss.ignore_index,
            max_seq_len=self.model.max_seq_len,
            component=self.cfg.get("collate_fn", DEFAULT_COLLATE),
        )
        return build_dataloader(
            dataset,
            collate,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=self.seed,
            drop_last=drop_last,
        )

    def _setup_model(self) -> None:
        cfg = self.cfg
        max_seq_len = getattr(self.tokenizer, "max_seq_len", None)
        if max_seq_len and max_seq_len > self.model.max_seq_len:
            raise UserError(
                f"tokenizer.max_seq_len={max_seq_len} is longer than the model's max_seq_len "
                f"{self.model.max_seq_len}: lower it"
            )
        self.backbone_id = load_frozen_backbone(
            self.model, cfg, dtype=self.dtype, device=self.device
        )
        self.model.side.materialize(self.device)
        broadcast_tensors(self.model.side)
        self.model.side.recompute = cfg.get("enable_activation_checkpointing", False)
        if cfg.get("compile"):
            for module in [*self.model.layers, *self.model.side.blocks]:
                module.compile()
        connect_loss(self.loss, self.model)

    def _setup_optimizer(self) -> None:
        cfg = self.cfg
        self.trained = list(self.model.side.parameters())
        self.optimizer = instantiate(cfg.optimizer, "optimizer", parameter_groups(self.model.side))
        self.lr_scheduler = None
        if cfg.get("lr_scheduler"):
            self.lr_scheduler = instantiate(
                cfg.lr_scheduler,
                "lr_scheduler",
                self.optimizer,
                num_training_steps=cfg.epochs * self.steps_per_epoch,
                last_epoch=-1,
            )

    def train(self) -> None:
        """Run all epochs; validate on the way and save the side network after each epoch."""
        cfg = self.cfg
        self.model.train()
        self.summary = RunSummary(trainable_parameters=sum(p.numel() for p in self.trained))
        start = time.perf_counter()
        self._validate()
        num_steps = cfg.epochs * self.steps_per_epoch
        progress = tqdm(total=num_steps, desc="qst_finetune", disable=not self.is_main)
        with self.profiler as profiler, progress:
            for epoch in range(cfg.epochs):
                self.batches.sampler.set_epoch(epoch)
                batches = iter(self.batches)
                for _ in range(self.steps_per_epoch):
                    self._train_step(batches, progress)
                    profiler.step()
                    self._validate_if_due(num_steps)
                self._save()
        self.summary.seconds = time.perf_counter() - start
        self._report()

    def _train_step(self, batches: Any, progress: Any) -> None:
        """One optimizer step over ``gradient_accumulation_steps`` batches."""
        start = time.perf_counter()
        total = torch.zeros(2, device=self.device, dtype=torch.float32)
        num_tokens = 0
        for _ in range(self.accumulation):
            batch = next(batches)
            num_tokens += batch["tokens"].numel()
            total += self._forward_backward(batch)
        loss_sum, num_labels = sum_over_ranks(total)
        sum_gradients(self.trained)
        # Every label weighs the same, however labels are spread over batches and devices.
        training.scale_grads(self.model.side, 1 / num_labels.clamp(min=1))
        metrics = self._optimizer_step()
        self.global_step += 1
        metrics["loss"] = (loss_sum / num_labels.clamp(min=1)).item()
        elapsed = time.perf_counter() - start
        metrics["tokens_per_second_per_gpu"] = num_tokens / elapsed
        self.num_tokens += num_tokens
        self.step_seconds += elapsed
        self.summary.train_loss[self.global_step] = metrics["loss"]
        self._log(metrics, progress)

    def _forward_backward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Add one batch's gradients; returns the sum of its losses and its number of labels."""
        check_length(batch["tokens"], self.model.max_seq_len)
        utils.batch_to_device(batch, self.device)
        if self.global_step == 0:
            with count_saved_activations(self.model) as kept:
                loss, num_labels = next_token_loss(self.model, self.loss, batch)
            self.activation_bytes = kept.num_bytes
        else:
            loss, num_labels = next_token_loss(self.model, self.loss, batch)
        loss_sum = loss * num_labels
        loss_sum.backward()
        return torch.stack([loss_sum.detach(), num_labels.to(loss_sum.dtype)])

    def _optimizer_step(self) -> dict[str, float]:
        metrics = {"lr": self.optimizer.param_groups[0]["lr"]}
        if self.cfg.get("clip_grad_norm") is not None:
            norm = torch.nn.utils.clip_grad_norm_(
                self.trained, max_norm=float(self.cfg.clip_grad_norm)
            )
            metrics["grad_norm"] = norm.item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        return metrics

    def _log(self, metrics: dict[str, float], progress: Any) -> None:
        if not self.is_main:
            return
        if self.cfg.get("log_peak_memory_stats"):
            metrics["peak_memory_gib"] = peak_memory_bytes(self.device) / GIB
        progress.set_postfix(
            loss=f"{metrics['loss']:.3f}",
            tokens_per_s=f"{metrics['tokens_per_second_per_gpu']:.0f}",
            mem=f"{peak_memory_bytes(self.device) / GIB:.2f}GiB",
            refresh=False,
        )
        progress.update(1)
        if self.global_step % self.cfg.get("log_every_n_steps", 1) == 0:
            self.metric_logger.log_dict(metrics, step=self.global_step)

    def _validate_if_due(self, num_steps: int) -> None:
        every = self.cfg.get("run_val_every_n_steps")
        if self.global_step == num_steps or (every and self.global_step % every == 0):
            self._validate()

    def _validate(self) -> None:
        if self.held_out is None:
            return
        loss = held_out_loss(self.model, self.loss, self.held_out, self.device)
        self.summary.held_out_loss[self.global_step] = loss
        if self.is_main:
            self.metric_logger.log("val_loss", loss, step=self.global_step)
            what = "quantised base model" if self.global_step == 0 else f"step {self.global_step}"
            tqdm.write(f"held-out loss, {what}: {loss:.4f}")

    def _save(self) -> None:
        if not self.is_main:
            return
        folder = self.output_dir / "side_network"
        save_side_network(
            folder,
            self.model.side,
            backbone=self.backbone_id,
            model_block=_plain(self.cfg.model),
            recipe_config=OmegaConf.to_yaml(self.cfg, resolve=True),
            results={
                f"held-out loss at step {k}": v for k, v in self.summary.held_out_loss.items()
            },
        )
        size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
        tqdm.write(f"side network saved to {folder} ({size:.1f} MB)")

    def _report(self) -> None:
        side = parameter_bytes(self.model.side)
        parts = {
            "peak": peak_memory_bytes(self.device),
            "frozen weights": parameter_bytes(self.model) - side,
            "trainable": side,
            "optimizer": optimizer_bytes(self.optimizer),
            "activations kept": self.activation_bytes,
        }
        self.summary.memory_gib = {name: size / GIB for name, size in parts.items()}
        self.summary.tokens_per_second = self.num_tokens / self.step_seconds
        if self.is_main:
            self.summary.write(self.output_dir)
            sizes = ", ".join(f"{k} {v:.3f}" for k, v in self.summary.memory_gib.items())
            log.info(f"memory, GiB: {sizes}")
            log.info(f"{self.summary.tokens_per_second:.0f} tokens/s; {self.output_dir}/loss.png")

    def cleanup(self) -> None:
        """Close what writes."""
        if self.is_main and hasattr(self, "metric_logger"):
            self.metric_logger.close()


def _plain(block: DictConfig) -> dict[str, Any]:
    resolved: Any = OmegaConf.to_container(block, resolve=True)
    return dict(resolved)


def _check_switches(cfg: DictConfig) -> None:
    if cfg.get("resume_from_checkpoint"):
        raise UserError("resume_from_checkpoint=True: this recipe cannot resume; set it to False")
    if cfg.get("enable_activation_offloading"):
        raise UserError(
            "enable_activation_offloading=True has nothing to offload, since QST keeps no "
            "activation of the backbone; set it to False"
        )


def main(cfg: DictConfig) -> None:
    """Run the recipe.

    Args:
        cfg (DictConfig): the merged config.
    """
    check_config(cfg, known=[*REQUIRED_KEYS, *OPTIONAL_KEYS], required=REQUIRED_KEYS)
    check_numbers(cfg, NUMBERS)
    _check_switches(cfg)
    check_checkpoint_dir(cfg.checkpointer)
    recipe = QSTFinetuneRecipe(cfg)
    with output_folder(recipe.output_dir), process_group(recipe.device):
        try:
            recipe.setup()
            recipe.train()
        finally:
            recipe.cleanup()


if __name__ == "__main__":
    run_recipe(main)
