"""Does re-weighting help? Trains on real text with junk among the sources, arm by arm.

    python tests/closed_loop.py --text=folder --tokenizer=folder/tokenizers/bpe8k

It prints the tables of docs/RESULTS.md and takes about 15 minutes per seed on two idle cores.
Finished runs are kept. `folder` holds JSON lines (.gz) in train/, val/ and probes/.

A model of 4 layers and width 128 (vocabulary 8,192) trains for 400 steps of 24 rows of 128 tokens.
The six sources have equal weights at first: code, web_edu, math and papers, the math text with the
tokens of every document shuffled, and random tokens. From step 50 on, the weights change every 25
steps.
"""
import os

import numpy as np
import torch

if __name__ == '__main__':
    import _path  # noqa: F401

from configurator import BadInput, configure
from data import Source
from influence import ghost_sqnorm
from lib.hf import open_model
from lib.reading import local_files, read_batches, records_of
from lib.tokenizer import load_tokenizer
from prepare.shards import PartWriter, finish_source
from tests.studies import (
    print_header,
    print_row,
    read_arms,
    train_arms,
    write_config,
    write_summary,
)
from tools.report import difference, holm, p_text, paired, paired_p, weights_of

# -- knobs --
text = ''                           # folder with train/*.jsonl.gz, val/ and probes/
tokenizer = ''                      # folder of its tokenizer
out = 'out/closed_loop'             # prepared data and runs
seeds = [0, 1, 2]                   # of initial weights and data order
arms = ['uniform', 'math', 'joint', 'joint_own', 'shuffled_probe', 'oracle']      # of ARMS
jobs = 2                            # runs at the same time, of one thread each

# Sources that have a probe set. That of web_edu is called web.
DOMAINS = ('code', 'web_edu', 'math')
JOINT = {'code': 1.0, 'web': 1.0, 'math': 1.0}
SOURCES = (*DOMAINS, 'papers', 'shuffled', 'random')
# What re-weighting should find: the domains of the probe sets, without junk.
CLEAN = {**dict.fromkeys(SOURCES, 0.0), **dict.fromkeys(DOMAINS, 1.0)}
BY_MATH = dict(mixture='influence', probe={'math': 1.0})
BY_JOINT = dict(mixture='influence', probe=JOINT)
ARMS = {
    'uniform': {},
    'oracle': dict(sources=CLEAN),
    'math': BY_MATH,
    'joint': BY_JOINT,
    'shuffled_probe': dict(mixture='influence', probe={'shuffled': 1.0}),
    'joint_own': dict(BY_JOINT, influence_units='own'),
    'joint_kl': dict(BY_JOINT, influence_kl=0.5),
    'joint_all': dict(BY_JOINT, influence_layers='all'),
    'math_all': dict(BY_MATH, influence_layers='all'),
    'math_adam': dict(BY_MATH, influence_layers='all', influence_scaling='adam'),
    'math_datainf': dict(BY_MATH, influence_scaling='datainf'),
    'math_paper': dict(
        BY_MATH, influence_rule='proportional', influence_layers='embedding+head'),
    'select': dict(select='online', probe=JOINT, mixture_interval=100),
}
KNOBS = dict(
    vocab_size=8192, n_layer=4, n_head=4, n_kv_head=2, n_embd=128, ffn_dim=352, rope_theta=10000.0,
    block_size=128, batch_size=24, total_batch_tokens=24 * 128, max_steps=400, warmup_steps=20,
    learning_rate=3e-3, log_interval=5, eval_interval=100, eval_rows=256, save_interval=100,
    keep_last=0, mixture_interval=25, mixture_warmup=50, probe_rows=64, influence_rows=16,
    dtype='float32')


def prepare(folder, text, tokenizer):
    """Writes the sources and probe sets as shards. Those that are complete are kept.

    shuffled: the tokens of every math document in random order. random: documents of 500 uniform
    tokens.
    """
    made_with = load_tokenizer(tokenizer)
    # One generator for all sources: their order below is part of the data.
    rng = np.random.default_rng(0)

    def documents(kind, name):
        for file in local_files(os.path.join(text, kind, f'{name}.jsonl.gz')):
            for batch in read_batches(file, ['text']):
                for _, record in records_of(batch):
                    yield record['text']

    def write(name, splits, change=lambda ids: ids):
        place = os.path.join(folder, name)
        if os.path.isfile(os.path.join(place, 'meta.json')):
            return
        writer = PartWriter(place, 0, made_with.vocab_size)
        for split, texts in splits.items():
            for document in texts:
                ids = change(made_with.encode_document(document))
                n_bytes = len(document.encode())
                writer.add(split, np.concatenate(([made_with.bos_id], ids)), n_bytes)
        writer.commit(1, 0, done=True)
        finish_source(place, made_with, dict(text=text), [writer.state])

    def random_ids(_):
        return rng.integers(4, made_with.vocab_size, 500)

    for name in (*DOMAINS, 'papers'):
        write(name, dict(train=documents('train', name), val=documents('val', name)))
    math = dict(train=documents('train', 'math'), val=documents('val', 'math'))
    write('shuffled', math, rng.permutation)
    write('random', dict(train=[''] * 2000, val=[''] * 100), random_ids)
    for domain in JOINT:
        write(f'probe/{domain}', dict(probe=documents('probes', domain)))
    write('probe/shuffled', dict(probe=documents('probes', 'math')), rng.permutation)


