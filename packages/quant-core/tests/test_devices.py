"""Names of devices and planning for another one."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from quant_core import LimitError
from quant_core.devices import DEVICES, current_device, planned_device, product_of


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("Ascend910B1", "910B"),
        ("Ascend910B4-1", "910B"),
        ("Ascend910_9382", "910C"),
        ("Ascend910_9391", "910C"),
        ("Ascend910C", "910C"),
        ("Ascend950PR_9589", "950"),
        ("Ascend950DT", "950"),
        ("Ascend310P3", "310P"),
        ("ascend310p", "310P"),
        ("910B2C", "910B"),
    ],
)
def test_product_of_a_device_name(name: str, product: str) -> None:
    assert product_of(name) == product


@pytest.mark.parametrize("name", ["Ascend910A", "Ascend310", "Ascend310B1", "NVIDIA H100", ""])
def test_a_device_that_nobody_knows(name: str) -> None:
    with pytest.raises(LimitError, match="910B, 910C, 950, 310P"):
        product_of(name)


def test_a_machine_without_npu_is_a_cpu() -> None:
    if "torch_npu" in sys.modules:
        pytest.skip("torch_npu is imported here")
    assert current_device() == "cpu"


@pytest.mark.parametrize(("available", "product"), [(True, "910C"), (False, "cpu")])
def test_torch_npu_is_asked_where_it_is_imported(
    available: bool, product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for torch_npu, which cannot run here."""
    torch_npu = ModuleType("torch_npu")
    npu = SimpleNamespace(is_available=lambda: available, get_device_name=lambda: "Ascend910_9382")
    monkeypatch.setattr(torch_npu, "npu", npu, raising=False)
    monkeypatch.setitem(sys.modules, "torch_npu", torch_npu)
    assert current_device() == product


def test_planning_for_another_device_ends_with_the_block() -> None:
    before = current_device()
    for device in DEVICES:
        with planned_device(device):
            assert current_device() == device
            with planned_device("310P"):
                assert current_device() == "310P"
            assert current_device() == device
    with pytest.raises(RuntimeError), planned_device("950"):
        raise RuntimeError
    assert current_device() == before


def test_planning_for_an_unknown_product() -> None:
    with pytest.raises(LimitError, match="unknown product '910D'"), planned_device("910D"):
        pass
