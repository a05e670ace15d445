"""RedPajama's Stack Exchange: questions with their answers -> data/stackexchange/.

    python prepare/stackexchange.py --tokenizer=path/to/tokenizer.json --max_tokens=1_000_000_000

29.2 million documents, 20 billion tokens, about 75 GB to read, 80 GB of shards. CC BY-SA. Not on the hub: one file at its makers,
read in ranges; --revision has no effect.
https://huggingface.co/datasets/togethercomputer/RedPajama-Data-1T (stackexchange)
"""

import _path  # noqa: F401

from configurator import configure
from prepare import knobs
from prepare.common import Dataset, prepare

DATASET = Dataset(
    'stackexchange',
    ['https://data.together.xyz/redpajama-data-1T/v1.0.0/stackexchange/stackexchange.jsonl'],
    columns=['text'], documents=29.2e6, tokens=20e9, licence='CC BY-SA')


def text_of(record):
    return record['text']


if __name__ == '__main__':
    prepare(DATASET, text_of, configure(globals(), shared=knobs))
