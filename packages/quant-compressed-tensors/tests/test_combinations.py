"""From the arguments of a group to a scheme: every kind is reached, and what has no scheme is refused by name."""

from pathlib import Path
from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES, preset_name_to_scheme
from small_folders import (
    FP8,
    FP8_BLOCK,
    FP8_GROUP_128,
    FP8_STATIC,
    FP8_TOKEN,
    INT4,
    INT8,
    INT8_STATIC,
    INT8_TOKEN,
    MXFP4,
    MXFP8,
    NVFP4,
    Arguments,
    arguments,
    asymmetric,
    at_run_time,
    grouped,
)

from quant_compressed_tensors.combinations import REFUSED, TYPES, input_kind, quant_type, weight_kind
from quant_compressed_tensors.overview import table
from quant_core import AscendLinearScheme, UnsupportedSchemeError, get_scheme_class

README = Path(__file__).parents[1] / "README.md"

INT4_TOKEN = {**INT8_TOKEN, "num_bits": 4}
#: With a dtype of zero points, because older libraries do not know the one of six bits.
MXFP6 = arguments(6, strategy="group", group_size=32, type="float", zp_dtype="torch.uint8")

#: Weights, inputs, and the type of the scheme that computes them: of each combination that a writer has.
COMBINATIONS: list[tuple[Arguments, Arguments | None, str]] = [
    *((weights, INT8_STATIC, "W8A8") for weights in (INT8, {**INT8, "strategy": "tensor"})),
    (INT8, asymmetric(INT8_STATIC), "W8A8"),
    *((weights, INT8_TOKEN, "W8A8_DYNAMIC") for weights in (INT8, {**INT8, "strategy": "tensor"}, grouped(INT8))),
    (INT8, asymmetric(INT8_TOKEN), "W8A8_DYNAMIC"),
    (asymmetric(INT8), INT8_TOKEN, "W8A8_DYNAMIC"),
    *((weights, INT8_TOKEN, "W4A8_DYNAMIC") for weights in (INT4, grouped(INT4), grouped(INT4, 128))),
    *((weights, INT4_TOKEN, "W4A4_DYNAMIC") for weights in (INT4, grouped(INT4))),
    *((weights, None, "W8A16") for weights in (INT8, grouped(INT8), asymmetric(INT8))),
    *((weights, None, "W4A16") for weights in (INT4, grouped(INT4), asymmetric(INT4), asymmetric(grouped(INT4)))),
    (grouped(INT4), FP8_TOKEN, "W4AFP8_DYNAMIC"),
    (FP8, FP8_TOKEN, "WFP8AFP8_DYNAMIC"),
    *((weights, FP8_STATIC, "WFP8AFP8") for weights in (FP8, {**FP8, "strategy": "tensor"})),
    (FP8, None, "WFP8A16"),
    (FP8_BLOCK, None, "WFP8A16"),
    (FP8_BLOCK, FP8_GROUP_128, "WFP8AFP8_BLOCK_DYNAMIC"),
    (FP8_BLOCK, FP8_TOKEN, "WFP8AFP8_BLOCK_DYNAMIC"),
    (MXFP8, at_run_time(MXFP8), "W8A8_MXFP8"),
    # Writers for Ascend leave out the dtype of the scales.
    ({**MXFP8, "scale_dtype": None}, {**at_run_time(MXFP8), "scale_dtype": None}, "W8A8_MXFP8"),
    (MXFP8, None, "W8A16_MXFP8"),
    (MXFP4, at_run_time(MXFP4), "W4A4_MXFP4"),
    (MXFP4, None, "W4A16_MXFP4"),
    (MXFP4, at_run_time(MXFP8), "W4A8_MXFP"),
    (MXFP4, FP8_GROUP_128, "W4A8_MXFP4_FP8_DYNAMIC"),
    (NVFP4, at_run_time(NVFP4), "W4A4_NVFP4"),
    (NVFP4, None, "W4A16_NVFP4"),
]


def parsed(args: Arguments | None) -> QuantizationArgs | None:
    return None if args is None else QuantizationArgs.model_validate(args)


@pytest.mark.parametrize(("weights", "inputs", "expected"), COMBINATIONS)
def test_the_type_of_a_combination(weights: Arguments, inputs: Arguments | None, expected: str) -> None:
    assert quant_type(parsed(weights), parsed(inputs)) == expected


def test_every_row_of_the_table_is_among_them() -> None:
    """Otherwise a row could be wrong unnoticed, or unreachable."""
    reached = {(weight_kind(parsed(weights)), input_kind(parsed(inputs))) for weights, inputs, _ in COMBINATIONS}
    assert reached == TYPES.keys()


