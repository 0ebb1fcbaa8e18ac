"""The ``generate`` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raysft.config.section import Count, Positive, Section, Text


class GenerateSection(Section):
    enabled: bool = True
    """Generate predictions for the evaluation sets after training, and score them (``stage: sft``)."""
    compare_base: bool = True
    """Generate with the untrained model too, and show both side by side. Not with ``model``."""
    model: Text | None = None
    """Model or adapter that ``raysft generate`` generates with instead of the trained one: a folder, a hub id, a ``*.gguf``
    file, or a URI of an object store. Nothing needs to be trained; ``run.name`` must be that of no training. Prompts are made
    with its own tokenizer and chat template (``model.chat_template``, where it has none); an adapter without a tokenizer has
    that of its base. ``model.quantization`` and ``model.dtype`` say how it is loaded."""
    sources: list[Text] = []
    """Names of the sources to generate for, of ``data.eval`` and ``data.train``; with ``data.holdout`` a training source is its
    held-out part, else all of it. Default: those of ``data.eval``, and held-out parts."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates: ``transformers``, on CPUs and GPUs; or ``vllm``, on GPUs, with ``pip install 'raysft[vllm]'`` on every
    node, which itself finds out how many prompts it completes at once."""
    num_actors: Positive | None = None
    """Engines that work in parallel. Default: one per GPU, or one per node without GPU."""
    gpus_per_engine: Positive = 1
    """GPUs of one node that hold an engine's model together, for a model larger than one of them (``scaling.use_gpu``)."""
    max_examples: Positive | None = None
    """Generate for N examples only, spread evenly over each evaluation set."""
    batching: Literal["auto", "continuous", "static"] = "auto"
    """``continuous``: where a prediction ends another prompt takes its place; one GPU, no beams, no ``max_seconds``.
    ``static``: batch by batch, each until its last prediction ends. ``auto``: continuous on GPUs, where the model and the
    settings allow it."""
    batch_size: Positive = 64
    """Prompts that an engine completes at once; where memory runs out, half as many. With vLLM: that it is given,
    and that come back, together."""
    max_new_tokens: Positive = 1024
    """Longest prediction, in tokens."""
    do_sample: bool = True
    """Sample; otherwise take the most probable token."""
    temperature: Annotated[float, Field(gt=0)] = 0.95
    """Softmax temperature in sampling."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Sample from the most probable tokens that together have this probability."""
    top_k: Count = 50
    """Sample from the K most probable tokens; 0: from all."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Above 1, tokens that were used become less probable."""
    num_beams: Positive = 1
    """Beams of a beam search, with ``do_sample: false``; 1: none."""
    length_penalty: float = 1.0
    """In a beam search: above 0 longer predictions are preferred, below 0 shorter ones."""
    stop_tokens: list[Text] = []
    """Tokens that end a prediction, besides those that end the assistant's turns in the data, the tokenizer's eos token, and those
    in the model's generation config."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the predicted text."""
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    """Longest time for a batch of prompts; what was written until then is the prediction."""
    metrics: list[str] = ["similarity"]
    """Metrics of the predictions: modules of the package ``evaluate``. These come with raysft and need no network:
    ``similarity`` (ROUGE over jieba's words and BLEU-4 over characters, as LLaMA-Factory), ``rouge`` (rouge_score), ``bleu``
    (sacreBLEU of the corpus; ``bleu_zh`` for Chinese), ``chrf`` (sacreBLEU), ``exact_match`` (0 to 1; all others 0 to 100).
    Others are Python code, which runs because it is named here: a file, a folder, or an id on the hub, from where it is fetched
    (``NAME`` alone is ``evaluate-metric/NAME`` there, unless there is a ``NAME/NAME.py`` here)."""
