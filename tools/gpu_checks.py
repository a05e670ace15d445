"""The checks that need a GPU: which they are, and how `python tools/bench.py gpu` runs them.

`plan` lists the parts, the most important first. Each one is a few commands that anybody can also
run alone, and has a limit of time. `run_parts` runs them one after the other and writes the results
after every part, so that a machine that is taken away costs one part at most. `train_run` and
`make_data` do the work of the parts `train` and `fp8` of tools/bench.py.
"""
import glob
import json
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import numpy as np
import torch

from configurator import BadInput, RunFault
from lib.device import device_name
from lib.log import read_metrics
from lib.shards import shard_bytes
from model import ModelConfig, flops_per_token

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
N_SOURCES = 5
DOMAINS = ('one', 'two', 'three')
# Most tokens that generated text uses, so that a short run learns something.
N_IDS = 4096


@dataclass
class Part:
    """A part of the checks."""
    name: str
    limit_s: float              # seconds that the plan for nine minutes gives it
    commands: list              # lists of arguments
    left_out: str = ''          # what it does not measure here
    env: dict = field(default_factory=dict)


# -- the plan --------------------------------------------------------------------------------------


def missing(modules):
    """Returns those of the modules that are not installed."""
    return [name for name in modules if find_spec(name) is None]


def tests_part(rehearse):
    files = []
    for path in sorted(glob.glob(os.path.join(ROOT, 'tests', 'test_*.py'))):
        with open(path, encoding='utf-8') as f:
            if 'mark.gpu' in f.read():
                files.append(os.path.relpath(path, ROOT))
    options = ['-q', '-rfE', '--tb=short', '--show-capture=no', '-p', 'no:cacheprovider']
    if rehearse or missing(['xdist']):
        # The project's own options need pytest-xdist.
        options += ['-o', 'addopts=']
    commands = [[sys.executable, '-m', 'pytest', '-m', 'gpu', *options, *files]]
    left_out = ''
    if missing(['pytest']):
        commands = []
        left_out = 'pytest is not installed'
    elif rehearse:
        left_out = 'without a GPU all tests are skipped'
    return Part('tests', 75, commands, left_out)


def plan(out, scratch, config):
    """Returns the parts, a list of Part, the most important first.

    out      folder of the results
    scratch  folder of data and runs
    config   knobs of tools/bench.py: text, tokenizer, fp8_steps, rehearse
    """
    rehearse = config['rehearse']
    small, large = ('tiny', 'tiny') if rehearse else ('140m', '950m')
    rounds = 1 if rehearse else 3
    count = 0

    script = [sys.executable, 'tools/bench.py']

    def bench(command, **options):
        nonlocal count
        count += 1
        file = os.path.join(out, f'figures_{count:02}.json')
        options = dict(rounds=rounds, json=file) | options
        arguments = [f'--{name}={value}' for name, value in options.items()]
        return [*script, command, *arguments]

    def measure(part, **options):
        return bench('parts', parts=[part], rehearse=rehearse, **options)

    of_model = dict(models=[small])
    if not rehearse:
        of_model['tokens'] = 2048
    data = dict(out=scratch, text=config['text'], tokenizer=config['tokenizer'])
    peers = dict(transformers='transformers', liger='liger_kernel')
    absent = missing(peers.values())
    lacks = f'not installed: {", ".join(absent)}' if absent else ''
    names = [name for name, module in peers.items() if module not in absent]
    if rehearse and 'liger' in names:
        names.remove('liger')
    vs = ','.join(names)
    needs_gpu = 'it needs a GPU' if rehearse else ''
    # A comparison of three sides of the large model takes half the rows, for all to fit at once.
    fewer = {} if rehearse else dict(rows=8)
    backends = 'attention=cudnn,attention=flash'
    by_text = ''
    if not config['text']:
        by_text = 'preparing text: without --text and --tokenizer the rows are generated'
    cases = 'few tokens' if rehearse else 'plain,vocabulary,experts'
    memory = [*script, 'memory', f'--cases={cases}']
    interpreted = {'TRITON_INTERPRET': '1'} if rehearse else {}
    return [
        tests_part(rehearse),
        Part('steps', 75, [
            bench('steps', models=list(dict.fromkeys([small, large])), compiled=[True],
                  profile=True),
            bench('steps', models=[small], compiled=[False], vs=vs)], lacks),
        Part('train', 75, [measure('train', **data)], by_text),
        Part('attention', 50, [
            bench('steps', models=[large], compiled=[True], vs=backends, profile=True, **fewer),
            measure('attention')], f'{backends}: {needs_gpu}' if rehearse else ''),
        Part('fp8', 75, [
            bench('steps', models=[large], compiled=[True], vs='fp8=True', profile=True),
            measure('fp8', models=[large], fp8_steps=config['fp8_steps'], **data)],
            f'fp8: {needs_gpu}' if rehearse else ''),
        Part('influence', 25, [measure('influence', **of_model)]),
        Part('presence', 15, [measure('presence', **of_model)]),
        Part('kd', 20, [measure('kd', **of_model)]),
        Part('loss', 20, [measure('loss')], lacks),
        Part('kernels', 20, [measure('kernels')], '', interpreted),
        Part('peers', 75, [bench('steps', models=[small], compiled=[True], vs=vs)], lacks),
        Part('memory', 15, [memory]),
    ]


