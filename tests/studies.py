"""What the scripts of the studies share: commands of the project, runs of several arms, tables."""
import datetime
import gzip
import json
import os
import platform
import re
import shutil
import subprocess
import sys

import torch

from configurator import BadInput
from tools.runs import read_run

LINES = []          # of the summary
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


def documents_of(folder, name):
    """Yields the documents of <folder>/<name>.jsonl.gz."""
    # Not above, because tests of the studies also run where a preparation's packages are missing.
    from lib.reading import local_files, read_batches, records_of
    for file in local_files(os.path.join(folder, f'{name}.jsonl.gz')):
        for batch in read_batches(file, ['text']):
            for _, record in records_of(batch):
                yield record['text']


def write_documents(path, documents):
    """Writes documents as JSON lines, .gz, unless the file is there."""
    if os.path.isfile(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # Without the time, so that the same documents are the same bytes.
    with open(f'{path}.part', 'wb') as raw, gzip.GzipFile('', 'wb', fileobj=raw, mtime=0) as f:
        f.writelines(f'{json.dumps(dict(text=document))}\n'.encode() for document in documents)
    os.replace(f'{path}.part', path)


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


def tell(line):
    """Prints a line, which also belongs to the summary."""
    LINES.append(line)
    print(line, flush=True)


def print_row(*cells):
    """Prints a line of a Markdown table."""
    tell('| ' + ' | '.join(str(cell) for cell in cells) + ' |')


def print_header(*cells):
    tell('')
    print_row(*cells)
    tell('|---' * len(cells) + '|')


def write_summary(out):
    """Writes what was printed with `tell` and the others to out/summary.md, and where it was made.

    Summaries of the runs behind docs/RESULTS.md are kept in docs/summaries, and
    tests/test_results.py compares them with it.
    """
    path = os.path.join(out, 'summary.md')
    # Without the folders of this machine, and without jobs, which changes no figure.
    options = [re.sub(r'=/.*/', '=', option) for option in sys.argv[1:]]
    options = [option for option in options if not option.startswith(('--out=', '--jobs='))]
    command = ' '.join([os.path.relpath(sys.argv[0], ROOT), *options])
    where = f'{platform.machine()}, {os.cpu_count()} cores'
    if torch.cuda.is_available():
        where = torch.cuda.get_device_name()
    about = f'{datetime.date.today()}, {where}, torch {torch.__version__}'
    with open(path, 'w', encoding='utf-8') as f:
        f.write(f'    python {command}\n\n{about}\n' + '\n'.join(LINES) + '\n')
    print(f'\nsummary: {path}')
