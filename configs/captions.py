"""Make the model and the data of ``configs/captions.yaml``: ``python configs/captions.py [FOLDER]``.

The model is a small LLaVA that is random in all its parts: a tower (SigLIP), a projector, a language model (Llama) and a tokenizer
whose tokens are single characters. The data is pictures that the package captcha draws: two digits, turned and warped, between
dots and a curve. It draws with random numbers of the system, so that no two sets are the same.
"""

from __future__ import annotations

import argparse
import json
import random
import string
from pathlib import Path
from typing import Any

COUNT = 24_000
HIDDEN = 128
SIZE, PATCH = 48, 8
"""Pixels of a picture and of a patch, in each direction. A patch becomes one token."""
TEMPLATE = """\
{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}\
{% for part in message.content %}{% if part.type == "image" %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}\
{% endif %}{% if message.role == "assistant" %}<end>{% endif %}{% endfor %}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("captions"), help="default: captions")
    parser.add_argument("--count", type=int, default=COUNT, help=f"number of pictures; default: {COUNT:,}")
    arguments = parser.parse_args()
    write_model(arguments.folder / "model")
    write_pictures(arguments.folder, arguments.count)
    print(f"{arguments.folder}: a model, and {arguments.count:,} pictures in captions.jsonl")


def write_pictures(folder: Path, count: int) -> None:
    """Write the pictures and ``captions.jsonl``."""
    from captcha.image import ImageCaptcha

    draw = ImageCaptcha(width=64, height=64)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    with (folder / "captions.jsonl").open("w") as lines:
        for index in range(count):
            text, name = f"{random.randrange(100):02}", f"pictures/{index:05}.png"
            draw.generate_image(text).save(folder / name)
            question = [{"type": "image", "image": name}]
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
            lines.write(json.dumps({"messages": turns}) + "\n")


def write_model(folder: Path) -> None:
    """Write the model and its processor."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, SiglipImageProcessorPil

    tokenizer = characters()
    image_processor = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    processor = LlavaProcessor(
        image_processor, tokenizer, patch_size=PATCH, vision_feature_select_strategy="full", chat_template=TEMPLATE
    )
    tower = {
        "model_type": "siglip_vision_model", "image_size": SIZE, "patch_size": PATCH, "hidden_size": HIDDEN,
        "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4, "vision_use_head": False,
    }  # fmt: skip
    scale = HIDDEN**-0.5  # transformers' 0.02 is made for wider models: with it, this one learns half as fast
    language = {
        "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": HIDDEN, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": scale,
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    config = LlavaConfig(
        vision_config=tower, text_config=language, image_token_index=processor.image_token_id,
        vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def characters() -> Any:
    """A tokenizer whose tokens are single characters."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    letters = [*string.digits, *string.ascii_letters, *string.punctuation, " ", "\n"]
    model = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    model.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=["<image>"],
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    main()
