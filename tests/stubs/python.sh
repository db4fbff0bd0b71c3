#!/usr/bin/env bash
# A stub of Python for tests of scripts/*.sh.
#
# -m venv   makes a tiny .venv around this script
# -m pip    installs nothing and appends its arguments to $STUB_RECORD. If they contain $STUB_FAIL, it prints $STUB_SAYS
#           and fails; if they contain $STUB_HANG, it takes 600 s; if they contain $STUB_PAUSE, it takes 1 s.
# -m OTHER  prints its name
#
# Anything else runs in the real Python, $STUB_PYTHON.
case "$1 $2" in
"-m venv")
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    printf '#!/bin/sh\necho "troupe $*"\n' >"$3/bin/troupe"
    chmod +x "$3/bin/troupe"
    echo "version = stub" >"$3/pyvenv.cfg"
    ;;
"-m pip")
    [[ "$*" != *--version* ]] || exit 0
    echo "$*" >>"$STUB_RECORD"
    if [[ -n ${STUB_HANG:-} && "$*" == *"$STUB_HANG"* ]]; then
        sleep 600
    fi
    if [[ -n ${STUB_PAUSE:-} && "$*" == *"$STUB_PAUSE"* ]]; then
        sleep 1
    fi
    if [[ -n ${STUB_FAIL:-} && "$*" == *"$STUB_FAIL"* ]]; then
        echo "${STUB_SAYS:-pip says no}"
        exit 1
    fi
    ;;
-m*) echo "ran ${*:2}" ;;
*) exec "$STUB_PYTHON" "$@" ;;
esac
