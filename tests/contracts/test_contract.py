"""The checks of contracts fail when a library changes, and say where to look."""

from __future__ import annotations

import pytest

from tests.contracts.contract import ROOT, Contract

RAY = Contract("ray", "raysft/cluster/ray_internals.py")


def function(one, *, two=None):
    return one, two


class Base:
    def __init__(self):
        self.kept = 1


class Derived(Base):
    pass


@pytest.mark.parametrize(
    ("check", "lacks"),
    [
        (lambda: RAY.name(Base, "gone", "_coord_actor"), "Base.gone"),
        (lambda: RAY.parameters(function, ["two", "three"], "_coord_actor"), "argument 'three'"),
        (lambda: RAY.positional(function, 2, "_coord_actor"), "2 positional arguments"),
        (lambda: RAY.source(Derived, "self.gone =", "_coord_actor"), "`self.gone =`"),
    ],
)
def test_what_a_library_lacks_is_named_with_the_line_that_needs_it(check, lacks):
    with pytest.raises(AssertionError) as caught:
        check()
    said = str(caught.value).splitlines()[0]
    assert said.startswith("ray 2.")
    assert lacks in said
    path, _, number = said.rpartition("; look at ")[2].rpartition(":")
    assert "_coord_actor" in (ROOT / path).read_text().splitlines()[int(number) - 1]


def test_what_a_library_has_is_accepted():
    assert RAY.name(Base(), "kept", "_coord_actor") == 1
    RAY.parameters(function, ["one", "two"], "_coord_actor")
    RAY.positional(function, 1, "_coord_actor")
    RAY.source(Derived, "self.kept =", "_coord_actor")


def test_a_contract_about_what_is_no_longer_used_is_stale():
    with pytest.raises(AssertionError, match="no longer uses 'never used'"):
        RAY.line("never used")
