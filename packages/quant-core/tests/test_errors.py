"""What a message has in it, and that it reaches the reader."""

import pickle

import pytest

import quant_core
from quant_core import (
    CheckpointError,
    Finding,
    LimitError,
    QuantError,
    UnknownLayerError,
    UnsupportedSchemeError,
    raise_findings,
)
from quant_core.errors import LayerResolutionError, listing

ERRORS = [error for error in vars(quant_core).values() if isinstance(error, type) and issubclass(error, QuantError)]


def test_a_message_says_what_where_found_expected_and_what_to_do() -> None:
    error = CheckpointError("the weight is odd", where="a.json", found=3, expected=4, todo="write it again")
    assert str(error).split("\n") == [
        "the weight is odd",
        "  where: a.json",
        "  found: 3",
        "  expected: 4",
        "  what to do: write it again",
    ]


def test_an_error_carries_its_finding_with_all_fields() -> None:
    error = CheckpointError("odd", where="a", found=3, todo="that", file="a.json", layer="l.0", tensor="l.0.weight")
    (finding,) = error.findings
    assert (finding.what, finding.where, finding.found, finding.todo) == ("odd", "a", "3", "that")
    assert (finding.file, finding.layer, finding.tensor) == ("a.json", "l.0", "l.0.weight")
    assert (finding.severity, finding.error) == ("error", CheckpointError)
    again = pickle.loads(pickle.dumps(error))
    assert again.findings == error.findings


def test_findings_are_raised_together_and_what_is_in_many_places_once() -> None:
    absent = [Finding("a and b differ", where="x", found=f"t{i} is absent", error=CheckpointError) for i in range(25)]
    other = Finding("no such type", error=UnsupportedSchemeError, also=("m1", "m2"))
    odd = Finding("a target without a layer", severity="warning")
    with pytest.raises(UnsupportedSchemeError) as raised:
        raise_findings([other, odd, *absent])
    text = str(raised.value)
    assert raised.value.findings == (other, *absent)
    start = "no such type\n  also: m1, m2\na and b differ\n  where: x\n  found: t0 is absent\n"
    assert text.startswith(start)
    assert text.endswith("    and 5 more")
    assert "target" not in text
    raise_findings([odd])  # nothing to raise


def test_what_is_not_known_is_left_out() -> None:
    assert str(QuantError("only this", found=0)) == "only this\n  found: 0"


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_survives_the_way_between_processes(kind: type[QuantError]) -> None:
    """vLLM pickles what a worker raises."""
    error = kind("what", where="here", todo="that")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)


@pytest.mark.parametrize("kind", ERRORS)
def test_only_limits_are_value_errors(kind: type[QuantError]) -> None:
    """pydantic turns every ValueError into a report that buries the cause."""
    assert issubclass(kind, ValueError) == (kind is LimitError)


def test_an_unknown_layer_is_a_failed_resolution() -> None:
    assert issubclass(UnknownLayerError, LayerResolutionError)


def test_names_from_files_cannot_break_the_terminal() -> None:
    error = CheckpointError("tensor \x1b[31mred\x07 \ud800 \x00 层", where="c1: \x9b")
    assert str(error) == "tensor \\x1b[31mred\\x07 \\ud800 \\x00 层\n  where: c1: \\x9b"
    str(error).encode()


@pytest.mark.parametrize(
    ("count", "text"), [(0, ""), (2, "0, 1"), (3, "0, 1, 2"), (4, "0, 1, 2 and 1 more"), (9, "0, 1, 2 and 6 more")]
)
def test_a_listing_stays_short(count: int, text: str) -> None:
    assert listing(range(count), limit=3) == text
    assert listing((i for i in range(count)), limit=3) == text
