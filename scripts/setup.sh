# Sets up .venv for launch.sh and test.sh; sourced by both, runs nothing by itself.
# shellcheck shell=bash
#
# The constraints files list whole closures, so packages are installed one by one as listed, without resolving: what is
# installed today is what is installed next year. A stamp in .venv says what it was made from; while that holds, nothing
# is done. What is interrupted goes on at the next call.
#
#   PYTHON        the Python that .venv is made with (default: the first of python3.11 ... python3.14, python3 that fits)
#   TROUPE_EXTRA  cpu or cuda (default: cuda where an NVIDIA driver is present, else cpu)

PYTORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
GIB=$((1024 * 1024 * 1024))
DRIVER_MIN=580 # the first that runs CUDA 13, which PyTorch 2.13 is built for

# --- what the user sees -----------------------------------------------------------------------------------------------

say() { printf 'troupe: %s\n' "$*" >&2; }

refuse() { # what is missing, how to mend it
    say "cannot set up: $1"
    say "  to mend it: $2"
    return 1
}

# --- what must hold before anything is downloaded ---------------------------------------------------------------------

require_platform() { # system machine libc, as of uname -s, uname -m, getconf GNU_LIBC_VERSION
    [[ $1 == Linux && $2 == x86_64 ]] ||
        { refuse "this is $1 on $2, and the packages are built for Linux on x86_64" "use such a machine"; return 1; }
    local name major=0 minor=0
    IFS=' .' read -r name major minor _ <<<"$3"
    [[ $name == glibc && $((major * 1000 + minor)) -ge 2031 ]] ||
        refuse "the C library is '${3:-not glibc}', and the packages need glibc 2.31 or newer" \
            "use a newer system, such as Debian 11, Ubuntu 20.04, RHEL 9 or later"
}

python_fits() { # command: is it one of the Pythons that the packages are built for?
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

find_python() { # prints the command
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3.14 python3; do
        python_fits "$candidate" && { command -v "$candidate"; return; }
        [[ -z ${PYTHON:-} ]] || break
    done
    candidate=${PYTHON:-python3}
    refuse "Python 3.11 to 3.14 is needed, and $candidate is $("$candidate" --version 2>/dev/null || echo missing)" \
        "install python3.11, or set PYTHON to the one to use"
}

require_venv() { # python
    "$1" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        refuse "$1 has no module venv, or none of its pip" "install it: on Debian and Ubuntu, apt-get install python3-venv"
}

require_disk() { # folder free-bytes needed-bytes
    (($2 >= $3)) || refuse "$1 has $(($2 / GIB)) GiB free, and $(($3 / GIB)) GiB are needed" \
        "free some space, or move this folder to a larger disk"
}

require_avx2() { # cpuinfo: a file like /proc/cpuinfo
    grep -qwm1 avx2 "$1" || refuse "the processor has no AVX2, which vLLM's CPU build needs" \
        "use a machine with AVX2 (Intel from 2013, AMD from 2015), or one with an NVIDIA GPU"
}

require_driver() { # version-file: /proc/driver/nvidia/version, where there is one
    [[ -r $1 ]] || return 0
    local version
    version=$(grep -om1 -E '[0-9]{3}\.[0-9]+(\.[0-9]+)?' "$1") || return 0
    ((${version%%.*} >= DRIVER_MIN)) ||
        refuse "the NVIDIA driver is $version, and CUDA 13 needs $DRIVER_MIN or newer" \
            "update the driver, or run without the GPU: TROUPE_EXTRA=cpu"
}

fitting_extra() { # prints cpu or cuda
    local extra=${TROUPE_EXTRA:-}
    if [[ -z $extra ]]; then
        extra=cpu
        # Files, not nvidia-smi: that takes seconds where the driver is not kept loaded. The last is WSL's.
        [[ ! -e /proc/driver/nvidia/version && ! -e /dev/nvidiactl && ! -e /usr/lib/wsl/lib/libcuda.so.1 ]] || extra=cuda
    fi
    case $extra in
    cpu | cuda) echo "$extra" ;;
    *) refuse "TROUPE_EXTRA is '$extra'" "set it to cpu or cuda, or leave it out" ;;
    esac
}

free_bytes() { # folder
    df -PB1 "$1" | awk 'NR == 2 { print $4 }'
}

needed_bytes() { # extra-or-"plain" folder: what a full install takes, less what the folder holds of it already
    local -A gib=([cpu]=8 [plain]=12 [cuda]=20)
    local held
    held=$(du -sB1 "$2" 2>/dev/null | cut -f1) || held=0
    echo $((gib[$1] * GIB > ${held:-0} ? gib[$1] * GIB - ${held:-0} : 0))
}

