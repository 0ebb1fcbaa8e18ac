"""Plans: what a run will do, and what no cluster could ever place."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from raysft.cluster.placement import Node
from raysft.config import Config, parse, with_overrides
from raysft.data.prepare import PreparedData, prepare
from raysft.data.rows.packed_dataset import PackedDataset
from raysft.errors import RequestError
from raysft.run.plan import _cross_nodes, _resolved, make_plan
from raysft.run.resources import check_resources
from tests.messages import holds, refusal
from tests.shards import data_config, the_set, write_records, written
from tests.tiny import tiny_tokenizer


def scaled(**scaling) -> Config:
    return parse({"model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a.json"}]}, "scaling": scaling})


def cpus(*amounts: float) -> list[Node]:
    return [Node.of({"CPU": float(amount), "memory": 1e9}) for amount in amounts]


@pytest.mark.parametrize(
    ("nodes", "scaling", "reserved"),
    [
        (cpus(2), {}, 0),
        (cpus(2), {"num_workers": 2, "cpus_per_worker": 0.75}, 0),
        (cpus(2), {"num_workers": 5, "cpus_per_worker": 0.3}, 0),
        (cpus(0.8), {"num_workers": 3, "cpus_per_worker": 0.1}, 0),
        (cpus(2, 2), {"num_workers": 3}, 0),
        (cpus(2, 2), {"num_workers": 2, "cpus_per_worker": 1.5}, 0),
        (cpus(1, 0.5), {"num_workers": 1}, 0),
        (cpus(2), {"cpus_per_worker": 0.5}, 1.0),
        ([Node(8.0, 2.0)], {"num_workers": 2, "use_gpu": True}, 0),
        (cpus(2), {"num_workers": [1, 8]}, 0),
        ([Node(2.0, 1.0), Node(2.0, 1.0)], {"num_workers": 2, "use_gpu": True}, 0),
    ],
)
def test_what_the_cluster_can_place_is_accepted(nodes, scaling, reserved):
    check_resources(scaled(**scaling), nodes, reserved)


@pytest.mark.parametrize(
    ("nodes", "scaling", "parts"),
    [
        (
            cpus(2),
            {"num_workers": [3, 8]},
            [
                "scaling.num_workers=[3, 8] needs 1 CPU per worker",
                "only 2 workers (node 0: 2 CPUs)",
                "use scaling.num_workers=1,",
            ],
        ),
        (
            cpus(2),
            {"num_workers": 3},
            ["scaling.num_workers=3 needs 1 CPU per worker", "only 2 workers", "use scaling.num_workers=1,"],
        ),
        (
            cpus(2, 2),
            {"num_workers": 3, "cpus_per_worker": 1.5},
            [
                "needs 1.5 CPUs per worker",
                "only 2 workers (node 0: 2 CPUs; node 1: 2 CPUs)",
                "use scaling.num_workers=2,",
            ],
        ),
        (
            cpus(*[1] * 11),
            {"cpus_per_worker": 2},
            [
                "only 0 workers",
                f"({'; '.join(f'node {index}: 1 CPU' for index in range(8))}; and 3 more)",
                "lower scaling.cpus_per_worker=2, or add nodes",
            ],
        ),
        ([], {}, ["only 0 workers (no nodes)", "lower scaling.cpus_per_worker=1, or add nodes"]),
        (
            [Node(8.0, 1.0), Node(8.0)],
            {"num_workers": 2, "use_gpu": True},
            [
                "scaling.num_workers=2 needs 2 GPUs and 1 CPU per worker",
                "only 1 worker (node 0: 8 CPUs, 1 GPU; node 1: 8 CPUs, 0 GPUs)",
                "use scaling.num_workers=1, or add nodes",
            ],
        ),
        (
            cpus(8),
            {"use_gpu": True},
            ["needs 1 GPU and", "only 0 workers", "add nodes with GPUs, or set scaling.use_gpu=false"],
        ),
        (
            # CPUs and GPU of a worker must be of one node.
            [Node(1.0, 4.0), Node(8.0)],
            {"num_workers": 4, "use_gpu": True},
            [
                "needs 4 GPUs and",
                "only 1 worker (node 0: 1 CPU, 4 GPUs; node 1: 8 CPUs, 0 GPUs)",
                "use scaling.num_workers=1",
            ],
        ),
    ],
)
def test_workers_that_find_no_place_are_refused(nodes, scaling, parts):
    with pytest.raises(RequestError) as caught:
        check_resources(scaled(**scaling), nodes)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "scaling", "remedy"),
    [
        (cpus(4), {"num_workers": 2}, "use scaling.num_workers=1"),
        (cpus(4, 4), {"num_workers": 2}, "use scaling.placement=spread with scaling.num_workers=2"),
        (
            cpus(4, 4),
            {"num_workers": [1, 3], "placement": "spread"},
            "use scaling.placement=spread with scaling.num_workers=2",
        ),
        (cpus(4, 4), {"num_workers": 2, "placement": "spread"}, None),
        (cpus(1, 1, 1), {"num_workers": 2}, None),
        (cpus(4), {"num_workers": 1}, None),
    ],
)
def test_experts_on_the_cpu_take_one_worker_on_each_node(nodes, scaling, remedy):
    config = with_overrides(scaled(**scaling), {"model.experts": "kt", "model.dtype": "bfloat16"})
    if remedy is None:
        check_resources(config, nodes)
    else:
        message = refusal(check_resources, config, nodes)
        given = f"scaling.num_workers={scaling['num_workers']}"  # a list stays one
        assert message.startswith(f"model.experts=kt needs one worker per node, but {given} ")
        assert message.endswith(remedy)


LABELLED = {"data_label": "role=data"}


def labelled(training: int, data: float) -> list[Node]:
    """A node that trains, and one for data."""
    return [Node(float(training), use="training"), Node(float(data), use="data")]


def test_workers_may_take_all_cpus_of_a_node_if_another_one_is_for_data_and_none_of_that():
    check_resources(scaled(num_workers=2, **LABELLED), labelled(2, 0.5))
    with pytest.raises(RequestError) as caught:
        check_resources(scaled(num_workers=3, **LABELLED), labelled(2, 8))
    assert "the cluster can place only 2 workers (node 0: 2 CPUs; node 1: 8 CPUs)" in str(caught.value)
    assert str(caught.value).endswith("; use scaling.num_workers=2, or add nodes")


@pytest.mark.parametrize(
    ("nodes", "fact"),
    [
        ([Node(4.0, use="training")], "no node of the cluster has this label (node 0: 4 CPUs)"),
        (labelled(4, 0.25), "none of the nodes with this label has 0.5 CPUs for data tasks (node 0: 0.25 CPUs)"),
    ],
)
def test_a_label_of_no_node_that_data_could_run_on_is_refused(nodes, fact):
    with pytest.raises(RequestError) as caught:
        check_resources(scaled(**LABELLED), nodes)
    assert str(caught.value) == (
        f"scaling.data_label=role=data: {fact}; start a node with ray start --labels role=data, or remove scaling.data_label"
    )


@pytest.mark.parametrize(
    ("nodes", "scaling", "reserved", "needed", "remedy"),
    [
        (cpus(2), {"num_workers": 2}, 0, "2.5", "use scaling.cpus_per_worker=0.7"),
        # Enough in sum, but no node has half a CPU left.
        (cpus(*[1] * 6), {"num_workers": 6, "cpus_per_worker": 0.9}, 0, "5.9", "use scaling.cpus_per_worker=0.5"),
        (cpus(2), {}, 1.0, "2.5", "use scaling.cpus_per_worker=0.5"),
        (cpus(0.6), {"num_workers": 10, "cpus_per_worker": 0.05}, 0, "1", "use scaling.num_workers=2, or add nodes"),
        (cpus(0.4, 0.4), {"cpus_per_worker": 0.4}, 0, "0.9", "; add nodes"),
    ],
)
def test_workers_that_leave_nothing_for_the_data_are_refused(nodes, scaling, reserved, needed, remedy):
    config = scaled(**scaling)
    with pytest.raises(RequestError) as caught:
        check_resources(config, nodes, reserved)
    message, given = str(caught.value), config.scaling
    assert message.startswith(
        f"scaling.num_workers={given.num_workers} and scaling.cpus_per_worker={given.cpus_per_worker:g} leave no CPU for data"
    )
    assert f"{needed} CPUs are needed, 0.5 of them for data on one node" in message
    assert f"the cluster has {sum(node.cpus for node in nodes):g} (node 0: " in message
    assert message.endswith(remedy)


@pytest.mark.parametrize("workers", range(1, 6))
@pytest.mark.parametrize("each", [0.2, 0.5, 0.9, 1.0, 1.7])
@pytest.mark.parametrize("nodes", [cpus(1), cpus(2), cpus(2, 2), cpus(0.7, 3), cpus(1, 1, 1)], ids=str)
def test_what_a_refusal_recommends_is_accepted(nodes, each, workers):
    try:
        check_resources(scaled(num_workers=workers, cpus_per_worker=each), nodes)
    except RequestError as error:
        _, found, better = str(error).rpartition("use scaling.cpus_per_worker=")
        if found:
            assert float(better) < each
            check_resources(scaled(num_workers=workers, cpus_per_worker=float(better)), nodes)
        _, found, better = str(error).rpartition("use scaling.num_workers=")
        if found:
            fewer = int(better.removesuffix(", or add nodes"))
            assert 0 < fewer < workers
            check_resources(scaled(num_workers=fewer, cpus_per_worker=each), nodes)


def test_a_plan_counts_steps_rows_tokens_and_what_is_empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_records(tmp_path / "a.jsonl", [["How are you?", "Fine."]] * 10 + [3])
    config = with_overrides(
        data_config(tmp_path, packing=False, max_rejected=0.5),
        {"train.global_batch_size": 4, "train.micro_batch_size": 2, "train.epochs": 3, "scaling.num_workers": 3},
    )
    each = the_set(config, str(tmp_path / "model"))
    manifest = written(each, str(tmp_path / "model"))
    rows = PackedDataset((each.manifest.location,), capacity=64, global_batch_size=4, epochs=3, layout="single")
    plan = make_plan(config, PreparedData((manifest,), (), rows, {}), cpus(2, 2))
    length, trained = int(manifest.lengths[0]), int(manifest.loss_tokens[0])
    assert (plan.examples, plan.rows, plan.steps, plan.rows_of_epochs) == (10, 30, 9, (10, 10, 10))
    assert (plan.tokens, plan.loss_tokens) == (30 * length, 30 * trained)
    assert plan.packing_efficiency == pytest.approx(length / 64, abs=1e-6)
    assert (plan.rows_per_worker, plan.filler_rows, plan.accumulation, plan.empty_rows) == (2, 2, 1, 6)
    assert (plan.cpus, plan.gpus, plan.cluster_cpus, plan.cluster_gpus) == (3.5, 0, 4, 0)
    written_plan = json.loads(json.dumps(plan.as_dict()))
    assert written_plan["sources"]["a"]["rejected"] == 1
    assert written_plan["resolved"] == {
        "dtype": "float32",
        "finetuning": "lora",
        "adapter": "lora",
        "lora_alpha": 16,
        "learning_rate": 1e-4,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "workers": 3,
        "attention": "auto",
        "zero_stage": 2,
        "optimizer": "adamw, betas (0.9, 0.999), epsilon 1e-08",
        "model_commit": None,
        "reference_commit": None,
    }
    assert plan.lines()[: -len(plan.warnings)] == [
        f"train a: turns, 10 examples of 11 records, {10 * length} tokens, {10 * trained} trained, longest {length}, 1 rejected",
        "duplicates: none",
        "turns: 10, ended by <|im_end|> (10)",
        f"rows: 30 of 64 tokens over 3 epochs, {100 * length / 64:.1f}% packed, {30 * length} tokens, {30 * trained} trained",
        "steps: 9 of 4 rows = 3 workers × 2 rows in 1 microbatch, 2 of them empty in each step; 6 rows at the ends of epochs "
        "stay empty",
        "resources: needs 3.5 CPUs and 0 GPUs, the cluster has 4 CPUs and 0 GPUs",
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model.finetuning": "full"}, {"finetuning": "full", "adapter": "none", "lora_alpha": None}),
        ({"model.finetuning": "freeze"}, {"finetuning": "freeze", "adapter": "none", "lora_alpha": None}),
        ({"model.finetuning": "oft"}, {"finetuning": "oft", "adapter": "oft", "lora_alpha": None}),
        ({"model.lora.alpha": 3}, {"adapter": "lora", "lora_alpha": 3}),
        ({"model.adapters": ["old"]}, {"adapter": "lora", "lora_alpha": 64}),
        ({"data.sequence_length": 512}, {"micro_batch_size": 2}),
        ({"data.sequence_length": 4096}, {"micro_batch_size": 1}),
        ({"data.sequence_length": 64}, {"micro_batch_size": 8}),  # no more than a worker has in a step of 8
        ({"scaling.use_gpu": True, "model.attention": "sdpa"}, {"dtype": "bfloat16", "attention": "sdpa"}),
    ],
)
def test_a_plan_has_the_settings_with_every_default_resolved(settings, expected, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 64}')
    adapter = str(tmp_path) if "model.adapters" in settings else None
    resolved = asdict(_resolved(with_overrides(scaled(), settings), 8, 1, adapter, None))
    assert {key: resolved[key] for key in expected} == expected


@pytest.mark.parametrize("workers", [0, -1, True, 1.5, "2", [2, 1], [0, 2], [1], [1, 2, 3], [1, "2"], []])
def test_a_number_of_workers_is_one_or_two_positive_numbers(workers):
    with pytest.raises(RequestError, match=r"^config: scaling.num_workers=.*: must be a positive number or "):
        scaled(num_workers=workers)


def test_epochs_that_no_plan_can_hold_are_refused_unless_the_steps_are_limited(tmp_path, tokenizer_with):
    write_records(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}] * 3)
    config, model = data_config(tmp_path), tokenizer_with()
    refused = refusal(prepare, with_overrides(config, {"train.epochs": 2**31 - 1}), model)
    assert holds(refused, "train.epochs=2147483647 … 6,442,450,941 examples … set train.max_steps")
    limited = with_overrides(config, {"train.epochs": 2**31 - 1, "train.max_steps": 2})
    assert prepare(limited, model).train_rows.row_plan.steps == 2


@pytest.mark.parametrize(
    ("capacities", "workers", "placement", "crosses"),
    [((4.5, 4), 8, "pack", False), ((6.5, 2), 8, "pack", True), ((9,), 8, "pack", False), ((8, 3), 8, "pack", False),
     ((4.5, 4.5), 4, "spread", True), ((4.5, 4.5), 8, "spread", False)],
)  # fmt: skip
def test_groups_of_workers_on_several_nodes_are_known(capacities, workers, placement, crosses):
    scaling = {"num_workers": workers, "sequence_parallel": 4, "placement": placement}
    config = parse({"model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a"}]}, "scaling": scaling})
    assert _cross_nodes(config, [Node(cpus) for cpus in capacities], workers) == crosses
    alone = with_overrides(config, {"scaling.sequence_parallel": 1})
    assert not _cross_nodes(alone, [Node(cpus) for cpus in capacities], workers)
