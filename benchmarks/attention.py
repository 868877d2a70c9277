"""Attention to 8-bit pages beside vLLM's own on this processor: decode, prefill, and writing one token."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from measure import alternating, arguments, report
from torch import Tensor

import quant_core.ops  # noqa: F401 - defines the operators
from quant_core.ops.cpu import attend as cpu_attend
from quant_core.ops.cpu import native

HEADS, KV_HEADS, D, BLOCK = 32, 8, 128, 128
SCALE = D**-0.5
BASE = "vLLM bfloat16"
OURS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class Load(NamedTuple):
    """So many sequences of so many tokens, and the queries of each."""

    sequences: int
    tokens: int
    queries: int

    @property
    def name(self) -> str:
        what = "decode" if self.queries == 1 else "prefill"
        return f"{what} {self.sequences}x{self.tokens}"


LOADS = [
    *(Load(sequences, tokens, 1) for tokens in (512, 4096) for sequences in (1, 8, 32)),
    *(Load(1, tokens, tokens) for tokens in (512, 4096)),
]


class Batch:
    """What all candidates are given."""

    def __init__(self, load: Load) -> None:
        self.load = load
        per_sequence = -(-load.tokens // BLOCK)
        self.blocks = load.sequences * per_sequence
        self.table = torch.randperm(self.blocks).to(torch.int32).view(load.sequences, per_sequence)
        self.starts = torch.arange(0, load.sequences * load.queries + 1, load.queries, dtype=torch.int32)
        self.lengths = torch.full((load.sequences,), load.tokens, dtype=torch.int32)
        self.query = torch.randn(load.sequences * load.queries, HEADS, D).to(torch.bfloat16)
        self.key, self.value = (torch.randn(self.blocks * BLOCK, KV_HEADS, D).to(torch.bfloat16) for _ in range(2))
        self.slots = torch.arange(self.blocks * BLOCK)

    def pages(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values are halves of each page, as in vLLM."""
        both = torch.zeros(self.blocks, KV_HEADS, 2 * BLOCK, D, dtype=dtype)
        return both[:, :, :BLOCK], both[:, :, BLOCK:]


def ours(batch: Batch, dtype: torch.dtype, natively: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Attention and writing one token, as calls without arguments."""
    keys, values = batch.pages(dtype)
    scale = torch.full((KV_HEADS, D), 4 / (127 if dtype == torch.int8 else 448))
    out = torch.empty_like(batch.query)
    operators = torch.ops.quant_core
    operators.quantize_to_pages(batch.key, batch.value, keys, values, scale, None, scale, None, batch.slots)
    codes = cpu_attend.Codes(keys, scale, None), cpu_attend.Codes(values, scale, None)
    rules = cpu_attend.rules(SCALE, True, -1, 0.0, None, None)
    asked = (batch.table, batch.starts, batch.lengths)

    def attend() -> Tensor:
        if natively:
            pages = (keys, values, scale, None, scale, None)
            operators.attend_pages(batch.query, *pages, *asked, SCALE, True, -1, 0.0, None, None, out)
        else:
            cpu_attend.attend_in_torch(batch.query, *codes, *asked, rules, out)
        return out

    one = (batch.key[:1], batch.value[:1])
    return attend, lambda: operators.quantize_to_pages(*one, keys, values, scale, None, scale, None, batch.slots[:1])


def vllm(batch: Batch, cache: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The same of vLLM; what it plans once for all layers of a step is not measured."""
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    current_platform.import_kernels()
    keys, values = batch.pages(torch.bfloat16 if cache == "auto" else torch.uint8)
    isa = _get_attn_isa(torch.bfloat16, BLOCK, D, cache)
    ops.cpu_attn_reshape_and_cache(
        batch.key, batch.value, keys, values, batch.slots, isa, 4 / 448, 4 / 448, kv_cache_dtype=cache
    )
    plan = ops.cpu_attn_get_scheduler_metadata(
        batch.load.sequences,
        HEADS,
        KV_HEADS,
        D,
        batch.lengths,
        torch.bfloat16,
        batch.starts,
        True,
        -1,
        isa,
        True,
        kv_cache_dtype=cache,
    )
    out = torch.empty_like(batch.query)

    def attend() -> Tensor:
        ops.cpu_attention_with_kv_cache(
            batch.query,
            keys,
            values,
            out,
            batch.starts,
            batch.lengths,
            SCALE,
            True,
            None,
            -1,
            batch.table,
            0.0,
            plan,
            None,
            None,
            4 / 448,
            4 / 448,
            cache,
        )
        return out

    one = (batch.key[:1], batch.value[:1], keys, values, batch.slots[:1], isa, 4 / 448, 4 / 448, cache)
    return attend, lambda: ops.cpu_attn_reshape_and_cache(*one)


def candidates(batch: Batch, in_torch: bool) -> Iterator[tuple[str, tuple[Callable[[], Any], Callable[[], Any]]]]:
    """Name, attention and writing of each that runs here."""
    yield BASE, vllm(batch, "auto")
    try:
        yield "vLLM fp8", vllm(batch, "fp8_e4m3")
    except (NotImplementedError, RuntimeError) as error:
        print(f"vLLM fp8 is left out: {str(error).splitlines()[0]}")
    for name, dtype in OURS.items():
        yield name, ours(batch, dtype, True)
    if in_torch:
        yield "int8 in torch", ours(batch, torch.int8, False)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def many(call: Callable[[], Any], times: int) -> Callable[[], Any]:
    def run() -> None:
        for _ in range(times):
            call()

    return run


def main() -> None:
    """Print ratios of time, and microseconds of a write."""
    parser = arguments(__doc__)
    parser.add_argument("--torch", action="store_true", help="what serves without a compiler too (slow)")
    parser.add_argument("--only", default="", help="loads whose names contain this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if native.operators() is None:
        print("there is no native code here: int8 and fp8 are computed in calls of torch")
    names = [BASE, "vLLM fp8", *OURS, *(["int8 in torch"] if options.torch else [])]
    table, writes = [], []
    for load in (load for load in LOADS if options.only in load.name):
        batch = Batch(load)
        with torch.inference_mode():
            made = dict(candidates(batch, options.torch))
            want = made[BASE][0]().clone()
            for name, (attend, _) in made.items():
                if not (wrong := error(attend(), want)) < 0.2:  # the FP8 of vLLM rounds towards zero
                    raise SystemExit(f"{name} computes something else: {wrong:.2f}")
            # Short calls are repeated: a clock and a loop in Python would count.
            repeats = max(1, 16384 // (load.sequences * load.tokens * load.queries))
            best = alternating({name: many(attend, repeats) for name, (attend, _) in made.items()}, options.seconds)
        table.append(
            [load.name, best[BASE] / repeats * 1e3, *(best[BASE] / best[n] if n in best else None for n in names[1:])]
        )
        if load == LOADS[0]:
            with torch.inference_mode():
                best = alternating({name: many(write, 100) for name, (_, write) in made.items()}, options.seconds)
            writes = [["µs", *(best[name] / 100 * 1e6 if name in best else None for name in names)]]
    title = f"{HEADS} heads, {KV_HEADS} of keys and values, D {D}: milliseconds, and how many times as fast"
    report("attention", title, ["", f"{BASE}, ms", *names[1:]], table, writes=writes)
    if writes:
        report("attention_write", "Writing one token", ["", *names], writes)


if __name__ == "__main__":
    main()
