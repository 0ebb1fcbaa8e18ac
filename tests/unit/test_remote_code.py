"""Code that comes with a model runs only where the model is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from raysft.config import Config, parse, with_overrides
from raysft.models.fingerprint import model_fingerprint
from raysft.models.resolve import find_model
from raysft.storage.run_directory import RunDirectory
from raysft.train.check_model import check_model
from tests.messages import refusal
from tests.tiny import tiny_model, with_code
from tests.training import Case, make_config, prepare, rows_of, train_all


@pytest.fixture
def ran(tmp_path) -> Path:
    """What the code of a model leaves behind when it is run."""
    return tmp_path / "ran"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Where transformers copies code to before it runs it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def model(tmp_path, ran) -> Path:
    return with_code(tiny_model(tmp_path / "own-model"), ran)


def config(path: Path | str, named: object = ()) -> Config:
    model = {"path": str(path), "trust_remote_code": list(named) if isinstance(named, tuple) else named}
    return parse({"model": model, "data": {"train": [{"name": "a", "path": "a.jsonl"}], "sequence_length": 64}})


@pytest.mark.parametrize("named", [(), ("own-model",), ("*",), ("org/model",)])
def test_code_that_is_not_named_is_refused_and_not_run(model, ran, named):
    wanted = config(model, named)
    found = find_model(wanted.model.path, wanted.cache_directory, print)
    told = refusal(lambda: check_model(wanted, found))
    assert f"model.path={model} needs its own code (modeling_own.py)" in told
    assert f"set model.trust_remote_code=[{model}]" in told
    assert not ran.exists()


def test_code_that_is_named_runs(model, ran):
    check_model(config(model, (str(model),)), str(model))
    assert ran.exists()


def test_code_of_a_tokenizer_counts_too(tmp_path, ran):
    folder = tiny_model(tmp_path / "m")
    with_code(folder, ran, model_type="llama", tokenizer=True)
    assert "model.trust_remote_code=[] does not name it" in refusal(lambda: check_model(config(folder), str(folder)))
    assert not ran.exists()


def test_code_that_is_not_needed_is_left_alone_and_that_is_said(tmp_path, ran):
    """Many models that transformers knows by now still bring the code of the time when it did not."""
    folder, lines = with_code(tiny_model(tmp_path / "m"), ran, model_type="llama"), list[str]()
    check_model(config(folder), str(folder), lines.append)
    assert lines == [
        "model: not running its own code, because transformers has classes for it (to run it, use model.trust_remote_code)"
    ]
    assert not ran.exists()


def test_code_out_of_another_repository_needs_that_ones_name_too(tmp_path, ran):
    folder = with_code(tiny_model(tmp_path / "m"), ran, origin="some/where--")
    told = refusal(lambda: check_model(config(folder, (str(folder),)), str(folder)))
    assert "takes its code from some/where, but model.trust_remote_code=" in told
    assert not ran.exists()


def test_trust_is_a_list_of_names():
    told = refusal(lambda: config("m", True))
    assert "model.trust_remote_code=true: list the models that may run their own code" in told
    assert config("m", False).model.trust_remote_code == []


def test_the_code_belongs_to_what_decides_the_numbers(model):
    other, named = config(model, ("another",)), config(model, (str(model),))
    assert config(model).numerics_keys() == other.numerics_keys() != named.numerics_keys()
    before = model_fingerprint(str(model))
    (model / "modeling_own.py").write_text("# other code")
    assert model_fingerprint(str(model)) != before


def test_a_model_with_code_trains_evaluates_generates_and_is_exported(tmp_path, ran):
    """To the same numbers as the class that the code inherits from."""
    folder, llama, manifest = prepare(tmp_path / "data")
    own = with_code(Path(shutil.copytree(llama, tmp_path / "own-model")), ran, tokenizer=True)
    rows, cases = rows_of(manifest), list[Case]()
    for finetuning in ("full", "lora"):
        plain = make_config(folder, llama, finetuning=finetuning)
        named = with_overrides(plain, {"model.path": str(own), "model.trust_remote_code": [str(own)]})
        cases += [Case(plain, rows), Case(named, rows)]
    results = train_all(cases)
    assert ran.exists()
    for as_llama, result, case in ((results[0], results[1], cases[1]), (results[2], results[3], cases[3])):
        assert result.failure == ""
        np.testing.assert_allclose(result.losses, as_llama.losses, rtol=1e-6)
        is_loaded_again(case.config, result.model, tmp_path / f"out-{case.config.model.finetuning}")


def is_loaded_again(config: Config, trained: Path, output: Path) -> None:
    """To evaluate, to generate, and from an export, each time with the model's own class."""
    from transformers import AutoModelForCausalLM

    from raysft.generate.engines import create_engine
    from raysft.models.merging import merge
    from raysft.train.finetuning import load_trained

    model = load_trained(config, trained)
    assert "OwnForCausalLM" in {type(module).__name__ for module in model.modules()}
    (completion,) = create_engine(config, str(trained)).complete(["a"], [[5, 6, 7]])
    assert completion.tokens
    merge(trained, output, runs_code=True)
    assert (output / "modeling_own.py").exists()
    exported = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    assert type(exported).__name__ == "OwnForCausalLM"


