#!/usr/bin/env bash
# Everything that wants a GPU, in one run of under 10 minutes: losses and models against the CPU, mixed precision,
# a training table. Writes JSON and the table into the folder OUT (default benchmarks/results).
# On a machine without network put the wheels that are missing into .wheels first (shared/scripts/wheelhouse.sh .wheels,
# and Detectron2's own, which `python3 tools/setup_env.py --wheel .wheels` packs there).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ -d .wheels ]; then
    "$python" -m pip install -q --no-index --no-deps --target /tmp/d2distill-site .wheels/*.whl
    export PYTHONPATH=/tmp/d2distill-site:$PWD
else
    export PYTHONPATH=$PWD
fi
"$python" benchmarks/gpu.py --output "${OUT:-benchmarks/results}" "$@"
