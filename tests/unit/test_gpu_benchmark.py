"""The program that measures a GPU, on a CPU."""

from __future__ import annotations

import json
import math

import pytest

from tests.benchmarks.gpu import TINY, Losses, main


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
