"""The table of combinations for people; `python -m quant_compressed_tensors.overview` prints it.

It stands in this package's README between two comments, and a test fails when it is stale.
"""

from dataclasses import dataclass

from quant_compressed_tensors.combinations import REFUSED, TYPES
from quant_core import ActivationForm, AscendLinearScheme, get_scheme_class
from quant_core.schemes.dequantised import DequantisedLinearScheme

_ASYMMETRIC = (ActivationForm(symmetric=False), ActivationForm(dynamic=False, strategy="tensor", symmetric=False))


@dataclass(frozen=True)
class _Row:
    weights: str
    inputs: str
    scheme: str
    experts: str
    granularity: str
    note: str


def table() -> str:
    """All combinations as a Markdown table: what is served by which scheme, what is not, and why."""
    rows = [_served(*kinds, name) for kinds, name in TYPES.items()]
    rows += [_Row(kind, "any", "refused", "", "", why) for kind, why in REFUSED.items()]
    head = ("weights", "inputs", "scheme", "experts", "scales of weights", "remarks")
    lines = [head, ("---",) * len(head)]
    lines += [(r.weights, r.inputs, r.scheme, r.experts, r.granularity, r.note) for r in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _served(weights: str, inputs: str, name: str) -> _Row:
    linear, experts = get_scheme_class(name, "linear"), get_scheme_class(name, "moe")
    assert linear is not None, f"{name} is in the table and not registered"
    assert issubclass(linear, AscendLinearScheme)
    zero_points = linear.takes_offsets or (linear.stores is not None and not linear.stores.symmetric)
    everywhere = get_scheme_class("W8A16", "linear")
    assert everywhere is not None
    lacking = sorted(set(everywhere.supported_devices) - set(linear.supported_devices))
    remarks = {
        "asymmetric weights too": zero_points,
        "asymmetric inputs too": any(map(linear.takes_input, _ASYMMETRIC)),
        "`weight_g_idx` too": linear.takes_index,
        "dequantised": issubclass(linear, DequantisedLinearScheme),
        f"not on {', '.join(lacking)}": bool(lacking),
    }
    note = "; ".join(remark for remark, holds in remarks.items() if holds)
    granularity = ", ".join(linear.granularity)
    return _Row(weights, inputs, f"`{name}`", "yes" if experts else "no", granularity, note)


if __name__ == "__main__":
    print(table())
