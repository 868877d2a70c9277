"""Folders that must not be served: refused before or while they are loaded, by an error that says what is wrong.

Never by KeyError, AssertionError or a shape mismatch from inside torch, and never by writing to the folder. What the
format alone decides is tested there in every variant; here one of each shows that it reaches vLLM's user as it is.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
from versions import lacking

from quant_core import AscendLinearScheme, LoadError, QuantError, RegistrationError, register_scheme
from quant_modelslim.writer import write_checkpoint

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")

W8A8, FP16 = "msmodelslim/qwen3/W8A8", "msmodelslim/qwen3/W8A8_FP16"
DYNAMIC = "msmodelslim/qwen2/W8A8_DYNAMIC"
SHARDED = "msmodelslim/qwen3/W8A8_DYNAMIC_SHARDED"
LAYER = "model.layers.1"

Change = Callable[[Path], object]


# --- making folders worse ---------------------------------------------------------------------------------------------


def in_tensors(change: Callable[[dict[str, Tensor]], object]) -> Change:
    """Change the tensors of the one weights file."""

    def run(folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return run


def put(name: str, value: Tensor | float) -> Change:
    """Set a tensor, or the first value of one."""

    def change(tensors: dict[str, Tensor]) -> None:
        if isinstance(value, Tensor):
            tensors[name] = value
        else:
            tensors[name].view(-1)[0] = value

    return in_tensors(change)


def drop(*names: str) -> Change:
    """Remove tensors, but not their keys."""
    return in_tensors(lambda tensors: [tensors.pop(name) for name in names])


def in_description(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the object of the description file."""
    return in_json("quant_model_description.json", change)


def in_config(**values: Any) -> Change:
    """Set keys of config.json."""
    return in_json("config.json", lambda content: content.update(values))


