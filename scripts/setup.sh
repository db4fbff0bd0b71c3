# Functions that set up .venv, for launch.sh and test.sh, which source this file. It runs nothing by itself.
# shellcheck shell=bash
#
# The constraints files list every package with its exact version. pip installs them without resolving, so the same
# versions are installed next year. A stamp in .venv records what it was made from. While the stamp is current, a call
# does nothing. The next call resumes an interrupted one.
#
#   PYTHON        the Python to make .venv with (default: the first suitable of python3.11 ... python3.14, python3)
#   TROUPE_EXTRA  cpu or cuda (default: cuda if an NVIDIA driver is present, else cpu)

PYTORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
GIB=$((1024 * 1024 * 1024))
DRIVER_MIN=580 # the first that runs CUDA 13, which PyTorch 2.13 is built for

# --- what the user sees -----------------------------------------------------------------------------------------------

say() { printf 'troupe: %s\n' "$*" >&2; }

refuse() { # problem, fix
    say "cannot set up: $1"
    say "  to fix it: $2"
    return 1
}

# --- checks before anything is downloaded -----------------------------------------------------------------------------

require_platform() { # system machine libc, as of uname -s, uname -m, getconf GNU_LIBC_VERSION
    [[ $1 == Linux && $2 == x86_64 ]] ||
        { refuse "this is $1 on $2, but the packages are built for Linux on x86_64" "use such a machine"; return 1; }
    local name major=0 minor=0
    IFS=' .' read -r name major minor _ <<<"$3"
    [[ $name == glibc && $((major * 1000 + minor)) -ge 2031 ]] ||
        refuse "the C library is '${3:-not glibc}', but the packages need glibc 2.31 or newer" \
            "use a newer system, such as Debian 11, Ubuntu 20.04, RHEL 9 or later"
}

python_fits() { # command: true if the packages are built for this Python
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
        "install python3.11, or set PYTHON to a suitable one"
}

require_venv() { # python
    "$1" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        refuse "$1 lacks the module venv or ensurepip" "install it; on Debian and Ubuntu: apt-get install python3-venv"
}

require_disk() { # folder free-bytes needed-bytes
    (($2 >= $3)) || refuse "$1 has $(($2 / GIB)) GiB free, but $(($3 / GIB)) GiB are needed" \
        "free some space, or move this folder to a larger disk"
}

require_avx2() { # cpuinfo: a file like /proc/cpuinfo
    grep -qwm1 avx2 "$1" || refuse "the processor has no AVX2, which vLLM's CPU build needs" \
        "use a machine with AVX2 (Intel from 2013, AMD from 2015), or one with an NVIDIA GPU"
}

