"""The ``generate`` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raysft.config.section import Count, PathOrHubId, Positive, Section, Text


class GenerateSection(Section):
    """Predictions and their metrics."""

    enabled: bool = True
    """After training, generate predictions for the evaluation sets and score them (``stage: sft``)."""
    compare_base: bool = True
    """Also generate with the base model, and show both predictions side by side. Has no effect with ``model``."""
    every_steps: Positive | None = None
    """Also generate during training: after every N steps, with the model of that step. The scores are logged with their step, and
    the files are in the run directory's ``generation/STEP``. Engines use CPUs or GPUs that the workers leave free, while training
    goes on; without any, the workers wait and lend theirs. ``raysft check`` says which. Default: only after training."""
    model: PathOrHubId | None = None
    """Model or adapter that ``raysft generate`` uses instead of the trained one: a folder, a Hub id, a ``*.gguf`` file, or a URI in
    object storage. No training is required. Use a ``run.name`` that no training run uses. Prompts use the model's own tokenizer
    and chat template, or ``model.chat_template`` if it has none; an adapter without a tokenizer uses that of its base model.
    ``model.quantization`` and ``model.dtype`` apply."""
    sources: list[Text] = []
    """Names of the sources of ``data.eval`` and ``data.train`` to generate for. A training source means its held-out part with
    ``data.holdout``, otherwise all of it. Default: all of ``data.eval`` and the held-out parts."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """Inference engine: ``transformers`` on CPUs or GPUs, or ``vllm``, which needs ``pip install 'raysft[vllm]'`` on every node
    (without GPUs: vLLM's build for CPUs) and chooses the number of concurrent prompts itself."""
    num_actors: Positive | None = None
    """Number of engines that work in parallel. Default: one per ``gpus_per_engine`` GPUs, or one per node without GPUs."""
    gpus_per_engine: Positive = 1
    """GPUs of one node to split the model of an engine over, for models that do not fit on one GPU. Requires
    ``scaling.use_gpu``."""
    max_examples: Positive | None = None
    """Generate for only N examples of each evaluation set, spread evenly over it. Default: all examples."""
    batching: Literal["auto", "continuous", "static"] = "auto"
    """``continuous``: as soon as a prediction ends, another prompt takes its place (one GPU per engine, no beam search, no
    ``max_seconds``). ``static``: complete one batch before starting the next. ``auto``: continuous on GPUs if the model and the
    settings support it, otherwise static. Prompts with images are completed in static batches."""
    batch_size: Positive = 128
    """Most prompts that an engine completes at the same time; halved when memory runs out. On CPUs fewer, if the keys and values of
    so many tokens, and the pixels of their images, could take more than a quarter of the machine's memory. With vLLM: prompts that
    are submitted, and results that are returned, together."""
    max_new_tokens: Positive = 1024
    """Maximum length of a prediction, in tokens."""
    do_sample: bool = True
    """Sample; otherwise choose the most probable token (greedy decoding)."""
    temperature: Annotated[float, Field(gt=0)] = 0.95
    """Softmax temperature for sampling."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Sample from the smallest set of most probable tokens whose total probability reaches this value."""
    top_k: Count = 50
    """Sample from the K most probable tokens. 0: from all tokens."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Values above 1 make tokens that already occurred less probable. 1: no penalty."""
    num_beams: Positive = 1
    """Number of beams; requires ``do_sample: false``. 1: no beam search."""
    length_penalty: float = 1.0
    """With beam search: values above 0 favor longer predictions, values below 0 shorter ones."""
    stop_tokens: list[Text] = []
    """Additional tokens that end a prediction. The tokens that end assistant turns in the data, the tokenizer's EOS token
    and those in the model's generation config always do."""
    skip_special_tokens: bool = True
    """Remove special tokens from the predicted text."""
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    """Time limit for a batch of prompts; the text generated until then is the prediction. Default: no limit."""
    metrics: list[str] = ["similarity"]
    """Metrics for the predictions, as modules of the ``evaluate`` package. These are built in and need no network: ``similarity``
    (ROUGE over jieba words and BLEU-4 over characters, as in LLaMA-Factory), ``rouge`` (rouge_score), ``bleu`` (corpus-level
    sacreBLEU; ``bleu_zh`` for Chinese), ``chrf`` (sacreBLEU) and ``exact_match`` (0 to 1; all others 0 to 100). Any other entry is
    Python code that will be run: a file, a folder, or a Hub id, which is downloaded (``NAME`` alone means
    ``evaluate-metric/NAME`` on the Hub, unless ``NAME/NAME.py`` exists)."""
