"""Every linear type in every form, computed by the NPU, against the same scheme on our CPU kernels.

That these compute what is stored is what all other tests are about. The weight has the form that this NPU's product
takes on both sides.
"""

import pytest
import torch
from device import LAYER, disagreement
from linear_forms import forms
from workbench import Workbench

from quant_core.devices import current_device

FORMS = forms()
SIZES, INPUTS = (128, 64), 1024


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])  # no device multiplies float32
@pytest.mark.parametrize("label", FORMS)
def test_a_layer_computes_what_it_does_on_cpu(label: str, dtype: torch.dtype) -> None:
    form, bench, product = FORMS[label], Workbench(), current_device()
    if product not in form.scheme_class.supported_devices:
        pytest.skip(f"needs one of {', '.join(form.scheme_class.supported_devices)}, this is a {product}")
    members = form.members(SIZES, INPUTS)
    context = bench.context(members, dtype, sizes=SIZES, inputs=INPUTS, scheme_class=form.scheme_class)
    if refusals := form.scheme_class.can_serve(context):
        pytest.skip("; ".join(refusals))
    rows, results = torch.randn(5, INPUTS).to(dtype), []
    for device in ("cpu", "npu"):
        scheme = form.scheme_class.create(context)
        layer = bench.load(scheme, members).to(device)
        scheme.process_weights_after_loading(layer)
        results.append(scheme.apply(layer, rows.to(device)))
    expected, found = results
    assert disagreement(found, expected, LAYER) is None
