"""Fields of LLaMA-Factory's FinetuningArguments."""

from __future__ import annotations

from raysft.config.llamafactory.keys import PREFERENCES, Key, Keys, harmless, joined, only, same
from raysft.config.llamafactory.values import boolean, names, number, option, targets, text, whole, word

_SWANLAB = "only used with use_swanlab: true"

FINETUNING: Keys = {
    "stage": joined("stage", word("pt", "sft", "rm", "ppo", "dpo", "kto"), "sft"),
    "finetuning_type": same("model.finetuning", word("lora", "oft", "freeze", "full"), "lora"),
    "pure_bf16": joined("train.pure_bf16", boolean, False),
    # Freeze.
    "freeze_trainable_layers": joined("model.freeze.layers", whole, 2),
    "freeze_trainable_modules": same("model.freeze.modules", targets, "all"),
    "freeze_extra_modules": same("model.freeze.extra_modules", names, []),
    "use_llama_pro": joined("model.freeze.spread", boolean, False),
    # LoRA and OFT.
    "additional_target": joined("model.lora.extra_modules", names, []),
    "lora_alpha": same("model.lora.alpha", option(number)),
    "lora_dropout": same("model.lora.dropout", number, 0.0),
    "lora_rank": same("model.lora.rank", whole, 8),
    "lora_target": same("model.lora.target", targets, "all"),
    "loraplus_lr_ratio": same("model.lora.loraplus_ratio", number),
    "loraplus_lr_embedding": joined("model.lora.loraplus_ratio", number, 1e-6),
    "use_rslora": same("model.lora.rslora", boolean, False),
    "use_dora": same("model.lora.dora", boolean, False),
    "pissa_init": joined("model.lora.pissa", boolean, False),
    "pissa_iter": joined("model.lora.pissa_iterations", whole, 16),
    "pissa_convert": joined("model.lora.pissa", boolean, False),
    "create_new_adapter": joined("model.new_adapter", boolean, False),
    "module_dropout": same("model.oft.dropout", number, 0.0),
    "oft_rank": only(0, "remove it, and set oft_block_size to a layer's number of inputs divided by the rank", whole),
    "oft_block_size": same("model.oft.block_size", whole, 32),
    "oft_target": same("model.oft.target", targets, "all"),
    # Preferences.
    **{
        name: harmless(PREFERENCES)
        for name in (
            "pref_beta", "pref_ftx", "pref_bco_weight", "pref_loss", "dpo_label_smoothing", "kto_chosen_weight",
            "kto_rejected_weight", "simpo_gamma", "ppo_buffer_size", "ppo_epochs", "ppo_score_norm", "ppo_target",
            "ppo_whiten_rewards", "reward_model",
            "reward_model_adapters", "reward_model_quantization_bit", "reward_model_type", "ld_alpha",
        )
    },
    "ref_model": joined("train.reference_model", text),
    "ref_model_adapters": joined("train.reference_model", names, []),
    "ref_model_quantization_bit": joined("train.reference_model", whole),
    # Optimizers.
    "use_galore": joined("train.optimizer", boolean, False),
    "galore_target": joined("train.optimizer_target", targets, "all"),
    "galore_rank": joined("train.optimizer_options", whole, 16),
    "galore_update_interval": joined("train.optimizer_options", whole, 200),
    "galore_scale": joined("train.optimizer_options", number, 2.0),
    "galore_proj_type": joined("train.optimizer_options", word("std", "reverse_std", "right", "left", "full"), "std"),
    "galore_layerwise": joined("train.optimizer", boolean, False),
    "use_apollo": joined("train.optimizer", boolean, False),
    "apollo_target": joined("train.optimizer_target", targets, "all"),
    "apollo_rank": joined("train.optimizer_options", whole, 16),
    "apollo_update_interval": joined("train.optimizer_options", whole, 200),
    "apollo_scale": joined("train.optimizer_options", number, 32.0),
    "apollo_proj": joined("train.optimizer_options", word("random", "svd"), "random"),
    "apollo_proj_type": joined("train.optimizer_options", word("std", "right", "left"), "std"),
    "apollo_scale_type": joined("train.optimizer_options", word("channel", "tensor"), "channel"),
    "apollo_layerwise": joined("train.optimizer", boolean, False),
    "apollo_scale_front": joined("train.optimizer_options", boolean, False),
    "use_badam": joined("train.optimizer", boolean, False),
    "badam_mode": joined("train.optimizer", word("layer", "ratio"), "layer"),
    "badam_start_block": joined("train.optimizer_options", whole),
    "badam_switch_mode": joined(
        "train.optimizer_options", word("ascending", "descending", "random", "fixed"), "ascending"
    ),
    "badam_switch_interval": joined("train.optimizer_options", whole, 50),
    "badam_update_ratio": harmless("only badam_mode: ratio reads it"),
    "badam_mask_mode": harmless("only badam_mode: ratio reads it"),
    "badam_verbose": harmless("only prints"),
    "use_adam_mini": joined("train.optimizer", boolean, False),
    "use_muon": joined("train.optimizer", boolean, False),
    # Losses.
    "use_dft_loss": joined("train.loss", boolean, False),
    "use_asft_loss": joined("train.loss", boolean, False),
    "asft_alpha": same("train.asft_alpha", number, 0.1),
    "use_eaft_loss": joined("train.loss", boolean, False),
    "eaft_alpha": same("train.eaft_alpha", number, 1.0),
    # Other backends.
    "use_mca": only(False, "remove it; train.zero_stage: 3 partitions large models", boolean),
    "use_hyper_parallel": only(False, "remove it; train.zero_stage: 3 partitions large models", boolean),
    "hyper_parallel_args": harmless("only used with use_hyper_parallel: true"),
    # Parts of multimodal models.
    "freeze_vision_tower": joined("model.train_parts", boolean, True),
    "freeze_multi_modal_projector": joined("model.train_parts", boolean, True),
    "freeze_language_model": joined("model.train_parts", boolean, False),
    # Watching.
    "compute_accuracy": harmless("evaluations always compute it, over tokens rather than examples"),
    "disable_shuffling": joined("data.shuffle", boolean, False),
    "early_stopping_steps": same("train.early_stopping.patience", whole),
    "plot_loss": harmless("a run always writes the plots"),
    "include_effective_tokens_per_second": harmless("train_results.json always contains effective_tokens_per_sec"),
    "use_swanlab": joined("train.trackers", boolean, False),
    "swanlab_project": joined("train.tracking.project", text, "llamafactory"),
    "swanlab_run_name": joined("train.tracking.run_name", text),
    "swanlab_workspace": Key(text, reason=_SWANLAB),
    "swanlab_mode": Key(word("cloud", "local"), "cloud", reason=_SWANLAB),
    "swanlab_logdir": harmless("SwanLab's files are in the run directory"),
    "swanlab_api_key": only(
        None, "remove it and set SWANLAB_API_KEY in the environment: configs are copied to logs and trackers"
    ),
    "swanlab_lark_webhook_url": Key(reason=_SWANLAB),
    "swanlab_lark_secret": Key(reason=_SWANLAB),
}  # fmt: skip