check_machine() { # root extra python
    require_platform "$(uname -s)" "$(uname -m)" "$(getconf GNU_LIBC_VERSION 2>/dev/null || true)" || return 1
    require_venv "$3" || return 1
    if [[ $2 == cpu ]]; then
        require_avx2 /proc/cpuinfo || return 1
    else
        require_driver /proc/driver/nvidia/version || return 1
    fi
    require_disk "$1" "$(free_bytes "$1")" "$(needed_bytes "$2" "$1/.venv")"
}

# --- the stamp --------------------------------------------------------------------------------------------------------

stamp_key() { # root extra part: changes with all that the part is made from
    # Both lists: the plain torch of the extra cpu is pinned in cuda's.
    local files=("$1/pyproject.toml" "$1"/scripts/constraints-{cpu,cuda}.txt "$1/.venv/pyvenv.cfg")
    [[ $3 == run ]] || files+=("$1/scripts/constraints-$3.txt")
    { printf '%s\n' "$1" "$2"; cat "${files[@]}" 2>/dev/null; } | sha256sum | cut -d' ' -f1
}

stamp_holds() { # root extra part
    [[ -x $1/.venv/bin/python && -f $1/.venv/.stamp-$3 && $(<"$1/.venv/.stamp-$3") == "$(stamp_key "$@")" ]]
}

all_hold() { # root extra part...
    local root=$1 extra=$2 part
    for part in "${@:3}"; do stamp_holds "$root" "$extra" "$part" || return 1; done
}

write_stamp() { # root part key
    echo "$3" >"$1/.venv/.stamp-$2.new" && mv "$1/.venv/.stamp-$2.new" "$1/.venv/.stamp-$2"
}

# --- the work ---------------------------------------------------------------------------------------------------------

# Runs a command in the background, so that Ctrl-C and TERM are answered at once and the seconds can be shown.
child=
logged() { # log command...
    local log=$1 started=$SECONDS status=0
    shift
    set -m # its own process group, so that all of it can be ended
    "$@" >>"$log" 2>&1 </dev/null &
    child=$!
    set +m
    while kill -0 "$child" 2>/dev/null; do
        sleep 0.1
        [[ ! -t 2 ]] || printf '\r        %d s ' $((SECONDS - started)) >&2
    done
    [[ ! -t 2 ]] || printf '\r                \r' >&2
    wait "$child" || status=$?
    child=
    return "$status"
}

interrupted() { # exit-status
    trap - INT TERM
    [[ -z $child ]] || kill -- "-$child" 2>/dev/null || true
    [[ ! -t 2 ]] || echo >&2
    say "interrupted; the same command goes on from here"
    exit "$1"
}

step() { # log what command...
    say "$2"
    logged "$1" "${@:3}" && return
    say "that failed; the last lines of $1:"
    tail -n 15 "$1" | sed 's/^/    /' >&2
    say "the same command goes on from here once that is mended"
    return 1
}

venv_works() { # venv
    [[ -f $1/pyvenv.cfg ]] && python_fits "$1/bin/python" && "$1/bin/python" -m pip --version >/dev/null 2>&1
}

make_venv() { # venv extra python: what is there and is not ours is left alone
    if [[ -e $1 && ! -f $1/.extra ]]; then
        refuse "$1 is there and was not made by this script" "move it away; Troupe makes its own"
        return 1
    fi
    if [[ -e $1 ]] && { ! venv_works "$1" || [[ $(<"$1/.extra") != "$2" ]]; }; then
        say "what is in $1 is half made, or made for another extra: starting afresh"
        rm -rf -- "$1"
    fi
    if [[ ! -e $1 ]]; then
        mkdir -p "$1"
        echo "$2" >"$1/.extra"
        step "$1/setup.log" "making .venv with $("$3" --version)" "$3" -m venv "$1" || return 1
    fi
}

mend_site() { # venv: drops what a killed pip left, so that pip installs those packages again
    local info
    for info in "$1"/lib/python3.*/site-packages/*.dist-info; do
        [[ -s $info/RECORD ]] || rm -rf -- "$info" # pip writes RECORD last
    done
    rm -rf -- "$1"/lib/python3.*/site-packages/~* # what pip was replacing
}

pip_install() { # venv arguments...
    "$1/bin/python" -m pip --disable-pip-version-check install --no-input --only-binary :all: "${@:2}"
}

# Installs torch's +cpu build, or notes in .plain-torch that pip knows of none. An index that does not answer costs pip
# seconds for each package, so PyTorch's own is asked for torch alone, and only if pip finds no such build without it (a
# local wheel, a mirror).
install_cpu_torch() { # venv requirement
    local said
    pip_install "$1" --no-deps "$2" && return
    said=$(pip_install "$1" --no-deps --extra-index-url "$PYTORCH_CPU_INDEX" "$2" 2>&1) && return
    echo "$said"
    grep -qE 'No matching distribution found|ResolutionImpossible' <<<"$said" && touch "$1/.plain-torch"
}

