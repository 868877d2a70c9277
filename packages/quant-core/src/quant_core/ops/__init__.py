"""Makes `torch.ops.npu.*` available: torch_npu's operators where it works, the same operators on CPU everywhere.

Importing this package imports torch_npu if it is there. Every operator of our table that is still undefined is then
defined with torch_npu's schema, a CPU kernel and a fake function; one that torch_npu defines only gains a CPU kernel
for CPU tensors, if the dispatcher has none.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch

from quant_core.ops import attention_shapes, expert_shapes, grouped_shapes, pages, shapes
from quant_core.ops.cpu import (
    activate_quant,
    activation,
    combine,
    float_matmul,
    fused_attention,
    gating,
    grouped,
    grouped_activation,
    int4,
    kronecker,
    layout,
    matmul,
    mx,
    quantize,
    routing,
    scatter,
    weight_only,
)
from quant_core.ops.schemas import SCHEMAS

CPU_KERNELS: dict[str, Callable[..., Any]] = {
    "npu_quantize": quantize.npu_quantize,
    "npu_dynamic_quant": quantize.npu_dynamic_quant,
    "npu_dynamic_quant_asymmetric": quantize.npu_dynamic_quant_asymmetric,
    "npu_quant_matmul": matmul.npu_quant_matmul,
    "npu_trans_quant_param": quantize.npu_trans_quant_param,
    "npu_weight_quant_batchmatmul": weight_only.npu_weight_quant_batchmatmul,
    "npu_format_cast": layout.npu_format_cast,
    "npu_convert_weight_to_int4pack": int4.npu_convert_weight_to_int4pack,
    "npu_kronecker_quant": kronecker.npu_kronecker_quant,
    "npu_dynamic_mx_quant": mx.npu_dynamic_mx_quant,
    "npu_dynamic_dual_level_mx_quant": mx.npu_dynamic_dual_level_mx_quant,
    "npu_dual_level_quant_matmul": float_matmul.npu_dual_level_quant_matmul,
    "npu_moe_init_routing_v2": routing.npu_moe_init_routing_v2,
    "npu_moe_token_permute": routing.npu_moe_token_permute,
    "npu_moe_token_unpermute": combine.npu_moe_token_unpermute,
    "npu_moe_finalize_routing": combine.npu_moe_finalize_routing,
    "npu_moe_gating_top_k_softmax": gating.npu_moe_gating_top_k_softmax,
    "npu_moe_gating_top_k": gating.npu_moe_gating_top_k,
    "npu_swiglu": activation.npu_swiglu,
    "npu_clipped_swiglu": activation.npu_clipped_swiglu,
    "npu_dequant_swiglu_quant": activate_quant.npu_dequant_swiglu_quant,
    "npu_grouped_matmul": grouped.npu_grouped_matmul,
    "npu_grouped_matmul.List": grouped.npu_grouped_matmul,
    "npu_grouped_matmul_swiglu_quant": grouped_activation.npu_grouped_matmul_swiglu_quant,
    "npu_grouped_matmul_swiglu_quant_v2": grouped_activation.npu_grouped_matmul_swiglu_quant_v2,
    "npu_fused_infer_attention_score": fused_attention.npu_fused_infer_attention_score,
    "npu_scatter_pa_kv_cache": scatter.npu_scatter_pa_kv_cache,
}

#: Operators that take weights of torch's layout `_mkldnn` on CPU, see cpu/packed.py.
TAKE_PACKED_WEIGHTS = {
    "npu_quant_matmul",
    "npu_grouped_matmul",
    "npu_grouped_matmul.List",
    "npu_grouped_matmul_swiglu_quant_v2",
}

#: torch_npu's version, or why its operators are not used.
torch_npu_status: str = ""

# Kept for the life of the process: dropping a Library removes what it registered.
_library = torch.library.Library("npu", "FRAGMENT")


def _import_torch_npu() -> str:
    """Import torch_npu if there is one; what came of it."""
    # It must come first: torch_npu aborts the process if somebody else defined one of its operators before.
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    try:
        module = importlib.import_module("torch_npu")
    except Exception as error:  # beside another torch or without CANN it fails in many ways
        warnings.warn(
            f"torch_npu is installed but cannot be imported ({error}); its operators run on CPU. On a machine without "
            "CANN uninstall torch_npu; on an NPU machine source CANN's set_env.sh first.",
            stacklevel=2,
        )
        return f"torch_npu is installed but cannot be imported: {error}"
    return f"torch_npu {getattr(module, '__version__', 'of unknown version')}"


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def _is_defined(qualified: str) -> bool:
    operator, _, overload = qualified.partition(".")
    return any(schema.overload_name == overload for schema in torch._C._jit_get_schemas_for_operator(operator))


def fake_function(name: str) -> Callable[..., Any]:
    """The fake function of an operator of our table, which its overloads share."""
    operator = name.partition(".")[0]
    modules = (shapes, expert_shapes, grouped_shapes, attention_shapes)
    found: Callable[..., Any] = next(getattr(module, operator) for module in modules if hasattr(module, operator))
    return found


def _register() -> None:
    """Define and implement what is missing."""
    for name, schema in SCHEMAS.items():
        qualified = f"npu::{name}"
        if not _is_defined(qualified):
            _library.define(name + schema)
        if not _has_kernel(qualified, "CPU"):
            _library.impl(name, CPU_KERNELS[name], "CPU")
        if name in TAKE_PACKED_WEIGHTS and not _has_kernel(qualified, "MkldnnCPU"):
            _library.impl(name, CPU_KERNELS[name], "MkldnnCPU")
        if not _has_kernel(qualified, "Meta"):
            # Not register_fake: it looks for its caller in the source files of all modules, 15 ms for each operator.
            _library.impl(name, fake_function(name), "Meta")


torch_npu_status = _import_torch_npu()
_register()
pages.register()
