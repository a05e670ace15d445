"""What the scripts of the studies share: a command of the project, and the runs that it left as arms by seed."""
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from configurator import BadInput  # noqa: E402
from tools.report import read_entry  # noqa: E402


def run(*command):
    """Runs a script of the project, its output in the terminal. BadInput when it fails."""
    print('\n$ python', *command, flush=True)
    if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
        raise BadInput(f'{command[0]} failed; its message stands above. The same command again goes on.')


def read_arms(folder, arms, seeds):
    """{(arm, seed): report.Entry} of the runs folder/<arm>_seed<seed>."""
    entries = {(arm, seed): read_entry(os.path.join(folder, f'{arm}_seed{seed}')) for arm in arms for seed in seeds}
    for (arm, _), entry in entries.items():
        entry.arm = arm
    return entries
