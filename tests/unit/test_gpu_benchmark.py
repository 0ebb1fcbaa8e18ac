"""The program that measures a GPU, on a CPU."""

from __future__ import annotations

import json
import math

import pytest

from tests.benchmarks.gpu import TINY, Losses, Speed, main


def test_it_measures_a_way_of_training_and_compares_its_losses(tmp_path, capsys):
    file = tmp_path / "found.json"
    options = [
        "--on-cpu",
        "--ways",
        "plain",
        "--rows",
        "4",
        "--micro",
        "2",
        "--examples",
        "2",
        "--steps",
        "2",
        "--json",
        str(file),
    ]
    assert main(options) == 0
    found = json.loads(file.read_text())
    (speed,) = found["speeds"]
    assert speed["way"] == "plain"
    assert speed["tokens_per_second"] == pytest.approx(4 * TINY.tokens / speed["seconds"])
    assert speed["loss"] == pytest.approx(math.log(TINY.vocabulary), rel=0.05), "random weights know nothing"
    assert speed["estimated"] > 0
    assert speed["mfu"] is speed["peak"] is None
    assert [(each["dtype"], each["right"]) for each in found["losses"]] == [("float32", True), ("bfloat16", True)]
    assert found["losses"][0]["difference"] < 1e-6 < found["losses"][1]["difference"]
    assert "plain" in capsys.readouterr().out


def test_losses_that_rounding_does_not_explain_are_wrong():
    assert Losses("fp8", "bfloat16", 0.03).right
    assert not Losses("plain", "bfloat16", 0.03).right
    assert not Losses("plain", "float32", math.nan).right
    assert not Losses("plain", "bfloat16", 0.0, "failed").right


@pytest.mark.parametrize(
    ("speed", "fault"),
    [
        (Speed("plain", mfu=0.5, peak=100, estimated=100, loss=5.0), None),
        (Speed("flash 3", note="needs the package of flash_attn_interface, which is not installed"), None),
        (Speed("plain", note="failed; its error is above", failed=True), "failed"),
        (Speed("plain", mfu=1.2, peak=100, estimated=100, loss=5.0), "MFU of 120.0%"),
        (Speed("plain", mfu=0.5, peak=100, estimated=70, loss=5.0), "memory of 0.70 times"),
        (Speed("compiled", loss=5.2), "loss of 5.2000"),
        (Speed("fp8", loss=math.nan), "loss of nan"),
    ],
)
def test_what_cannot_be_right_is_said(speed, fault):
    found = speed.faults(5.0)
    assert ([fault in each for each in found] == [True]) if fault else not found


def test_without_a_gpu_it_says_so_at_once(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        main([])
    assert "torch finds no GPU" in capsys.readouterr().err


def test_what_there_is_no_time_for_is_not_taken_for_right(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tests.benchmarks.gpu.MINUTES", -1.0)
    assert main(["--on-cpu", "--ways", "plain"]) == 1
    assert "WRONG: no time left" in capsys.readouterr().out
