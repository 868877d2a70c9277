"""The table of schemes in the README is that of the registry, and tells the truth about its checkpoints."""

import json
import os
import re
from pathlib import Path

from quant_core import list_schemes
from quant_core.overview import table

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata") / "checkpoints" / "msmodelslim"

#: Checkpoints of that tool have no description that names the types of modules: their format's package looks at them.
ELSEWHERE = "llmcompressor/"


def test_the_readme_has_the_table_of_today() -> None:
    """`python -m quant_core.overview` prints what must stand there."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- schemes -->\n(.*?)\n<!-- /schemes -->", readme, re.DOTALL)
    assert found, "the README has no <!-- schemes --> ... <!-- /schemes -->"
    assert found[1] == table(), f"stale; it must be:\n{table()}"


def test_the_checkpoints_are_of_the_type() -> None:
    """Each one that is here; with all data, each one."""
    looked_at = 0
    for (quant_type, _), scheme_class in list_schemes().items():
        for name in scheme_class.checked_against.get(quant_type, ()):
            if name.startswith(ELSEWHERE):
                continue
            files = list((DATA / name).glob("quant_model_description*.json"))
            assert files or "ASCEND_QUANT_TEST_DATA" not in os.environ, f"{quant_type}: there is no {name}"
            for file in files:
                looked_at += 1
                assert quant_type in json.loads(file.read_text()).values(), f"{name} has no {quant_type}"
    assert looked_at


def test_checkpoints_are_claimed_for_types_that_are_registered() -> None:
    """A name that is mistyped would vanish from the table."""
    claimed = {kind for cls in list_schemes().values() for kind in cls.checked_against}
    assert claimed <= {kind for kind, _ in list_schemes()}
