"""``python -m vllm_ascend_quant report [MODEL_FOLDER ...]`` prints everything that a bug report needs."""

import argparse
import json
from collections.abc import Sequence

from vllm_ascend_quant.reporting import collect, parts_of, text


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m vllm_ascend_quant", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="print everything that a bug report needs")
    report.add_argument(
        "models", nargs="*", metavar="MODEL_FOLDER", help="a model: its folder, or its name in the Hugging Face cache"
    )
    report.add_argument("--json", action="store_true", help="print the same as one JSON object")
    options = parser.parse_args(arguments)
    found = collect(parts_of(options.models))
    if options.json:
        print(json.dumps({part.title: part.as_data() for part in found}, indent=2))
        return
    for part in found:  # as they come, so that whoever breaks off has something
        print(text.of_part(part), flush=True)


if __name__ == "__main__":
    main()
