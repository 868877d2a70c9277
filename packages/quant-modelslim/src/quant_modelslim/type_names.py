"""Names of types in a description, and what msModelSlim means by those that no scheme serves."""

from typing import Literal

FLOAT = "FLOAT"

#: Types whose weights are stored in the model's own dtype. (W16A16S is pruned: zeros are zeros.)
FLOAT_TYPES = frozenset({FLOAT, "W16A16S"})

#: The axis of [out, in] along which the newest writer packs two int4 values to a byte. W4A16 is packed along the output
#: features where its scales are of groups.
PACKED_ALONG: dict[str, Literal[0, 1]] = {"W4A16": 1, "W4A8_DYNAMIC": 0}

#: What belongs to a type beside its weight, without which it would be another type.
TRANSFORMS: dict[str, tuple[str, ...]] = {"W8A8_SVD_DYNAMIC": ("low_rank",), "W4A4_MXFP4_SVD": ("low_rank",)}

#: The scheme for what `<attn>.quant_type` says, where that is called otherwise.
ATTENTION_SCHEMES = {"INT8": "FAKQuant"}

#: Tensors beside k_proj and v_proj that belong to the cache of keys and values.
CACHE_SUFFIXES = ("kv_cache_scale", "kv_cache_offset")

#: Types that cannot be served from what is stored, unless somebody registers a scheme: why.
UNUSABLE = {
    "NF4": "msModelSlim stores the codes without the scale of their blocks, so the weight cannot be restored",
    "W8A8SC": "its weight is a stream that Ascend's compression tool wrote, whose layout is not published",
    "W16A16SC": "its weight is a stream that Ascend's compression tool wrote, whose layout is not published",
    "W8A8_TIMESTEP": "its scales have an axis of diffusion time steps, which a language model does not have",
}

#: Part of the names under which msModelSlim's simulate_tp stores a layer once more for each rank.
SIMULATED_RANKS = ".tp_list."
