"""A format that knows layers by patterns only and has names of its own for tensors (pattern_format.py), in real vLLM.

It is a stranger's package, announced by an entry point, and served by the schemes that are there.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm.model_executor.layers import quantization

from quant_core import Packing, StoredForm, WeightForm, formats
from quant_core.packing import pack
from quant_core.storage import IntegerStorage
from vllm_ascend_quant import compat
from vllm_ascend_quant.plugin import register

MODEL = Path(__file__).parents[3] / "testdata" / "models" / "qwen3"
OFFSET_BINARY = Packing(axis=1, values=8, signed=False)
GROUP = 32


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The format as an installed package."""
    site = tmp_path / "site"
    metadata = site / "pattern_format-1.0.dist-info"
    metadata.mkdir(parents=True)
    shutil.copyfile(Path(__file__).with_name("pattern_format.py"), site / "pattern_format.py")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pattern-format\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[quant_core.formats]\npatterns = pattern_format:PatternFormat\n")
    monkeypatch.syspath_prepend(site)
    formats._announced.cache_clear()  # read once in a process, and this one had read them
    register()
    yield
    formats._announced.cache_clear()
    quantization.QUANTIZATION_METHODS.remove("patterns")  # vLLM asks every method it knows about every checkpoint
    registry, name = compat.module_level(compat.ADDED_METHODS)
    del getattr(registry, name)["patterns"]


def write(folder: Path, num_bits: int, quant_type: str) -> tuple[Path, Path]:
    """A quantised folder, and a float one with the same numbers."""
    storage = IntegerStorage(
        StoredForm(), WeightForm(num_bits=num_bits, strategy="group", group_size=GROUP, symmetric=True)
    )
    quantised: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    (file,) = MODEL.glob("*.safetensors")
    for name, tensor in load_file(file).items():
        module, _, suffix = name.rpartition(".")
        if suffix != "weight" or "proj" not in module:
            quantised[name] = plain[name] = tensor.to(torch.float32)
            continue
        stored = storage.quantize(tensor)
        plain[name] = storage.dequantize(stored)
        packed = {"weight_packed": pack(stored["weight"], OFFSET_BINARY)} if num_bits == 4 else {}
        shape = {"weight_shape": torch.tensor(tensor.shape)}
        kept = packed or {"weight": stored["weight"]}
        for own, value in {**kept, **shape, "weight_scale": stored["weight_scale"]}.items():
            quantised[f"{module}.{own}"] = value.contiguous()
    targets = {r"model\.layers\.\d+\..*_proj": quant_type, r"model\.nothing\..*": quant_type}
    section = {"quant_method": "patterns", "targets": targets, "num_bits": num_bits, "group_size": GROUP}
    for target, tensors, more in (
        (folder / "quantised", quantised, {"quantization_config": section}),
        (folder / "plain", plain, {}),
    ):
        shutil.copytree(MODEL, target, ignore=shutil.ignore_patterns("*.safetensors"), copy_function=shutil.copyfile)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((MODEL / "config.json").read_text()) | {"torch_dtype": "float32", **more}
        (target / "config.json").write_text(json.dumps(config))
    return folder / "quantised", folder / "plain"


def logprobs(answers: list[dict[str, Any]]) -> Any:
    return np.concatenate([one["prompt_logprobs"] + one["generated_logprobs"] for one in answers])


@pytest.mark.parametrize(("num_bits", "quant_type"), [(4, "W4A16"), (8, "W8A16")])
def test_served_like_the_float_model_with_its_numbers(
    num_bits: int,
    quant_type: str,
    tmp_path: Path,
    start_engine: Callable[..., Any],
    ask: Callable[..., Any],
    reference: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Loaded, reloaded, and told which target matched nothing."""
    quantised, plain = write(tmp_path, num_bits, quant_type)
    prompts = reference.prompts[:4]
    with start_engine(plain) as llm:
        expected = logprobs(ask(llm, prompts))
    logging.getLogger("vllm.ascend_quant").addHandler(caplog.handler)  # vLLM's loggers do not hand on what they log
    with start_engine(quantised) as llm:
        model = llm.llm_engine.model_executor.driver_worker.get_model()
        layer = model.model.layers[0].mlp.gate_up_proj
        assert layer.weight.dtype == torch.int8
        assert layer.quant_method.quant.quant_type == quant_type
        found = logprobs(ask(llm, prompts))
        llm.collective_rpc("reload_weights")
        reloaded = logprobs(ask(llm, prompts))
    assert np.abs(found - expected).max() < 1e-3
    assert np.array_equal(found, reloaded)
    assert r"the pattern 'model\\.nothing\\..*' matches no layer of the model" in caplog.text


def test_made_up_weights_without_any_file(
    tmp_path: Path, start_engine: Callable[..., Any], ask: Callable[..., Any], reference: Any
) -> None:
    """Nothing lists the layers, neither files nor format: the model's own names are turned back and matched."""
    quantised, _ = write(tmp_path, 8, "W8A16")
    (quantised / "model.safetensors").unlink()
    with start_engine(quantised, load_format="dummy") as llm:
        model = llm.llm_engine.model_executor.driver_worker.get_model()
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            layer = model.model.layers[1].get_submodule(name)
            assert layer.quant_method.quant.quant_type == "W8A16"
            assert len(layer.quant_method.quant.modules) == {"qkv_proj": 3, "gate_up_proj": 2}.get(
                name.split(".")[1], 1
            )
        assert ask(llm, reference.prompts[:1])
