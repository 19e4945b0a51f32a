"""Runs scenes on real GPUs. A scene deploys a model, tests it and measures it; then it may cause a fault and test again.

    python -m bench._serving.run WORK SCENE…     on the machine with the GPUs, after `bench/serve_gpu.sh setup`

The results are stored in WORK/results.json. The nodes are those of the rehearsal: namespaces, each with an sshd. The nodes k0,
k1 and so on have one GPU each. One more node has the first two GPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench._serving import model
from bench._serving.model import TIMES, differences
from deploy.rehearsal.hub import COMMIT
from deploy.rehearsal.rig import GATEWAY, MOUNT, UID, USER, NodeSpec, Rig, open_rig
from deploy.rehearsal.source import listening
from deploy.remote.wire import Json

SMALL, LARGE, HALF = "random/Llama-3.1-8B", "random/Llama-3.1-405B-16-layers", "random/Llama-3.1-405B-8-layers"
DOUBLE, MOE = "random/Llama-3.1-405B-32-layers", "random/Qwen3-MoE-small"
"Repositories of the Hub that runs here. MODELS has their folders in WORK/models."
MODELS = {SMALL: "llama-8b", LARGE: "llama-405b-16", HALF: "llama-405b-8", DOUBLE: "llama-405b-32", MOE: "moe"}
WEIGHTS = {SMALL: "", MOE: "moe"}
"The models that have weights. The value is the first word in the names of the model's scenes and reference; it may be empty."
INDEX_PORT, HUB_PORT = 8090, 8091
LEVELS = "1,4,16,64,256"
QUIET = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"These variables switch NVLink's multicast off in NCCL, torch and NVSHMEM, since other users may share the machine's GPUs."
ENV = {
    **QUIET,
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # flashinfer is not installed (bench/serve_gpu.sh)
    # MemTotal of this machine grows with the used memory. So Ray would report that the memory is full, and kill workers.
    "RAY_memory_monitor_refresh_ms": "0",
}


@dataclass(kw_only=True)
class Ended:
    """A finished command."""

    code: int
    output: str
    seconds: float


@dataclass(kw_only=True)
class Stage:
    """The nodes, the servers, the folder of the deployment, and the results."""

    work: Path
    room: Rig
    folder: Path
    endpoints: Mapping[str, str]
    single: Sequence[str]
    "Names of the nodes with one GPU each."
    pair: str
    "Name of the node with the first two GPUs."
    seen: dict[str, Any] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        """Print a text after the seconds since the beginning."""
        sys.stdout.write(f"[{time.monotonic() - self.begun:6.1f}] {text}\n")
        sys.stdout.flush()

    def keep(self, scene: str, **values: Any) -> None:
        """Add values to results.json. The file is replaced atomically."""
        self.seen.setdefault(scene, {}).update(values)
        target = self.work / "results.json"
        before = json.loads(target.read_text()) if target.exists() else {}
        before.setdefault(scene, {}).update(values)
        target.with_suffix(".new").write_text(json.dumps(before, indent=1))
        target.with_suffix(".new").replace(target)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `deploy …` in the network of the nodes."""
        argv = self.room.command(["env", "--chdir", str(self.folder), sys.executable, "-m", "deploy", *arguments])
        environ = {**os.environ, "HF_ENDPOINT": self.endpoints[self.repo]}
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ
        )

    @property
    def repo(self) -> str:
        """The repository in deploy.toml."""
        path = self.folder / "deploy.toml"
        return next(repo for repo in MODELS if not path.exists() or f'"{repo}"' in path.read_text())

    def ended(self, process: subprocess.Popen[str], timeout: float = 400) -> tuple[int, str]:
        """Print the lines of a process until it ends. Return its exit code and its output."""
        kept: list[str] = []
        late = threading.Timer(timeout, process.kill)
        late.start()
        assert process.stdout
        for line in process.stdout:
            kept.append(line)
            self.say(f"    {line.rstrip()}")
        code = process.wait()
        late.cancel()
        return code, "".join(kept)

    def deploy(self, *arguments: str, fails: bool = False, timeout: float = 400) -> Ended:
        """Run `deploy …`. Raises RuntimeError if the command fails, except with `fails`."""
        begun = time.monotonic()
        self.say(f"$ deploy {' '.join(arguments)}")
        code, output = self.ended(self.start(*arguments), timeout)
        seconds = round(time.monotonic() - begun, 1)
        self.say(f"    # {seconds} s, exit code {code}")
        if code and not fails:
            raise RuntimeError(f"deploy {' '.join(arguments)} ended with exit code {code}")
        return Ended(code=code, output=output, seconds=seconds)

    def head(self, verb: str, *more: str, given: str = "", timeout: float = 300) -> Any:
        """Run ask.py on the head as the user of the node, so that the times include no tunnel and no other namespace."""
        script = Path(__file__).with_name("ask.py").read_text()
        place = self.room[self.heads[0]].home / "ask.py"
        place.write_text(script)
        keys = self.room[self.heads[0]].home / "api-key"
        keys.write_text((self.folder / ".deploy" / "api-key").read_text())
        argv = [
            f"{MOUNT}/gracefarm/gpu/env/bin/python",
            f"/home/{USER}/ask.py",
            "http://127.0.0.1:2242",
            f"/home/{USER}/api-key",
            verb,
            *more,
        ]
        answer = self.room[self.heads[0]].execute(argv, input=given, timeout=timeout)
        keys.unlink()
        if answer.returncode:
            raise RuntimeError(f"ask.py {verb}: {answer.stderr.strip() or answer.stdout.strip()}")
        return json.loads(answer.stdout)

    heads: Sequence[str] = ()
    "The nodes of the deployment. The head is the first one."

    def configure(self, repo: str, layout: Mapping[str, int | bool], *, launcher: str = "ray", **options: object) -> None:
        """Write deploy.toml as a user would edit it."""
        lines = [
            'name = "gpu"',
            'engine = "vllm"',
            'set = "gpu"',
            f'index = "http://{GATEWAY}:{INDEX_PORT}/simple/"',
            'lock = "requirements.lock"',
            'python = "system"',
            'python_version = "3.12"',
            *([f'launcher = "{launcher}"'] if launcher != "ray" else []),
            f'share = "{MOUNT}"',
            "[nodes]",
            'file = "ips.txt"',
            f'user = "{USER}"',
            f'key = "{self.room.key}"',
            "[model]",
            f'repo = "{repo}"',
            'revision = "main"',
            "[layout]",
            *(f"{name} = {json.dumps(value)}" for name, value in layout.items()),
            "max_model_len = 2048",
            "max_num_seqs = 256",
            "[engine_options]",
            *(f"{name} = {json.dumps(value)}" for name, value in options.items()),
            "[env]",
            *(f'{name} = "{value}"' for name, value in ENV.items()),
            "[options]",
            "load_timeout = 240",
        ]
        (self.folder / "deploy.toml").write_text("\n".join(lines) + "\n")
        self.say(f"deploy.toml: {repo} {dict(layout)} {launcher} {options or ''}")

    def nodes(self, *names: str) -> None:
        """Set the nodes of the deployment."""
        self.heads = names
        (self.folder / "ips.txt").write_text("".join(f"{self.room[name].address}\n" for name in names))
        access = ("--user", USER, "--key", str(self.room.key))
        self.deploy("init", "ips.txt", *access, "--share", MOUNT, "--model", SMALL, "--accept")

    def on(self, *names: str) -> None:
        """Use these nodes. If the deployment has other nodes, stop it there first."""
        there = self.folder / "ips.txt"
        wanted = "".join(f"{self.room[name].address}\n" for name in names)
        if there.exists() and there.read_text() != wanted:
            self.deploy("down", fails=True)
        if not there.exists() or there.read_text() != wanted:
            self.nodes(*names)
        self.heads = names

    # Tests and measurements.

    def compare(self, scene: str) -> None:
        """Compare log-probabilities with those of transformers, and with those of earlier layouts of the same model."""
        family = WEIGHTS[self.repo]
        reference = json.loads((self.work / f"reference{f'-{family}' if family else ''}.json").read_text())
        given = json.dumps({"prompts": model.prompts(), "top": model.TOP})
        ours = self.head("logprobs", given=given)
        (self.work / f"logprobs-{scene}.json").write_text(json.dumps(ours))
        against = {"transformers": reference["kept"]}
        for path in sorted(self.work.glob("logprobs-*.json")):
            other = path.stem.removeprefix("logprobs-")
            if other != scene and other.startswith("moe-") == bool(family):
                against[other] = json.loads(path.read_text())
        bound = TIMES * reference["half"]["mean"]
        apart = {name: differences(ours, other) for name, other in against.items()}
        holds = all(gap["mean"] <= bound for gap in apart.values()) and reference["swapped"]["mean"] > bound
        self.keep(scene, logprobs={"apart": apart, "bound": round(bound, 5), "holds": holds, "swapped": reference["swapped"]})
        self.say(f"log-probabilities: {apart}, bound {bound:.4f}, exchanged shards {reference['swapped']}: {holds}")

    def measure(self, scene: str, levels: str = LEVELS) -> None:
        """Measure the milliseconds of a step for each number of streams."""
        begun = time.monotonic()
        steps = {int(streams): value for streams, value in self.head("steps", levels).items()}
        rates = {streams: round(streams / value * 1e3, 1) for streams, value in steps.items()}
        self.keep(scene, ms=steps, tokens_per_s=rates)
        self.say(f"steps: {steps} ms, {rates} tokens/s ({time.monotonic() - begun:.0f} s)")

    def bench(self, scene: str, client: str) -> None:
        """Run `deploy bench` with this client. Store output and report, and after a failure the log of `vllm bench serve`."""
        sweep = ("--concurrency", "1,16,64", "--prompt-tokens", "32", "--max-tokens", "64")
        ended = self.deploy("bench", *sweep, "--client", client, fails=True)
        stored = sorted((self.folder / ".deploy" / "bench").glob("*.json"))
        log = self.folder / ".deploy" / "logs" / "vllm-bench.log"
        lines = log.read_text().splitlines()[-40:] if ended.code and log.exists() else []
        report = json.loads(stored[-1].read_text()) if stored and not ended.code else None
        kept = {"code": ended.code, "output": ended.output.splitlines(), "report": report, "log": lines}
        self.keep(scene, **{f"bench_{client}": kept})
        for line in lines:
            self.say(f"    {line}")
        if ended.code:
            raise RuntimeError(f"deploy bench --client {client} ended with exit code {ended.code}")

    def served(self, scene: str) -> None:
        """Run `deploy serve`. Store its time and its plan."""
        ended = self.deploy("serve")
        plan = json.loads((self.folder / ".deploy" / "plan.json").read_text())
        self.keep(scene, serve_s=ended.seconds, layout=plan["layout"], command=plan["serve"])

    def broken(self, scene: str, what: str, seconds: Sequence[float] = (3, 15)) -> None:
        """Store the output of `status` at these times after a fault, and then the output of `collect`."""
        answers = []
        begun = time.monotonic()
        for moment in seconds:
            time.sleep(max(0.0, moment - (time.monotonic() - begun)))
            ended = self.deploy("status", fails=True)
            after = round(time.monotonic() - begun, 1)
            answers.append({"after_s": after, "code": ended.code, "says": ended.output.splitlines()[:3]})
        collected = self.deploy("collect", fails=True)
        self.keep(scene, **{what: {"status": answers, "collect": collected.output.splitlines()[-5:], "code": collected.code}})

    def kill(self, node: str, part: Callable[[Json], bool], signal: str = "-KILL") -> list[str]:
        """Send a signal to processes of a node, as root. Return their arguments. Raises RuntimeError if there are none."""
        chosen = [process for process in self.room[node].processes() if part(process)]
        if not chosen:
            raise RuntimeError(f"{node}: no such process")
        self.room[node].execute(["kill", signal, *(str(process["pid"]) for process in chosen)])
        titles = [" ".join(process["argv"])[:100] for process in chosen]
        self.say(f"kill {signal} on {node}: {titles}")
        return titles