# The extra cuda has the same torch in its list, so the pins of the plain torch's dependencies are there.
install_torch() { # root
    local venv=$1/.venv log=$1/.venv/setup.log pins=$1/scripts/constraints-cuda.txt torch
    torch=$(grep '^torch==' "$pins") || return 1
    if [[ ! -e $venv/.plain-torch ]]; then
        step "$log" "installing PyTorch's CPU build" install_cpu_torch "$venv" "$torch+cpu" || return 1
        [[ -e $venv/.plain-torch ]] || return 0
        say "pip found no $torch+cpu, neither on its own index nor on $PYTORCH_CPU_INDEX"
        say "  $torch is installed instead: it runs on the CPU, too, but brings CUDA's libraries, 2.7 GB to download"
        say "  for the smaller build: make that index reachable, remove $venv, and call this again"
    fi
    require_disk "$1" "$(free_bytes "$1")" "$(needed_bytes plain "$venv")" || return 1
    step "$log" "installing $torch and CUDA's libraries, 2.7 GB" pip_install "$venv" -c "$pins" "$torch" && return
    rm -f -- "$venv/.plain-torch" # perhaps nothing could be reached at all: the next call looks for the CPU build again
    return 1
}

install_run() { # root extra
    local venv=$1/.venv list=$1/scripts/constraints-$2.txt log=$1/.venv/setup.log
    [[ $2 != cpu ]] || install_torch "$1" || return 1
    step "$log" "installing vLLM and what it needs, $(grep -c == "$list") packages" \
        pip_install "$venv" --no-deps -r "$list" || return 1
    step "$log" "installing Troupe itself" \
        "$venv/bin/python" -m pip --disable-pip-version-check install --no-input --no-deps --no-build-isolation \
        -e "$1" || return 1
}

install_part() { # root extra part
    if [[ $3 == run ]]; then
        install_run "$1" "$2"
    else
        step "$1/.venv/setup.log" "installing the $3 tools" \
            pip_install "$1/.venv" --no-deps -r "$1/scripts/constraints-$3.txt"
    fi
}

set_up_locked() { # root extra part...
    local root=$1 extra=$2 python part key
    ! all_hold "$@" || return 0 # another call made it while this one waited
    python=$(find_python) || return 1
    check_machine "$root" "$extra" "$python" || return 1
    make_venv "$root/.venv" "$extra" "$python" || return 1
    mend_site "$root/.venv"
    for part in "${@:3}"; do
        stamp_holds "$root" "$extra" "$part" && continue
        key=$(stamp_key "$root" "$extra" "$part") # before: the lists may change while they are installed
        install_part "$root" "$extra" "$part" && write_stamp "$root" "$part" "$key" || return 1
    done
    say "ready after $SECONDS s"
}

# What the tests drive for real: a broker and a browser, from the system's packages. Where they cannot be installed, the
# tests that need them are skipped, and say so.
TEST_PROGRAMS="mosquitto chromium"

set_up_programs() { # root
    local missing=() name
    for name in $TEST_PROGRAMS; do PATH=$PATH:/usr/sbin command -v "$name" >/dev/null || missing+=("$name"); done
    ((${#missing[@]})) || return 0
    if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
        say "some tests will be skipped; to run them, too: sudo apt-get install ${missing[*]}"
        return 0
    fi
    trap 'interrupted 130' INT
    trap 'interrupted 143' TERM
    step "$1/.venv/setup.log" "installing ${missing[*]}, for tests" install_programs "${missing[@]}" || return 1
    trap - INT TERM
}

install_programs() { # package...
    # RUNLEVEL=1: a broker that a package brings is not started
    export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
    apt-get update -q && apt-get install -qy --no-install-recommends "$@"
}

# Makes the parts ("run", "test") of root's .venv hold. The lock is this file's own, so nothing is left behind; a pip that
# outlives a killed script holds it until it ends.
set_up() { # root part...
    local root=$1 extra status=0
    extra=$(fitting_extra) || return 1
    ! all_hold "$root" "$extra" "${@:2}" || return 0
    trap 'interrupted 130' INT
    trap 'interrupted 143' TERM
    exec 9<"$root/scripts/setup.sh"
    if command -v flock >/dev/null && ! flock -n 9; then
        say "another call is setting up; waiting for it"
        logged /dev/null flock 9 || true
    fi
    set_up_locked "$root" "$extra" "${@:2}" || status=1
    exec 9<&-
    trap - INT TERM
    return "$status"
}
