"""Beside a platform plugin that claims our names, as vllm-ascend does. A stand-in distribution plays its part."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")
MODEL = DATA / "checkpoints" / "msmodelslim" / "qwen3" / "W8A8"

# One after the other: an engine of several processes keeps both cores of a small machine busy.
pytestmark = pytest.mark.xdist_group("engines of several processes")

PLATFORM = '''
"""A stand-in for vllm-ascend's platform plugin: it registers quantisation methods where that one does."""
from vllm.platforms.cpu import CpuPlatform

def activate():
    return "standin_ascend.StandInPlatform"

class StandInPlatform(CpuPlatform):
    @classmethod
    def pre_register_and_update(cls, parser=None):
        import standin_ascend_quantization
'''

QUANTIZATION = '''
"""A stand-in for vllm_ascend.quantization: importing it registers the name `ascend`."""
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

@register_quantization_config("ascend")
class StandInConfig(QuantizationConfig):
    def get_name(self): return "ascend"
    def get_supported_act_dtypes(self): return []
    @classmethod
    def get_min_capability(cls): return 0
    @staticmethod
    def get_config_filenames(): return []
    @classmethod
    def from_config(cls, config): return cls()
    def get_quant_method(self, layer, prefix): raise NotImplementedError
'''

SCRIPT = """
import importlib, json, sys

def look(worker):
    importlib.import_module("standin_ascend_quantization")  # as a draft model's config would
    from vllm.model_executor.layers.quantization import get_quantization_config
    return [type(worker.vllm_config.quant_config).__name__, get_quantization_config("ascend").__name__]

if __name__ == "__main__":
    from vllm.platforms import current_platform
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.quantization import get_quantization_config
    found = {}
    if sys.argv[2] == "front":
        EngineArgs(model=sys.argv[1])
        current_platform.pre_register_and_update()
        found["front"] = get_quantization_config("ascend").__name__
    else:
        from vllm import LLM, SamplingParams
        llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=128)
        found["front"] = get_quantization_config("ascend").__name__
        found["workers"] = llm.collective_rpc(look)
        answer = llm.generate(["\\n64 - 40 ="], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
        found["answer"] = answer[0].outputs[0].text
    found["platform"] = type(current_platform).__name__
    print("FOUND" + json.dumps(found))
"""


@pytest.fixture
def standin(tmp_path: Path) -> Path:
    (tmp_path / "standin_ascend.py").write_text(PLATFORM)
    (tmp_path / "standin_ascend_quantization.py").write_text(QUANTIZATION)
    info = tmp_path / "standin_ascend-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: standin-ascend\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[vllm.platform_plugins]\nstandin_ascend = standin_ascend:activate\n")
    (tmp_path / "look.py").write_text(textwrap.dedent(SCRIPT))
    return tmp_path


def run(standin: Path, part: str, **environment: str) -> dict[str, Any]:
    variables = {
        **os.environ,
        "PYTHONPATH": str(standin),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to send a function to the workers
        **environment,
    }
    command = [sys.executable, str(standin / "look.py"), str(MODEL), part]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=400, cwd=standin, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert lines, done.stdout[-2000:] + done.stderr[-2000:]
    found: dict[str, Any] = json.loads(lines[0].removeprefix("FOUND"))
    return found


def test_ours_is_used_in_every_process(standin: Path) -> None:
    found = run(standin, "engine")
    assert found["platform"] == "StandInPlatform"
    assert found["front"] == "AscendModelSlimConfig"
    assert found["workers"] == [["AscendModelSlimConfig", "AscendModelSlimConfig"]]
    assert found["answer"].startswith(" 24.")


def test_a_switch_leaves_the_name_to_the_platform(standin: Path) -> None:
    found = run(standin, "front", VLLM_ASCEND_QUANT_DISABLE="precedence")
    assert found == {"platform": "StandInPlatform", "front": "StandInConfig"}
