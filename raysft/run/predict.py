"""Generation with any model or adapter (``generate.model``): a run directory of predictions, in which nothing is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from raysft.cluster.connect import cluster
from raysft.config import Config
from raysft.data.prepare import prepare_prompts
from raysft.data.shards.manifest import Manifest, write_prompts
from raysft.data.tokenization.tokenizer import load_once
from raysft.data.tokenization.turn_ends import merge_counts, stop_token_ids
from raysft.errors import RequestError
from raysft.models.quantization import check_method, method_of, quantization_config
from raysft.models.weight_files import check_weights, embedding_rows
from raysft.run.ownership import begun, ensure_writable, exclusive_access
from raysft.run.plan import plan_sources
from raysft.run.preflight import check_engines, check_generation, check_metrics, check_tokens
from raysft.storage.json_files import flat, write_atomically, write_json, write_jsonl
from raysft.storage.local_cache import model_copy
from raysft.storage.run_directory import RunDirectory
from raysft.storage.sync import synced
from raysft.telemetry.terminal import Terminal


def predict(config: Config) -> RunDirectory:
    """Generate with ``generate.model`` and score it; gives the run directory, which holds the predictions.

    Raises:
        RequestError: the model, the data or the cluster cannot do it, or the run directory is that of a training.
        RunFailed: an engine failed.
    """
    from raysft.generate.batch_inference import generate
    from raysft.generate.metrics import write_metrics

    directory, terminal = RunDirectory.of(config.run_place), Terminal()
    ensure_writable(config)
    with exclusive_access(directory, terminal), synced(directory, terminal.line):
        _refuse_training(directory, config)
        check_metrics(config)
        with cluster(config):
            check_engines(config)
            model, rows, tokenizer, manifests = _prepared(config, terminal)
            write_atomically(directory.config, config.to_yaml())
            generation = {name: asdict(source) for name, source in plan_sources(manifests).items()}
            write_json(directory.plan, {"generation": generation})
            rejected = [flat(item) for each in manifests for item in (*each.rejected, *each.dropped)]
            write_jsonl(directory.rejected, rejected)
            ends = stop_token_ids(merge_counts(manifest.turns for manifest in manifests))
            if not write_prompts(manifests, directory.prompts, config.generate.max_examples, ends):
                raise RequestError(
                    "no example has a prompt to generate for (ready tokens have none); name other sources"
                )
            check_tokens(_used(directory.prompts), rows, tokenizer, f"generate.model={model}")
            terminal.line(f"generating with {config.generate.model}")
            metric_rows = generate(
                config, model=model, prompts=directory.prompts, output=directory.predictions, role="other"
            )
        write_metrics(directory, metric_rows)
    return directory


def _refuse_training(directory: RunDirectory, config: Config) -> None:
    """What another model writes must not stand beside what a training has written, as if it were the trained one's."""
    if begun(directory):
        raise RequestError(
            f"{directory.place}: is the run of a training, and generate.model={config.generate.model} is another model; "
            "choose another run.name"
        )
    if not directory.config.exists() and any(".lock" not in name for name in directory.place.entries()):
        raise RequestError(
            f"{directory.place}: the folder is not empty and holds no config.yaml; choose another run.name"
        )


def _prepared(config: Config, terminal: Terminal) -> tuple[str, int | None, Any, list[Manifest]]:
    """The model's location, how many tokens it has embeddings for, its tokenizer, and its prompts."""
    from raysft.models.adapters import adapter_base
    from raysft.models.architecture import read_hf_config
    from raysft.models.remote_code import code_name, runs_code
    from raysft.models.resolve import find_model
    from raysft.models.tokenizer import tokenizer_folder

    key = "generate.model"
    model = find_model(config.generate.model or "", config.cache_directory, terminal.line, key)
    folder = model_copy(model)
    base = adapter_base(folder)
    check_weights(folder, f"{key}={model}")
    hf_config = read_hf_config(config, str(base or folder), code_name(config, folder), terminal.line, key)
    if method := method_of(hf_config):
        check_method(f"{key}={model}", method, config)
    quantization_config(config)
    check_generation(config, model)
    at, trusted = str(tokenizer_folder(folder)), runs_code(config, folder)
    prompts = prepare_prompts(config, at, trusted, terminal.line)
    return model, embedding_rows(base or folder, hf_config, f"{key}={model}"), load_once(at, trusted), prompts


def _used(prompts: Path) -> Iterator[tuple[int, str]]:
    """The largest token id of each prompt, and its name."""
    table = pq.read_table(prompts, columns=["id", "input_ids"])
    for id, ids in zip(table["id"].to_pylist(), table["input_ids"], strict=True):
        yield int(np.max(ids.values.to_numpy(), initial=0)), f"prompt {id}"
