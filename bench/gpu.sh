#!/bin/sh
# Builds recipes with --toolchain host on a machine that has a GPU, CUDA and torch, but no network, and tests the wheels on that GPU.
# docs/howto/gpu.md describes it. usage: bench/gpu.sh prepare [RECIPE...] | setup | start RECIPE... | wait SECONDS | smoke RECIPE... | certify RECIPE... |
# collect FOLDER; and for the engine: prepare-engine | engine-model | engine-setup | engine [RUN...]
#
#   CARRIED  the folder with the downloads of `prepare`             default: .gpu beside the recipes
#   WORK     the folder for all output on the GPU machine           default: /tmp/gracefarm-gpu
#   PYTHON   the Python of the GPU machine that has torch           default: python3
#   STACK    the stack with the torch and CUDA of that machine      default: cu130
#   OPTIONS  further options of `builder build`                     default: --twin
#   SET      the set whose lock lists the engine's other packages   default: gh200-cu130-aphrodite
set -eu
top=$(cd "$(dirname "$0")/.." && pwd)
carried=${CARRIED:-$top/.gpu} work=${WORK:-/tmp/gracefarm-gpu} python=${PYTHON:-python3} stack=${STACK:-cu130} further=${OPTIONS---twin}
lock=$top/sets/${SET:-gh200-cu130-aphrodite}/requirements.lock
export UV_CACHE_DIR="$work/uv-cache" UV_PYTHON_DOWNLOADS=never
export GRACEFARM_PROJECT="${GRACEFARM_PROJECT:-$top}" PYTHONPATH="$top" PYTHONDONTWRITEBYTECODE=1

# `builder` lists the requirements of the builder (pyproject.toml). Spaces are removed, since each word is one requirement.
# `own` lists the packages that the machine's Python requires to build a wheel.
reader=$top/.venv/bin/python
[ -x "$reader" ] || reader=$python
builder=$("$reader" - "$top/pyproject.toml" <<'END'
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
print(*(line.replace(" ", "") for line in project["dependencies"] + project["optional-dependencies"]["builder"]))
END
)
# torch requires these packages. The machine has torch.
torch='torch|triton|cuda-[a-z]+|nvidia-[cn][a-z0-9-]+'
own="build setuptools<82 wheel ninja packaging einops cmake>=3.26,<4 jinja2 nvidia-cuda-cuobjdump>=13.2"

builder() {
    GRACEFARM_HOME="$work/home" PATH="$work/builder/bin:$PATH" "$work/builder/bin/python" -m builder "$@"
}

# Path of the wheel of a recipe's last build. Other builds have wheels of the same name.
last() {
    builder show "$1" --json | "$python" -c 'import json, sys
last = json.load(sys.stdin)
print(sys.argv[1], last["build_id"], "dist", last["wheel"]["filename"], sep="/")' "$work/home/builds"
}

