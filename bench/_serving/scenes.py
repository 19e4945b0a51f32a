"""The scenes of bench/serve_gpu.sh, by name and in their order."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Literal

from bench._serving.run import DOUBLE, HALF, LARGE, MOE, SMALL, WEIGHTS, Stage
from deploy.rehearsal.rig import MOUNT
from deploy.remote.wire import Json

Scene = Callable[[Stage], None]
TWO = {"tensor_parallel": 2, "pipeline_parallel": 1}
STAGES = {"tensor_parallel": 1, "pipeline_parallel": 2}
REPLICAS = {"tensor_parallel": 1, "pipeline_parallel": 1, "data_parallel": 2}
FOUR = {"tensor_parallel": 2, "pipeline_parallel": 2}
WHOLE = {**REPLICAS, "expert_parallel": True}
PAIRS = {"tensor_parallel": 2, "pipeline_parallel": 1, "data_parallel": 2}
BOTH = ("k0", "k1")
"Two nodes with one GPU each."
DUMMY = {"load-format": "dummy"}
"The engine invents the weights. The weights of 16 layers of the 405B model would be 110 GB."
FEW_GRAPHS = {"max-cudagraph-capture-size": 64}
"The engine captures CUDA graphs only for the measured numbers of streams."
HOG = """
import ctypes, time
cuda = ctypes.CDLL("libcuda.so.1")
cuda.cuInit(0)
device, context, pointer = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
cuda.cuDeviceGet(ctypes.byref(device), 0)
cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
cuda.cuCtxSetCurrent(context)
assert cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(100 << 30)) == 0
print("taken", flush=True)
time.sleep(300)
"""
"A process that allocates 100 GiB of the GPU's memory."


def worker(process: Json) -> bool:
    """Whether the process is a rank of the engine, which Ray or the engine has started."""
    title = str(process["argv"][0])
    return title.startswith(("ray::RayWorker", "VLLM::Worker"))


def core(process: Json) -> bool:
    """Whether the process is the engine's scheduler."""
    return str(process["argv"][0]).startswith("VLLM::EngineCore")


def raylet(process: Json) -> bool:
    """Whether the process is Ray's raylet."""
    return str(process["argv"][0]).endswith("/raylet")


def up(stage: Stage) -> None:
    """Prepare a deployment from ips.txt until it can serve."""
    stage.on(*BOTH)
    stage.configure(SMALL, TWO)
    stage.deploy("facts")
    begun = time.monotonic()
    stage.deploy("up")
    stage.keep("up", up_s=round(time.monotonic() - begun, 1))
    stage.deploy("plan")


def tp2(stage: Stage) -> None:
    """Serve with tensor parallelism on two nodes and with Ray.

    Run a second `serve` while the first one loads. Then run `ask` and `bench`, and kill a worker.
    """
    stage.on(*BOTH)
    stage.configure(SMALL, TWO)
    begun = time.monotonic()
    first = stage.start("serve")
    time.sleep(5)
    second = stage.deploy("serve", "--no-wait", fails=True)
    code, _ = stage.ended(first)
    stage.keep("tp2", serve_s=round(time.monotonic() - begun, 1), second={"code": second.code, "says": second.output})
    if code:
        raise RuntimeError(f"deploy serve ended with exit code {code}")
    again = stage.deploy("serve")
    stage.keep("tp2", again={"seconds": again.seconds, "says": again.output.splitlines()[-4:]})
    stage.deploy("status")
    stage.deploy("ask", "--api", "completions", "What is a wheel?", fails=True)
    stage.compare("tp2")
    stage.measure("tp2")
    for client in ("own", "vllm"):
        stage.bench("tp2", client)
    stage.kill("k1", worker)
    stage.broken("tp2", "worker")


def pp2(stage: Stage) -> None:
    """Serve on two nodes with one pipeline stage each. Then kill a raylet."""
    stage.on(*BOTH)
    stage.configure(SMALL, STAGES)
    stage.served("pp2")
    stage.compare("pp2")
    stage.measure("pp2")
    stage.kill("k1", raylet)
    stage.broken("pp2", "raylet")


def dp2(stage: Stage) -> None:
    """Serve on two nodes with one replica each."""
    stage.on(*BOTH)
    stage.configure(SMALL, REPLICAS)
    stage.served("dp2")
    stage.compare("dp2")
    stage.measure("dp2")


