"""What the scripts of the studies share: commands of the project, runs of several arms, tables."""
import os
import shutil
import subprocess
import sys

from configurator import BadInput
from tools.runs import read_run

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run(*command, log=None):
    """Runs a script of the project. Raises BadInput if it fails.

    log     file for its output. None: the terminal
    The script runs in the project's folder, so paths in the command must be absolute.
    """
    # One string, because scripts that run at the same time print their commands here, too.
    print(f'\n$ python {" ".join(command)}\n', end='', flush=True)
    where = 'above'
    if log is None:
        code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    else:
        # Two scripts at the same time would write their progress bars over each other.
        where = log
        os.makedirs(os.path.dirname(log), exist_ok=True)
        with open(log, 'w', encoding='utf-8') as f:
            code = subprocess.run(
                [sys.executable, *command], cwd=ROOT, stdout=f, stderr=f).returncode
    if code:
        raise BadInput(f'{command[0]} failed, see {where}. The same command again continues.')


def write_config(path, knobs):
    """Writes a config file of train.py. Returns its path."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w', encoding='utf-8') as f:
        f.writelines(f'{name} = {value!r}\n' for name, value in knobs.items())
    return path


def train_arms(folder, arms, seeds, jobs, *files):
    """Trains every arm with every seed in folder/runs/<arm>_seed<seed>. Finished runs are kept.

    arms   dict, arm -> knobs of train.py       jobs  runs at the same time, of one thread each
    files  config files that come before those of the arms
    """
    place = os.path.join(folder, 'arms')
    shutil.rmtree(place, ignore_errors=True)        # the sweep trains every arm that it finds there
    for arm, knobs in arms.items():
        write_config(os.path.join(place, f'{arm}.py'), knobs)
    options = [f'--seeds={seeds}', f'--jobs={jobs}', '--threads=1', f'--out={folder}/runs']
    run('tools/sweep.py', 'configs', place, *options, *files)


def read_arms(folder, arms, seeds):
    """Reads the runs of train_arms: dict, (arm, seed) -> tools.report.Entry."""
    entries = {}
    for arm in arms:
        for seed in seeds:
            entry = read_run(os.path.join(folder, 'runs', f'{arm}_seed{seed}'))
            entry.arm = arm
            entries[arm, seed] = entry
    return entries


def print_row(*cells):
    """Prints a line of a Markdown table."""
    print('| ' + ' | '.join(str(cell) for cell in cells) + ' |', flush=True)


def print_header(*cells):
    print()
    print_row(*cells)
    print('|---' * len(cells) + '|')