case "${1-}" in
prepare) # with a network: downloads wheels for Python 3.12 on x86_64, and the sources of the recipes; 75 MB
    mkdir -p "$carried/wheels"
    # shellcheck disable=SC2086 # these are lists
    "$top/.venv/bin/python" -m pip download --quiet --disable-pip-version-check --only-binary=:all: --dest "$carried/wheels" \
        --python-version "${PYTHON_VERSION:-3.12}" --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --platform manylinux_2_12_x86_64 --platform manylinux_2_5_x86_64 $builder $own
    shift
    [ $# -gt 0 ] || set -- causal_conv1d flash_attn_cu130 torch_scatter
    for recipe in "$@"; do
        GRACEFARM_HOME="$carried/home" "$top/.venv/bin/python" -m builder fetch "$recipe" --stack "$stack"
    done
    du -sh "$carried"
    ;;
setup) # creates two environments: one for the builder, and one for the builds, which uses the machine's torch
    mkdir -p "$work/home"
    for part in store git; do
        [ ! -d "$carried/home/$part" ] || cp -r "$carried/home/$part" "$work/home/"
    done
    "$python" -m zipfile -e "$carried"/wheels/uv-*.whl "$work/uv"
    uv=$(echo "$work"/uv/uv-*.data/scripts/uv)
    chmod +x "$uv"
    "$uv" venv --quiet --clear --no-config --offline --python "$(command -v "$python")" "$work/builder"
    "$uv" venv --quiet --clear --no-config --offline --python "$(command -v "$python")" --system-site-packages "$work/own"
    for name in builder own; do
        eval "names=\$$name"
        # shellcheck disable=SC2086
        "$uv" pip install --quiet --no-config --offline --no-index --find-links "$carried/wheels" \
            --python "$work/$name/bin/python" $names
    done
    # If the machine's Python is in a virtual environment, a second environment does not see the packages of the first one.
    (cd / && "$python" -c '
import sys
print(*(f"import site; site.addsitedir({path!r})" for path in sys.path if path.endswith("-packages")), sep="\n")') \
        >"$(echo "$work"/own/lib/python*/site-packages)/machine.pth"
    "$work/own/bin/python" -c 'import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available() and torch.cuda.get_device_name())'
    builder plan causal_conv1d --stack "$stack" --toolchain host --environment "$work/own/bin/python"
    ;;
start) # starts the builds in the background, and continues interrupted ones; log: WORK/RECIPE.log, exit code: WORK/RECIPE.rc
    shift
    for recipe in "$@"; do
        rm -f "$work/$recipe.rc"
        setsid -f sh -c '"$0" one "$1" >>"$2/$1.log" 2>&1; echo $? >"$2/$1.rc"' "$0" "$recipe" "$work" </dev/null
    done
    ;;
one)
    date -u +%FT%TZ
    # shellcheck disable=SC2086 # this is a list
    builder build "$2" --stack "$stack" --toolchain host --environment "$work/own/bin/python" $further
    ;;
wait) # waits until all builds have ended; exit code 75: a build still runs after this number of seconds
    left=$2
    while :; do
        open=
        for log in "$work"/*.log; do [ -f "${log%.log}.rc" ] || open="$open $(basename "$log" .log)"; done
        for log in "$work"/*.log; do
            echo "$(basename "$log" .log): $(cat "${log%.log}.rc" 2>/dev/null || echo running): $(tail -n 1 "$log")"
        done
        [ -n "$open" ] || exit 0
        [ "$left" -gt 0 ] || exit 75
        sleep 20
        left=$((left - 20))
    done
    ;;
smoke) # repeats the GPU tests of built wheels
    shift
    for recipe in "$@"; do
        wheel=$(last "$recipe")
        builder smoke "$wheel" --stack "$stack" --recipe "$recipe" --gpu \
            --toolchain host --environment "$work/own/bin/python"
    done
    ;;
certify) # writes the reports that `builder certify --accept REPORT` reads on the signing machine
    shift
    for recipe in "$@"; do
        wheel=$(last "$recipe")
        builder certify "$wheel" --stack "$stack" --recipe "$recipe" --report "$work/$(basename "$wheel").gpu.json" \
            --toolchain host --environment "$work/own/bin/python"
    done
    ;;
prepare-engine) # with a network: downloads the other wheels of the engine's set, for Python 3.12 on x86_64; 360 MB
    # shellcheck disable=SC2046 # this is a list
    sed -n 's/^\([a-z0-9.-]*==[^ ]*\) --hash.*/\1/p' "$lock" | grep -vE "^($torch)==" |
        "$top/.venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
            --python-version "${PYTHON_VERSION:-3.12}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
            $(for number in 39 35 34 31 28 27 26 25 24 17 12 5; do echo "--platform manylinux_2_${number}_x86_64"; done) \
            --dest "$carried/engine" --requirement /dev/stdin
    du -sh "$carried/engine"
    ;;