def foreign(stage: Stage) -> None:
    """Test `preflight` and `serve` while another process has most of the GPU memory of k1."""
    stage.on(*BOTH)
    stage.deploy("down", fails=True)
    stage.configure(SMALL, TWO)
    script = stage.room["k1"].home / "hog.py"
    script.write_text(HOG)
    stage.room["k1"].execute(
        [
            "sh",
            "-c",
            f"setsid {MOUNT}/gracefarm/gpu/env/bin/python /home/ubuntu/hog.py >/home/ubuntu/hog.log 2>&1 </dev/null &",
        ]
    )
    log = stage.room["k1"].home / "hog.log"
    deadline = time.monotonic() + 30
    while "taken" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.5)
    preflight = stage.deploy("preflight", fails=True)
    serve = stage.deploy("serve", fails=True)
    stage.keep("foreign", preflight=[line for line in preflight.output.splitlines() if "memory" in line], code=preflight.code)
    stage.keep("foreign", serve={"code": serve.code, "says": serve.output.splitlines()[-6:], "seconds": serve.seconds})
    stage.kill("k1", lambda process: any("hog.py" in word for word in process["argv"]))


def native(name: str, layout: Mapping[str, int]) -> Scene:
    """Serve on two nodes without Ray, and measure. Then kill a worker."""

    def scene(stage: Stage) -> None:
        stage.on(*BOTH)
        stage.configure(SMALL, layout, launcher="native")
        stage.served(name)
        stage.deploy("status")
        stage.compare(name)
        stage.measure(name)
        stage.kill("k1", worker)
        stage.broken(name, "worker")

    return scene


def on(where: Literal["both", "all", "pair"], name: str, repo: str, layout: Mapping[str, int | bool]) -> Scene:
    """Measure a layout on k0 and k1, on all nodes with one GPU, or on the node with two GPUs.

    If the model has weights, also compare its log-probabilities.
    """

    def scene(stage: Stage) -> None:
        nodes = {"both": BOTH, "all": stage.single, "pair": (stage.pair,)}[where]
        if where == "all" and len(nodes) < 4:
            raise RuntimeError(f"this scene requires four GPUs, and the machine has {len(nodes)}")
        stage.on(*nodes)
        stage.configure(repo, layout, **({MOE: FEW_GRAPHS} | dict.fromkeys((LARGE, HALF, DOUBLE), DUMMY)).get(repo, {}))
        stage.served(name)
        if repo in WEIGHTS:
            stage.compare(name)
        stage.measure(name, *(("1,16,64",) if repo == MOE else ()))
        if name == "moe-dp2":
            stage.bench(name, "vllm")
        if name == "tp2-nvlink":
            stage.kill(stage.pair, core)
            stage.broken(name, "engine")

    return scene


def end(stage: Stage) -> None:
    """Stop everything, and remove the files of the deployment from the nodes."""
    stage.deploy("down")
    stage.deploy("purge", "--yes", fails=True)
    left = {
        node.name: [" ".join(process["argv"])[:60] for process in node.processes() if "sshd" not in process["argv"][0]]
        for node in stage.room.nodes
    }
    stage.keep("end", left=left, memory=_gpu_memory())
    stage.say(json.dumps(left))


def _gpu_memory() -> str:
    """The used memory of each GPU, according to the driver."""
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout if shutil.which(asked[0]) else ""


SCENES: dict[str, Scene] = {
    "up": up,
    "tp2": tp2,
    "pp2": pp2,
    "dp2": dp2,
    "foreign": foreign,
    "native-tp2": native("native-tp2", TWO),
    "native-pp2": native("native-pp2", STAGES),
    "tp2-nvlink": on("pair", "tp2-nvlink", SMALL, TWO),
    "pp2-nvlink": on("pair", "pp2-nvlink", SMALL, STAGES),
    "tp2-pp2": on("all", "tp2-pp2", SMALL, FOUR),
    "tp2-dp2": on("all", "tp2-dp2", SMALL, PAIRS),
    "405b-tp2-nvlink": on("pair", "405b-tp2-nvlink", LARGE, TWO),
    "405b-pp2-nvlink": on("pair", "405b-pp2-nvlink", LARGE, STAGES),
    "405b-tp2": on("both", "405b-tp2", LARGE, TWO),
    "405b-pp2": on("both", "405b-pp2", LARGE, STAGES),
    "405b-dp2": on("both", "405b-dp2", HALF, REPLICAS),
    "405b-tp2-pp2": on("all", "405b-tp2-pp2", DOUBLE, FOUR),
    "moe-dp2": on("both", "moe-dp2", MOE, REPLICAS),
    "moe-ep-dp2": on("both", "moe-ep-dp2", MOE, WHOLE),
    "moe-tp2": on("both", "moe-tp2", MOE, TWO),
    "end": end,
}
