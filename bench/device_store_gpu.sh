#!/bin/sh
# Runs device code out of the store on a GPU: x86_64, sm_90, nvcc 13.0 and its host compiler; neither network nor torch.
# It compiles two units, then compiles them again and with other host code, with device code out of the store, and runs all
# three programs.
# usage: bench/device_store_gpu.sh [FOLDER]
#
#   CUDA    the toolkit with bin/nvcc 13.0 and nvvm/bin/cicc     default: /usr/local/cuda
#   PYTHON  Python 3.9 or newer                                  default: python3
#   SM      the architecture                                     default: 90
set -eu
top=$(cd "$(dirname "$0")/.." && pwd)
cuda=${CUDA:-/usr/local/cuda} python=${PYTHON:-python3} sm=${SM:-90}
work=${1:-$(mktemp -d)}
mkdir -p "$work"
work=$(cd "$work" && pwd)
rm -rf "$work"/device "$work"/passes "$work"/store "$work"/tmp "$work"/notes
data=$top/builder/data/toolchain

# The layout of a sandbox: nvcc by a link, our passes beside it, device.py with its modules.
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
"$cuda/bin/nvcc" --version | grep -q 'release 13\.0' || echo "warning: not CUDA 13.0: cicc runs in one step here" >&2

cp "$top/bench/device_store_gpu.cu" "$work/unit.cu"
cp "$top/bench/device_store_gpu_other.cu" "$work/other.cu"
cd "$work"
# build NAME OPTION...: both units to a program; prints how often each outcome came
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
    sys.exit(f"{sys.argv[1]}: not what the store should give")
END
}
status=0
for mode in whole linked; do
    options=
    [ "$mode" = whole ] || options=-rdc=true
    # shellcheck disable=SC2086 # an option or none
    {
        build "$mode-first" $options -DMODE="\"$mode\""
        build "$mode-again" $options -DMODE="\"$mode\""
        # Other host code: the front end runs, and the optimizer's result and the cubin come from the store.
        build "$mode-other" $options -DMODE="\"$mode\"" -DOTHER_HOST_CODE
    }
    for run in first again other; do
        "./$mode-$run" || status=1
    done
    # assert in device code ends the program's context with cudaErrorAssert.
    "./$mode-again" assert || status=1
done
[ "$status" = 0 ] && echo "all results are right"
exit "$status"
