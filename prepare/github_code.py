"""GitHub code of 2025 from repositories with more than two stars -> data/github_code/.

    python prepare/github_code.py --tokenizer=tokenizer.json --max_tokens=1_000_000_000

About 148 million files, up to 1 TB to read. Its page gives no number of tokens: set --max_tokens.
Each file keeps its own licence, which the dataset does not name.
https://huggingface.co/datasets/nick007x/github-code-2025
"""
import _path  # noqa: F401  (import path)

from configurator import configure
from prepare.common import Dataset, PrepareConfig, prepare

REPO = 'hf://datasets/nick007x/github-code-2025@bf2a04e37df752907248512e01977586784ac608'
FILES = [f'{REPO}/above-2-stars/*.parquet']
CARD = dict(documents=148e6, licence='that of each file (not named)')
DATASET = Dataset('github_code', FILES, columns=('content',), **CARD)

if __name__ == '__main__':
    prepare(DATASET, configure(globals(), owners=(PrepareConfig,)))
