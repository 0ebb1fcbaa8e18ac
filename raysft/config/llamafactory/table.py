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
MEANT = {
    "batch_size": "per_device_train_batch_size, or per_device_eval_batch_size",
    "save_dir": "output_dir",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "model": "model_name_or_path",
}
"""Name that other programs, and LLaMA-Factory's benchmarks, have for a key → the key."""
BENCHMARKS = ("task", "task_dir", "lang", "n_shot", "download_mode")
"""Keys of files for ``llamafactory-cli eval``."""
SHARED_ROWS = (
    *("sequence_parallel_size", "sequence_parallel_mode", "sequence_parallel", "sp_size"),
    *("cp_size", "cp_mode", "context_parallel_size"),
)
"""Keys of other versions and programs for rows that several workers compute."""


def suggest_key(name: Any) -> str:
    """Suggest a key for one that does not exist."""
    if name in RENAMED:
        return f"LLaMA-Factory 0.9.5 calls it {RENAMED[name]}; rename it"
    if name in MEANT:
        return f"did you mean {MEANT[name]}?"
    if name in BENCHMARKS:
        return (
            "it belongs to llamafactory-cli eval, which LLaMA-Factory 0.9.5 no longer supports; raysft does not run "
            "benchmarks: use lm-evaluation-harness"
        )
    if name in SHARED_ROWS:
        return (
            "LLaMA-Factory 0.9.5 has no such key; remove it, and give the command scaling.sequence_parallel=N, which divides each "
            "row among N workers"
        )
    close = difflib.get_close_matches(str(name), TABLE, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else "LLaMA-Factory 0.9.5 has no such key; remove it"
