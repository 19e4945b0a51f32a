#!/bin/sh
# Tests `deploy` with vLLM and Ray on a machine with GPUs and no network: each GPU is a node with its own sshd and address.
# docs/howto/gpu-serve.md describes it.
# usage: bench/serve_gpu.sh prepare | take | model | setup | start SCENE... | stop | wait SECONDS | results FOLDER
#
#   CARRIED  the folder with the downloads of `prepare`, in pieces    default: .gpu-serve
#   WORK     the folder for all output on the GPU machine             default: /opt/gracefarm-serve
#   PYTHON   the Python of that machine with torch and transformers   default: python3
#   VERSION  the version of this Python                               default: 3.12
#   THERE    a file with the names of its distributions, one in each line; `prepare` requires it
#   PIECE    the largest size of a piece                              default: 52M
set -eu
top=$(cd "$(dirname "$0")/.." && pwd)
carried=${CARRIED:-$top/.gpu-serve} work=${WORK:-/opt/gracefarm-serve} python=${PYTHON:-python3} version=${VERSION:-3.12}
platforms=$(for number in 39 35 34 31 28 27 24 17 12 5; do echo "--platform manylinux_2_${number}_x86_64"; done
    echo "--platform manylinux2014_x86_64 --platform manylinux1_x86_64")
export PYTHONDONTWRITEBYTECODE=1

# vLLM requires these packages, but does not use them for 16-bit models (dense or with experts). On Hopper, vLLM 0.26.0 prefers its
# Triton kernels (fused_moe/oracle/unquantized.py), and sends tokens between GPUs with NCCL. With flashinfer, tensor parallelism hangs
# in "Capturing CUDA graphs" on a machine without NVLink's multicast.
left_out='flashinfer-python|torchcodec|pynvvideocodec|tilelang|z3-solver|nvidia-cutlass-dsl.*|tokenspeed.*|cuda-tile|cuda-python'
left_out="$left_out|nvidia-cuda-nvcc|nvidia-cuda-crt|nvidia-nvvm|nvidia-cuda-cccl|nvidia-cuda-nvdisasm|nvidia-cudnn-frontend"
left_out="$left_out|humming-kernels|fastapi-cloud-cli|sentry-sdk"

fetch() { # FOLDER REQUIREMENTS...: downloads wheels for the machine with the GPUs
    folder=$1
    shift
    # shellcheck disable=SC2086 # these are lists
    "$top/.venv/bin/python" -m pip download --quiet --disable-pip-version-check --only-binary=:all: --implementation cp \
        --python-version "$version" $platforms --dest "$folder" "$@" 2>/dev/null
}

