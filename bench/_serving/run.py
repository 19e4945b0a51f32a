"""Scenes on real GPUs: each deploys, looks, measures, breaks something, and looks again; what it saw goes to a JSON file.

    python -m bench._serving.run WORK SCENE…     on the machine with the GPUs, after bench/serve_gpu.sh has set it up

Nodes are the rehearsal's: namespaces with an sshd each. Each GPU is a node, k0, k1 and so on, and one more node has
the first two GPUs.
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
"Repositories of the Hub that runs here, and the folders of WORK/models that they come from."
MODELS = {SMALL: "llama-8b", LARGE: "llama-405b-16", HALF: "llama-405b-8", DOUBLE: "llama-405b-32", MOE: "moe"}
WEIGHTS = {SMALL: "", MOE: "moe"}
"Models whose weights are made: the first word in the names of their scenes and references, if there is one."
INDEX_PORT, HUB_PORT = 8090, 8091
LEVELS = "1,4,16,64,256"
QUIET = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"NVLink's multicast is off where a machine's GPUs are others' too; NCCL, torch and NVSHMEM have a switch each."
ENV = {
    **QUIET,
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # flashinfer is left out (bench/serve_gpu.sh)
    # Memory of this machine grows as it is used: Ray would take a full MemTotal for the end and kill workers.
    "RAY_memory_monitor_refresh_ms": "0",
}


@dataclass(kw_only=True)
class Ended:
    """A command that was run."""

    code: int
    output: str
    seconds: float


@dataclass(kw_only=True)
class Stage:
    """Nodes, servers, the deployment's folder and what was seen."""

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
        """With the seconds since the beginning."""
        sys.stdout.write(f"[{time.monotonic() - self.begun:6.1f}] {text}\n")
        sys.stdout.flush()

    def keep(self, scene: str, **values: Any) -> None:
        """For results.json, whole at every moment."""
        self.seen.setdefault(scene, {}).update(values)
        target = self.work / "results.json"
        before = json.loads(target.read_text()) if target.exists() else {}
        before.setdefault(scene, {}).update(values)
        target.with_suffix(".new").write_text(json.dumps(before, indent=1))
        target.with_suffix(".new").replace(target)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """`deploy …` where the nodes can be reached."""
        argv = self.room.command(["env", "--chdir", str(self.folder), sys.executable, "-m", "deploy", *arguments])
        environ = {**os.environ, "HF_ENDPOINT": self.endpoints[self.repo]}
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ
        )

    @property
    def repo(self) -> str:
        """That deploy.toml names."""
        path = self.folder / "deploy.toml"
        return next(repo for repo in MODELS if not path.exists() or f'"{repo}"' in path.read_text())

    def ended(self, process: subprocess.Popen[str], timeout: float = 400) -> tuple[int, str]:
        """Its exit code and what it printed, each line said as it comes."""
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
        """A command; `fails`: it may. Raises RuntimeError where it must not."""
        begun = time.monotonic()
        self.say(f"$ deploy {' '.join(arguments)}")
        code, output = self.ended(self.start(*arguments), timeout)
        seconds = round(time.monotonic() - begun, 1)
        self.say(f"    # {seconds} s, exit code {code}")
        if code and not fails:
            raise RuntimeError(f"deploy {' '.join(arguments)} ended with {code}")
        return Ended(code=code, output=output, seconds=seconds)

    def head(self, verb: str, *more: str, given: str = "", timeout: float = 300) -> Any:
        """ask.py on the head, as its own user: no tunnel, and no namespace between."""
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
    "Nodes of the deployment, the head first."

    def configure(self, repo: str, layout: Mapping[str, int | bool], *, launcher: str = "ray", **options: object) -> None:
        """deploy.toml as a person would edit it."""
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
        """The deployment has these from now on."""
        self.heads = names
        (self.folder / "ips.txt").write_text("".join(f"{self.room[name].address}\n" for name in names))
        access = ("--user", USER, "--key", str(self.room.key))
        self.deploy("init", "ips.txt", *access, "--share", MOUNT, "--model", SMALL, "--accept")

    def on(self, *names: str) -> None:
        """These nodes, after the others are taken down."""
        there = self.folder / "ips.txt"
        wanted = "".join(f"{self.room[name].address}\n" for name in names)
        if there.exists() and there.read_text() != wanted:
            self.deploy("down", fails=True)
        if not there.exists() or there.read_text() != wanted:
            self.nodes(*names)
        self.heads = names

    # what is looked at

    def compare(self, scene: str) -> None:
        """Log-probabilities beside those of transformers, and beside the layouts of the same model before."""
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
        """Milliseconds of one step by streams."""
        begun = time.monotonic()
        steps = {int(streams): value for streams, value in self.head("steps", levels).items()}
        rates = {streams: round(streams / value * 1e3, 1) for streams, value in steps.items()}
        self.keep(scene, ms=steps, tokens_per_s=rates)
        self.say(f"steps: {steps} ms, {rates} tokens/s ({time.monotonic() - begun:.0f} s)")

    def bench(self, scene: str, client: str) -> None:
        """`deploy bench` with this client: its output and report, and what `vllm bench serve` said if it failed."""
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
            raise RuntimeError(f"deploy bench --client {client} ended with {ended.code}")

    def served(self, scene: str) -> None:
        """`deploy serve`, with the seconds that it took and its plan."""
        ended = self.deploy("serve")
        plan = json.loads((self.folder / ".deploy" / "plan.json").read_text())
        self.keep(scene, serve_s=ended.seconds, layout=plan["layout"], command=plan["serve"])

    def broken(self, scene: str, what: str, seconds: Sequence[float] = (3, 15)) -> None:
        """What `status` and `collect` say of a fault, soon and later."""
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
        """End processes of a node as root; their arguments. Raises RuntimeError: there is none."""
        chosen = [process for process in self.room[node].processes() if part(process)]
        if not chosen:
            raise RuntimeError(f"{node}: no such process")
        self.room[node].execute(["kill", signal, *(str(process["pid"]) for process in chosen)])
        titles = [" ".join(process["argv"])[:100] for process in chosen]
        self.say(f"kill {signal} on {node}: {titles}")
        return titles


