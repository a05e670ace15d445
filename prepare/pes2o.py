"""peS2o v2: scientific papers, full texts and abstracts -> data/pes2o/.

    python prepare/pes2o.py --tokenizer=path/to/tokenizer.json --max_tokens=1_000_000_000

39 million documents, 42 billion words, about 60 billion tokens, 100 GB to read, 240 GB of shards. ODC-By. The newest commit is
taken and recorded.
https://huggingface.co/datasets/allenai/peS2o
"""

import _path  # noqa: F401

from configurator import configure
from prepare import knobs
from prepare.common import Dataset, prepare

DATASET = Dataset(
    'pes2o',
    ['hf://datasets/allenai/peS2o/data/v2/train-*.json.gz'],
    columns=['text'], documents=38.97e6, tokens=60e9, licence='ODC-By')


def text_of(record):
    return record['text']


if __name__ == '__main__':
    prepare(DATASET, text_of, configure(globals(), shared=knobs))
