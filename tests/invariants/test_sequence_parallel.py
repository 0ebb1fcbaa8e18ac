"""Workers that share each row train as one worker with whole rows does (``scaling.sequence_parallel``)."""

from __future__ import annotations

import os
import random
import shutil
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysft.config import with_overrides
from raysft.data.rows.collate import Batch
from raysft.data.rows.packed_dataset import PackedDataset
from raysft.data.types import IGNORE_INDEX
from raysft.telemetry.events import EvaluationDone, StepRecord, StepSkipped, StoppedEarly
from tests.invariants.test_collectives import MIXTURES, PARTITION_ALL
from tests.messages import holds
from tests.processes import forks
from tests.shards import the_set, write_records, written
from tests.tiny import tiny_mixture, tiny_model, with_code
from tests.training import Case, Result, assert_same, make_config, train_all

CAPACITY, HALF = 96, 48
LORA = {"finetuning": "lora"}
BFLOAT16 = {"model.dtype": "bfloat16"}
AVERAGED = {"train.optimizer": "schedulefree_adamw", "train.schedule": "constant"}
BEST = {
    **{"train.early_stopping.patience": 1, "train.early_stopping.threshold": 9.0, "train.keep_best": True},
    **{"train.eval_at_start": True, "train.eval_every_steps": 1},
}
"""No model is better than the first one by so much, so that training ends early."""
ON_CPU = {"train.offload.activations": "cpu"}
COMPILED: list[tuple[str, int, int, dict[str, Any]]] = [
    ("llama", 2, 2, {"zero_stage": 2, "loss": "asft", "gradient_checkpointing": True, "compile": True})
]
if not shutil.which(os.environ.get("CXX", "g++")):
    COMPILED.clear()  # it needs a compiler
WAYS: list[tuple[str, int, int, dict[str, Any]]] = [
    ("llama", 2, 2, {"zero_stage": 0, "loss": "asft"}),
    ("llama", 2, 2, {"zero_stage": 1, "loss": "dft", "micro_batch_size": 1, **BEST}),
    ("llama", 2, 2, {"zero_stage": 2, "z_loss": 1e-3, "label_smoothing": 0.1, **LORA, **AVERAGED}),
    ("llama", 2, 2, {"zero_stage": 3, "gradient_checkpointing": True, "recompute_layers": 1, **ON_CPU}),
    ("llama", 2, 2, {"zero_stage": 2, "micro_batch_size": 1, **BFLOAT16}),
    *COMPILED,
    ("one key head", 2, 2, {"zero_stage": 0, "loss": "eaft", "nonfinite": "skip"}),
    ("narrow window", 2, 2, {"zero_stage": 2, "gradient_checkpointing": True}),
    ("deepseek_v3", 2, 2, {"zero_stage": 3, **LORA}),
    ("qwen3_moe", 2, 2, {"zero_stage": 1, "router_aux_loss_coef": 0.5}),
    ("llama", 4, 2, {"zero_stage": 0, "gradient_checkpointing": True}),
    ("qwen3_moe", 4, 2, {"zero_stage": 3, "micro_batch_size": 1, "router_aux_loss_coef": 0.5}),
    ("llama", 4, 4, {"zero_stage": 2}),
]
"""(model, workers, of which so many share each row, settings), compared with one worker. The models have 4 query heads and 2 key
heads, unless the name says otherwise."""

MORE = {"deepseek_v3": {"num_key_value_heads": 4}}
"""As all of its models have it: it expands keys for all heads."""

KEPT = 3
"""The way of which checkpoints are written."""


class LabelsInOneSlice(PackedDataset):
    """Of the first rows, one has labels in its first half alone, one in its second half, and one has none."""

    def batch(self, rows):
        made: Batch = super().batch(rows)
        for row, masked in ((0, slice(HALF, None)), (1, slice(0, HALF)), (2, slice(None))):
            made["labels"][made["row"] == row, masked] = IGNORE_INDEX
        return made


