#!/bin/sh
# Compiles recipes on another x86_64 machine that has no network, and continues with the compiled packages at home.
# docs/howto/away.md describes it.
# usage: bench/away.sh prepare RECIPE... | take | start [RECIPE...] | wait SECONDS | results FOLDER | continue FOLDER
#
#   CARRIED  the folder of the pieces: `prepare` writes them, `take` reads them              default: .away
#   WORK     the folder for all files on the other machine                                   default: /tmp/gracefarm-away
#   OPTIONS  options of `builder build`, for `prepare`                                       default: --stack cu130
#   PYTHON   the Python that runs the builder                                                default: .venv/bin/python, else python3
#   VERSION  the version of the other machine's Python, for `prepare`                        default: 3.12
#   PIECE    the largest size of a piece                                                     default: 56M; for `results` 16M
#   LEVEL    the compression level of zstd                                                   default: 9
set -eu
top=$(cd "$(dirname "$0")/.." && pwd)
carried=${CARRIED:-$top/.away} work=${WORK:-/tmp/gracefarm-away} python=${PYTHON:-$top/.venv/bin/python}
[ -n "${PYTHON-}" ] || [ -x "$python" ] || python=python3
export PYTHONDONTWRITEBYTECODE=1

home() { # MODULE ARGUMENTS...: runs the module with the user's GRACEFARM_HOME and GRACEFARM_PROJECT
    PYTHONPATH="$top" "$python" -m "$@"
}

there() { # MODULE ARGUMENTS...: runs the module with the files that `take` has unpacked. The machine's programs are first on PATH
    GRACEFARM_HOME="$work/home" GRACEFARM_PROJECT="$work/project" PYTHONPATH="$top:$work/site" \
        PATH="$PATH:$work/programs/bin" "$python" -m "$@"
}

build_id() { # PLACE RECIPE OPTIONS...
    place=$1
    shift
    plan=$("$place" builder plan "$@") && echo "$plan" | sed -n 's/^build id  //p'
}

names() { sed 1d "$1/request" | cut -d' ' -f1; }

case "${1-}" in
prepare) # at home, with a network: packs all files that a compile reads, in pieces. Large parts that exist already are kept
    shift
    options=${OPTIONS---stack cu130}
    mkdir -p "$carried"
    draft=$(mktemp -d)
    trap 'rm -rf "$draft"' EXIT
    # shellcheck disable=SC2086 # this is a list
    home builder build "$@" $options --until root >"$draft/reads"
    echo "$options" >"$draft/request"
    for recipe in "$@"; do
        # shellcheck disable=SC2086
        id=$(build_id home "$recipe" $options)
        echo "$recipe $id" >>"$draft/request"
    done
    "$python" - "$top/pyproject.toml" >"$draft/own" <<'EOF'
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
print(*project["dependencies"], *project["optional-dependencies"]["builder"], sep="\n")
EOF
    home uv pip install --quiet --no-progress --target "$draft/site" --only-binary :all: --link-mode copy \
        --python-version "${VERSION:-3.12}" --python-platform x86_64-manylinux_2_28 --requirement "$draft/own"
    PIECE=${PIECE:-56M} home bench._away prepare "$carried" "$draft/reads" "$draft/site" "$draft/request"
    ;;
take) # there: unpacks the parts that have arrived completely; exit code 75: pieces are missing
    mkdir -p "$work"
    there bench._away take "$carried" "$work"
    ;;
start) # there: starts the builds in the background; log: WORK/RECIPE.log, exit code: WORK/RECIPE.rc
    shift
    # shellcheck disable=SC2046
    [ $# -gt 0 ] || set -- $(names "$work")
    # Otherwise the kernel divides the cores equally between the builds, and `nice` has no effect.
    echo 0 2>/dev/null >/proc/sys/kernel/sched_autogroup_enabled || true
    for recipe in "$@"; do
        # shellcheck disable=SC2046
        id=$(build_id there "$recipe" $(head -n 1 "$work/request"))
        if ! grep -qx "$recipe $id" "$work/request"; then
            echo "$recipe: the build id differs from that of \`prepare\`, so the two checkouts differ. Copy the checkout to this machine, or" \
                "prepare $recipe again, then repeat the command." >&2
            exit 3
        fi
    done
    for recipe in "$@"; do
        rm -f "$work/$recipe.rc"
        WORK=$work PYTHON=$python setsid -f sh -c '"$0" one "$1" >>"$2/$1.log" 2>&1; echo $? >"$2/$1.rc"' "$0" "$recipe" "$work" \
            </dev/null >/dev/null 2>&1
    done
    ;;
one)
    date -u +%FT%TZ
    # shellcheck disable=SC2046
    there builder build "$2" $(head -n 1 "$work/request") --until compile
    ;;
wait) # there: waits until all builds have ended; exit code 75: a build still runs after this number of seconds
    end=$(($(date +%s) + $2))
    if [ -z "$(find "$work" -maxdepth 1 -name '*.log')" ]; then
        echo "no build was started: run \`$0 start\`" >&2
        exit 2
    fi
    while :; do
        open=
        for log in "$work"/*.log; do [ -e "${log%.log}.rc" ] || open=yes; done
        [ -n "$open" ] && [ "$(date +%s)" -lt "$end" ] || break
        sleep 1
    done
    for log in "$work"/*.log; do
        echo "$(basename "$log" .log): $(cat "${log%.log}.rc" 2>/dev/null || echo running): $(tail -n 1 "$log")"
    done
    [ -z "$open" ] || exit 75
    ;;
results) # there: packs the compiled builds and the caches of the others; later calls with the same folder pack only new files
    mkdir -p "$2"
    PIECE=${PIECE:-16M} there bench._away results "$2" "$work"
    cp "$work"/*.log "$2/" 2>/dev/null || true
    ls -l "$2"
    ;;
continue) # at home: unpacks the results, then finishes the compiled builds. Later builds of other recipes use the unpacked caches
    options=$(head -n 1 "$2/request")
    compiled=$(home bench._away continue "$2")
    for recipe in $compiled; do
        # shellcheck disable=SC2086
        id=$(build_id home "$recipe" $options)
        if ! grep -qx "$recipe $id" "$2/request"; then
            echo "$recipe has changed since \`prepare\`, so the compiled package does not fit. Undo the change, then repeat the command." >&2
            exit 3
        fi
    done
    # shellcheck disable=SC2086
    [ -z "$compiled" ] || home builder build $compiled $options
    ;;
*)
    sed -n '4p' "$0" >&2
    exit 2
    ;;
esac
