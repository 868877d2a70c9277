"""Make the torchvision of PyPI importable beside a CPU torch.

On Linux it is built for CUDA. Beside a CPU torch its compiled operators (nms, roi_align, ...) cannot be loaded, and
importing torchvision stops where it describes two of them. vLLM and transformers use its transforms, which are Python.
This adds declarations of the two to the installed package: it can then be imported, and whoever calls a compiled
operator is told by torchvision that there are none. With a build for CPU, such as those of
https://download.pytorch.org/whl/cpu, it changes nothing.

    python tools/torchvision_without_cuda.py     # the python whose torchvision is meant
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

DECLARATIONS = """

# Added by torchvision_without_cuda.py: without them torchvision cannot be imported where its operators are missing.
if not _has_ops():
    _declared = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def failure() -> str:
    """Why torchvision cannot be imported; empty if it can."""
    imported = subprocess.run([sys.executable, "-c", "import torchvision"], check=False, capture_output=True, text=True)
    return imported.stderr if imported.returncode else ""


def main() -> int:
    """Change the installed package if that is what it needs; the exit code."""
    found = failure()
    if not found:
        print("torchvision can be imported: nothing to do")
        return 0
    spec = importlib.util.find_spec("torchvision")
    if "operator torchvision::nms does not exist" in found and spec is not None and spec.origin is not None:
        file = Path(spec.origin).with_name("extension.py")
        file.write_text(file.read_text() + DECLARATIONS)
        found = failure()
        if not found:
            print(f"torchvision can be imported now, without its compiled operators ({file})")
            return 0
    print(found, file=sys.stderr)
    print("torchvision cannot be imported, and not for want of its CUDA operators", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
