"""Does re-weighting help? train.py on real text with junk among the sources, arm by arm and seed by seed; the tables of docs/RESULTS.md.

    python tests/closed_loop.py --text=folder --tokenizer=folder/tokenizers/bpe8k            # about 15 minutes for a seed on two idle cores

A model of 4 layers and width 128 (vocabulary 8,192) trains for 400 steps of 24 rows of 128 tokens on six sources that have equal
weights at first: code, web_edu, math and papers, math with the tokens of every document shuffled, and random tokens.
Every 25 steps from step 50 on the weights change. `folder` holds train/, val/ and probes/ with JSON lines (.gz) by these names.
"""
import glob
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from configurator import BadInput, configure
from data import Source
from influence import ghost_sqnorm
from lib.device import read_metrics
from lib.hf import open_model
from lib.reading import local_files, read_batches, records_of
from lib.tokenizer import load_tokenizer
from prepare.shards import PartWriter, finish_source

# -- knobs --
text = ''                        # folder with train/*.jsonl.gz, val/ and probes/
tokenizer = ''                   # its tokenizer's folder
out = 'out/closed_loop'          # prepared data and runs; a run that is there is not made again
seeds = [0, 1, 2]                # of initial weights and data order
arms = ['uniform', 'math', 'joint', 'joint_own', 'shuffled_probe', 'oracle']      # of ARMS
jobs = 2                         # runs at the same time, of one thread each
configure(globals(), verbose=False)

DOMAINS = ('code', 'web_edu', 'math')                 # that a probe set exists for; the second one's is called web
SOURCES = (*DOMAINS, 'papers', 'shuffled', 'random')
JOINT = {'code': 1.0, 'web': 1.0, 'math': 1.0}
ARMS = {'uniform': dict(), 'oracle': dict(sources={**dict.fromkeys(SOURCES, 0.0), **dict.fromkeys(DOMAINS, 1.0)}),
        'math': dict(mixture='influence', probe={'math': 1.0}), 'joint': dict(mixture='influence', probe=JOINT),
        'shuffled_probe': dict(mixture='influence', probe={'shuffled': 1.0}),
        'joint_own': dict(mixture='influence', probe=JOINT, influence_units='own'),
        'joint_all': dict(mixture='influence', probe=JOINT, influence_layers='all'),
        'math_all': dict(mixture='influence', probe={'math': 1.0}, influence_layers='all'),
        'math_adam': dict(mixture='influence', probe={'math': 1.0}, influence_layers='all', influence_scaling='adam'),
        'math_datainf': dict(mixture='influence', probe={'math': 1.0}, influence_scaling='datainf'),
        'math_paper': dict(mixture='influence', probe={'math': 1.0}, influence_rule='proportional', influence_layers='embedding+head'),
        'select': dict(select='online', probe=JOINT, mixture_interval=100)}
KNOBS = dict(vocab_size=8192, n_layer=4, n_head=4, n_kv_head=2, n_embd=128, ffn_dim=352, rope_theta=10000.0, block_size=128, batch_size=24,
             total_batch_tokens=24 * 128, max_steps=400, warmup_steps=20, learning_rate=3e-3, log_interval=5, eval_interval=100, eval_rows=256,
             save_interval=100, keep_last=0, mixture_interval=25, mixture_warmup=50, probe_rows=64, influence_rows=16, dtype='float32')


def documents(kind, name):
    for file in local_files(os.path.join(text, kind, f'{name}.jsonl.gz')):
        for batch in read_batches(file, ['text']):
            yield from (record['text'] for _, record in records_of(batch))


def prepare(folder):
    """The sources and probe sets as shards, once. Shuffled: tokens of every document; random: uniform, in documents of 500."""
    made_with, rng = load_tokenizer(tokenizer), np.random.default_rng(0)

    def write(name, splits, change=lambda ids: ids):
        if os.path.isfile(os.path.join(folder, name, 'meta.json')):
            return
        writer = PartWriter(os.path.join(folder, name), 0, made_with.vocab_size)
        for split, texts in splits.items():
            for document in texts:
                ids = change(made_with.encode_document(document))
                writer.add(split, np.concatenate(([made_with.bos_id], ids)), len(document.encode()))
        writer.commit(1, 0, done=True)
        finish_source(os.path.join(folder, name), made_with, dict(text=text), [writer.state])
    for name in (*DOMAINS, 'papers'):
        write(name, dict(train=documents('train', name), val=documents('val', name)))
    write('shuffled', dict(train=documents('train', 'math'), val=documents('val', 'math')), rng.permutation)
    write('random', dict(train=('' for _ in range(2000)), val=('' for _ in range(100))), lambda _: rng.integers(4, made_with.vocab_size, 500))
    for domain in JOINT:
        write(f'probe/{domain}', dict(probe=documents('probes', domain)))
    write('probe/shuffled', dict(probe=documents('probes', 'math')), rng.permutation)


