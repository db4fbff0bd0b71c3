# Functions that set up .venv. launch.sh and test.sh source this file; it runs nothing by itself.
# shellcheck shell=bash
#
# The constraints files list every package with its exact version, so pip resolves nothing and installs the same packages
# next year. A stamp in .venv records what it was made from; if nothing has changed, set-up does nothing. An interrupted
# set-up resumes at the next call.
#
#   PYTHON        the Python for .venv (default: the first of python3.11 to python3.14, python3 with a supported version)
#   TROUPE_EXTRA  cpu or cuda (default: cuda if an NVIDIA driver is present, else cpu)

PYTORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
GIB=$((1024 * 1024 * 1024))
DRIVER_MIN=580 # the oldest driver that runs CUDA 13, for which PyTorch 2.13 is built

# --- messages ---------------------------------------------------------------------------------------------------------

say() { printf 'troupe: %s\n' "$*" >&2; }

refuse() { # what is wrong, how to repair it
    say "cannot set up: $1"
    say "  to repair it: $2"
    return 1
}

# --- checks before any download ---------------------------------------------------------------------------------------

require_platform() { # system machine libc, as of uname -s, uname -m, getconf GNU_LIBC_VERSION
    [[ $1 == Linux && $2 == x86_64 ]] ||
        { refuse "this is $1 on $2, but the packages are built for Linux on x86_64" "use such a machine"; return 1; }
    local name major=0 minor=0
    IFS=' .' read -r name major minor _ <<<"$3"
    [[ $name == glibc && $((major * 1000 + minor)) -ge 2031 ]] ||
        refuse "the C library is '${3:-not glibc}', but the packages need glibc 2.31 or newer" \
            "use a newer system, such as Debian 11, Ubuntu 20.04, RHEL 9 or later"
}

python_fits() { # command; succeeds if it is a Python for which the packages are built
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

find_python() { # prints the command
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3.14 python3; do
        python_fits "$candidate" && { command -v "$candidate"; return; }
        [[ -z ${PYTHON:-} ]] || break
    done
    candidate=${PYTHON:-python3}
    refuse "Troupe needs Python 3.11 to 3.14, but $candidate is $("$candidate" --version 2>/dev/null || echo missing)" \
        "install python3.11, or set PYTHON to a supported Python"
}

require_venv() { # python
    "$1" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        refuse "$1 has no module venv, or no pip for it" "install it; on Debian and Ubuntu: apt-get install python3-venv"
}

require_disk() { # folder free-bytes needed-bytes
    (($2 >= $3)) || refuse "$1 has $(($2 / GIB)) GiB free, but set-up needs $(($3 / GIB)) GiB" \
        "free some space, or move this folder to a larger disk"
}

require_avx2() { # cpuinfo: a file like /proc/cpuinfo
    grep -qwm1 avx2 "$1" || refuse "the processor has no AVX2, which vLLM's CPU build needs" \
        "use a machine with AVX2 (Intel from 2013, AMD from 2015), or one with an NVIDIA GPU"
}

require_driver() { # version-file: /proc/driver/nvidia/version, which may be missing
    [[ -r $1 ]] || return 0
    local version
    version=$(grep -om1 -E '[0-9]{3}\.[0-9]+(\.[0-9]+)?' "$1") || return 0
    ((${version%%.*} >= DRIVER_MIN)) ||
        refuse "the NVIDIA driver is $version, but CUDA 13 needs $DRIVER_MIN or newer" \
            "update the driver, or run without the GPU: TROUPE_EXTRA=cpu"
}

fitting_extra() { # prints cpu or cuda
    local extra=${TROUPE_EXTRA:-}
    if [[ -z $extra ]]; then
        extra=cpu
        # Look for files: nvidia-smi takes seconds if the driver is not loaded. The last file is WSL's.
        [[ ! -e /proc/driver/nvidia/version && ! -e /dev/nvidiactl && ! -e /usr/lib/wsl/lib/libcuda.so.1 ]] || extra=cuda
    fi
    case $extra in
    cpu | cuda) echo "$extra" ;;
    *) refuse "TROUPE_EXTRA is '$extra'" "set it to cpu or cuda, or unset it" ;;
    esac
}

free_bytes() { # folder
    df -PB1 "$1" | awk 'NR == 2 { print $4 }'
}

