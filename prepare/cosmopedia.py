"""Cosmopedia: synthetic textbooks, stories and articles -> data/cosmopedia/.

    python prepare/cosmopedia.py --tokenizer=tokenizer.json --max_tokens=1_000_000_000

31 million documents, 25 billion tokens, about 92 GB to read, 100 GB of shards. Apache 2.0.
https://huggingface.co/datasets/HuggingFaceTB/cosmopedia
"""
import _path  # noqa: F401  (import path)

from configurator import configure
from prepare.common import Dataset, PrepareConfig, prepare

REPO = 'hf://datasets/HuggingFaceTB/cosmopedia@0ae6ec63f91742bd2d1eaef4f02232c55d719385'
FILES = [f'{REPO}/data/*/*.parquet']
DATASET = Dataset('cosmopedia', FILES, documents=31e6, tokens=25e9, licence='Apache 2.0')

if __name__ == '__main__':
    prepare(DATASET, configure(globals(), owners=(PrepareConfig,)))
