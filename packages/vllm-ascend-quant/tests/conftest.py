"""Real vLLM, in this process where possible: an engine then starts in seconds."""

import gc
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Run by `nox -s test-ascend`, which has vllm-ascend, and `nox -s test-ray`, which has Ray: each names its folder.
collect_ignore = ["ascend", "nodes"]

REPOSITORY = Path(__file__).parents[3]

#: The folder with models, checkpoints, reference.json and compare.py: the repository's copies, or all of them.
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

SETTINGS = {"enforce_eager": True, "enable_prefix_caching": False, "max_model_len": 512, "dtype": "float32"}


@contextmanager
def engine(folder: Path | str, **options: Any) -> Iterator[Any]:
    """A vLLM engine in this process, shut down afterwards so that the next one can start."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = None
    try:
        with collected_once():
            llm = LLM(str(folder), **{**SETTINGS, **options})
        yield llm
    finally:
        with collected_once():
            if llm is not None:
                # Now, not when the caller's last reference goes: it would take the next engine's process groups along.
                llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()


@contextmanager
def collected_once() -> Iterator[None]:
    """Let vLLM start or stop an engine, and collect garbage once behind it.

    It does so nine times, half a second each with all that it imports: more than all else that a small engine does.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("collect", "freeze", "unfreeze"):
            patch.setattr(gc, name, lambda *_: 0)
        yield
    gc.collect()


def front(folder: Path | str, **options: Any) -> Any:
    """vLLM's configuration: all that happens in the front process before an engine is started."""
    from vllm.engine.arg_utils import EngineArgs

    settings = {"enforce_eager": True, "max_model_len": 512, "dtype": "float32"}
    return EngineArgs(model=str(folder), **{**settings, **options}).create_engine_config()


@contextmanager
def loaded(folder: Path | str, **options: Any) -> Iterator[Any]:
    """The model as a worker builds and loads it, without the rest of an engine: in less than a second."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.model_executor.model_loader import get_model

    config = front(folder, **options)
    if gc.get_freeze_count() == 0:  # vLLM collects at every load, which takes a second with all that it imports
        gc.collect()
        gc.freeze()
    with (
        tempfile.TemporaryDirectory() as rendezvous,
        pytest.MonkeyPatch.context() as patch,
        set_current_vllm_config(config),
    ):
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)  # as vLLM's CPU worker does
        try:
            init_distributed_environment(1, 0, f"file://{rendezvous}/group", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
            yield get_model(vllm_config=config)
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()


def reload_streamed(model: Any, tensors: dict[str, Any]) -> None:
    """What a worker's `reload_weights(weights_iterator=...)` does with a loaded model."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(model)
    model.load_weights(iter(tensors.items()))
    finalize_layerwise_reload(model, get_current_vllm_config().model_config)


def answers(llm: Any, prompts: list[list[int]], tokens: int = 16) -> list[dict[str, Any]]:
    """Prompt and greedy log-probabilities in the form that compare.py reads."""
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling(tokens), use_tqdm=False)
    return in_form(prompts, outputs)


def sampling(tokens: int = 16) -> Any:
    """Greedy, with the log-probabilities of prompt and answer."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, prompt_logprobs=0, logprobs=0, ignore_eos=True)


def in_form(prompts: list[list[int]], outputs: Any) -> list[dict[str, Any]]:
    """vLLM's outputs in the form that compare.py reads."""
    results = []
    for ids, output in zip(prompts, outputs, strict=True):
        generated = output.outputs[0]
        results.append(
            {
                "token_ids": ids,
                "prompt_logprobs": [output.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))],
                "generated": list(generated.token_ids),
                "generated_logprobs": [
                    at[token].logprob for at, token in zip(generated.logprobs, generated.token_ids, strict=True)
                ],
            }
        )
    return results


class Reference:
    """reference.json with the rule of compare.py."""

    def __init__(self, folder: Path) -> None:
        spec = importlib.util.spec_from_file_location("compare", folder / "compare.py")
        assert spec is not None
        assert spec.loader is not None
        self._compare = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._compare)
        self.content = json.loads((folder / "reference.json").read_text())

    @property
    def prompts(self) -> list[list[int]]:
        """The token ids of each prompt."""
        return [prompt["token_ids"] for prompt in self.content["prompts"]]

    def judge(self, key: str, results: list[dict[str, Any]], dtype: str) -> dict[str, Any]:
        """compare.py's verdict: `ok`, `why`, `figures`."""
        verdict: dict[str, Any] = self._compare.compare(self.content, key, {"prompts": results, "dtype": dtype})
        return verdict


@pytest.fixture(scope="session")
def reference() -> Reference:
    """What a correct implementation answers."""
    return Reference(DATA / "checkpoints")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a writable copy of a checkpoint, to be broken."""
    import shutil

    def copy(key: str) -> Path:
        target = tmp_path / key.replace("/", "-")
        shutil.copytree(DATA / "checkpoints" / key, target, copy_function=shutil.copyfile)
        target.chmod(0o755)
        return target

    return copy


@pytest.fixture(scope="session")
def start_engine() -> Callable[..., Any]:
    """`with start_engine(folder, dtype="float32") as llm:` (test modules cannot import this file)."""
    return engine


@pytest.fixture(scope="session")
def ask() -> Callable[..., list[dict[str, Any]]]:
    """`ask(llm, prompts)`: see `answers`."""
    return answers


@pytest.fixture(scope="session")
def configure() -> Callable[..., Any]:
    """`configure(folder, quantization=...)`: see `front`."""
    return front


@pytest.fixture(scope="session")
def load_model() -> Callable[..., Any]:
    """`with load_model(folder) as model:`; see `loaded`."""
    return loaded


@pytest.fixture(scope="session")
def reload_model() -> Callable[..., None]:
    """`with load_model(folder) as model: reload_model(model, tensors)`; see `reload_streamed`."""
    return reload_streamed
