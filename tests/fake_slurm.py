"""SLURM's scripts under a stand-in for srun."""

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["RUN_TWO_TASKS", "slurm"]

ROOT = Path(__file__).resolve().parents[1]
#: Two tasks with the variables that srun sets, of the command that follows srun's options.
RUN_TWO_TASKS = """
while [[ $1 == --* ]]; do shift; done
export SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_JOB_ID=$$ SLURM_STEP_ID=0
export SLURM_NODEID=0 SLURM_LAUNCH_NODE_IPADDR=127.0.0.1
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
wait $first && wait $second
"""


def slurm(folder, script, *arguments, srun="exit 0", **environment):
    """Run a script of tools/. `srun` and `scontrol` leave their arguments in FOLDER/<name>.txt; srun then does `srun`.

    Returns:
        The finished process, and the arguments by name.
    """
    tools = folder / "bin"
    tools.mkdir()
    for name, action in (("srun", srun), ("scontrol", "exit 0")):
        (tools / name).write_text(f"#!/bin/bash\nprintf '%s\\n' \"$@\" > {folder / name}.txt\n{action}\n")
    (tools / "python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    env.update(PATH=f"{tools}:{os.environ['PATH']}", OMP_NUM_THREADS="1", **environment)
    command = ["bash", str(ROOT / "tools" / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    records = (folder / "srun.txt", folder / "scontrol.txt")
    return done, {path.stem: path.read_text().split() for path in records if path.exists()}
