"""Files that come from elsewhere run no code: data, weights, adapters, checkpoints."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from raysft.cli import main
from raysft.config import Source, load, parse, with_overrides
from raysft.data.sources.files import find_files
from raysft.data.sources.formats import to_examples
from raysft.data.sources.pickle_guard import PICKLE_EXTENSION, read_table
from raysft.data.sources.readers import read_raw
from raysft.errors import RequestError
from raysft.models.fingerprint import model_fingerprint
from raysft.storage.path import StoragePath
from raysft.train.check_model import check_model
from raysft.train.checkpoint import catalog, parts
from tests.messages import refusal
from tests.tiny import tiny_tokenizer

RAN = Path("ran")
"""What the code in these files would leave behind."""
CONFIG = {"model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a.jsonl"}], "sequence_length": 64}}


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(RAN.absolute()),)


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not RAN.exists(), "code out of a file has run"


def read(path: str) -> list[Any]:
    source = Source(name="s", path=path)
    records = ((file.path, raw) for file in find_files(source) for _, _, raw in read_raw(file))
    return [item for item, _ in to_examples(records, source)]


def pickled_column(nested: bool) -> pa.Table:
    """A table as Ray Data writes one that holds Python objects; the import registers their type with pyarrow."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

    column = ArrowPythonObjectArray.from_objects([Code()])
    if nested:
        column = pa.StructArray.from_arrays([pa.array(["a"]), column], ["role", "content"])
    return pa.table({"text": ["a"], "x": column})


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream"])
def test_pickled_objects_in_a_data_file_are_refused(kind, nested):
    table = pickled_column(nested)
    if kind == "parquet":
        pq.write_table(table, "a.parquet")
    else:
        with (pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream)("a.arrow", table.schema) as writer:
            writer.write_table(table)
    told = refusal(lambda: read("a.*"))
    assert "cannot be read (column 'x' contains pickled Python objects, which could run code)" in told
    if kind == "parquet":
        with pytest.raises(pa.ArrowInvalid, match="pickled"):
            read_table(StoragePath.of("a.parquet"))


def test_pickled_objects_are_known_by_their_name_where_nobody_registered_the_type():
    field = pa.field(
        "x", pa.list_(pa.field("item", pa.large_binary(), metadata={"ARROW:extension:name": PICKLE_EXTENSION}))
    )
    pq.write_table(pa.table([[[b"x"]]], schema=pa.schema([field])), "a.parquet", store_schema=True)
    assert "contains pickled Python objects" in refusal(lambda: read("a.parquet"))


@pytest.mark.parametrize("name", ["a.pkl", "a.pickle", "a.pt", "a.npy", "a.joblib", "a.bin"])
def test_kinds_of_files_that_hold_pickles_are_unknown(name):
    Path(name).write_bytes(pickle.dumps(Code()))
    assert "unknown kind of file" in refusal(lambda: read(name))
    assert "unknown kind of file" in refusal(lambda: read("."))


CALL = "!!python/object/apply:os.mkdir [ran]"


@pytest.mark.parametrize("verb", ["run", "check", "tune"])
def test_yaml_that_calls_python_is_refused_in_one_line(capsys, verb):
    Path("c.yaml").write_text(f"{yaml.safe_dump(CONFIG)}train: {CALL}\n")
    assert main([verb, "c.yaml"]) == 2
    told = capsys.readouterr().err
    assert "c.yaml:8: invalid YAML (could not determine a constructor" in told
    assert told.count("\n") == 1
    Path("c.yaml").write_text(yaml.safe_dump(CONFIG))
    assert main([verb, "c.yaml", f"train={CALL}"]) == 2
    assert "the value is not valid YAML" in capsys.readouterr().err


def test_a_run_directorys_config_and_a_corpus_that_call_python_are_refused(capsys):
    from raysft.run.ownership import check_ownership
    from raysft.storage.run_directory import RunDirectory

    Path("c.yaml").write_text(yaml.safe_dump(CONFIG))
    config = load("c.yaml")
    config.run_directory.mkdir(parents=True)
    (config.run_directory / "config.yaml").write_text(f"train: {CALL}\n")
    assert "is not a config of this raysft version" in refusal(
        lambda: check_ownership(RunDirectory(config.run_directory), config)
    )
    assert main(["report", str(config.run_directory)]) == 2
    assert "not a YAML mapping" in capsys.readouterr().err
    Path("corpus.yaml").write_text(f"- [a, {CALL}]\n- [b, c]\n")
    assert [type(each).__name__ for each in read("corpus.yaml")] == ["Rejected", "Example"]