# -- running it ------------------------------------------------------------------------------------


def machine():
    """Returns date, card and versions, as a dict of text."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    found = dict(date=time.strftime('%Y-%m-%d %H:%M'), device=device_name(device))
    found.update(driver='none', python=platform.python_version(), torch=torch.__version__)
    if shutil.which('nvidia-smi'):
        query = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
        done = subprocess.run(query, capture_output=True, text=True)
        found['driver'] = done.stdout.strip() or 'unknown'
    found.update(cuda=str(torch.version.cuda), cudnn=str(torch.backends.cudnn.version()))
    for package in ('triton', 'transformers', 'liger_kernel', 'flash-attn-4'):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = 'not installed'
    return found


def end_group(process):
    """Ends a process and those that it has started. It may print what it has for three seconds."""
    for number, patience_s in ((signal.SIGINT, 3), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return                  # all of them have ended
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue


def run_command(command, seconds, log, env):
    """Runs a command in the project's folder. Returns its exit code, None if it took too long."""
    # A group of its own, which is ended as a whole: the sides of a comparison are processes, too.
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, 'PYTHONUNBUFFERED': '1', **env}, stdout=log,
        stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:
        end_group(process)


def as_typed(command):
    return shlex.join(['python', *command[1:]])


def figures_of(command):
    """Returns what a command has written to its --json so far, None if nothing."""
    for argument in command:
        name, _, path = argument.partition('=')
        if name == '--json' and os.path.isfile(path):
            with open(path, encoding='utf-8') as f:
                return json.load(f)
    return None


def run_part(part, seconds, out):
    """Runs the commands of a part for at most `seconds`. Returns its record, a dict."""
    start = time.monotonic()
    path = os.path.join(out, f'{part.name}.txt')
    status = 'done'
    with open(path, 'w', encoding='utf-8') as log:
        for command in part.commands:
            log.write(f'$ {as_typed(command)}\n')
            log.flush()
            code = run_command(command, start + seconds - time.monotonic(), log, part.env)
            if code is None:
                status = 'overran'
                break
            if code:
                status = 'failed'
    with open(path, encoding='utf-8', errors='replace') as f:
        # A progress bar returns to the beginning of its line.
        lines = [line.rpartition('\r')[2].rstrip() for line in f.read().split('\n')]
    notes = [line for line in lines if ' did not start |' in line]
    notes = [note.strip('| ').split(' | ')[-1].strip('| ') for note in notes]
    if part.name == 'tests':
        notes += [line.strip('= ') for line in lines if line.endswith('s =') or ' in ' in line][-1:]
    if part.left_out:
        notes.append(f'left out: {part.left_out}')
    figures = [found for found in map(figures_of, part.commands) if found]
    for found in figures:
        for step in found.get('records', []):
            n_sides = 1 + len(step['peers'])
            notes.append(f"{step['model']}: {n_sides} side(s) ran after {step['started_s']:.0f} s")
    return dict(
        name=part.name, status=status, seconds=time.monotonic() - start, limit_s=seconds,
        notes=notes, commands=[as_typed(command) for command in part.commands],
        figures=figures, tail=[x for x in lines if x][-40:])


def table_lines(columns, rows):
    lines = ['| ' + ' | '.join(columns) + ' |', '|---' * len(columns) + '|']
    return lines + ['| ' + ' | '.join(row) + ' |' for row in rows]


def part_as_markdown(record):
    lines = [f"## {record['name']}", '']
    lines += [f'    {command}' for command in record['commands']]
    for figures in record['figures']:
        for table in figures['tables']:
            lines += ['', table['title'], '', *table_lines(table['columns'], table['rows'])]
    # What has no tables, or did not come to its end, shows its last lines.
    if not record['figures'] or record['status'] != 'done':
        lines += ['', '```', *record['tail'], '```']
    return '\n'.join(lines)


def as_markdown(about, records):
    """Returns the results as text."""
    lines = ['# GPU checks', '', ', '.join(f'{name} {value}' for name, value in about.items()), '']
    rows = []
    for record in records:
        times = [f"{record['seconds']:.0f}", f"{record['limit_s']:.0f}"]
        rows.append([record['name'], record['status'], *times, '; '.join(record['notes'])])
    lines += table_lines(['part', 'status', 'seconds', 'limit, s', 'notes'], rows)
    for record in records:
        if record['status'] != 'skipped':
            lines += ['', part_as_markdown(record)]
    return '\n'.join(lines) + '\n'


