"""What the table of optimizers says is derived here from the optimizers themselves."""

from __future__ import annotations

import inspect
import io
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raysft.config import TrainSection, parse
from raysft.config.optimizer_settings import OWN_BETAS, OWN_EPSILON, SELF_SCALED, UNDECAYED
from raysft.config.optimizers import (
    ALIASES,
    DIVIDES,
    OPTIMIZERS,
    REFUSED,
    WHOLE_OPTIONS,
    optimizer_name,
    optimizer_table,
    refused_table,
)
from raysft.errors import RequestError
from raysft.train.optim import make_optimizer
from raysft.train.optimizer_makers import FURTHER, MAKERS, class_of, options_of, settings_of
from tests.messages import holds

SHAPES = {"layers.0.a": (12, 32), "layers.0.bias": (40,), "layers.1.b": (32, 12), "norm": (24,)}
SIZES = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
TOTAL = sum(SIZES.values())
ELEMENTWISE = [name for name, kind in OPTIMIZERS.items() if kind.elementwise]
BLOCKS = [name for name in ELEMENTWISE if OPTIMIZERS[name].library == "bitsandbytes"]
ALIKE = [name for name in OPTIMIZERS if name not in MAKERS]
SEARCHED = {name for name in SELF_SCALED if name.startswith(("dadapt", "prodigy"))}
"""Optimizers that begin with a small step, ``d0``, and find how much larger it can be."""
GENERATOR = torch.Generator().manual_seed(0)
WEIGHTS, GOAL = (torch.randn(TOTAL, generator=GENERATOR) for _ in range(2))
CURVATURE = torch.exp(torch.randn(TOTAL, generator=GENERATOR))


class Parts(nn.Module):
    """Some of the weights, as parameters with the names and shapes given."""

    def __init__(self, parts: Sequence[tuple[str, int, tuple[int, ...]]]) -> None:
        super().__init__()
        self.parts = parts
        for name, start, shape in parts:
            size = torch.Size(shape).numel()
            self.register_parameter(
                name.replace(".", "/"), nn.Parameter(WEIGHTS[start : start + size].reshape(shape).clone())
            )

    def give_gradients(self, gradient: Callable[[torch.Tensor, slice], torch.Tensor]) -> None:
        for (_, start, shape), parameter in zip(self.parts, self.parameters(), strict=True):
            where = slice(start, start + parameter.numel())
            found = gradient(parameter.detach().reshape(-1), where).reshape(shape)
            parameter.grad = found.to(parameter.dtype, copy=True)

    def values(self) -> torch.Tensor:
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters()])


def whole() -> Parts:
    starts = [sum(list(SIZES.values())[:index]) for index in range(len(SIZES))]
    return Parts([(name, start, shape) for (name, shape), start in zip(SHAPES.items(), starts, strict=True)])


def pieces() -> list[Parts]:
    """The same weights, flattened and cut as ZeRO does it, each piece with an optimizer of its own."""
    cuts = [0, 256, 512, TOTAL]
    return [Parts([("flat", start, (end - start,))]) for start, end in itertools.pairwise(cuts)]


def settings(name: str, **options: Any) -> TrainSection:
    rate = 1.0 if name in SEARCHED else 1e-2
    schedule = "constant" if OPTIMIZERS[name].averages else "cosine"
    return TrainSection(
        optimizer=name,
        weight_decay=0.01,
        learning_rate=rate,
        zero_stage=0,
        schedule=schedule,
        optimizer_options={**DEFAULTS.get(name, {}), **options},
    )


RIGHT_UNTIL_THEN = ("scalable_shampoo", "swats", "sara", "spam")
"""Optimizers that begin to compute with whole matrices, or with masks that they draw, after many steps."""
RIGHT_BUT = {
    "adagrad": "DeepSpeed makes it anew, and its groups are lost",
    "aggmo": "its state is a mapping, which a checkpoint by weight does not have",
    "madgrad": "one counter for all weights, which ZeRO-3 would increase for each group",
}
DEFAULTS: dict[str, dict[str, Any]] = {
    **{name: {"d0": 1e-2} for name in SEARCHED},
    "pid": {"momentum": 0.9},
    **{name: {"min_8bit_size": 64} for name in OPTIMIZERS if name.endswith("8bit")},
}
"""Options without which an optimizer would not show in a test what it does to large weights."""


