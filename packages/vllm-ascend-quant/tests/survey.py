"""Every architecture that we can make a tiny model of: does a ModelSlim checkpoint of it load, and is it right?

    python packages/vllm-ascend-quant/tests/survey.py [names] [--out FOLDER] [--rows | --experts]

With --rows each layer's weight is compared with the float model's, as vLLM loads both, for three ways of storing what
belongs to a row. With --experts the routed experts are quantised, as weights only, and the answers compared with those
of a float model that has the dequantised weights.

Not collected by pytest: about 15 seconds each. Each runs in a fork of this process, which has imported everything.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

for name, value in {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}.items():
    os.environ.setdefault(name, value)

import architectures as tiny_models  # noqa: E402
import arithmetic  # noqa: E402
import storing  # noqa: E402
import survey_experts  # noqa: E402
from conftest import loaded  # noqa: E402
from survey_table import TABLE  # noqa: E402

ENGINE: dict[str, Any] = {
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "max_model_len": 128,
    "max_num_seqs": 4,
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
}

#: A value per row beside the weight; one more; two rows to a byte.
ROWS = ("W8A8 static", "W8A16 asymmetric", "W4A8_DYNAMIC")


def start(folder: Path, options: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(str(folder), **{**ENGINE, **options})


def stop() -> None:
    import gc

    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def judge(name: str, folder: Path) -> dict[str, Any]:
    """One architecture's result."""
    architecture = TABLE[name]
    result: dict[str, Any] = {"name": name}
    try:
        tiny = tiny_models.make(architecture, folder)
        prompts = arithmetic.prompts()
        result["described"] = len(tiny.expected)
        float_reference = arithmetic.reference_logprobs(tiny.model, prompts)
        arithmetic.quantise_reference(tiny)
        reference = arithmetic.reference_logprobs(tiny.model, prompts)
        result["sensitivity"] = arithmetic.differences(float_reference, reference)
    except Exception as error:
        return {**result, "no_model": why(error)}
    weights: dict[str, Any] = {}
    judge_engine(result, "", folder / "quant", architecture.engine, prompts, reference, tiny.expected, weights)
    if not right(result):
        # Is it vLLM's own doing? Then its float model fails or differs as well.
        judge_engine(result, "float_", folder / "float", architecture.engine, prompts, float_reference, set(), weights)
    return result


def judge_rows(name: str, folder: Path) -> dict[str, Any]:
    """One architecture's result by way of storing."""
    architecture = TABLE[name]
    options = {"max_model_len": 128, "skip_tokenizer_init": True, **architecture.engine}
    result: dict[str, Any] = {"name": name}
    made = {way: folder / str(number) for number, way in enumerate(ROWS)}
    try:
        for way, target in made.items():  # all before vLLM is started, which changes transformers' models
            storing.make(target, architecture, way)
        with loaded(made[ROWS[0]] / "float", **options) as model:
            exact = arithmetic.weights_of(model, with_bias=True)
    except BaseException as error:
        return {**result, "no_model": why(error)}
    for way, target in made.items():
        try:
            with loaded(target / "quant", **options) as model:
                wrong = arithmetic.wrong_weights(
                    arithmetic.weights_of(model, with_bias=True), exact, storing.WAYS[way][2]
                )
            result[way] = f"WRONG {wrong}" if wrong else "ok"
        except BaseException as error:
            result[way] = f"refused: {why(error)}"
    return result


def judge_experts(name: str, folder: Path) -> dict[str, Any]:
    """One architecture's result with quantised experts."""
    architecture = TABLE[name]
    result: dict[str, Any] = {"name": name}
    try:
        count = storing.make_experts(folder, architecture)
    except BaseException as error:
        return {**result, "no_model": why(error)}
    result["described"] = count
    if not count:
        return {**result, "no_model": "transformers saves no experts one by one"}
    answers: dict[str, Any] = {}
    for kind in ("float", "quant"):
        step = "load"
        try:
            llm = start(folder / kind, architecture.engine)
            step = "run"
            answers[kind] = arithmetic.vllm_logprobs(llm, arithmetic.prompts())
            if kind == "quant":
                result["quantised"] = len(arithmetic.expert_modules(llm))
            step = "reload"
            llm.collective_rpc("reload_weights")
            again = arithmetic.vllm_logprobs(llm, arithmetic.prompts())
            result["reload" if kind == "quant" else "float_reload"] = arithmetic.differences(answers[kind], again)
        except BaseException as error:
            result["error" if kind == "quant" else "float_error"] = f"{step}: {why(error)}"
        llm = None
        stop()
    if len(answers) == 2:
        result["gap"] = arithmetic.differences(answers["quant"], answers["float"])
    result["missed"] = count - result.get("quantised", 0)
    return result


