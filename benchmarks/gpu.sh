#!/usr/bin/env bash
# Everything that wants a GPU. Writes JSON and a table into the folder OUT (default benchmarks/results).
#
#   bash benchmarks/gpu.sh              # classification, under 10 minutes
#   bash benchmarks/gpu.sh detection    # detection, about 25 minutes in calls of under 10: until it says "all is done"
#
# Both: losses and models against the CPU, mixed precision, step times, a training table. What the second has done is
# in output/gpu.
# On a machine without network put the wheels that are missing (of torch, torchvision and what usually comes with them
# none) into .wheels first, in an environment with the package wheel:
#
#   sh ../shared/scripts/wheelhouse.sh .wheels && python3 tools/setup_env.py --wheel .wheels
#
# The second is Detectron2. Together they are all that both parts import there (tried: installed under Python 3.12).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
program=benchmarks/gpu.py
if [ "${1:-}" = detection ]; then
    program=benchmarks/gpu_detection.py
    shift
fi
if [ -d .wheels ]; then
    site=/tmp/d2distill-site
    # Once on a machine.
    if [ ! -e "$site.complete" ]; then
        "$python" -m pip install -q --no-index --no-deps --upgrade --target "$site" .wheels/*.whl
        touch "$site.complete"
    fi
    export PYTHONPATH=$site:$PWD
else
    export PYTHONPATH=$PWD
fi
"$python" "$program" --output "${OUT:-benchmarks/results}" "$@"
