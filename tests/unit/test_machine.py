"""What decides the last bits of a worker's numbers."""

import json

import pytest
import torch

from raysft.train import machine

CPUINFO = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Xeon
cpu MHz\t\t: 2599.998
cache size\t: 4096 KB
apicid\t\t: 0
flags\t\t: fpu sse avx512f
bogomips\t: 5199.99

processor\t: 1
vendor_id\t: GenuineIntel
"""


def test_a_machine_describes_itself_always_alike_and_as_json():
    cpu = torch.device("cpu")
    described = machine.describe_machine(cpu)
    assert described
    assert json.loads(json.dumps(described)) == described == machine.describe_machine(cpu)
    assert any(name.startswith("torch-") for name in described["packages"])
    assert torch.__version__.partition("+")[0] in " ".join(described["packages"])


def test_threads_and_variables_of_libraries_belong_to_it(monkeypatch):
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    before = machine.describe_machine(cpu)
    monkeypatch.setenv("HOME_OF_NOBODY", "x")
    assert machine.describe_machine(cpu) == before
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert machine.describe_machine(cpu) != before
    monkeypatch.delenv("MKL_CBWR")
    torch.set_num_threads(threads + 1)
    try:
        assert machine.describe_machine(cpu) != before
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("2599.998", "3100.5", True),
        ("apicid\t\t: 0", "apicid\t\t: 7", True),
        ("5199.99", "5200.01", True),
        ("avx512f", "avx2", False),
        ("4096 KB", "8192 KB", False),
        ("Xeon", "EPYC", False),
    ],
)
def test_a_processor_is_known_by_its_kind_and_not_by_its_clock(tmp_path, old, new, same):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text(CPUINFO)
    other.write_text(CPUINFO.replace(old, new))
    assert (machine.processor(one) == machine.processor(other)) == same
    assert machine.processor(tmp_path / "none")


def test_a_machine_is_not_described_while_other_code_is_on_disk(monkeypatch):
    monkeypatch.setattr(machine, "imported_code", lambda: None)
    assert machine.describe_machine(torch.device("cpu")) is None
