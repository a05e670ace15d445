"""Nemotron-CC-Math v1: mathematics of Common Crawl, quality 3 and above -> data/nemotron_cc_math/.

    python prepare/nemotron_cc_math.py --tokenizer=path/to/tokenizer.json --max_tokens=1_000_000_000

101 million documents, 133 billion tokens, 532 GB of shards. Gated: accept the terms on its page first. NVIDIA's agreement for
model training. Items of GSM8K's test set were found in it: do not report that benchmark without a look.
https://huggingface.co/datasets/nvidia/Nemotron-CC-Math-v1
"""

import _path  # noqa: F401

from configurator import configure
from prepare import knobs
from prepare.common import Dataset, prepare

DATASET = Dataset(
    'nemotron_cc_math',
    ['hf://datasets/nvidia/Nemotron-CC-Math-v1@397a2502f2028c659ba411a6c4935b464a7f03aa/3/*.parquet',
     'hf://datasets/nvidia/Nemotron-CC-Math-v1@397a2502f2028c659ba411a6c4935b464a7f03aa/4plus/*.parquet'],
    columns=['text'], documents=101e6, tokens=133e9, licence='NVIDIA Data Agreement for Model Training')


def text_of(record):
    return record['text']


if __name__ == '__main__':
    prepare(DATASET, text_of, configure(globals(), shared=knobs))
