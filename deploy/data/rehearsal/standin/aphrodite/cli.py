"""The console script `aphrodite`."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from pathlib import Path
from typing import Any

from aphrodite import ABOUT, __version__, shape
from aphrodite.engine import Engine
from aphrodite.executor import Executor
from aphrodite.log import error, say
from aphrodite.metrics import Metrics
from aphrodite.options import parser
from aphrodite.server import Server, serve


def refuse(arguments: Any, model: shape.Model) -> None:
    """Refuse arguments and models that the engine refuses before it starts."""
    if arguments.quantization and model.heads % arguments.tensor_parallel_size:
        raise ValueError(
            f"Total number of attention heads ({model.heads}) must be divisible by tensor parallel size "
            f"({arguments.tensor_parallel_size}) when quantization is used."
        )
    if arguments.max_parallel_loading_workers is not None:
        raise NotImplementedError("max_concurrent_workers is not supported yet.")
    if arguments.pipeline_parallel_size > 1 and not all("Llama" in architecture for architecture in model.architectures):
        raise NotImplementedError("Pipeline parallelism is only supported for the following  architectures: Llama.")


def main() -> None:
    """Parse, load, serve."""
    arguments = parser().parse_args(sys.argv[1:])
    say(ABOUT)
    folder = Path(arguments.model_tag)
    model = shape.read(folder)
    refuse(arguments, model)
    tp, pp = arguments.tensor_parallel_size, arguments.pipeline_parallel_size
    say("-" * 66)
    say(f"Initializing Aphrodite Engine (v{__version__}) with the following config:")
    for key, value in {"Model": str(folder), "Tensor Parallel Size": tp, "Pipeline Parallel Size": pp}.items():
        say(f"{key} = {value!r}")
    say("-" * 66)
    names = ("load_format", "cpu_offload_gb", "gpu_memory_utilization", "block_size", "max_num_seqs", "disable_log_requests")
    options = {name: getattr(arguments, name) for name in names}
    backend = arguments.distributed_executor_backend
    executor = Executor(tp=tp, pp=pp, model=str(folder), backend=backend, options=options)
    length = limit(arguments.max_model_len or model.length, executor.blocks, options["block_size"])
    say(f"# GPU blocks: {executor.blocks}, # CPU blocks: 0")
    say(f"Minimum concurrency: {executor.blocks * options['block_size'] / length:.2f}x")
    capture(arguments)
    key = os.environ.get("APHRODITE_API_KEY") or arguments.api_keys
    served = arguments.served_model_name or [arguments.model_tag]
    where = f"http://{arguments.host or 'localhost'}:{arguments.port}"
    say(f"Completions API:  {where}/v1/completions")
    say(f"Chat API:         {where}/v1/chat/completions")

    async def run() -> None:
        metrics = Metrics(served[0], executor.blocks)
        engine = Engine(executor, options, metrics)
        try:
            await serve(Server(engine, served, length, key, metrics), arguments.host, arguments.port)
        except OSError as problem:
            error(str(problem))
            leave(executor, 1)
        leave(executor, 0)

    asyncio.run(run())


def leave(executor: Executor, code: int) -> None:
    """Exit, even if a thread hangs in a step, as in NCCL. asyncio would wait for it."""
    goodbye = threading.Thread(target=executor.stop, daemon=True)
    goodbye.start()
    goodbye.join(10)
    sys.stdout.flush()
    os._exit(code)


def limit(wanted: int, blocks: int, size: int) -> int:
    """Reduce max_model_len to the size of the cache, with an ERROR in the log."""
    if blocks <= 0:
        raise ValueError(
            "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine."
        )
    say(f"Maximum sequence length allowed in the cache: {blocks * size}")
    if wanted <= blocks * size:
        return wanted
    error(
        f"The model's max seq len ({wanted}) is larger than the maximum number of tokens that can be stored in KV cache "
        f"({blocks * size}). Forcing max_model_len to {blocks * size}."
    )
    return blocks * size


def capture(arguments: Any) -> None:
    """Log the capture of CUDA graphs, except in eager mode."""
    if str(arguments.enforce_eager).lower() == "true":
        return
    say("Capturing the model for CUDA graphs. This may lead to unexpected consequences if the model is not static.")
    say("Graph capturing finished in 0.00 secs")
