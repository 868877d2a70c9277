"""vLLM's CPU platform with the one word that its Ray executor asks of a platform and that this one lacks.

It is the word of Ascend's platform: Ray counts the resource `NPU`, of which a node may claim any number.
"""

from vllm.platforms.cpu import CpuPlatform


class CpuPlatformOverRay(CpuPlatform):
    ray_device_key = "NPU"


def register() -> str:
    return f"{__name__}.{CpuPlatformOverRay.__name__}"