require_driver() { # version-file: /proc/driver/nvidia/version, which exists only with a driver
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
        # nvidia-smi takes seconds if the driver is not kept loaded, so look for files. The last one is WSL's.
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

needed_bytes() { # extra-or-"plain" folder: size of a full installation less what the folder already holds
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

stamp_key() { # root extra part: a hash of everything that the part is made from
    # Both lists, because the extra cpu can fall back to the plain torch, which is pinned in the list of cuda.
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

# Run a command in the background, so that INT and TERM take effect at once and the elapsed time can be shown.
child=
logged() { # log command...
    local log=$1 started=$SECONDS status=0
    shift
    set -m # a process group of its own, so that all of its processes can be killed
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
    say "this failed; the last lines of $1:"
    tail -n 15 "$1" | sed 's/^/    /' >&2
    say "fix this, then run the same command again to resume"
    return 1
}

venv_works() { # venv
    [[ -f $1/pyvenv.cfg ]] && python_fits "$1/bin/python" && "$1/bin/python" -m pip --version >/dev/null 2>&1
}

make_venv() { # venv extra python: refuses to replace an environment that this script did not make
    if [[ -e $1 && ! -f $1/.extra ]]; then
        refuse "$1 exists and was not made by this script" "move it away; Troupe makes its own"
        return 1
    fi
    if [[ -e $1 ]] && { ! venv_works "$1" || [[ $(<"$1/.extra") != "$2" ]]; }; then
        say "$1 is incomplete or was made for the other extra; making a new one"
        rm -rf -- "$1"
    fi
    if [[ ! -e $1 ]]; then
        mkdir -p "$1"
        echo "$2" >"$1/.extra"
        step "$1/setup.log" "making .venv with $("$3" --version)" "$3" -m venv "$1" || return 1
    fi
}

repair_site() { # venv: removes what a killed pip left, so that pip installs those packages again
    local info
    for info in "$1"/lib/python3.*/site-packages/*.dist-info; do
        [[ -s $info/RECORD ]] || rm -rf -- "$info" # pip writes RECORD last
    done
    rm -rf -- "$1"/lib/python3.*/site-packages/~* # packages that pip was replacing
}

pip_install() { # venv arguments...
    "$1/bin/python" -m pip --disable-pip-version-check install --no-input --only-binary :all: "${@:2}"
}

# Install torch's +cpu build, or record in .plain-torch that pip finds none. An index that does not answer costs pip
# seconds for each package. So PyTorch's own index is used for torch alone, and only if pip finds no such build without it
# (a local wheel, a mirror).
install_cpu_torch() { # venv requirement
    local output
    pip_install "$1" --no-deps "$2" && return
    output=$(pip_install "$1" --no-deps --extra-index-url "$PYTORCH_CPU_INDEX" "$2" 2>&1) && return
    echo "$output"
    grep -qE 'No matching distribution found|ResolutionImpossible' <<<"$output" && touch "$1/.plain-torch"
}

# The list of the extra cuda has the same torch, and therefore the pins of the plain torch's dependencies.
install_torch() { # root
    local venv=$1/.venv log=$1/.venv/setup.log pins=$1/scripts/constraints-cuda.txt torch
    torch=$(grep '^torch==' "$pins") || return 1
    if [[ ! -e $venv/.plain-torch ]]; then
        step "$log" "installing PyTorch's CPU build" install_cpu_torch "$venv" "$torch+cpu" || return 1
        [[ -e $venv/.plain-torch ]] || return 0
        say "pip found no $torch+cpu on its own index or on $PYTORCH_CPU_INDEX"
        say "  installing $torch instead: it also runs on the CPU, but brings CUDA's libraries, 2.7 GB to download"
        say "  for the smaller build, make that index reachable, remove $venv, and run this again"
    fi
    require_disk "$1" "$(free_bytes "$1")" "$(needed_bytes plain "$venv")" || return 1
    step "$log" "installing $torch and CUDA's libraries, 2.7 GB" pip_install "$venv" -c "$pins" "$torch" && return
    rm -f -- "$venv/.plain-torch" # perhaps no index is reachable; the next call looks for the CPU build again
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
    ! all_hold "$@" || return 0 # another call set it up while this one waited
    python=$(find_python) || return 1
    check_machine "$root" "$extra" "$python" || return 1
    make_venv "$root/.venv" "$extra" "$python" || return 1
    repair_site "$root/.venv"
    for part in "${@:3}"; do
        stamp_holds "$root" "$extra" "$part" && continue
        key=$(stamp_key "$root" "$extra" "$part") # computed first, because the lists can change during the installation
        install_part "$root" "$extra" "$part" && write_stamp "$root" "$part" "$key" || return 1
    done
    say "ready after $SECONDS s"
}

# Programs that tests use: a broker and a browser, from the system's packages. If they cannot be installed, the tests that
# need them are skipped.
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
    # With RUNLEVEL=1, the package does not start its broker.
    export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
    apt-get update -q && apt-get install -qy --no-install-recommends "$@"
}

# Bring the parts ("run", "test") of root's .venv up to date. The lock is on this file, so no lock file is left behind. A
# pip that outlives a killed script holds the lock until it ends.
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
