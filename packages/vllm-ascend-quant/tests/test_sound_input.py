"""Unusual folders that mean the same model: each is served, with the same numbers."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant_core import LoadError

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")

W8A8, DYNAMIC = "msmodelslim/qwen3/W8A8", "msmodelslim/qwen2/W8A8_DYNAMIC"
DESCRIPTION, WEIGHTS = "quant_model_description.json", "quant_model_weights.safetensors"


def parameters(load_model: Callable[..., Any], folder: Path | str, **options: Any) -> dict[str, Tensor]:
    """All parameters of the loaded model, in their run-time form."""
    with load_model(folder, **options) as model:
        return {name: param.detach().clone() for name, param in model.named_parameters()}


@pytest.fixture(scope="module")
def plain(load_model: Callable[..., Any]) -> dict[str, Tensor]:
    """What the folder as the tool wrote it becomes."""
    return parameters(load_model, DATA / "checkpoints" / W8A8)


def described(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], object]:
    def run(folder: Path) -> None:
        file = folder / DESCRIPTION
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    return run


def without(*keys: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: {key: value for key, value in content.items() if key not in keys}


def reordered_tensors(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors, key=lambda name: name[::-1])
    parts = {"quant_model_weights-2.safetensors": names[::2], "quant_model_weights-1.safetensors": names[1::2]}
    for file, part in parts.items():  # two files, no index: engines take what they find
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / WEIGHTS).unlink()


def links(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        target = file.rename(elsewhere / str(number))
        file.symlink_to(target)


def stray_files(folder: Path) -> None:
    for name in ("README.md", "notes.json", "events.bin", "old.safetensors.bak", "._quant_model_weights.safetensors"):
        (folder / name).write_bytes(b"\0 neither JSON nor weights")
    (folder / "optional").mkdir()
    (folder / "optional" / "quarot.safetensors").write_bytes(b"not read")


def configured(value: object) -> Callable[[Path], object]:
    def run(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, "quantization_config": value}))

    return run


UNUSUAL: dict[str, Callable[[Path], object]] = {
    "keys reversed": described(lambda content: dict(reversed(content.items()))),
    "tensors in another order": reordered_tensors,
    "no version": described(without("version")),
    "no global key": described(without("version", "model_quant_type", "metadata", "group_size", "optional")),
    "null global keys": described(
        lambda c: {**dict.fromkeys(("version", "fa_quant_type", "kv_quant_type")), **c, "version": None}
    ),
    "unknown global keys": described(
        lambda content: {"of tomorrow": {"deep": [1, None]}, "another": "W8A8", **content}
    ),
    "float parts without a key": described(without("model.norm.weight", "lm_head.weight", "model.embed_tokens.weight")),
    "FLOAT keys without a tensor": described(lambda content: {**content, "model.visual.proj.weight": "FLOAT"}),
    "the name of older writers": lambda folder: (folder / DESCRIPTION).rename(
        folder / "quant_model_description_w8a8.json"
    ),
    "a copy under the name of older writers": lambda folder: shutil.copyfile(
        folder / DESCRIPTION, folder / "quant_model_description_w8a8.json"
    ),
    "links": links,
    "stray files": stray_files,
    "config names our method": configured({"quant_method": "ascend"}),
    "config names no method": configured({"fa_quant_type": None, "kv_quant_type": None, "group_size": 0}),
    "config has an empty section": configured({}),
    "config has null": configured(None),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_the_same_model(
    case: str, checkpoint: Callable[[str], Path], load_model: Callable[..., Any], plain: dict[str, Tensor]
) -> None:
    """Bit by bit, without any argument."""
    folder = checkpoint(W8A8)
    UNUSUAL[case](folder)
    found = parameters(load_model, folder)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_norms_that_are_stored_twice(checkpoint: Callable[[str], Path], load_model: Callable[..., Any]) -> None:
    """As the oldest writer stores those of anti-outlier methods: the second pair is described by the model's type."""
    folder = checkpoint("msmodelslim/qwen3/V0_W8A8_M4")
    plain = parameters(load_model, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    norms = {name: tensor for name, tensor in tensors.items() if "norm." in name}
    again = {f"{n.rpartition('.')[0]}.module.{n.rpartition('.')[2]}": tensor.clone() for n, tensor in norms.items()}
    save_file(tensors | again, file, metadata={"format": "pt"})
    described(lambda content: content | dict.fromkeys(again, "W8A8"))(folder)
    found = parameters(load_model, folder)
    assert sum(name.endswith("norm.bias") for name in found) == len(again) / 2 > 10
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_a_relative_path(
    monkeypatch: pytest.MonkeyPatch, load_model: Callable[..., Any], plain: dict[str, Tensor]
) -> None:
    folder = DATA / "checkpoints" / W8A8
    monkeypatch.chdir(folder.parent)
    for name in (folder.name, f"./{folder.name}/", f"../{folder.parent.name}/{folder.name}"):
        found = parameters(load_model, name)
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], plain[name]) for name in plain)