@contextmanager
def stage(work: Path) -> Iterator[Stage]:
    """Nodes and servers until the block ends."""
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
            ):  # as files that an administrator has put onto the share: their digests are not computed again
                there.parent.mkdir(parents=True, exist_ok=True)
                subprocess.run(["cp", "-al", str(source), str(there)], check=True)
                subprocess.run(["chown", "-R", f"{UID}:{UID}", str(room.folder / "share" / "gracefarm")], check=True)
            hub = [sys.executable, "-m", "deploy.rehearsal.hub", "--host", GATEWAY, "--port", str(HUB_PORT + number)]
            endpoints[repo] = stack.enter_context(listening(room.command([*hub, "--repo", repo, "--folder", str(source)])))
        files = room.command([sys.executable, "-m", "bench._serving.files", GATEWAY, str(INDEX_PORT), str(work / "index")])
        stack.enter_context(listening(files))
        yield Stage(work=work, room=room, folder=folder, endpoints=endpoints, single=single, pair=pair)


def main() -> None:
    """See the module. A scene that fails is told, and the next one begins."""
    from bench._serving.scenes import SCENES

    work, failed = Path(sys.argv[1]), []
    names = sys.argv[2:] or list(SCENES)
    with stage(work) as opened:
        for name in names:
            if name != "end" and time.monotonic() - opened.begun > float(os.environ.get("SECONDS", "inf")):
                opened.say(f"== {name}: skipped, no time is left")
                continue
            opened.say(f"== {name}")
            begun = time.monotonic()
            try:
                SCENES[name](opened)
            except Exception as error:  # noqa: BLE001 - told, and the machine's time goes to the next scene
                failed.append(name)
                opened.keep(name, failed=f"{type(error).__name__}: {error}")
                opened.say(traceback.format_exc())
            opened.keep(name, scene_s=round(time.monotonic() - begun, 1))
            opened.say(f"== {name}: {time.monotonic() - begun:.1f} s{' FAILED' if name in failed else ''}")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
