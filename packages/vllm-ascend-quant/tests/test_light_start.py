"""What the plugin costs those who serve other models: in processes of their own, which begin as a user's does."""

import os
import subprocess
import sys
from pathlib import Path

DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or Path(__file__).parents[3] / "testdata")

#: What a process of vLLM has imported when it loads plugins, and which modules have come since.
BEGIN = """
import sys
import vllm.engine.arg_utils
from vllm.engine.arg_utils import EngineArgs

before = set(sys.modules)

def news():
    return sorted(set(sys.modules) - before)
"""

REGISTER = (
    BEGIN
    + """
from vllm_ascend_quant.plugin import register
register()
print("\\n".join(news()))
"""
)

FLOAT_MODEL = (
    BEGIN
    + """
from vllm import LLM
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64)
print("\\n".join(news()))
"""
)

#: As in a build of vLLM that this package was never tried with.
WITHOUT = (
    BEGIN
    + """
del EngineArgs.create_speculative_config
from vllm_ascend_quant.plugin import register
register()
config = EngineArgs(model=sys.argv[1]).create_model_config()
print("method", config.quantization)
from vllm.config import LoadConfig, VllmConfig
try:
    config = EngineArgs(model=sys.argv[2]).create_model_config()
    VllmConfig.get_quantization_config(config, LoadConfig())
except Exception as error:
    print("refused", type(error).__name__, error)
"""
)


def run(code: str, *arguments: object) -> tuple[list[str], str]:
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stdout + done.stderr


def packages(modules: list[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def test_registering_imports_nothing_of_torch_or_vllm() -> None:
    modules, _ = run(REGISTER)
    ours = {"quant_core", "quant_compressed_tensors", "quant_modelslim", "vllm_ascend_quant"}
    assert packages(modules) == {*ours, "wrapt"}
    assert len(modules) < 140
    assert not [module for module in modules if module.startswith("quant_core.schemes.linear.")]


def test_a_float_model_is_served_without_what_serves_ours() -> None:
    """In one process, so that the front's modules and the worker's are seen together."""
    modules, _ = run(FLOAT_MODEL, DATA / "models" / "qwen3")
    ours = {module for module in modules if packages([module]) == {"vllm_ascend_quant"}}
    assert "vllm_ascend_quant.plugin.building" in ours  # the wrappers were called
    heavy = ("methods", "loading", "served_model", "placement.deciding", "plugin.serving", "files.saved_state")
    assert not [module for module in ours if module.startswith(tuple(f"vllm_ascend_quant.{name}" for name in heavy))]


def test_a_vllm_that_lacks_a_function_is_one_warning() -> None:
    """And an error for our checkpoints only."""
    printed, logged = run(WITHOUT, DATA / "models/qwen3", DATA / "checkpoints/msmodelslim/qwen3/W8A8")
    assert "method None" in printed
    assert "refused UnsupportedVllmError this vLLM lacks functions that vllm-ascend-quant depends on" in printed
    assert "without vllm.engine.arg_utils:EngineArgs.create_speculative_config" in logged
