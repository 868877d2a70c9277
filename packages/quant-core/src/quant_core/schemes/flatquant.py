"""FlatQuant: a learnt transform of the activations before they are quantised, kept as two small matrices.

A token x of k features is read as a matrix X [L, R], L · R = k, and becomes X' = left_transᵀ · X · right_trans; the
weight was turned the other way when the checkpoint was written. A layer with left_trans alone has the rest of its
transform inside the layer before it (docs/formats/modelslim.md, section 6).
"""

import math

import torch
from torch import Tensor, nn

from quant_core.errors import LimitError
from quant_core.schemes.context import LinearContext
from quant_core.schemes.params import Param, finite, positive, replace_parameter, tensor_of

#: Input features that a header may claim and that are still looked at.
_MOST_FEATURES = 2**31


def get_decompose_dim(k: int) -> tuple[int, int]:
    """The factors (L, R) of k that are nearest to a square: L = a - b and R = a + b for the smallest a >= sqrt(k) for
    which a² - k is a square b².

    Args:
        k: input features.

    Raises:
        LimitError: for a k without such an a: an odd multiple of 2, or not positive.

    """
    if k < 1 or k % 4 == 2:
        raise LimitError(f"{k} input features are no difference of two squares, so they are not cut into L · R")
    if k > _MOST_FEATURES:
        raise LimitError(f"{k} input features are more than any layer has", expected=f"at most {_MOST_FEATURES}")
    # The largest divisor that has the parity of its partner: that is the smallest a, without trying each of them.
    left = next(left for left in range(math.isqrt(k), 0, -1) if k % left == 0 and (left + k // left) % 2 == 0)
    return left, k // left


def transform_sizes(context: LinearContext) -> tuple[int, int]:
    """L and R as the stored matrices have them; of a layer without files as the tool would choose them."""
    form, k = context.form, context.input_size
    if not form.has("left_trans"):
        return get_decompose_dim(k)
    left = form.shape("left_trans", ())[0]
    return left, form.shape("right_trans", (k // max(1, left),))[0]


def transform_reasons(context: LinearContext) -> list[str]:
    """Why the transform cannot be applied to a layer; empty when it can."""
    form, k = context.form, context.input_size
    matrices = {name: form.shape(name, ()) for name in ("left_trans", "right_trans") if form.has(name)}
    if any(len(shape) != 2 or shape[0] != shape[1] for shape in matrices.values()):
        found = ", ".join(f"{name} {list(shape)}" for name, shape in matrices.items())
        return [f"expected square matrices, the files hold {found}"]
    try:
        left, right = transform_sizes(context)
    except LimitError as error:
        return [str(error)]
    reasons = []
    if left * right != k:
        reasons.append(f"left_trans of {left} and right_trans of {right} do not transform {k} input features")
    if context.partition.input_parts > 1:
        reasons.append(
            f"left_trans mixes input features of all {context.partition.size} tensor-parallel ranks: "
            "use tensor_parallel_size 1"
        )
    return reasons


def transform_params(context: LinearContext) -> dict[str, Param]:
    """`left_trans` and `right_trans`, of which all members of a fused layer have the same, and each a `clip_ratio`."""
    form = context.form
    left, right = transform_sizes(context)
    params = {"left_trans": Param((left, left), form.float_dtype("left_trans"), shared=True, check=finite)}
    if form.has("right_trans", default=True):
        params["right_trans"] = Param((right, right), form.float_dtype("right_trans"), shared=True, check=finite)
    params["clip_ratio"] = Param((1,), form.float_dtype("clip_ratio"), check=_ratio, dummy=1.0)
    return params


def identity_transform(context: LinearContext) -> dict[str, Tensor]:
    """The stored tensors of a transform that changes nothing."""
    return {
        name: torch.eye(param.shape[0], dtype=param.dtype) if len(param.shape) == 2 else torch.ones(1)
        for name, param in transform_params(context).items()
    }


def process_transform(layer: nn.Module, context: LinearContext) -> None:
    """Bring the matrices into the form that `npu_kronecker_quant` takes: left transposed, right never absent."""
    left = tensor_of(layer, "left_trans").data
    replace_parameter(layer, "left_trans", left.t().contiguous().to(context.params_dtype))
    if "right_trans" in layer._parameters:
        replace_parameter(layer, "right_trans", tensor_of(layer, "right_trans").data.to(context.params_dtype))
        return
    # No parameter: an engine's reload would wait for weights of it.
    layer.right_trans = torch.eye(transform_sizes(context)[1], dtype=context.params_dtype, device=left.device)


def matrices_of(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., k] as [tokens, L, R], and the two processed matrices in its dtype.

    Raises:
        LimitError: if L · R is not k.

    """
    left, right = tensor_of(layer, "left_trans").to(x.dtype), tensor_of(layer, "right_trans").to(x.dtype)
    rows, columns, features = left.shape[0], right.shape[0], x.shape[-1]
    if rows * columns != features:
        raise LimitError(
            f"left_trans and right_trans transform {rows} · {columns} features, the input has {features}",
            todo="check that weights and config.json belong together",
        )
    return x.reshape(-1, rows, columns), left, right


def turned_back(layer: nn.Module, weight: Tensor) -> Tensor:
    """A float32 weight [out, k] for the input as it comes: left_trans · W · right_transᵀ for each row's W [L, R].

    Args:
        layer: holds the stored matrices.
        weight: what is multiplied with the transformed input.

    """
    left = layer.get_parameter("left_trans").to(torch.float32)
    turned: Tensor = left @ weight.unflatten(1, (left.shape[0], -1))
    if "right_trans" in layer._parameters:
        turned = turned @ layer.get_parameter("right_trans").to(torch.float32).t()
    return turned.flatten(1)


def _ratio(stored: Tensor) -> str | None:
    """ValueCheck of a clip ratio, which is stored as what a sigmoid returned."""
    if complaint := positive(stored):
        return complaint
    return f"{stored.max().item()} is above 1, which no sigmoid returns" if bool((stored > 1).any()) else None