@pytest.mark.parametrize("quant_type", sorted(set(TYPES.values())))
def test_every_type_is_registered(quant_type: str) -> None:
    found = get_scheme_class(quant_type, "linear")
    assert found is not None, f"no scheme is registered for {quant_type}"
    assert issubclass(found, AscendLinearScheme)


@pytest.mark.parametrize("name", sorted(PRESET_SCHEMES.keys() - {"UNQUANTIZED"}))
def test_every_preset_of_the_library_has_a_type_or_a_reason(name: str) -> None:
    """Newer libraries have more of them; what has no type has bits that nobody takes."""
    scheme = preset_name_to_scheme(name, ["Linear"])
    assert scheme.weights is not None
    if scheme.weights.num_bits in (4, 8):
        assert quant_type(scheme.weights, scheme.input_activations) in TYPES.values()
    else:
        with pytest.raises(UnsupportedSchemeError, match=r"no operator takes (six bits|weights of so many bits)"):
            quant_type(scheme.weights, scheme.input_activations)


@pytest.mark.parametrize(
    ("weights", "inputs", "said"),
    [
        (grouped(arguments(3)), None, "quantise to 4 or 8 bits"),
        (arguments(2), INT8_TOKEN, "quantise to 4 or 8 bits"),
        (arguments(16), None, "quantise to 4 or 8 bits"),
        (arguments(16, type="float", zp_dtype="torch.float16"), None, "quantise to 4 or 8 bits"),
        (arguments(2, type="float", zp_dtype="torch.float16"), None, "quantise to 4 or 8 bits"),
        (grouped(FP8, 64), None, "per channel, in blocks or to MXFP8"),
        (grouped(FP8, 128), FP8_GROUP_128, "per channel, in blocks or to MXFP8"),
        (
            arguments(6, strategy="group", group_size=32, type="float", zp_dtype="torch.uint8"),
            None,
            "quantise to MXFP8",
        ),
        (INT8, {**INT8_STATIC, "dynamic": True}, "quantise inputs per token"),
        (FP8, {**FP8_STATIC, "dynamic": True}, "quantise inputs per token"),
        (INT8, grouped(INT8), "no writer stores them"),
        (FP8, INT8_TOKEN, "inputs of the kind none, fp8 static, fp8 per token"),
        (INT8, FP8_TOKEN, "inputs of the kind none, int8 static, int8 per token"),
        (INT8, FP8_STATIC, "no scheme has int8 weights and fp8 static inputs"),  # vllm-ascend takes it for int8
        (INT4, INT8_STATIC, "no scheme has int4 weights and int8 static inputs"),
        (INT4, FP8_STATIC, "no scheme has int4 weights and fp8 static inputs"),
        (INT8, {**INT8_TOKEN, "num_bits": 16}, "no scheme has int8 weights and int16 per token inputs"),
        (MXFP8, INT8_TOKEN, "no scheme has mxfp8 weights"),
        (NVFP4, at_run_time(MXFP4), "no scheme has nvfp4 weights and mxfp4 inputs"),
        (INT8, at_run_time(grouped(INT8)), "int8 per token and group"),
        (None, INT8_TOKEN, "no scheme has float weights"),
    ],
)
def test_combinations_without_a_scheme(weights: Arguments | None, inputs: Arguments | None, said: str) -> None:
    with pytest.raises(UnsupportedSchemeError) as raised:
        quant_type(parsed(weights), parsed(inputs))
    assert said in str(raised.value)
    assert "what to do: " in str(raised.value)


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_every_reason_is_given_to_somebody(kind: str) -> None:
    """A kind in the list of reasons that nothing is called would only look like an answer."""
    samples: list[tuple[Any, Any]] = [
        (arguments(3), None),
        (arguments(16, type="float", zp_dtype="torch.float16"), None),
        (MXFP6, None),
        (grouped(FP8, 64), None),
        (INT8, grouped(INT8)),
        (INT8, {**INT8_STATIC, "dynamic": True}),
    ]
    kinds = {(weight_kind(parsed(w)), input_kind(parsed(i))) for w, i in samples}
    assert any(kind in both for both in kinds)


def test_the_table_in_the_readme() -> None:
    """`python -m quant_compressed_tensors.overview` prints it."""
    printed = table()
    assert len(printed.splitlines()) == 2 + len(TYPES) + len(REFUSED)
    assert printed in README.read_text()