needed_bytes() { # extra-or-"plain" folder; prints the size of a full install less what the folder holds already
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

stamp_key() { # root extra part; prints a hash of everything that the part is made from
    # Both lists: cuda's pins the plain torch that the extra cpu may fall back to.
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

# --- installation -----------------------------------------------------------------------------------------------------

# Runs a command in the background, so that this script answers Ctrl-C and TERM at once and shows the seconds.
child=
logged() { # log command...
    local log=$1 started=$SECONDS status=0
    shift
    set -m # gives it a process group, so that interrupted() can end all of it
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
    say "interrupted; run the same command again to resume"
    exit "$1"
}

step() { # log what command...
    say "$2"
    logged "$1" "${@:3}" && return
    say "this step failed; the last lines of $1:"
    tail -n 15 "$1" | sed 's/^/    /' >&2
    say "repair that, then run the same command again to resume"
    return 1
}

venv_works() { # venv
    [[ -f $1/pyvenv.cfg ]] && python_fits "$1/bin/python" && "$1/bin/python" -m pip --version >/dev/null 2>&1
}

make_venv() { # venv extra python; leaves a .venv alone that this script did not make
    if [[ -e $1 && ! -f $1/.extra ]]; then
        refuse "$1 exists and was not made by this script" "move it away, and this script makes its own"
        return 1
    fi
    if [[ -e $1 ]] && { ! venv_works "$1" || [[ $(<"$1/.extra") != "$2" ]]; }; then
        say "$1 is incomplete or was made for another extra; making it again"
        rm -rf -- "$1"
    fi
    if [[ ! -e $1 ]]; then
        mkdir -p "$1"
        echo "$2" >"$1/.extra"
        step "$1/setup.log" "making .venv with $("$3" --version)" "$3" -m venv "$1" || return 1
    fi
}

repair_site() { # venv; removes what a killed pip left behind, so that pip installs those packages again
    local info
    for info in "$1"/lib/python3.*/site-packages/*.dist-info; do
        [[ -s $info/RECORD ]] || rm -rf -- "$info" # pip writes RECORD last
    done
    rm -rf -- "$1"/lib/python3.*/site-packages/~* # packages that pip was replacing
}

pip_install() { # venv arguments...
    "$1/bin/python" -m pip --disable-pip-version-check install --no-input --only-binary :all: "${@:2}"
}

# Installs torch's +cpu build, or creates .plain-torch if pip finds none. pip loses seconds for each package on an index
# that does not answer, so it asks PyTorch's index for torch alone, and only if it finds no +cpu build elsewhere (a local
# wheel, a mirror).
install_cpu_torch() { # venv requirement
    local said
    pip_install "$1" --no-deps "$2" && return
    said=$(pip_install "$1" --no-deps --extra-index-url "$PYTORCH_CPU_INDEX" "$2" 2>&1) && return
    echo "$said"
    grep -qE 'No matching distribution found|ResolutionImpossible' <<<"$said" && touch "$1/.plain-torch"
}

# The list of the extra cuda has the same torch, and pins the plain torch's dependencies.
install_torch() { # root
    local venv=$1/.venv log=$1/.venv/setup.log pins=$1/scripts/constraints-cuda.txt torch
    torch=$(grep '^torch==' "$pins") || return 1
    if [[ ! -e $venv/.plain-torch ]]; then
        step "$log" "installing PyTorch's CPU build" install_cpu_torch "$venv" "$torch+cpu" || return 1
        [[ -e $venv/.plain-torch ]] || return 0
        say "pip found no $torch+cpu on its own index or on $PYTORCH_CPU_INDEX"
        say "  installing the plain $torch instead: it runs on the CPU too, but downloads 2.7 GB of CUDA's libraries"
        say "  for the smaller build, make that index reachable, remove $venv and run this command again"
    fi
    require_disk "$1" "$(free_bytes "$1")" "$(needed_bytes plain "$venv")" || return 1
    step "$log" "installing $torch and CUDA's libraries, 2.7 GB" pip_install "$venv" -c "$pins" "$torch" && return
    rm -f -- "$venv/.plain-torch" # the network may be down: let the next call look for the CPU build again
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
    ! all_hold "$@" || return 0 # another call made it while this one waited for the lock
    python=$(find_python) || return 1
    check_machine "$root" "$extra" "$python" || return 1
    make_venv "$root/.venv" "$extra" "$python" || return 1
    repair_site "$root/.venv"
    for part in "${@:3}"; do
        stamp_holds "$root" "$extra" "$part" && continue
        key=$(stamp_key "$root" "$extra" "$part") # computed first: the lists may change during installation
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
        say "some tests will be skipped; to run them too: sudo apt-get install ${missing[*]}"
        return 0
    fi
    trap 'interrupted 130' INT
    trap 'interrupted 143' TERM
    step "$1/.venv/setup.log" "installing ${missing[*]}, for tests" install_programs "${missing[@]}" || return 1
    trap - INT TERM
}

install_programs() { # package...
    # RUNLEVEL=1: apt does not start a broker that it installs
    export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
    apt-get update -q && apt-get install -qy --no-install-recommends "$@"
}

# Installs the parts ("run", "test") of root's .venv that are missing or outdated. It locks this file itself, so no lock file
# remains. A pip that outlives a killed script holds the lock until it ends.
set_up() { # root part...
    local root=$1 extra status=0
    extra=$(fitting_extra) || return 1
    ! all_hold "$root" "$extra" "${@:2}" || return 0
    trap 'interrupted 130' INT
    trap 'interrupted 143' TERM
    exec 9<"$root/scripts/setup.sh"
    if command -v flock >/dev/null && ! flock -n 9; then
        say "waiting for another set-up of this folder"
        logged /dev/null flock 9 || true
    fi
    set_up_locked "$root" "$extra" "${@:2}" || status=1
    exec 9<&-
    trap - INT TERM
    return "$status"
}
