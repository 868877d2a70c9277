"""Speculative drafts beside targets in real vLLM: each of the two is quantised as its own folder says.

A float target with a quantised draft, a quantised one with a float draft, and both quantised: with a draft model, with
EAGLE, EAGLE-3 and MTP, all of which vLLM's CPU build runs. Greedy answers are the target's own, whatever is proposed.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quant_core import CheckpointError, LimitError, QuantError
from vllm_ascend_quant import AscendLinearMethod
from vllm_ascend_quant.served_model import served_model

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
from arithmetic import weights_of, wrong_weights
from draft_models import eagle, eagle3, mtp, quantised

DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or Path(__file__).parents[3] / "testdata")
CHECKPOINTS = DATA / "checkpoints" / "msmodelslim" / "qwen3"
FLOAT, W8A8 = DATA / "models" / "qwen3", CHECKPOINTS / "W8A8"

MAKERS = {"eagle": eagle, "eagle3": eagle3}

PROMPTS = [[5, 6, 7, 8, 9, 10], [40, 41, 42], [300, 17]]


@dataclass
class Pair:
    """A target, the speculative config of its draft, and the float weights that the draft was made from."""

    target: Path
    speculative: dict[str, Any]
    exact: dict[str, torch.Tensor]


def drafted(method: str, folder: Path, target: bool, draft: bool) -> Pair:
    """A target and a draft in a folder, each quantised or not."""
    torch.manual_seed(0)
    if method == "mtp":
        made = mtp(folder / "float", FLOAT)
        if target or draft:
            made = quantised(made, folder / "quant", lambda m: draft if m.startswith("model.mtp_layers.") else target)
        settings: dict[str, Any] = {"method": "mtp", "num_speculative_tokens": 1}
        return Pair(made, settings, load_file(folder / "float" / "model.safetensors"))
    made = MAKERS[method](folder / "float", FLOAT)
    model = quantised(made, folder / "quant") if draft else made
    settings = {"method": method, "model": str(model), "num_speculative_tokens": 2}
    return Pair(W8A8 if target else FLOAT, settings, load_file(made / "model.safetensors"))


@pytest.fixture(scope="module")
def alone(start_engine: Callable[..., Any], ask: Callable[..., Any]) -> Iterator[Callable[[Path], Any]]:
    """What a target answers without a draft."""
    known: dict[Path, Any] = {}

    def answers(target: Path) -> Any:
        if target not in known:
            with start_engine(target) as llm:
                known[target] = ask(llm, PROMPTS)
        return known[target]

    return answers


def both_models(llm: Any) -> tuple[nn.Module, nn.Module]:
    """Target and draft of an engine in this process."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    return runner.get_model(), runner.drafter.model


def served_quantised(model: nn.Module) -> dict[str, AscendLinearMethod]:
    """The methods of the layers that are served by our schemes."""
    methods = {path: getattr(module, "quant_method", None) for path, module in model.named_modules()}
    return {path: method for path, method in methods.items() if isinstance(method, AscendLinearMethod)}


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    """The same tokens, with the same numbers but for the order of sums: a target sees several tokens at a time."""
    tokens = [[answer["generated"] for answer in answers] for answers in (found, expected)]
    numbers = [
        torch.tensor([x for answer in answers for x in (*answer["prompt_logprobs"], *answer["generated_logprobs"])])
        for answers in (found, expected)
    ]
    return tokens[0] == tokens[1] and torch.allclose(*numbers, rtol=0, atol=2e-3)


@pytest.mark.parametrize("target", [False, True], ids=["target=float", "target=W8A8"])
@pytest.mark.parametrize("draft", [False, True], ids=["draft=float", "draft=W8A8_DYNAMIC"])
@pytest.mark.parametrize("method", ["eagle", "eagle3", "mtp"])
def test_a_draft_that_sees_inside_its_target(
    method: str,
    target: bool,
    draft: bool,
    tmp_path: Path,
    alone: Callable[[Path], Any],
    start_engine: Callable[..., Any],
    ask: Callable[..., Any],
) -> None:
    """vLLM builds such a draft under its target's config, quantisation included."""
    pair = drafted(method, tmp_path, target, draft)
    expected = alone(pair.target)
    with start_engine(pair.target, speculative_config=pair.speculative) as llm:
        assert same(ask(llm, PROMPTS), expected)
        target_model, draft_model = both_models(llm)
        assert bool(served_quantised(target_model)) == target
        methods = served_quantised(draft_model)
        assert bool(methods) == draft
        if draft:
            served = served_model(draft_model)
            assert served is not None
            assert {path for path, quant in served.layers.items() if quant.quant_type} == set(methods)
            check_weights(draft_model, methods, pair.exact)
        llm.collective_rpc("reload_weights")
        assert same(ask(llm, PROMPTS), expected), "after a reload of the target"
        assert set(served_quantised(draft_model)) == set(methods)


