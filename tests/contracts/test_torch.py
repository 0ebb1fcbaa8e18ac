"""torch: oneDNN's product of matrices, the hooks of modules, fake tensors, and the counters of a learning rate scheduler."""

from __future__ import annotations

import pytest
import torch

from raysft.models.torch_internals import (
    LiveBytes,
    LiveMetaBytes,
    all_chosen,
    allow_graphs,
    fake_tensors,
    has_hooks,
    is_fake,
    mark_dynamic,
)
from tests.contracts.contract import Contract

ONEDNN = Contract("torch", "raysft/models/onednn.py")
HOOKS = Contract("torch", "raysft/models/torch_internals.py")
OPTIM = Contract("torch", "raysft/train/optim.py")


def test_onednn_has_an_operator_for_linear_layers():
    product = ONEDNN.name(torch.ops.mkldnn, "_linear_pointwise").default
    a, b = torch.randn(4, 8), torch.randn(6, 8)
    torch.testing.assert_close(product(a, b, None, "none", [], ""), a @ b.t())
    packed = ONEDNN.name(torch.ops.mkldnn, "_reorder_linear_weight")(b, 4)
    torch.testing.assert_close(product(a, packed, None, "none", [], ""), a @ b.t())
    assert torch.equal(packed.to_dense(), b)


def test_a_graph_serves_sizes_that_are_marked():
    from torch import _dynamo

    HOOKS.positional(HOOKS.name(_dynamo, "maybe_mark_dynamic"), 2)
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    doubled = torch.compile(lambda numbers: 2 * numbers, backend=compiler)
    for size in (4, 6, 8):
        numbers = torch.ones(2, size)
        mark_dynamic(numbers, [1])
        assert doubled(numbers).shape == (2, size)
    assert len(graphs) == 1


def test_a_function_has_as_many_graphs_as_are_allowed():
    from torch._dynamo import config
    from torch._dynamo.utils import counters

    limits = ("recompile_limit", "accumulated_recompile_limit")
    for name in limits:
        HOOKS.name(config, name)
    counters.clear()
    power = torch.compile(lambda numbers, exponent: numbers**exponent, backend="eager", dynamic=False)
    with config.patch(dict.fromkeys(limits, 1)):
        allow_graphs(3)
        for exponent in (2, 3, 4):
            power(torch.ones(2), exponent)
    assert counters["stats"]["unique_graphs"] == 3
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "register"),
    [
        ("_forward_hooks", "register_forward_hook"),
        ("_forward_pre_hooks", "register_forward_pre_hook"),
        ("_backward_hooks", "register_full_backward_hook"),
        ("_backward_pre_hooks", "register_full_backward_pre_hook"),
    ],
)
def test_a_module_knows_its_hooks(name, register):
    module = torch.nn.Identity()
    assert not HOOKS.name(module, name)
    assert not has_hooks(module)
    hook = getattr(module, register)(lambda *_: None)
    assert has_hooks(module)
    hook.remove()
    assert not has_hooks(module)


def test_fake_tensors_have_shapes_and_no_memory():
    with fake_tensors():
        weight = torch.empty(1 << 20, 1 << 20, requires_grad=True)
        product = torch.ones(2, 1 << 20) @ weight
        product.sum().backward()
    assert is_fake(product)
    assert not is_fake(torch.empty(1))
    assert product.device.type == "cpu"
    assert weight.grad is not None
    assert weight.grad.shape == weight.shape


def test_a_mask_without_values_chooses_everything():
    values, mask = torch.empty(4, 6, device="meta"), torch.empty(4, dtype=torch.bool, device="meta")
    with pytest.raises(NotImplementedError):
        values[mask]
    with all_chosen():
        assert values[mask].shape == (4, 6)


def test_live_bytes_of_meta_tensors_are_counted_beside_tensors_with_values():
    weight, counts, live = torch.empty(4, 8, device="meta"), torch.tensor([1, 0, 2]), LiveMetaBytes()
    live.ignore([weight, counts])
    with live:
        chosen = weight[counts] * counts[:, None]
        assert (counts + 1).tolist() == [2, 1, 3]
    assert chosen.is_meta
    assert live.now == 3 * 8 * 4


@pytest.mark.parametrize("fake", [False, True])
def test_live_bytes_are_those_of_storages_that_are_alive(fake):
    with fake_tensors() if fake else torch.no_grad():
        weight, live = torch.empty(10), LiveBytes()
        live.ignore([weight])
        with live:
            one = torch.empty(100)
            view = one[:50].view(2, 25)
            weight.detach().view(2, 5)
            assert live.now == 400, "views and ignored tensors count nothing"
            other = one + 1
            assert live.now == live.peak == 800
            del one
            assert live.now == 800, "the view holds its storage"
            del view
            assert (live.now, live.peak) == (400, 800)
            del other
            assert live.now == 0


def test_a_learning_rate_scheduler_counts_its_steps_and_its_calls():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    state = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0).state_dict()
    for name in ("last_epoch", "_step_count"):
        assert name in state, f"torch {torch.__version__} lacks LRScheduler.{name}; look at {OPTIM.line(name)}"