def write_results(out, about, records):
    texts = {
        'results.json': json.dumps(dict(about=about, parts=records), indent=1),
        'results.md': as_markdown(about, records)}
    for name, text in texts.items():
        path = os.path.join(out, name)
        with open(path + '.tmp', 'w', encoding='utf-8') as f:
            f.write(text)
        # Whoever copies the folder meanwhile finds a complete file.
        os.replace(path + '.tmp', path)


def run_parts(parts, minutes, out):
    """Runs the parts in their order within `minutes`, and writes results after each. Returns them.

    A part may use what the parts before it have left of their limits. A part for which less than
    half of its limit is left is skipped.
    """
    os.makedirs(out, exist_ok=True)
    about = machine()
    records = []
    # Time that the plan does not need is shared out.
    factor = max(1.0, 60 * minutes / sum(part.limit_s for part in parts))
    end = time.monotonic() + 60 * minutes
    part_end = time.monotonic()
    for part in parts:
        limit_s = factor * part.limit_s
        part_end = max(part_end, time.monotonic()) + limit_s
        left_s = min(part_end, end) - time.monotonic()
        if not part.commands or left_s < limit_s / 2:
            notes = [part.left_out]
            if part.commands:
                notes = [f'{max(0.0, left_s):.0f} s were left']
            record = dict(name=part.name, status='skipped', seconds=0.0, limit_s=limit_s)
            record.update(notes=notes, commands=[], figures=[], tail=[])
        else:
            print(f'{part.name}: at most {left_s:.0f} s', flush=True)
            record = run_part(part, left_s, out)
        records.append(record)
        write_results(out, about, records)
        print(part_as_markdown(record), flush=True)
    print(as_markdown(about, records).partition('\n## ')[0])
    print(f'All results are in {out}.')
    return records


# -- the parts `train` and `fp8` -------------------------------------------------------------------


def full_path(path):
    """Returns the absolute path of what is there, and anything else as it is."""
    return os.path.abspath(path) if os.path.exists(path) else path


def prepare_text(folder, text, tokenizer):
    """Makes sources and probe sets from files of documents. Returns the names of the sources."""
    from lib.reading import local_files
    groups = [[] for _ in range(N_SOURCES)]
    for i, file in enumerate(local_files(text)):
        groups[i % N_SOURCES].append(os.path.abspath(file.path))
    groups = [','.join(group) for group in groups if group]
    # A tenth of the documents is kept for the probe sets, so that a small text has enough of them.
    common = [f'--tokenizer={full_path(tokenizer)}', f'--out={os.path.abspath(folder)}']
    common.append('--probe_fraction=0.1')
    commands = []
    for i, group in enumerate(groups):
        commands.append([
            'prepare/text.py', f'--source=source_{i}', f'--input={group}', '--workers=0',
            '--max_tokens=3_000_000', '--val_fraction=0.03', *common])
    domains = dict(zip(DOMAINS, groups, strict=False))
    inputs = [f'--input.{domain}={group}' for domain, group in domains.items()]
    sources = f"--sources={dict.fromkeys(domains, 'text')}"
    commands.append(
        ['prepare/probe.py', sources, *inputs, '--evaluation=', '--samples=80', *common])
    processes = []
    for command in commands:
        processes.append(subprocess.Popen([sys.executable, *command], cwd=ROOT))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RunFault('the text could not be prepared. The message stands above.')
    return [f'source_{i}' for i in range(len(groups))]