def check_weights(model: nn.Module, methods: dict[str, AscendLinearMethod], exact: dict[str, torch.Tensor]) -> None:
    """Every quantised layer multiplies by the weights of its own modules, all of the drafting layer."""
    weights = {path: weight for path, weight in weights_of(model).items() if path in methods}
    wanted = {
        path: torch.cat([exact[f"{module}.weight"] for module in methods[path].quant.modules]) for path in weights
    }
    assert sum(len(methods[path].quant.modules) for path in weights) in (7, 8)  # one layer, and the fc of EAGLE
    assert wrong_weights(weights, wanted) == []


@pytest.mark.parametrize(
    ("target", "draft"),
    [(FLOAT, W8A8), (W8A8, FLOAT), (W8A8, CHECKPOINTS / "W8A16_GROUP64")],
    ids=["float with W8A8", "W8A8 with float", "W8A8 with W8A16"],
)
def test_a_draft_model(
    target: Path, draft: Path, alone: Callable[[Path], Any], start_engine: Callable[..., Any], ask: Callable[..., Any]
) -> None:
    """The same trained model in another form: most of what it proposes is right, if it is served rightly."""
    expected = alone(target)
    settings = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 2}
    with start_engine(target, speculative_config=settings, disable_log_stats=False) as llm:
        assert same(ask(llm, PROMPTS), expected)
        assert accepted(llm) > 0.7
        for folder, model in zip((target, draft), both_models(llm), strict=True):
            assert bool(served_quantised(model)) == (folder != FLOAT)
            assert (served_model(model) is None) == (folder == FLOAT)
        llm.collective_rpc("reload_weights")
        assert same(ask(llm, PROMPTS), expected), "after a reload of the target"


def accepted(llm: Any) -> float:
    """Which part of the proposed tokens the target would have answered too."""
    values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    proposed: float = values["vllm:spec_decode_num_draft_tokens"]
    return values["vllm:spec_decode_num_accepted_tokens"] / proposed


def rotate(folder: Path) -> None:
    """Let a checkpoint's description say that the tool rotated the weights, as it does."""
    description = folder / "quant_model_description.json"
    content = json.loads(description.read_text())
    content["optional"] = {"quarot": {"rotation_map": {"global_rotation": "optional/quarot.safetensors"}}}
    description.write_text(json.dumps(content))
    (folder / "optional").mkdir()
    save_file({"global_rotation": torch.eye(128)}, folder / "optional" / "quarot.safetensors")


@pytest.mark.parametrize("method", MAKERS)
def test_a_draft_for_hidden_states_that_are_rotated(
    method: str, tmp_path: Path, configure: Callable[..., Any], checkpoint: Callable[[str], Path]
) -> None:
    """It knows the float model's: refused by the name of the rotation, unless it is said to know these."""
    target = checkpoint("msmodelslim/qwen3/W8A8")
    settings = {"method": method, "model": str(MAKERS[method](tmp_path / "draft", FLOAT)), "num_speculative_tokens": 2}
    configure(target, speculative_config=settings)
    rotate(target)
    with pytest.raises(LimitError, match=r"hidden states .* rotated\n(.|\n)*optional\.quarot"):
        configure(target, speculative_config=settings)
    options = {"ascend_quant": {"rotated_draft": True}}
    assert configure(target, speculative_config=settings, additional_config=options).speculative_config is not None


def test_drafts_that_a_rotation_does_not_concern(
    tmp_path: Path, configure: Callable[..., Any], checkpoint: Callable[[str], Path]
) -> None:
    """A model of its own, layers that were rotated with their target, and what needs no model."""
    target = checkpoint("msmodelslim/qwen3/W8A8")
    rotate(target)
    draft_model = {"method": "draft_model", "model": str(FLOAT), "num_speculative_tokens": 2}
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    for settings in (draft_model, ngram):
        assert configure(target, speculative_config=settings).speculative_config is not None
    own = drafted("mtp", tmp_path, True, True)
    rotate(own.target)
    assert configure(own.target, speculative_config=own.speculative).speculative_config is not None


def test_a_draft_is_recognised_and_checked_in_the_front_process(
    configure: Callable[..., Any], checkpoint: Callable[[str], Path]
) -> None:
    """Where a user sees the error; no argument tells how the draft is quantised."""
    folder = checkpoint("msmodelslim/qwen3/W8A8")
    settings = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 2}
    found = configure(FLOAT, speculative_config=settings)
    assert found.quant_config is None
    assert found.speculative_config.draft_model_config.quantization == "ascend"

    with pytest.raises(CheckpointError, match='"quantization": "awq" in the speculative config'):
        configure(FLOAT, speculative_config={**settings, "quantization": "awq"})

    description = folder / "quant_model_description.json"
    content = json.loads(description.read_text())
    content["model.layers.0.mlp.down_proj.weight"] = "W8A8_DYNAMIC"
    description.write_text(json.dumps(content))
    with pytest.raises(QuantError, match=r"model\.layers\.0\.mlp\.down_proj"):
        configure(FLOAT, speculative_config=settings)
