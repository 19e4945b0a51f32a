#!/bin/sh
# Builds with --toolchain host on a machine that has a GPU, CUDA, torch and no network, and tries the wheels on that GPU.
# docs/howto/gpu.md says how. usage: bench/gpu.sh prepare [RECIPE...] | setup | start RECIPE... | wait SECONDS | smoke RECIPE... | certify RECIPE... |
# collect FOLDER
#
#   CARRIED  what `prepare` fetched where there is a network        default: .gpu beside the recipes
#   WORK     everything that is made on the machine with the GPU    default: /tmp/gracefarm-gpu
#   PYTHON   the machine's Python that has torch                    default: python3
#   STACK    whose torch and CUDA that machine has                  default: cu130
set -eu
top=$(cd "$(dirname "$0")/.." && pwd)
carried=${CARRIED:-$top/.gpu} work=${WORK:-/tmp/gracefarm-gpu} python=${PYTHON:-python3} stack=${STACK:-cu130}
export UV_CACHE_DIR="$work/uv-cache" UV_PYTHON_DOWNLOADS=never
export GRACEFARM_PROJECT="${GRACEFARM_PROJECT:-$top}" PYTHONPATH="$top" PYTHONDONTWRITEBYTECODE=1

# What the builder needs, as pyproject.toml says, and what the machine's own Python needs to build a wheel. One word each.
reader=$top/.venv/bin/python
[ -x "$reader" ] || reader=$python
builder=$("$reader" - "$top/pyproject.toml" <<'END'
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
print(*(line.replace(" ", "") for line in project["dependencies"] + project["optional-dependencies"]["builder"]))
END
)
own="build setuptools<82 wheel ninja packaging einops nvidia-cuda-cuobjdump>=13.2"

builder() {
    GRACEFARM_HOME="$work/home" PATH="$work/builder/bin:$PATH" "$work/builder/bin/python" -m builder "$@"
}

case "${1-}" in
prepare) # with a network: wheels for Python 3.12 on x86_64, and the recipes' sources; 45 MB
    mkdir -p "$carried/wheels"
    # shellcheck disable=SC2086 # lists on purpose
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
setup) # two environments: the builder's, and over the machine's torch the one that is built against
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
    # Where the machine's Python is a virtual environment itself, the one over it sees no packages of it.
    (cd / && "$python" -c '
import sys
print(*(f"import site; site.addsitedir({path!r})" for path in sys.path if path.endswith("-packages")), sep="\n")') \
        >"$(echo "$work"/own/lib/python*/site-packages)/machine.pth"
    "$work/own/bin/python" -c 'import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available() and torch.cuda.get_device_name())'
    builder plan causal_conv1d --stack "$stack" --toolchain host --environment "$work/own/bin/python"
    ;;
start) # detached: each recipe's log is WORK/RECIPE.log, its end WORK/RECIPE.rc; what was cut off goes on where it was
    shift
    for recipe in "$@"; do
        rm -f "$work/$recipe.rc"
        setsid -f sh -c '"$0" one "$1" >>"$2/$1.log" 2>&1; echo $? >"$2/$1.rc"' "$0" "$recipe" "$work" </dev/null
    done
    ;;
one)
    date -u +%FT%TZ
    builder build "$2" --stack "$stack" --toolchain host --environment "$work/own/bin/python"
    ;;
wait) # until all that was started has ended, or for so many seconds: then 75
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
smoke) # once more on the GPU, apart from the builds
    shift
    for recipe in "$@"; do
        wheel=$(builder show "$recipe" --json | "$python" -c 'import json, sys; print(json.load(sys.stdin)["wheel"]["filename"])')
        builder smoke "$work"/home/builds/*/dist/"$wheel" --stack "$stack" --recipe "$recipe" --gpu \
            --toolchain host --environment "$work/own/bin/python"
    done
    ;;
certify) # the reports that the farm signs: builder certify --accept REPORT
    shift
    for recipe in "$@"; do
        wheel=$(builder show "$recipe" --json | "$python" -c 'import json, sys; print(json.load(sys.stdin)["wheel"]["filename"])')
        builder certify "$work"/home/builds/*/dist/"$wheel" --stack "$stack" --recipe "$recipe" --report "$work/$wheel.gpu.json" \
            --toolchain host --environment "$work/own/bin/python"
    done
    ;;
collect) # records, logs and wheels of what was built
    mkdir -p "$2"
    cp "$work"/*.log "$work"/*.rc "$work"/*.gpu.json "$2/" 2>/dev/null || true
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
    sed -n '2,5p' "$0" >&2
    exit 2
    ;;
esac
