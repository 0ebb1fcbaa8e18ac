"""Tiny models for text and images, of random weights, with the tokenizer of ``tiny.py`` and a processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny import tiny_tokenizer

TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "initializer_range": 0.1, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
QWEN_TEXT = {**TEXT, "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]}}
QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 14,
}


QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATE = """\
{%% for message in messages %%}<|im_start|>{{ message.role }}
{%% if message.content is string %%}{{ message.content }}{%% else %%}{%% for part in message.content %%}\
{%% if part.type == "image" %%}%s{%% else %%}{{ part.text }}{%% endif %%}{%% endfor %%}{%% endif %%}<|im_end|>
{%% endfor %%}{%% if add_generation_prompt %%}<|im_start|>assistant
{%% endif %%}"""
"""ChatML; ``%%s`` is what it writes for an image."""
FAMILIES = ("llava", "llava-siglip", "idefics3", "qwen2-vl", "qwen2.5-vl", "qwen3-vl")
TILED = ("llava-next", "llava-onevision", "internvl", "aya-vision", "smolvlm")
"""Families that divide an image into tiles, LLaVA-OneVision only one that is alone in its conversation. SmolVLM has Idefics3's
processor: its own needs ``num2words``."""
GRIDS: list[list[int]] = [[28, 56], [56, 28], [56, 56]]


def tiny_vision_model(folder: Path, family: str, seed: int = 0) -> Path:
    """Save a random model of a family with its processor: an image has 4 tokens or, with Qwen, one for each 28 × 28 pixels."""
    from transformers import AutoModelForImageTextToText

    processor = tiny_processor(family)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(_config(family, processor))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def tiny_processor(family: str) -> Any:
    """A processor of the family's class."""
    import transformers as hf

    from raysft.models.processor import _without_videos

    if family in TILED and family != "smolvlm":
        return _tiled_processor(family)
    tokenizer = tiny_tokenizer()
    image = QWEN_IMAGE if family.startswith("qwen") else "<image>"
    options: dict[str, Any] = {"tokenizer": tokenizer, "chat_template": TEMPLATE % image}
    if image == QWEN_IMAGE:
        added = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": added})
        patch = 16 if family == "qwen3-vl" else 14
        sizes = {"shortest_edge": (2 * patch) ** 2, "longest_edge": (8 * patch) ** 2}
        kind = {"qwen2-vl": hf.Qwen2VLProcessor, "qwen2.5-vl": hf.Qwen2_5_VLProcessor, "qwen3-vl": hf.Qwen3VLProcessor}
        image_processor = hf.Qwen2VLImageProcessorPil(size=sizes, patch_size=patch, merge_size=2, temporal_patch_size=2)
        return _without_videos(kind[family])(image_processor=image_processor, **options)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    if family in ("idefics3", "smolvlm"):
        image_processor = hf.Idefics3ImageProcessorPil(
            size={"longest_edge": 56}, max_image_size={"longest_edge": 28}, do_image_splitting=True
        )
        return hf.Idefics3Processor(image_processor=image_processor, image_seq_len=1, **options)
    square = {"height": 28, "width": 28}
    if family == "llava":
        image_processor = hf.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=square)
        more: dict[str, Any] = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    else:
        image_processor = hf.SiglipImageProcessorPil(size=square)
        more = {"vision_feature_select_strategy": "full"}
    return hf.LlavaProcessor(image_processor=image_processor, patch_size=14, **options, **more)


def _tiled_processor(family: str) -> Any:
    """A processor whose tiles have 28 × 28 pixels and 4 tokens."""
    import transformers as hf

    from raysft.models.processor import _without_videos

    tokenizer, size = tiny_tokenizer(), {"height": 28, "width": 28}
    options: dict[str, Any] = {"tokenizer": tokenizer, "chat_template": TEMPLATE % "<image>"}
    if family == "llava-next":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        image_processor = hf.LlavaNextImageProcessorPil(
            size={"shortest_edge": 28}, crop_size=size, image_grid_pinpoints=GRIDS
        )
        more = {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
        return hf.LlavaNextProcessor(image_processor=image_processor, **options, **more)
    if family == "llava-onevision":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
        image_processor = hf.LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=GRIDS)
        more = {"num_image_tokens": 4, "vision_feature_select_strategy": "full"}
        return _without_videos(hf.LlavaOnevisionProcessor)(image_processor=image_processor, **options, **more)
    image_processor = hf.GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, min_patches=1, max_patches=3)
    if family == "internvl":
        marks = {
            "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }  # fmt: skip
        tokenizer = with_marks(tokenizer, marks)
        options = {"tokenizer": tokenizer, "chat_template": TEMPLATE % marks["context_image_token"]}
        return _without_videos(hf.InternVLProcessor)(image_processor=image_processor, image_seq_length=4, **options)
    parts = ["START_OF_IMG", "END_OF_IMG", "IMG_PATCH", "IMG_LINE_BREAK"]
    added = ["<image>", *(f"<|{part}|>" for part in parts), "TILE", "TILE_GLOBAL"]
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    return hf.AyaVisionProcessor(image_processor=image_processor, patch_size=14, img_size=28, **options)


def with_marks(tokenizer: Any, marks: dict[str, str]) -> Any:
    """The tokenizer with more special tokens, which have names."""
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens({"additional_special_tokens": list(marks.values())})
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, extra_special_tokens=marks, **special)


