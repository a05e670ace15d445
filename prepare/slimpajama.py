"""SlimPajama: RedPajama cleaned and deduplicated -> data/slimpajama/.

    python prepare/slimpajama.py --tokenizer=path/to/tokenizer.json --max_tokens=1_000_000_000

590 million documents, 627 billion tokens (GPT-NeoX), 895 GB to read, 2.5 TB of shards. Each part keeps its own licence. Its page
was out of reach at times in 2026; --input takes a copy. The part RedPajamaBook, withdrawn by its makers, is left out.
https://huggingface.co/datasets/cerebras/SlimPajama-627B
"""

import _path  # noqa: F401

from configurator import configure
from prepare import knobs
from prepare.common import Dataset, prepare

DATASET = Dataset(
    'slimpajama',
    ['hf://datasets/cerebras/SlimPajama-627B@2d0accdd58c5d5511943ca1f5ff0e3eb5e293543/train/chunk*/*.jsonl.zst'],
    columns=['text', 'meta'], documents=590e6, tokens=627e9, licence='that of each part')


def text_of(record):
    return None if record['meta']['redpajama_set_name'] == 'RedPajamaBook' else record['text']


if __name__ == '__main__':
    prepare(DATASET, text_of, configure(globals(), shared=knobs))