engine-model) # writes a small model with random weights, a copy with two exchanged shards, and the results of transformers
    mkdir -p "$work/engine/results"
    cd "$top"
    rm -rf "$work/engine/model" "$work/engine/exchanged"
    "$python" -m bench._serving.model make "$work/engine/model" "${SHAPE:-small}"
    "$python" -m bench._serving.model exchange "$work/engine/model" "$work/engine/exchanged"
    "$python" -m bench._serving.model reference "$work/engine/model" "$work/engine/results/reference.json"
    "$python" -m bench._serving.model greedy "$work/engine/model" "$work/engine/results/greedy.json"
    ;;
engine-setup) # creates an environment with the packages of the set's lock: the machine's torch, and the carried wheels
    uv=$(echo "$work"/uv/uv-*.data/scripts/uv)
    "$uv" venv --quiet --clear --no-config --offline --python "$(command -v "$python")" "$work/engine/environment"
    "$uv" pip install --quiet --no-config --offline --no-index --no-deps --python "$work/engine/environment/bin/python" "$carried"/engine/*.whl
    # shellcheck disable=SC2046
    (cd / && "$python" - "$(echo "$work"/engine/environment/lib/python*/site-packages)" \
        $(sed -n 's/^\([a-z0-9.-]*==[^ ]*\) --hash.*/\1/p' "$lock" | grep -E "^($torch)==") <<'END'
import importlib.metadata, pathlib, sys
site = pathlib.Path(sys.argv[1])
for name, locked in (pin.split("==") for pin in sys.argv[2:]):
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        print(f"{name} is not installed here")
        continue
    if found.version != locked:
        print(f"{name} is {found.version} here, {locked} in the lock")
    root = pathlib.Path(found.locate_file(""))
    for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
        if not (site / top).exists():
            (site / top).symlink_to(root / top)
END
    )
    ;;
engine) # installs the wheels of flash_attn and aphrodite, and compares the engine with transformers, once for each RUN
    shift
    [ $# -gt 0 ] || set -- eager graphs float16 exchanged
    uv=$(echo "$work"/uv/uv-*.data/scripts/uv)
    if [ "${INSTALL-yes}" = yes ]; then
        "$uv" pip install --quiet --no-config --offline --no-index --no-deps --reinstall --python "$work/engine/environment/bin/python" \
            "$work"/home/builds/*/dist/aphrodite_*.whl
    fi
    cd "$top"
    for run in "$@"; do
        model=model options= verb=ask
        case $run in
        eager) options=enforce_eager=true ;;
        float16) options='dtype="float16"' ;;
        tp2) options=tensor_parallel_size=2 ;;
        served) verb=serve ;;
        exchanged) model=exchanged ;;
        esac
        rm -f "$work/engine/results/$run.json"
        # shellcheck disable=SC2086
        HF_HUB_OFFLINE=1 timeout "${LIMIT:-300}" "$work/engine/environment/bin/python" -m bench._serving.engine $verb "$work/engine/$model" \
            "$work/engine/results/$run.json" $options >"$work/engine/results/$run.log" 2>&1 || tail -n 30 "$work/engine/results/$run.log"
    done
    # shellcheck disable=SC2046
    "$python" -m bench._serving.engine compare "$work/engine/results" $(echo "$@" | sed 's/exchanged/--refused exchanged/')
    ;;
collect) # copies the records, logs and wheels of the builds to FOLDER
    mkdir -p "$2"
    cp "$work"/*.log "$work"/*.rc "$work"/*.gpu.json "$2/" 2>/dev/null || true
    [ ! -d "$work/engine/results" ] || cp -r "$work/engine/results" "$2/engine"
    for record in "$work"/home/builds/*/record.json; do
        [ -f "$record" ] || continue
        name=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["recipe"])' "$record")
        mkdir -p "$2/$name"
        cp "$record" "$(dirname "$record")/log.txt" "$2/$name/"
        [ "${WHEELS-yes}" = no ] || cp "$(dirname "$record")"/dist/*.whl "$2/$name/" 2>/dev/null || true
    done
    ls -lR "$2"
    ;;
*)
    sed -n '2,4p' "$0" >&2
    exit 2
    ;;
esac
