"""Tulu 3, the mixture for OLMo 2 of February 2025: conversations for general SFT -> data/tulu3/.

    python prepare/tulu3.py --tokenizer=path/to/tokenizer.json --max_tokens=1_000_000_000

866,138 conversations, 1.3 GB to read. Parts keep their own licences, some not for commercial use. The newest commit is taken
and recorded.
https://huggingface.co/datasets/allenai/tulu-3-sft-olmo-2-mixture-0225
"""

import _path  # noqa: F401

from configurator import configure
from prepare import knobs
from prepare.common import Dataset, prepare

# -- knobs --
chat_template = 'llama3'          # or chatml; the tokenizer must have its special tokens

DATASET = Dataset(
    'tulu3',
    ['hf://datasets/allenai/tulu-3-sft-olmo-2-mixture-0225/data/*.parquet'],
    columns=['messages'], documents=866_138, tokens=0.6e9, licence='none named; parts their own')


def messages_of(record):
    return record['messages']


if __name__ == '__main__':
    prepare(DATASET, messages_of, configure(globals(), shared=knobs), chat_template)
