"""8-bit caches: vllm-ascend's own int8 attention gets the scales of ours."""

import shutil
from pathlib import Path
from typing import Any

import platform_model
import pytest
import torch
from safetensors.torch import load_file, save_file

from quant_core import LimitError
from vllm_ascend_quant.methods.cache import NAME


def attention(model: Any) -> list[Any]:
    """Its attention layers."""
    return [layer for layer in model.modules() if hasattr(layer, "impl") and hasattr(layer, "kv_cache_torch_dtype")]


def without_zero_points(folder: Path, target: Path) -> Path:
    """A copy whose cache is symmetric."""
    shutil.copytree(folder, target, copy_function=shutil.copyfile)
    target.chmod(0o755)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        changed = {n: torch.zeros_like(v) if n.endswith("kv_cache_offset") else v for n, v in tensors.items()}
        save_file(changed, file, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("name", ["msmodelslim/qwen3/W8A8C8_ASYM", "llmcompressor/qwen3/W8A8_DYNAMIC_KV_INT8"])
def test_its_attention_writes_the_codes_that_ours_would(name: str, checkpoints: Path, tmp_path: Path) -> None:
    folder = without_zero_points(checkpoints / name, tmp_path / "symmetric")
    config = platform_model.on_cpu(platform_model.front(folder))
    assert config.quant_config.enable_c8_quant
    assert config.quant_config.c8_quant_layers == list(range(config.model_config.hf_config.num_hidden_layers))
    with platform_model.loaded(config) as model:
        layers = attention(model)
        assert len(layers) == config.model_config.hf_config.num_hidden_layers
        for layer in layers:
            assert type(layer.impl).__name__ == "AscendC8AttentionBackendImpl"
            assert layer.kv_cache_torch_dtype == torch.int8
            assert layer.get_kv_cache_spec(config).dtype == torch.int8
            key, value = torch.randn(2, 5, layer.num_kv_heads, layer.head_size).mul(3).bfloat16()
            layer.impl._prepare_c8_scales(layer, key.device)
            found = layer.impl._quantize_kv_to_int8(key, value, layer, 5)
            scales = getattr(layer, NAME)
            for codes, rows, part in zip(found, (key, value), "kv", strict=True):
                scale = scales.get_parameter(f"{part}_scale")
                exact = (rows.float() / scale).round().clamp(-128, 127)
                # Theirs multiplies by a reciprocal in the model's dtype: some codes are next to ours.
                assert (codes.float() - exact).abs().max() <= 1
                assert (codes.float() == exact).float().mean() > 0.7


def test_zero_points_are_refused_by_name(checkpoints: Path) -> None:
    config = platform_model.on_cpu(platform_model.front(checkpoints / "msmodelslim/qwen3/W8A8C8_ASYM"))
    with (
        pytest.raises(LimitError, match=r"(?s)layers\.0.*cannot serve a cache with zero points.*kv_cache_offset"),
        platform_model.loaded(config),
    ):
        pass


def test_other_caches_are_refused_by_name(checkpoints: Path) -> None:
    config = platform_model.on_cpu(platform_model.front(checkpoints / "llmcompressor/qwen3/FP8_DYNAMIC_KV_FP8"))
    with (
        pytest.raises(LimitError, match=r"(?s)layers\.0.*vllm-ascend has no KV_FP8 cache"),
        platform_model.loaded(config),
    ):
        pass


def test_a_reload_hands_over_other_scales(checkpoints: Path, tmp_path: Path) -> None:
    from vllm_ascend_quant.ascend_platform.attention import give_scales

    folder = without_zero_points(checkpoints / "msmodelslim/qwen3/W8A8C8_ASYM", tmp_path / "symmetric")
    config = platform_model.on_cpu(platform_model.front(folder))
    with platform_model.loaded(config) as model:
        layer = attention(model)[0]
        layer.impl._prepare_c8_scales(layer, torch.device("cpu"))
        scales = getattr(layer, NAME)
        for part in ("k", "v"):
            scales.get_parameter(f"{part}_scale").data *= 2
        before = layer._c8_k_scale.clone()
        give_scales(layer, scales, scales.quant_method.quant_method)
        layer.impl._prepare_c8_scales(layer, torch.device("cpu"))
        assert torch.equal(layer._c8_k_scale, 2 * before)
