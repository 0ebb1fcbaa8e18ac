"""Configuration: what is read, what is refused, and in which words."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
from pydantic import ValidationError

from raysft.config import documented_fields, load, parse, with_overrides
from raysft.config.validate import RENAMED
from raysft.config.verb import verb_of
from raysft.errors import RequestError
from tests import messages
from tests.messages import holds

BASE = """\
stage: sft
model:
  path: m
data:
  train:
    - name: a
      path: a.json
"""
"""Seven lines: what a test appends begins on line 8."""
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write ``c.yaml`` into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, name: str = "c.yaml") -> str:
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return write


def refusal(path: str, *overrides: str) -> str:
    return messages.refusal(load, path, overrides)


def test_defaults_give_way_to_the_file_and_the_file_to_overrides(write):
    path = write(BASE + "train:\n  epochs: 2\n  global_batch_size: 4\n")
    config = load(path, ["train.global_batch_size=8"])
    assert (config.train.micro_batch_size, config.train.epochs, config.train.global_batch_size) == ("auto", 2, 8)


@pytest.mark.parametrize(
    ("length", "given", "rows"),
    [(64, "auto", 16), (512, "auto", 2), (1000, "auto", 1), (4096, "auto", 1), (64, "3", 3)],
)
def test_a_microbatch_holds_a_thousand_tokens_or_one_row(write, length, given, rows):
    config = load(write(BASE), [f"data.sequence_length={length}", f"train.micro_batch_size={given}"])
    assert config.micro_batch_size == rows


def test_the_last_of_two_overrides_of_a_key_wins(write):
    assert load(write(BASE), ["train.epochs=2", "train.epochs=3"]).train.epochs == 3


def test_overrides_reach_into_lists_and_make_sections(write):
    config = load(
        write(BASE), ["data.train.0.path=b.json", "model.lora.rank=4", "data.train.0.columns={output: answer}"]
    )
    assert config.data.train[0].path == "b.json"
    assert config.data.train[0].columns == {"output": "answer"}
    assert config.model.lora.rank == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a", "'a' … key.path=value"),
        ("=x", "'=x' … key.path=value"),
        ("train..epochs=1", "'train..epochs=1' … key.path=value"),
        ("train.epochs=[1", "'train.epochs=[1' … YAML"),
        ("train.epochs=two", "command line: train.epochs='two' … must be a valid number"),
        ("train.epochs=", "command line: train.epochs=null … must be a valid number"),
        ("data.train.5.name=x", "'data.train.5.name=x': data.train … list … '5' … item"),
        ("data.train.x=1", "'data.train.x=1': data.train … list … 'x' … item"),
        ("model.path.x=3", "'model.path.x=3': model.path … 'm' … no keys"),
        ("tran.epochs=2", "command line: unknown key tran; did you mean train?"),
        ("train.epoch=2", "command line: unknown key train.epoch; did you mean train.epochs?"),
        ("data.train.0.nmae=x", "command line: unknown key data.train.0.nmae; did you mean data.train.0.name?"),
        (
            "data.train=[{nmae: x}]",
            "command line: unknown key data.train.0.nmae; did you mean data.train.0.name? (and 1 more)",
        ),
        ("data=", "command line: data.train … required … add it"),
    ],
)
def test_a_wrong_override_is_distinguished_from_the_file(write, override, message):
    assert holds(refusal(write(BASE), override), message)


def test_an_error_in_the_file_is_not_blamed_on_an_override_beside_it(write):
    path = write(BASE + "train:\n  epochs: two\n")
    assert holds(refusal(path, "train.max_steps=2"), "c.yaml:9: train.epochs='two' … must be a valid number")
    path = write(BASE + "    - {name: a, path: b}\n")
    assert holds(refusal(path, "data.packing=false"), "c.yaml:4: data: … two sources … 'a' … rename")


@pytest.mark.parametrize(
    ("appended", "message"),
    [
        ("trian:\n  epochs: 1\n", "c.yaml:8: unknown key trian; did you mean train?"),
        ("train:\n  epoch: 1\n", "c.yaml:9: unknown key train.epoch; did you mean train.epochs?"),
        ("run:\n  seed: 1\n  nmae: x\n", "c.yaml:10: unknown key run.nmae; did you mean run.name?"),
        ("scaling:\n  workers: 1\n", "c.yaml:9: unknown key scaling.workers; did you mean scaling.num_workers?"),
        ("      pth: x\n", "c.yaml:8: unknown key data.train.0.pth; did you mean data.train.0.path?"),
        (
            "      columns: {outptu: x}\n",
            "c.yaml:8: unknown key data.train.0.columns.outptu; did you mean data.train.0.columns.output?",
        ),
        (
            "learning_rate: 1\n",
            "c.yaml:8: learning_rate is a LLaMA-Factory key, but model … write train.learning_rate",
        ),
        ("learning_rat: 1\n", "c.yaml:8: unknown key learning_rat; did you mean train.learning_rate?"),
        ("lora: {rank: 1}\n", "c.yaml:8: unknown key lora; did you mean model.lora?"),
        ("train:\n  rank: 8\n", "c.yaml:9: unknown key train.rank; did you mean model.lora.rank?"),
        ("train:\n  num_workers: 8\n", "c.yaml:9: unknown key train.num_workers; did you mean scaling.num_workers?"),
        (
            "train:\n  max_examples: 8\n",
            "c.yaml:9: unknown key train.max_examples; did you mean data.train[].max_examples or data.max_examples or "
            "generate.max_examples?",
        ),
        ("tune:\n  xyz: 1\n", "c.yaml:9: unknown key tune.xyz … known keys: space, search, num_samples"),
        (
            "1: 2\n",
            "c.yaml:8: unknown key 1 … known keys: stage, run, model, data, train, scaling, evaluate, generate, tune",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(write, appended, message):
    assert holds(refusal(write(BASE + appended)), message)


def test_an_unknown_key_comes_before_other_errors(write):
    path = write(BASE + "train:\n  epochs: 0\n  learning_rate: -1\n  loss_: x\n")
    assert holds(refusal(path), "c.yaml:11: unknown key train.loss_; did you mean train.loss? (and 2 more)")


@pytest.mark.parametrize(
    ("appended", "message"),
    [
        ("train: {epochs: two}", "c.yaml:8: train.epochs='two' … must be a valid number"),
        ("train: {max_steps: 2.5}", "c.yaml:8: train.max_steps=2.5 … must be a valid integer"),
        ("train: {warmup_steps: -1}", "c.yaml:8: train.warmup_steps=-1 … must be greater than or equal to 0"),
        ("train: {eval_every_epochs: 0}", "c.yaml:8: train.eval_every_epochs=0 … must be greater than 0"),
        ("train: {save_every_steps: yes}", "c.yaml:8: train.save_every_steps=true … must be a valid integer"),
        ("train: {neftune_alpha: yes}", "c.yaml:8: train.neftune_alpha=true … must be a valid number"),
        ("train: {betas: [0.9, no]}", "c.yaml:8: train.betas=[0.9, False] … must be a valid number"),
        ("train: {epochs: 0}", "c.yaml:8: train.epochs=0 … must be greater than 0"),
        ("train: {learning_rate: .inf}", "c.yaml:8: train.learning_rate=inf … must be a finite number"),
        ("train: {betas: [0.9, 2]}", "c.yaml:8: train.betas.1=2 … must be less than 1"),
        ("train: {zero_stage: 4}", "c.yaml:8: train.zero_stage=4 … must be 0, 1, 2 or 3"),
        ("train: 3", "c.yaml:8: train=3 … section"),
        (
            "scaling: {data_label: data}",
            "c.yaml:8: scaling.data_label='data' … must be KEY=VALUE … for example role=data",
        ),
        ("scaling: {data_label: -a=b}", "c.yaml:8: scaling.data_label='-a=b' … must be KEY=VALUE"),
        ("run: {seed: -1}", "c.yaml:8: run.seed=-1 … must be greater than or equal to 0"),
        ("run: {storage: 's3://'}", "c.yaml:8: run.storage='s3://' … does not name a bucket or folder; add one"),
        ('run: {storage: "a\\0b"}', "c.yaml:8: run.storage= … NUL character; remove it"),
        (f"run: {{storage: {'a' * 5000}}}", "c.yaml:8: run.storage='aaa … has 5000; shorten it"),
        (
            f"generate: {{model: {'a/' * 2100}}}",
            "c.yaml:8: generate.model='a/a … at most 4095 bytes … has 4200; shorten it",
        ),
        (
            f"train: {{max_steps: {10**30}}}",
            "c.yaml:8: train.max_steps=1000 … must be less than or equal to 2147483647",
        ),
        ("run: {storage: 7}", "c.yaml:8: run.storage=7 … must be a valid string"),
        (
            "run: {name: a/b}",
            "c.yaml:8: run.name='a/b' … letters, digits",
        ),
        ("generate: {metrics: rouge}", "c.yaml:8: generate.metrics='rouge' … must be a valid list"),
        ("generate: {top_p: 1.5}", "c.yaml:8: generate.top_p=1.5 … must be less than or equal to 1"),
        ("tune: {space: {train.epochs: []}}", "c.yaml:8: tune.space.train.epochs=[] … not be empty"),
        ("      max_examples: 0", "c.yaml:8: data.train.0.max_examples=0 … must be greater than 0"),
        (
            "      format: foo",
            "c.yaml:8: data.train.0.format='foo' … must be 'alpaca', 'sharegpt', 'openai', 'prompt_completion', "
            "'turns', 'text', 'texts' or 'tokenized'",
        ),
        ("      columns: {output: 3}", "c.yaml:8: data.train.0.columns.output=3 … must be a valid string"),
        ("    - b.json", "c.yaml:8: data.train.1='b.json' … section"),
        ("    - path: b.json", "c.yaml:8: data.train.1.name … required … add it"),
        ("    - {name: b, path: []}", "c.yaml:8: data.train.1.path=[] … not be empty"),
        ("    - {name: b, path: 3}", "c.yaml:8: data.train.1.path=3 … must be a valid string or a valid list"),
        ("    - {name: b, path: [x, 3]}", "c.yaml:8: data.train.1.path.1=3 … must be a valid string"),
        ("    - {name: a, path: b}", "c.yaml:4: data: … two sources … 'a' … rename"),
        (
            "  packing: maybe",
            "c.yaml:8: data.packing='maybe' … must be true or false",
        ),
        ("  holdout: 1.0", "c.yaml:8: data.holdout=1.0 … must be at least 0 and less than 1 … without a decimal point"),
        ("  holdout: -1", "c.yaml:8: data.holdout=-1 … must be between 0 and"),
        ("  holdout: yes", "c.yaml:8: data.holdout=true … a fraction below 1, or a whole number"),
        ("train: {epochs: null}", "c.yaml:8: train.epochs=null … must be a valid number"),
        ("train: {epochs: true}", "c.yaml:8: train.epochs=true … "),
        (
            "  holdout: 0.1\n  eval: [{name: a, path: b}]",
            "c.yaml:4: data: data.train … data.eval … 'a' … data.holdout=0.1 … rename",
        ),
    ],
)
def test_a_wrong_value_names_file_line_key_and_value(write, appended, message):
    assert holds(refusal(write(BASE + appended + "\n")), message)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("q_proj", "c.yaml:4: model.lora.target='q_proj' … must be 'all' or a valid list"),
        ("[q_proj, 3]", "c.yaml:4: model.lora.target.1=3 … must be a valid string"),
    ],
)
def test_a_value_that_may_be_of_two_kinds_says_both(write, value, message):
    path = write(f"model:\n  path: m\n  lora:\n    target: {value}\ndata: {{train: [{{name: a, path: a}}]}}\n")
    assert holds(refusal(path), message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "c.yaml: … empty … model.path … data.train"),
        ("# a comment\n", "c.yaml: … empty … model.path … data.train"),
        ("[1]\n", "c.yaml: … mapping … [1] … quickstart.yaml"),
        ("model: {path: x}\n", "c.yaml: data … required … add it"),
        ("model:\n  path: m\ndata:\n  train: a.json\n", "c.yaml:4: data.train='a.json' … must be a valid list"),
        ("model:\n  path: m\ndata:\n  train: []\n", "c.yaml:4: data.train=[] … not be empty"),
        ("a: 1\n\na: 2\n", "c.yaml:3: duplicate key a … line 1 … remove"),
        ("t:\n  a: 1\n  a: 2\n", "c.yaml:3: duplicate key t.a … line 2 … remove"),
        (
            "a: 1\nb: [\n",
            "c.yaml:2: … YAML … expected the node content, but found '<stream end>' … correct",
        ),
        (
            "model:\n\tpath: x",
            "c.yaml:2: … YAML … found character '\\t' that cannot start any token … correct",
        ),
        ("a: 1\nb: *c\n", "c.yaml:2: … YAML … found undefined alias 'c' … correct"),
        (
            "a: 1\nb: \x00\n",
            "c.yaml:2: … YAML … unacceptable character #x0000: special characters are not allowed … correct",
        ),
        (b"a: 1\nb: \xff\n", "c.yaml:2: … UTF-8 … 0xff … save"),
    ],
)
def test_a_file_that_is_no_config_is_refused_in_one_line(write, text, message):
    assert holds(refusal(write(text)), message)


def test_yaml_that_runs_code_is_refused(write):
    assert "could not determine a constructor" in refusal(write(BASE + "train: !!python/object/apply:os.getcwd []\n"))


def test_a_missing_file_and_a_folder_have_different_messages(write, tmp_path):
    assert holds(refusal("none.yaml"), "none.yaml: … not found … path of a YAML file")
    assert holds(refusal(str(tmp_path)), f"{tmp_path}: … Is a directory … path of a YAML file")


@pytest.mark.parametrize("text", ["5e-4", "5.0e-4", "0.0005", "'5e-4'"])
def test_numbers_that_yaml_takes_for_text_become_floats(write, text):
    assert load(write(BASE + f"train:\n  learning_rate: {text}\n")).train.learning_rate == 5e-4
    assert load(write(BASE), [f"train.learning_rate={text}"]).train.learning_rate == 5e-4


def test_such_numbers_among_the_arguments_of_a_library_become_floats_too(write):
    text = "train:\n  optimizer: soap\n  zero_stage: 0\n  schedule_options: {min_lr: 1e-6}\n  optimizer_options: {a: [1e-30, e1]}\n"
    train = load(write(BASE + text), ["train.deepspeed.zero_optimization.reduce_bucket_size=5e8"]).train
    assert train.schedule_options == {"min_lr": 1e-6}
    assert train.optimizer_options == {"a": [1e-30, "e1"]}
    assert train.deepspeed == {"zero_optimization": {"reduce_bucket_size": 5e8}}
    assert load(write(BASE), ["tune.scheduler_options.brackets=1e1"]).tune.scheduler_options == {"brackets": 10.0}


def test_an_empty_section_is_its_defaults(write):
    config = load(write(BASE + "run:\ntrain:\nscaling:\n"))
    assert config == load(write(BASE))
    assert config.run.name == "c"


def test_a_byte_order_mark_is_passed_over(write):
    assert load(write(b"\xef\xbb\xbf" + BASE.encode())).model.path == "m"


@pytest.mark.parametrize(
    ("file", "name"),
    [("nice-1.yaml", "nice-1"), ("my config.yaml", "my-config"), (".hidden.yaml", "hidden"), ("é.yaml", "run")],
)
def test_a_run_is_named_after_its_file(write, file, name):
    assert load(write(BASE, file)).run.name == name
    assert load(write(BASE, file), ["run.name=other"]).run.name == "other"


def test_a_config_is_frozen():
    config = parse({"model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a"}]}})
    with pytest.raises(ValidationError, match="frozen"):
        config.train.epochs = 2


def test_the_resolved_config_reads_back_as_itself(write):
    overrides = ["train.learning_rate=5e-4", "data.train.0.columns={output: 答案}", "tune.space={train.epochs: [1, 2]}"]
    config = load(write(BASE), overrides)
    assert load(write(config.to_yaml(), "resolved.yaml")) == config


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_key_of_an_earlier_version_is_refused_with_its_name_of_today(write, old, new):
    assert holds(refusal(write(BASE), f"{old}=1"), f"command line: unknown key {old} … called {new}")
    assert new in {key for key, _, _ in documented_fields()}


def test_with_overrides_validates_what_it_changes():
    config = parse({"model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a"}]}})
    changed = with_overrides(config, {"train.learning_rate": 1e-3, "data.train.0.name": "b"})
    assert (changed.train.learning_rate, changed.data.train[0].name) == (1e-3, "b")
    assert config.train.learning_rate == 1e-4
    with pytest.raises(RequestError, match=r"^override: unknown key train\.epoch; did you mean train\.epochs\?$"):
        with_overrides(config, {"train.epoch": 3})


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("**/*.yaml")), ids=lambda path: path.name)
def test_every_recipe_parses_and_has_its_own_command_in_its_header(path):
    config = load(path)
    header = [line for line in path.read_text().splitlines() if line.startswith("#   ")]
    commands = [line.partition("raysft ")[2].split() for line in header if f"configs/{path.name}" in line]
    verb, file, *overrides = commands[0]
    assert verb == verb_of(config)
    assert file == f"configs/{path.name}"
    assert config.run.name == path.stem
    for _, file, *overrides in commands:
        assert load(CONFIGS.parent / file, overrides)


def test_there_is_a_recipe_for_each_way_to_train():
    recipes = [load(path) for path in CONFIGS.glob("*.yaml")]
    assert {config.model.finetuning for config in recipes} >= {"lora", "full"}
    assert {config.stage for config in recipes} == {"sft", "pt"}
    assert any(config.model.quantization for config in recipes)
    assert any(config.train.zero_stage == 3 for config in recipes)
    assert any(config.scaling.is_elastic for config in recipes)


def test_every_field_has_a_docstring():
    assert [key for key, _, docstring in documented_fields() if not docstring.endswith(".")] == []


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("run.name=other", True),
        ("run.storage=elsewhere", True),
        ("data.cache=elsewhere", True),
        ("scaling.num_workers=4", True),
        ("generate.max_new_tokens=4", True),
        ("train.save_every_steps=4", True),
        ("train.learning_rate=2e-4", False),
        ("train.global_batch_size=4", False),
        ("run.seed=1", False),
        ("model.trust_remote_code=[another]", True),
        ("model.trust_remote_code=[m]", False),
        ("model.lora.rank=4", False),
        ("data.train.0.path=b.json", False),
        ("stage=pt", False),
    ],
)
def test_numerics_keys_change_with_what_decides_the_numbers(write, override, same):
    before, after = load(write(BASE)), load(write(BASE), [override])
    assert (before.numerics_keys() == after.numerics_keys()) == same


def test_numerics_keys_are_flat(write):
    numerics_keys = load(write(BASE)).numerics_keys()
    assert numerics_keys["train.learning_rate"] == 1e-4
    assert not {"run.name", "run.storage", "data.cache"} & numerics_keys.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]", "invalid YAML"),
        ("run: {storage: 2024-99-99}", "invalid YAML (month must be in 1..12"),
        (
            "model: {path: m}\ndata: {train: [{name: a, path: a}], mask_history: true, train_on_prompt: true}",
            "contradict",
        ),
    ],
)
def test_what_only_looks_like_a_config_is_one_line(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(RequestError) as caught:
        load(tmp_path / "c.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "generates"),
    [
        ([], False),
        (["data.holdout=0.1"], True),
        (["data.eval=[{name: b, path: b}]"], True),
        (["generate.sources=[a]"], True),
        (["data.holdout=0.1", "generate.enabled=false"], False),
        (["data.holdout=0.1", "stage=pt"], False),
    ],
)
def test_a_run_generates_where_there_are_prompts_for_it(write, overrides, generates):
    assert load(write(BASE), overrides).generates == generates


def test_the_adapter_is_the_section_that_finetuning_names(write):
    models = [load(write(BASE), [f"model.finetuning={kind}"]).model for kind in ("lora", "oft", "full", "freeze")]
    assert [model.adapter for model in models] == [models[0].lora, models[1].oft, None, None]


def test_a_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    plain = {"model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a"}]}}
    config = parse({**plain, "run": {"storage": "~/runs", "name": "x"}})
    assert str(config.run_directory) == "/home/somebody/runs/x"
    assert str(config.cache_directory) == "/home/somebody/runs/cache"


def with_template_options(options: dict) -> dict:
    return {"model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a"}], "template_options": options}}


def test_a_date_for_the_chat_template_is_the_text_that_was_written():
    config = parse(with_template_options({"date_string": date(2024, 7, 26)}))
    assert config.data.template_options == {"date_string": "2024-07-26"}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tools": 1}, "tools … remove"), ({"x": {1, 2}}, "must contain only strings, numbers")],
)
def test_what_a_chat_template_cannot_take_is_refused(options, message):
    with pytest.raises(RequestError) as caught:
        parse(with_template_options(options))
    assert holds(str(caught.value), f"config: data.template_options … {message}")