def judge_engine(
    result: dict[str, Any],
    prefix: str,
    folder: Path,
    options: dict[str, Any],
    prompts: Any,
    reference: Any,
    expected: set[str],
    weights: dict[str, Any],
) -> None:
    """Start, look at the layers, compare answers, reload, compare again."""
    step = "load"
    try:
        llm = start(folder, options)
        step = "layers"
        if prefix:
            result["wrong_weights"] = arithmetic.wrong_weights(weights, arithmetic.layer_weights(llm))
        else:
            layers = arithmetic.inspect_layers(llm)
            result |= {"quantised": len(layers.quantised), "unquantised": layers.unquantised, "wrong": layers.wrong}
            result["missed"] = sorted(expected - set(layers.claimed))
            result["twice"] = sorted({m for m in layers.claimed if layers.claimed.count(m) > 1})
            weights |= arithmetic.layer_weights(llm)
        step = "run"
        answers = arithmetic.vllm_logprobs(llm, prompts)
        result[f"{prefix}gap"] = arithmetic.differences(answers, reference)
        step = "reload"
        llm.collective_rpc("reload_weights")
        result[f"{prefix}reload"] = arithmetic.differences(answers, arithmetic.vllm_logprobs(llm, prompts))
    except BaseException as error:
        result[f"{prefix}error"] = f"{step}: {why(error)}"
    llm = None
    stop()


def right(result: dict[str, Any]) -> bool:
    """Whether there is nothing to explain."""
    layers = not (result.get("missed") or result.get("wrong") or result.get("error"))
    return layers and result["gap"][0] < 2e-5 and result["reload"][1] < 1e-4


def verdict(result: dict[str, Any]) -> str:
    """One line: ok, or whose fault it is as far as can be told."""
    if any(way in result for way in ROWS):
        return "; ".join(f"{way} {str(result.get(way))[:300]!r}" for way in ROWS)
    if "no_model" in result:
        return f"no model   {result['no_model'][:200]!r}"
    steps = {result.get(key, "").partition(":")[0] for key in ("error", "float_error")}
    if steps == {"load"} or (steps == {"run"} and "gap" not in result and "float_gap" not in result):
        return f"vLLM fails {result['float_error'][:200]!r} | {result['error'][:200]!r}"
    figures = " ".join(
        f"{key} {result[key][0]:.0e}/{result[key][1]:.0e}"
        for key in ("gap", "sensitivity", "reload", "float_gap", "float_reload")
        if key in result
    )
    notes = "".join(
        f" {key}={str(result[key])[:400]}"
        for key in ("missed", "wrong", "wrong_weights", "twice", "error", "float_error")
        if result.get(key)
    )
    text = f"{result.get('quantised')}/{result['described']} {figures}{notes}"
    if right(result):
        return f"ok         {text}"
    layers = "wrong_weights" in result and not any(result.get(k) for k in ("missed", "wrong", "wrong_weights"))
    step, float_step = (result.get(key, "").partition(":")[0] for key in ("error", "float_error"))
    run = step == float_step and (
        "gap" not in result or result["gap"][0] < 2e-5 or result.get("float_gap", (1, 1))[0] > 5e-6
    )
    if layers and run:
        return f"ok so far  {text}"  # vLLM's float model differs, cannot run here, or does not survive a reload either
    return f"WRONG      {text}"


def why(error: BaseException) -> str:
    traceback.print_exception(error)
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{Path(f.filename).name}:{f.lineno}" for f in frames[-3:]]
    return f"{type(error).__name__}: {str(error)[:700]} @ {' '.join(places)}"


def fork(judge: Callable[[str, Path], dict[str, Any]], name: str, out: Path, limit: int) -> dict[str, Any]:
    """Judge in a child process; whatever it prints goes to a log."""
    result_file, folder = out / f"{name}.json", out / "work" / name
    result_file.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    child = os.fork()
    if child == 0:
        log = os.open(out / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        result = judge(name, folder)
        result_file.write_text(json.dumps(result, indent=1))
        sys.stdout.flush()
        os._exit(0)
    started = time.monotonic()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() - started > limit:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.2)
    shutil.rmtree(folder, ignore_errors=True)
    if not result_file.exists():
        result_file.write_text(json.dumps({"name": name, "step": "?", "error": "crashed or timed out, see the log"}))
    result: dict[str, Any] = json.loads(result_file.read_text())
    result["seconds"] = round(time.monotonic() - started, 1)
    result_file.write_text(json.dumps(result, indent=1))
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("/tmp/survey"))
    parser.add_argument("--limit", type=int, default=150)
    parser.add_argument("--skip-done", action="store_true")
    parser.add_argument("--rows", action="store_true")
    parser.add_argument("--experts", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    import transformers  # noqa: F401
    import vllm
    import vllm.model_executor.model_loader.reload  # noqa: F401
    from vllm.model_executor.models import registry
    from vllm.plugins import load_general_plugins

    import quant_modelslim.writer  # noqa: F401
    from quant_core import list_schemes

    load_general_plugins()
    list_schemes()  # imports them all
    registry._run_in_subprocess = lambda function: function()
    names = arguments.names or (survey_experts.EXPERTS if arguments.experts else TABLE)
    chosen = judge_rows if arguments.rows else judge_experts if arguments.experts else judge
    for name in names:
        if arguments.skip_done and (arguments.out / f"{name}.json").exists():
            before = json.loads((arguments.out / f"{name}.json").read_text())
            if verdict(before).startswith("ok"):
                continue
        result = fork(chosen, name, arguments.out, arguments.limit)
        print(f"{name:24} {result['seconds']:5.0f}s {verdict(result)[:1200]}", flush=True)


if __name__ == "__main__":
    main()
