"""Configs as those that come with LLaMA-Factory: their kinds, keys and values."""

from __future__ import annotations

from typing import Any

MINIMAL = {"model_name_or_path": "m", "dataset": "a", "do_train": True}
LORA = {"stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"}
FULL = {"stage": "sft", "do_train": True, "finetuning_type": "full"}
DATA = {"dataset": "identity,alpaca_en_demo", "template": "qwen3_nothink", "cutoff_len": 2048, "max_samples": 1000,
        "overwrite_cache": True, "preprocessing_num_workers": 16, "dataloader_num_workers": 4}  # fmt: skip
OUTPUT = {"output_dir": "saves/m/x/sft", "logging_steps": 10, "save_steps": 500, "plot_loss": True, "report_to": "none",
          "overwrite_output_dir": True, "save_only_model": False}  # fmt: skip
STEPS = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "learning_rate": 1e-5, "bf16": True,
         "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "ddp_timeout": 180000000,
         "resume_from_checkpoint": None}  # fmt: skip
EXAMPLE = {"model_name_or_path": "m", "trust_remote_code": True, **DATA, **OUTPUT, **STEPS}
EXAMPLES: dict[str, dict[str, Any]] = {
    "lora": {**EXAMPLE, **LORA},
    "lora_pretrain": {**EXAMPLE, **LORA, "stage": "pt", "dataset": "c4"},
    "lora_ds3": {**EXAMPLE, **LORA, "deepspeed": "examples/deepspeed/ds_z3_config.json"},
    "lora_ray": {**EXAMPLE, **LORA, "ray_num_workers": 4, "output_dir": "out"},
    "full": {**EXAMPLE, **FULL, "deepspeed": "examples/deepspeed/ds_z3_config.json"},
    "qlora": {**EXAMPLE, **LORA, "quantization_bit": 4, "quantization_method": "bnb", "double_quantization": False},
    "loraplus": {**EXAMPLE, **LORA, "loraplus_lr_ratio": 16.0},
    "pissa": {**EXAMPLE, **LORA, "pissa_init": True, "pissa_iter": 16, "pissa_convert": True},
    "oft": {**EXAMPLE, "finetuning_type": "oft", "do_train": True, "oft_block_size": 32, "oft_target": "all"},
    "freeze": {**EXAMPLE, **FULL, "finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "llama_pro": {**EXAMPLE, **FULL, "finetuning_type": "freeze", "freeze_trainable_layers": 8, "freeze_trainable_modules": "all",
                  "use_llama_pro": True},
    "adam_mini": {**EXAMPLE, **FULL, "use_adam_mini": True},
    "muon": {**EXAMPLE, **FULL, "use_muon": True},
    "galore": {**EXAMPLE, **FULL, "use_galore": True, "galore_layerwise": True, "galore_target": "all",
               "galore_rank": 128, "galore_scale": 2.0, "pure_bf16": True, "bf16": False},
    "apollo": {**EXAMPLE, **FULL, "use_apollo": True, "apollo_layerwise": True, "apollo_rank": 128,
               "apollo_scale": 32.0, "apollo_scale_type": "channel", "pure_bf16": True, "bf16": False},
    "badam": {**EXAMPLE, **FULL, "use_badam": True, "badam_mode": "layer", "badam_switch_mode": "ascending",
              "badam_switch_interval": 50, "badam_verbose": 2},
    "dft": {**EXAMPLE, **FULL, "use_dft_loss": True},
    "asft": {**EXAMPLE, **FULL, "use_asft_loss": True, "asft_alpha": 0.05},
    "eaft": {**EXAMPLE, **FULL, "use_eaft_loss": True},
    "fp8": {**EXAMPLE, **FULL, "fp8": True, "fp8_backend": "torchao", "fp8_enable_fsdp_float8_all_gather": False,
            "deepspeed": "examples/deepspeed/ds_z3_fp8_config.json", "report_to": "wandb", "run_name": "fp8"},
    "vision": {**EXAMPLE, **FULL, "image_max_pixels": 262144, "freeze_vision_tower": True, "freeze_language_model": False},
    "preprocess": {"model_name_or_path": "m", **LORA, "dataset": "a", "tokenized_path": "tokens", "output_dir": "o/x"},
    "predict": {"model_name_or_path": "m", "adapter_name_or_path": "saves/m/lora/sft", "do_predict": True,
                "eval_dataset": "a,b", "predict_with_generate": True, "per_device_eval_batch_size": 1, "max_samples": 50,
                "output_dir": "saves/m/lora/predict"},
}  # fmt: skip
"""Configs such as LLaMA-Factory's examples, for those features that raysft has."""
