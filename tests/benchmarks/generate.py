"""How fast predictions are generated: ``python -m tests.benchmarks.generate MODEL FILE``.

The prompts are those of FILE (alpaca, JSON), spread evenly over it, so that their lengths differ as they do there. In one run,
greedy and in float32 on all cores: (a) raysft, a pool of engines on a Ray of this machine, with the defaults of a config; (b)
``model.generate`` on static batches of 8 in the order of the file, as LLaMA-Factory does it. Tokens are counted up to the one that
ends a prediction; the start of the engine and of Ray does not count. All should write the same text.

``--vllm PYTHON`` adds (c) vLLM, without compilation: PYTHON is the interpreter of an environment with vLLM's build for CPUs, which
needs another torch than raysft's own. It is asked before and after the others, since a machine's speed changes.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

STATIC_BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model with a chat template")
    parser.add_argument("file", type=Path, help="JSON list of alpaca records")
    parser.add_argument("--prompts", type=int, default=200, help="prompts (default 200)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest prediction (default 128)")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter with vLLM's build for CPUs, to measure it too")
    parser.add_argument("--only-vllm", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    what = (parsed.model, parsed.file, parsed.prompts, parsed.max_new_tokens)
    if parsed.only_vllm:
        print(json.dumps(vllm(*what)))
        return
    if parsed.vllm:
        shown("vllm", elsewhere(parsed.vllm))
    with tempfile.TemporaryDirectory() as folder:
        measured = []
        for way in (raysft, static):
            # A process for each: neither inherits threads or memory of the other.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                measured.append(shown(way.__name__, pool.submit(way, *what[:2], Path(folder), *what[2:]).result()))
    if parsed.vllm:
        measured.append(shown("vllm", elsewhere(parsed.vllm)))
    ours = measured[0]
    for name, theirs in zip(("static", "vllm"), measured[1:], strict=False):
        same = sum(one == other for one, other in zip(ours["texts"], theirs["texts"], strict=True))
        print(
            f"{ours['rate'] / theirs['rate']:.2f} times {name}; {same} of {len(ours['texts'])} predictions are the same"
        )


def shown(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Print a measurement, and return it."""
    print(
        f"{name:8} | {found['tokens']:7,} tokens | {found['seconds']:6.1f} s | {found['rate']:6.1f} tok/s", flush=True
    )
    return found


def elsewhere(python: str) -> dict[str, Any]:
    """Measure vLLM in the environment of another interpreter, with the arguments of this process."""
    command = [python, "-m", "tests.benchmarks.generate", *sys.argv[1:], "--only-vllm"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def vllm(model: str, file: Path, count: int, new_tokens: int) -> dict[str, Any]:
    """vLLM, with all prompts at once."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.inputs import TokensPrompt  # pyright: ignore[reportMissingImports]

    _, ids = prompts(model, file, count)
    engine = LLM(model, dtype="float32", enforce_eager=True, max_model_len=max(map(len, ids)) + new_tokens)
    asked = [TokensPrompt(prompt_token_ids=tokens) for tokens in ids]
    engine.generate(asked[:1], SamplingParams(temperature=0.0, max_tokens=2), use_tqdm=False)
    begun = time.perf_counter()
    found = engine.generate(asked, SamplingParams(temperature=0.0, max_tokens=new_tokens), use_tqdm=False)
    seconds = time.perf_counter() - begun
    tokens = sum(len(each.outputs[0].token_ids) for each in found)
    return {
        "tokens": tokens,
        "rate": tokens / seconds,
        "seconds": seconds,
        "texts": [each.outputs[0].text for each in found],
    }


def raysft(model: str, file: Path, folder: Path, count: int, new_tokens: int) -> dict[str, Any]:
    """The pool of engines."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray

    from raysft.config import parse
    from raysft.generate.batch_inference import Output, generate
    from raysft.storage.json_files import read_jsonl

    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    texts, ids = prompts(model, file, count)
    names = [str(index) for index in range(len(ids))]
    table = {"id": names, "source": ["a"] * len(ids), "prompt": texts, "input_ids": ids, "label": [""] * len(ids)}
    pq.write_table(pa.table(table), folder / "prompts.parquet")
    config = parse(
        {
            "model": {"path": model, "dtype": "float32"},
            "data": {"train": [{"name": "a", "path": str(file)}]},
            "generate": {"max_new_tokens": new_tokens, "do_sample": False, "metrics": ["exact_match"]},
        }
    )
    output = folder / "predictions.jsonl"
    metrics = generate(config, folder / "prompts.parquet", [Output(model, output)])
    rows = list(read_jsonl(output))
    tokens, rate = (
        sum(row["tokens"] for row in rows),
        next(row.value for row in metrics if row.metric == "tokens_per_second"),
    )
    return {"tokens": tokens, "rate": rate, "seconds": tokens / rate, "texts": [row["predict"] for row in rows]}


def static(model: str, file: Path, folder: Path, count: int, new_tokens: int) -> dict[str, Any]:
    """``model.generate`` on batches of 8 in the order of the file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(os.cpu_count() or 1)
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    plain.generation_config.do_sample = False
    _, ids = prompts(model, file, count)
    written, tokens, begun = [], 0, time.perf_counter()
    with torch.inference_mode():
        for start in range(0, len(ids), STATIC_BATCH):
            batch = tokenizer.pad({"input_ids": ids[start : start + STATIC_BATCH]}, return_tensors="pt")
            found = plain.generate(**batch, max_new_tokens=new_tokens, do_sample=False)[
                :, batch["input_ids"].shape[1] :
            ]
            for row in found.tolist():
                end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
                tokens += end
                written.append(tokenizer.decode(row[:end], skip_special_tokens=True))
    seconds = time.perf_counter() - begun
    return {"tokens": tokens, "rate": tokens / seconds, "seconds": seconds, "texts": written}


def prompts(model: str, file: Path, count: int) -> tuple[list[str], list[list[int]]]:
    """Texts and tokens of prompts that are spread evenly over the file."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    records = json.loads(file.read_text(encoding="utf-8"))
    chosen = [records[index * len(records) // count] for index in range(count)]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "\n".join(filter(None, (record["instruction"], record["input"])))}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for record in chosen
    ]
    return texts, tokenizer(texts, add_special_tokens=False)["input_ids"]


if __name__ == "__main__":
    main()
