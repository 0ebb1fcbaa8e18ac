"""A training that resumes from a checkpoint equals one that was never interrupted."""

import json
from pathlib import Path

import numpy as np
import pytest

from raysft.storage.path import StoragePath
from raysft.telemetry.events import EvaluationDone, PreemptionNotice, SetupDone, TrainingEnded
from raysft.train.checkpoint import catalog
from raysft.train.checkpoint.cursor import Cursor
from raysft.train.checkpoint.resume import ResumePoint
from tests.training import STEPS, Case, Result, make_config, prepare, rows_of, train_all

HALF = STEPS // 2
PURE = {"model.dtype": "bfloat16", "train.pure_bf16": True}
PARTITIONED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""Settings of DeepSpeed with which ZeRO-3 keeps no weight whole, however small."""
WAYS = {
    "zero 0": {"zero_stage": 0},
    "zero 1": {"zero_stage": 1},
    "zero 2": {"zero_stage": 2},
    "zero 3": {"zero_stage": 3},
    "offload": {"zero_stage": 2, "offload": {"optimizer": "cpu"}},
    "lora": {"finetuning": "lora", "zero_stage": 2},
    "4 bits, zero 3": {
        "finetuning": "lora",
        "zero_stage": 3,
        "settings": {"model.quantization": "4bit", "train.deepspeed": PARTITIONED},
    },
    "dropout": {"finetuning": "lora", "settings": {"model.lora.dropout": 0.2}},
    "bfloat16": {"zero_stage": 2, "settings": {"model.dtype": "bfloat16"}},
    "asft": {"loss": "asft", "asft_alpha": 2.0, "zero_stage": 2},
    "asft on zero 3": {"loss": "asft", "asft_alpha": 2.0, "zero_stage": 3},
    "asft with lora": {"loss": "asft", "asft_alpha": 2.0, "finetuning": "lora"},
    "asft with pissa": {"loss": "asft", "finetuning": "lora", "settings": {"model.lora.pissa": True}},
    "pure bf16": {"zero_stage": 2, "settings": PURE},
    "pure bf16 without zero": {"zero_stage": 0, "settings": PURE},
    "muon": {"optimizer": "muon"},
    "lion": {"optimizer": "lion", "zero_stage": 3, "learning_rate": 1e-3},
    "8 bits": {"optimizer": "adamw_8bit", "zero_stage": 2},
    "8 bits, zero 3": {"optimizer": "adamw_8bit", "zero_stage": 3},
    "averages": {"optimizer": "schedulefree_adamw", "zero_stage": 2, "schedule": "constant"},
    "adafactor": {"optimizer": "adafactor"},
    "adam_mini": {"optimizer": "adam_mini"},
    "galore": {"optimizer": "galore", "optimizer_options": {"rank": 4, "update_proj_gap": 3}},
    "apollo": {"optimizer": "apollo", "optimizer_options": {"rank": 4, "update_proj_gap": 3}},
}
SINGLE: tuple[str, ...] = ()
"""Ways that support one worker only."""
ROUNDED = ("bfloat16", "8 bits", "8 bits, zero 3")
"""Ways with numbers of few bits."""
SEEDED = ("dropout",)
"""Ways that draw random numbers per worker, which differ with another number of workers."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("checkpoints"))


def case(prepared, way: str, workers: int, **more) -> Case:
    folder, model, manifest = prepared
    options = {"save_every_steps": HALF, **WAYS[way]}
    config = make_config(folder / f"{way}-{workers}-{len(more)}", model, options.pop("settings", None), **options)
    return Case(config, rows_of(manifest), eval_rows=rows_of(manifest, steps=1), **more)


@pytest.fixture(scope="module")
def uninterrupted(prepared) -> dict[tuple[str, int], tuple[Result, Path]]:
    """Uninterrupted trainings, and the folders of their checkpoints."""
    folder, found = prepared[0], {}
    for workers in (1, 2):
        ways = [way for way in WAYS if workers == 1 or way not in SINGLE]
        kept = [folder / "kept" / f"{way}-{workers}" for way in ways]
        cases = [case(prepared, way, workers, keep=place) for way, place in zip(ways, kept, strict=True)]
        for way, place, result in zip(ways, kept, train_all(cases, workers), strict=True):
            found[way, workers] = result, place
    return found