def examples(count: int, seed: int) -> list[dict[str, Any]]:
    """Make examples of a few tokens to nearly a row, with labels from some token on, and weights."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        ids = [draw.randrange(3, 390) for _ in range(draw.randint(5, 88))]
        trained = draw.randrange(1, len(ids))
        labels = [IGNORE_INDEX] * trained + ids[trained:]
        made.append({"input_ids": ids, "labels": labels, "weight": draw.choice([0.5, 1.0, 3.0])})
    return made


class OneNotANumber(LabelsInOneSlice):
    """A loss in the second half of one row, in the second step, is NaN."""

    def batch(self, rows):
        made = super().batch(rows)
        made["weights"] = made["weights"].copy()
        made["weights"][made["row"] == 5, HALF:] = np.nan
        return made


class Prepared:
    """Models, and rows of two sources with weights; in the last step, some workers have fillers alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tiny_model(folder / "llama")
        tiny_mixture(folder / "one key head", "llama", num_key_value_heads=1)
        tiny_mixture(folder / "narrow window", "mistral", sliding_window=20)
        for model_type, settings in MIXTURES.items():
            tiny_mixture(folder / model_type, model_type, **{**settings, **MORE.get(model_type, {})})
        paths = []
        for name, count in (("d", 13), ("e", 8), ("f", 9)):
            write_records(folder / f"{name}.jsonl", examples(count, seed=count))
            source = {"name": name, "path": str(folder / f"{name}.jsonl")}
            config = make_config(folder, folder / "llama", {"data.train": [source]})
            model = str(folder / "llama")
            paths.append(f"{written(the_set(config, model), model).directory}/manifest.parquet")
        self.rows, self.rows_with_nan = (
            kind(tuple(paths[:2]), CAPACITY, 4, seed=3) for kind in (LabelsInOneSlice, OneNotANumber)
        )
        self.eval_rows = PackedDataset((paths[2],), CAPACITY, 4, shuffle=False)

    def case(self, model: str, share: int = 1, keep: str = "", resume: str = "", **settings: Any) -> Case:
        """
        Args:
            keep: name of the checkpoints to write.
            resume: name of those to go on from.
        """
        way = {
            "data.eval": [{"name": "f", "path": str(self.folder / "f.jsonl")}],
            "train.max_steps": None,
            "train.eval_every_steps": 2,
            "train.save_every_steps": 2,
            "train.deepspeed": PARTITION_ALL,
            "scaling.sequence_parallel": share,
            "scaling.num_workers": share,
        }
        own = {key: settings.pop(key) for key in list(settings) if "." in key}
        config = make_config(self.folder, self.folder / model, {**way, **own}, **{"micro_batch_size": 2, **settings})
        kept, begun = (self.folder / "kept" / name if name else None for name in (keep, resume))
        return Case(
            config,
            self.rows_with_nan if config.train.nonfinite == "skip" else self.rows,
            eval_rows=self.eval_rows,
            chunk_tokens=16,
            keep=kept,
            resume=begun and begun / "checkpoint_2",
            compiler="aot_eager",
        )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("sequence"))


ALONE: dict[str, Any] = {
    **{"zero_stage": 0, "micro_batch_size": 4, "gradient_checkpointing": False, "compile": False},
    **{"recompute_layers": None, "train.offload.activations": "none"},
}


@pytest.fixture(scope="module")
def trained(prepared) -> list[tuple[Result, Result]]:
    """For each way: the results of one worker, and of those that share rows."""
    alone = [
        prepared.case(model, **{**settings, **ALONE}, keep="alone" if number == KEPT else "")
        for number, (model, _, _, settings) in enumerate(WAYS)
    ]
    known, shared = train_all(alone), {}
    for world in (2, 4):
        ways = [number for number, way in enumerate(WAYS) if way[1] == world]
        cases = [
            prepared.case(WAYS[number][0], WAYS[number][2], **WAYS[number][3], keep="shared" if number == KEPT else "")
            for number in ways
        ]
        shared |= dict(zip(ways, train_all(cases, world), strict=True))
    return [(one, shared[number]) for number, one in enumerate(known)]


