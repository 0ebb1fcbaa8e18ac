"""The same numbers however rows are packed, split over workers, accumulated, or partitioned by ZeRO.

Every case trains the same rows of the same examples, in a process group of its own, without Ray.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from raysft.config import with_overrides
from raysft.data.rows.packed_dataset import PackedDataset
from raysft.data.shards.manifest import Manifest
from raysft.data.types import IGNORE_INDEX
from raysft.telemetry.events import StepRecord
from raysft.train.objective import Objective
from tests.training import (
    SEQUENCE_LENGTH,
    STEPS,
    TOLERANCE,
    Case,
    assert_same,
    examples_of,
    make_config,
    plain_model,
    plain_training,
    prepare,
    rows_of,
    train,
    train_all,
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, Path, Manifest]:
    """A tiny model, and shards of some conversations: (folder, model, manifest)."""
    return prepare(tmp_path_factory.mktemp("invariants"))


@pytest.fixture(scope="module")
def reference(prepared):
    """The training that others are compared with: one worker, micro-batches of four rows, no ZeRO."""
    folder, model, manifest = prepared
    return train(make_config(folder, model, micro_batch_size=4), rows_of(manifest))


def test_training_equals_a_plain_loop_over_single_examples(prepared, reference):
    _, model, manifest = prepared
    rows = rows_of(manifest)
    assert max(len(rows.row_plan.row(row)) for row in range(rows.row_plan.rows)) > 1, (
        "rows must be packed for this to say anything"
    )
    losses, norms, weights = plain_training(plain_model(model), rows)
    assert_same((*reference[:3], {}), (losses, norms, weights, {}))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ten_steps_over_epochs_that_do_not_fill_their_last_one_equal_a_plain_loop(prepared, world):
    folder, model, manifest = prepared
    rows = rows_of(manifest, steps=10, epochs=3)
    assert rows.row_plan.steps == 10
    assert 0 < rows.row_plan.step_rows[:-1].min() < 4, "each epoch fills its last step"
    losses, norms, weights = plain_training(plain_model(model), rows)
    ours = train(make_config(folder, model, micro_batch_size=4 // world, max_steps=10, epochs=3), rows, world=world)
    # Over ten steps of Adam, rounding grows more than over four.
    assert_same((*ours[:3], {}), (losses, norms, weights, {}), tolerance=1e-4)
    np.testing.assert_allclose(ours.losses, losses, rtol=TOLERANCE)
    logged = [event.rows for event in ours.events if isinstance(event, StepRecord)]
    assert logged == np.cumsum(rows.row_plan.step_rows).tolist()


def test_packed_rows_have_the_logits_of_their_examples_alone(prepared):
    from raysft.train.finetuning import load_model

    folder, path, manifest = prepared
    model = load_model(make_config(folder, path), str(path)).eval()
    rows = rows_of(manifest)
    compared = 0
    for number in range(4):
        batch = rows.batch([number])
        ids, positions = (torch.as_tensor(batch[name], dtype=torch.long) for name in ("input_ids", "position_ids"))
        with torch.no_grad():
            packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        at = 0
        for example, _ in examples_of(batch, 0):
            with torch.no_grad():
                alone = model(input_ids=example[None], use_cache=False).logits[0]
            torch.testing.assert_close(packed[at : at + len(example)], alone, rtol=TOLERANCE, atol=TOLERANCE)
            at += len(example)
            compared += 1
    assert compared > 8


def test_packed_and_unpacked_losses_are_equal(prepared):
    from raysft.train.finetuning import load_model
    from raysft.train.loss import TokenLoss
    from raysft.train.step import microbatches

    folder, path, manifest = prepared
    model = TokenLoss(load_model(make_config(folder, path), str(path))).eval()
    totals = []
    for packing in (True, False):
        rows = PackedDataset(
            (f"{manifest.directory}/manifest.parquet",),
            SEQUENCE_LENGTH,
            4,
            layout="packed" if packing else "single",
            shuffle=False,
        )
        with torch.no_grad():
            losses = [
                model(**part)[0].item()
                for batch in rows.steps(0, 0, 1)
                for part in microbatches(batch, 4, torch.device("cpu"))
            ]
        totals.append(sum(losses) / rows.row_plan.step_loss_tokens.sum())
    assert totals[0] == pytest.approx(totals[1], rel=TOLERANCE)


def test_accumulation_does_not_change_the_training(prepared, reference):
    folder, model, manifest = prepared
    assert_same(reference, train(make_config(folder, model, micro_batch_size=1), rows_of(manifest)))
    # Three microbatches, of 2, 1 and 1 rows would be uneven; 3 and 1 are.
    assert_same(reference, train(make_config(folder, model, micro_batch_size=3), rows_of(manifest)))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_do_not_change_the_training(prepared, reference, stage):
    folder, model, manifest = prepared
    config = make_config(folder, model, micro_batch_size=2, zero_stage=stage)
    assert_same(reference, train(config, rows_of(manifest), world=2))


def test_bfloat16_follows_float32_also_without_zero(prepared, reference):
    folder, model, manifest = prepared
    config = with_overrides(make_config(folder, model, micro_batch_size=4), {"model.dtype": "bfloat16"})
    losses = train(config, rows_of(manifest))[0]
    np.testing.assert_allclose(losses, reference[0], rtol=3e-3)


def test_rows_that_cannot_be_read_do_not_blame_those_of_the_step_before(prepared, tmp_path):
    _, model, manifest = prepared
    config = make_config(tmp_path, model, eval_at_start=False)
    (result,) = train_all([Case(config, rows_of(manifest), steps_to_read=2)])
    assert len(result.losses) == 2
    assert "failed in reading the rows of step 3: KeyError: 'no such column'" in result.failure
    assert "its rows" not in result.failure


def test_two_workers_train_like_one(prepared, reference):
    folder, model, manifest = prepared
    assert_same(reference, train(make_config(folder, model, micro_batch_size=1), rows_of(manifest), world=2))


def test_three_workers_with_fillers_train_like_one(prepared, reference):
    folder, model, manifest = prepared
    assert_same(
        reference, train(make_config(folder, model, micro_batch_size=2, zero_stage=2), rows_of(manifest), world=3)
    )


def test_lora_trains_alike_on_two_workers_and_with_zero3(prepared):
    folder, model, manifest = prepared
    one = train(make_config(folder, model, finetuning="lora", micro_batch_size=4), rows_of(manifest))
    two = train(
        make_config(folder, model, finetuning="lora", micro_batch_size=2, zero_stage=2), rows_of(manifest), world=2
    )
    assert_same(one, two)
    three = train(
        make_config(folder, model, finetuning="lora", micro_batch_size=1, zero_stage=3), rows_of(manifest), world=2
    )
    assert_same(one, three)


@pytest.mark.parametrize(
    "objective",
    [Objective(), Objective("dft"), Objective("eaft", z_loss=0.01), Objective(label_smoothing=0.1)],
    ids=["cross_entropy", "dft", "eaft and z", "smoothed"],
)
def test_chunked_logits_give_the_same_loss_and_gradient(prepared, monkeypatch, objective):
    from raysft.train import loss as loss_module
    from raysft.train.finetuning import load_model
    from raysft.train.loss import TokenLoss
    from raysft.train.step import microbatches

    folder, path, manifest = prepared
    part = next(iter(microbatches(rows_of(manifest).batch(range(4)), 4, torch.device("cpu"))))
    found = []
    for chunk, most in ((10_000, None), (7, None), (16, 4 * SEQUENCE_LENGTH)):
        monkeypatch.setattr(loss_module, "CHUNK_TOKENS", chunk)
        model = TokenLoss(load_model(make_config(folder, path), str(path)), objective, max_tokens=most)
        correct = model(**part, score=True)[2]
        total = model(**part)[0]
        total.backward()
        found.append((total.item(), int(correct), {n: p.grad for n, p in model.named_parameters()}))
    for total, correct, gradients in found[1:]:
        assert total == pytest.approx(found[0][0], rel=TOLERANCE)
        assert correct == found[0][1]
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][2][name], rtol=TOLERANCE, atol=TOLERANCE)


def test_weights_and_losses_of_sources_follow_their_formulas_and_gradients_too(prepared):
    """Against the plain formula in float64: Σ w·l / Σ w over a step, and the mean of each source."""
    from raysft.train.finetuning import load_model
    from raysft.train.loss import TokenLoss
    from raysft.train.step import microbatches

    folder, path, manifest = prepared
    batch = rows_of(manifest).batch(range(4))
    random = np.random.default_rng(0)
    examples = np.cumsum(batch["position_ids"] == 0, axis=1)
    batch["weights"] = random.choice([0.25, 1.0, 3.0], 50).astype(np.float32)[examples]
    batch["sources"] = random.integers(0, 2, 50).astype(np.int32)[examples]
    (part,) = microbatches(batch, 4, torch.device("cpu"))
    model = TokenLoss(load_model(make_config(folder, path), str(path)))
    total, by_source, _ = model(**part, number_of_sources=2)
    total.backward()
    exact = load_model(make_config(folder, path), str(path)).double()
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(2)]
    for row in range(4):
        at = 0
        for ids, labels in examples_of(batch, row):
            weight, source = float(batch["weights"][row, at]), int(batch["sources"][row, at])
            logits = exact(input_ids=ids[None], use_cache=False).logits[0]
            part_loss = F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE_INDEX, reduction="sum")
            sums[source] = sums[source] + weight * part_loss
            at += len(ids)
    (sums[0] + sums[1]).backward()
    assert by_source.tolist() == pytest.approx([value.item() for value in sums], rel=TOLERANCE)
    assert total.item() == pytest.approx((sums[0] + sums[1]).item(), rel=TOLERANCE)
    for (name, ours), (_, theirs) in zip(model.model.named_parameters(), exact.named_parameters(), strict=True):
        np.testing.assert_allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, err_msg=name)


def test_two_sources_train_alike_on_one_worker_and_two_and_their_losses_are_logged(prepared, tmp_path):
    folder, model, manifest = prepared
    path = f"{manifest.directory}/manifest.parquet"
    rows = PackedDataset(
        (path, path), SEQUENCE_LENGTH, 4, seed=3, max_steps=STEPS, mixing="first_exhausted", mixing_weights=(1.0, 3.0)
    )
    one = train(make_config(folder, model, micro_batch_size=4), rows)
    two = train(make_config(folder, model, micro_batch_size=2), rows, world=2)
    assert_same(one, two)
