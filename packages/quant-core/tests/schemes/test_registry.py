"""Registration and look-up, with packages of others."""

import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quant_core import (
    AscendLinearScheme,
    AscendMoEScheme,
    RegistrationError,
    UnsupportedSchemeError,
    get_scheme_class,
    list_schemes,
    register_scheme,
    require_scheme_class,
)
from quant_core.schemes import registry
from quant_core.schemes.linear.w8a8 import AscendW8A8LinearMethod

SCHEME = """
from quant_core import AscendLinearScheme, register_scheme

@register_scheme("{quant_type}", "linear")
class {name}(AscendLinearScheme):
    def get_weight(self, input_size, output_size, params_dtype):
        return {{}}

    def apply(self, layer, x, bias=None, tp_rank=0):
        return x
"""


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers and imports is gone after it."""
    list_schemes()
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    monkeypatch.setattr(registry, "_disputed", {})
    yield
    for name in ("third_party", "first_schemes", "second_schemes"):
        sys.modules.pop(name, None)
    registry._load_all.cache_clear()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a distribution with one module and its entry point, found as an installed one is."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(distribution: str, module: str, source: str, group: str = "quant_core.schemes") -> None:
        info = tmp_path / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{module} = {module}\n")
        (tmp_path / f"{module}.py").write_text(source)
        registry._load_all.cache_clear()

    return write


class Linear(AscendLinearScheme):
    """Any linear scheme."""

    def get_weight(self, *_: object) -> dict:
        return {}

    def apply(self, layer: object, x: object, *_: object) -> object:
        return x


class OtherLinear(Linear):
    """Another one."""


def test_the_built_in_schemes_are_listed() -> None:
    listed = list_schemes()
    assert list(listed) == sorted(listed)
    assert {("W8A8", "linear"), ("W8A8_DYNAMIC", "linear"), ("W8A16", "linear")} <= listed.keys()
    assert listed["W8A8", "linear"] is AscendW8A8LinearMethod
    listed.clear()
    assert list_schemes()


def test_look_up() -> None:
    assert get_scheme_class("W8A8", "linear") is AscendW8A8LinearMethod
    assert require_scheme_class("W8A8", "linear") is AscendW8A8LinearMethod
    assert get_scheme_class("W4A4_FLATQUANT_DYNAMIC", "moe") is None
    assert get_scheme_class("w8a8", "linear") is None


def test_an_unknown_type_is_answered_with_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(UnsupportedSchemeError) as raised:
        require_scheme_class("W8A8_DYNAMICS", "linear", where="layers.0 (a.json: k = v)")
    message = str(raised.value)
    assert "no scheme serves the quantisation type 'W8A8_DYNAMICS' on linear layers" in message
    assert "where: layers.0 (a.json: k = v)" in message
    assert all(quant_type in message for (quant_type, kind) in list_schemes() if kind == "linear")
    assert "the nearest name is 'W8A8_DYNAMIC'" in message
    assert "'quant_core.schemes'" in message


def test_a_type_that_exists_for_another_kind_of_layer() -> None:
    with pytest.raises(UnsupportedSchemeError, match="'W8A16' exists for linear, moe layers"):
        require_scheme_class("W8A16", "attention")


def test_a_type_that_resembles_nothing() -> None:
    with pytest.raises(UnsupportedSchemeError) as raised:
        require_scheme_class("zzz", "linear")
    assert "nearest" not in str(raised.value)


def test_a_kind_of_layer_that_nobody_knows() -> None:
    with pytest.raises(RegistrationError, match="unknown layer type 'conv'") as raised:
        register_scheme("X", "conv")
    assert "linear, moe, attention" in str(raised.value)


def test_a_class_may_have_several_names_and_be_registered_again() -> None:
    register_scheme("A", "linear")(register_scheme("B", "linear")(Linear))
    assert register_scheme("A", "linear")(Linear) is Linear
    assert get_scheme_class("A", "linear") is get_scheme_class("B", "linear") is Linear


def test_a_name_belongs_to_one_class() -> None:
    register_scheme("A", "linear")(Linear)
    with pytest.raises(RegistrationError) as raised:
        register_scheme("A", "linear")(OtherLinear)
    assert "two schemes claim 'A' on linear layers" in str(raised.value)
    assert f"{Linear.__module__}.Linear and {Linear.__module__}.OtherLinear" in str(raised.value)
    assert get_scheme_class("A", "linear") is Linear


@pytest.mark.parametrize("wrong", [AscendMoEScheme, object, lambda: None, "W8A8"])
def test_the_base_class_must_be_that_of_the_layer_type(wrong: object) -> None:
    with pytest.raises(RegistrationError, match=r"a subclass of quant_core\.AscendLinearScheme"):
        register_scheme("A", "linear")(wrong)
    assert get_scheme_class("A", "linear") is None


def test_a_package_of_somebody_else(install: Callable[..., None]) -> None:
    install("third-party", "third_party", SCHEME.format(quant_type="W1A1", name="One"))
    found = list_schemes()["W1A1", "linear"]
    assert f"{found.__module__}.{found.__name__}" == "third_party.One"


def test_a_package_may_look_up_others_while_it_is_imported(install: Callable[..., None]) -> None:
    source = SCHEME.format(quant_type="W1A1", name="One").replace(
        "(AscendLinearScheme)", '(__import__("quant_core").require_scheme_class("W8A8_DYNAMIC", "linear"))'
    )
    install("third-party", "third_party", source)
    assert issubclass(require_scheme_class("W1A1", "linear"), require_scheme_class("W8A8_DYNAMIC", "linear"))


def test_two_packages_that_clash(install: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    """A warning names both, and whoever looks the type up is refused each time; no other type is touched."""
    # Each has a scheme of its own before the common one, whichever of them is imported first.
    for number, name in enumerate(("First", "Second")):
        own = SCHEME.format(quant_type=f"W2A{number}", name=f"Own{name}")
        install(name.lower(), f"{name.lower()}_schemes", own + SCHEME.format(quant_type="W1A1", name=name))
    assert get_scheme_class("W8A8", "linear") is not None
    assert ("W8A8", "linear") in list_schemes()
    messages = [caplog.text]
    for ask in (get_scheme_class, require_scheme_class, get_scheme_class):
        with pytest.raises(RegistrationError) as raised:
            ask("W1A1", "linear")
        messages.append(str(raised.value))
    for message in messages:
        assert "two schemes claim 'W1A1' on linear layers" in message
        assert "first_schemes.First" in message
        assert "second_schemes.Second" in message
    assert caplog.text.count("two schemes claim") == 1


def test_a_package_that_takes_a_built_in_name(install: Callable[..., None]) -> None:
    """Which of the two somebody wants cannot be known."""
    install("third-party", "third_party", SCHEME.format(quant_type="W8A8", name="Mine"))
    with pytest.raises(RegistrationError, match="two schemes claim 'W8A8'") as raised:
        get_scheme_class("W8A8", "linear")
    assert "quant_core.schemes.linear.w8a8.AscendW8A8LinearMethod and third_party.Mine" in str(raised.value)
    assert get_scheme_class("W8A16", "linear") is not None


@pytest.mark.parametrize("source", ["import nothing_of_this_name", "1 / 0", "def broken(:"])
def test_a_package_that_cannot_be_imported_is_named(
    source: str, install: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """Once as a warning, and to whoever asks for a type that it may be the package of."""
    install("third-party", "third_party", source)
    assert get_scheme_class("W8A8", "linear") is not None
    with pytest.raises(UnsupportedSchemeError) as raised:
        require_scheme_class("W1A1", "linear")
    for message in (str(raised.value), caplog.text):
        assert "what third-party announces cannot be imported" in message
        assert "entry point 'third_party' = 'third_party' in group 'quant_core.schemes'" in message
        assert "repair or uninstall third-party" in message
    assert caplog.text.count("cannot be imported") == 1


def test_a_wheel_in_a_fresh_process(tmp_path: Path, run_python: Callable[..., str]) -> None:
    """A scheme and a format, found by nothing but their entry points."""
    wheel = tmp_path / "third_party-1.0-py3-none-any.whl"
    format_source = """
