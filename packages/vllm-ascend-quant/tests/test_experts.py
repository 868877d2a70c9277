"""Real checkpoints with quantised experts, served by real vLLM, judged by the reference's rule."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
import architectures
import ranks
from survey_kinds import DEEPSEEK_V3, MLA, NATIVE
from versions import lacking

from quant_core import LayerResolutionError, LoadError, QuantError, get_scheme_class
from quant_modelslim.writer import write_checkpoint
from vllm_ascend_quant.methods.experts import AscendFusedMoEMethod
from vllm_ascend_quant.served_model import served_model

DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or Path(__file__).parents[3] / "testdata")
#: What vLLM needs for these models: DeepSeek's config.json, as transformers 5 writes it, lacks two keys that every
#: published one has, and the rotary operator of vLLM's CPU build is wrong for it.
SETTINGS: dict[str, dict[str, Any]] = {"deepseek-v3": DEEPSEEK_V3, "qwen3-moe": {}}
MSMODELSLIM = DATA / "checkpoints" / "msmodelslim"


def described(folder: Path) -> dict[str, str]:
    """The weights of a folder's description, and their types."""
    (file,) = folder.glob("quant_model_description*.json")
    content = json.loads(file.read_text())
    return {key: value for key, value in content.items() if key.endswith(".weight")}


def expert_checkpoints() -> list[str]:
    """Keys of the folders whose layers are all served."""
    found = []
    for folder in sorted(p for model in ("deepseek-v3", "qwen3-moe") for p in (MSMODELSLIM / model).glob("*")):
        types = {(t, "moe" if ".experts." in key else "linear") for key, t in described(folder).items() if t != "FLOAT"}
        if all(get_scheme_class(*kind) for kind in types):
            found.append(str(folder.relative_to(DATA / "checkpoints")))
    return found


def test_there_is_something_to_serve() -> None:
    """A wrong data folder must not pass as an empty list of cases."""
    expected = set(SETTINGS) if "ASCEND_QUANT_TEST_DATA" in os.environ else {"qwen3-moe"}
    assert {key.split("/")[1] for key in expert_checkpoints()} == expected


