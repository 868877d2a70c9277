"""FlatQuant's sizes: how k features become a matrix, and what is refused."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant_core import LimitError, Partition
from quant_core.schemes import flatquant
from quant_core.schemes.flatquant import get_decompose_dim


@given(st.integers(1, 60_000).filter(lambda k: k % 4 != 2))
def test_of_all_pairs_with_an_even_sum_it_is_the_one_with_the_smallest(k: int) -> None:
    """Since k = (a - b) (a + b), the smallest a is half the smallest sum of two factors of equal parity."""
    left, right = get_decompose_dim(k)
    assert left * right == k
    assert left <= right
    divisors = [d for d in range(1, math.isqrt(k) + 1) if k % d == 0]
    assert left + right == min(d + k // d for d in divisors if (d + k // d) % 2 == 0)


@given(st.integers(1, 4000).filter(lambda k: k % 4 != 2))
def test_the_definition_step_by_step(k: int) -> None:
    squares = {b * b: b for b in range(k + 1)}
    a = next(a for a in range(1, k + 1) if a * a >= k and a * a - k in squares)
    assert get_decompose_dim(k) == (a - squares[a * a - k], a + squares[a * a - k])


@pytest.mark.parametrize(
    ("k", "sizes"), [(128, (8, 16)), (384, (16, 24)), (4096, (64, 64)), (11008, (86, 128)), (1, (1, 1)), (7, (1, 7))]
)
def test_sizes_of_models(k: int, sizes: tuple[int, int]) -> None:
    assert get_decompose_dim(k) == sizes


@pytest.mark.parametrize("k", [2, 6, 4098, 0, -8])
def test_a_k_without_such_factors(k: int) -> None:
    with pytest.raises(ValueError, match=f"^{k} input features"):
        get_decompose_dim(k)


def stored(left: tuple[int, ...], right: tuple[int, ...] | None = None, k: int = 128) -> dict[str, torch.Tensor]:
    """A module with matrices of these shapes."""
    tensors = {"weight": torch.zeros(8, k, dtype=torch.int8), "left_trans": torch.zeros(left)}
    return tensors | ({} if right is None else {"right_trans": torch.zeros(right)})


@pytest.mark.parametrize(
    ("tensors", "sizes"),
    [
        (stored((8, 8), (16, 16)), (8, 16)),
        (stored((4, 4), (32, 32)), (4, 32)),  # not what the rule would choose
        (stored((4, 4)), (4, 32)),
        ({"weight": torch.zeros(8, 128, dtype=torch.int8)}, (8, 16)),  # a plan without matrices
    ],
)
def test_sizes_come_from_the_tensors(workbench: Any, tensors: dict[str, torch.Tensor], sizes: tuple[int, int]) -> None:
    context = workbench.context([tensors])
    assert flatquant.transform_sizes(context) == sizes
    assert flatquant.transform_reasons(context) == []


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (stored((8, 8), (8, 8)), "left_trans of 8 and right_trans of 8 do not transform 128 input features"),
        (stored((5, 5)), "left_trans of 5 and right_trans of 25 do not transform 128 input features"),
        (stored((0, 0)), "left_trans of 0 and right_trans of 128 do not transform 128 input features"),
        (stored((8, 4), (16, 16)), r"expected square matrices, the files hold left_trans [8, 4], right_trans [16, 16]"),
        (stored((8,)), r"expected square matrices, the files hold left_trans [8]"),
    ],
)
def test_matrices_that_do_not_fit(workbench: Any, tensors: dict[str, torch.Tensor], reason: str) -> None:
    assert flatquant.transform_reasons(workbench.context([tensors])) == [reason]


@pytest.mark.parametrize("tensors", [stored((8, 8), (16, 16)), stored((4, 4))])
def test_a_cut_through_the_transform_names_a_size_that_works(workbench: Any, tensors: dict[str, torch.Tensor]) -> None:
    (reason,) = flatquant.transform_reasons(workbench.context([tensors], partition=Partition("row", 1, 2)))
    assert reason == "left_trans mixes input features of all 2 tensor-parallel ranks: use tensor_parallel_size 1"
    for partition in (Partition("row", 0, 1), Partition("column", 1, 2), Partition("replicated", 1, 2)):
        assert flatquant.transform_reasons(workbench.context([tensors], partition=partition)) == []


def test_an_input_of_another_size_is_an_error_with_the_three_numbers() -> None:
    layer = torch.nn.Module()
    layer.left_trans, layer.right_trans = torch.eye(8), torch.eye(16)
    with pytest.raises(LimitError, match="transform 8 · 16 features, the input has 127"):
        flatquant.matrices_of(layer, torch.zeros(3, 127))


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (0.98, None),
        (1.0, None),
        (4.0, "4.0 is above 1, which no sigmoid returns"),
        (0.0, "1 of 1 values are not finite and positive, for example 0.0"),
        (math.nan, "1 of 1 values are not finite and positive, for example nan"),
    ],
)
def test_values_of_a_clip_ratio(workbench: Any, value: float, complaint: str | None) -> None:
    check = flatquant.transform_params(workbench.context([stored((8, 8), (16, 16))]))["clip_ratio"].check
    assert check is not None
    assert check(torch.tensor([value])) == complaint


@pytest.mark.parametrize("k", [8 * 10**7, 2**31 - 1])
def test_any_size_that_a_header_claims_is_answered(k: int) -> None:
    """The second one is a prime, for which trying each a would take a thousand million steps."""
    left, right = get_decompose_dim(k)
    assert left * right == k
    with pytest.raises(LimitError, match="more than any layer has"):
        get_decompose_dim(2**40)
