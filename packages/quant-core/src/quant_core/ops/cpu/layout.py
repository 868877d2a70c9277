"""Storage layouts."""

import torch
from torch import Tensor

from quant_core.ops.dtypes import dtype_of


def npu_format_cast(
    input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    """The same values: a storage layout such as FRACTAL_NZ is invisible behind the logical shape.

    A copy, since an operator may not return its input. Its strides stay: a matmul tells a transposed weight by them.

    Args:
        input: of any dtype.
        acl_format: the layout; 29 is FRACTAL_NZ.
        customize_dtype: what the values will be multiplied with: float8_e4m3fn beside FP4. Chooses the layout only.
        input_dtype: what a uint8 input carries: FP4.

    Raises:
        NotImplementedError: for other dtypes.

    """
    dtypes = tuple(None if number is None else dtype_of(number) for number in (customize_dtype, input_dtype))
    if dtypes != (None, None) and (input.dtype, *dtypes) != (torch.uint8, torch.float8_e4m3fn, torch.float4_e2m1fn_x2):
        raise NotImplementedError(
            f"npu_format_cast: the CPU kernel has no {input.dtype} with customize_dtype and input_dtype {dtypes}"
        )
    return input.clone()
