"""`python -m bench [NAME...]`: run these benchmarks; without a name, run all."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import bench


def main() -> None:
    """Run the chosen modules of this package. Each module has a function `main` that prints its results."""
    known = [module.name for module in pkgutil.iter_modules(bench.__path__) if not module.name.startswith("_")]
    chosen = sys.argv[1:] or known
    for name in chosen:
        if name not in known:
            sys.exit(f"there is no benchmark {name!r}; the benchmarks are: {', '.join(known)}")
        print(f"## {name}", flush=True)
        importlib.import_module(f"bench.{name}").main()


if __name__ == "__main__":
    main()
