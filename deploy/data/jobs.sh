# Run by deploy.fleet.jobs on a node, to start, follow and stop a detached job. It needs POSIX sh, util-linux, coreutils and grep.
# $1: start|status|follow|stop. $2: the job's folder. $3: its mark. The functions describe the other arguments.
set -u
umask 077
d=$2 mark=$3
boot=$(cat /proc/sys/kernel/random/boot_id)

# State, parent, group, session, …, start time (20th) of a process. The name in brackets may contain any characters.
stat_of() {
    IFS= read -r line 2>/dev/null <"/proc/$1/stat" || return 1
    printf '%s\n' "${line##*) }"
}

# Whether the job's leader is alive: same process id, start time and boot. A zombie counts as dead.
alive() {
    read -r pid start of 2>/dev/null <"$d/pid" || return 1
    [ "$of" = "$boot" ] || return 1
    # shellcheck disable=SC2046 # fields on purpose
    set -- $(stat_of "$pid") && [ $# -ge 20 ] && [ "$1" != Z ] && [ "${20}" = "$start" ]
}

# Process ids with the job's mark.
marked() {
    grep -lsxzF "GRACEFARM_MARK=$mark" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3
}

# Sessions of the job: those of its leader and of all processes with its mark.
sessions() {
    ! alive || echo "$pid"
    marked | while read -r one; do
        # shellcheck disable=SC2046
        set -- $(stat_of "$one") && [ $# -ge 4 ] && echo "$4"
    done
}

# Process ids of the job: all with its mark, and all in the sessions $1. A program that sets its title, such as Ray, overwrites
# the environment that the kernel shows, and loses the mark. Zombies are ignored.
members() {
    {
        marked
        for one in /proc/[0-9]*; do
            IFS= read -r line 2>/dev/null <"$one/stat" || continue
            number=${one#/proc/}
            # shellcheck disable=SC2086
            set -- "$1" ${line##*) }
            case " $1 " in *" $5 "*) echo "$number" ;; esac
        done
    } 2>/dev/null | sort -un | while read -r one; do
        case $(stat_of "$one") in '' | Z*) ;; *) echo "$one" ;; esac
    done
}

# Check that the job's folder has room. A job would be lost if its log and process id could not be written.
room() {
    problem=$(LC_ALL=C head -c 65536 /dev/zero 2>&1 >"$d/room") || problem=${problem:-cannot be written}
    rm -f "$d/room"
    [ -z "$problem" ] || {
        echo "$d: ${problem##*: }" >&2
        exit 73
    }
}

# $4: command. $5: this deployment's folder on the node. stdin: lines NAME=VALUE, a line with a dot, then the job's stdin.
start() {
    mkdir -p "$d" || exit 73
    if [ ! -O "$5" ] || [ -L "$5" ]; then
        echo "$5 belongs to another user" >&2
        exit 73
    fi
    exec 9>"$d/lock"
    flock -w 20 9 || exit 75
    if alive; then
        cat >/dev/null
        echo "running $pid $start"
        return
    fi
    room
    while IFS= read -r line && [ "$line" != . ]; do export "${line?}"; done
    LC_ALL=C cat >"$d/input" || exit 73
    rm -f "$d/exit" "$d/pid"
    [ ! -f "$d/log" ] || mv -f "$d/log" "$d/log.old"
    : >"$d/log"
    # shellcheck disable=SC2016 # expanded by the inner shell
    GRACEFARM_MARK=$mark setsid sh -c '
        d=$1 command=$2 boot=$3
        exec 3<"$d/input"
        rm -f "$d/input"
        line=$(cat /proc/$$/stat) # by another process, since qemu-user gives a wrong start time to a process that reads its own
        set -- ${line##*) }
        echo "$$ ${20} $boot" >"$d/pid.new"
        mv "$d/pid.new" "$d/pid"
        sh -c "$command" <&3 3<&-
        echo $? >"$d/exit.new"
        mv "$d/exit.new" "$d/exit"
    ' gracefarm-job "$d" "$4" "$boot" </dev/null >>"$d/log" 2>&1 9>&- &
    tries=0
    while [ ! -s "$d/pid" ] && [ $tries -lt 400 ]; do
        sleep 0.05
        tries=$((tries + 1))
    done
    read -r pid start of <"$d/pid" || exit 71
    echo "started $pid $start"
}

# Print running PID | exited CODE | stopped | lost | absent, then the size of the log.
status() {
    if [ ! -f "$d/pid" ]; then
        echo "absent - 0"
        return
    fi
    size=$(wc -c <"$d/log")
    if alive; then
        echo "running $pid $size"
    elif [ -f "$d/exit" ]; then
        read -r code <"$d/exit"
        case $code in stopped) echo "stopped - $size" ;; *) echo "exited $code $size" ;; esac
    else
        echo "lost - $size"
    fi
}

# $4: bytes of the log that the caller already has. Ends when the job has ended and the log is complete.
follow() {
    [ -f "$d/log" ] || return 0
    if alive; then
        exec tail -c "+$(($4 + 1))" -f -s 0.2 --pid="$pid" "$d/log"
    fi
    exec tail -c "+$(($4 + 1))" "$d/log"
}

# $4: seconds between TERM and KILL. Prints the processes that are left, and fails if there are any.
stop() {
    known=$(sessions | sort -un | tr '\n' ' ')
    left=$(members "$known")
    # shellcheck disable=SC2086 # words on purpose
    [ -z "$left" ] || kill -TERM $left 2>/dev/null
    ticks=0
    while left=$(members "$known") && [ -n "$left" ] && [ $ticks -lt $(($4 * 5)) ]; do
        sleep 0.2
        ticks=$((ticks + 1))
    done
    ticks=0
    while left=$(members "$known") && [ -n "$left" ] && [ $ticks -lt 25 ]; do
        # shellcheck disable=SC2086
        kill -KILL $left 2>/dev/null
        sleep 0.2
        ticks=$((ticks + 1))
    done
    rm -f "$d/input" # an interrupted start may have left it
    [ ! -f "$d/pid" ] || echo stopped >"$d/exit"
    # shellcheck disable=SC2086
    [ -z "$left" ] || echo $left
    [ -z "$left" ]
}

"$1" "$@"
