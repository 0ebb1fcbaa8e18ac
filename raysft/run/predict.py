"""Generation with any model or adapter (``generate.model``): a run directory of predictions, without training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from raysft.cluster.placement import Node, counted
from raysft.config import Config
from raysft.data.shards.prompts import write_prompts
from raysft.data.tokenization.turn_ends import merge_counts, stop_token_ids
from raysft.errors import RequestError
from raysft.run.inputs import PromptInputs, check_tokens
from raysft.run.other_model import begin, record
from raysft.run.preflight import preflight
from raysft.run.source_plan import plan_sources
from raysft.storage.run_directory import RunDirectory


def predict(config: Config) -> RunDirectory:
    """Generate with ``generate.model`` and score the predictions.

    Returns:
        The run directory, which holds them.

    Raises:
        RequestError: the model, the data or the cluster cannot do it, or the run directory belongs to a training.
        RunFailed: an engine failed.
    """
    from raysft.generate.batch_inference import Output, generate
    from raysft.generate.metrics import write_metrics

    with preflight(config, "generate") as ready:
        assert ready.prompts is not None
        directory, model, manifests = ready.directory, ready.prompts.model, ready.prompts.manifests
        generation = {name: asdict(source) for name, source in plan_sources(manifests).items()}
        what = directory, config, "generate", {"generation": generation}, manifests
        begin(*what)
        ends = stop_token_ids(merge_counts(manifest.turns for manifest in manifests))
        if not write_prompts(manifests, directory.prompts, config.generate.max_examples, ends):
            raise RequestError(
                "no example has a prompt to generate for (pre-tokenized records have none); choose other sources"
            )
        # Only of these prompts: answers, and prompts that are not generated for, may hold any token.
        largest = _largest_tokens(directory.prompts)
        check_tokens(largest, ready.prompts.embedding_rows, ready.prompts.tokenizer, f"generate.model={model}")
        output = Output(model, directory.predictions, "other", str(config.generate.model))
        rows = generate(config, directory.prompts, [output], notify=ready.terminal.line)
        # Inside the block, so that the results reach an object store with the other files.
        record(*what)
        write_metrics(directory, rows)
    return directory


def prediction_lines(config: Config, prompts: PromptInputs, nodes: Sequence[Node]) -> list[str]:
    """What ``predict`` would do, as lines for the terminal."""
    from raysft.generate.engine_pool import size_pool

    settings = config.generate
    pool = size_pool(config, nodes, batches=settings.num_actors or sum(len(each) for each in prompts.manifests))
    most = f", {settings.max_examples:,} prompts of each set at most" if settings.max_examples else ""
    each = counted(pool.gpus, "GPU") if config.scaling.use_gpu else counted(pool.cpus, "CPU")
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return [
        f"generate: generate.model={config.generate.model} with {settings.engine}, up to {settings.max_new_tokens:,} tokens for a "
        f"prompt{most}",
        *(f"generation {name}: {source.line()}" for name, source in plan_sources(prompts.manifests).items()),
        f"resources: {counted(pool.engines, 'engine')} of {each}, the cluster has {cpus:g} CPUs and {gpus:g} GPUs",
    ]


def _largest_tokens(prompts: Path) -> Iterator[tuple[int, str]]:
    """Yield the largest token id of each prompt, and the prompt's name."""
    for batch in pq.ParquetFile(prompts).iter_batches(columns=["id", "input_ids"]):
        for name, ids in zip(batch["id"].to_pylist(), batch["input_ids"], strict=True):
            yield int(np.max(ids.values.to_numpy(), initial=0)), f"prompt {name}"
