"""Record what LLaMA-Factory trains of thoughts, for ``tests/unit/test_thoughts.py``.

It runs where LLaMA-Factory 0.9.5 can be imported, see ``tests/record_templates.py``::

    python -P tests/record_thoughts.py > tests/unit/recorded_thoughts.json

Each conversation is encoded by the trainer's own processor with the template ``qwen3`` and a byte-level tokenizer, and written as
its text and the parts of it that have labels.
"""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import Any

CONVERSATIONS = {
    "single": ["Hi", "Hello!"],
    "single, thought": ["Hi", "<think>\nA greeting.\n</think>\n\nHello!"],
    "multi": ["One?", "Two.", "Three?", "Four.", "Five?", "Six."],
    "multi, thoughts": [
        "One?", "<think>\nSo\nfar\n</think>\n\nTwo.", "Three?", "<think>\nhm\n</think>\n\nFour.", "Five?",
        "<think>\nyes\n</think>\n\nSix.",
    ],
    "multi, first thinks": ["One?", "<think>\nhm\n</think>\n\nTwo.", "Three?", "Four."],
    "multi, last thinks": ["One?", "Two.", "Three?", "<think>\nhm\n</think>\n\nFour."],
    "multi, empty thought": ["One?", "<think>\n\n</think>\n\nTwo.", "Three?", "Four."],
}  # fmt: skip
SYSTEMS: dict[str, tuple[str, str | None]] = {
    "none": ("", None),
    "default": ("", "Be brief."),
    "both": ("Be long.", "Be brief."),
    "no default": ("", ""),
}
"""Name → (the conversation's system message, ``default_system``)."""


def main() -> None:
    from llamafactory.data.processor.supervised import (  # pyright: ignore[reportMissingImports]
        SupervisedDatasetProcessor,
    )
    from llamafactory.data.template import TEMPLATES  # pyright: ignore[reportMissingImports]
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")

    def encode(template: Any, contents: list[str], system: str, mask_history: bool) -> tuple[str, list[str]]:
        turns = [{"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(contents)]
        arguments = SimpleNamespace(mask_history=mask_history, cutoff_len=100_000, train_on_prompt=False)
        processor = SupervisedDatasetProcessor(template, tokenizer, None, arguments)
        given = {"images": [], "videos": [], "audios": []}
        ids, labels = processor._encode_data_example(turns[:-1], turns[-1:], system, "", **given)
        parts = itertools.groupby(range(len(ids)), lambda index: labels[index] >= 0)
        decode: Any = tokenizer.decode
        return decode(ids), [decode([ids[index] for index in part]) for on, part in parts if on]

    thoughts = []
    template = TEMPLATES["qwen3"]
    for mask_history, thinking, keep in itertools.product((False, True), (True, False, None), (False, True)):
        template.enable_thinking, template.preserve_thinking = thinking, keep
        cases = {name: encode(template, contents, "", mask_history) for name, contents in CONVERSATIONS.items()}
        options = {"mask_history": mask_history, "enable_thinking": thinking, "preserve_thinking": keep}
        thoughts.append({**options, "cases": cases})
    systems = []
    for name, (key, (system, default)) in itertools.product(("qwen", "qwen3", "alpaca"), SYSTEMS.items()):
        template, own = TEMPLATES[name], TEMPLATES[name].default_system
        template.default_system = own if default is None else default
        systems.append({"template": name, "case": key, "text": encode(template, ["Hi", "Hello!"], system, False)[0]})
        template.default_system = own
    recorded = {"conversations": CONVERSATIONS, "systems": SYSTEMS, "thoughts": thoughts, "texts": systems}
    print(json.dumps(recorded, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