def write_generated(folder, vocab_size):
    """Writes sources and probe sets of generated tokens. Returns the names of the sources.

    A source counts up by a stride of its own, with a random step in one of ten places.
    """
    n_ids = min(vocab_size // 4, N_IDS)

    def write(path, n, stride, seed):
        rng = np.random.default_rng([seed, stride])
        steps = np.where(rng.random(n) < 0.9, stride, rng.integers(0, n_ids, n))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as f:
            f.writelines(shard_bytes(np.cumsum(steps) % n_ids, vocab_size))

    names = [f'source_{i}' for i in range(N_SOURCES)]
    for i, name in enumerate(names):
        write(f'{folder}/{name}/train/000000.bin', 2_000_000, 1 + i, 0)
        write(f'{folder}/{name}/val/000000.bin', 100_000, 1 + i, 1)
    for i, domain in enumerate(DOMAINS):
        write(f'{folder}/probe/{domain}/probe/000000.bin', 100_000, 1 + i, 2)
    return names


def make_data(out, text, tokenizer, vocab_size):
    """Makes sources and probe sets below `out`, of text if there is any, else of generated tokens.

    Returns a dict: folder, sources (names), vocab_size (of the tokenizer, at least), made_of. What
    an earlier call has made is used again.
    """
    folder = os.path.join(os.path.abspath(out), 'data_text' if text else f'data_{vocab_size}')
    path = os.path.join(folder, 'made.json')
    if os.path.isfile(path):
        with open(path, encoding='utf-8') as f:
            return json.load(f)
    os.makedirs(folder, exist_ok=True)
    if text:
        from lib.tokenizer import load_tokenizer
        sources = prepare_text(folder, text, tokenizer)
        vocab_size = max(vocab_size, load_tokenizer(tokenizer).vocab_size)
    else:
        sources = write_generated(folder, vocab_size)
    made = dict(folder=folder, sources=sources, vocab_size=vocab_size)
    made['made_of'] = text or 'generated tokens'
    with open(path, 'w', encoding='utf-8') as f:
        json.dump(made, f)
    return made


def make_data_anyhow(out, text, tokenizer, vocab_size):
    """The same, but of generated tokens, which is printed, where the text cannot be prepared."""
    try:
        return make_data(out, text, tokenizer, vocab_size)
    except (BadInput, RunFault, ImportError) as error:
        # An ImportError: reading text needs packages that a training run does not.
        if not text:
            raise
        print(f'generated tokens instead of text: {error}')
        return make_data(out, '', '', vocab_size)


def train_run(out, text, tokenizer, rehearse):
    """Runs train.py with re-weighting by influence. Returns its figures, name -> number or text."""
    vocab_size = 512 if rehearse else 128256
    made = make_data_anyhow(out, text, tokenizer, vocab_size)
    run = os.path.join(tempfile.mkdtemp(dir=os.path.abspath(out)), 'run')
    knobs = dict(
        data_dir=made['folder'], out_dir=run, sources=dict.fromkeys(made['sources'], 1.0),
        probe=dict.fromkeys(DOMAINS, 1.0), mixture='influence', compile=True, log_interval=1,
        eval_rows=16, warmup_steps=10, learning_rate=1e-3, vocab_size=made['vocab_size'])
    command = [sys.executable, 'train.py']
    if rehearse:
        knobs.update(n_layer=2, n_head=2, n_kv_head=1, n_embd=64, ffn_dim=128, block_size=64)
        knobs.update(batch_size=4, total_batch_tokens=1024, max_steps=9, mixture_interval=3)
        knobs.update(probe_rows=4, influence_rows=4, warmup_steps=2, compile=False)
    else:
        command.append('config/model/mobilellm_140m.py')
        knobs.update(block_size=2048, batch_size=16, total_batch_tokens=32 * 2048, max_steps=65)
        knobs.update(mixture_interval=20, probe_rows=16, influence_rows=16)
    command += [f'--{name}={value}' for name, value in knobs.items()]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT)
    started_s = None
    while process.poll() is None:
        if started_s is None and any('train/loss' in record for record in read_metrics(run)):
            started_s = time.perf_counter() - start
        time.sleep(0.05)
    if process.returncode:
        raise RunFault('train.py failed. Its message stands above.')
    found = training_figures(run, started_s)
    return {'rows of': made['made_of'], **found}


def training_figures(run, started_s):
    """Returns what a run of train.py with re-weighting says about its speed."""
    records = read_metrics(run)
    # The first steps compile and fill caches.
    steps = [record for record in records if 'train/loss' in record][3:]
    updates = [record for record in records if 'system/mixture_ms' in record]

    def median(name):
        values = [record[name] for record in steps if record[name] is not None]
        return statistics.median(values) if values else None

    with open(os.path.join(run, 'config.json'), encoding='utf-8') as f:
        config = json.load(f)
    fields = {name: config[name] for name in ModelConfig.__dataclass_fields__}
    per_token = flops_per_token(ModelConfig(**fields), config['block_size'])
    rate = median('train/tokens_per_second')
    times = [record['system/mixture_ms'] for record in updates]
    # The FLOPs of a measurement at the speed of training, which is its floor.
    floor_ms = 1e3 * updates[0]['mixture/extra_flops'] / (rate * per_token)
    later_ms = statistics.median(times[1:] or times)
    return {
        'start to first logged step, s': started_s,
        'tokens/s': rate, 'MFU': median('train/mfu'), 'step, ms': median('system/step_ms'),
        'waiting for data, ms': median('system/data_ms'),
        'memory, GiB': median('system/gpu_memory'), 'first measurement, ms': times[0],
        'later measurements, ms': later_ms, 'floor of a measurement, ms': floor_ms,
        'later / floor': later_ms / floor_ms,
        'later / 250 steps': later_ms / (250 * median('system/step_ms'))}
