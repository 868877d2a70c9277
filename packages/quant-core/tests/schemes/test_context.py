"""What headers say of a module."""

import torch

from quant_core import LinearContext, Partition, Shard, StoredForm, StoredTensor


def test_a_form_of_real_tensors() -> None:
    form = StoredForm("m", {"weight": StoredTensor("m.weight", (4, 8), torch.int8, "f")})
    assert form
    assert form.has("weight")
    assert not form.has("bias", default=True), "the files are known, so the default does not matter"
    assert form.shape("weight", ()) == (4, 8)
    assert form.shape("bias", (1,)) == (1,)
    assert form.dtype("weight", torch.float32) == torch.int8
    assert form.dtype("bias", torch.float32) == torch.float32


def test_a_form_without_files_answers_with_the_usual() -> None:
    form = StoredForm("m")
    assert not form
    assert form.has("weight", default=True)
    assert not form.has("weight")
    assert form.shape("weight", (4, 8)) == (4, 8)


def test_scales_are_stored_in_16_bits_or_more() -> None:
    for stored, told in [
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
        (torch.int64, torch.float32),
        (torch.float8_e4m3fn, torch.float32),
    ]:
        form = StoredForm("m", {"scale": StoredTensor("m.scale", (1,), stored, "f")})
        assert form.float_dtype("scale") == told
    assert StoredForm().float_dtype("scale", torch.float16) == torch.float16


def test_only_row_parallel_layers_cut_their_input() -> None:
    assert [Partition(kind, 0, 4).input_parts for kind in ("column", "row", "replicated")] == [1, 4, 1]


def test_a_context_knows_its_first_form_and_its_full_width() -> None:
    form = StoredForm("a", {"weight": StoredTensor("a.weight", (4, 8), torch.int8, "f")})
    shards = (Shard("a", 4, 2), Shard("b", 8, 4))
    context = LinearContext(
        name="x", shards=shards, input_size=8, params_dtype=torch.float32, stored=(form, StoredForm("b"))
    )
    assert context.form is form
    assert context.output_size == 12
    assert not LinearContext(name="x", shards=shards, input_size=8, params_dtype=torch.float32).form
