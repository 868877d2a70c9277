"""Every registered linear type: speed against a bfloat16 linear layer, and bytes of run-time weight per element."""

import torch
from layers import linear_types, make_layer, run_time_bytes
from measure import alternating, arguments, report
from torch.nn.functional import linear

ROWS = (1, 16, 256)


def main() -> None:
    """Print one row per type; a type that somebody registers has its row."""
    parser = arguments(__doc__)
    parser.add_argument("--size", type=int, default=4096, help="input and output features")
    parser.add_argument("--types", nargs="*", help="default: all")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    weight = torch.randn(options.size, options.size).to(torch.bfloat16)
    table = []
    for name, scheme_class in linear_types():
        if options.types and name not in options.types:
            continue
        try:
            scheme, layer = make_layer(scheme_class, options.size, torch.bfloat16)
        except (AssertionError, ValueError) as error:
            print(f"{name} is left out: {str(error).splitlines()[0]}")
            continue
        speeds = []
        for m in ROWS:
            x = torch.randn(m, options.size).to(torch.bfloat16)
            runs = {
                "bfloat16": lambda x=x: linear(x, weight),
                name: lambda s=scheme, layer=layer, x=x: s.apply(layer, x),
            }
            best = alternating(runs, options.seconds / len(ROWS))
            speeds.append(best["bfloat16"] / best[name])
        table.append([name, *speeds, run_time_bytes(layer) / options.size**2])
    columns = ["", *(f"M={m}" for m in ROWS), "bytes/element"]
    report("schemes", f"K=N={options.size}: how many times as fast as F.linear in bfloat16", columns, table)


if __name__ == "__main__":
    main()
