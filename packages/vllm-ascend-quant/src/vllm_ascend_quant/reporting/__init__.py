"""What a bug report needs, found without starting an engine.

A report consists of parts (`parts.py`), each of them data that JSON can hold. The machine that it is asked on may be
the very problem: a torch that cannot be imported, a driver that does not answer, a library that aborts the process. So
parts run in a process of their own (`child.py`), and one that raises, dies or hangs costs its own answer only.

Nothing that is imported here imports torch or vLLM.
"""

from vllm_ascend_quant.reporting.collecting import Part, collect
from vllm_ascend_quant.reporting.parts import PARTS, Request, parts_of

__all__ = ["PARTS", "Part", "Request", "collect", "parts_of"]
