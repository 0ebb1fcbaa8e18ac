"""Fields of LLaMA-Factory's TrainingArguments: its own, and those of transformers 5.2 and 4.57."""

from __future__ import annotations

from raysft.config.llamafactory.keys import Key, Keys, harmless, joined, only, same
from raysft.config.llamafactory.values import (
    arguments,
    boolean,
    choice,
    mapping,
    matched,
    names,
    number,
    optimizer,
    option,
    result,
    text,
    whole,
    with_numbers,
    word,
)  # fmt: skip

_LOG = "every step is logged"
_DATA = "Ray Data feeds the workers"
_EVALUATION = "evaluations are exact over all workers, without this setting"
_DDP = "raysft launches workers through Ray Train and DeepSpeed"
_HUB = "only used with push_to_hub: true"
_FSDP = "remove it; to partition the weights, use deepspeed or train.zero_stage: 3"
_COMPILE = "remove it; torch_compile: true compiles the layers with inductor"
_PROFILER = "only used with enable_torch_profiler: true"
_BEST = "only used with load_best_model_at_end: true or early_stopping_steps"
_PRECISION = "evaluation uses the same precision as training"
_PREDICTIONS = "LLaMA-Factory uses it only for predictions during training; raysft uses the same settings during and after training"
_PUSH = (
    "remove it, and push the model afterwards with raysft export RUN_DIR --push ORG/NAME (--no-merge: only the adapter)"
)
STRATEGY = word("no", "steps", "epoch")
SCHEDULES = {
    name: name
    for name in (
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
        "cosine_with_min_lr", "warmup_stable_decay",
    )
}  # fmt: skip
SAMPLING = word("random", "sequential", "group_by_length")


def _resume(value: object) -> object:
    return value or None


