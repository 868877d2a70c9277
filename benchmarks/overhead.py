"""What one `apply` takes beyond the operators that it calls."""

import torch
from layers import make_layer
from measure import alternating, arguments, report

from quant_core import require_scheme_class

SIZE = 64  # small, so that the operators themselves take little


def main() -> None:
    """Print microseconds per call."""
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    x = torch.randn(1, SIZE)
    table = []
    for name, calls in (("W8A8_DYNAMIC", _dynamic), ("W8A8", _static)):
        scheme, layer = make_layer(require_scheme_class(name, "linear"), SIZE, x.dtype)
        bare = calls(layer, x)
        runs = {"bare": lambda b=bare: _many(b), "apply": lambda s=scheme, y=layer: _many(lambda: s.apply(y, x))}
        best = alternating(runs, options.seconds)
        table.append([name, *(best[key] * 1e6 / COUNT for key in ("bare", "apply"))])
        table[-1].append(table[-1][2] - table[-1][1])
    report("overhead", "Microseconds per call", ["", "bare operators", "apply", "overhead"], table)


COUNT = 20


def _many(call):
    for _ in range(COUNT):
        call()


def _dynamic(layer, x):
    weight, scale, npu = layer.weight, layer.weight_scale, torch.ops.npu

    def bare():
        codes, x_scale = npu.npu_dynamic_quant(x)
        npu.npu_quant_matmul(codes, weight, scale, pertoken_scale=x_scale, output_dtype=x.dtype)

    return bare


def _static(layer, x):
    weight, scale, bias, npu = layer.weight, layer.deq_scale, layer.quant_bias, torch.ops.npu
    input_scale, input_offset = layer.input_scale, layer.input_offset

    def bare():
        codes = npu.npu_quantize(x, input_scale, input_offset, torch.qint8, -1, True)
        npu.npu_quant_matmul(codes, weight, scale, bias=bias, output_dtype=x.dtype)

    return bare


if __name__ == "__main__":
    main()
