"""The ``evaluate`` section."""

from __future__ import annotations

from raysft.config.section import PathOrHubId, Section


class EvaluateSection(Section):
    """Evaluation without training."""

    model: PathOrHubId | None = None
    """Any model or adapter for ``raysft evaluate`` to evaluate instead of the one that the config trains: a folder, a Hub id, a
    ``*.gguf`` file, or a URI in object storage. The evaluation sets are ``data.eval`` and what ``data.holdout`` holds out of
    training. Nothing is trained. The model's own tokenizer and chat template are used, or ``model.chat_template`` for a model
    that has none; an adapter without a tokenizer uses that of its base model. ``model.quantization``, ``model.dtype``,
    ``model.attention`` and ``train.micro_batch_size`` apply. With ``train.zero_stage: 3`` the weights are partitioned across
    the workers; otherwise each worker holds all of them. A run directory holds the results of one model with one set of
    settings; choose another ``run.name`` for another model, one that no training run uses."""
