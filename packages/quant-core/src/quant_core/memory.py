"""Memory: the bytes of a layer's stored tensors on one rank, by what its scheme declares and how that is cut.

Nothing is allocated and no weight is read, so that whoever plans a deployment can ask without a device.
"""

import math

from quant_core.schemes.base import AscendLinearScheme, Scheme
from quant_core.schemes.experts import AscendMoEScheme
from quant_core.schemes.layouts import layouts_of
from quant_core.schemes.verify import linear_params


def stored_bytes(scheme: Scheme) -> int:
    """The bytes of a layer's parameters as they are loaded on the rank of the scheme's context.

    What a scheme makes of them has about the same size: packed weights stay packed, scales change their dtype.

    Args:
        scheme: of a linear layer, or of a layer of experts, whose local ones are counted.

    Raises:
        LimitError: if the sizes cannot be cut in this way.

    """
    if isinstance(scheme, AscendMoEScheme):
        return sum(map(stored_bytes, scheme.halves.values()))
    assert isinstance(scheme, AscendLinearScheme), "a cache grows with its tokens"
    layouts = layouts_of(linear_params(scheme), scheme.context).values()
    return sum(math.prod(layout.shape) * layout.param.dtype.itemsize for layout in layouts)
