"""SLURM's scripts under a stand-in for srun."""

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["slurm"]

ROOT = Path(__file__).resolve().parents[1]
# Two tasks with the variables that srun gives them, and the command that follows srun's options.
SRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$RECORD"
while [[ $1 == --* ]]; do shift; done
export SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_JOB_ID=$$ SLURM_STEP_ID=0 SLURM_STEP_TASKS_PER_NODE=2
export SLURM_NODEID=0 SLURM_LAUNCH_NODE_IPADDR=127.0.0.1
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
wait $first && wait $second
"""


def slurm(folder, script, *arguments, **environment):
    """Run a script of tools/ with `srun` as above, which leaves its options in FOLDER/srun.txt."""
    tools = folder / "bin"
    tools.mkdir()
    (tools / "srun").write_text(SRUN)
    (tools / "python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    env.update(PATH=f"{tools}:{os.environ['PATH']}", RECORD=str(folder / "srun.txt"), OMP_NUM_THREADS="1", GPUS="2")
    env.update(SRUN_ARGS="--time=1:00:00 --exclusive", **environment)
    command = ["bash", str(ROOT / "tools" / script), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
