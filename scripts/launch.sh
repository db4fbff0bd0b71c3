#!/usr/bin/env bash
# Set everything up once, then run `troupe` with the given arguments. Without arguments, solve the sample problems.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=scripts/setup.sh
source "$root/scripts/setup.sh"

set_up "$root" run || exit 1
(($#)) || set -- solve --file "$root/configs/problems/sample.jsonl"
exec "$root/.venv/bin/troupe" "$@"