def test_an_adapter_does_not_lend_the_trust_in_its_model_to_another_base(tmp_path, model, ran):
    from raysft.generate.engines import create_engine
    from raysft.train.finetuning import load_model

    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(model, elsewhere)
    plain = tiny_model(tmp_path / "plain")
    settings = with_overrides(config(plain), {"model.trust_remote_code": [str(plain)]})
    load_model(settings, str(plain)).save_pretrained("adapter")
    shutil.copytree(plain, "adapter", dirs_exist_ok=True, ignore=shutil.ignore_patterns("model*", "config.json"))
    described = json.loads(Path("adapter/adapter_config.json").read_text())
    Path("adapter/adapter_config.json").write_text(json.dumps({**described, "base_model_name_or_path": str(elsewhere)}))
    with pytest.raises(ValueError, match="custom code"):
        create_engine(settings, "adapter")
    assert not ran.exists()
    # Trained on, it names the model that it is trained on.
    model = load_model(settings, str(plain), torch.device("cpu"), "adapter")
    assert model.peft_config["default"].base_model_name_or_path == str(plain)


def test_an_export_takes_the_name_from_the_runs_config(tmp_path, model, ran):
    from raysft.run.export import export
    from raysft.train.finetuning import load_model

    named = config(model, (str(model),))
    directory = RunDirectory(tmp_path / "run")
    load_model(named, str(model)).save_pretrained(directory.model.local)
    shutil.copytree(
        model, directory.model.local, dirs_exist_ok=True, ignore=shutil.ignore_patterns("model*", "config.json")
    )
    directory.config.write_text(named.to_yaml())
    export(str(directory.path), tmp_path / "out")
    assert (tmp_path / "out" / "modeling_own.py").exists()


def test_an_adapter_lends_the_trust_to_no_other_base(tmp_path, model):
    from raysft.config import parse
    from raysft.models.remote_code import runs_code

    other, merged = tmp_path / "other", tmp_path / "cache" / "models" / "merged-1"
    for folder in (other, merged):
        shutil.copytree(model, folder)
    settings = {"path": str(model), "trust_remote_code": [str(model)]}
    data = {"train": [{"name": "a", "path": "a"}], "cache": str(tmp_path / "cache")}
    named = parse({"model": settings, "data": data})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for base, trusted in ((model, True), (merged, True), (other, False)):
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
        assert runs_code(named, adapter) is trusted, base
    assert runs_code(named, other), "what the run has trained is a whole model"
    elsewhere = with_overrides(named, {"generate.model": str(other)})
    assert not runs_code(elsewhere, other), "another model, that nobody has named"
    assert runs_code(with_overrides(elsewhere, {"model.trust_remote_code": [str(other)]}), other)
