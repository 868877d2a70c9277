"""The process in which parts of a report run: ``python -m vllm_ascend_quant.reporting.child '[["machine", ""], ...]'``.

It prints one line of JSON for each part. Whatever libraries print goes to the standard error stream, a file.
"""

import faulthandler
import importlib
import json
import os
import sys
import traceback
from typing import Any

from vllm_ascend_quant.reporting.parts import MODEL, PARTS, TORCH


def run(name: str, argument: str) -> dict[str, Any]:
    """The answer of one part, or why there is none."""
    module, _, function = PARTS.get(name, "checkpoints:model").partition(":")
    try:
        answer = getattr(importlib.import_module(f"{__package__}.{module}"), function)
        return {"found": answer(argument) if name == MODEL else answer()}
    except Exception as error:
        return {"error": explained(error)}


def explained(error: BaseException) -> str:
    """An error of ours as it is, since it says what is wrong; any other with where it comes from."""
    if any(cls.__name__ == "QuantError" for cls in type(error).__mro__):
        return f"{type(error).__name__}: {error}"
    return "".join(traceback.format_exception(error)).rstrip()


#: What keeps torch from importing torch_npu by itself.
_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def main() -> None:
    """Answer all parts that are asked for."""
    faulthandler.enable()
    requests, autoload = json.loads(sys.argv[1]), os.environ.get(_AUTOLOAD) != "0"  # torch changes it
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for index, (name, argument) in enumerate(requests, 1):
            answer = run(name, argument)
            again = name == TORCH and "error" in answer and autoload
            if again:
                answer["error"] += f"\nThe parts below are looked for with {_AUTOLOAD}=0."
            sys.stdout.flush()
            sys.stderr.flush()
            # How much of what was printed belongs to this part.
            answers.write(json.dumps({**answer, "printed": os.lseek(2, 0, os.SEEK_CUR)}, default=str) + "\n")
            answers.flush()
            if again:  # a module that was imported in part gives other errors than the one that matters
                os.dup2(answers.fileno(), 1)
                os.environ[_AUTOLOAD] = "0"
                os.execv(sys.executable, [sys.executable, "-m", __spec__.name, json.dumps(requests[index:])])
    os._exit(0)  # all is said: what a library does at the end of a process is no finding


if __name__ == "__main__":
    main()