def auroc(low, high):
    """Probability that a draw from `high` exceeds one from `low`, by ranks (Mann-Whitney)."""
    ranks = np.concatenate((low, high)).argsort().argsort()[len(low):] + 1
    return (ranks.sum() - len(high) * (len(high) + 1) / 2) / (len(low) * len(high))


def self_influence(run, step, data):
    """How well self-influence tells noise from clean text: AUROC of shuffled and of random rows.

    A row's score is the squared gradient norm of the first block, as PRESENCE uses it. The rows
    are 64 validation rows of every source.
    """
    checkpoint = os.path.join(run, 'ckpt', f'step_{step:06d}')
    model, _, _ = open_model(checkpoint, torch.device('cpu'), torch.float32)
    scores = {}
    for name in (*DOMAINS, 'shuffled', 'random'):
        rows = torch.from_numpy(Source(data, name, 'val', 128, 0, 8192).rows(range(64)))
        batch = (rows[:, :-1], rows[:, 1:].long(), None)
        scores[name] = ghost_sqnorm(model, batch, 'first').numpy()
    clean = np.concatenate([scores[name] for name in DOMAINS])
    return auroc(clean, scores['shuffled']), auroc(clean, scores['random'])


def in_turn(values):
    """'5.86 / 5.85 / 5.81', one value for every seed."""
    return ' / '.join(f'{x:.2f}' for x in values)


def mean_loss(entry):
    """Mean loss of the probed domains, by which arms are judged."""
    return float(np.mean([entry.final[f'val/loss_{d}'] for d in DOMAINS]))


def print_losses(entries, arms, seeds):
    """Every arm against the first one, by the probed domains. Papers, in no probe, stand beside."""
    base = arms[0]
    runs = list(entries.values())
    p = holm([paired_p(runs, arm, base, mean_loss) for arm in arms[1:]])
    print_header(
        'arm', *(f'loss of {d}' for d in DOMAINS), 'mean of the three', f'against {base} (95 %)',
        'p (Holm)', 'loss of papers', f'final weights: {", ".join(SOURCES)}')
    for i, arm in enumerate(arms):
        local = [entries[arm, seed] for seed in seeds]
        losses = np.array([[e.final[f'val/loss_{d}'] for d in DOMAINS] for e in local])
        final = [weights_of(e)[-1] for e in local]
        weights = []
        for source in SOURCES:
            # The range over seeds, or one number where it would round to the same.
            low = min(w[source] for w in final)
            high = max(w[source] for w in final)
            weights.append(f'{low:.2f}' if high - low < 0.005 else f'{low:.2f} to {high:.2f}')
        by_domain = [in_turn(column) for column in losses.T]
        compared = ['', '']
        if i:
            found = paired(runs, arm, base, mean_loss)
            compared = [difference(found, 3), p_text(p[i - 1])]
        papers = in_turn([e.final['val/loss_papers'] for e in local])
        print_row(
            arm, *by_domain, in_turn(losses.mean(1)), *compared, papers, ', '.join(weights))


def print_selection(entry):
    """The share of rows that `select` has kept, round by round."""
    print_header('step', f'share of rows kept: {SOURCES[0]}', *SOURCES[1:])
    for record in entry.records:
        if 'select/reference' in record:
            kept = [f'{record[f"select/kept_{source}"]:.0%}' for source in SOURCES]
            print_row(record['step'], *kept)


def print_self_influence(entries, seeds, data):
    steps = (100, 200, 300, 400)
    print_header('self-influence: AUROC above clean rows at step', *steps)
    for arm, what in (('oracle', 'trained on clean text'), ('uniform', 'trained on junk as well')):
        folders = [entries[arm, seed].folder for seed in seeds]
        found = np.array([[self_influence(f, step, data) for f in folders] for step in steps])
        for i, kind in enumerate(('shuffled', 'random')):
            print_row(f'{kind} rows, {what}', *(in_turn(at_step[:, i]) for at_step in found))


if __name__ == '__main__':
    configure(globals(), verbose=False)
    if not text or not tokenizer:
        raise BadInput('--text and --tokenizer are missing.')
    out = os.path.abspath(out)
    data = os.path.join(out, 'data')
    prepare(data, text, tokenizer)
    common = dict(KNOBS, data_dir=data, sources=dict.fromkeys(SOURCES, 1.0))
    common = write_config(os.path.join(out, 'common.py'), common)
    train_arms(out, {arm: ARMS[arm] for arm in arms}, seeds, jobs, common)
    entries = read_arms(out, arms, seeds)
    print_losses(entries, arms, seeds)
    if 'select' in arms:
        print_selection(entries['select', seeds[0]])
    if 'oracle' in arms and 'uniform' in arms:
        print_self_influence(entries, seeds, data)
    write_summary(out)
