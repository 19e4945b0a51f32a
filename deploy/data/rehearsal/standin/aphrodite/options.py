"""The engine's command line, from the table of its options."""

from __future__ import annotations

import argparse
import json
from importlib import resources
from typing import Any


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"Invalid boolean value: {text}. Expected 'true' or 'false'.")
    return text.lower() == "true"


TYPES: dict[str, Any] = {"str": str, "int": int, "float": float, "bool": _boolean, "json": json.loads, "pairs": str}


class Parser(argparse.ArgumentParser):
    """The engine's parser: underscores in options count as dashes."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        def dashes(word: str) -> str:
            name, equals, value = word.partition("=")
            return name.replace("_", "-") + equals + value if word.startswith("--") else word

        return super().parse_args([dashes(word) for word in args], namespace)


def parser() -> Parser:
    """The parser of `aphrodite run`, the only command that a deployment uses."""
    made = Parser(prog="aphrodite", allow_abbrev=True)
    run = made.add_subparsers(dest="command", required=True).add_parser("run", help="Start the server.")
    run.add_argument("model_tag", help="The model: a folder.")
    table = json.loads((resources.files("aphrodite") / "options.json").read_text())
    for option in table["options"]:
        words: dict[str, Any] = {"default": option.get("default")}
        action = option.get("action", "store")
        if action in ("store_true", "append"):
            words["action"] = action
        if action != "store_true":
            words["type"] = _boolean if action == "boolean" else TYPES[option.get("kind", "str")]
            if "nargs" in option:
                words["nargs"] = option["nargs"]
            if option.get("nargs") == "?":
                words["const"] = "True" if action != "boolean" else True
            if "choices" in option:
                words["choices"] = option["choices"]
        run.add_argument(*option["flags"], **words)
    return made