def train(arm, seed):
    """One run, unless it is there already: its metrics."""
    run = os.path.join(out, f'{arm}_{seed}')
    knobs = {**KNOBS, 'sources': dict.fromkeys(SOURCES, 1.0), **ARMS[arm], 'seed': seed, 'out_dir': run, 'data_dir': os.path.join(out, 'data'),
             'resume': True}
    if not glob.glob(os.path.join(run, 'ckpt', 'step_000400')):
        done = subprocess.run([sys.executable, 'train.py', *(f'--{key}={value}' for key, value in knobs.items())], cwd=ROOT, text=True,
                              capture_output=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
        if done.returncode:
            raise BadInput(f'{run} failed:\n{done.stderr}')
    return read_metrics(run)


def last(records, key):
    return next((r[key] for r in reversed(records) if key in r), float('nan'))


def auroc(low, high):
    """Probability that a draw from `high` exceeds one from `low`, by ranks (Mann-Whitney)."""
    ranks = np.concatenate((low, high)).argsort().argsort()[len(low):] + 1
    return (ranks.sum() - len(high) * (len(high) + 1) / 2) / (len(low) * len(high))


def self_influence(run, step):
    """AUROC of shuffled and of random above clean validation rows by the squared gradient norm of the first block: how PRESENCE sees noise."""
    model, _, _ = open_model(os.path.join(run, 'ckpt', f'step_{step:06d}'), torch.device('cpu'), torch.float32)
    scores = {}
    for name in (*DOMAINS, 'shuffled', 'random'):
        rows = torch.from_numpy(Source(os.path.join(out, 'data'), name, 'val', 128, 0, 8192).rows(range(64)))
        scores[name] = ghost_sqnorm(model, (rows[:, :-1], rows[:, 1:].long(), None), 'first').numpy()
    clean = np.concatenate([scores[name] for name in DOMAINS])
    return auroc(clean, scores['shuffled']), auroc(clean, scores['random'])


def print_tables():
    found = {(arm, seed): read_metrics(os.path.join(out, f'{arm}_{seed}')) for arm in arms for seed in seeds}
    print('\n| arm | loss of ' + ' | '.join(DOMAINS) + ' | mean of the three | final weights: ' + ', '.join(SOURCES) + ' |\n' + '|---' * 6 + '|')
    for arm in arms:
        losses = np.array([[last(found[arm, seed], f'val/loss_{d}') for d in DOMAINS] for seed in seeds])
        weights = np.array([[last(found[arm, seed], f'mixture/weight_{s}') for s in SOURCES] for seed in seeds])
        cells = [' / '.join(f'{x:.2f}' for x in column) for column in losses.T] + [' / '.join(f'{x:.2f}' for x in losses.mean(1))]
        print(f'| {arm} | ' + ' | '.join(cells) + ' | ' + ', '.join(f'{low:.2f}' if high - low < 0.005 else f'{low:.2f} to {high:.2f}'
                                                                     for low, high in zip(weights.min(0), weights.max(0))) + ' |')
    if 'select' in arms:
        rounds = [r for r in found['select', seeds[0]] if 'select/reference' in r]
        print('\n| step | share of rows kept: ' + ' | '.join(SOURCES) + ' |\n' + '|---' * (1 + len(SOURCES)) + '|')
        for r in rounds:
            print(f'| {r["step"]} | ' + ' | '.join(f'{r[f"select/kept_{s}"]:.0%}' for s in SOURCES) + ' |')
    if 'oracle' in arms and 'uniform' in arms:
        steps = (100, 200, 300, 400)
        print('\n| self-influence: AUROC above clean rows at step | ' + ' | '.join(map(str, steps)) + ' |\n' + '|---' * (1 + len(steps)) + '|')
        for arm, what in (('oracle', 'trained on clean text'), ('uniform', 'with both in the stream')):
            found = np.array([[self_influence(os.path.join(out, f'{arm}_{seed}'), step) for seed in seeds] for step in steps])      # (steps, seeds, 2)
            for i, kind in enumerate(('shuffled', 'random')):
                print(f'| {kind} rows, {what} | ' + ' | '.join(' / '.join(f'{x:.2f}' for x in row) for row in found[:, :, i]) + ' |')


if __name__ == '__main__':
    if not text or not tokenizer:
        raise BadInput('--text and --tokenizer are missing.')
    prepare(os.path.join(out, 'data'))
    with ThreadPoolExecutor(jobs) as pool:
        for job in [pool.submit(train, arm, seed) for seed in seeds for arm in arms]:
            job.result()
    with open(os.path.join(out, 'arms.json'), 'w', encoding='utf-8') as f:
        json.dump(dict(arms={arm: ARMS[arm] for arm in arms}, knobs=KNOBS), f, indent=1)
    print_tables()
