"""`deploy init` and `deploy facts`: the nodes, their host keys and their facts."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import click

from deploy.cli.common import DeployContext, reporting
from deploy.fleet import hostkeys
from deploy.fleet.connections import parse_jump
from deploy.fleet.hostkeys import HostKey
from deploy.fleet.probe import probe_nodes
from deploy.fleet.results import combined_error
from deploy.fleet.shells import remote_nodes
from deploy.fleet.ssh import open_fleet
from deploy.nodes import template
from deploy.nodes.config import FILE, Access, ModelConfig
from deploy.nodes.deployment import Deployment, load_deployment
from deploy.nodes.facts import Facts, NodeFacts, differences, keep_facts, load_facts
from deploy.steps import missing
from gracefarm.console import Console
from gracefarm.errors import GracefarmError, SshError

GIB = 1 << 30
_WHICH_SHARE = "Shared folder on the nodes (empty: the network file system that all nodes have mounted)"


def _absolute(share: str) -> str | None:
    """The path of a shared folder; None: none was given. Raises click.BadParameter if the path is not absolute."""
    if share and not share.startswith("/"):
        msg = f"{share} is not an absolute path"
        raise click.BadParameter(msg, param_hint="'--share'")
    return share or None


@click.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option(
    "--user",
    help="User name on the nodes. Default: the user in ~/.ssh/config, else your user name on this machine.",
)
@click.option(
    "--key",
    metavar="PATH",
    help="File with the private ssh key. Default: the key in ~/.ssh/config, the keys of the ssh agent, or the usual files in "
    "~/.ssh.",
)
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    help="Port of the ssh server on the nodes. Default: the port in ~/.ssh/config, else 22.",
)
@click.option("--jump", metavar="[USER@]HOST[:PORT]", help="Host through which ssh reaches the nodes (jump host).")
@click.option(
    "--share",
    metavar="PATH",
    callback=lambda _context, _option, share: _absolute(share or ""),
    help="Folder on the nodes for the software and the model, on a file system that all nodes share. Without this option, "
    "the command asks for the folder. If you give no answer, it uses the network file system that all nodes have mounted.",
)
@click.option(
    "--model",
    metavar="REPO",
    help="Model on the Hugging Face Hub, such as Qwen/Qwen3-32B. Without this option, the command asks for the model. If "
    "there is no terminal, the command uses Llama 3.1 405B.",
)
@click.option(
    "--accept",
    is_flag=True,
    help="Trust new host keys without asking. First run the command without --accept, "
    "and compare the printed fingerprints with those on the nodes.",
)
@click.option(
    "--repin",
    is_flag=True,
    help="Also ask whether to trust host keys that have changed. Without this option, a changed key is an error.",
)
@reporting
def init(
    context: DeployContext,
    file: Path | None,
    user: str | None,
    key: str | None,
    port: int | None,
    jump: str | None,
    share: str | None,
    model: str | None,
    accept: bool,
    repin: bool,
) -> None:
    """Write deploy.toml, trust the nodes' ssh host keys, and collect facts of all nodes.

    FILE is a text file with the address of one machine (node) per line. The first node is the head. On the head, the engine
    (the program that serves the model) accepts requests. The command writes deploy.toml in the working directory, shows the
    ssh host key of each node, and asks whether to trust the keys. Later commands refuse a node with a different host key.
    Facts are, for example, the GPUs, the memory and the network of a node.

    FILE can also be an existing deploy.toml. The command then uses the nodes in this file. Without FILE, it uses the
    deploy.toml in the working directory or in a parent folder. At the end, the command lists everything that is still
    missing for `deploy serve`.

    \b
    # Write deploy.toml for the addresses in ips.txt.
    deploy init ips.txt --user ubuntu --model Qwen/Qwen3-32B
    # Trust all new host keys of the nodes in deploy.toml.
    deploy init deploy.toml --accept
    """
    console = context.console
    if jump is not None:
        parse_jump(jump)
    path = _write(context, file, Access(user=user, key=key, port=port, jump=jump), share, model)
    deployment = load_deployment(path)
    deployment.folder.make()
    lost = _pin(deployment, console, accept=accept, repin=repin)
    there = [node.name for node in deployment.nodes if node.name not in lost]
    asked, silent = _ask(deployment, console, there) if there else (Facts(nodes=()), {})
    if len(asked.nodes) == len(deployment.nodes):
        _propose(deployment, asked, console)
    deployment = load_deployment(path)
    lacking = missing.missing(deployment, asked, os.environ)
    if asked.nodes or console.as_json:
        console.result({**asked.model_dump(mode="json"), "missing": lacking}, table(asked))
    if not console.as_json:  # the JSON result contains them
        for sentence in lacking:
            console.step("missing", sentence)
    if bad := {**lost, **silent}:
        raise combined_error(bad, len(deployment.nodes))
    if not console.as_json:
        ready = "show the plan with `deploy plan`, start the deployment with `deploy serve`"
        console.step("next", "when nothing is missing, run `deploy serve`" if lacking else ready)


def _write(context: DeployContext, file: Path | None, access: Access, share: str | None, model: str | None) -> Path | None:
    """Write deploy.toml, if FILE is a list of addresses. Return its path."""
    if file is None or file.suffix == ".toml":
        path = file or context.file
    else:
        path = context.file or Path.cwd() / FILE
        if model is None and context.console.interactive and not path.exists():
            model = click.prompt("Model on the Hub", default=ModelConfig().repo, err=True)
        if share is None and context.console.interactive and not path.exists():
            share = click.prompt(_WHICH_SHARE, default="", show_default=False, value_proc=_absolute, err=True)
        if template.write_config(file, path, access=access, share=share, repo=model or ModelConfig().repo):
            context.console.step("init", f"{path} written")
            return path
        context.console.step("init", f"{path} exists and is not changed")
    _warn(load_deployment(path), access, {"share": share, "model": model}, context.console)
    return path


def _warn(deployment: Deployment, access: Access, wished: Mapping[str, str | None], console: Console) -> None:
    """Warn about options that have no effect, because deploy.toml exists."""
    data = deployment.data
    there = {**data.nodes.model_dump(), "share": data.share, "model": data.model.repo}
    given = {**access.model_dump(exclude_none=True), **{name: value for name, value in wished.items() if value}}
    for name, value in given.items():
        if there[name] != value:
            console.warn(_ignored(deployment.path, name, value, there[name]))


def _ignored(path: Path, option: str, value: object, before: object) -> str:
    """Why an option has no effect on a deploy.toml that exists, and how to change the value there."""
    key, place = {"share": ("share", "the lines above [nodes]"), "model": ("repo", "[model]")}.get(option, (option, "[nodes]"))
    wanted = f"{key} = {json.dumps(value)}"
    if before is None:
        return f"--{option} ignored: {path} has no `{key}`; add `{wanted}` to {place}"
    return f"--{option} ignored: {path} has `{key} = {json.dumps(before)}`; change it to `{wanted}` in {place}"


def _pin(deployment: Deployment, console: Console, *, accept: bool, repin: bool) -> Mapping[str, GracefarmError]:
    """Pin accepted host keys. Return the errors of nodes that could not be reached."""

    own = Path.home() / ".ssh" / "known_hosts"

    async def look(jumps: bool) -> tuple[list[HostKey], dict[str, GracefarmError]]:
        async with open_fleet(deployment) as nodes:
            chosen = [node for node in deployment.nodes if node.name not in lost]
            return await (hostkeys.look_jumps if jumps else hostkeys.look)(nodes, chosen, own)

    lost: dict[str, GracefarmError] = {}
    told: list[HostKey] = []
    for jumps in (True, False):  # nodes behind a jump host can be reached when its key is trusted
        shown, bad = asyncio.run(look(jumps))
        lost |= bad
        _judge(deployment, console, shown, accept=accept, repin=repin)
        told += [host_key for host_key in shown if host_key.name not in [told_key.name for told_key in told]]
    counts = {word: sum(host_key.status == word for host_key in told) for word in ("pinned", "known", "new", "changed")}
    text = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    console.step("keys", f"{text or 'none'}; in {deployment.folder.known_hosts}")
    return lost


def _judge(deployment: Deployment, console: Console, shown: Sequence[HostKey], *, accept: bool, repin: bool) -> None:
    """Pin known and accepted host keys. Raises SshError if a key has changed or is not accepted."""
    if not repin:
        hostkeys.refuse_changed(shown)
    known = [host_key for host_key in shown if host_key.status == "known"]
    asked = [host_key for host_key in shown if host_key.status in ("new", "changed")]
    for host_key in asked:
        console.event(
            "host_key",
            f"{host_key.name:<24} {host_key.kind} {host_key.fingerprint}",
            name=host_key.name,
            status=host_key.status,
        )
    if asked and not accept:
        _confirm(deployment, console, asked, repin=repin)
    if trusted := [*known, *asked]:
        hostkeys.pin(deployment.folder.known_hosts, [(host_key.name, host_key.key) for host_key in trusted])


def _confirm(deployment: Deployment, console: Console, asked: Sequence[HostKey], *, repin: bool) -> None:
    if console.interactive:
        if click.confirm("Are these the keys that the nodes' consoles show?", err=True):
            return
        raise SshError(
            "the host keys were not accepted",
            remedy="compare the fingerprints with those on the nodes' consoles, then repeat `deploy init`",
        )
    raise SshError(
        f"{len(asked)} host key{' is' if len(asked) == 1 else 's are'} new: "
        + "; ".join(f"{host_key.name} {host_key.fingerprint}" for host_key in asked),
        remedy="run `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` on each node's console, and compare the fingerprints; "
        "then repeat the command with --accept",
        repeat=shlex.join(["deploy", "init", str(deployment.path), *(["--repin"] if repin else []), "--accept"]),
    )


def _ask(deployment: Deployment, console: Console, names: Sequence[str]) -> tuple[Facts, dict[str, GracefarmError]]:
    async def probe() -> tuple[Facts, dict[str, GracefarmError]]:
        async with open_fleet(deployment) as nodes:
            return await probe_nodes(deployment, remote_nodes(nodes, nodes=[deployment.node(name) for name in names]))

    console.step("facts", f"collecting facts of {len(names)} nodes")
    asked, bad = asyncio.run(probe())
    for sentence in _differences(deployment, asked):
        console.warn(f"{sentence}; see the new plan with `deploy plan`")
    keep_facts(deployment, asked)
    return asked, bad


def _differences(deployment: Deployment, asked: Facts) -> Sequence[str]:
    """Changes of the facts; empty if there were none before."""
    try:
        return differences(load_facts(deployment), asked)
    except GracefarmError:
        return ()


def _propose(deployment: Deployment, asked: Facts, console: Console) -> None:
    """Write what the facts of all nodes determine into deploy.toml."""
    architectures = {node.arch for node in asked.nodes}
    if name := template.propose_set(deployment, architectures):
        console.step("set", f"the set {name} has wheels for {', '.join(architectures)}; written to {deployment.path.name}")
    if deployment.data.share is not None:
        return
    if len(asked.shares) == 1 and template.propose_share(deployment, asked.shares[0]):
        console.step(
            "share", f"{asked.shares[0]} is mounted on all nodes from the same source; written to {deployment.path.name}"
        )


@click.command()
@click.option("--kept", is_flag=True, help="Show the facts that are already stored. Do not connect to the nodes.")
@reporting
def facts(context: DeployContext, kept: bool) -> None:
    """Collect and show the facts of all nodes.

    Nodes are the machines in deploy.toml. Facts are, for example, the GPUs, the memory and the network of a node. The
    command stores the facts on this machine.
    `deploy plan` uses them.

    \b
    # Collect the facts of all nodes.
    deploy facts
    # Show the stored facts.
    deploy facts --kept
    """
    deployment = context.deployment
    if kept:
        asked = load_facts(deployment)
        context.console.result(_document(asked), table(asked))
        return
    asked, bad = _ask(deployment, context.console, [node.name for node in deployment.nodes])
    if asked.nodes:
        context.console.result(_document(asked), table(asked))
    if bad:
        raise combined_error(bad, len(deployment.nodes))


def _document(facts: Facts) -> object:
    return facts.model_dump(mode="json")


def table(facts: Facts) -> str:
    """A table with one line per node. Values that are equal on all nodes are shown once below it."""
    head = ("node", "address", "private", "GPU", "free", "host memory", "disk", "clock")
    rows: list[tuple[str, ...]] = [head, *(_row(node) for node in facts.nodes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *_common(facts)])


def _row(node: NodeFacts) -> tuple[str, ...]:
    gpus = node.cuda.gpus
    disk = f"{node.disk.free / GIB:.0f} GiB free" if node.disk else "?"
    return (
        node.name,
        node.address,
        f"{node.private} {node.interface}",
        f"{len(gpus)} x {gpus[0].name}" if gpus else node.cuda.text,
        f"{min(gpu.free for gpu in gpus) / GIB:.1f} of {gpus[0].total / GIB:.1f} GiB" if gpus else "",
        f"{node.memory.available / GIB:.0f} of {node.memory.total / GIB:.0f} GiB",
        disk,
        f"{node.clock_s:+.1f} s",
    )


def _common(facts: Facts) -> list[str]:
    """Machine, system and driver: one line for each value, with its nodes unless all nodes have it."""
    told: dict[str, Callable[[NodeFacts], str]] = {
        "machine": lambda node: f"{node.arch}, {node.cores} cores, {node.page >> 10} KiB pages",
        "system": lambda node: (
            f"kernel {node.kernel}, glibc {node.glibc}, GLIBCXX_{node.glibcxx or '?'}, Python {node.python}"
        ),
        "driver": lambda node: (
            f"{node.driver or 'none'}, CUDA {node.cuda.version_text}" if node.cuda.version else node.cuda.text
        ),
    }
    lines = []
    for name, text in told.items():
        values: dict[str, list[str]] = {}
        for node in facts.nodes:
            values.setdefault(text(node), []).append(node.name)
        lines += [
            f"{name:<8} {value}" + ("" if len(values) == 1 else f"  ({', '.join(who)})") for value, who in values.items()
        ]
    return lines
