"""``raysft export``: of runs, of their checkpoints and of any model, and what it refuses before it writes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from raysft.cli import main
from raysft.config import parse
from raysft.errors import RunFailed
from raysft.models.fingerprint import model_fingerprint
from raysft.models.peft_internals import TRAINED
from raysft.run import exportable
from raysft.run.export_folder import draft
from raysft.storage.path import StoragePath
from raysft.train.checkpoint.cursor import Cursor
from raysft.train.checkpoint.parts import Snapshot, write
from raysft.train.restore import for_reading
from tests.hub_server import hub_server
from tests.hub_uploads import Account
from tests.messages import holds
from tests.objects import s3_server
from tests.processes import forked
from tests.tiny import tiny_model, with_code
from tests.unit.test_hub import use

IDS = torch.arange(40)[None]
END = "<|im_end|>"


def plain(folder: Path, dtype: str = "auto"):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def write_checkpoint(
    run: Path, model: Path, step: int, workers: int = 2, trained: Any = None
) -> dict[str, torch.Tensor]:
    """Write a checkpoint as that many workers do, each of which keeps a piece of each weight; return its weights.

    Args:
        trained: a model with an adapter, whose weights are in the checkpoint alone.
    """
    torch.manual_seed(step)
    weights = {
        name: torch.randn_like(weight) * 0.1
        for name, weight in (trained or plain(model, "float32")).named_parameters()
        if weight.requires_grad
    }
    folder = run / "checkpoints" / f"checkpoint_{step:08d}_abcd"
    for rank in range(workers):
        pieces = {}
        for name, weight in weights.items():
            size = -(-weight.numel() // workers)
            piece = weight.detach().view(-1)[rank * size : (rank + 1) * size].clone()
            pieces[f"weight:{rank * size}:model.{name}"] = piece
            pieces[f"exp_avg:{rank * size}:model.{name}"] = torch.zeros_like(piece)
        cursor = Cursor(step, 4 * step, 100, {"the model": model_fingerprint(str(model))}, workers=workers)
        write(Snapshot(rank, pieces, {}, cursor), folder)
    return weights


@pytest.fixture
def run(tmp_path, model) -> Path:
    """The directory of a run in bfloat16 on a base whose end of turn is no EOS token, which was killed before its end."""
    folder = tmp_path / "runs" / "sums"
    folder.mkdir(parents=True)
    config = parse(
        {
            "run": {"name": "sums", "storage": "elsewhere"},
            "model": {"path": str(model), "dtype": "bfloat16", "finetuning": "full"},
            "data": {"train": [{"name": "a", "path": "a"}], "sequence_length": 64, "default_system": "Be kind."},
        }
    )
    (folder / "config.yaml").write_text(config.to_yaml())
    (folder / "plan.json").write_text(json.dumps({"turns": {"end_tokens": {END: 9}, "inner_end_tokens": []}}))
    return folder


def exported(source: Path | str, output: Path, *options: str) -> Path:
    assert main(["export", str(source), "--output", str(output), *options]) == 0
    return output


def refused(capsys, *arguments: str) -> str:
    assert main(["export", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("raysft: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("name", ["7", "checkpoint_00000007_abcd"])
def test_a_checkpoint_is_exported_in_the_type_of_its_training(run, model, tmp_path, monkeypatch, name):
    from transformers import AutoTokenizer

    weights = write_checkpoint(run, model, 7)
    write_checkpoint(run, model, 9)
    monkeypatch.chdir(tmp_path)
    output = exported(f"runs/sums/checkpoints/{name}", tmp_path / "out")
    written = plain(output)
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    for key, weight in written.named_parameters():
        assert torch.equal(weight, weights[key].to(torch.bfloat16)), key
    assert AutoTokenizer.from_pretrained(output).eos_token == END
    assert written.generation_config.eos_token_id == AutoTokenizer.from_pretrained(output).eos_token_id
    assert not [path for path in output.iterdir() if path.name.startswith(".")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"], "nothing is left elsewhere"


def test_a_checkpoint_in_an_object_store_is_exported_in_another_type_and_in_parts(run, model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    weights = write_checkpoint(run, model, 7, workers=3)
    with s3_server() as server:
        place = StoragePath.of(server.uri(f"{tmp_path.name}/sums"))
        place.upload(run)
        step = (place / "checkpoints" / "7").location
        output = exported(step, tmp_path / "out", "--dtype", "float32", "--shard-size", "60KB")
    files = sorted(output.glob("model-*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size < 60_000 + 4_000 or len(load_file(path)) == 1 for path in files)
    for key, weight in plain(output).named_parameters():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, weights[key].to(torch.bfloat16).float()), (
            "the weights that the training computed with"
        )


@pytest.mark.parametrize("remote", [False, True])
def test_a_checkpoint_that_its_run_removes_meanwhile_is_one_line(run, model, tmp_path, monkeypatch, capsys, remote):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for step in (2, 4):
        write_checkpoint(run, model, step)
    with s3_server() if remote else nullcontext() as server:
        place = StoragePath.of(server.uri(f"{tmp_path.name}/sums") if server else run)
        if server:
            place.upload(run)

        def removed(*arguments: Any) -> Any:
            (place / "checkpoints" / "checkpoint_00000002_abcd").remove()
            return whole_job(*arguments)

        whole_job = exportable._job
        monkeypatch.setattr(exportable, "_job", removed)
        said = refused(capsys, (place / "checkpoints" / "2").location, "--output", str(tmp_path / "out"))
    assert said.startswith(
        f"raysft: error: {place}/checkpoints/checkpoint_00000002_abcd: its run deleted it during the export"
    )
    assert said.endswith(f"; export {place}/checkpoints/4, the newest other one")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_cannot_be_exported_is_one_line_with_one_that_can(run, model, tmp_path, capsys):
    checkpoints, out = run / "checkpoints", str(tmp_path / "out")
    said = refused(capsys, str(checkpoints / "3"), "--output", out)
    assert holds(said, f"raysft: error: {checkpoints}/3: no such checkpoint; the run has no complete checkpoint")
    for step in (4, 6, 8):
        write_checkpoint(run, model, step)
    assert holds(
        refused(capsys, str(checkpoints / "3"), "--output", out),
        "raysft: error: … no such checkpoint; there are 4, 6, 8",
    )
    assert "give one of them" in refused(capsys, str(checkpoints), "--output", out)
    assert holds(
        refused(capsys, str(run), "--output", out),
        f"raysft: error: … no trained model; … its newest checkpoint, {checkpoints}/8",
    )
    (checkpoints / "checkpoint_00000008_abcd" / "part_1.json").unlink()
    said = refused(capsys, str(checkpoints / "8"), "--output", out)
    assert holds(said, f"raysft: error: … is incomplete or damaged; export the newest complete one, {checkpoints}/6")
    file = checkpoints / "checkpoint_00000006_abcd" / "part_1.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    said = refused(capsys, str(checkpoints / "6"), "--output", out)
    assert holds(said, f"raysft: error: … part_1.safetensors is not what was written; export {checkpoints}/4")
    assert not Path(out).exists()
    weights = load_file(model / "model.safetensors")
    other = tiny_model(tmp_path / "other", seed=5)
    shutil.copy(other / "model.safetensors", tmp_path / "kept")
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] + 1}, other / "model.safetensors")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(model), str(other)))
    said = refused(capsys, str(checkpoints / "4"), "--output", out)
    assert holds(said, f"raysft: error: … the model that it was trained from has changed ({other}); restore its files")
    assert not Path(out).exists()


def test_the_adapter_of_a_checkpoint_is_merged_into_any_model(run, model, tmp_path, capsys):
    from raysft.train.finetuning import load_model

    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("finetuning: full", "finetuning: lora"))
    config = parse(yaml.safe_load((run / "config.yaml").read_text()))
    out, checkpoints = str(tmp_path / "out"), run / "checkpoints"
    said = refused(capsys, str(model), "--adapters", str(run), "--output", out)
    assert holds(said, f"raysft: error: {run}/model: contains no trained model; train first (raysft train CONFIG)")
    write_checkpoint(run, model, 2, trained=load_model(for_reading(config), str(model)))
    said = refused(capsys, str(model), "--adapters", str(run), "--output", out)
    assert holds(
        said, f"raysft: error: {run}/model: contains no trained model; … its newest checkpoint, {checkpoints}/2"
    )
    said = refused(capsys, str(model), "--adapters", str(checkpoints / "3"), "--output", out)
    assert holds(said, f"raysft: error: {checkpoints}/3: no such checkpoint; there are 2")
    assert not Path(out).exists()
    alone = exported(checkpoints / "2", tmp_path / "alone", "--dtype", "float32")
    both = exported(model, tmp_path / "both", "--adapters", str(checkpoints / "2"), "--dtype", "float32")
    wanted, written = (load_file(folder / "model.safetensors") for folder in (alone, both))
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], weight) for name, weight in wanted.items())
    assert not torch.equal(logits(plain(both)), logits(plain(model)))
    kept = exported(model, tmp_path / "kept", "--adapters", str(checkpoints / "2"), "--no-merge")
    assert json.loads((kept / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model)
    for output in (both, kept):
        assert not [path for path in output.iterdir() if path.name.startswith(".")]
    write_checkpoint(whole_run(run), model, 2)
    said = refused(capsys, str(model), "--adapters", str(run.parent / "whole" / "checkpoints" / "2"), "--output", out)
    assert "is a whole model, not an adapter" in said


def whole_run(run: Path) -> Path:
    folder = run.parent / "whole"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("finetuning: lora", "finetuning: full")
    )
    return folder


@pytest.fixture
def adapters(tmp_path, model) -> list[Path]:
    """Two adapters of random numbers, without tokenizers, whose configuration names the base."""
    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        adapted = get_peft_model(plain(model), LoraConfig(target_modules="all-linear", init_lora_weights=False, r=2))
        folders.append(tmp_path / f"adapter{seed}")
        adapted.save_pretrained(folders[-1])
    return folders


def test_adapters_are_merged_into_any_model_in_order(model, adapters, tmp_path):
    wanted = plain(model)
    for adapter in adapters:
        wanted = PeftModel.from_pretrained(wanted, adapter).merge_and_unload()
    both = exported(model, tmp_path / "both", "--adapters", *map(str, adapters))
    torch.testing.assert_close(logits(plain(both)), logits(wanted), rtol=1e-4, atol=1e-4)
    first = exported(adapters[0], tmp_path / "first")  # its base is found by its configuration
    again = exported(first, tmp_path / "again", "--adapters", str(adapters[1]))
    torch.testing.assert_close(logits(plain(again)), logits(wanted), rtol=1e-4, atol=1e-4)
    assert (both / "tokenizer.json").exists()


def test_an_adapter_whose_base_is_gone_is_one_line(model, adapters, tmp_path, capsys):
    path = adapters[0] / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "gone")}))
    said = refused(capsys, str(adapters[0]), "--output", str(tmp_path / "out"))
    assert f"base_model_name_or_path='{tmp_path}/gone' is not a folder here" in said
    assert not (tmp_path / "out").exists()
    exported(model, tmp_path / "out", "--adapters", str(adapters[0]))


def test_the_base_of_a_run_that_was_moved_is_made_again(model, tmp_path, capsys):
    from raysft.models.new_tokens import with_new_tokens
    from raysft.train.finetuning import load_model

    settings = {
        "run": {"name": "words", "storage": str(tmp_path / "first")},
        "model": {"path": str(model), "dtype": "float32", "finetuning": "lora", "new_tokens": {"plain": ["capital"]}},
        "data": {"train": [{"name": "a", "path": "a"}], "sequence_length": 64},
    }
    config = parse(settings)
    extended = with_new_tokens(config, str(model), plain(model).config, print)
    run = tmp_path / "first" / "words"
    trained: Any = load_model(for_reading(config), extended)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    trained.save_pretrained(run / "model", selected_adapters=[TRAINED])
    (run / "config.yaml").write_text(config.to_yaml())
    wanted = load_file(exported(run, tmp_path / "wanted") / "model.safetensors")
    shutil.rmtree(config.cache_directory.local or "")
    (tmp_path / "first").rename(tmp_path / "second")
    moved = tmp_path / "second" / "words"
    written = load_file(exported(moved, tmp_path / "again") / "model.safetensors")
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], weight) for name, weight in wanted.items())
    assert written["model.embed_tokens.weight"].shape[0] > 400
    said = refused(capsys, str(moved), "--output", str(tmp_path / "out"), "--no-merge")
    assert f"the adapter's base is a copy in the cache, {extended}, which exists nowhere else" in said


def test_an_adapter_that_stays_one_names_the_model_that_it_is_exported_for(model, adapters, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    kept = exported(moved, tmp_path / "kept", "--adapters", str(adapters[0]), "--no-merge", "--dtype", "bfloat16")
    assert json.loads((kept / "adapter_config.json").read_text())["base_model_name_or_path"] == str(moved)
    written, own = (load_file(folder / "adapter_model.safetensors") for folder in (kept, adapters[0]))
    assert all(torch.equal(written[name], weight.to(torch.bfloat16)) for name, weight in own.items())
    assert f"the adapter names {moved} as its base" in capsys.readouterr().out
    for arguments, message in (
        ((str(model), "--no-merge"), "is a whole model, not an adapter; remove --no-merge"),
        ((str(model), "--adapters", *map(str, adapters), "--no-merge"), "but there are 2; remove --no-merge"),
        (
            (str(adapters[0]), "--no-merge", "--shard-size", "1GB"),
            "--shard-size applies to whole models, but --no-merge writes an adapter",
        ),
        ((str(model), "--adapters", str(model)), f"--adapters {model}: is a whole model, not an adapter"),
        ((str(tmp_path), "--dtype", "float32"), "contains neither a run's config.yaml nor a model's"),
        ((f"{tmp_path}/none",), f"{tmp_path}/none: no such run directory or model; check the path"),
    ):
        assert message in refused(capsys, *arguments, "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_model_is_copied_or_written_in_another_type_with_all_that_it_has(model, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(model, base)
    weights = load_file(base / "model.safetensors")
    extra = {"mtp.norm.weight": torch.ones(3), "model.buffer": torch.arange(3)}  # what transformers would leave out
    save_file(weights | extra, base / "model.safetensors", metadata={"format": "pt"})
    (base / "LICENSE").write_text("mine")
    copied = exported(base, tmp_path / "copied")
    assert (copied / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    half = exported(base, tmp_path / "half", "--dtype", "float16")
    written = load_file(half / "model.safetensors")
    for name, weight in (weights | extra).items():
        assert torch.equal(written[name], weight.half() if weight.is_floating_point() else weight), name
    assert (half / "LICENSE").read_text() == "mine"
    assert json.loads((half / "config.json").read_text())["dtype"] == "float16"
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], -7e4)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    said = refused(capsys, str(base), "--output", str(tmp_path / "out"), "--dtype", "float16")
    assert holds(
        said,
        "raysft: error: --dtype float16: model.norm.weight holds -70000, but the largest float16 is 65,504; use --dtype bfloat16",
    )
    assert not (tmp_path / "out").exists()


OF_THE_MODEL = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "vocab.txt", "merges.txt", "spiece.model", "special_tokens_map.json", "preprocessor_config.json", "LICENSE", "README.md",
    "modeling_own.py", "additional_chat_templates/tools.jinja", "model.safetensors",
)  # fmt: skip
OF_ITS_TRAINING = (
    "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state_0.pth", "scaler.pt", "training_args.bin", "trainer_state.json",
    "trainer_log.jsonl", "train_results.json", "all_results.json", "training_loss.png", "latest", "zero_to_fp32.py",
    "global_step8/mp_rank_00_model_states.pt", "pytorch_model_fsdp_0/__0_0.distcp", "checkpoint-4/config.json",
    "checkpoint-4/model.safetensors", "checkpoint-4/tokenizer.json", "runs/now/events.out.tfevents.1", "wandb/run/files/a.json",
    ".git/config", ".git/a.json", ".gitattributes", ".cache/huggingface/a.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "tf_model.h5", "original/consolidated.00.pth", "onnx/model.onnx", "Modelfile",
)  # fmt: skip
"""And what other libraries would load in place of the model."""


@pytest.mark.parametrize("options", [(), ("--dtype", "bfloat16"), ("--shard-size", "1GB"), ("--no-merge",)])
def test_what_does_not_belong_to_a_model_stays_where_it_is(model, adapters, tmp_path, capsys, options):
    source = tmp_path / "source"
    shutil.copytree(adapters[0] if "--no-merge" in options else model, source)
    own = {path.name for path in source.iterdir()}
    for name in (*OF_THE_MODEL, *OF_ITS_TRAINING):
        if not (source / name).exists() and not (
            "--no-merge" in options and name in ("config.json", "model.safetensors")
        ):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_text("{}")
    output = exported(source, tmp_path / "out", *options)
    written = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    wanted = own | {name for name in OF_THE_MODEL if (source / name).exists()}
    assert written == wanted | ({"Modelfile"} if "--no-merge" not in options else set())
    assert "not exported, as they are not part of the model: " in capsys.readouterr().out


@pytest.mark.parametrize("beside", ["model-00001-of-00001.safetensors", "model_old.safetensors"])
@pytest.mark.parametrize("options", [("--dtype", "float32"), ("--shard-size", "50KB")])
def test_the_weights_that_are_written_anew_are_those_that_transformers_loads(model, tmp_path, beside, options):
    source = tmp_path / "source"
    shutil.copytree(model, source)
    half = {name: weight.bfloat16() / 2 for name, weight in load_file(model / "model.safetensors").items()}
    save_file(half, source / beside, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(half, beside)}
    if "of" in beside:
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "config.json").write_text((source / "config.json").read_text().replace("float32", "bfloat16"))
    wanted = plain(source, "float32").state_dict()
    assert torch.equal(wanted["model.norm.weight"], plain(model).state_dict()["model.norm.weight"])
    written = plain(exported(source, tmp_path / "out", *options), "float32").state_dict()
    assert all(torch.equal(written[name], weight) for name, weight in wanted.items())


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        (
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            "its kind (prompt_tuning) changes no weights",
        ),
        (LoraConfig(target_modules="all-linear", alora_invocation_tokens=[5, 6]), "only after its invocation tokens"),
        (
            LoraConfig(target_modules="all-linear", layer_replication=[(0, 2), (1, 2)]),
            "layers of its base stand for several",
        ),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_one_line_and_can_be_kept(model, tmp_path, capsys, adapter, reason):
    folder = tmp_path / "adapter"
    get_peft_model(plain(model), adapter).save_pretrained(folder)
    said = refused(capsys, str(folder), "--output", str(tmp_path / "out"))
    assert holds(said, f"raysft: error: {folder}: cannot be merged into a model, because … (--no-merge)")
    assert reason in said
    assert not (tmp_path / "out").exists()
    exported(folder, tmp_path / "kept", "--no-merge")


def test_code_runs_only_if_it_is_trusted(model, adapters, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    base, ran, out = tmp_path / "own", tmp_path / "ran", tmp_path / "out"
    shutil.copytree(model, base)
    with_code(base, ran, tokenizer=True)
    arguments = [str(base), "--adapters", str(adapters[0]), "--output", str(out)]
    said = refused(capsys, *arguments)
    assert holds(said, f"raysft: error: {base}: needs its own code (modeling_own.py); read … add --trust-remote-code")
    shutil.copy(base / "tokenizer_config.json", adapters[1])
    shutil.copy(base / "modeling_own.py", adapters[1])
    said = refused(capsys, str(model), "--adapters", str(adapters[1]), "--output", str(out))
    assert holds(said, f"raysft: error: {adapters[1]}: needs its own code (modeling_own.py); … --trust-remote-code")
    assert not ran.exists()
    assert not out.exists()
    keys = {"model_name_or_path": str(base), "adapter_name_or_path": str(adapters[0]), "export_dir": str(out)}
    (tmp_path / "merge.yaml").write_text(json.dumps({**keys, "trust_remote_code": True}))
    assert main(["export", str(tmp_path / "merge.yaml")]) == 0
    assert ran.exists()
    written = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    assert type(written).__name__ == "OwnForCausalLM"
    wanted = PeftModel.from_pretrained(plain(model), adapters[0])
    torch.testing.assert_close(logits(written), logits(wanted), rtol=1e-4, atol=1e-4)


def test_a_model_is_exported_to_this_machine(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(SystemExit) as ended:
        main(["export", str(model), "--output", "s3://key:secret@bucket/model"])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "argument --output: s3://bucket/model is not on this machine; use a local path" in said
    (tmp_path / "export.yaml").write_text(f"model_name_or_path: {model}\nexport_dir: s3://bucket/model\n")
    with pytest.raises(SystemExit) as ended:
        main(["export", "export.yaml"])
    assert ended.value.code == 2
    assert [path.name for path in tmp_path.iterdir() if path not in (model, tmp_path / "home")] == ["export.yaml"]
    exported(model, Path("~/model"))
    assert plain(tmp_path / "home" / "model").dtype == torch.float32
    assert main(["export", str(model), "--output", f"file://{tmp_path}/by%20uri"]) == 0
    assert (tmp_path / "by uri" / "config.json").exists()


def test_an_adapter_in_the_old_format_is_written_in_another_type(adapters, tmp_path):
    weights = load_file(adapters[0] / "adapter_model.safetensors")
    torch.save(weights, adapters[0] / "adapter_model.bin")
    (adapters[0] / "adapter_model.safetensors").unlink()
    kept = exported(adapters[0], tmp_path / "kept", "--no-merge", "--dtype", "bfloat16")
    written = load_file(kept / "adapter_model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weight.to(torch.bfloat16)) for name, weight in weights.items())
    assert not (kept / "adapter_model.bin").exists()


def test_the_type_that_is_asked_for_is_the_one_that_a_model_is_loaded_in(model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model, base)
    weights = {name: weight.bfloat16() for name, weight in load_file(base / "model.safetensors").items()}
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((base / "config.json").read_text())["dtype"] == "float32"  # most weights have another type
    half = exported(base, tmp_path / "half", "--dtype", "bfloat16")
    assert {weight.dtype for weight in load_file(half / "model.safetensors").values()} == {torch.bfloat16}
    assert plain(half).dtype == torch.bfloat16


def test_a_model_is_one_also_beside_a_config_of_another_program(model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model, base)
    (base / "config.yaml").write_text("trainer: {}\n")
    copied = exported(base, tmp_path / "copied")
    assert not (copied / "config.yaml").exists()
    assert torch.equal(logits(plain(copied)), logits(plain(model)))


def test_nothing_is_written_into_the_model_that_is_exported(model, adapters, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(model, base)
    inside = base / "a" / "b"
    said = refused(capsys, str(base), "--output", str(inside))
    assert f"--output {inside}: lies inside {base}, which is exported; choose another folder" in said
    said = refused(capsys, str(model), "--adapters", str(adapters[0]), "--output", str(adapters[0] / "out"))
    assert "lies inside" in said
    assert not inside.parent.exists()


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device", "config.json"),
    OSError(errno.EDQUOT, "Disk quota exceeded", "config.json"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    Exception("No space left on device (os error 28)"),  # of a tokenizer
])  # fmt: skip
@pytest.mark.parametrize("new", [True, False])
def test_a_full_disk_leaves_nothing_and_the_second_try_works(tmp_path, error, new):
    folder = tmp_path / "out"
    if not new:
        folder.mkdir()
    with (
        pytest.raises(RunFailed, match=r"out: the model cannot be written .*; free some space, then run"),
        draft(folder, "free some space") as unfinished,
    ):
        write_half(unfinished, error)
    assert list(tmp_path.rglob("*")) == ([] if new else [folder])
    with draft(folder, "free some space") as unfinished:
        (unfinished / "config.json").touch()
        assert not (folder / "config.json").exists()
    assert sorted(tmp_path.rglob("*")) == [folder, folder / "config.json"]


def write_half(folder: Path, error: Exception) -> None:
    (folder / "config.json").touch()
    raise error


def test_an_export_that_is_interrupted_or_killed_leaves_no_half_model_and_the_second_try_works(
    run, model, tmp_path, capsys
):
    write_checkpoint(run, model, 2)
    source, output = run / "checkpoints" / "2", tmp_path / "out"
    for sent, code, left in ((signal.SIGINT, 130, False), (signal.SIGKILL, -9, True)):
        process = forked(_export_without_end, str(source), str(output))
        process.start()
        limit = time.monotonic() + 60
        while not (tmp_path / "written").exists() and time.monotonic() < limit:
            time.sleep(0.02)
        assert [path.name for path in output.iterdir()] == [".unfinished"]
        said = refused(capsys, str(source), "--output", str(output))
        assert holds(
            said, f"raysft: error: --output {output}: another process writes a model there; wait until it has ended"
        )
        os.kill(process.pid or 0, sent)
        process.join(20)
        assert process.exitcode == code
        assert output.exists() == left
        (tmp_path / "written").unlink()
    again = exported(source, output)
    assert plain(again).dtype == torch.bfloat16
    assert not [path for path in again.iterdir() if path.name.startswith(".")]


def _export_without_end(source: str, output: str) -> None:
    def wait(folder: Path, *rest: object) -> str:
        assert (folder / "model.safetensors").exists()
        (folder.parent.parent / "written").touch()
        time.sleep(600)
        return ""

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a pytest process that others start ignores it
    with patch("raysft.run.export.write_modelfile", wait):
        sys.exit(main(["export", source, "--output", output]))


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_generation_config_is_one_line(model, adapters, tmp_path, capsys, text):
    base = tmp_path / "base"
    shutil.copytree(model, base)
    (base / "generation_config.json").write_text(text)
    for options in ((), ("--adapters", str(adapters[0]))):
        said = refused(capsys, str(base), "--output", str(tmp_path / "out"), *options)
        assert f"{base}/generation_config.json: is not a mapping in JSON" in said
        assert not (tmp_path / "out").exists()


def test_a_file_for_llamafactorys_export_is_taken_as_it_is(model, adapters, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    keys = {
        "model_name_or_path": str(model), "adapter_name_or_path": str(adapters[0]), "template": "qwen",
        "export_dir": "merged", "export_size": 2_000_000, "export_device": "cpu", "export_legacy_format": False,
        "infer_dtype": "bfloat16",
    }  # fmt: skip
    Path("merge.yaml").write_text(json.dumps(keys))
    assert main(["convert", "merge.yaml"]) == 0
    header, *_, last = capsys.readouterr().out.splitlines()
    assert header.startswith(
        "# merge.yaml is an export config. The command at the end does the export; so does raysft export merge.yaml"
    )
    command = last.split()
    assert command[:2] == ["raysft", "export"]
    assert command[-2:] == ["--shard-size", "2000000GB"]
    assert main(["export", "merge.yaml"]) == 0
    assert main([*command[1:], "--output", "again"]) == 0
    assert main(["export", "merge.yaml", "--output", "other", "--dtype", "float32"]) == 0
    assert (Path("merged") / "model.safetensors").read_bytes() == (Path("again") / "model.safetensors").read_bytes()
    assert plain(Path("other")).dtype == torch.float32
    Path("quantized.yaml").write_text(json.dumps({**keys, "export_quantization_bit": 4}))
    assert "export_quantization_bit=4 is not supported" in refused(capsys, "quantized.yaml")
    Path("own.yaml").write_text("model: {path: m}\n")
    assert "is not a config for llamafactory-cli export" in refused(capsys, "own.yaml", "--output", "x")


def test_the_modelfile_stops_where_the_model_does_and_has_its_system_prompt(run, model, tmp_path):
    write_checkpoint(run, model, 2)
    output = exported(run / "checkpoints" / "2", tmp_path / "out")
    written = (output / "Modelfile").read_text()
    assert written.startswith(
        'FROM .\n\nTEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}'
    )
    assert f'SYSTEM """Be kind."""\n\nPARAMETER stop "{END}"\nPARAMETER num_ctx 512\n' in written


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "its chat template writes the date",
        ),
        (
            "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}",
            "its chat template cannot be expressed as a Go template",
        ),
        (None, "the model has no chat template"),
    ],
)
def test_a_model_whose_template_has_no_other_form_gets_no_modelfile(model, tmp_path, capsys, template, reason):
    from transformers import AutoTokenizer

    base = tmp_path / "base"
    shutil.copytree(model, base)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(base)
    output = exported(base, tmp_path / "out")
    assert not (output / "Modelfile").exists()
    assert f"no Modelfile for Ollama: {reason}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "mxfp4"}, None),
    ],
)
def test_a_quantized_model_gets_no_modelfile(model, tmp_path, capsys, settings, named):
    base = tmp_path / "base"
    shutil.copytree(model, base)
    described = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**described, "quantization_config": settings}))
    output = exported(base, tmp_path / "out")
    said = capsys.readouterr().out
    assert (output / "Modelfile").exists() == (named is None)
    if named:
        assert f"no Modelfile for Ollama: its weights are quantized ({named}), which Ollama cannot import" in said


def test_checkpoints_and_models_are_pushed_with_cards_of_their_own(run, model, adapters, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    write_checkpoint(run, model, 2)
    sources = ((str(run / "checkpoints" / "2"),), (str(model), "--adapters", str(adapters[0])), (str(model),))
    for source in sources:
        assert "needs a Hub token, but none is set" in refused(capsys, *source, "--push", "org/sums")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    with hub_server() as server:
        server.accounts["hf_mine"] = Account()
        use(server.url, monkeypatch, tmp_path / "cache")
        cards, titles = [], []
        for source in sources:
            assert main(["export", *source, "--push", "org/sums"]) == 0
            repository = server.repositories["models", "org/sums"]
            titles.append(repository.titles[repository.refs["main"]])
            files = repository.commits[repository.refs["main"]]
            assert files.keys() >= {"model.safetensors", "config.json", "tokenizer.json", "Modelfile", "README.md"}
            cards.append(files["README.md"].decode())
    assert titles[0] == "raysft: the model of run sums after step 2"
    assert "It is the checkpoint after step 2" in cards[0]
    assert titles[1:] == [f"raysft: {model.name} with {adapters[0].name}", f"raysft: {model.name}"]
    assert f"`{model.name}` with `{adapters[0].name}` merged into it" in cards[1]
    for card in cards:
        assert 'AutoModelForCausalLM.from_pretrained("org/sums", dtype="auto")' in card
        assert str(tmp_path) not in card