def test_rows_are_what_the_ways_must_get_right(prepared):
    plan = prepared.rows.row_plan
    assert plan.rows % 4 in (1, 2), "no worker has fillers alone"
    batch = prepared.rows.batch(range(plan.rows))
    crossing = batch["position_ids"][:, HALF] > 0
    assert crossing.sum() > 2, "no example crosses the seam"
    assert len({*batch["sources"].reshape(-1).tolist()}) == 2
    assert len({*batch["weights"].reshape(-1).tolist()}) > 2


@pytest.mark.parametrize("way", range(len(WAYS)), ids=[f"{way[0]}, {way[1]} by {way[2]}, {way[3]}" for way in WAYS])
def test_workers_that_share_rows_train_as_one_worker_does(trained, way):
    one, shared = trained[way]
    assert (one.failure, shared.failure) == ("", "")
    assert len(one.losses) == 2 if BEST.items() <= WAYS[way][-1].items() else len(one.losses) > 2
    if BFLOAT16.items() <= WAYS[way][-1].items():
        assert_rounded(one, shared)
        return
    assert_same(one[:4], shared[:4])
    assert courses(one) == courses(shared)
    ours, theirs = ([e for e in result.events if isinstance(e, StepRecord)] for result in (shared, one))
    for name in ("total_tokens", "loss_tokens", "rows", "packing_efficiency"):
        assert [getattr(e, name) for e in ours] == [getattr(e, name) for e in theirs], name
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.source_losses == pytest.approx(other.source_losses, rel=1e-5, nan_ok=True)
        balances = mine.router_aux_loss, other.router_aux_loss
        assert balances == (None, None) or balances[0] == pytest.approx(balances[1], rel=1e-5)


def courses(result: Result) -> list[tuple[str, int]]:
    """What came between the steps of a training, and after which."""
    evaluations = [("evaluation", e.record["current_steps"]) for e in result.events if isinstance(e, EvaluationDone)]
    return evaluations + [
        (type(e).__name__, e.step) for e in result.events if isinstance(e, StepSkipped | StoppedEarly)
    ]


def assert_rounded(one: Result, other: Result) -> None:
    """Both trainings in bfloat16 are the same but for what rounding makes of it."""
    np.testing.assert_allclose(one.losses, other.losses, rtol=5e-4)
    np.testing.assert_allclose(one.norms, other.norms, rtol=1e-2)
    assert one.evaluation["eval_loss"] == pytest.approx(other.evaluation["eval_loss"], rel=5e-4)


def test_ways_end_early_and_skip_a_step(trained):
    """Else they would show nothing of that."""
    found = [courses(shared) for _, shared in trained]
    (best,) = (found[way] for way, (*_, settings) in enumerate(WAYS) if BEST.items() <= settings.items())
    (skips,) = (found[way] for way, (*_, settings) in enumerate(WAYS) if "nonfinite" in settings)
    assert best == [("evaluation", 0), ("evaluation", 1), ("evaluation", 2), ("StoppedEarly", 2)]
    assert ("StepSkipped", 2) in skips


def test_trainings_resume_with_rows_shared_or_not(prepared, trained):
    """From the second step of workers that share rows on one, and the other way round."""
    model, world, share, settings = WAYS[KEPT]
    whole = trained[KEPT][0]
    (alone,) = train_all([prepared.case(model, resume="shared", **{**settings, **ALONE})])
    (shared,) = train_all([prepared.case(model, share, resume="alone", **settings)], world)
    for result in (alone, shared):
        assert result.failure == ""
        last = (whole.losses[2:], whole.norms[2:], whole.weights, whole.evaluation)
        assert len(last[0]) == 1
        assert_same(last, result[:4])


CODE = """
from torch.nn.functional import pad
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].register_forward_hook(lambda layer, inputs, output: output + pad(output[:, :-1], (0, 0, 1, 0)))
"""
"""A layer adds the state of the token before, as a recurrent or convolutional one would."""


