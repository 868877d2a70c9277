"""Parts of a report about what would serve a model here: formats, schemes, products, and vLLM with its plugins."""

import importlib
import os
from typing import Any

from vllm_ascend_quant.reporting.packages import owner
from vllm_ascend_quant.switches import DISABLE, enabled


def switches() -> dict[str, Any]:
    """What the user switched off by name, and names that switch nothing off."""
    from quant_core import list_formats
    from vllm_ascend_quant.plugin.wrappers import ALWAYS, FOR_OURS

    known = [*ALWAYS, *FOR_OURS, "precedence", "zeros", *list_formats()]
    named = {name.strip() for name in os.environ.get(DISABLE, "").split(",")} - {""}
    return {
        DISABLE: os.environ.get(DISABLE, "(not set)"),
        "switched off": [name for name in known if not enabled(name)],
        "named, but nothing is called so": sorted(named - set(known)),
    }


def products() -> dict[str, Any]:
    """What multiplies int8 on this processor, as it was probed, and how the native code for caches stands."""
    from quant_core.ops.cpu import int8_gemm, native

    return {"int8": int8_gemm.report(), "native code for caches": native.status()}


def formats() -> dict[str, Any]:
    """The formats, with vLLM's name of each and where it comes from."""
    from quant_core import formats as core

    disputed = core.disputed_formats()
    return {
        name: {
            "vLLM's method": found.vllm_name,
            "class": f"{found.__module__}.{found.__qualname__}",
            "distribution": owner(found),
            "served": str(disputed[name]) if name in disputed else enabled(name),
        }
        for name, found in core.list_formats().items()
    }


def schemes() -> dict[str, dict[str, list[str]]]:
    """The types by distribution and kind of layer."""
    from quant_core import list_schemes

    found: dict[str, dict[str, list[str]]] = {}
    for (quant_type, layer_type), cls in list_schemes().items():
        found.setdefault(owner(cls), {}).setdefault(layer_type, []).append(quant_type)
    return found


def vllm() -> dict[str, Any]:
    """VLLM after its plugins ran, in the order in which it calls them when a model is started in this process."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # what it says besides is no finding
    module = importlib.import_module("vllm")
    from vllm_ascend_quant import compat

    plugins, platforms = importlib.import_module("vllm.plugins"), importlib.import_module("vllm.platforms")
    newer = compat.check_version()
    plugins.load_general_plugins()
    platform = platforms.current_platform
    platform.pre_register_and_update()
    low, high = compat.SUPPORTED
    return {
        "version": compat.version(),
        "folder": os.path.dirname(module.__file__ or "") or None,
        "known": f"no: newer than those below {high}, it is tried" if newer else f"yes: from {low} to below {high}",
        "platform": f"{type(platform).__module__}.{type(platform).__qualname__}",
        "who serves the methods": {name: _server(name) for name in _methods()},
        "functions that are to be wrapped and are not there": _missing(),
    }


def _methods() -> list[str]:
    """The methods that our formats stand for, whether or not their packages are here."""
    from quant_core import list_formats

    return sorted({"ascend", "compressed-tensors", *(found.vllm_name for found in list_formats().values())})


def _server(method: str) -> str:
    """The class that vLLM would build for a method, and where it comes from."""
    quantization = importlib.import_module("vllm.model_executor.layers.quantization")
    try:
        cls = quantization.get_quantization_config(method)
    except ValueError as error:
        return f"nobody: {error}"
    return f"{cls.__module__}.{cls.__qualname__} ({owner(cls)})"


def _missing() -> list[str]:
    """Functions of vLLM that our plugin wraps, where this vLLM has none; with those no model of ours needs."""
    from vllm_ascend_quant import compat
    from vllm_ascend_quant.plugin.wrappers import ALWAYS, FOR_OURS

    wanted = {name: wrapped.function for name, wrapped in (ALWAYS | FOR_OURS).items()}
    absent = {name: function for name, function in wanted.items() if not compat.has(function)}
    optional = compat.NOT_IN_ALL
    return [
        f"{name}: {function}{' (not needed in every vLLM)' if function in optional else ''}"
        for name, function in absent.items()
    ]
