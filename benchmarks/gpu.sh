#!/usr/bin/env bash
# Everything that wants a GPU. Writes JSON and a table into the folder OUT (default benchmarks/results).
#
#   bash benchmarks/gpu.sh              # classification
#   bash benchmarks/gpu.sh detection    # detection; both in calls of under 10 minutes: until it says "all is done"
#
# Losses and models against the CPU, step times, mixed precision, the cases of `d2distill-benchmark --suite gpu`, a
# training table; what is done is in output/gpu.
# On a machine without network put the wheels that are missing (of torch, torchvision and what usually comes with them
# none) into .wheels first, in an environment with the package wheel:
#
#   sh ../shared/scripts/wheelhouse.sh .wheels && python3 tools/setup_env.py --wheel .wheels
#
# The second is Detectron2. Together they are all that is imported there (tried: installed under Python 3.12).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
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
"$python" benchmarks/gpu.py --output "${OUT:-benchmarks/results}" "$@"