def test_a_model_whose_layers_see_tokens_outside_of_attention_is_refused(prepared):
    folder = with_code(tiny_model(prepared.folder / "shifts"), prepared.folder / "ran")
    (folder / "modeling_own.py").write_text(CODE)
    settings = {"model.trust_remote_code": [str(folder)], "data.packing": False}
    two, one = prepared.case("shifts", 2, **settings), prepared.case("shifts", **settings)
    (refused,), (trained,) = train_all([two], 2), train_all([one])
    assert trained.failure == ""
    assert holds(
        refused.failure, "OwnForCausalLM … slices of a row … scaling.sequence_parallel=2 … sequence_parallel=1"
    )
    assert "\n" not in refused.failure


def measure(rank: int, world: int, port: int, config: Any, rows: PackedDataset, out: Any) -> None:
    """Put a worker's bytes of saved activations, and the range of its noise on embeddings, into ``out``."""
    from raysft.train.finetuning import load_model
    from raysft.train.loss import TokenLoss
    from raysft.train.sequence_group import SequenceGroup
    from raysft.train.step import microbatches

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    group = SequenceGroup.join(world)
    model = TokenLoss(load_model(config, config.model.path), neftune_alpha=ALPHA).train()
    kept, embedded = {}, []

    def pack(saved: torch.Tensor) -> torch.Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    decoder = model.model.model
    decoder.embed_tokens.register_forward_hook(lambda module, inputs, output: embedded.append(output.detach()))
    decoder.layers[0].register_forward_pre_hook(lambda module, inputs: embedded.append(inputs[0].detach()))
    (part,) = microbatches(rows.batch([0, 1, 2, 3]), 4, torch.device("cpu"), group=group)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        total = model(**part, number_of_sources=2)[0]
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    before, after = embedded
    noise = (after - before).abs().reshape(-1, before.shape[-1]).amax(-1)
    out.put((rank, sum(size for place, size in kept.items() if place not in weights), noise.tolist()))
    total.backward()  # the exchanges of the other worker's backward pass need this one's
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


ALPHA = 5.0


def estimated(config: Any, tokens: int) -> float:
    """Estimated bytes of the activations of four rows, of which a worker has so many tokens each."""
    from transformers import AutoConfig

    from raysft.estimate.fake_model import model_without_weights
    from raysft.estimate.trace import trace

    model = model_without_weights(config, AutoConfig.from_pretrained(config.model.path), None)
    return trace(config, model, tokens, 0.5).saved(4)


def measured(config: Any, rows: PackedDataset, world: int) -> tuple[list[int], np.ndarray]:
    """Bytes that each of ``world`` workers keeps, and [tokens] the largest noise on each embedding."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = forks().Queue()
    processes = [forks().Process(target=measure, args=(rank, world, port, config, rows, out)) for rank in range(world)]
    for process in processes:
        process.start()
    try:
        found = sorted(out.get(timeout=60) for _ in processes)
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
    return [size for _, size, _ in found], np.concatenate([noise for *_, noise in found])


def test_workers_that_share_rows_keep_a_part_of_the_activations_and_draw_the_noise_of_whole_examples(prepared):
    config = prepared.case("llama").config
    shared = with_overrides(config, {"scaling.sequence_parallel": 2, "scaling.num_workers": 2})
    (whole,), noise = measured(config, prepared.rows, 1)
    parts, noise_of_parts = measured(shared, prepared.rows, 2)
    guesses = [estimated(each, -(-CAPACITY // parts_of_a_row)) for each, parts_of_a_row in ((config, 1), (shared, 2))]
    print(f"activations: {whole:,} bytes on one worker, {parts} on two; estimated {guesses}")
    assert max(parts) < 0.6 * whole
    assert guesses[1] / guesses[0] == pytest.approx(sum(parts) / 2 / whole, rel=0.02)
    positions = prepared.rows.batch([0, 1, 2, 3])["position_ids"].reshape(-1)
    begins = [*np.flatnonzero(positions == 0), len(positions)]
    lengths = np.repeat(np.diff(begins), np.diff(begins))
    bound = ALPHA / np.sqrt(lengths * 64)
    for each in (noise, noise_of_parts):
        assert (each <= 1.001 * bound).all()
        assert (each > 0.8 * bound).all()
