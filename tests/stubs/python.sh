#!/usr/bin/env bash
# Stand-in for Python in tests of scripts/*.sh. `-m venv` makes a tiny .venv around itself; `-m pip` installs nothing and
# writes its arguments to $STUB_RECORD, fails and says $STUB_SAYS if they contain $STUB_FAIL, takes 600 s if they contain
# $STUB_HANG and 1 s if they contain $STUB_PAUSE; other modules print their name. Anything else goes to the real Python,
# $STUB_PYTHON.
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
