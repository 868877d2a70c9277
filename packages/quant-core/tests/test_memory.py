"""Bytes per rank, by hand."""

import pytest

from quant_core import (
    DOWN,
    GATE_UP,
    Evidence,
    ExpertSizes,
    LayerQuant,
    LayerQuery,
    LimitError,
    LinearSizes,
    Partition,
    StoredForm,
    WeightForm,
    create_scheme,
)
from quant_core.memory import stored_bytes

IN, OUT = 256, 512
SCALES = 8  # bytes of an output feature's float32 scale and offset


def linear(quant_type: str, partition: Partition, local: int = OUT, form: WeightForm | None = None) -> int:
    query = LayerQuery("layer", sizes=LinearSizes(IN, (OUT,), (local,)), partition=partition)
    return stored_bytes(create_scheme(query, LayerQuant(quant_type, ("layer",), (StoredForm("layer", weight=form),))))


def answer(modules: tuple[str, ...]) -> LayerQuant:
    evidence = (Evidence("file", "key", "W8A8_DYNAMIC"),)
    return LayerQuant("W8A8_DYNAMIC", modules, tuple(map(StoredForm, modules)), evidence)


def test_a_layer_on_one_rank() -> None:
    assert linear("W8A8_DYNAMIC", Partition()) == OUT * IN + OUT * SCALES
    assert linear("W8A8_DYNAMIC", Partition("replicated", size=4)) == OUT * IN + OUT * SCALES


def test_outputs_take_their_scales_along_and_inputs_do_not() -> None:
    assert linear("W8A8_DYNAMIC", Partition("column", size=4), OUT // 4) == (OUT * IN + OUT * SCALES) // 4
    assert linear("W8A8_DYNAMIC", Partition("row", size=4)) == OUT * IN // 4 + OUT * SCALES


def test_scales_of_groups_are_cut_with_the_inputs_or_not_at_all() -> None:
    groups = WeightForm(num_bits=8, strategy="group", group_size=64)
    whole = linear("W8A16", Partition(), form=groups)
    assert whole == OUT * IN + OUT * IN // 64 * SCALES
    assert linear("W8A16", Partition("row", size=2), form=groups) == whole // 2
    with pytest.raises(LimitError, match="cannot be cut over 8"):
        linear("W8A16", Partition("row", size=8), form=groups)


def test_experts_are_cut_or_placed() -> None:
    number, hidden, intermediate = 4, 128, 64
    names = {GATE_UP: ("gate", "up"), DOWN: ("down",)}
    experts = {half: tuple(tuple(f"{e}.{n}" for n in of) for e in range(number)) for half, of in names.items()}

    def held(partition: Partition, local: tuple[int, ...]) -> int:
        sizes = ExpertSizes(hidden, intermediate, number, local)
        query = LayerQuery("experts", "moe", experts=experts, sizes=sizes, partition=partition)
        halves = {half: answer(tuple(m for e in experts[half] for m in e)) for half in names}
        return stored_bytes(create_scheme(query, LayerQuant("W8A8_DYNAMIC", (), halves=halves)))

    expert = 3 * hidden * intermediate + (2 * intermediate + hidden) * SCALES
    assert held(Partition(), (0, 1, 2, 3)) == 4 * expert
    assert held(Partition(), (1, 3)) == 2 * expert  # expert parallelism
    cut = 3 * hidden * intermediate // 2 + (intermediate + hidden) * SCALES
    assert held(Partition(size=2), (0, 1, 2, 3)) == 4 * cut