# --- an input scale of its own ----------------------------------------------------------------------------------------


def own_input_scale(tensors: dict[str, Tensor], module: str, factor: float, offset: float) -> None:
    """Calibrated otherwise than its neighbours: other codes of the same activations, the same weight."""
    weight = tensors[f"{module}.weight"].to(torch.float64)
    old_scale, old_offset = (tensors[f"{module}.input_{part}"].double() for part in ("scale", "offset"))
    bias = tensors[f"{module}.quant_bias"].double() + old_offset * weight.sum(dim=1)
    tensors[f"{module}.input_scale"] = (old_scale * factor).float()
    tensors[f"{module}.input_offset"] = torch.tensor([offset])
    tensors[f"{module}.deq_scale"] = (tensors[f"{module}.deq_scale"].double() * factor).float()
    tensors[f"{module}.quant_bias"] = (bias / factor - offset * weight.sum(dim=1)).round().to(torch.int32)


def computed(tensors: dict[str, Tensor], module: str, x: Tensor) -> Tensor:
    """One module by the formula of the format, by itself."""
    part = {suffix: tensors[f"{module}.{suffix}"] for suffix in ("weight", "input_scale", "input_offset", "deq_scale")}
    codes = (x / part["input_scale"] + part["input_offset"]).round().clamp(-128, 127).double()
    sums = codes @ part["weight"].double().t() + tensors[f"{module}.quant_bias"].double()
    return (sums * part["deq_scale"].double()).float()


@pytest.mark.parametrize("members", ["k", "q", "kv"])
def test_an_input_scale_of_its_own(
    members: str, checkpoint: Callable[[str], Path], load_model: Callable[..., Any]
) -> None:
    """Each member is multiplied with activations quantised by its own scale; vLLM's own formats keep one of them."""
    folder, path = checkpoint(W8A8), "model.layers.1.self_attn"
    tensors = load_file(folder / WEIGHTS)
    for number, member in enumerate(members):
        own_input_scale(tensors, f"{path}.{member}_proj", 1.5 + number, -7.0)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(1))
    with load_model(folder) as model:
        layer = model.get_submodule(f"{path}.qkv_proj")
        actual, _ = layer(x)
    expected = torch.cat([computed(tensors, f"{path}.{member}_proj", x) for member in "qkv"], dim=1)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


# --- whole engines ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Hugging Face cache that holds the model org/name, offline: every file is a link to a blob."""
    import huggingface_hub

    cache, commit = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--org--name"
    snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted((DATA / "checkpoints" / W8A8).iterdir())):
        shutil.copyfile(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))  # what HF_HOME sets before the import
    return snapshot


def test_a_name_in_the_hugging_face_cache(
    hub_cache: Path, start_engine: Callable[..., Any], ask: Callable[..., Any], reference: Any
) -> None:
    """LLM("org/name"), offline and without an argument; also by its revision."""
    with start_engine("org/name", revision=hub_cache.name) as llm:
        results = ask(llm, reference.prompts)
    verdict = reference.judge(W8A8, results, "float32")
    assert verdict["ok"], verdict["why"]


def test_made_up_weights_and_then_real_ones(
    start_engine: Callable[..., Any], ask: Callable[..., Any], reference: Any
) -> None:
    """load_format="dummy" checks nothing and raises nothing; weights that come later are checked, and complete."""
    folder, prompts = DATA / "checkpoints" / DYNAMIC, reference.prompts[:3]
    tensors = load_file(folder / WEIGHTS)

    def reload(**leave_out: str) -> None:
        sent = {name: tensor for name, tensor in tensors.items() if name not in leave_out.values()}
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(sent.items())})

    with start_engine(folder) as llm:
        fresh = ask(llm, prompts)
    with start_engine(folder, load_format="dummy") as llm:
        assert len(ask(llm, prompts)) == len(prompts)
        with pytest.raises(LoadError, match=r"the reload left out 1 .*model\.norm\.weight"):
            reload(norm="model.norm.weight")
        reload()
        assert ask(llm, prompts) == fresh


@pytest.mark.parametrize("key", [W8A8, DYNAMIC, "msmodelslim/qwen3/W8A16_GROUP64", "msmodelslim/qwen3/W8A8_FP16"])
def test_made_up_weights_of_every_kind(key: str, load_model: Callable[..., Any]) -> None:
    """Also for a folder whose values could not be served: they are not read."""
    folder = DATA / "checkpoints" / key
    found = parameters(load_model, folder, load_format="dummy")
    assert found.keys() == parameters(load_model, folder).keys()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.values() if tensor.is_floating_point())
