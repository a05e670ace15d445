"""Nemotron-CC-Math v1: mathematics from Common Crawl, quality >= 3 -> data/nemotron_cc_math/.

    python prepare/nemotron_cc_math.py --tokenizer=tokenizer.json --max_tokens=1_000_000_000

101 million documents, 133 billion tokens, 532 GB of shards. Gated: accept the terms on its page
first. NVIDIA's agreement for model training. It contains items of GSM8K's test set: check before
you report that benchmark.
https://huggingface.co/datasets/nvidia/Nemotron-CC-Math-v1
"""
import _path  # noqa: F401  (import path)

from configurator import configure
from prepare.common import Dataset, PrepareConfig, prepare

REPO = 'hf://datasets/nvidia/Nemotron-CC-Math-v1@397a2502f2028c659ba411a6c4935b464a7f03aa'
FILES = [f'{REPO}/3/*.parquet', f'{REPO}/4plus/*.parquet']
CARD = dict(documents=101e6, tokens=133e9, licence='NVIDIA Data Agreement for Model Training')
DATASET = Dataset('nemotron_cc_math', FILES, **CARD)

if __name__ == '__main__':
    prepare(DATASET, configure(globals(), owners=(PrepareConfig,)))