def resumed(prepared, uninterrupted, workers: int, others: int) -> dict[str, tuple[Result, Result]]:
    """Train the second half of each way with ``others`` workers, from the checkpoint of ``workers``."""
    ways = [way for way, number in uninterrupted if number == workers and (workers == others or way not in SINGLE)]
    cases = [
        case(prepared, way, others, resume=uninterrupted[way, workers][1] / f"checkpoint_{HALF}", keep=None)
        for way in ways
    ]
    results = train_all(cases, others)
    return {way: (uninterrupted[way, workers][0], result) for way, result in zip(ways, results, strict=True)}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_workers_resume_bit_for_bit(prepared, uninterrupted, workers):
    for way, (whole, second) in resumed(prepared, uninterrupted, workers, workers).items():
        assert not second.failure, (way, second.failure)
        assert second.losses == whole.losses[HALF:], way
        assert second.norms == whole.norms[HALF:], way
        assert second.weights.keys() == whole.weights.keys(), way
        for name in whole.weights:
            assert np.array_equal(second.weights[name], whole.weights[name]), (way, name)


@pytest.mark.parametrize(("workers", "others"), [(2, 1), (2, 3)])
def test_another_number_of_workers_resumes_with_the_same_losses(prepared, uninterrupted, workers, others):
    for way, (whole, second) in resumed(prepared, uninterrupted, workers, others).items():
        if way in SEEDED:
            assert np.isfinite(second.losses).all(), way
            continue
        tolerance = 2e-2 if "bf" in way or way in ROUNDED else 1e-4
        np.testing.assert_allclose(second.losses, whole.losses[HALF:], rtol=tolerance, err_msg=way)
        for name in whole.weights:
            np.testing.assert_allclose(
                second.weights[name], whole.weights[name], rtol=tolerance, atol=tolerance, err_msg=f"{way} {name}"
            )


def test_every_weight_is_kept_once(uninterrupted):
    """Each worker writes its own part; together the parts hold the model and its moments, each element once."""
    from safetensors import safe_open

    for way in ("zero 0", "zero 1", "zero 2", "zero 3", "lora"):
        result, kept = uninterrupted[way, 2]
        sizes: dict[str, int] = {}
        for part in range(2):
            with safe_open(kept / f"checkpoint_{HALF}" / f"part_{part}.safetensors", "np") as file:
                assert list(file.keys()), (way, part)
                for key in file.keys():  # noqa: SIM118  # no mapping
                    kind, _, name = key.split(":", 2)
                    sizes[f"{kind}:{name}"] = sizes.get(f"{kind}:{name}", 0) + file.get_slice(key).get_shape()[0]
        kinds = {key.split(":")[0] for key in sizes}
        assert kinds == {"weight", "exp_avg", "exp_avg_sq"}, way
        trained = sum(size for key, size in sizes.items() if key.startswith("weight:"))
        assert trained == next(event for event in result.events if isinstance(event, SetupDone)).trained_parameters
        assert all(
            sizes[key.replace("weight:", "exp_avg:")] == sizes[key] for key in sizes if key.startswith("weight:")
        )


def test_a_preemption_notice_leads_to_a_checkpoint(prepared, uninterrupted, tmp_path):
    config = make_config(prepared[0] / "leaving", prepared[1], zero_stage=2)
    [result] = train_all([Case(config, rows_of(prepared[2]), keep=tmp_path, leaves_in=2)], 2)
    assert [event.step for event in result.events if isinstance(event, PreemptionNotice)] == [2], "once, to all workers"
    assert [folder.name for folder in catalog.complete(tmp_path)] == ["checkpoint_2"]
    assert result.losses == uninterrupted["zero 2", 2][0].losses