def noisy(step: int) -> Callable[[torch.Tensor, slice], torch.Tensor]:
    """The gradient of a quadratic, with noise."""
    noise = torch.randn(TOTAL, generator=torch.Generator().manual_seed(step))

    def gradient(weights: torch.Tensor, where: slice) -> torch.Tensor:
        return CURVATURE[where] * (weights - GOAL[where]) + noise[where]

    return gradient


def random(step: int) -> Callable[[torch.Tensor, slice], torch.Tensor]:
    """A gradient that does not depend on the weights."""
    noise = torch.randn(TOTAL, generator=torch.Generator().manual_seed(step)) * (1 + step % 7)
    return lambda weights, where: noise[where]


def run(
    name: str, models: Sequence[Parts], gradients: Any, steps: int, all_decay: bool = False, **options: Any
) -> tuple[torch.Tensor, list[Any]]:
    """Step each model with an optimizer of its own; all random numbers of a step begin alike."""
    optimizers = [make_optimizer(model, settings(name, **options)) for model in models]
    for optimizer in optimizers if all_decay else ():
        for group in optimizer.param_groups:
            if "weight_decay" in group:
                group["weight_decay"] = 0.01
    for step in range(steps):
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(step)
            model.give_gradients(gradients(step))
            optimizer.step()
    return torch.cat([model.values() for model in models]), optimizers


def differences(name: str, runs: Any = ((noisy, 30), (random, 12)), **options: Any) -> Iterator[float]:
    """Yield by how much weights differ that were updated as matrices and vectors, or as pieces of one flat tensor."""
    for gradients, steps in runs:
        together, _ = run(name, [whole()], gradients, steps, True, **options)
        apart, _ = run(name, pieces(), gradients, steps, True, **options)
        assert (together - WEIGHTS).abs().max() > 1e-5, "it moves weights"
        yield float((together - apart).abs().max())


def differ_at_some_time(name: str, **options: Any) -> bool:
    """True if they differ; most do after a few steps."""
    return any(
        found > 1e-5 for found in differences(name, ((noisy, 3), (random, 4), (noisy, 30), (random, 12)), **options)
    )


@pytest.mark.parametrize("name", [name for name in ELEMENTWISE if name not in BLOCKS])
def test_an_optimizer_for_zero_treats_each_weight_by_itself(name):
    assert max(differences(name)) < 1e-5


@pytest.mark.parametrize("name", BLOCKS)
def test_an_optimizer_of_8_bits_for_zero_treats_each_block_by_itself(name):
    """Pieces that begin at a block have the same codes; others have nearly the same numbers."""
    cuts = (0, 512, TOTAL)
    flat = Parts([("flat", 0, (TOTAL,))])
    cut = [Parts([("flat", start, (end - start,))]) for start, end in itertools.pairwise(cuts)]
    together, _ = run(name, [flat], noisy, 20, True)
    apart, _ = run(name, cut, noisy, 20, True)
    assert torch.equal(together, apart)


@pytest.mark.parametrize(
    "name",
    [name for name in ALIKE if not OPTIMIZERS[name].elementwise and name not in (*RIGHT_UNTIL_THEN, *RIGHT_BUT)],
)
def test_the_others_would_be_wrong_under_zero(name):
    assert differ_at_some_time(name)


@pytest.mark.parametrize("name", RIGHT_BUT)
def test_those_that_would_be_right_under_zero_and_are_not_for_it_have_a_reason(name):
    assert max(differences(name)) < 1e-5


