#!/usr/bin/env bash
# Speed against naive baselines, as a table. Both are measured in the same run. Sets up .venv.
#     bash scripts/benchmark.sh pcfg [ARGUMENTS ...]      (--help lists them)
# A benchmark NAME is the program tests/benchmarks/benchmark_NAME.py.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
program=$root/tests/benchmarks/benchmark_${1:-}.py
if [ ! -f "$program" ]; then
    names=$(basename -s .py "$root"/tests/benchmarks/benchmark_*.py | sed 's/^benchmark_//' | paste -sd ' ')
    echo "benchmark.sh: error: no benchmark '${1:-}'; give one of: $names" >&2
    exit 2
fi
shift
source "$root/scripts/setup.sh" "$root/requirements.txt" "$root/tests/requirements.txt" "$root/tests/benchmarks/requirements.txt"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec python "$program" "$@"
