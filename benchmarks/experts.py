"""Quantised experts beside vLLM's own in bfloat16, on this processor: E=64, top 8, hidden 2048, intermediate 768."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from measure import alternating, arguments, report
from torch import Tensor, nn
from torch.nn.functional import silu

from quant_core import DOWN, GATE_UP, AscendMoEScheme, ExpertSizes, LayerQuant, LayerQuery, StoredForm, create_scheme
from quant_core.schemes.layouts import layouts_of
from quant_core.schemes.params import replace_parameter
from quant_core.schemes.verify import linear_params

EXPERTS, K, HIDDEN, INTERMEDIATE = 64, 8, 2048, 768
TOKENS = (1, 32, 512)
TYPES = ("W8A8_DYNAMIC", "W4A8_DYNAMIC", "W4A16")


def make(quant_type: str) -> tuple[AscendMoEScheme, nn.Module]:
    """A scheme and its processed layer, with random weights as the type quantises them."""
    names = {
        GATE_UP: tuple((f"{e}.gate", f"{e}.up") for e in range(EXPERTS)),
        DOWN: tuple((f"{e}.down",) for e in range(EXPERTS)),
    }
    halves = {
        half: LayerQuant(quant_type, (), tuple(StoredForm(n) for m in members for n in m), ("a benchmark",))  # type: ignore[arg-type]
        for half, members in names.items()
    }
    sizes = ExpertSizes(HIDDEN, INTERMEDIATE, EXPERTS)
    query = LayerQuery("experts", "moe", experts=names, sizes=sizes, params_dtype=torch.bfloat16)
    scheme = create_scheme(query, LayerQuant(quant_type, (), halves=halves))
    assert isinstance(scheme, AscendMoEScheme)
    layer = nn.Module()
    for prefix, half in scheme.halves.items():
        inputs = half.context.input_size
        stored = half.quantize(torch.randn(half.context.shards[0].output_size, inputs) / inputs**0.5)
        for name, layout in layouts_of(linear_params(half), half.context).items():
            value = torch.empty(layout.shape, dtype=layout.param.dtype)
            for expert in range(EXPERTS):
                for member in range(len(half.context.shards)):
                    layout.part(value, member, expert).copy_(stored[name])
            replace_parameter(layer, f"{prefix}{name}", value)
    scheme.process_weights_after_loading(layer)
    return scheme, layer


def competitors(gate_up: Tensor, down: Tensor) -> dict[str, Callable[[Tensor, Tensor, Tensor], Any]]:
    """What else multiplies bfloat16 experts here."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {}
    try:
        from vllm import _custom_ops as ops
        from vllm.platforms import current_platform

        current_platform.import_kernels()
        isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
        packed = [ops.cpu_prepack_moe_weight(weight, isa) for weight in (gate_up, down)]

        def fused(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
            y = torch.empty_like(x)
            ops.cpu_fused_moe(y, x, *packed, None, None, weights, ids, "silu", isa, False)
            return y

        fused(*draw(1))
        found["vLLM bfloat16"] = fused
    except (ImportError, AttributeError, RuntimeError) as error:
        print(f"vLLM's bfloat16 experts are left out: {str(error).splitlines()[0]}")
    try:
        pair = [torch.ops._C.convert_weight_packed(weight) for weight in (gate_up, down)]

        def amx(x: Tensor, weights: Tensor, ids: Tensor) -> Any:
            return torch.ops._C.fused_experts_cpu(x, *pair, weights, ids, False)

        amx(*draw(1))
        found["fused_experts_cpu"] = amx
    except (AttributeError, RuntimeError, TypeError) as error:
        print(f"fused_experts_cpu is left out: {str(error).splitlines()[0]}")

    def loop(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            rows, choices = (ids == expert).nonzero(as_tuple=True)
            gate, up = (x[rows] @ gate_up[expert].t()).chunk(2, -1)
            y.index_add_(0, rows, (silu(gate) * up @ down[expert].t()) * weights[rows, choices, None].to(x.dtype))
        return y

    found["loop of F.linear"] = loop
    return found


def draw(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens with the weights of their experts, and the experts."""
    scores = torch.rand(tokens, EXPERTS).softmax(-1)
    weights, ids = scores.topk(K)
    return torch.randn(tokens, HIDDEN, dtype=torch.bfloat16), weights, ids.to(torch.int32)


def main() -> None:
    """Print how many times as fast as vLLM's bfloat16 experts each is."""
    parser = arguments(__doc__)
    parser.add_argument("--types", nargs="*", default=TYPES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    gate_up = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, dtype=torch.bfloat16) / HIDDEN**0.5
    down = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, dtype=torch.bfloat16) / INTERMEDIATE**0.5
    runs = dict(competitors(gate_up, down))
    for quant_type in options.types:
        scheme, layer = make(quant_type)
        runs[quant_type] = lambda *routed, s=scheme, held=layer: s.apply(held, *routed)
    base = next(iter(runs))
    table = {name: [name] for name in runs}
    for tokens in TOKENS:
        routed = draw(tokens)
        best = alternating({name: functools.partial(f, *routed) for name, f in runs.items()}, options.seconds)
        for name, seconds in best.items():
            table[name] += [best[base] / seconds, seconds * 1e3]
    columns = ["", *(text for tokens in TOKENS for text in (f"M={tokens}", "ms"))]
    report("experts", f"E={EXPERTS}, top {K}: how many times as fast as {base}", columns, list(table.values()))


if __name__ == "__main__":
    main()