@pytest.fixture
def any_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of DeepSeek are looked at beside ordinary attention, where there is no latent one."""
    if lacking("latent attention"):
        monkeypatch.setenv("VLLM_MLA_DISABLE", "1")


@pytest.mark.usefixtures("any_attention")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("key", expert_checkpoints())
def test_equal_to_the_reference(
    key: str, dtype: str, start_engine: Callable[..., Any], ask: Callable[..., Any], reference: Any
) -> None:
    """No argument tells vLLM how the folder is quantised; the numbers are those of the reference."""
    with start_engine(DATA / "checkpoints" / key, dtype=dtype, **SETTINGS[key.split("/")[1]]) as llm:
        results = ask(llm, reference.prompts)
    verdict = reference.judge(key, results, dtype)
    assert verdict["ok"], verdict["why"]


def test_by_vllms_transformers_backend(
    start_engine: Callable[..., Any], ask: Callable[..., Any], reference: Any
) -> None:
    """Whose layers of experts load themselves."""
    key = "msmodelslim/qwen3-moe/W8A8_DYNAMIC"
    with start_engine(DATA / "checkpoints" / key, model_impl="transformers") as llm:
        verdict = reference.judge(key, ask(llm, reference.prompts), "float32")
    assert verdict["ok"], verdict["why"]


EXACT_TP = {"additional_config": {"ascend_quant": {"exact_tp": True}}}
EXPERT_PARALLEL = {"tensor_parallel_size": 2, "enable_expert_parallel": True, **EXACT_TP}


@pytest.mark.xdist_group("engines of several processes")
@pytest.mark.usefixtures("any_attention")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"tensor_parallel_size": 2, **EXACT_TP}, marks=pytest.mark.extended),
        pytest.param(EXPERT_PARALLEL, marks=pytest.mark.extended),
        {**EXPERT_PARALLEL, "expert_placement_strategy": "round_robin"},
    ],
    ids=["tensor parallel", "expert parallel", "expert parallel in turns"],
)
@pytest.mark.parametrize("key", [key for key in expert_checkpoints() if key.endswith("/W8A8_DYNAMIC")])
def test_two_ranks_answer_like_one(key: str, options: dict[str, Any], reference: Any) -> None:
    """With exact TP, since attention is cut in any case: the reference knows no ranks."""
    answers = ranks.Engine(DATA / "checkpoints" / key, reference.prompts, **options).answers()
    verdict = reference.judge(key, answers, "float32")
    assert verdict["ok"], verdict["why"]


def with_experts(count: int, target: Path) -> Path:
    """A real checkpoint of which only the first experts are left."""
    shutil.copytree(MSMODELSLIM / "qwen3-moe/W8A8_DYNAMIC", target, copy_function=shutil.copyfile)
    (file,) = target.glob("quant_model_description*.json")
    (weights,) = target.glob("*.safetensors")

    def kept(name: str) -> bool:
        number = name.partition(".experts.")[2].partition(".")[0]
        return not number or int(number) < count

    tensors = {name: tensor for name, tensor in load_file(weights).items() if kept(name)}
    for name, tensor in tensors.items():
        if name.endswith(".mlp.gate.weight"):
            tensors[name] = tensor[:count].contiguous()
    save_file(tensors, weights, metadata={"format": "pt"})
    file.write_text(json.dumps({name: said for name, said in json.loads(file.read_text()).items() if kept(name)}))
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "num_local_experts": count}))
    return target


@pytest.mark.xdist_group("engines of several processes")
def test_experts_that_do_not_divide(
    tmp_path: Path, start_engine: Callable[..., Any], ask: Callable[..., Any], reference: Any
) -> None:
    """Seven on two ranks."""
    folder, prompts = with_experts(7, tmp_path / "seven"), reference.prompts[:4]
    found = ranks.Engine(folder, prompts, **EXPERT_PARALLEL).answers()
    with start_engine(folder) as llm:
        expected = ask(llm, prompts)
    error = [
        abs(a - b)
        for one, other in zip(found, expected, strict=True)
        for a, b in zip(one["prompt_logprobs"], other["prompt_logprobs"], strict=True)
    ]
    assert sorted(error)[len(error) // 2] < 1e-5
    assert [one["generated"] for one in found] == [one["generated"] for one in expected]


def changed_copy(folder: Path, target: Path) -> Path:
    """The same checkpoint with other weights: all codes in another order of rows, all scales halved."""
    shutil.copytree(folder, target, copy_function=shutil.copyfile)
    (weights,) = target.glob("*.safetensors")
    tensors = load_file(weights)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8:
            tensors[name] = tensor.flip(0).contiguous()
        elif name.endswith(".weight_scale"):
            tensors[name] = tensor / 2
    save_file(tensors, weights, metadata={"format": "pt"})
    return target


def test_reload_in_place(
    tmp_path: Path, start_engine: Callable[..., Any], ask: Callable[..., Any], reference: Any
) -> None:
    """First weights, others, the first again: each time what a fresh engine answers; what is left out is named."""
    first, prompts = MSMODELSLIM / "qwen3-moe/W8A8_DYNAMIC", reference.prompts[:3]
    other, answers = changed_copy(first, tmp_path / "other"), {}
    for folder in (other, first):
        with start_engine(folder) as llm:
            answers[folder] = ask(llm, prompts)
            if folder == first:
                for reloaded in (other, first):
                    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(reloaded)})
                    assert ask(llm, prompts) == answers[reloaded]
                left_out = "model.layers.1.mlp.experts.5.up_proj.weight_scale"
                (weights,) = first.glob("*.safetensors")
                stream = [(name, tensor) for name, tensor in load_file(weights).items() if name != left_out]
                with pytest.raises(Exception, match=re.escape(left_out)):
                    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(stream)})
    assert answers[other] != answers[first]


def test_compiled(start_engine: Callable[..., Any], ask: Callable[..., Any], reference: Any) -> None:
    key = "msmodelslim/qwen3-moe/W8A8_DYNAMIC"
    with start_engine(DATA / "checkpoints" / key, enforce_eager=False) as llm:
        verdict = reference.judge(key, ask(llm, reference.prompts), "float32")
    assert verdict["ok"], verdict["why"]


def test_layers_report_their_types(load_model: Callable[..., Any]) -> None:
    with load_model(MSMODELSLIM / "qwen3-moe/W8A8_DYNAMIC") as model:
        layers = served_model(model).layers  # type: ignore[union-attr]
        experts = {path: quant for path, quant in layers.items() if path.endswith("experts")}
        methods = [model.get_submodule(path).quant_method for path in experts]
    assert {quant.quant_type for quant in experts.values()} == {"W8A8_DYNAMIC"}
    assert len(experts) == 3
    assert all(isinstance(method, AscendFusedMoEMethod) for method in methods)


def test_values_that_cannot_be_used(tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """One scale of one expert."""
    folder = changed_copy(MSMODELSLIM / "qwen3-moe/W8A8_DYNAMIC", tmp_path / "nan")
    (weights,) = folder.glob("*.safetensors")
    tensors, wrong = load_file(weights), "model.layers.2.mlp.experts.6.gate_proj.weight_scale"
    tensors[wrong][3] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(LoadError, match=re.escape(wrong)) as raised, load_model(folder):
        pass
    assert "1 of 64 values are not finite and positive" in str(raised.value)


def test_projections_that_nobody_knows(tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """Under other names than the model's; of float ones vLLM would say it, or drop them."""
    folder = changed_copy(MSMODELSLIM / "qwen3-moe/W8A8_DYNAMIC", tmp_path / "strange")
    (file,) = folder.glob("quant_model_description*.json")
    (weights,) = folder.glob("*.safetensors")

    def strange(name: str) -> str:
        for old, new in (("gate_proj", "wi_0"), ("up_proj", "wi_1"), ("down_proj", "wo")):
            name = name.replace(f".{old}.", f".{new}.") if ".experts." in name else name
        return name

    save_file({strange(n): t for n, t in load_file(weights).items()}, weights, metadata={"format": "pt"})
    file.write_text(json.dumps({strange(name): said for name, said in json.loads(file.read_text()).items()}))
    with pytest.raises(LayerResolutionError, match="none is a projection of one") as raised, load_model(folder):
        pass
    assert "model.layers.0.mlp.experts.0.wi_0" in str(raised.value)


