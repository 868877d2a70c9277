"""Models that are named: found in a cache, on the Hugging Face hub, or on ModelScope, each played by a stand-in."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
import named_models
from stand_in_hub import StandInHub, commit, files_sent

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")
CHECKPOINTS = DATA / "checkpoints"
W8A8, SHARDED = "msmodelslim/qwen3/W8A8", "msmodelslim/qwen3/W8A8_DYNAMIC_SHARDED"
FLOAT = DATA / "models" / "qwen3"

OURS = "someone/qwen3-w8a8"
WEIGHTS = "quant_model_weights.safetensors"
DESCRIPTION = "quant_model_description.json"
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # an engine starts sooner


@pytest.fixture(scope="module")
def hub() -> Iterator[StandInHub]:
    repositories = {
        OURS: {"main": CHECKPOINTS / SHARDED, "v1": CHECKPOINTS / W8A8},
        "someone/float": {"main": FLOAT},
        "someone/mute": {"main": FLOAT},
        "someone/gated": {"main": CHECKPOINTS / W8A8},
    }
    with StandInHub(repositories) as stand_in:
        stand_in.closed.add("someone/gated")
        stand_in.mute.add("someone/mute")
        yield stand_in


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def online(hub: StandInHub, cache: Path) -> dict[str, dict[str, Any]]:
    """A process that reaches the hub; nothing is in the cache when it starts."""
    steps = {
        "float": {"model": "someone/float"},
        "mute": {"model": "someone/mute"},
        "ours": {"model": OURS},
        "again": {"model": OURS},
        "download-dir": {"model": OURS, "revision": "v1", "download_dir": str(cache / "elsewhere")},
        "dummy": {"model": OURS, "revision": commit(OURS, "v1"), "load_format": "dummy"},
        "typo": {"model": "someone/typo", "quantization": "ascend"},
        "typo-of-others": {"model": "someone/typo"},
        "gated": {"model": "someone/gated", "quantization": "ascend"},
        "revision": {"model": OURS, "revision": "v2", "quantization": "ascend"},
        "path": {"model": "/nowhere/at/all", "quantization": "ascend"},
        "float-as-ours": {"model": "someone/float", "quantization": "ascend"},
        "contradiction": {"model": OURS, "quantization": "fp8"},
    }
    return named_models.run(steps, hub.url, cache)


def test_a_model_that_is_not_ours_costs_two_requests(
    online: dict[str, dict[str, Any]], hub: StandInHub, tmp_path: Path
) -> None:
    """For the list of its files, and whether the config.json that vLLM asked for is still the same.

    Compared with vLLM without plugins, request by request; also where the hub does not answer the first.
    """
    steps = {"stock-float": {"model": "someone/float"}, "stock-mute": {"model": "someone/mute"}}
    stock = named_models.run(steps, hub.url, tmp_path, VLLM_PLUGINS="")
    for name in ("float", "mute"):
        assert online[name] == stock[f"stock-{name}"]
        more = Counter(hub.since(name))
        more.subtract(hub.since(f"stock-{name}"))
        listing = {f"GET /api/models/someone/{name}": 1}
        assert +more == listing | ({"HEAD /someone/float/resolve/main/config.json": 1} if name == "float" else {})
        assert -more == Counter()
    assert online["float"] == {"method": None, "folder": None}


def test_a_model_of_ours_is_downloaded_once(online: dict[str, dict[str, Any]], hub: StandInHub, cache: Path) -> None:
    """Into the cache where every process of vLLM looks for it."""
    folder = cache / "hub" / "models--someone--qwen3-w8a8" / "snapshots" / commit(OURS, "main")
    assert online["ours"] == {"method": "ascend", "folder": str(folder)}
    sent = files_sent(hub.since("ours"))
    assert sent == dict.fromkeys((p.name for p in (CHECKPOINTS / SHARDED).iterdir()), 1)
    assert online["again"] == online["ours"]
    assert not files_sent(hub.since("again"))


def test_revision_and_download_dir(online: dict[str, dict[str, Any]], hub: StandInHub, cache: Path) -> None:
    found = online["download-dir"]
    folder = cache / "elsewhere" / "models--someone--qwen3-w8a8" / "snapshots" / commit(OURS, "v1")
    assert found == {"method": "ascend", "folder": str(folder)}
    sent = files_sent(hub.since("download-dir"))
    del sent["config.json"]  # vLLM looks for it without --download-dir as well
    assert sent == dict.fromkeys((p.name for p in (CHECKPOINTS / W8A8).iterdir() if p.name != "config.json"), 1)


def test_made_up_weights_need_the_headers_of_the_files(online: dict[str, dict[str, Any]], hub: StandInHub) -> None:
    assert online["dummy"]["method"] == "ascend"
    assert commit(OURS, "v1") in online["dummy"]["folder"]
    assert files_sent(hub.since("dummy"))[WEIGHTS] == 1


@pytest.mark.parametrize(
    ("step", "parts"),
    [
        ("typo", ["someone/typo is no folder, and cannot be had from http", "correct the name", "HF_TOKEN"]),
        ("gated", ["someone/gated is no folder, and cannot be had from http", "gated repo", "HF_TOKEN"]),
        ("revision", [f"{OURS} is no folder", "in the revision v2", "correct the name or --revision"]),
        ("path", ["there is no folder /nowhere/at/all", "correct the path"]),
        ("float-as-ours", ["someone/float is no ModelSlim checkpoint", "serve a float model without --quantization"]),
        ("contradiction", ["--quantization fp8 contradicts the files", f"{OURS} has {DESCRIPTION}"]),
    ],
)
def test_a_wrong_name_is_an_error_that_says_what_to_do(
    step: str, parts: list[str], online: dict[str, dict[str, Any]], hub: StandInHub
) -> None:
    message = online[step]["error"]
    assert message.startswith(("LoadError: ", "CheckpointError: "))
    for part in parts:
        assert part in message
    assert set(files_sent(hub.since(step))) <= {"config.json"}


def test_without_a_method_of_ours_the_error_is_vllms(online: dict[str, dict[str, Any]]) -> None:
    assert online["typo-of-others"]["error"].startswith("OSError: someone/typo is not a local folder")


def test_an_engine_in_its_own_process_finds_what_was_downloaded(
    hub: StandInHub, tmp_path: Path, reference: Any
) -> None:
    """Named by branch, with --download-dir; then found there by commit, by branch and by an engine without a hub."""
    elsewhere = tmp_path / "elsewhere"
    arguments = {"model": OURS, "revision": "v1", "download_dir": str(elsewhere), "prompts": reference.prompts}
    found = named_models.run({"engine": arguments}, hub.url, tmp_path)["engine"]
    assert "answers" in found, found
    verdict = reference.judge(W8A8, found["answers"], "float32")
    assert verdict["ok"], verdict["why"]
    assert files_sent(hub.since("engine"))[WEIGHTS] == 1

    asked = len(hub.requests)
    steps = {
        "commit": {"model": OURS, "revision": commit(OURS, "v1")},
        "branch": {"model": OURS, "revision": "v1"},
        "other": {"model": OURS, "revision": "v2", "quantization": "ascend"},
        "answers": {"model": OURS, "revision": "v1", "prompts": reference.prompts},
    }
    offline = named_models.run(steps, hub.url, tmp_path, HF_HUB_CACHE=str(elsewhere), HF_HUB_OFFLINE="1", **IN_PROCESS)
    folder = elsewhere / "models--someone--qwen3-w8a8" / "snapshots" / commit(OURS, "v1")
    assert offline["commit"] == offline["branch"] == {"method": "ascend", "folder": str(folder)}
    assert "error" in offline["other"]
    assert offline["answers"] == found
    assert [path for _, path in hub.requests[asked:]] == [f"/mark/{step}" for step in steps]


def test_modelscope(hub: StandInHub, tmp_path: Path, reference: Any) -> None:
    """VLLM_USE_MODELSCOPE: each file once, with a revision, into the cache or into --download-dir."""
    elsewhere = tmp_path / "elsewhere"
    steps = {
        "ms-float": {"model": "someone/float"},
        "ms-ours": {"model": OURS},
        "ms-typo": {"model": "someone/typo", "quantization": "ascend"},
        "ms-engine": {"model": OURS, "revision": "v1", "download_dir": str(elsewhere), "prompts": reference.prompts},
    }
    modelscope = {"VLLM_USE_MODELSCOPE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    found = named_models.run(steps, hub.url, tmp_path, **modelscope, **IN_PROCESS)
    assert found["ms-float"] == {"method": None, "folder": None}
    assert "model.safetensors" not in files_sent(hub.since("ms-float"))
    assert found["ms-ours"]["method"] == "ascend"
    assert Path(found["ms-ours"]["folder"]).is_relative_to(tmp_path / "models")
    assert files_sent(hub.since("ms-ours")) == dict.fromkeys((p.name for p in (CHECKPOINTS / SHARDED).iterdir()), 1)
    assert "someone/typo is no folder, and cannot be had from ModelScope" in found["ms-typo"]["error"]
    verdict = reference.judge(W8A8, found["ms-engine"]["answers"], "float32")
    assert verdict["ok"], verdict["why"]
    assert files_sent(hub.since("ms-engine"))[WEIGHTS] == 1
    assert [path.name for path in elsewhere.rglob("*.safetensors")] == [WEIGHTS]