def test_a_registry_is_json():
    Path("dataset_info.json").write_text(f"a: {CALL}")
    Path("c.yaml").write_text("model: {path: m}\ndata: {registry: dataset_info.json, train: [{name: a}]}\n")
    from raysft.data.sources.registry import resolve_source

    config = load("c.yaml")
    assert "invalid JSON" in refusal(lambda: resolve_source(config, config.data.train[0]))


def in_bin(model: Path, name: str = "model.safetensors", into: str = "pytorch_model.bin", **more: Any) -> Path:
    """A copy of a model or adapter whose weights are of the old kind."""
    folder = Path("copy")
    shutil.copytree(model, folder)
    weights = load_file(folder / name)
    (folder / name).unlink()
    torch.save({**weights, **more}, folder / into)
    return folder


def test_old_weights_of_tensors_alone_are_taken(model):
    folder = in_bin(model)
    check_model(parse(CONFIG), str(folder))
    before = model_fingerprint(str(folder))
    torch.save(dict.fromkeys(load_file(model / "model.safetensors")), folder / "pytorch_model.bin")
    assert model_fingerprint(str(folder)) != before


def test_weights_that_run_code_are_refused_before_anything_is_started(model):
    folder = in_bin(model, x=Code())
    message = "pytorch_model.bin is damaged, or holds more than tensors"
    assert message in refusal(lambda: check_model(parse(CONFIG), str(folder)))
    (folder / "pytorch_model.bin").write_bytes(b"no weights")
    assert message in refusal(lambda: check_model(parse(CONFIG), str(folder)))


def test_what_loads_models_runs_no_code_out_of_weights(model):
    """Not only what is checked before: every way in which raysft loads a model."""
    from raysft.generate.engines import create_engine
    from raysft.models.adapters import merge_adapters
    from raysft.train.finetuning import load_model, load_trained

    config, folder = parse(CONFIG), in_bin(model, x=Code())
    for load_it in (
        lambda: load_model(config, str(folder)),
        lambda: load_trained(config, folder),
        lambda: create_engine(config, str(folder)),
        lambda: merge_adapters(str(folder), [], Path("out")),
    ):
        with pytest.raises(pickle.UnpicklingError):
            load_it()


def test_an_adapter_in_a_pickle_is_refused_and_runs_no_code(model):
    from raysft.generate.engines import create_engine
    from raysft.models.adapters import find_adapter
    from raysft.models.merging import merge
    from raysft.train.finetuning import load_model, load_trained

    config = with_overrides(parse(CONFIG), {"model.lora.rank": 2})
    load_model(config, str(model)).save_pretrained("adapter")
    tiny_tokenizer().save_pretrained("adapter")
    folder = in_bin(Path("adapter"), "adapter_model.safetensors", "adapter_model.bin", x=Code())
    save_file({}, folder / "other.safetensors")
    config = with_overrides(config, {"model.adapters": [str(folder)]})
    assert "has no weights (adapter_model.safetensors)" in refusal(lambda: find_adapter(config, str(model), print))
    for load_it in (
        lambda: load_trained(config, folder),
        lambda: create_engine(config, str(folder)),
        lambda: merge(folder, Path("out")),
    ):
        with pytest.raises((pickle.UnpicklingError, RequestError)):
            load_it()


def test_a_checkpoint_that_runs_code_is_passed_over():
    """Its digest may be right: who writes the one can write the other."""
    folder = Path("checkpoint_2")
    folder.mkdir()
    torch.save({"random": torch.zeros(1)}, folder / "state_0.pt")
    assert list(parts.read_state(StoragePath.of(folder), StoragePath.of(folder), 0)) == ["random"]
    torch.save({"random": torch.zeros(1), "x": Code()}, folder / "state_0.pt")
    with pytest.raises(catalog.CorruptCheckpoint, match=r"state_0\.pt holds more than tensors and plain values"):
        parts.read_state(StoragePath.of(folder), StoragePath.of(folder), 0)
    assert (folder / catalog.DAMAGED).exists()


def test_a_chat_template_stays_in_its_sandbox():
    from jinja2.exceptions import SecurityError

    from raysft.data.tokenization.chat_template import chat_template

    template = chat_template("{{ messages.__class__.__base__.__subclasses__() }}", {})
    with pytest.raises(SecurityError):
        template.render([{"role": "user", "content": "a"}], [], False)
