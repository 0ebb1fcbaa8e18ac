"""The base class of callbacks, which follow training from the process that started it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raysft.telemetry.events import StepRecord


class Callback:
    """Override the methods that you need, and pass an instance to ``run_sft`` or ``run_pt``.

    Methods run in the calling process, not in the workers, in the order of the training. After a worker failure the training
    resumes from a checkpoint, so that ``on_setup`` is called again and steps after that checkpoint are repeated. An exception
    stops the run.
    """

    def on_setup(self, setup: Mapping[str, Any]) -> None:
        """Called when the workers have loaded the model and a checkpoint, if there is one.

        Args:
            setup: among others ``step`` (optimizer steps done before), ``workers``, ``parameters``, ``trained_parameters``, and
                ``log``: the records of ``trainer_log.jsonl`` up to that step. A callback of a run that was killed may not have got
                the last of them.
        """

    def on_step(self, record: StepRecord) -> None:
        """Called after each optimizer step with its metrics."""

    def on_evaluate(self, results: Mapping[str, Any]) -> None:
        """Called after each evaluation.

        Args:
            results: ``current_steps``, ``eval_loss``, ``eval_perplexity``, ``eval_accuracy`` and ``eval_tokens``; with several
                evaluation sets also ``eval_{name}_loss`` and so on.
        """

    def on_generate(self, results: Mapping[str, Any]) -> None:
        """Called when the predictions of a step's model are scored (``generate.every_steps``). Training may be further by then.

        Args:
            results: ``current_steps`` and the numbers of ``predict_results.json``.
        """

    def on_checkpoint(self, cursor: Mapping[str, int]) -> None:
        """Called when a checkpoint is complete.

        Args:
            cursor: ``step`` and ``rows``, the optimizer steps and rows consumed.
        """

    def on_end(self, results: Mapping[str, Any]) -> None:
        """Called when the training is complete and its model is written.

        Args:
            results: ``train`` and ``eval``, the contents of ``train_results.json`` and ``eval_results.json``.
        """