def in_json(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    def run(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return run


def retype(module: str, quant_type: str) -> Change:
    """Describe all tensors of a module as of another type."""
    return in_description(lambda d: d.update({k: quant_type for k in d if k.startswith(f"{module}.")}))


# --- being refused ---------------------------------------------------------------------------------------------------


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything in a folder, and of the folder itself."""
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in [folder, *folder.rglob("*")]}


@pytest.fixture(scope="session")
def load(load_model: Callable[..., Any]) -> Callable[..., None]:
    """Load a model and let it go."""

    def run(folder: Path, **options: Any) -> None:
        with load_model(folder, **options):
            pass

    return run


def refused(start: Callable[..., object], folder: Path, *said: str, **options: Any) -> None:
    """The folder is refused by an error of ours, which has each text in it, and left as it was."""
    before = state_of(folder)
    with pytest.raises(QuantError) as raised:
        start(folder, **options)
    for text in said:
        assert text in str(raised.value), str(raised.value)
    assert state_of(folder) == before


# --- what the front process sees --------------------------------------------------------------------------------------

DESCRIPTION, WEIGHTS = "quant_model_description.json", "quant_model_weights.safetensors"


def write(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def duplicate_key(folder: Path) -> None:
    text = (folder / DESCRIPTION).read_text()
    (folder / DESCRIPTION).write_text(text.replace("{", '{"model.norm.weight": "W8A8",', 1))


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000])


def index_outside(folder: Path) -> None:
    names = dict.fromkeys(load_file(folder / WEIGHTS), f"../{WEIGHTS}")
    (folder / "quant_model_weights.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def left_over(folder: Path) -> None:
    save_file({"model.norm.weight": torch.ones(128)}, folder / "zz_old.safetensors")


def undescribed(folder: Path) -> None:
    in_description(lambda d: [d.pop(k) for k in list(d) if k.startswith(f"{LAYER}.mlp.down_proj.")])(folder)


FRONT: dict[str, tuple[Change, list[str]]] = {
    "description absent": (lambda f: (f / DESCRIPTION).unlink(), [WEIGHTS, "but no quant_model_description*.json"]),
    "description no JSON": (write(DESCRIPTION, b"{"), [DESCRIPTION, "not valid JSON"]),
    "description no object": (write(DESCRIPTION, b"[]"), [DESCRIPTION, "list, expected an object"]),
    "description blank": (write(DESCRIPTION, b""), [DESCRIPTION, "is empty"]),
    "description empty": (write(DESCRIPTION, b"{}"), [DESCRIPTION, "describes no tensor"]),
    "description twice the same key": (duplicate_key, [DESCRIPTION, "more than once: model.norm.weight"]),
    "two descriptions": (
        write("quant_model_description_w8a8.json", b"{}"),
        ["contradict each other", DESCRIPTION, "quant_model_description_w8a8.json"],
    ),
    "type that nobody registered": (
        retype(f"{LAYER}.mlp.down_proj", "W8A8_DYNAMICS"),
        [f"{LAYER}.mlp.down_proj.weight", "'W8A8_DYNAMICS'", "nearest name is 'W8A8_DYN"],
    ),
    "layer without a key": (undescribed, [f"{LAYER}.mlp.down_proj.weight (int8 in", "the nearest keys are"]),
    "tensor absent": (drop(f"{LAYER}.mlp.up_proj.deq_scale"), [f"{LAYER}.mlp.up_proj.deq_scale", "no file holds it"]),
    "other shape": (
        put(f"{LAYER}.mlp.up_proj.deq_scale", torch.ones(5)),
        [f"{LAYER}.mlp.up_proj.deq_scale in {WEIGHTS} is float32 [5], expected float32 [384]"],
    ),
    "other dtype": (
        put(f"{LAYER}.mlp.up_proj.quant_bias", torch.ones(384)),
        [f"{LAYER}.mlp.up_proj.quant_bias in {WEIGHTS} is float32 [384], expected int32 [384]"],
    ),
    "codes described as FLOAT": (
        retype(f"{LAYER}.mlp.down_proj", "FLOAT"),
        [f"{LAYER}.mlp.down_proj.weight is described as FLOAT, but {WEIGHTS} holds int8"],
    ),
    "floats described as codes": (
        put(f"{LAYER}.mlp.down_proj.weight", torch.ones(128, 384)),
        [f"{LAYER}.mlp.down_proj.weight in {WEIGHTS} is float32 [128, 384], expected int8 [128, 384]"],
    ),
    "weights cut off": (cut, [f"{WEIGHTS} is not a readable safetensors file"]),
    "weights empty": (write(WEIGHTS, b""), [f"{WEIGHTS} is not a readable safetensors file", "an empty file"]),
    "weights a pointer": (write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), [WEIGHTS, "git lfs pull"]),
    "index outside": (index_outside, ["index.json names a file outside the folder"]),
    "left-over file": (left_over, ["two files hold the tensor model.norm.weight", "zz_old.safetensors"]),
    "config claims another": (
        in_config(quantization_config={"quant_method": "fp8"}),
        ["the method 'fp8' in config.json contradicts", "'ascend'", "remove quantization_config"],
    ),
    "config claims another by an old name": (
        in_config(compression_config={"quant_method": "compressed-tensors"}),
        ["recognised as 2 formats", "compression_config in config.json", "leave the description of one format"],
    ),
}


@pytest.mark.parametrize("case", FRONT)
def test_refused_in_the_front_process(
    case: str, checkpoint: Callable[[str], Path], configure: Callable[..., Any]
) -> None:
    """No --quantization is given, and no worker was started: the user reads the cause at once."""
    folder = checkpoint(W8A8)
    change, said = FRONT[case]
    change(folder)
    refused(configure, folder, *said)


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors", "no-such-method"])
def test_another_quantization_argument(
    method: str, checkpoint: Callable[[str], Path], configure: Callable[..., Any]
) -> None:
    folder = checkpoint(W8A8)
    refused(
        configure,
        folder,
        f"--quantization {method} contradicts the files: this is a modelslim checkpoint",
        "leave it out, or give --quantization ascend",
        quantization=method,
    )


def test_our_argument_for_a_float_model(configure: Callable[..., Any]) -> None:
    refused(
        configure,
        DATA / "models" / "qwen3",
        "--quantization ascend does not fit the files",
        "no ModelSlim checkpoint",
        "without --quantization",
        quantization="ascend",
    )


def test_our_argument_for_another_format(configure: Callable[..., Any]) -> None:
    folder = DATA / "checkpoints" / "llmcompressor" / "qwen3" / "W8A8_DYNAMIC"
    said = ["--quantization ascend contradicts", "a compressed-tensors checkpoint", "--quantization compressed-tensors"]
    refused(configure, folder, *said, quantization="ascend")


def test_a_scheme_registered_twice() -> None:
    """Both are named, with where they come from."""
    with pytest.raises(RegistrationError, match=r"'W8A8' on linear(?s:.)*w8a8\.AscendW8A8LinearMethod and .*Second"):

        @register_scheme("W8A8", "linear")
        class Second(AscendLinearScheme):
            pass


# --- what only the built model shows ----------------------------------------------------------------------------------


def members_disagree(folder: Path) -> None:
    """k stores the same tensors as its neighbours, as W8A16, whose offset may be zero."""
    retype(f"{LAYER}.self_attn.k_proj", "W8A16")(folder)
    in_description(lambda d: d.update({f"{LAYER}.self_attn.k_proj.bias": "FLOAT"}))(folder)


def forms_disagree(folder: Path) -> None:
    name = f"{LAYER}.self_attn.k_proj.weight_scale"
    in_tensors(lambda t: t.update({name: t[name].to(torch.bfloat16)}))(folder)


def deq_scale_bits(value: float) -> Tensor:
    """The float16 models' form: the bits of a float32 in an int64."""
    return torch.full((384,), value).view(torch.int32).to(torch.int64)


LAYERS4 = {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
LAYERS2 = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
Q, K, UP = f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.k_proj", f"{LAYER}.mlp.up_proj"

WORKER: dict[str, tuple[str, Change, list[str]]] = {
    "members of two types": (DYNAMIC, members_disagree, [f"{LAYER}.self_attn.qkv_proj", f"{K} is W8A16"]),
    "members of two forms": (
        DYNAMIC,
        forms_disagree,
        [f"{K}.weight_scale", "bfloat16 [64, 1], expected float32 [64, 1]"],
    ),
    "scale NaN": (W8A8, put(f"{UP}.deq_scale", math.nan), [f"where: {UP}.deq_scale\n", "1 of 384 values", "nan"]),
    "scale infinite": (DYNAMIC, put(f"{UP}.weight_scale", math.inf), [f"where: {UP}.weight_scale\n", "inf"]),
    "scale zero": (W8A8, put(f"{K}.input_scale", 0.0), [f"where: {K}.input_scale\n", "not finite and positive"]),
    "scale negative": (DYNAMIC, put(f"{K}.weight_scale", -1.0), [f"where: {K}.weight_scale\n", "example -1.0"]),
    "scale NaN in int64": (
        FP16,
        put(f"{UP}.deq_scale", deq_scale_bits(math.nan)),
        [f"{UP}.deq_scale\n", "384 of 384", "nan"],
    ),
    "scale zero in int64": (FP16, put(f"{UP}.deq_scale", deq_scale_bits(0.0)), [f"{UP}.deq_scale\n", "example 0.0"]),
    "scale negative in int64": (
        FP16,
        put(f"{UP}.deq_scale", deq_scale_bits(-2.0)),
        [f"{UP}.deq_scale\n", "example -2.0"],
    ),
    "zero point no code": (
        W8A8,
        put(f"{K}.input_offset", 0.5),
        [f"{K}.input_offset\n", "whole numbers from -128 to 127"],
    ),
    "offset of a symmetric type": (DYNAMIC, put(f"{K}.weight_offset", 1.0), [f"{K}.weight_offset\n", "zero"]),
    "norm NaN": (
        W8A8,
        put("model.norm.weight", math.nan),
        ["model.norm.weight holds values that are not finite: 1 of 128", "where: quant_model_weights", "nan at [0]"],
    ),
    "float weight infinite": (W8A8, put("lm_head.weight", math.inf), ["lm_head.weight holds", "found: inf at [0, 0]"]),
    "overflowed bias": (W8A8, put(f"{K}.quant_bias", -(2**31)), [f"{K}.quant_bias\n", "overflowed"]),
    "more layers": (
        W8A8,
        in_config(**LAYERS4),
        ["model.layers.3.", "asks for 4 layers, the highest layer number in the files is 2"],
    ),
    "fewer layers": (W8A8, in_config(**LAYERS2), ["could not load model.layers.2.", "asks for 2 layers"]),
    "no norm": (W8A8, drop("model.norm.weight"), ["not loaded: model.norm.weight"]),
    "no embedding": (W8A8, drop("model.embed_tokens.weight"), ["not loaded: model.embed_tokens.weight"]),
    "no head": (W8A8, drop("lm_head.weight"), ["not loaded: lm_head.weight"]),
    "no bias of k": (DYNAMIC, drop(f"{K}.bias"), [f"not loaded: {K}.bias"]),
    "bias of an embedding": (
        W8A8,
        put("model.embed_tokens.bias", torch.ones(512)),
        ["no place", "model.embed_tokens.bias", "m1, m2 and m4"],
    ),
    "bias of one member only": (
        DYNAMIC,
        put(f"{LAYER}.mlp.up_proj.bias", torch.ones(384)),
        [f"not loaded: {LAYER}.mlp.gate_proj.bias"],
    ),
    "tensor that nobody knows": (
        W8A8,
        put("model.norm.strange", torch.ones(128)),
        ["could not load model.norm.strange"],
    ),
    "smaller vocabulary": (W8A8, in_config(vocab_size=500), ["could not load", "[512, 128]", "vocab_size 500"]),
    "larger vocabulary": (W8A8, in_config(vocab_size=1024), ["could not load", "[512, 128]", "vocab_size 1024"]),
    "hidden size": (
        W8A8,
        in_config(hidden_size=256),
        ["q_proj.weight in", "int8 [128, 128], expected int8 [128, 256]", "config.json"],
    ),
    "heads": (
        W8A8,
        in_config(num_attention_heads=8),
        ["q_proj.weight in", "int8 [128, 128], expected int8 [256, 128]"],
    ),
    "key and value heads": (
        W8A8,
        in_config(num_key_value_heads=4),
        ["k_proj.weight in", "int8 [64, 128], expected int8 [128, 128]"],
    ),
    "intermediate size": (
        W8A8,
        in_config(intermediate_size=512),
        ["gate_proj.weight in", "int8 [384, 128], expected int8 [512, 128]"],
    ),
}


@pytest.mark.parametrize("case", WORKER)
def test_refused_while_loading(case: str, checkpoint: Callable[[str], Path], load: Callable[..., None]) -> None:
    """vLLM alone would serve most of these, or end with an empty AssertionError."""
    if case == "tensor that nobody knows" and (reason := lacking("strange tensors")):
        pytest.skip(reason)
    key, change, said = WORKER[case]
    folder = checkpoint(key)
    change(folder)
    refused(load, folder, *said)


@pytest.fixture(scope="session")
def half_float(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose attention is FLOAT and whose other layers are W8A8_DYNAMIC."""
    source, folder = DATA / "models" / "qwen2", tmp_path_factory.mktemp("half-float")

    def choose(module: str, _: Tensor) -> str:
        return "W8A8_DYNAMIC" if ".mlp." in module else "FLOAT"

    write_checkpoint(folder, load_file(source / "model.safetensors"), choose, files_from=source)
    return folder


@pytest.fixture
def half_float_copy(half_float: Path, tmp_path: Path) -> Path:
    """A copy to be broken."""
    return Path(shutil.copytree(half_float, tmp_path / "half-float", copy_function=shutil.copyfile))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_attention_heads": 8}, f"{K}.weight in {WEIGHTS} is [64, 128], the model takes [32, 128]"),
        ({"num_key_value_heads": 1}, f"{K}.bias in {WEIGHTS} is [64], the model takes [32]"),
        ({"num_key_value_heads": 4}, "could not load model.layers.0.self_attn.k_proj."),
        ({"num_key_value_heads": 3}, "could not build the model that config.json describes: AssertionError: num_heads"),
        ({"num_attention_heads": 0}, "could not build the model that config.json describes: ZeroDivisionError"),
    ],
    ids=str,
)
def test_heads_that_contradict_float_weights(
    config: dict[str, int], said: str, half_float_copy: Path, load: Callable[..., None]
) -> None:
    """vLLM takes the first rows of a larger float weight without a word."""
    in_config(**config)(half_float_copy)
    refused(load, half_float_copy, said)


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("name", ["o_proj.weight", "k_proj.weight", "v_proj.bias"])
def test_a_float_layer_that_is_not_all_there(
    name: str, described: bool, half_float_copy: Path, load: Callable[..., None]
) -> None:
    """vLLM keeps no record of parts of a fused layer: it would serve whatever the memory held."""
    name = f"{LAYER}.self_attn.{name}"
    drop(name)(half_float_copy)
    if not described:
        in_description(lambda d: d.pop(name))(half_float_copy)
    advice = "check that config.json" if "o_proj" in name else "the other members of these layers are there"
    refused(load, half_float_copy, f"not loaded: {name}\n", f"found: no tensor {name} in {WEIGHTS}\n", advice)


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("member", ["gate_proj", "up_proj"])
def test_a_float_member_of_which_there_is_nothing(
    member: str, described: bool, tmp_path: Path, load: Callable[..., None]
) -> None:
    """The model's mapper renames both members to the fused layer, so one of them is all that it knows of the files."""
    source, name = DATA / "models" / "qwen2", f"{LAYER}.mlp.{member}.weight"
    tensors = load_file(source / "model.safetensors")
    write_checkpoint(tmp_path, tensors, lambda m, _: "FLOAT" if ".mlp." in m else "W8A8_DYNAMIC", files_from=source)
    drop(name)(tmp_path)
    if not described:
        in_description(lambda d: d.pop(name))(tmp_path)
    refused(
        load, tmp_path, f"not loaded: {name}\n", f"found: no tensor {name} in {WEIGHTS}\n", "other members of these"
    )


def test_nothing_else_is_wrong_with_the_float_layers(half_float: Path, load: Callable[..., None]) -> None:
    """The folder of the tests above is served as it is."""
    load(half_float)


@pytest.mark.parametrize("name", [f"{K}.weight", f"{K}.weight_scale", f"{LAYER}.mlp.down_proj.weight", f"{K}.bias"])
def test_a_stored_parameter_that_never_arrives(
    name: str, monkeypatch: pytest.MonkeyPatch, load: Callable[..., None]
) -> None:
    """The files hold it, the stream that vLLM makes of them does not: for a member of a fused layer, or a whole one."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    original = DefaultModelLoader.get_all_weights

    def get_all_weights(*args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        return (pair for pair in original(*args, **kwargs) if pair[0] != name)

    monkeypatch.setattr(DefaultModelLoader, "get_all_weights", get_all_weights)
    said = ["the files hold all of them", "vLLM's loader of this model"] if name.endswith("bias") else []
    refused(load, DATA / "checkpoints" / DYNAMIC, f"loaded: {name}", *said)


# --- reload -----------------------------------------------------------------------------------------------------------


def reload_path(llm: Any, folder: Path) -> None:
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})


def reload_stream(llm: Any, tensors: dict[str, Tensor]) -> None:
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors.items())})


def changed(folder: Path, target: Path) -> Path:
    """Other weights of the same form."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())

    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("weight_scale", "bias", "norm.weight", "embed_tokens.weight")):
                tensors[name] = tensor * 1.25
            elif tensor.dtype == torch.int8:
                tensors[name] = tensor.flip(0).contiguous()

    in_tensors(change)(target)
    return target


STREAM_WITHOUT = {
    "a member's weight": [f"{K}.weight"],
    "a member's scale": [f"{UP}.weight_scale"],
    "a member's bias": [f"{K}.bias"],
    "a layer": [f"{LAYER}.mlp.down_proj.{s}" for s in ("weight", "weight_scale", "weight_offset")],
    "a norm": ["model.norm.weight"],
    "an embedding": ["model.embed_tokens.weight"],
}

RELOAD_PATH: dict[str, tuple[str, Change, list[str]]] = {
    "norm absent": (DYNAMIC, drop("model.norm.weight"), ["left out 1", "model.norm.weight"]),
    "scale absent": (DYNAMIC, drop(f"{UP}.weight_scale"), [f"{UP}.weight_scale", "no file holds it"]),
    "scale NaN": (DYNAMIC, put(f"{UP}.weight_scale", math.nan), [f"where: {UP}.weight_scale\n", "nan"]),
    "bias of a norm": (DYNAMIC, put("model.norm.bias", torch.ones(128)), ["model.norm.bias is new"]),
    "stray tensor": (DYNAMIC, put("model.norm.strange", torch.ones(128)), ["could not load model.norm.strange"]),
    "left-over file": (DYNAMIC, left_over, ["two files hold the tensor model.norm.weight"]),
    "weights cut off": (DYNAMIC, cut, [f"{WEIGHTS} is not a readable safetensors file"]),
    "another dtype": (
        DYNAMIC,
        in_tensors(lambda t: [t.update({n: t[n].half()}) for n in t if n.endswith("_scale")]),
        ["weight_scale", "float16", "expected: torch.float32"],
    ),
    "other types": (FP16, lambda _: None, [f"{LAYER}.mlp.down_proj was W8A8_DYNAMIC and is W8A8"]),
}


def test_reloads_that_are_refused(
    tmp_path: Path,
    checkpoint: Callable[[str], Path],
    start_engine: Callable[..., Any],
    ask: Callable[..., Any],
    reference: Any,
) -> None:
    """By stream and by path; after each, a complete reload gives the numbers of a fresh start."""
    first = DATA / "checkpoints" / DYNAMIC
    other = changed(first, tmp_path / "other")
    tensors, prompts = load_file(first / WEIGHTS), reference.prompts[:3]
    with start_engine(other) as llm:
        fresh_other = ask(llm, prompts)
    with start_engine(first) as llm:
        fresh = ask(llm, prompts)
        assert fresh != fresh_other
        for names in STREAM_WITHOUT.values():
            with pytest.raises(LoadError, match="the reload left out") as raised:
                reload_stream(llm, {name: tensor for name, tensor in tensors.items() if name not in names})
            assert all(name in str(raised.value) for name in names)
            reload_stream(llm, tensors)
            assert ask(llm, prompts) == fresh
        for number, (case, (key, change, said)) in enumerate(RELOAD_PATH.items()):
            if case == "stray tensor" and lacking("strange tensors"):
                continue
            bad = checkpoint(key).rename(tmp_path / str(number))
            change(bad)
            refused(lambda folder: reload_path(llm, folder), bad, *said)
        with pytest.raises(LoadError, match="neither a folder nor in this machine's Hugging Face cache"):
            reload_path(llm, tmp_path / "nowhere")
        reload_path(llm, other)
        assert ask(llm, prompts) == fresh_other
        reload_path(llm, first)
        assert ask(llm, prompts) == fresh


# --- several processes ------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, traceback
from vllm import LLM

if __name__ == "__main__":
    for folder in sys.argv[1:]:
        print("starting", folder, flush=True)
        try:
            LLM(folder, enforce_eager=True, max_model_len=512, dtype="float32")
        except Exception:
            traceback.print_exc()
"""


def test_the_cause_is_readable_in_the_default_mode(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    """Engine and worker are processes of their own: what a worker raises must be readable in what is printed."""
    in_front, in_worker = checkpoint(W8A8).rename(tmp_path / "front"), checkpoint(W8A8).rename(tmp_path / "worker")
    drop(f"{UP}.deq_scale")(in_front)
    put(f"{UP}.deq_scale", math.nan)(in_worker)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment["OMP_NUM_THREADS"] = "1"  # several processes, none with much to compute
    result = subprocess.run(
        [sys.executable, script, in_front, in_worker], check=False, capture_output=True, text=True, env=environment
    )
    printed = result.stdout + result.stderr
    assert result.returncode == 0, printed
    assert f"{UP}.deq_scale is described as W8A8, but no file holds it" in printed
    assert "Engine core initialization failed" in printed
    assert f"{LAYER}.mlp.gate_up_proj: deq_scale cannot be used" in printed
    assert "1 of 384 values are not finite and positive, for example nan" in printed