@contextmanager
def stage(work: Path) -> Iterator[Stage]:
    """Start nodes and servers. Stop them at the end of the block."""
    gpus = os.environ.get("GPUS", "").split() or sorted(
        (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")), key=int
    )
    single = [f"k{rank}" for rank in range(len(gpus))]
    pair = f"k{len(gpus)}"
    sets = {**{name: [gpu] for name, gpu in zip(single, gpus, strict=True)}, pair: gpus[:2]}
    specs = {name: NodeSpec(env=QUIET, variables={"RIG_GPUS": " ".join(numbers)}) for name, numbers in sets.items()}
    folder = work / "deployment"
    folder.mkdir(exist_ok=True)
    (folder / "requirements.lock").write_text((work / "index" / "requirements.lock").read_text())
    with open_rig(work / "rig", count=len(sets), specs=specs, python="3.12") as room, ExitStack() as stack:
        place = room.folder / "share" / "gracefarm" / "weights"
        endpoints = {}
        for number, (repo, name) in enumerate(MODELS.items()):
            source = work / "models" / name
            if not source.exists():
                continue
            there = place / repo.replace("/", "--") / COMMIT
            if (
                not there.exists()
            ):  # like files that an administrator has put onto the share; their digests are not computed again
                there.parent.mkdir(parents=True, exist_ok=True)
                subprocess.run(["cp", "-al", str(source), str(there)], check=True)
                subprocess.run(["chown", "-R", f"{UID}:{UID}", str(room.folder / "share" / "gracefarm")], check=True)
            hub = [sys.executable, "-m", "deploy.rehearsal.hub", "--host", GATEWAY, "--port", str(HUB_PORT + number)]
            endpoints[repo] = stack.enter_context(listening(room.command([*hub, "--repo", repo, "--folder", str(source)])))
        files = room.command([sys.executable, "-m", "bench._serving.files", GATEWAY, str(INDEX_PORT), str(work / "index")])
        stack.enter_context(listening(files))
        yield Stage(work=work, room=room, folder=folder, endpoints=endpoints, single=single, pair=pair)


def main() -> None:
    """Run the scenes (see the module). If a scene fails, store its error and run the next one."""
    from bench._serving.scenes import SCENES

    work, failed = Path(sys.argv[1]), []
    names = sys.argv[2:] or list(SCENES)
    with stage(work) as opened:
        for name in names:
            if name != "end" and time.monotonic() - opened.begun > float(os.environ.get("SECONDS", "inf")):
                opened.say(f"== {name}: skipped, since no time is left")
                continue
            opened.say(f"== {name}")
            begun = time.monotonic()
            try:
                SCENES[name](opened)
            except Exception as error:  # noqa: BLE001 - the error is stored, and the next scene runs
                failed.append(name)
                opened.keep(name, failed=f"{type(error).__name__}: {error}")
                opened.say(traceback.format_exc())
            opened.keep(name, scene_s=round(time.monotonic() - begun, 1))
            opened.say(f"== {name}: {time.monotonic() - begun:.1f} s{' FAILED' if name in failed else ''}")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
