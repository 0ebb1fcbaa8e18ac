"""The log history in Hugging Face's format, for tools that read the output of a Trainer."""

from __future__ import annotations

import math
from typing import Any

from raysft.report.read_run import RunLog, finite

_STEP_KEYS = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "lr": "learning_rate",
    "epoch": "epoch",
    "total_tokens": "num_input_tokens_seen",
}
"""Our key → Hugging Face's. Keys without a counterpart are only in ``trainer_log.jsonl``."""


def trainer_state(log: RunLog) -> dict[str, Any]:
    """The content of ``trainer_state.json``; ``transformers.TrainerState.load_from_json`` reads it.

    Numbers that are not finite become null: JSON has no notation for them, and strict readers refuse them.
    """
    steps = [
        {"step": record["current_steps"]}
        | {theirs: record[ours] for ours, theirs in _STEP_KEYS.items() if ours in record}
        for record in log.steps
    ]
    evaluations = [
        {"step": record["current_steps"]}
        | {key: value for key, value in record.items() if key == "epoch" or key.startswith("eval_")}
        for record in log.evaluations
    ]
    # The sort is stable: an evaluation follows the step that it was made after, as in a Trainer's log.
    history = sorted([*steps, *evaluations], key=lambda entry: entry["step"])
    last = (log.steps or log.evaluations)[-1]
    if log.trained:
        totals = {key: value for key, value in log.trained.items() if finite(value) is not None}
        history.append({**totals, "step": last["current_steps"], "epoch": last.get("epoch", 0.0)})
    step, _, value = log.best or (None, "", None)
    kept = log.best is not None and log.option("train.keep_best", False)
    return {
        "best_global_step": step,
        "best_metric": value,
        "best_model_checkpoint": str(log.directory.model) if kept else None,
        "epoch": last.get("epoch", 0.0),
        "eval_steps": log.option("train.eval_every_steps", 0),
        "global_step": last["current_steps"],
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": [{key: _for_json(value) for key, value in entry.items()} for entry in history],
        "logging_steps": 1,
        "max_steps": last.get("total_steps", last["current_steps"]),
        "num_input_tokens_seen": last.get("total_tokens", 0),
        "num_train_epochs": math.ceil(finite(log.plan.get("epochs")) or finite(last.get("epoch")) or 1),
        "save_steps": log.option("train.save_every_steps", 0),
        "stateful_callbacks": {},
        "total_flos": finite(log.trained.get("total_flos")) or 0,
        "train_batch_size": log.resolved.get("micro_batch_size"),
        "trial_name": None,
        "trial_params": None,
    }


def _for_json(value: Any) -> Any:
    return finite(value) if isinstance(value, float) else value