def test_checkpoints_by_time_resume_bit_for_bit_and_all_workers_write_them_together(prepared, tmp_path):
    def by_time(name: str, **more) -> Case:
        options = {"save_every_minutes": more.pop("minutes", 15)}
        config = make_config(prepared[0] / name, prepared[1], zero_stage=2, **options)
        return Case(config, rows_of(prepared[2]), **more)

    [often, apart, short] = train_all(
        [
            by_time("often", minutes=1e-6, keep=tmp_path / "often"),
            # The first worker's clock shows 18 minutes in the third step; the other's is hours ahead in each.
            by_time("apart", keep=tmp_path / "apart", clocks=(6.0, 500.0)),
            by_time("short", keep=tmp_path / "short"),
        ],
        2,
    )
    assert not (tmp_path / "short").exists(), "a shorter run writes none"
    assert [folder.name for folder in catalog.complete(tmp_path / "apart")] == ["checkpoint_3"]
    cursors = [Cursor.read(folder) for folder in catalog.complete(tmp_path / "often")]
    assert [(cursor.step, cursor.temporary) for cursor in cursors] == [(3, True), (2, True), (1, True)]
    [second] = train_all([by_time("second", resume=tmp_path / "often" / "checkpoint_2")], 2)
    assert often.losses == apart.losses == short.losses
    assert (second.losses, second.norms) == (often.losses[2:], often.norms[2:])
    for name, weights in often.weights.items():
        assert np.array_equal(second.weights[name], weights), name


def test_what_is_asked_to_stop_while_its_model_is_written_is_saved_and_only_writes_the_model_again(prepared, tmp_path):
    def case(name: str, **more) -> Case:
        config = make_config(prepared[0] / name, prepared[1], zero_stage=2)
        return Case(config, rows_of(prepared[2]), **more)

    # Two evaluations ask before each of their batches, then each step asks, and the end of the training before it writes.
    asked = 2 * sum(1 for _ in rows_of(prepared[2]).steps(0, 0, 2)) + STEPS + 2
    folder = tmp_path / "kept"
    first, later = train_all(
        [
            case("asked", keep=folder, asked=(asked, 0), writes_until_saved=True),
            case("killed", resume=folder / f"checkpoint_{STEPS}"),
        ],
        2,
    )
    (checkpoint,) = catalog.complete(folder)
    assert Cursor.read(checkpoint).temporary
    assert [type(event) for event in first.events].count(TrainingEnded) == 1, "there was time enough"
    assert not [event for event in later.events if isinstance(event, EvaluationDone)], "its results are known"
    assert later.evaluation == first.evaluation
    assert later.evaluation
    assert first.weights.keys() == later.weights.keys()
    assert all(np.array_equal(later.weights[name], first.weights[name]) for name in first.weights)


def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_used(prepared, uninterrupted, tmp_path):
    import shutil

    _, kept = uninterrupted["zero 2", 2]
    shutil.copytree(kept, tmp_path / "kept")
    newer, older = (folder.local for folder in catalog.complete(tmp_path / "kept"))
    file = newer / "part_1.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(bytes(content))
    assert catalog.newest(tmp_path / "kept") == ResumePoint.of(newer), "its sizes are right"
    with pytest.raises(AssertionError, match="a worker failed"):
        train_all([case(prepared, "zero 2", 1, resume=newer)], 1)
    assert json.loads((newer / catalog.DAMAGED).read_text()) == {"file": "part_1.safetensors"}
    assert catalog.newest(tmp_path / "kept") == ResumePoint.of(older)


@pytest.mark.parametrize("missing", ["part_1.safetensors", "part_1.json", "state_0.pt", "cursor.json"])
def test_an_incomplete_checkpoint_does_not_count(uninterrupted, tmp_path, missing):
    import shutil

    _, kept = uninterrupted["zero 2", 2]
    shutil.copytree(kept, tmp_path / "kept")
    newer, older = (folder.local for folder in catalog.complete(tmp_path / "kept"))
    (newer / missing).unlink()
    assert list(catalog.complete(tmp_path / "kept")) == [StoragePath.of(older)]
    (older / "part_0.safetensors").write_bytes(b"short")
    assert catalog.newest(tmp_path / "kept") is None
