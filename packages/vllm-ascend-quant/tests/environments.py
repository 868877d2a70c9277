"""Environments of other machines: this one's, in which some of our packages are absent or of another version."""

import shutil
import sysconfig
import venv
from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path

OURS = ("quant_core", "quant_modelslim", "quant_compressed_tensors", "vllm_ascend_quant")


def make(folder: Path, without: Collection[str] = (), versions: Mapping[str, str] | None = None) -> Path:
    """Make an environment; its Python. Everything that is not ours is a link, so that it takes no space.

    Args:
        folder: where.
        without: modules of ours that it lacks.
        versions: what modules of ours call their version there.

    """
    venv.create(folder, symlinks=True)
    here = Path(sysconfig.get_path("purelib"))
    there = folder / "lib" / here.parent.name / "site-packages"
    for entry in here.iterdir():
        editable = entry.suffix == ".pth" and any(name in entry.name for name in OURS)
        if not (editable or entry.name.startswith(OURS) or (there / entry.name).exists()):
            (there / entry.name).symlink_to(entry)
    for name in OURS:
        if name not in without:
            source = Path(str(import_module(name).__file__)).parent
            shutil.copytree(source, there / name, ignore=shutil.ignore_patterns("__pycache__"))
            (metadata,) = here.glob(f"{name}-*.dist-info")
            shutil.copytree(metadata, there / metadata.name)
    for name, version in (versions or {}).items():
        (there / name / "__about__.py").write_text(f'__version__ = "{version}"\n')
    return folder / "bin" / "python"
