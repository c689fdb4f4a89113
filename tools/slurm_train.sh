#!/usr/bin/env bash
# Train on a SLURM cluster, one process per GPU; a classifier, or what TRAIN_PROGRAM trains:
#
#   GPUS=16 GPUS_PER_NODE=8 CPUS_PER_TASK=5 SRUN_ARGS="--time=24:00:00" \
#     tools/slurm_train.sh PARTITION JOB_NAME CONFIG_FILE OUTPUT_DIR [KEY VALUE ...]
#   TRAIN_PROGRAM=detection/train_net.py tools/slurm_train.sh PARTITION JOB_NAME CONFIG_FILE OUTPUT_DIR
#
# A job that is preempted, or near its time limit, saves after its current step; the same line continues from there.
# For a job that requeues itself see tools/train.sbatch.
set -euo pipefail

if (($# < 4)); then
    echo "usage: [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS=...] [TRAIN_PROGRAM=tools/train_cls.py]" \
        "$0 PARTITION JOB_NAME CONFIG_FILE OUTPUT_DIR [KEY VALUE ...]" >&2
    exit 2
fi
partition=$1 job=$2 config=$3 output=$4
shift 4
gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
read -ra more <<<"${SRUN_ARGS:-}"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# When one process fails the others would wait for it.
exec srun \
    --partition="$partition" \
    --job-name="$job" \
    --gres="gpu:$gpus_per_node" \
    --ntasks="$gpus" \
    --ntasks-per-node="$gpus_per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    --signal=TERM@120 \
    "${more[@]}" \
    python -u "${TRAIN_PROGRAM:-tools/train_cls.py}" --config-file "$config" --resume OUTPUT_DIR "$output" "$@"