def test_a_bias_of_an_expert_is_not_dropped(tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """As anti-outlier recipes add it."""
    folder = changed_copy(MSMODELSLIM / "qwen3-moe/W8A8_DYNAMIC", tmp_path / "bias")
    (weights,) = folder.glob("*.safetensors")
    bias = "model.layers.1.mlp.experts.2.up_proj.bias"
    save_file({**load_file(weights), bias: torch.ones(64)}, weights, metadata={"format": "pt"})
    with pytest.raises(QuantError, match=re.escape(bias)), load_model(folder):
        pass


def test_more_experts_than_the_model_has(tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """All layers alike, so that only config.json tells."""
    folder = with_experts(8, tmp_path / "surplus")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_local_experts": 6}))
    with pytest.raises(LayerResolutionError) as raised, load_model(folder):
        pass
    assert "6 have no place: model.layers.0.mlp.experts.6.down_proj" in str(raised.value)
    assert "expected: 18 of 6 experts" in str(raised.value)


def drafting_deepseek(folder: Path) -> Path:
    """A DeepSeek-V3 of a dense layer and one with experts, and a third that drafts, whose experts are W8A16."""
    config = {**MLA, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1}
    model = architectures.build(architectures.Architecture("deepseek_v3", "DeepseekV3ForCausalLM", config))
    model.save_pretrained(folder / "float")
    (file,) = (folder / "float").glob("*.safetensors")
    tensors, drafting = load_file(file), "model.layers.2"
    for name in [name for name in tensors if name.startswith("model.layers.1.")]:
        tensors[name.replace("model.layers.1", drafting)] = tensors[name].clone()
    hidden = tensors["model.norm.weight"].shape[0]
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{drafting}.{name}.weight"] = torch.ones(hidden)
    tensors[f"{drafting}.eh_proj.weight"] = torch.randn(hidden, 2 * hidden) / hidden
    tensors[f"{drafting}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{drafting}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    for config_file in (folder / "float").glob("config.json"):
        published = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
        config_file.write_text(json.dumps({**json.loads(config_file.read_text()), **published}))
    write_checkpoint(
        folder / "quant",
        tensors,
        lambda module, _: "W8A16" if ".experts." in module else "FLOAT",
        files_from=folder / "float",
    )
    return folder / "quant"


@pytest.mark.skipif(bool(lacking("latent attention")), reason=lacking("latent attention"))
def test_a_layer_that_drafts(tmp_path: Path, start_engine: Callable[..., Any], ask: Callable[..., Any]) -> None:
    """vLLM renames it in the code of its loader, which is asked."""
    folder = drafting_deepseek(tmp_path)
    prompts = [[1, *range(20, 44)], [1, *range(300, 320), 499]]
    settings = {"max_model_len": 128, "max_num_seqs": 4, "skip_tokenizer_init": True, **NATIVE}
    with start_engine(folder, **settings) as llm:
        expected = ask(llm, prompts)
    speculative = {"method": "mtp", "num_speculative_tokens": 1}
    with start_engine(folder, speculative_config=speculative, **settings) as llm:
        found = ask(llm, prompts)
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        draft = served_model(runner.drafter.model)
    assert draft is not None
    experts = {path: quant for path, quant in draft.layers.items() if path.endswith("experts")}
    assert [quant.quant_type for quant in experts.values()] == ["W8A16"]
    assert [one["generated"] for one in found] == [one["generated"] for one in expected]
