"""The engine's table of options, as deploy writes its command line from: read out of its own parser, which needs no GPU."""

import argparse
import json
import sys

from aphrodite.engine.args_tools import AsyncEngineArgs

parser = AsyncEngineArgs.add_cli_args(argparse.ArgumentParser(prog="aphrodite"))
options = sorted(name for action in parser._actions for name in action.option_strings if name.startswith("--"))
print("options " + json.dumps(options))
for wanted in ("--tensor-parallel-size", "--pipeline-parallel-size", "--kv-cache-dtype"):
    if wanted not in options:
        sys.exit(f"the engine's table of options has no {wanted}")
