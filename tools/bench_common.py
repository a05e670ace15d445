"""What both benchmarks share: jobs in turns, a random cache of a teacher, and the loader's speed."""
import os
import statistics
import tempfile
import time

import numpy as np
import torch

from data import MixtureLoader, Source, shard_bytes
from kd import Cached


def clock():
    """Wall time behind a GPU's queue, CPU time of the process where there is none."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def in_turns(jobs, rounds, warm_up=True):
    """Median seconds (`clock`) of every job, {name: function}, and their ratios to the first by round: alternating, `rounds` times."""
    seconds = {name: [] for name in jobs}
    for i in range(rounds + warm_up):
        for name, job in jobs.items():
            start = clock()
            job()
            if i or not warm_up:
                seconds[name].append(clock() - start)
    first = next(iter(jobs))
    ratios = {name: [b / a for a, b in zip(seconds[first], values)] for name, values in seconds.items()}
    return {name: statistics.median(values) for name, values in seconds.items()}, ratios


def spread(values, digits=2):
    """Median and range as text."""
    return f'**{statistics.median(values):.{digits}f}** ({min(values):.{digits}f} to {max(values):.{digits}f})'


def random_cache(n, vocab_size, k=64, draws=16, device='cpu'):
    """kd.Cached of n tokens, random."""
    logq = torch.log_softmax(torch.randn(n, k + 1) * 3, 1)
    ids = torch.rand(n, vocab_size).topk(k, 1).indices if vocab_size < 10_000 else torch.randint(vocab_size // k, (n, k)) + torch.arange(k) * (vocab_size // k)
    tensors = (ids, logq[:, :k].contiguous(), logq[:, k].contiguous(), torch.randint(vocab_size, (n, draws)), torch.zeros(n), ids[:, 0].contiguous(),
               logq[:, 0].contiguous(), torch.zeros(n, dtype=torch.long))
    return Cached(*(t.to(device) for t in tensors), None)


def random_shards(folder, name, n, tokens, vocab_size):
    """A source of n training shards of random tokens."""
    os.makedirs(f'{folder}/{name}/train')
    for i in range(n):
        with open(f'{folder}/{name}/train/{i:06d}.bin', 'wb') as f:
            f.writelines(shard_bytes(np.random.default_rng([ord(name[0]), i]).integers(0, vocab_size, tokens), vocab_size))


def loader_rate(rounds=3):
    """Millions of tokens per CPU-second from 200 MB of shards through MixtureLoader, 16 rows of 2048 at a time: (rounds' rates, of the bare copy)."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ('a', 'b', 'c', 'd'):
            random_shards(folder, name, 5, 5_000_000, 49152)
        loader = MixtureLoader([Source(folder, name, 'train', 2048, 0, 49152) for name in 'abcd'], {'a': 0.4, 'b': 0.3, 'c': 0.2, 'd': 0.1})
        rates = []
        for _ in range(rounds + 1):
            start = time.process_time()
            for _ in range(1000):
                loader.read(*loader.next_batch(16))
            rates.append(1000 * 16 * 2048 / (time.process_time() - start) / 1e6)
        row = np.zeros(2049, dtype=np.int32)
        tokens = np.memmap(f'{folder}/a/train/000000.bin', dtype='<u2', mode='r', offset=1024)
        start = time.process_time()
        for i in range(16_000):
            row[:] = tokens[i % 2000 * 2048:i % 2000 * 2048 + 2049]
        return rates[1:], 16_000 * 2048 / (time.process_time() - start) / 1e6
