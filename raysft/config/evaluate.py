"""The ``evaluate`` section."""

from __future__ import annotations

from raysft.config.section import PathOrHubId, Section


class EvaluateSection(Section):
    """Evaluation of a model that this config does not train."""

    model: PathOrHubId | None = None
    """Model or adapter that ``raysft evaluate`` evaluates on ``data.eval`` and the held-out parts instead of the trained one: a
    folder, a Hub id, a ``*.gguf`` file, or a URI in object storage. Nothing is trained, and there is no optimizer. Use a
    ``run.name`` that no training run uses. Texts are tokenized with the model's own tokenizer and chat template, or
    ``model.chat_template`` if it has none; an adapter without a tokenizer uses that of its base model. ``model.quantization``,
    ``model.dtype``, ``model.attention`` and ``train.micro_batch_size`` apply; with ``train.zero_stage: 3``, each worker holds a
    part of the weights, otherwise all of them."""
