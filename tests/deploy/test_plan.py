"""The plan: it is whole, checked against the engine's own options, named by its content, and a script that bash runs."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.nodes import paths
from deploy.nodes.config import Config, OptionsConfig
from deploy.nodes.deployment import Deployment, Node
from deploy.nodes.facts import Facts, NodeFacts
from deploy.planning import engines, hardware, models, options, plans, script, suppose
from deploy.planning.plans import ServePlan
from deploy.planning.shapes import Model
from gracefarm.errors import ConfigError, LayoutError

FIVE_STAGES = {"tensor_parallel": 2, "pipeline_parallel": 5}
COMMIT = "be673f326cab4cd22ccfef76109faf68e41aa5f1"


def llama() -> Model:
    found = models.built_in("meta-llama/Llama-3.1-405B-Instruct", COMMIT)
    assert found
    return found


def supposed(count: int = 10, kind: str = "gh200-96", **data: object) -> tuple[Deployment, Facts]:
    base = Deployment(path=Path("/nowhere/deploy.toml"), data=Config.model_validate(data), nodes=())
    return suppose.suppose(hardware.named(kind), count, base)


def made(count: int = 10, kind: str = "gh200-96", **data: object) -> ServePlan:
    return plans.make(*supposed(count, kind, **data), llama())


def option(arguments: tuple[str, ...], name: str) -> str | None:
    return arguments[arguments.index(name) + 1] if name in arguments else None


@pytest.mark.parametrize(
    ("count", "best", "others"),
    [
        (3, "tp3 pp1", {"tp1 pp3": 253.3}),
        (4, "tp4 pp1", {}),
        (8, "tp4 pp2", {"tp2 pp4": 95.0}),
        (9, "tp3 pp3", {"tp4 pp2": 94.5}),
        (10, "tp5 pp2", {"tp2 pp5": 77.2, "tp1 pp10": 77.2}),
        (12, "tp4 pp3", {"tp2 pp5": 77.2}),
        (16, "tp4 pp3", {"tp8 pp2": 47.3, "tp2 pp5": 77.2}),
    ],
)
def test_the_plan_shows_the_layouts_that_people_know(count: int, best: str, others: dict[str, float]) -> None:
    found = made(count)
    shown = {alternative.layout: alternative.weights_gib for alternative in found.alternatives}
    assert found.layout.name == best
    assert {name: shown.get(name) for name in others} == {name: pytest.approx(gib, abs=0.06) for name, gib in others.items()}


def test_ray_is_told_of_exactly_the_gpus_of_the_layout() -> None:
    """One more, and the engine's placement group may miss its driver."""
    found = made(10, layout={"tensor_parallel": 3, "pipeline_parallel": 3})
    assert sum(int(option(node.ray, "--num-gpus") or 0) for node in found.nodes) == found.layout.world == 9
    assert found.spares == ("k9",)
    assert [node.name for node in found.nodes] == ["k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "k8"]


def test_nodes_are_in_the_engines_rank_order() -> None:
    found = made(10, layout=FIVE_STAGES)
    assert [node.private for node in found.nodes] == [
        "10.0.0.1",
        "10.0.0.10",
        *(f"10.0.0.{number}" for number in range(2, 10)),
    ]
    assert plans.ranks(found)[0] == ("k0", "k9")
    two = made(2, "h100-80x8")
    assert [node.gpus for node in two.nodes] == [8, 8]
    assert plans.ranks(two) == (("k0",) * 8, ("k1",) * 8)


def test_a_node_gives_part_of_its_gpus_where_more_would_be_too_many() -> None:
    found = made(2, "h100-80x8", layout={"tensor_parallel": 6, "pipeline_parallel": 2})
    assert [int(option(node.ray, "--num-gpus") or 0) for node in found.nodes] == [8, 4]


def test_what_ray_workers_need_stands_at_ray_start_of_every_node() -> None:
    found = made(3)
    for node in found.nodes:
        assert node.env["HOST_IP"] == node.private == option(node.ray, "--node-ip-address")
        assert node.env["NCCL_SOCKET_IFNAME"] == node.env["GLOO_SOCKET_IFNAME"] == node.interface
        assert node.env["RAY_AUTH_MODE"] == "token"
        assert node.env["RAY_AUTH_TOKEN_PATH"].endswith(f"/{node.name}/ray-token")
        assert int(node.env["APHRODITE_ENGINE_ITERATION_TIMEOUT_S"]) > 60  # weights come from host memory
    assert "APHRODITE_PP_LAYER_PARTITION" not in found.head.env
    ten = made(10, layout=FIVE_STAGES)
    assert {node.env["APHRODITE_PP_LAYER_PARTITION"] for node in ten.nodes} == {"25,26,25,25,25"}
    assert "APHRODITE_ENGINE_ITERATION_TIMEOUT_S" not in ten.head.env
    tutorial = made(10, layout={"tensor_parallel": 5, "pipeline_parallel": 2})
    assert "APHRODITE_PP_LAYER_PARTITION" not in tutorial.head.env  # 63,63 is the engine's own


def test_the_engine_is_on_the_head_and_on_loopback() -> None:
    found = made(10, ports={"engine": 4242}, layout=FIVE_STAGES)
    assert found.serve[0] == "/shared/gracefarm/llama-405b/env/bin/aphrodite"
    assert found.serve[1:3] == ("run", f"/shared/gracefarm/weights/meta-llama--Llama-3.1-405B-Instruct/{COMMIT}")
    assert option(found.serve, "--host") == "127.0.0.1"
    assert option(found.serve, "--port") == "4242"
    assert (option(found.serve, "--tensor-parallel-size"), option(found.serve, "--pipeline-parallel-size")) == ("2", "5")
    assert found.serve_env["RAY_ADDRESS"] == "10.0.0.1:6379"
    assert found.head.env.items() <= found.serve_env.items()
    assert found.nodes[1].ray[2:4] == ("--address", "10.0.0.1:6379")


def test_long_requests_come_in_chunks_or_their_activations_would_take_the_cache() -> None:
    assert option(made(10).serve, "--max-num-batched-tokens") == "2048"
    assert option(made(10).serve, "--enable-chunked-prefill") == "true"
    short = made(10, layout={"max_model_len": 2000})
    assert "--enable-chunked-prefill" not in short.serve


@pytest.mark.parametrize("count", [3, 8, 10, 16])
def test_every_option_that_is_emitted_exists_in_the_engine(count: int) -> None:
    found = made(count, engine_options={"max-log-len": 0, "uvloop": True})
    options.table("aphrodite-0.6.4.post1").check(found.serve[3:])
    with pytest.raises(ConfigError, match="no option --max-loglen"):
        made(count, engine_options={"max-loglen": 0})


def test_secrets_are_names_only_and_cannot_come_by_deploy_toml() -> None:
    found = made(10)
    assert found.secret_env == ("APHRODITE_API_KEY",)
    for name in ("APHRODITE_API_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN"):
        assert name not in found.serve_env
        with pytest.raises(ConfigError, match="is a secret"):
            made(10, env={name: "x"})
    for name, value in (
        ("AWS_SECRET_ACCESS_KEY", "x"),
        ("aws_session_token", "x"),
        ("MY_PASSWORD", "x"),
        ("NOTE", "hf_" + "AbCd" * 8),
        ("HTTPS_PROXY", "http://user:pw@proxy:3128"),
    ):
        with pytest.raises(ConfigError, match=rf"\[env\] {name} is a secret"):
            made(10, env={name: value})
    for name, value in (
        ("TOKENIZERS_PARALLELISM", "false"),
        ("HF_TOKEN_PATH", "/x"),
        ("VLLM_KEYS", "1"),
        ("MAX_TOKENS", "12"),
    ):
        assert made(10, env={name: value}).nodes[3].env[name] == value
    with pytest.raises(ConfigError, match="is set by the plan"):
        made(10, env={"HOST_IP": "10.0.0.9"})
    assert made(10, env={"NCCL_DEBUG": "INFO"}).nodes[3].env["NCCL_DEBUG"] == "INFO"


def test_vllm_has_its_own_words() -> None:
    found = made(8, engine="vllm")
    assert found.serve[0].endswith("/env/bin/vllm")
    assert found.serve[1] == "serve"
    assert found.secret_env == ("VLLM_API_KEY",)
    assert found.head.env["VLLM_HOST_IP"] == found.head.private
    assert 128 % found.layout.tp == 0
    partition = made(10, engine="vllm", layout={"tensor_parallel": 2}).head.env["VLLM_PP_LAYER_PARTITION"]
    assert sum(map(int, partition.split(","))) == 126


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"swap-space": 4}, "vllm 0.26.0 has no option --swap-space"),
        ({"kv-cache-dtype": "fp9"}, "the value is not allowed"),
        ({"no-enable-chunked-prefill": True}, "the planner's memory model requires its value"),
        ({"uds": "/tmp/x"}, "instead of the port"),
        ({"data_parallel_size": 2}, r"set data_parallel in .layout."),
        ({"hf-token": "x"}, "can read tokens in arguments"),
    ],
)
def test_an_option_that_vllm_does_not_have_or_must_not_be_given_is_refused(option: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        made(8, engine="vllm", engine_options=option)


def test_options_are_those_of_the_version_in_the_lock_of_the_set() -> None:
    newer: dict[str, object] = {"engine": "vllm", "set": "gh200-cu130-torch2.14"}
    own = {"log-level": "WARNING"}
    assert made(8, **newer, engine_options=own).serve[-2:] == ("--log-level", "WARNING")
    with pytest.raises(ConfigError, match=r"vllm 0\.26\.0 has no option --log-level"):
        made(8, engine="vllm", set="gh200-cu130", engine_options=own)
    with pytest.raises(ConfigError, match=r"vllm 0\.33\.0 has no option --calculate-kv-scales"):
        made(8, **newer, engine_options={"calculate-kv-scales": True})
    for name in ("disable-expert-parallel", "device-memory-utilization"):
        with pytest.raises(ConfigError, match=rf"\[engine_options\] {name} is not allowed: set \w+ in"):
            made(8, **newer, engine_options={name: 1})


def test_every_option_that_is_emitted_exists_in_the_newer_vllm_and_the_plan_is_the_same() -> None:
    for launcher in ("ray", "native"):
        data = {**NATIVE, "launcher": launcher}
        older, newer = (made(10, **data, set=name) for name in ("gh200-cu130", "gh200-cu130-torch2.14"))
        options.table("vllm-0.33.0").check(newer.serve[3:])
        assert newer.id == older.id


def test_a_switch_of_vllm_is_said_both_ways() -> None:
    serve = made(8, engine="vllm", engine_options={"enforce-eager": True, "enable-prefix-caching": False}).serve
    assert serve[-2:] == ("--enforce-eager", "--no-enable-prefix-caching")


NATIVE: dict[str, object] = {"engine": "vllm", "launcher": "native", "layout": {"tensor_parallel": 2, "pipeline_parallel": 5}}


def test_without_ray_the_engine_starts_on_every_node_and_finds_its_head() -> None:
    plan = made(10, **NATIVE)
    head, *others = plan.nodes
    assert option(plan.serve, "--distributed-executor-backend") == "mp"
    assert [option(plan.serve, name) for name in ("--nnodes", "--node-rank", "--master-addr")] == ["10", "0", head.private]
    assert "--headless" not in plan.serve
    assert not any(node.ray for node in plan.nodes)
    assert [option(node.engine, "--node-rank") for node in others] == [str(rank) for rank in range(1, 10)]
    for node in others:
        assert node.engine[: len(plan.serve)][:3] == plan.serve[:3]
        assert node.engine[-1] == "--headless"
        assert option(node.engine, "--master-port") == option(plan.serve, "--master-port") == "29500"
        engines.validate(engines.engine("vllm"), node.engine[3:])
    assert not any(name.startswith("RAY_") for node in plan.nodes for name in (*node.env, *plan.serve_env))


def test_the_launcher_is_another_plan_and_rays_has_the_id_that_it_had() -> None:
    ray = made(10, **{**NATIVE, "launcher": "ray"})
    assert ray.id != made(10, **NATIVE).id
    before = ray.model_dump(mode="json", include=plans.RUNS - {"launcher"})
    for name, value in plans.LATER.items():
        if before["layout"][name] == value:
            del before["layout"][name]
    for node in before["nodes"]:
        del node["engine"]
    text = json.dumps(before, sort_keys=True, separators=(",", ":"))
    assert ray.id == hashlib.sha256(text.encode()).hexdigest()


def test_what_starts_with_ray_alone_is_refused_without_it() -> None:
    with pytest.raises(ConfigError, match="aphrodite cannot start on several nodes without Ray"):
        made(10, **{**NATIVE, "engine": "aphrodite"})
    replicas = {"tensor_parallel": 8, "pipeline_parallel": 1, "data_parallel": 2}
    with pytest.raises(LayoutError, match="replicas on several nodes require Ray"):
        made(2, "h200-141x8", engine="vllm", launcher="native", layout=replicas)


def test_nodes_of_different_architectures_are_refused_by_the_plan() -> None:
    deployment, facts = supposed(3, engine="vllm", layout={"tensor_parallel": 1, "pipeline_parallel": 1})
    nodes = (facts.nodes[0], *(node.model_copy(update={"arch": "x86_64"}) for node in facts.nodes[1:]))
    for make in (
        lambda: plans.make(deployment, Facts(nodes=nodes), llama()),
        lambda: plans.trusted(deployment, Facts(nodes=nodes), "org/unknown", COMMIT),
    ):
        with pytest.raises(LayoutError, match=r"different architectures \(aarch64: k0; x86_64: k1, k2\)") as refused:
            make()
        assert refused.value.exit_code == 64


def test_without_ray_every_node_has_the_same_number_of_ranks() -> None:
    with pytest.raises(LayoutError, match="same number of GPUs on all nodes"):
        made(2, "h100-80x8", engine="vllm", launcher="native", layout={"tensor_parallel": 4, "pipeline_parallel": 3})


def test_no_script_of_rays_is_written_for_an_engine_without_it() -> None:
    with pytest.raises(ConfigError, match="--shell"):
        script.render(made(10, **NATIVE))


def test_vllm_looks_for_free_ports_itself() -> None:
    """With VLLM_PORT each of its processes took the same one: EADDRINUSE of Ray's executor on two H200, 2026-11-29."""
    plan = made(10, engine="vllm")
    assert not any("VLLM_PORT" in env for env in (plan.serve_env, *(node.env for node in plan.nodes)))
    assert made(10).nodes[0].env["APHRODITE_PORT"] == "29501"


def change(node: str, **update: object) -> Callable[[Facts], Facts]:
    def changed(facts: Facts) -> Facts:
        return Facts(nodes=tuple(entry.model_copy(update=update) if entry.name == node else entry for entry in facts.nodes))

    return changed


def test_equal_input_gives_an_equal_id_and_whatever_runs_otherwise_another() -> None:
    deployment, facts = supposed(10)
    first = plans.make(deployment, facts, llama())
    assert first.id == plans.make(deployment, facts, llama()).id
    assert ServePlan.model_validate_json(first.model_dump_json()) == first
    others = {
        "revision": plans.make(deployment, facts, llama().at("0" * 40)).id,
        "address": plans.make(deployment, change("k4", private="10.0.0.77")(facts), llama()).id,
        "interface": plans.make(deployment, change("k4", interface="eth1")(facts), llama()).id,
        "user": plans.make(deployment, change("k4", user="other")(facts), llama()).id,
        "nodes": made(9).id,
        "share": made(10, share="/other").id,
        "name": made(10, name="other").id,
        "port": made(10, ports={"ray": 6380}).id,
        "layout": made(10, layout={"max_num_seqs": 3}).id,
        "option": made(10, engine_options={"uvloop": True}).id,
        "env": made(10, env={"A": "b"}).id,
        "local": made(10, local="/tmp/x").id,
    }
    assert len({first.id, *others.values()}) == len(others) + 1


def test_nodes_that_are_asked_while_they_serve_give_the_same_plan() -> None:
    """Or asking would end what runs: the plan would be another one."""
    deployment, facts = supposed(10)
    busy = facts.node("k4").cuda.gpus[0].model_copy(update={"free": 3 << 30})
    cuda = facts.node("k4").cuda.model_copy(update={"gpus": (busy,)})
    serving = change("k4", cuda=cuda, clock_s=1.0, taken=5.0)(facts)
    assert plans.make(deployment, serving, llama()).id == plans.make(deployment, facts, llama()).id
    assert [caution for caution in plans.cautions(serving) if caution.startswith("k4: 3.0 of 95.6 GiB")]
    assert not plans.cautions(facts)


def test_the_id_is_of_what_runs_and_a_price_loads_nothing_anew() -> None:
    found = made(10)
    assert plans.identified(found).id == found.id
    longer = found.layout.model_copy(update={"max_model_len": 17000})
    others: dict[str, object] = {
        **dict.fromkeys(("deployment", "model", "revision"), "other"),
        "engine": "vllm",
        "launcher": "native",
        "layout": longer,
        "nodes": found.nodes[:-1],
        "serve": (*found.serve, "--uvloop"),
        "serve_env": {**found.serve_env, "A": "b"},
        "secret_env": ("OTHER",),
    }
    assert set(others) == plans.RUNS
    for name, other in others.items():
        assert plans.identified(found.model_copy(update={name: other})).id != found.id, name
    dearer = made(10, options={"price_per_node_hour": 3})
    assert dearer.prediction != found.prediction
    assert dearer.id == found.id
    told = {"id", "memory", "prediction", "alternatives", "rejected", "notes", "spares"}
    assert set(ServePlan.model_fields) == plans.RUNS | told  # a new field belongs to one of them


def no_gpu(one: NodeFacts) -> NodeFacts:
    return one.model_copy(
        update={"cuda": one.cuda.model_copy(update={"gpus": (), "error": "cuInit: system not yet initialized (802)"})}
    )


def test_a_node_without_a_gpu_is_left_out_and_named_and_a_head_without_one_is_refused() -> None:
    deployment, facts = supposed(10)
    broken = Facts(nodes=tuple(no_gpu(entry) if entry.name == "k3" else entry for entry in facts.nodes))
    found = plans.make(deployment, broken, llama())
    assert "k3" not in [node.name for node in found.nodes]
    assert any("k3" in note and "802" in note for note in found.notes)
    headless = Facts(nodes=(no_gpu(facts.nodes[0]), *facts.nodes[1:]))
    with pytest.raises(LayoutError, match=r"head has no usable GPU \(cuInit: system not yet initialized \(802\)\)") as error:
        plans.make(deployment, headless, llama())
    assert "in the first place in [[node]] of deploy.toml" in error.value.remedy


def test_a_node_that_was_never_asked_is_no_guess() -> None:
    deployment, facts = supposed(10)
    with pytest.raises(ConfigError, match="no facts of node k9"):
        plans.make(deployment, Facts(nodes=facts.nodes[:-1]), llama())


def test_more_gpus_than_the_node_has_are_refused() -> None:
    deployment, facts = supposed(10)
    greedy = deployment.model_copy(
        update={"nodes": tuple(node.model_copy(update={"gpus": 2}) if node.rank == 2 else node for node in deployment.nodes)}
    )
    with pytest.raises(LayoutError, match=r"gpus is 2 in deploy\.toml, but the node has 1"):
        plans.make(greedy, facts, llama())


def test_a_rehearsal_supposes_the_gpus_that_it_does_not_have() -> None:
    deployment, facts = supposed(10)
    bare = Facts(nodes=tuple(no_gpu(entry) for entry in facts.nodes))
    rehearsal = deployment.model_copy(
        update={"data": deployment.data.model_copy(update={"options": OptionsConfig(rehearsal=True)})}
    )
    found = plans.make(rehearsal, bare, llama())
    assert found.layout == made(10).layout
    assert int(option(found.head.ray, "--object-store-memory") or 0) < 1 << 30  # ten of them on one machine


def test_rays_folder_is_short_enough_for_its_sockets() -> None:
    deployment, _ = supposed(1)
    node = deployment.head
    session = "session_2026-11-24_22-00-12_123456_1234567/sockets/plasma_store.12"
    assert len(f"{paths.ray_temp(deployment, node, 'ubuntu')}/{session}") <= 107
    assert len("x" * paths.RAY_TEMP_BYTES + "/" + session) <= 107
    long, _ = supposed(1, local="/home/{user}/some/folder/that/is/long/{node}")
    with pytest.raises(ConfigError, match="sockets allow"):
        paths.ray_temp(long, node, "ubuntu")


def test_no_share_no_plan() -> None:
    deployment, facts = supposed(10)
    without = deployment.model_copy(update={"data": deployment.data.model_copy(update={"share": None})})
    with pytest.raises(ConfigError, match="the key `share` is missing"):
        plans.make(without, facts, llama())


# the script


def test_bash_reads_the_script_and_it_says_what_the_plan_says() -> None:
    found = made(10, env={"AWKWARD": 'it\'s "quoted" $HOME `id` \\ end'}, engine_options={"chat-template": "a 'b' $c"})
    text = script.render(found, [Node(name="k0", rank=0, address="10.0.0.1", user="ubuntu", port=2222, jump="me@gate")])
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, "-"], input=text, text=True, check=True)
    assert found.id in text
    assert "k0) set -- -p 2222 -J me@gate ubuntu@10.0.0.1" in text
    assert "StrictHostKeyChecking=yes" in text


