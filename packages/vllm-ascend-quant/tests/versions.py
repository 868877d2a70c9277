"""What a supported vLLM cannot do on CPU, as its run of the unquantised model shows: such tests are skipped."""

import vllm
from packaging.version import Version

#: A feature, the first tested version that has it, and what older ones do instead. The README has the same table.
SINCE = {
    "latent attention": ("0.32", "vLLM's CPU build has no latent attention (MLA)"),
    "sinks in float32": ("0.32", "its attention on CPU takes sinks in bfloat16 only"),
    "mappers that fuse": ("0.28", "its models fuse in the code of their loaders"),
    "steps causal in part": ("0.28", "its attention on CPU is causal for all requests or for none"),
    "strange tensors": ("0.28", "its Qwen models drop tensors of unknown names without a word"),
}


def lacking(feature: str) -> str:
    """Why the installed vLLM has no such feature; empty if it has."""
    since, reason = SINCE[feature]
    return f"vLLM {vllm.__version__}: {reason}" if Version(vllm.__version__) < Version(since) else ""