@pytest.mark.parametrize("option", WHOLE_OPTIONS)
def test_an_option_that_is_refused_under_zero_needs_whole_matrices(option):
    name = {"max_grad_norm": "adan", "cautious": "lion", "stable_adamw": "adopt"}.get(option, "adan")
    assert differ_at_some_time(name, **{option: 0.1 if "norm" in option and option != "adanorm" else True})


@pytest.mark.parametrize("name", ALIKE)
def test_an_optimizer_steps_as_its_library_used_alone(name):
    """With the settings of the config, on groups made by hand."""
    model = whole()
    ours, _ = run(name, [model], noisy, 10)
    reference = whole()
    kind, train = OPTIMIZERS[name], settings(name)
    matrices = [p for p in reference.parameters() if p.dim() == 2]
    vectors = [p for p in reference.parameters() if p.dim() < 2]
    flags = ({kind.flag: True}, {kind.flag: False}) if kind.flag else ({}, {})
    made = class_of(kind)
    decays = "weight_decay" in inspect.signature(made).parameters
    decayed, undecayed = ({"weight_decay": 0.01}, {"weight_decay": 0.0}) if decays else ({}, {})
    optimizer = made(
        [{"params": matrices, **flags[0]}, {"params": vectors, **flags[1], **undecayed}],
        **{**settings_of(made, train), **decayed, **train.optimizer_options},
    )
    for step in range(10):
        torch.manual_seed(step)
        reference.give_gradients(noisy(step))
        optimizer.step()
    torch.testing.assert_close(ours, reference.values(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ALIKE)
def test_each_weight_follows_the_learning_rate(name):
    """A tenth of the rate moves each tensor a tenth as far, whether a matrix inside the layers, an embedding or a vector."""
    model_of = {"layers.0.a": (12, 32), "embed": (32, 12), "layers.0.bias": (40,)}
    starts = [0, 384, 768]
    moved = []
    for rate in (1e-2, 1e-3):
        model = Parts([(each, start, shape) for (each, shape), start in zip(model_of.items(), starts, strict=True)])
        train = settings(name, **({"threshold": 1e9} if name == "sara" else {}))
        optimizer = make_optimizer(model, train.model_copy(update={"learning_rate": rate, "weight_decay": 0.0}))
        for step in range(9):
            torch.manual_seed(step)
            model.give_gradients(random(step))
            optimizer.step()
        moved.append([(weight.detach().reshape(-1) - WEIGHTS[start : start + weight.numel()]).norm()
                      for weight, start in zip(model.parameters(), starts, strict=True)])  # fmt: skip
    for large, small in zip(*moved, strict=True):
        assert 4 < large / small < 20  # MADGRAD's steps are as the rate to the power of two thirds


def test_which_settings_an_optimizer_takes():
    """Adam's go to those with Adam's defaults."""
    for name in ALIKE:
        parameters = inspect.signature(class_of(OPTIMIZERS[name])).parameters
        defaults = {key: parameter.default for key, parameter in parameters.items()}
        assert (defaults.get("betas") != (0.9, 0.999)) is (name in OWN_BETAS), name
        assert (defaults.get("eps") != 1e-8) is (name in OWN_EPSILON), name
        assert ("weight_decay" not in defaults) is (name in UNDECAYED), name
        # Plain gradient descent, whose steps are as large as the gradients, has the same default.
        assert (defaults["lr"] == 1.0) is (name in SELF_SCALED or name == "schedulefree_sgd"), name
    assert (OWN_BETAS & MAKERS.keys()) == (OWN_EPSILON & MAKERS.keys()) == {"adafactor"}


@pytest.mark.parametrize("name", SELF_SCALED)
def test_a_self_scaled_optimizer_hardly_moves_at_a_rate_for_adam(name):
    def distance(rate: float) -> float:
        model = whole()
        train = TrainSection(optimizer=name, learning_rate=rate, zero_stage=0)
        optimizer = make_optimizer(model, train)
        for step in range(100):
            model.give_gradients(noisy(step))
            optimizer.step()
        return float((model.values() - WEIGHTS).abs().max())

    assert distance(1e-4) < 0.01 < distance(1.0)


@pytest.mark.parametrize("name", ALIKE)
def test_weights_without_a_gradient_stay_as_they_were(name):
    """As rows of an embedding whose tokens do not occur, and LoRA's A in the first step."""
    model = Parts([("layers.0.a", 0, (12, 32)), ("layers.0.b", 384, (32, 12))])
    train = settings(name).model_copy(update={"weight_decay": 0.0, "learning_rate": 1e-4})
    optimizer = make_optimizer(model, train)
    first, second = model.parameters()
    for step in range(4):
        torch.manual_seed(step)
        model.give_gradients(random(step))
        assert first.grad is not None
        assert second.grad is not None
        if step == 0:
            first.grad.zero_()
        second.grad[:6] = 0
        optimizer.step()
        if step == 0:
            assert (first.detach().reshape(-1) - WEIGHTS[: first.numel()]).abs().max() < 2e-4
    assert (second.detach()[:6].reshape(-1) - WEIGHTS[384 : 384 + 6 * 12]).abs().max() < 2e-3
    assert all(bool(torch.isfinite(weight).all()) for weight in (first, second))


@pytest.mark.parametrize("name", ALIKE)
def test_who_divides_by_the_learning_rate_has_no_warm_up(name):
    model = whole()
    optimizer = make_optimizer(model, settings(name))
    model.give_gradients(noisy(0))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    try:
        optimizer.step()
        finite = bool(torch.isfinite(model.values()).all())
    except ZeroDivisionError:
        finite = False
    assert finite is (name not in DIVIDES)


@pytest.mark.parametrize("name", ALIKE)
def test_states_in_bfloat16_alone_train_unless_they_are_refused(name):
    """With ``train.pure_bf16``; 1 - 0.999 is 0 in bfloat16, by which ``adai`` divides."""

    def loss(dtype: torch.dtype, steps: int) -> float:
        model = whole().to(dtype)
        optimizer = make_optimizer(model, settings(name).model_copy(update={"weight_decay": 0.0}))
        for step in range(steps):
            torch.manual_seed(step)
            model.give_gradients(noisy(step))
            optimizer.step()
        return float((CURVATURE * (model.values().float() - GOAL) ** 2).mean())

    start, exact, found = loss(torch.float32, 0), loss(torch.float32, 30), loss(torch.bfloat16, 30)
    assert (found < max(start, 1.1 * exact)) is (name != "adai")


@pytest.mark.parametrize("name", ALIKE)
def test_who_draws_random_numbers_has_one_worker(name):
    model = whole()
    optimizer = make_optimizer(model, settings(name))
    drawn = False
    for step in range(3):
        before = torch.get_rng_state()
        model.give_gradients(noisy(step))
        optimizer.step()
        drawn |= not torch.equal(before, torch.get_rng_state())
    if drawn:
        assert not OPTIMIZERS[name].workers
    elif not OPTIMIZERS[name].workers:
        assert re.search(r"rand|multinomial|random", source_of(name)), "it draws later, or with Python's generator"


def source_of(name: str) -> str:
    return Path(inspect.getfile(class_of(OPTIMIZERS[name]))).read_text()


def test_the_table_has_every_optimizer_of_its_library():
    import pytorch_optimizer

    theirs = {
        name
        for name, value in vars(pytorch_optimizer).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
    }
    used = {kind.name for kind in OPTIMIZERS.values()}
    refused = {name.replace("_", "").lower() for name in REFUSED}
    others = {"AdaFactor", "APOLLO", "GaLore", "Muon", "Adam"}
    missing = {name for name in theirs - used - others if name.lower() not in refused}
    assert not missing
    assert not OPTIMIZERS.keys() & REFUSED.keys()
    assert set(ALIASES.values()) <= OPTIMIZERS.keys()


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("AdamW", "adamw"), ("adamw_torch_fused", "adamw"), ("adamw-8bit", "adamw_8bit"),
        ("schedule_free_adamw", "schedulefree_adamw"),
        ("StableAdamW", "stable_adamw"), ("paged_lion_32bit", "paged_lion"), ("grokadamw", "grokfast_adamw"),
        *((kind.name, name) for name, kind in OPTIMIZERS.items()),
    ],
)  # fmt: skip
def test_a_name_is_known_in_other_spellings(given, name):
    assert optimizer_name(given) == name
    assert TrainSection(optimizer=given).optimizer == name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("adamw_9bit", "config: train.optimizer='adamw_9bit' … did you mean adamw_8bit?"),
        ("xyz", "config: train.optimizer='xyz' … configs/README.md"),
        ("sophia_h", "config: train.optimizer='sophia_h' … second derivatives … use"),
        ("lomo", "config: train.optimizer='lomo' … during the backward pass … use adafactor"),
        ("sam", "config: train.optimizer='sam' … several times … use adamw"),
        ("emo_navi", "config: train.optimizer='emo_navi' … loss … use adamw"),
    ],
)
def test_an_unknown_name_and_one_that_cannot_be_used_are_refused(given, message):
    with pytest.raises(RequestError) as caught:
        parse({"model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a"}]}, "train": {"optimizer": given}})
    assert holds(str(caught.value), message)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lion", {"nonsense": 1}, "train.optimizer=lion has no option 'nonsense'"),
        ("adan", {"betta": 1}, "train.optimizer=adan has no option 'betta'; did you mean betas?"),
        ("lion", {"betas": (2.0, 0.9)}, "train.optimizer=lion refuses train.optimizer_options … fix the options"),
        ("adamw_8bit", {"optim_bits": 4}, "train.optimizer=adamw_8bit has no option 'optim_bits'; its options are"),
        ("galore", {"rankk": 4}, "train.optimizer=galore has no option 'rankk'"),
    ],
)
def test_an_option_that_an_optimizer_does_not_have_is_refused(name, options, message):
    with pytest.raises(RequestError) as caught:
        make_optimizer(whole(), settings(name, **options))
    assert holds(str(caught.value), message)


