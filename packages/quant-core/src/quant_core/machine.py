"""What this machine has to compute with, for reports and for tests: its processor, and NPUs or why there are none."""

import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from quant_core.devices import product_of
from quant_core.errors import LimitError

#: Instruction sets on which results or speed depend, as Linux calls them; the second line is that of ARM.
INSTRUCTION_SETS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)


@dataclass(frozen=True)
class Processor:
    """The processor.

    Attributes:
        name: as it calls itself.
        instruction_sets: those of INSTRUCTION_SETS that it has; none where the system does not say.
        torch_uses: the one that torch chose, or that ATEN_CPU_CAPABILITY keeps it to.
        threads: how many of them torch computes with.

    """

    name: str
    instruction_sets: tuple[str, ...]
    torch_uses: str
    threads: int


@dataclass(frozen=True)
class Npus:
    """The NPUs of this machine.

    Attributes:
        names: of each device, as torch_npu gives it.
        product: what this package takes them for; empty without a device.
        problem: why none can be used; empty if one can.

    """

    names: tuple[str, ...] = ()
    product: str = ""
    problem: str = ""


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Processor:
    """The processor, as Linux describes it in a file."""
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    names = re.findall(r"^model name\s*: (.+)$", text, re.MULTILINE)
    told = re.search(r"^(?:flags|Features)\s*: (.+)$", text, re.MULTILINE)
    flags = told[1].split() if told else []
    return Processor(
        name=names[0] if names else platform.processor() or platform.machine(),
        instruction_sets=tuple(name for name in INSTRUCTION_SETS if name in flags),
        torch_uses=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
    )


def npus() -> Npus:
    """The NPUs that torch_npu finds, or why there are none. Never raises, whatever a driver does."""
    from quant_core import ops  # imports torch_npu, if there is one

    torch_npu = sys.modules.get("torch_npu")
    if torch_npu is None:
        return Npus(problem=ops.torch_npu_status)
    try:
        names = tuple(str(torch_npu.npu.get_device_name(i)) for i in range(torch_npu.npu.device_count()))
        if not names or not torch_npu.npu.is_available():
            return Npus(names, problem=f"{ops.torch_npu_status} finds no NPU that it can use")
        return Npus(names, product_of(names[0]))
    except LimitError as error:
        return Npus(names, problem=str(error))
    except Exception as error:  # a driver that does not answer, a CANN of another version
        return Npus(problem=f"{ops.torch_npu_status} cannot ask for NPUs: {type(error).__name__}: {error}")
