"""GitHub code of 2025, repositories with more than two stars -> data/github_code/.

    python prepare/github_code.py --tokenizer=path/to/tokenizer.json --max_tokens=1_000_000_000

About 148 million files in all, up to 1 TB to read; its page gives no count of tokens: set --max_tokens. Each file keeps its own
licence, which the dataset does not name.
https://huggingface.co/datasets/nick007x/github-code-2025
"""

import _path  # noqa: F401

from configurator import configure
from prepare import knobs
from prepare.common import Dataset, prepare

DATASET = Dataset(
    'github_code',
    ['hf://datasets/nick007x/github-code-2025@bf2a04e37df752907248512e01977586784ac608/above-2-stars/*.parquet'],
    columns=['content'], documents=148e6, tokens=None, licence='that of each file (not named)')


def text_of(record):
    return record['content']


if __name__ == '__main__':
    prepare(DATASET, text_of, configure(globals(), shared=knobs))
