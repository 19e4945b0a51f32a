#!/bin/sh
# Tests on a GPU that device code from the store computes correct results. It requires x86_64, sm_90, nvcc 13.0 and a host compiler,
# but neither a network nor torch. It compiles two units, compiles them again, and compiles them with different host code. The second
# and the third compile get device code from the store. Then it runs all three programs.
# usage: bench/device_store_gpu.sh [FOLDER]
#
#   CUDA    the CUDA 13.0 toolkit (bin/nvcc, nvvm/bin/cicc)      default: /usr/local/cuda
#   PYTHON  Python 3.9 or newer                                  default: python3
#   SM      the GPU's architecture                               default: 90
set -eu
top=$(cd "$(dirname "$0")/.." && pwd)
cuda=${CUDA:-/usr/local/cuda} python=${PYTHON:-python3} sm=${SM:-90}
work=${1:-$(mktemp -d)}
mkdir -p "$work"
work=$(cd "$work" && pwd)
rm -rf "$work"/device "$work"/passes "$work"/store "$work"/tmp "$work"/notes
data=$top/builder/data/toolchain

# The folders are as in a sandbox: a link to nvcc, our passes beside it, and device.py with its modules.
modules=$work/device/builder/data/toolchain
mkdir -p "$modules" "$work/passes" "$work/store" "$work/tmp"
cp "$data/device.py" "$work/device/__main__.py"
cp "$data/bitcode.py" "$data/device_store.py" "$modules/"
for program in "$cuda"/bin/*; do
    [ "$(basename "$program")" = nvcc.profile ] || ln -sf "$program" "$work/passes/"
done
for name in cudafe++ cicc ptxas fatbinary; do
    rm -f "$work/passes/$name"
    cp "$data/pass" "$work/passes/$name"
    chmod +x "$work/passes/$name"
done
sed -e "s|\$(_HERE_)|$cuda/bin|g" -e "s|^CICC_PATH.*|CICC_PATH = $work/passes|" "$cuda/bin/nvcc.profile" >"$work/passes/nvcc.profile"
printf '\nPATH += %s:\n' "$work/passes" >>"$work/passes/nvcc.profile"

export GRACEFARM_DEVICE="$python -I -S $work/device" GRACEFARM_NVCC="$work/passes/nvcc" GRACEFARM_CUDA=13.0
export GRACEFARM_DEVICE_STORE="$work/store" GRACEFARM_DEVICE_NOTES="$work/notes" TMPDIR="$work/tmp"
GRACEFARM_DEVICE_COMPILERS=$(sha256sum "$cuda/nvvm/bin/cicc" "$cuda/bin/ptxas" | sha256sum | cut -c1-64)
export GRACEFARM_DEVICE_COMPILERS

"$cuda/bin/nvcc" --version | tail -2
nvidia-smi --query-gpu=name,compute_cap --format=csv,noheader || true
"$cuda/bin/nvcc" --version | grep -q 'release 13\.0' || echo "warning: this is not CUDA 13.0, so cicc runs in one step" >&2

cp "$top/bench/device_store_gpu.cu" "$work/unit.cu"
cp "$top/bench/device_store_gpu_other.cu" "$work/other.cu"
cd "$work"
# build NAME OPTION...: compiles both units to a program, and prints the number of passes for each outcome
build() {
    name=$1
    shift
    rm -f notes
    "$work/passes/nvcc" -O2 -std=c++17 -arch="sm_$sm" "$@" unit.cu other.cu -o "$name"
    "$python" - "$name" <<'END'
import collections, json, sys
notes = [json.loads(line) for line in open("notes")]
counts = collections.Counter(note["outcome"] for note in notes if note["pass"] != "fatbinary")
print(f"{sys.argv[1]}: passes {dict(counts)}")
found = sum(counts[name] for name in ("text", "nvvm", "ptx"))
wanted = sys.argv[1].partition("-")[2]
if wanted == "first" and found or wanted in ("again", "other") and counts["miss"]:
    sys.exit(f"{sys.argv[1]}: the store should give other outcomes")
END
}
status=0
for mode in whole linked; do
    options=
    [ "$mode" = whole ] || options=-rdc=true
    # shellcheck disable=SC2086 # there is one option, or there are none
    {
        build "$mode-first" $options -DMODE="\"$mode\""
        build "$mode-again" $options -DMODE="\"$mode\""
        # The host code differs. So the front end runs, and the optimizer's result and the cubin come from the store.
        build "$mode-other" $options -DMODE="\"$mode\"" -DOTHER_HOST_CODE
    }
    for run in first again other; do
        "./$mode-$run" || status=1
    done
    # A failed assert in device code ends the program's CUDA context with cudaErrorAssert.
    "./$mode-again" assert || status=1
done
[ "$status" = 0 ] && echo "all results are right"
exit "$status"
