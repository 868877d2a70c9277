"""What vllm-ascend's runtime reads of a quantisation config and of a layer's method, found in its source.

A release that reads something else fails here, and has to be looked at.
"""

import re
from pathlib import Path

import vllm_ascend

from quant_core import list_schemes
from vllm_ascend_quant import AscendCompressedTensorsConfig, AscendModelSlimConfig

ROOT = Path(vllm_ascend.__file__).parent

#: Attributes of `vllm_config.quant_config`, and what ours says. Those marked "not asked" are read only for layers that
#: `enable_fa_quant` announces, and ours announces none.
CONFIG = {
    "get_quant_method": "the method of a layer, with `tid2eid` for experts",
    "get_name": "vLLM's own",
    "get_cache_scale": "not there, which it takes for an answer: scales of caches are loaded by our stream",
    "quant_description": "names of norm biases and types of weights",
    "enable_c8_quant": "whether there are int8 caches",
    "c8_quant_layers": "the layers that have one",
    "enable_fa_quant": "False",
    "kvcache_quant_layers": "none",
    "get_kv_quant_dtype": "not asked",
    "get_kv_quant_split_factor": "not asked",
    "enabling_fa_quant": "not asked",
}

#: Files that ask whether a layer's scheme is of a class of vllm-ascend's own. Ours is not, so what they would do with
#: one is off: see "Beside vllm-ascend" in the package's README.
ASK_FOR_OWN_SCHEMES = {
    "attention/context_parallel/dsa_cp.py",
    "attention/dsa_v1.py",
    "attention/mla_v1.py",
    "attention/sfa_v1.py",
    "ops/cv_linear.py",
    "ops/linear_op.py",
    "ops/weight_prefetch.py",
}


def runtime() -> dict[str, str]:
    """Its source, without what we replace and without the 310P, which is not served."""
    texts = {path.relative_to(ROOT).as_posix(): path.read_text() for path in ROOT.rglob("*.py")}
    return {name: text for name, text in texts.items() if not name.startswith(("quantization/", "_310p/"))}


def test_it_reads_what_we_know_of_a_config() -> None:
    sources = [*runtime().values(), (ROOT / "quantization/utils.py").read_text()]
    read = set()
    for text in sources:
        read |= set(re.findall(r"quant_config\.(\w+)", text))
        read |= set(re.findall(r"getattr\(\s*[\w.]*quant_config,\s*\"(\w+)\"", text))
    assert read - {"quant_config"} == set(CONFIG)


def test_ours_has_what_is_asked_for() -> None:
    asked = [name for name, meaning in CONFIG.items() if not meaning.startswith("not ")]
    for config in (AscendModelSlimConfig(), AscendCompressedTensorsConfig()):
        assert [name for name in asked if not hasattr(config, name)] == []
        assert isinstance(config.quant_description, dict)
        assert not config.enable_fa_quant
        assert not config.enable_c8_quant


def test_it_asks_for_its_own_schemes_where_we_know() -> None:
    own = re.compile(r"isinstance\([^()]*(?:\([^()]*\)[^()]*)*Ascend(?:W\w+|\w+LinearMethod|\w+FusedMoEMethod)")
    asking = {name for name, text in runtime().items() if "quant_method" in text and own.search(text)}
    assert asking == ASK_FOR_OWN_SCHEMES


def test_no_scheme_of_ours_announces_a_fused_path_of_its_experts() -> None:
    """`quant_type` of a scheme chooses how tokens and shared experts are quantised outside of it."""
    assert [cls.__name__ for cls in list_schemes().values() if hasattr(cls, "quant_type")] == []
