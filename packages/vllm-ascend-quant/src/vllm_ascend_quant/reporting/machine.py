"""Parts of a report about the machine. What needs torch imports it when it is asked."""

import importlib
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

_SHOWN = """
VLLM_ASCEND_QUANT_DISABLE QUANT_CORE_NATIVE QUANT_CORE_TEST_GEMM ASCEND_QUANT_TEST_DEVICE
ASCEND_QUANT_TEST_DATA

VLLM_PLUGINS VLLM_TARGET_DEVICE VLLM_VERSION VLLM_USE_V1 VLLM_USE_MODELSCOPE VLLM_LOGGING_LEVEL
VLLM_CONFIGURE_LOGGING VLLM_ENABLE_V1_MULTIPROCESSING VLLM_WORKER_MULTIPROC_METHOD VLLM_CPU_KVCACHE_SPACE
VLLM_CPU_OMP_THREADS_BIND VLLM_CPU_NUM_OF_RESERVED_CPU VLLM_ATTENTION_BACKEND VLLM_MLA_DISABLE
VLLM_USE_AOT_COMPILE VLLM_DISABLE_COMPILE_CACHE VLLM_ASCEND_ENABLE_NZ VLLM_ASCEND_ENABLE_FUSED_MC2
VLLM_ASCEND_ENABLE_FLASHCOMM1 VLLM_ASCEND_ENABLE_MATMUL_ALLREDUCE VLLM_ASCEND_ENABLE_CONTEXT_PARALLEL
VLLM_ASCEND_BALANCE_SCHEDULING

ASCEND_HOME_PATH ASCEND_TOOLKIT_HOME ASCEND_OPP_PATH ASCEND_CUSTOM_OPP_PATH ASCEND_AICPU_PATH
ASCEND_INSTALL_PATH ASCEND_RT_VISIBLE_DEVICES ASCEND_VISIBLE_DEVICES ASCEND_DEVICE_ID ASCEND_LAUNCH_BLOCKING
ASCEND_GLOBAL_LOG_LEVEL ASCEND_SLOG_PRINT_TO_STDOUT ASCEND_PROCESS_LOG_PATH ASCEND_WORK_PATH SOC_VERSION
TASK_QUEUE_ENABLE CPU_AFFINITY_CONF HCCL_BUFFSIZE HCCL_OP_EXPANSION_MODE HCCL_DETERMINISTIC
PYTORCH_NPU_ALLOC_CONF TORCH_DEVICE_BACKEND_AUTOLOAD

TORCH_EXTENSIONS_DIR ATEN_CPU_CAPABILITY ONEDNN_MAX_CPU_ISA OMP_NUM_THREADS TORCHDYNAMO_DISABLE CXX CXXFLAGS
HF_HUB_OFFLINE TRANSFORMERS_OFFLINE LD_LIBRARY_PATH LD_PRELOAD PYTHONPATH VIRTUAL_ENV CONDA_PREFIX
"""

#: Variables whose values are shown: names of switches, folders and numbers. None of them holds a secret. Those about
#: us, about vLLM and vllm-ascend, CANN and torch_npu, torch, and where libraries are found.
SHOWN = frozenset(_SHOWN.split())

#: Variables whose names are shown if they are set, and never their values: VLLM_API_KEY is one of them.
NAMED = ("VLLM_", "ASCEND_", "QUANT_CORE_")

#: Where CANN is if nothing says otherwise: of releases from 8.5 on, and of older ones.
_USUAL = ("/usr/local/Ascend/cann", "/usr/local/Ascend/ascend-toolkit/latest")


def machine() -> dict[str, Any]:
    """The system and Python."""
    release = platform.freedesktop_os_release() if sys.platform == "linux" else {}
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "distribution": release.get("PRETTY_NAME", ""),
        "C library": " ".join(platform.libc_ver()).strip() or None,
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "interpreter": sys.executable,
        "processors": f"{_usable()} of {os.cpu_count()}",
        "memory": _memory(),
    }


def _usable() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str | None:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (ValueError, OSError):
        return None


def environment() -> dict[str, str]:
    """The variables that matter, without those that are not known to be harmless."""
    shown = {name: value for name, value in os.environ.items() if name in SHOWN}
    named = [name for name in os.environ if name.startswith(NAMED) and name not in SHOWN]
    return dict(sorted((shown | dict.fromkeys(named, "(set; its value is not shown)")).items()))


def cann() -> dict[str, Any]:
    """CANN and the driver, as the files of their installation say; nothing is loaded."""
    told = [name for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME") if os.environ.get(name)]
    folders = [Path(os.environ[name]) for name in told] or [Path(folder) for folder in _USUAL]
    files = (file for folder in folders for file in sorted(folder.glob("*-linux/ascend_*_install.info")))
    installed = {str(file): _settings(file, ("package_name", "version", "innerversion", "path")) for file in files}
    driver = Path("/usr/local/Ascend/driver/version.info")
    return {
        "looked in": [f"{folder}{'' if folder.is_dir() else ' (there is none)'}" for folder in folders],
        "because of": told or "the usual places: neither ASCEND_HOME_PATH nor ASCEND_TOOLKIT_HOME is set",
        "installed": installed or None,
        "driver": _settings(driver, ("Version", "package_version")) if driver.exists() else None,
        "device files": sorted(str(file) for file in Path("/dev").glob("davinci*")) or None,
    }


def _settings(file: Path, wanted: tuple[str, ...]) -> dict[str, str]:
    """Some of the lines `name=value` of a file."""
    pairs = (line.partition("=") for line in file.read_text(encoding="utf-8", errors="replace").splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs if name.strip() in wanted}


def torch() -> dict[str, Any]:
    """Importing torch as a model's process does: it imports torch_npu by itself, and fails where that does."""
    module = importlib.import_module("torch")
    built = {name: getattr(module.version, name, None) for name in ("cuda", "hip", "debug")}
    commit = getattr(module.version, "git_version", None)
    return {
        "file": module.__file__,
        "commit": commit,
        "built for": {name: told for name, told in built.items() if told},
    }


def processor() -> dict[str, Any]:
    """The processor, and what torch makes of it."""
    from quant_core import machine as ours

    found = asdict(ours.processor())
    return {"name": found["name"], "instruction sets": list(found["instruction_sets"])} | {
        "torch uses": found["torch_uses"],
        "threads of torch": found["threads"],
    }


def npus() -> dict[str, Any]:
    """The NPUs that torch_npu finds, or why there are none."""
    from quant_core import devices, ops
    from quant_core import machine as ours

    found = ours.npus()
    return {
        "torch_npu": ops.torch_npu_status,
        "count": len(found.names),
        "names": list(found.names),
        "product": found.product or None,
        "schemes compute on": devices.current_device(),
    } | ({"why none can be used": found.problem} if found.problem else {})
