"""Nemotron-Pretraining-Code v1, its synthetic part -> data/nemotron_pretraining_code/.

    python prepare/nemotron_pretraining_code.py --tokenizer=path/to/tokenizer.json --max_tokens=1_000_000_000

About 175 billion tokens. Gated, by hand: ask on its page first. NVIDIA's agreement for model training. The other part of the
dataset, Nemotron-Code-Metadata, has no text: repositories and commits to fetch from GitHub (747 billion tokens); not read here.
https://huggingface.co/datasets/nvidia/Nemotron-Pretraining-Code-v1
"""

import _path  # noqa: F401

from configurator import configure
from prepare import knobs
from prepare.common import Dataset, prepare

DATASET = Dataset(
    'nemotron_pretraining_code',
    ['hf://datasets/nvidia/Nemotron-Pretraining-Code-v1/Synthetic-Code/*.parquet'],
    columns=['text'], documents=259e6, tokens=175e9, licence='NVIDIA Data Agreement for Model Training')


def text_of(record):
    return record['text']


if __name__ == '__main__':
    prepare(DATASET, text_of, configure(globals(), shared=knobs))
