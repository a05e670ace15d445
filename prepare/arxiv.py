"""RedPajama's arXiv, LaTeX sources without preambles and bibliographies, as Proof-Pile-2 keeps it on the hub -> data/arxiv/.

    python prepare/arxiv.py --tokenizer=path/to/tokenizer.json --max_tokens=1_000_000_000

1.5 million documents, 28 billion tokens, 30 GB to read, 112 GB of shards. RedPajama itself hosts the same text off the hub.
https://huggingface.co/datasets/EleutherAI/proof-pile-2 (arxiv)
"""

import _path  # noqa: F401

from configurator import configure
from prepare import knobs
from prepare.common import Dataset, prepare

DATASET = Dataset(
    'arxiv',
    ['hf://datasets/EleutherAI/proof-pile-2@901a9273a770e9d4138c5ddd91802f9c5c6cdc4b/arxiv/train/*.jsonl.zst'],
    columns=['text'], documents=1.5e6, tokens=28e9, licence="arXiv's terms")


def text_of(record):
    return record['text']


if __name__ == '__main__':
    prepare(DATASET, text_of, configure(globals(), shared=knobs))
