#!/usr/bin/env bash
# Set up what the tests need, check style and types, and run the tests. With arguments, run only pytest with them; paths
# start at the repository's root.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=scripts/setup.sh
source "$root/scripts/setup.sh"

set_up "$root" run test || exit 1
set_up_programs "$root" || exit 1
python=$root/.venv/bin/python
export HF_HUB_OFFLINE=1 # no test may need the network
cd -- "$root"
if (($#)); then
    exec "$python" -m pytest "$@"
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
# Two processes, each with whole files and in order: the first files start engines, which the tests of a file share.
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder
