"""All keys of LLaMA-Factory."""

from __future__ import annotations

import difflib
from typing import Any

from raysft.config.llamafactory.data_keys import DATA, GENERATING
from raysft.config.llamafactory.finetuning_keys import FINETUNING
from raysft.config.llamafactory.keys import Keys
from raysft.config.llamafactory.model_keys import MODEL
from raysft.config.llamafactory.training_keys import EARLIER, OWN, TRANSFORMERS

TABLE: Keys = {**MODEL, **DATA, **OWN, **TRANSFORMERS, **FINETUNING, **GENERATING, **EARLIER}
RENAMED = {"new_special_tokens": "add_special_tokens"}
"""Key of an earlier version → its name now, where another name is closer."""
BENCHMARKS = ("task", "task_dir", "lang", "n_shot")
"""Keys of files for ``llamafactory-cli eval``."""


def suggest_key(name: Any) -> str:
    """Suggest a key for one that does not exist."""
    if name in RENAMED:
        return f"LLaMA-Factory 0.9.5 calls it {RENAMED[name]}; rename it"
    if name in BENCHMARKS:
        return (
            "it is for llamafactory-cli eval, which LLaMA-Factory 0.9.5 no longer runs; raysft has no benchmarks: "
            "use lm-evaluation-harness"
        )
    close = difflib.get_close_matches(str(name), TABLE, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else "LLaMA-Factory 0.9.5 has no such key; remove it"
