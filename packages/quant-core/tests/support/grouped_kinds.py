"""Operands of grouped products, and what linear layers compute of the same ones."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import quant_core.ops  # noqa: F401 - defines the operators
from quant_core.packing import pack_eights

npu = torch.ops.npu

E, K, N = 5, 64, 24
#: Rows of each expert.
COUNTS = {
    "even": [3, 3, 3, 3, 3],
    "uneven": [1, 0, 7, 0, 40],
    "all on one": [0, 0, 9, 0, 0],
    "none": [0, 0, 0, 0, 0],
    "one row": [0, 0, 0, 0, 1],
}


@dataclass
class Kind:
    """Operands of one kind of product.

    Attributes:
        x: rows [m, k].
        weight: one for each expert.
        given: other operands by name, one for each expert.
        tokens: scales of rows.
        options: dtypes.
        linear: what a linear layer computes of an expert's rows, its number and their scales.

    """

    x: Tensor
    weight: list[Tensor]
    linear: Callable[[Tensor, int, Tensor | None], Tensor]
    given: dict[str, list[Tensor]] = field(default_factory=dict)
    tokens: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)


def codes(*shape: int) -> Tensor:
    """Random int8 values."""
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def int8(m: int, bias: torch.dtype = torch.float32) -> Kind:
    """W8A8_DYNAMIC."""
    weight, scale = [codes(N, K).t() for _ in range(E)], [torch.rand(N) / 100 for _ in range(E)]
    biases = [(torch.randn(N) * 50).to(bias) for _ in range(E)]

    def linear(rows: Tensor, e: int, tokens: Tensor | None) -> Tensor:
        result: Tensor = npu.npu_quant_matmul(
            rows, weight[e], scale[e], pertoken_scale=tokens, bias=biases[e], output_dtype=torch.bfloat16
        )
        return result

    given = {"scale": scale, "bias": biases}
    return Kind(codes(m, K), weight, linear, given, torch.rand(m), {"output_dtype": torch.bfloat16})


def static(m: int, bias: bool = True) -> Kind:
    """W8A8: no scales of rows, and a float16 result has shortened ones."""
    kind = int8(m, torch.int32)
    given = {name: each for name, each in kind.given.items() if bias or name != "bias"}

    def linear(rows: Tensor, e: int, tokens: Tensor | None) -> Tensor:
        added = given["bias"][e] if bias else None
        result: Tensor = npu.npu_quant_matmul(
            rows, kind.weight[e], given["scale"][e], bias=added, output_dtype=torch.float16
        )
        return result

    return Kind(kind.x, kind.weight, linear, given, None, {"output_dtype": torch.float16})


def without_bias(kind: Kind) -> Kind:
    """The same of a layer without one."""
    scale = kind.given["scale"]

    def linear(rows: Tensor, e: int, tokens: Tensor | None) -> Tensor:
        result: Tensor = npu.npu_quant_matmul(
            rows, kind.weight[e], scale[e], pertoken_scale=tokens, output_dtype=torch.bfloat16
        )
        return result

    return Kind(kind.x, kind.weight, linear, {"scale": scale}, kind.tokens, kind.options)


def sums(m: int) -> Kind:
    """Products that are scaled later."""
    weight = [codes(N, K).t() for _ in range(E)]

    def linear(rows: Tensor, e: int, tokens: Tensor | None) -> Tensor:
        result: Tensor = npu.npu_quant_matmul(rows, weight[e], torch.ones(1), output_dtype=torch.int32)
        return result

    return Kind(codes(m, K), weight, linear, options={"output_dtype": torch.int32})


def int4(m: int) -> Kind:
    """W4A4."""
    x = pack_eights(torch.randint(-8, 8, (m, K), dtype=torch.int8))
    weight = [pack_eights(torch.randint(-8, 8, (N, K), dtype=torch.int8)).t() for _ in range(E)]
    scale = [torch.rand(N) / 100 for _ in range(E)]

    def linear(rows: Tensor, e: int, tokens: Tensor | None) -> Tensor:
        result: Tensor = npu.npu_quant_matmul(
            rows, weight[e], scale[e], pertoken_scale=tokens, output_dtype=torch.float32
        )
        return result

    return Kind(x, weight, linear, {"scale": scale}, torch.rand(m), {"output_dtype": torch.float32})


def weight_only(m: int, bits: int = 8, groups: int = 1) -> Kind:
    """W8A16 and W4A16, per channel and per group."""
    values = [codes(N, K) if bits == 8 else torch.randint(-8, 8, (N, K), dtype=torch.int8) for _ in range(E)]
    weight = [v.t() if bits == 8 else pack_eights(v.t().contiguous()) for v in values]
    shape = (groups, N) if groups > 1 else (N,)
    scale = [(torch.rand(shape) / 100 + 1e-3).bfloat16() for _ in range(E)]
    offset = [torch.randint(-8, 8, shape).bfloat16() for _ in range(E)]
    size = K // groups if groups > 1 else 0

    def linear(rows: Tensor, e: int, tokens: Tensor | None) -> Tensor:
        result: Tensor = npu.npu_weight_quant_batchmatmul(
            rows, weight[e], scale[e], offset[e], antiquant_group_size=size
        )
        return result

    return Kind(torch.randn(m, K).bfloat16(), weight, linear, {"antiquant_scale": scale, "antiquant_offset": offset})


def fp8(m: int) -> Kind:
    """WFP8AFP8_DYNAMIC."""
    weight = [torch.randn(N, K).to(torch.float8_e4m3fn).t() for _ in range(E)]
    scale = [torch.rand(N) for _ in range(E)]

    def linear(rows: Tensor, e: int, tokens: Tensor | None) -> Tensor:
        result: Tensor = npu.npu_quant_matmul(
            rows, weight[e], scale[e], pertoken_scale=tokens, output_dtype=torch.bfloat16
        )
        return result

    x = torch.randn(m, K).to(torch.float8_e4m3fn)
    return Kind(x, weight, linear, {"scale": scale}, torch.rand(m), {"output_dtype": torch.bfloat16})


def mx(m: int, x_fp4: bool, weight_fp4: bool) -> Kind:
    """W8A8_MXFP8, W4A8_MXFP and W4A4_MXFP4, as the device has them."""
    x, tokens = npu.npu_dynamic_mx_quant(torch.randn(m, K), dst_type=296 if x_fp4 else torch.float8_e4m3fn)
    target = 296 if weight_fp4 else torch.float8_e4m3fn
    made = [npu.npu_dynamic_mx_quant(torch.randn(N, K), dst_type=target) for _ in range(E)]
    weight, scale = [w.t() for w, _ in made], [s.transpose(0, 1) for _, s in made]
    carried = {"x_dtype": 296 if x_fp4 else None, "weight_dtype": 296 if weight_fp4 else None}

    def linear(rows: Tensor, e: int, tokens: Tensor | None) -> Tensor:
        result: Tensor = npu.npu_quant_matmul(
            rows,
            weight[e],
            scale[e],
            pertoken_scale=tokens,
            output_dtype=torch.bfloat16,
            x1_dtype=carried["x_dtype"],
            x2_dtype=carried["weight_dtype"],
            scale_dtype=293,
            pertoken_scale_dtype=293,
        )
        return result

    options = {"output_dtype": torch.bfloat16, "per_token_scale_dtype": 293, **carried}
    if weight_fp4 and not x_fp4:
        return Kind(x, weight, linear, {"antiquant_scale": scale}, tokens, options)
    return Kind(x, weight, linear, {"scale": scale}, tokens, {**options, "scale_dtype": 293})


KINDS: dict[str, Callable[[int], Kind]] = {
    "int8": int8,
    "int8, int32 bias": lambda m: int8(m, torch.int32),
    "int8 without scales of rows": static,
    "int8 without scales of rows or a bias": lambda m: static(m, bias=False),
    "int8 without a bias": lambda m: without_bias(int8(m)),
    "int8 to sums": sums,
    "int4": int4,
    "int8 weights only": weight_only,
    "int4 weights only": lambda m: weight_only(m, 4),
    "int4 weights only, in groups": lambda m: weight_only(m, 4, 4),
    "fp8": fp8,
    "mxfp8": lambda m: mx(m, x_fp4=False, weight_fp4=False),
    "mxfp8 by mxfp4": lambda m: mx(m, x_fp4=False, weight_fp4=True),
    "mxfp4": lambda m: mx(m, x_fp4=True, weight_fp4=True),
}


def grouped(kind: Kind, counts: list[int], stacked: bool = True, **options: Any) -> list[Tensor]:
    """The operator, with operands stacked or in lists."""
    operands = {"weight": kind.weight, **kind.given}
    if stacked:
        # As layers hold them: views of what was stacked in the order of the checkpoint.
        operands = {
            name: [torch.stack([one.t() for one in each]).transpose(1, 2)] if name == "weight" else [torch.stack(each)]
            for name, each in operands.items()
        }
    result: list[Tensor] = npu.npu_grouped_matmul(
        [kind.x],
        operands.pop("weight"),
        per_token_scale=None if kind.tokens is None else [kind.tokens],
        **{"split_item": 2, "group_type": 0, "group_list_type": 1, "group_list": torch.tensor(counts)}
        | operands
        | kind.options
        | options,
    )
    return result


def by_linear(kind: Kind, counts: list[int]) -> list[Tensor]:
    """Each expert's rows by the linear operator."""
    found, start = [], 0
    for expert, count in enumerate(counts):
        rows = slice(start, start + count)
        found.append(kind.linear(kind.x[rows], expert, None if kind.tokens is None else kind.tokens[rows]))
        start += count
    return found
