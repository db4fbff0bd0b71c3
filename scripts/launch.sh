#!/usr/bin/env bash
# Sets everything up once, then runs `troupe` with the given arguments. Without arguments it solves the sample problems.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=scripts/setup.sh
source "$root/scripts/setup.sh"

set_up "$root" run || exit 1
(($#)) || set -- solve --file "$root/configs/problems/sample.jsonl"
exec "$root/.venv/bin/troupe" "$@"
