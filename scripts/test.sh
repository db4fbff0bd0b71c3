#!/usr/bin/env bash
# Sets up what the tests need, then checks style and types and runs the tests; with arguments, pytest alone with those
# (paths from the repository's root).
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=scripts/setup.sh
source "$root/scripts/setup.sh"

set_up "$root" run test || exit 1
set_up_programs "$root" || exit 1
python=$root/.venv/bin/python
export HF_HUB_OFFLINE=1 # a test that wants the network is wrong
cd -- "$root"
if (($#)); then
    exec "$python" -m pytest "$@"
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
# Two at a time, file by file and in order: engines start in the first files, and tests of a file share them.
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder
