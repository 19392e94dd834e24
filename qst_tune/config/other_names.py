"""Keys of transformers, PEFT, TRL, Axolotl, Unsloth and LLaMA-Factory, and what they are here."""

_RATE = "optimizer.lr=..."
_WARMUP = "lr_scheduler.num_warmup_steps=... with an lr_scheduler block"
_BATCH = "batch_size=..."
_LENGTH = "tokenizer.max_seq_len=..."
_DATA = "dataset.data_files=..."
_MODEL = "checkpoint_dir=... of the configs auto/*, checkpointer.checkpoint_dir=... of others"
_NO_LORA = "none: a side network has model.reduction_factor=... (smaller learns more)"
_NF4 = "model.base_quantization=nf4, which QST has by default"
_STEPS = "max_steps_per_epoch=..., with epochs=1"
_CLIP = "clip_grad_norm=..."
_ACCUMULATION = "gradient_accumulation_steps=..."
_SAVE = "save_every_n_steps=..."
_SAMPLES = "max_new_tokens=..."
_NO_DISTILLATION = "none: no recipe here distills a teacher"

OTHER_NAMES: dict[str, str] = {
    "adam_beta1": "optimizer.betas=[0.9,0.999]",
    "adam_beta2": "optimizer.betas=[0.9,0.999]",
    "adam_epsilon": "optimizer.eps=...",
    "adapter": "none: the recipe is the method (qst_finetune, peqa_finetune)",
    "backbone": "none: *_from_hf runs transformers' own model, builders by size torchtune's",
    "base_model": _MODEL,
    "beta": "loss.beta=...",
    "bf16": "dtype=bf16",
    "bnb_4bit_quant_type": "model.base_quantization=nf4 or fp4",
    "chat_template": "tokenizer.chat_template=...",
    "cutoff_len": _LENGTH,
    "data_files": _DATA,
    "data_path": _DATA,
    "dataloader_num_workers": "num_workers=...",
    "dataset_path": _DATA,
    "dataloader": "batch_size=..., shuffle=... and num_workers=...",
    "datasets": "dataset, one block or a list of them, each with data_files",
    "deepspeed": "backbone_sharding=full with tune run --nproc_per_node N",
    "do_sample": "temperature=... (0 is greedy)",
    "early_stopping": "early_stopping_patience=...",
    "eval_batch_size": "batch_size_val=...",
    "eval_steps": "run_val_every_n_steps=...",
    "fp16": "dtype=fp16",
    "gradient_checkpointing": "enable_activation_checkpointing=True",
    "group_by_length": "none; dataset.packed=True wastes no padding",
    "kd_loss": _NO_DISTILLATION,
    "kd_ratio": _NO_DISTILLATION,
    "learning_rate": _RATE,
    "load_in_4bit": _NF4,
    "load_in_8bit": "model.base_quantization=int8",
    "logging_dir": "metric_logger.log_dir=...",
    "logging_steps": "log_every_n_steps=...",
    "lora_alpha": _NO_LORA,
    "lora_dropout": "model.dropout=... of QST",
    "lora_r": _NO_LORA,
    "lora_rank": _NO_LORA,
    "lora_target_modules": _NO_LORA,
    "lr": _RATE,
    "lr_scheduler_type": "lr_scheduler=torchtune.training.lr_schedulers....",
    "max_grad_norm": _CLIP,
    "max_length": _LENGTH,
    "max_new_token": _SAMPLES,
    "max_seq_len": _LENGTH,
    "max_seq_length": _LENGTH,
    "max_steps": _STEPS,
    "max_tokens": _SAMPLES,
    "micro_batch_size": _BATCH,
    "model_max_length": _LENGTH,
    "model_name": _MODEL,
    "model_name_or_path": _MODEL,
    "model_path": _MODEL,
    "mixed_precision": "dtype=bf16",
    "num_epochs": "epochs=...",
    "num_train_epochs": "epochs=...",
    "optim": "optimizer=torch.optim.AdamW or another",
    "output_path": "output_dir=...",
    "overwrite_output_dir": "none: checkpoints of an earlier run are kept under another name",
    "packing": "dataset.packed=True",
    "pad_token": "tokenizer.pad_token=...",
    "per_device_eval_batch_size": "batch_size_val=...",
    "per_device_train_batch_size": _BATCH,
    "quantizer": "none: the backbone is quantized as model.base_quantization=... has it",
    "r": _NO_LORA,
    "report_to": "metric_logger=torchtune.training.metric_logging.WandBLogger or another",
    "sample_packing": "dataset.packed=True",
    "save_steps": _SAVE,
    "save_total_limit": "keep_last_n_checkpoints=...",
    "sequence_len": _LENGTH,
    "target_modules": _NO_LORA,
    "teacher_checkpointer": _NO_DISTILLATION,
    "teacher_model": _NO_DISTILLATION,
    "torch_dtype": "dtype=...",
    "train_batch_size": _BATCH,
    "train_file": _DATA,
    "train_on_inputs": "dataset.train_on_input=...",
    "val_set_size": "val_fraction=...",
    "validation_file": "dataset_val with data_files, or val_fraction=0.05",
    "validation_split": "val_fraction=...",
    "wandb_project": "metric_logger=torchtune.training.metric_logging.WandBLogger and "
    "metric_logger.project=...",
    "warmup_ratio": _WARMUP,
    "warmup_steps": _WARMUP,
    "weight_decay": "optimizer.weight_decay=...",
}


def other_name_hint(name: str) -> str:
    """Return "; in qst_tune it is ..." for a key that other programs have, else nothing."""
    ours = OTHER_NAMES.get(name)
    return f"; in qst_tune it is {ours}" if ours else ""
