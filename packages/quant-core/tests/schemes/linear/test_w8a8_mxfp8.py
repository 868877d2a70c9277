"""W8A8_MXFP8: what is its own; test_mx.py has the rest."""

from typing import Any

import torch
from mx_modules import mxfp8

from quant_core.schemes.linear.w8a8_mxfp8 import AscendW8A8MXFP8LinearMethod


def test_a_block_by_hand(workbench: Any) -> None:
    """The exponent is that of 500, less 8: 0. So 500 saturates at 448; 17 is a tie of 16 and 18, 0.0005 is lost."""
    stored = {
        "weight": torch.eye(4, 32).to(torch.float8_e4m3fn),
        "weight_scale": torch.tensor([[127], [128], [126], [127]], dtype=torch.uint8),
    }
    scheme, layer = workbench.serve(AscendW8A8MXFP8LinearMethod, [stored])
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([500.0, 17.0, -19.0, 0.0005])
    assert scheme.apply(layer, x).tolist() == [[448.0, 32.0, -10.0, 0.0]]


def test_a_weight_that_is_nan_is_refused(workbench: Any) -> None:
    scheme = AscendW8A8MXFP8LinearMethod.create(
        workbench.context([mxfp8(8, 64)], scheme_class=AscendW8A8MXFP8LinearMethod)
    )
    check = scheme.params(64, 8)["weight"].check
    assert check is not None
    assert check(mxfp8(8, 64)["weight"]) is None
    assert check(torch.tensor([[1.0, torch.nan]]).to(torch.float8_e4m3fn)) == "1 of 2 values are NaN"