from quant_core import Detection, LayerQuant, QuantFormat

class Tiny(QuantFormat):
    name = vllm_name = "tiny"

    @classmethod
    def detect(cls, folder):
        return Detection("tiny", "always")

    @classmethod
    def load(cls, folder):
        return cls(folder)

    def layer_quant(self, query):
        return LayerQuant(None, ())
"""
    entry_points = "[quant_core.schemes]\nw1a1 = third_party\n[quant_core.formats]\ntiny = third_party:Tiny\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("third_party.py", SCHEME.format(quant_type="W1A1", name="One") + format_source)
        info = "third_party-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/entry_points.txt", entry_points)
        archive.writestr(f"{info}/RECORD", "")
    code = """
import sys
from quant_core import CheckpointFolder, detect_formats, list_formats, list_schemes
assert "third_party" not in sys.modules
print(list_schemes()["W1A1", "linear"], list_formats()["tiny"], detect_formats(CheckpointFolder("/")))
"""
    said = run_python(code, wheel)
    assert "third_party.One" in said
    assert "third_party.Tiny" in said
    assert "Detection(format='tiny', reason='always')" in said


def test_a_class_that_does_not_say_what_it_stores() -> None:
    """Neither `stores` nor a get_weight of its own: it could serve nothing."""

    class Silent(AscendLinearScheme):
        def apply(self, layer: object, x: object, *_: object) -> object:
            return x

    with pytest.raises(RegistrationError, match="Silent does not say what 'SILENT' stores"):
        register_scheme("SILENT", "linear")(Silent)
    assert get_scheme_class("SILENT", "linear") is None
