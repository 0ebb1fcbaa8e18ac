"""Fields of LLaMA-Factory's ModelArguments."""

from __future__ import annotations

from raysft.config.llamafactory.keys import VIDEOS, Key, Keys, harmless, joined, only, same
from raysft.config.llamafactory.values import boolean, choice, names, positive, text, weight, whole, word

_EXPORT = "raysft export writes the trained model"
_VLLM = "raysft's vLLM engine derives its sizes from the model and the prompts"
_SGLANG = "only used with infer_backend: sglang"
_LORA_EXPERTS = "only used with kt_use_lora_experts"
_TOKEN = "remove it and set {} in the environment: configs are copied to logs and trackers"
ATTENTION = {"auto": "auto", "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2"}

MODEL: Keys = {
    "model_name_or_path": joined("model.path", text),
    "adapter_name_or_path": joined("model.adapters", names, []),
    "adapter_folder": joined("model.adapters", text),
    "cache_dir": harmless("downloads go to HF_HUB_CACHE, set in the environment"),
    "use_fast_tokenizer": only(True, "remove it: raysft only supports fast tokenizers", boolean),
    "resize_vocab": harmless("the embeddings are resized whenever new tokens require it"),
    "split_special_tokens": joined("data.control_tokens_in_text", boolean, False),
    "add_tokens": joined("model.new_tokens.plain", names, []),
    "add_special_tokens": joined("model.new_tokens.special", names, []),
    "new_special_tokens_config": joined("model.new_tokens.descriptions", text),
    "init_special_tokens": joined("model.new_tokens.noise", word("noise_init", "desc_init", "desc_init_w_noise"), "noise_init"),
    "model_revision": joined("model.revision", text, "main"),
    "low_cpu_mem_usage": harmless("models load without a second copy in memory"),
    "rope_scaling": same(
        "model.rope_scaling",
        word("linear", "dynamic", "yarn", "llama3"),
        note="same factor; with dynamic, every example longer than the model's original context length is scaled, not only "
        "those longer than the extended one",
    ),
    "flash_attn": same("model.attention", choice(ATTENTION), "auto"),
    "shift_attn": only(False, "remove it: raysft does not support shifted sparse attention", boolean),
    "mixture_of_depths": only(None, "remove it: raysft does not support mixture of depths"),
    "use_unsloth": only(False, "remove it; for fused kernels, use enable_liger_kernel: true", boolean),
    "use_unsloth_gc": joined("train.offload.activations", boolean, False),
    "enable_liger_kernel": joined("model.liger", boolean, False),
    "moe_aux_loss_coef": same(
        "train.router_aux_loss_coef", weight, note="computed over the tokens of each example, not over a padded microbatch"
    ),
    "disable_gradient_checkpointing": joined("train.gradient_checkpointing", boolean, False),
    "use_reentrant_gc": harmless("gradient checkpointing is non-reentrant, with identical results"),
    "upcast_layernorm": only(
        False, "remove it: norms are computed in float32, and trained norms have float32 copies", boolean
    ),
    "upcast_lmhead_output": harmless("the loss is always computed in float32"),
    "train_from_scratch": only(
        False, "remove it, and point model_name_or_path to a folder with randomly initialized weights", boolean
    ),
    "infer_backend": same("generate.engine", choice({"huggingface": "transformers", "vllm": "vllm"}), "transformers"),
    "offload_folder": harmless("generation offloads nothing to disk"),
    "use_kv_cache": harmless("generation always uses a KV cache"),
    "use_v1_kernels": only(False, "remove it; for fused kernels, use enable_liger_kernel: true", boolean),
    "infer_dtype": joined("model.dtype", word("auto", "float16", "bfloat16", "float32"), "auto"),
    "hf_hub_token": only(None, _TOKEN.format("HF_TOKEN")),
    "ms_hub_token": only(None, _TOKEN.format("MODELSCOPE_API_TOKEN")),
    "om_hub_token": only(None, "remove it: raysft does not support the Modelers hub"),
    "print_param_status": harmless("only prints"),
    "trust_remote_code": joined("model.trust_remote_code", boolean, False),
    # Quantization.
    "quantization_method": joined("model.quantization", word("bnb", "hqq", "eetq"), "bnb"),
    "quantization_bit": joined("model.quantization", whole),
    "quantization_type": same("model.quantization_type", word("nf4", "fp4"), "nf4"),
    "double_quantization": same("model.double_quantization", boolean, True),
    "quantization_device_map": only(None, "remove it; to split a model across GPUs, use generate.gpus_per_engine"),
    # Images, videos, audio.
    "image_max_pixels": same("data.image_max_pixels", positive, 768 * 768),
    "image_min_pixels": same("data.image_min_pixels", positive, 32 * 32),
    "image_do_pan_and_scan": only(False, "remove it: raysft leaves it to the model's processor", boolean),
    "crop_to_patches": only(False, "remove it: raysft leaves it to the model's processor", boolean),
    **{
        name: harmless(VIDEOS)
        for name in (
            "video_max_pixels", "video_min_pixels", "video_fps", "video_maxlen", "use_audio_in_video",
            "audio_sampling_rate",
        )
    },
    # Export.
    "export_dir": joined("raysft export", text),
    "export_size": Key(positive, 5, reason=_EXPORT),
    "export_device": harmless("raysft export does not need a GPU"),
    "export_quantization_bit": only(None, "remove it: raysft export does not quantize", whole),
    "export_quantization_dataset": harmless("only export_quantization_bit reads it"),
    "export_quantization_nsamples": harmless("only export_quantization_bit reads it"),
    "export_quantization_maxlen": harmless("only export_quantization_bit reads it"),
    "export_legacy_format": harmless("weights are written as safetensors"),
    "export_hub_model_id": only(None, "remove it, and push the model with raysft export RUN_DIR --push ORG/NAME", text),
    # Engines.
    **{name: harmless(_VLLM) for name in ("vllm_maxlen", "vllm_gpu_util", "vllm_enforce_eager", "vllm_max_lora_rank")},
    "vllm_config": only(None, "remove it: raysft's vLLM engine has no further options"),
    **{
        name: harmless(_SGLANG)
        for name in (
            "sglang_maxlen", "sglang_mem_fraction", "sglang_tp_size", "sglang_config", "sglang_lora_backend",
        )
    },
    "use_kt": joined("model.experts", boolean, False),
    "kt_weight_path": joined("model.experts", text),
    "kt_expert_checkpoint_path": joined("model.experts", text),
    "kt_use_lora_experts": joined("model.experts", boolean, False),
    **{name: harmless(_LORA_EXPERTS) for name in ("kt_lora_expert_num", "kt_lora_expert_intermediate_size")},
}  # fmt: skip