case "${1-}" in
prepare) # with a network: downloads wheels, sshd, ip and uv; 480 MB in pieces
    rm -rf "$carried.whole" "$carried"
    mkdir -p "$carried.whole/engine" "$carried.whole/others" "$carried.whole/own" "$carried.whole/tools" "$carried"
    whole=$carried.whole uv="$top/.venv/bin/python -m uv"
    printf '%s\n' torch==2.11.0 triton==3.6.0 vllm==0.26.0 'ray[default]' >"$whole/wanted"
    $uv pip compile --quiet --no-config --no-header --no-annotate --only-binary :all: --python-version "$version" \
        --python-platform x86_64-manylinux_2_39 "$whole/wanted" --output-file "$whole/lock"
    sort "${THERE:?a file with names}" >"$whole/there"
    sed 's/[=[].*//' "$whole/lock" | sort | comm -12 - "$whole/there" | grep -vxE "$left_out" >"$whole/names"
    sed 's/[=[].*//' "$whole/lock" | sort | comm -23 - "$whole/there" | grep -vxE "$left_out" >"$whole/missing"
    grep -E "^($(paste -sd'|' "$whole/missing"))(\[[a-z,]*\])?==" "$whole/lock" >"$whole/brought"
    fetch "$whole/engine" --no-deps --requirement "$whole/brought"
    fetch "$whole/others" --no-deps --require-hashes --requirement "$top/deploy/data/download.lock"
    "$top/.venv/bin/python" - "$top/pyproject.toml" >"$whole/own.txt" <<'END'
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
names = project["dependencies"] + project["optional-dependencies"]["deploy"]
print(*(name for name in names if not name.startswith("uv")), sep="\n")  # uv's program is in `home`
END
    fetch "$whole/own" --requirement "$whole/own.txt"
    for wheel in "$whole/own"/*.whl; do # files that are also in `engine` are not copied twice
        [ ! -e "$whole/engine/$(basename "$wheel")" ] || rm "$wheel"
    done
    "$top/bench/_serving/tools.sh" "$whole/tools"
    GRACEFARM_HOME="$whole/home" PYTHONPATH="$top" "$top/.venv/bin/python" -c '
from deploy.rehearsal.walkthrough import _fetch_uv; from gracefarm import settings; _fetch_uv(settings.load())'
    tar -C "$whole" -czf "$whole/small.tar.gz" names own.txt tools home # not the wheels, since they are compressed already
    tar -C "$whole" -cf - small.tar.gz engine others own | split -b "${PIECE:-52M}" -d - "$carried/piece-"
    rm -rf "$whole"
    ls -l "$carried"
    ;;
take) # copies the pieces that have arrived; it can be repeated
    mkdir -p "$work/pieces"
    mv "$carried"/piece-* "$work/pieces/"
    ls "$work/pieces" | tr '\n' ' '
    ;;
model) # writes models, and the results of transformers with one of them, in the background while pieces arrive
    mkdir -p "$work/models"
    cp -r "$top/bench" "$work/"
    setsid -f sh -c "cd $work && exec >model.log 2>&1
        $python -m bench._serving.model make models/${SHAPE:-llama-8b}.part ${SHAPE:-llama-8b} &&
        $python -m bench._serving.model shape models/llama-405b-16 llama-405b 16 &&
        $python -m bench._serving.model shape models/llama-405b-8 llama-405b 8 &&
        $python -m bench._serving.model shape models/llama-405b-32 llama-405b 32 &&
        $python -m bench._serving.model reference models/${SHAPE:-llama-8b}.part reference.json &&
        mv models/${SHAPE:-llama-8b}.part models/llama-8b &&
        $python -m bench._serving.model make models/moe.part moe &&
        $python -m bench._serving.model reference models/moe.part reference-moe.json &&
        mv models/moe.part models/moe; echo \$? >model.rc" </dev/null >/dev/null 2>&1
    ;;
setup) # unpacks the pieces: tools, an index with the carried wheels and those of this machine, the environment of deploy
    cat "$work/pieces"/piece-* | tar -C "$work" -xf -
    tar -C "$work" -xzf "$work/small.tar.gz"
    rm -rf "$work/pieces" "$work/small.tar.gz"
    "$work/tools/install.sh" "$work"
    # Nodes see /usr, but no home folder. So the machine's Python is copied to the folder where the rehearsal expects it.
    if [ ! -x "/usr/bin/python$version" ] && [ ! -x "/usr/local/bin/python$version" ]; then
        mkdir -p "$work/home/rehearsal/python"
        cp -a "$("$python" -c 'import sys; print(sys.base_prefix)')" "$work/home/rehearsal/python/cpython-$version.machine"
    fi
    rm -rf "$work/index"
    (cd "$top" && "$python" -m bench._serving.wheels "$work/engine" "$work/others" "$work/names" "$work/index")
    uv=$(echo "$work"/home/deploy/uv-*)
    chmod +x "$uv"
    "$uv" venv --quiet --clear --no-config --offline --python "$(command -v "$python")" "$work/own-environment"
    "$uv" pip install --quiet --no-config --offline --no-index --find-links "$work/engine" --find-links "$work/own" \
        --python "$work/own-environment/bin/python" --requirement "$work/own.txt"
    for _ in $(seq 300); do [ ! -e "$work/model.rc" ] || break; sleep 1; done
    cat "$work/model.log"
    exit "$(cat "$work/model.rc")"
    ;;
start) # starts the scenes in the background; log: WORK/log, exit code: WORK/rc
    shift
    rm -rf "$work/source" "$work/rc"
    mkdir -p "$work/source"
    cp -r "$top/bench" "$top/deploy" "$top/gracefarm" "$work/source/"
    setsid -f sh -c "echo \$\$ >$work/pid; cd $work/source && GRACEFARM_HOME=$work/home PYTHONPATH=$work/source PATH=$work/own-environment/bin:\$PATH \
        python -u -m bench._serving.run $work $* >>$work/log 2>&1; echo \$? >$work/rc" </dev/null >/dev/null 2>&1
    ;;
stop) # stops the running scenes, with all nodes and their processes
    kill -- "-$(cat "$work/pid")" 2>/dev/null || true
    for _ in $(seq 100); do pgrep -f deploy.rehearsal.room >/dev/null || break; sleep 0.2; done
    ;;
wait) # prints the new lines of the log until the scenes end; exit code 75: they still run after this number of seconds
    begun=$(date +%s)
    offset=$(cat "$work/offset" 2>/dev/null || echo 0)
    while [ ! -e "$work/rc" ] && [ $(($(date +%s) - begun)) -lt "$2" ]; do sleep 1; done
    size=$(stat -c %s "$work/log")
    tail -c +$((offset + 1)) "$work/log" | head -c $((size - offset))
    echo "$size" >"$work/offset"
    [ -e "$work/rc" ] || exit 75
    exit "$(cat "$work/rc")"
    ;;
results) # copies the log, the figures and the bundles to FOLDER
    mkdir -p "$2"
    cp "$work/log" "$work/results.json" "$work"/reference*.json "$2/" 2>/dev/null || true
    cp "$work"/logprobs-*.json "$2/" 2>/dev/null || true
    ls -l "$2"
    ;;
*)
    sed -n '4p' "$0" >&2
    exit 2
    ;;
esac