def tiny_gemma3(folder: Path, window: int = 32, seed: int = 0) -> tuple[Path, Any]:
    """Save a random Gemma 3, whose tokens of an image attend to each other both ways; returns it with its processor."""
    import transformers as hf

    marks = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer: Any = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks.values())})
    tokenizer.save_pretrained(folder)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, extra_special_tokens=marks)
    image_processor = hf.Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    template = TEMPLATE % marks["boi_token"]
    processor = hf.Gemma3Processor(image_processor, tokenizer, chat_template=template, image_seq_length=4)
    text = {**TEXT, "model_type": "gemma3_text", "vocab_size": len(tokenizer), "head_dim": 16, "sliding_window": window}
    config = hf.Gemma3Config(
        text_config={**text, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config={**TOWER, "model_type": "siglip_vision_model", "patch_size": 7},
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    torch.manual_seed(seed)
    hf.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, processor


def _config(family: str, processor: Any) -> Any:
    """A small config; its tokens of images are those of the processor."""
    import transformers as hf

    tokenizer = processor.tokenizer
    text, qwen = ({**each, "vocab_size": len(tokenizer)} for each in (TEXT, QWEN_TEXT))
    untied: dict[str, Any] = {"tie_word_embeddings": False, "pad_token_id": 0}
    llama = {"text_config": {"model_type": "llama", **text}, **untied}
    marks = {
        key: tokenizer.convert_tokens_to_ids(token)
        for key, token in {
            "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
        }.items()
    }  # fmt: skip
    if family == "llava":
        tower = {"model_type": "clip_vision_model", **TOWER, "projection_dim": 32}
        return hf.LlavaConfig(vision_config=tower, image_token_index=processor.image_token_id, **llama)
    if family == "llava-siglip":
        tower = {"model_type": "siglip_vision_model", **TOWER}
        strategy = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
        return hf.LlavaConfig(vision_config=tower, image_token_index=processor.image_token_id, **strategy, **llama)
    if family in TILED:
        return _tiled_config(family, processor.image_token_id, llama, {**text, **untied})
    if family == "idefics3":
        return hf.Idefics3Config(vision_config=TOWER, image_token_id=processor.image_token_id, scale_factor=2, **llama)
    if family == "qwen2-vl":
        tower = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
        return hf.Qwen2VLConfig(text_config=qwen, vision_config=tower, **marks, **untied)
    if family == "qwen2.5-vl":
        tower = {**QWEN_TOWER, "fullatt_block_indexes": [1], "window_size": 56}
        return hf.Qwen2_5_VLConfig(text_config=qwen, vision_config=tower, **marks, **untied)
    tower = {**QWEN_TOWER, "patch_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return hf.Qwen3VLConfig(text_config={**qwen, "head_dim": 16}, vision_config=tower, **marks, **untied)


def _tiled_config(family: str, image: int, llama: dict[str, Any], text: dict[str, Any]) -> Any:
    import transformers as hf

    clip, siglip = ({"model_type": f"{kind}_vision_model", **TOWER} for kind in ("clip", "siglip"))
    if family == "llava-next":
        tower = {**clip, "projection_dim": 32}
        return hf.LlavaNextConfig(vision_config=tower, image_token_index=image, image_grid_pinpoints=GRIDS, **llama)
    if family == "llava-onevision":
        tower = {**siglip, "vision_use_head": False}
        return hf.LlavaOnevisionConfig(
            vision_config=tower,
            image_token_index=image,
            video_token_index=image + 1,
            image_grid_pinpoints=GRIDS,
            **llama,
        )
    if family == "internvl":
        tower = {**TOWER, "image_size": [28, 28], "patch_size": [7, 7]}
        return hf.InternVLConfig(vision_config=tower, image_token_id=image, image_seq_length=4, **llama)
    if family == "smolvlm":
        return hf.SmolVLMConfig(vision_config=TOWER, image_token_id=image, scale_factor=2, **llama)
    cohere = {"model_type": "cohere2", **text, "logit_scale": 0.25, "sliding_window": 512}
    tower = {**siglip, "patch_size": 7, "vision_use_head": False}
    return hf.AyaVisionConfig(
        vision_config=tower, text_config=cohere, image_token_index=image, tie_word_embeddings=False
    )
