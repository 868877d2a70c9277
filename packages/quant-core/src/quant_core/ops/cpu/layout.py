"""Storage layouts."""

from torch import Tensor


def npu_format_cast(
    input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    """The same values: a storage layout such as FRACTAL_NZ is invisible behind the logical shape.

    A copy, since an operator may not return its input. Its strides stay: a matmul tells a transposed weight by them.
    """
    if customize_dtype is not None or input_dtype is not None:
        raise NotImplementedError("npu_format_cast: the CPU kernel converts no dtypes (customize_dtype, input_dtype)")
    return input.clone()
