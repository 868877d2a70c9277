"""W4A4_MXFP4: what is its own; test_mx.py has the rest."""

from typing import Any

import pytest
import torch
from mx_modules import mxfp4

from quant_core import get_scheme_class
from quant_core.schemes.composed import compose
from quant_core.schemes.linear.w4a4_mxfp4 import AscendW4A4MXFP4LinearMethod


def test_a_block_by_hand(workbench: Any) -> None:
    """7 saturates at 6; ties go away from zero: 2.5 to 3, -0.25 to -0.5. The first of two values is the low half."""
    stored = {
        "weight": torch.tensor([[0x02, 0], [0x20, 0], [0, 0x02], [0, 0xA0]], dtype=torch.uint8),
        "weight_scale": torch.tensor([[127], [128], [127], [126]], dtype=torch.uint8),
    }
    scheme, layer = workbench.serve(AscendW4A4MXFP4LinearMethod, [stored], sizes=[4], inputs=4)
    x = torch.tensor([[7.0, 2.5, -0.25, 1.2]])
    assert scheme.apply(layer, x).tolist() == [[6.0, 6.0, -0.5, -0.5]]


def test_an_odd_number_of_features_is_refused(workbench: Any) -> None:
    context = workbench.context([mxfp4(8, 32)], sizes=[8], inputs=33)
    (reason,) = AscendW4A4MXFP4LinearMethod.can_serve(context)
    assert reason == "33 input features are no whole number of bytes with two FP4 values each"


def test_a_block_near_seven_eighths_rounds_its_exponent_up(workbench: Any) -> None:
    """msModelSlim's rule for weights: from 7/8 of a power of two on, the exponent is the next one."""
    scheme = AscendW4A4MXFP4LinearMethod.create(
        workbench.context([mxfp4(2, 32)], sizes=[2], inputs=32, scheme_class=AscendW4A4MXFP4LinearMethod)
    )
    weight = torch.tensor([[6.99], [7.01]]).repeat(1, 32)
    assert scheme.quantize(weight)["weight_scale"].tolist() == [[127], [128]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_svd_is_the_same_with_a_low_rank_part_beside_it(workbench: Any, dtype: torch.dtype) -> None:
    cls = get_scheme_class("W4A4_MXFP4_SVD", "linear")
    assert cls is AscendW4A4MXFP4LinearMethod
    plain = mxfp4(24, 64)
    stored = {**plain, "svd_lowrank_l1": torch.randn(3, 64).to(dtype), "svd_lowrank_l2": torch.randn(24, 3).to(dtype)}
    composed = compose(cls, workbench.context([stored], dtype, sizes=[24], inputs=64))
    layer = workbench.load(composed, [stored])
    composed.process_weights_after_loading(layer)
    base, base_layer = workbench.serve(cls, [plain], sizes=[24], inputs=64, dtype=dtype)
    x = torch.randn(5, 64).to(dtype)
    low_rank = x.double() @ stored["svd_lowrank_l1"].double().t() @ stored["svd_lowrank_l2"].double().t()
    expected = (base.apply(base_layer, x).double() + low_rank).to(dtype)
    torch.testing.assert_close(
        composed.apply(layer, x),
        expected,
        rtol=4 * torch.finfo(dtype).eps,
        atol=0.3 if dtype == torch.bfloat16 else 1e-4,
    )
