"""`apply` of the int8 types, whole path, beside other products of the same size."""

import torch
from competitors import WRONG, prepare_all
from layers import make_layer
from measure import alternating, arguments, report

from quant_core import require_scheme_class
from quant_core.ops.cpu import int8_gemm

SIZE = 4096
ROWS = (1, 16, 256, 2048)
TYPES = ("W8A8_DYNAMIC", "W8A8")


def main() -> None:
    """Print one row per number of rows and input dtype."""
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    weight = torch.randn(SIZE, SIZE) / 64
    competitors = dict(prepare_all(weight))
    table = []
    for dtype in (torch.bfloat16, torch.float32):
        layers = {name: make_layer(require_scheme_class(name, "linear"), SIZE, dtype) for name in TYPES}
        layers["W8A8"][1].input_scale.data.fill_(4.5 / 127)  # as calibration finds it for the input below
        bias = torch.randn(SIZE).to(dtype)
        for m in options.rows:
            x = torch.randn(m, SIZE).to(dtype)
            runs = {
                name: lambda s=scheme, layer=layer, x=x, b=bias: s.apply(layer, x, None if s.folds_bias else b)
                for name, (scheme, layer) in layers.items()
            }
            runs |= {name: prepare(x) for name, prepare in competitors.items()}
            best = alternating(runs, options.seconds)
            fastest = min(best[name] for name in competitors if not name.endswith(WRONG))
            table.append(
                [
                    f"M={m} {str(dtype).removeprefix('torch.')}",
                    *(seconds * 1e3 for seconds in best.values()),
                    *(fastest / best[name] for name in TYPES),
                    *(best["float32"] / best[name] for name in TYPES),
                    *(best["bfloat16"] / best[name] for name in TYPES),
                ]
            )
    columns = ["", *TYPES, *competitors, *(f"{against}/{name}" for against in AGAINST for name in ("dyn", "static"))]
    title = f"Linear layers, K=N={SIZE}, milliseconds; then how many times as fast as each (above 1: faster)"
    report("linear", title, columns, table, products=int8_gemm.report())
    for name, found in int8_gemm.report().items():
        print(f"  {name}: {found}")


AGAINST = ("fastest", "float32", "bfloat16")

if __name__ == "__main__":
    main()