OWN: Keys = {
    "overwrite_output_dir": harmless(
        "an existing run directory is resumed if the settings match, and refused otherwise; to start over, choose another "
        "run.name"
    ),
    "ray_num_workers": joined("scaling.num_workers", whole, 1),
    "ray_init_kwargs": joined("scaling.address", mapping, {}),
    "master_addr": harmless(_DDP),
    "master_port": harmless(_DDP),
    "enable_torch_profiler": only(False, "remove it: raysft does not include a profiler", boolean),
    **{
        name: harmless(_PROFILER)
        for name in (
            "profiler_output_dir", "profiler_wait_steps", "profiler_warmup_steps", "profiler_active_steps",
            "profiler_repeat", "profiler_record_shapes", "profiler_profile_memory", "profiler_with_stack",
        )
    },
    "profile_modules": only(None, "remove it: raysft does not include a profiler"),
    "fp8": joined("train.fp8", boolean, False),
    "fp8_backend": joined("train.fp8", word("auto", "torchao", "te", "msamp"), "auto"),
    "fp8_enable_fsdp_float8_all_gather": only(False, "remove it: raysft does not use FSDP", boolean),
}  # fmt: skip
TRANSFORMERS: Keys = {
    "output_dir": joined("run.name", text),
    "do_train": Key(boolean, False, path="evaluate.model", alone=False, reason="raysft run trains"),
    "do_eval": Key(boolean, False, path="data.eval", alone=False, reason="training always ends with an evaluation"),
    "do_predict": joined("generate.enabled", boolean, False),
    "per_device_train_batch_size": joined("train.global_batch_size", whole, 8),
    "gradient_accumulation_steps": joined("train.global_batch_size", whole, 1),
    "per_device_eval_batch_size": harmless(
        "evaluation uses train.micro_batch_size and prediction generate.batch_size; neither changes the results"
    ),
    "num_train_epochs": joined("train.epochs", number, 3.0),
    "max_steps": joined("train.max_steps", option(whole)),
    "learning_rate": same("train.learning_rate", number, 5e-5),
    "lr_scheduler_type": joined("train.schedule", choice(SCHEDULES), "linear"),
    "lr_scheduler_kwargs": joined("train.schedule_options", mapping, {}),
    "warmup_steps": joined("train.warmup_steps", number, 0.0),
    "warmup_ratio": joined("train.warmup_ratio", number),
    "optim": joined("train.optimizer", optimizer, "adamw"),
    "optim_args": joined("train.optimizer_options", arguments, {}),
    "optim_target_modules": joined("train.optimizer_target", matched),
    "weight_decay": same("train.weight_decay", number, 0.0),
    "adam_beta1": joined("train.betas", number, 0.9),
    "adam_beta2": joined("train.betas", number, 0.999),
    "adam_epsilon": joined("train.epsilon", number, 1e-8),
    "max_grad_norm": same("train.max_grad_norm", number, 1.0),
    "label_smoothing_factor": same("train.label_smoothing", number, 0.0),
    "neftune_noise_alpha": same(
        "train.neftune_alpha", option(number), note="scaled by the length of the example, not of its padded row"
    ),
    "average_tokens_across_devices": harmless("the loss of a step is always the mean over all of its tokens"),
    "bf16": joined("model.dtype", boolean, False),
    "fp16": joined("model.dtype", boolean, False),
    "bf16_full_eval": harmless(_PRECISION),
    "fp16_full_eval": harmless(_PRECISION),
    "tf32": harmless("float32 is computed at full precision, and other types are not affected"),
    "gradient_checkpointing": joined("train.gradient_checkpointing", boolean, False),
    "gradient_checkpointing_kwargs": harmless("recomputation is non-reentrant, with the same numbers"),
    "torch_compile": same("train.compile", boolean, False, note="compiles each layer separately"),
    "torch_compile_backend": only(None, _COMPILE),
    "torch_compile_mode": only(None, _COMPILE),
    "use_liger_kernel": joined("model.liger", boolean, False),
    "liger_kernel_config": only(None, "remove it: raysft chooses which Liger kernels to use"),
    "use_cache": harmless("training does not use a KV cache"),
    "torch_empty_cache_steps": harmless("raysft check estimates what fits into memory"),
    "auto_find_batch_size": only(
        False, "remove it: raysft check names the largest train.micro_batch_size that fits", boolean
    ),
    **{
        name: harmless(_LOG)
        for name in (
            "logging_strategy", "logging_first_step", "log_on_each_node", "log_level",
            "log_level_replica", "disable_tqdm", "logging_dir", "include_num_input_tokens_seen",
        )
    },
    "logging_steps": Key(number, 500.0, reason=_LOG),
    "logging_nan_inf_filter": harmless("a NaN or infinite loss stops the run, unless train.nonfinite is skip"),
    "report_to": joined("train.trackers", names, []),
    "run_name": joined("train.tracking.run_name", text),
    "project": joined("train.tracking.project", text),
    "trackio_space_id": Key(text, reason="only used with report_to: trackio"),
    "eval_strategy": joined("train.eval_every_steps", STRATEGY, "no"),
    "eval_steps": joined("train.eval_every_steps", number),
    "eval_delay": joined("train.eval_delay", number, 0.0),
    "eval_on_start": joined("train.eval_at_start", boolean, False),
    **{
        name: harmless(_EVALUATION)
        for name in (
            "prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps",
            "include_for_metrics", "batch_eval_metrics",
        )
    },
    "save_only_model": Key(boolean, False, reason="a checkpoint always contains everything needed to resume"),
    "save_strategy": joined("train.save_every_steps", word("no", "steps", "epoch", "best"), "steps"),
    "save_steps": joined("train.save_every_steps", number, 500.0),
    "save_total_limit": joined("train.keep_last", option(whole)),
    "save_on_each_node": harmless("workers write their parts to run.storage"),
    "enable_jit_checkpoint": harmless("a run always saves a checkpoint when it is asked to stop"),
    "push_to_hub": only(False, _PUSH, boolean),
    "hub_token": only(None, "remove it and set HF_TOKEN in the environment: configs are copied to logs and trackers"),
    **{
        name: harmless(_HUB)
        for name in ("hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision")
    },
    "load_best_model_at_end": joined("train.keep_best", boolean, False),
    "metric_for_best_model": Key(result, "eval_loss", path="train.best_metric", alone=False, reason=_BEST),
    "greater_is_better": Key(boolean, path="train.best_mode", alone=False, reason=_BEST),
    "ignore_data_skip": harmless("a resumed run finds its position in the data immediately"),
    "restore_callback_states_from_checkpoint": harmless("raysft does not use these callbacks"),
    "full_determinism": only(False, "remove it: raysft does not have this option", boolean),
    "seed": same("run.seed", whole, 42),
    "data_seed": joined("run.seed", whole),
    "use_cpu": joined("scaling.use_gpu", boolean, False),
    "accelerator_config": harmless(_DATA),
    "parallelism_config": only(None, "remove it; to split long rows across workers, use scaling.sequence_parallel"),
    "dataloader_drop_last": only(False, "remove it: raysft also trains on the last, incomplete batch of each epoch", boolean),
    **{
        name: harmless(_DATA)
        for name in (
            "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
            "dataloader_prefetch_factor", "remove_unused_columns", "label_names", "length_column_name",
        )
    },
    "train_sampling_strategy": joined("data.shuffle", SAMPLING, "random"),
    **{
        name: harmless(_DDP)
        for name in (
            "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_backend", "local_rank",
        )
    },
    "ddp_timeout": harmless("train.hang_minutes sets how long a worker may make no progress"),
    "fsdp": only([], _FSDP, lambda value: names(value) if value else []),
    "fsdp_config": only(None, _FSDP),
    "deepspeed": joined("train.zero_stage", lambda value: with_numbers(value) if isinstance(value, dict) else text(value)),
    "debug": harmless("only used for debugging"),
    "skip_memory_metrics": harmless("memory usage is always logged"),
    "resume_from_checkpoint": only(
        None, "remove it: the same command resumes from the newest checkpoint in its run directory",
        lambda value: None if value is True else _resume(value),
    ),
    "sortish_sampler": harmless("prompts are sorted by length where this helps"),
    "predict_with_generate": joined("generate.enabled", boolean, False),
    "generation_max_length": harmless(_PREDICTIONS),
    "generation_num_beams": harmless(_PREDICTIONS),
    "generation_config": only(None, "remove it, and set do_sample, temperature and the like"),
}  # fmt: skip
EARLIER: Keys = {
    "evaluation_strategy": Key(STRATEGY, path="train.eval_every_steps", alone=False),
    "group_by_length": harmless("rows of a step are drawn at random; to avoid padding, use packing: true"),
    "no_cuda": Key(boolean, False, path="scaling.use_gpu", alone=False),
    "adafactor": only(False, "write optim: adafactor", boolean),
    "per_gpu_train_batch_size": only(None, "write per_device_train_batch_size", whole),
    "per_gpu_eval_batch_size": harmless("evaluation uses train.micro_batch_size; it does not change the results"),
    "save_safetensors": harmless("weights are written as safetensors"),
    "fsdp_min_num_params": only(0, _FSDP, whole),
    "fsdp_transformer_layer_cls_to_wrap": only(None, _FSDP),
    "use_mps_device": only(False, "remove it: raysft trains on NVIDIA GPUs and CPUs", boolean),
    "torchdynamo": only(None, _COMPILE),
    "use_ipex": only(False, "remove it: raysft does not use Intel's extension for PyTorch", boolean),
    "tpu_num_cores": only(None, "remove it: raysft trains on NVIDIA GPUs and CPUs"),
    "mp_parameters": harmless("only used on SageMaker"),
    **{
        name: harmless("transformers ignores it when training language models, or only prints something")
        for name in (
            "jit_mode_eval", "fp16_opt_level", "half_precision_backend", "fp16_backend", "tpu_metrics_debug",
            "past_index", "use_legacy_prediction_loop", "include_inputs_for_metrics", "include_tokens_per_second",
            "dispatch_batches", "split_batches",
        )
    },
    **{name: harmless(_HUB) for name in ("push_to_hub_model_id", "push_to_hub_organization")},
    "push_to_hub_token": only(None, "remove it and set HF_TOKEN in the environment"),
    "ray_scope": harmless("raysft tune has its own keys"),
    # Of LLaMA-Factory before 0.9.5.
    "ray_run_name": harmless("run.name is the last component of output_dir"),
    "ray_storage_path": harmless("run.storage is the folder of output_dir"),
    "ray_storage_filesystem": harmless("the scheme of output_dir (s3://, gs://) selects the storage"),
    "placement_strategy": joined("scaling.placement", choice({"PACK": "pack", "SPREAD": "spread"}), "pack"),
    "resources_per_worker": harmless("each worker uses one GPU, unless use_cpu is true"),
}  # fmt: skip
"""Keys that LLaMA-Factory accepted with earlier versions of transformers or of itself."""