def test_the_script_runs_what_the_plan_says_with_the_environment_of_the_plan(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Every command, by real bash; stand-ins for ssh (runs it here), curl, ray and the engine (say what they were given)."""
    local = Path(tempfile.mkdtemp(prefix="gf"))  # short, as Ray's folder must be
    request.addfinalizer(lambda: shutil.rmtree(local))
    found = made(3, share=str(tmp_path / "share"), local=str(local), env={"AWKWARD": 'it\'s "quoted" $HOME \\ end'})
    programs = Path(found.serve[0]).parent
    programs.mkdir(parents=True)
    log = tmp_path / "log"
    for name in ("ray", "aphrodite"):
        (programs / name).write_text(f'#!/bin/sh\n{{ echo "== {name}"; env; printf "arg %s\\n" "$@"; }} >>{log}\n')
        (programs / name).chmod(0o755)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "ssh").write_text(
        '#!/bin/bash\nfor last; do :; done\nprintf "%s\\n" "$*" >>'
        + str(tmp_path / "argv")
        + '\numask 022\nexec bash -c "$last"\n'
    )
    (tools / "curl").write_text(
        "#!/bin/sh\ncat >" + str(tmp_path / "curl-stdin") + '\nprintf "%s\\n" "$*" >>' + str(tmp_path / "argv") + "\n"
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    path = tmp_path / "plan.sh"
    path.write_text(script.render(found))
    subprocess.run(
        ["bash", str(path)],
        check=True,
        cwd=tmp_path,
        env={"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(tmp_path)},
        timeout=60,
    )
    for _ in range(100):  # the engine was started in the background
        if "== aphrodite" in log.read_text() and "--max-num-seqs" in log.read_text():
            break
        subprocess.run(["sleep", "0.05"], check=True)
    said = log.read_text()
    key = (tmp_path / ".deploy/script/api-key").read_text()
    assert len(key) == 64
    assert said.count("== ray\n") == 3
    assert f"APHRODITE_API_KEY={key}" in said.split("== aphrodite")[1]
    assert 'AWKWARD=it\'s "quoted" $HOME \\ end\n' in said
    for node in found.nodes:
        assert "".join(f"arg {word}\n" for word in node.ray[1:]) in said
    assert "".join(f"arg {word}\n" for word in found.serve[1:]) in said
    token = (tmp_path / ".deploy/script/ray-token").read_text()
    assert (local / suppose.MARK / "k1" / "ray-token").read_text() == token
    assert (local / suppose.MARK / "k1" / "ray-token").stat().st_mode & 0o077 == 0
    shown = (tmp_path / "argv").read_text()
    assert key not in shown
    assert token not in shown
    assert key in (tmp_path / "curl-stdin").read_text()


def test_paths_are_where_the_steps_put_things(tmp_path: Path) -> None:
    deployment, _ = supposed(1)
    assert paths.environment(deployment) == "/shared/gracefarm/llama-405b/env"
    assert paths.weights(paths.root(deployment), "a/b", COMMIT) == f"/shared/gracefarm/weights/a--b/{COMMIT}"
    assert engines.engine("aphrodite").table == "aphrodite-0.6.4.post1"
