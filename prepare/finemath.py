"""FineMath 3+: web pages of mathematics with a quality score of at least 3 -> data/finemath/.

    python prepare/finemath.py --tokenizer=path/to/tokenizer.json --max_tokens=1_000_000_000

21.4 million documents, 34 billion tokens, 65 GB to read, 136 GB of shards with a vocabulary above 65,536. ODC-By.
https://huggingface.co/datasets/HuggingFaceTB/finemath
"""

import _path  # noqa: F401

from configurator import configure
from prepare import knobs
from prepare.common import Dataset, prepare

DATASET = Dataset(
    'finemath',
    ['hf://datasets/HuggingFaceTB/finemath@e92b25a616738fe95dc186b64dfb19f9c8525594/finemath-3plus/*.parquet'],
    columns=['text'], documents=21.4e6, tokens=34e9, licence='ODC-By')


def text_of(record):
    return record['text']


if __name__ == '__main__':
    prepare(DATASET, text_of, configure(globals(), shared=knobs))
