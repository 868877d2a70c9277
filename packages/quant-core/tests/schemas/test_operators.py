"""Our table of schemas, CPU kernels and fake functions against torch_npu's schemas and Meta kernels."""

from typing import Any

import attention_calls
import expert_calls
import operator_calls
import pytest
from on_meta import on_meta, outline
from operator_calls import operator_of

from quant_core import ops
from quant_core.ops.schemas import SCHEMAS

CALLS = operator_calls.CALLS | expert_calls.CALLS | attention_calls.CALLS

#: What torch_npu has no Meta kernel for: our fake function is all there is, and a compiled model needs it.
WITHOUT_META = {
    "npu_format_cast",
    "npu_convert_weight_to_int4pack",
    "npu_dual_level_quant_matmul",
    "npu_gather_pa_kv_cache",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_is_torch_npu_s(name: str, real: dict[str, Any]) -> None:
    assert f"npu::{name}{SCHEMAS[name]}" == real[name].schema
    assert str(operator_of(name)._schema) == real[name].schema


@pytest.mark.parametrize("name", SCHEMAS)
def test_it_is_known_which_operators_lack_a_meta_kernel(name: str, real: dict[str, Any]) -> None:
    assert real[name].has_meta == (name not in WITHOUT_META)


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_operator_has_a_sample_call(name: str) -> None:
    assert name in {called for called, _, _ in CALLS.values()}, "add one to support/operator_calls.py"


@pytest.mark.parametrize("call", CALLS)
def test_kernel_meta_kernel_and_fake_function_agree(call: str) -> None:
    name, arguments, options = CALLS[call]
    operator = operator_of(name)
    positional, named = on_meta((arguments, options))
    computed = outline(operator(*arguments, **options))
    assert computed == outline(operator(*positional, **named)), "torch_npu's Meta kernel says otherwise"
    assert computed == outline(ops.fake_function(name)(*positional, **named)), "our fake function says otherwise"