@pytest.mark.parametrize("name", ALIKE)
def test_the_bytes_of_an_optimizers_state(name):
    """Of a large matrix, without what has only the size of its sides."""
    kind, shape = OPTIMIZERS[name], (192, 320)
    model = nn.Module()
    model.register_parameter("layers/weight", nn.Parameter(torch.randn(shape)))
    optimizer = make_optimizer(model, settings(name))
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn(shape)
        optimizer.step()
    elements = shape[0] * shape[1]
    expected = 4 * (kind.copies * elements + kind.squares * (shape[0] ** 2 + shape[1] ** 2))
    assert bytes_of(optimizer) == pytest.approx(expected, rel=0.1, abs=40 * 4 * sum(shape))


def bytes_of(optimizer: torch.optim.Optimizer) -> int:
    """All tensors, also those in objects."""
    stream = io.BytesIO()
    torch.save(optimizer.state_dict()["state"], stream)
    return stream.tell()


def test_the_guide_has_the_tables_with_each_optimizer_once():
    guide = (Path(__file__).parents[2] / "configs" / "README.md").read_text()
    for lines, column, names in ((optimizer_table(), 1, OPTIMIZERS), (refused_table(), 2, REFUSED)):
        table = list(lines)
        assert "\n".join(table) in guide
        listed = [name for line in table[2:] for name in re.findall(r"`(\w+)`", line.split("|")[column])]
        assert sorted(listed) == sorted(names)


def test_an_option_that_is_no_argument_is_taken_where_the_class_reads_it():
    """Other constructors take it as well, and forget it."""
    taken = set()
    for name, kind in OPTIMIZERS.items():
        made = class_of(kind)
        if kind.library != "pytorch_optimizer":
            continue
        source = source_of(name).partition(f"class {made.__name__}(")[2].partition("\nclass ")[0]
        for option in FURTHER - inspect.signature(made).parameters.keys():
            read = re.search(rf"""['"]{option}['"]""", source) is not None
            assert (option in options_of(made)) is read, (name, option)
            taken |= {option} if read else set()
    assert taken == FURTHER
