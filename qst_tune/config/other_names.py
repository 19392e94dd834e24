"""Keys of transformers, PEFT, TRL, Axolotl, Unsloth and LLaMA-Factory, and what they are here."""

# What it is here -> their names.
_THEIR_NAMES = {
    "optimizer.betas=[0.9,0.999]": "adam_beta1 adam_beta2",
    "optimizer.eps=...": "adam_epsilon",
    "none: the recipe is the method (qst_finetune, peqa_finetune)": "adapter",
    "none: *_from_hf runs transformers' own model, builders by size torchtune's": "backbone",
    "checkpoint_dir=... of the configs auto/*, checkpointer.checkpoint_dir=... of others": (
        "base_model model_name model_name_or_path model_path"
    ),
    "loss.beta=...": "beta",
    "dtype=bf16": "bf16 mixed_precision",
    "model.base_quantization=nf4 or fp4": "bnb_4bit_quant_type",
    "tokenizer.chat_template=...": "chat_template",
    "tokenizer.max_seq_len=...": (
        "cutoff_len max_length max_seq_len max_seq_length model_max_length sequence_len"
    ),
    "dataset.data_files=...": "data_files data_path dataset_path train_file",
    "batch_size=..., shuffle=... and num_workers=...": "dataloader",
    "num_workers=...": "dataloader_num_workers",
    "dataset, one block or a list of them, each with data_files": "datasets",
    "backbone_sharding=full with tune run --nproc_per_node N": "deepspeed",
    "temperature=... (0 is greedy)": "do_sample",
    "early_stopping_patience=...": "early_stopping",
    "batch_size_val=...": "eval_batch_size per_device_eval_batch_size",
    "run_val_every_n_steps=...": "eval_steps",
    "dtype=fp16": "fp16",
    "enable_activation_checkpointing=True": "gradient_checkpointing",
    "none; dataset.packed=True wastes no padding": "group_by_length",
    "none: no recipe here distills a teacher": (
        "kd_loss kd_ratio teacher_checkpointer teacher_model"
    ),
    "optimizer.lr=...": "learning_rate lr",
    "model.base_quantization=nf4, which QST has by default": "load_in_4bit",
    "model.base_quantization=int8": "load_in_8bit",
    "metric_logger.log_dir=...": "logging_dir",
    "log_every_n_steps=...": "logging_steps",
    "none: a side network has model.reduction_factor=... (smaller learns more)": (
        "lora_alpha lora_r lora_rank lora_target_modules r target_modules"
    ),
    "model.dropout=... of QST": "lora_dropout",
    "lr_scheduler=torchtune.training.lr_schedulers....": "lr_scheduler_type",
    "clip_grad_norm=...": "max_grad_norm",
    "max_new_tokens=...": "max_new_token max_tokens",
    "max_steps_per_epoch=..., with epochs=1": "max_steps",
    "batch_size=...": "micro_batch_size per_device_train_batch_size train_batch_size",
    "epochs=...": "num_epochs num_train_epochs",
    "optimizer=torch.optim.AdamW or another": "optim",
    "output_dir=...": "output_path",
    "none: checkpoints of an earlier run are kept under another name": "overwrite_output_dir",
    "dataset.packed=True": "packing sample_packing",
    "tokenizer.pad_token=...": "pad_token",
    "none: the backbone is quantized as model.base_quantization=... has it": "quantizer",
    "metric_logger=torchtune.training.metric_logging.WandBLogger or another": "report_to",
    "save_every_n_steps=...": "save_steps",
    "keep_last_n_checkpoints=...": "save_total_limit",
    "dtype=...": "torch_dtype",
    "dataset.train_on_input=...": "train_on_inputs",
    "val_fraction=...": "val_set_size validation_split",
    "dataset_val with data_files, or val_fraction=0.05": "validation_file",
    "metric_logger=torchtune.training.metric_logging.WandBLogger and metric_logger.project=...": (
        "wandb_project"
    ),
    "trials.grid.KEY=[...], trials.random or trials.list (docs/trials.md)": (
        "hparam_search hyperparameter_search n_trials sweep sweep_config"
    ),
    "lr_scheduler.num_warmup_steps=... with an lr_scheduler block": "warmup_ratio warmup_steps",
    "optimizer.weight_decay=...": "weight_decay",
}
OTHER_NAMES = {name: ours for ours, names in _THEIR_NAMES.items() for name in names.split()}


def other_name_hint(name: str) -> str:
    """Return "; in qst_tune it is ..." for a key that other programs have, else nothing."""
    ours = OTHER_NAMES.get(name)
    return f"; in qst_tune it is {ours}" if ours else ""
