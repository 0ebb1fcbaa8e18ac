"""oneDNN behind torch's matrix products gives the same numbers."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from raysft.models import onednn
from raysft.models.onednn import PackedLinear, pack_linear


@pytest.fixture
def with_onednn():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    library = onednn._override()
    yield
    library._destroy()
    onednn._override.cache_clear()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(300, 576, 192), (2, 128, 96, 256), (3, 5, 7), (512, 8, 576)])
def test_a_layer_and_its_gradients_are_those_of_float64(with_onednn, shape, bias):
    *rows, inputs, outputs = shape
    torch.manual_seed(1)
    layer = torch.nn.Linear(inputs, outputs, bias=bias)
    exact = torch.nn.Linear(inputs, outputs, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(*rows, inputs, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    y, exact_y = layer(x), exact(exact_x)
    y.square().mean().backward()
    exact_y.square().mean().backward()
    torch.testing.assert_close(y.double(), exact_y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-5, atol=1e-7)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), exact.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [torch.arange(1000.0)[::2], torch.full((1,), 3.0).expand(500), torch.ones(1)])
def test_a_bias_of_any_form_is_added(with_onednn, bias):
    x, weight = torch.randn(300, 400), torch.randn(500, 400)
    exact = (x.double() @ weight.double().t() + bias.double()).float()
    torch.testing.assert_close(torch.nn.functional.linear(x, weight, bias), exact, rtol=0, atol=1e-3)


def test_large_products_are_onednns(with_onednn):
    with torch.profiler.profile() as profiler:
        torch.randn(300, 200) @ torch.randn(200, 100)
    assert "mkldnn::_linear_pointwise" in {event.key for event in profiler.key_averages()}


def test_what_onednn_does_not_take_is_computed_as_before(with_onednn):
    a, b = torch.randn(300, 400), torch.randn(400, 500)
    for kind in (torch.float64, torch.bfloat16):
        assert (a.to(kind) @ b.to(kind)).dtype == kind
    exact = (a.double() @ b.double()).float()
    torch.testing.assert_close(
        torch.addmm(torch.ones(300, 500), a, b, beta=2, alpha=3), 2 + 3 * exact, rtol=0, atol=1e-3
    )
    torch.testing.assert_close(a[:, ::2] @ b[::2], (a[:, ::2].double() @ b[::2].double()).float(), rtol=0, atol=1e-3)
    assert (torch.randn(3, 0) @ torch.randn(0, 7)).tolist() == torch.zeros(3, 7).tolist()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        a @ torch.randn(500, 600)


@pytest.mark.parametrize(("vendor", "expected"), [("AuthenticAMD", True), ("GenuineIntel", False)])
def test_the_choice_follows_from_the_processor(tmp_path, monkeypatch, vendor, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    described = tmp_path / "cpuinfo"
    described.write_text(f"processor : 0\nvendor_id : {vendor}\n")
    assert onednn.is_slow_with_mkl(described) is expected
    assert not onednn.is_slow_with_mkl(Path("/nowhere"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not onednn.is_slow_with_mkl(described)


@pytest.fixture
def packs(monkeypatch):
    """A processor on which oneDNN is used and layers are packed."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(onednn, "is_slow_with_mkl", lambda: True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(8,), (64,), (300,), (2, 40), (1,), (1, 1), (0,), (3, 0)])
@torch.inference_mode()
def test_a_packed_layer_computes_what_onednn_does_with_plain_weights(shape, bias):
    torch.manual_seed(2)
    layer = nn.Linear(576, 1536, bias=bias)
    packed = PackedLinear(layer, 64)
    x = torch.randn(*shape, 576)
    exact = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    torch.testing.assert_close(packed(x), exact.float(), rtol=1e-5, atol=1e-5)
    if x.numel() >= 8 * 576:
        plain = torch.ops.mkldnn._linear_pointwise.default(x, layer.weight, layer.bias, "none", [], "")
        assert torch.equal(packed(x), plain)
        spread = torch.randn(*shape, 2 * 576)[..., ::2]
        assert torch.equal(packed(spread), packed(spread.contiguous()))
    assert torch.equal(packed.weight, layer.weight)


class Tied(nn.Module):
    """An embedding that is also the output layer, two layers with the same weight, one of another kind, and an adapter's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(700, 96)
        self.layers = nn.ModuleList(nn.Linear(96, 96) for _ in range(3))
        self.layers[1].weight, self.layers[1].bias = self.layers[0].weight, self.layers[0].bias
        self.lora = nn.ModuleDict({"default": nn.Linear(96, 96)})
        self.half = nn.Linear(96, 96).to(torch.bfloat16)
        self.small = nn.Linear(8, 8)
        self.special = nn.utils.parametrizations.weight_norm(nn.Linear(96, 96))
        self.head = nn.Linear(96, 700, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def test_a_weight_is_there_once_and_one_that_an_embedding_shares_twice(packs):
    torch.manual_seed(3)
    model, tokens = Tied().eval(), torch.arange(64)
    with torch.inference_mode():
        expected = model(tokens)
    embedding = model.embedding.weight
    weights = [weakref.ref(layer.weight) for layer in model.layers]
    assert pack_linear(model, 64) == 4
    assert {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, PackedLinear)} == {
        "layers.0", "layers.1", "layers.2", "head",
    }  # fmt: skip
    assert [weight() for weight in weights] == [None] * 3
    assert model.layers[0] is model.layers[1]
    assert model.embedding.weight is embedding
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
    assert pack_linear(model, 64) == 0


def test_only_layers_that_gain_are_packed(packs, monkeypatch):
    def layers() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.Linear(1024, 511), nn.Linear(1024, 512))

    assert pack_linear(layers(), 64) == 2  # 64 · 64 · 64 products are as many as SMALL, not more
    assert pack_linear(layers(), 65) == 3
    monkeypatch.setattr(onednn, "is_slow_with_mkl", lambda: False)
    assert pack_linear(layers(), 64) == 1
    assert pack_linear(layers(), 7) == 0
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert pack_linear(layers(), 64) == 0
