"""Llama-Nemotron post-training data, code: questions and answers as pre-training text -> data/nemotron_code/.

    python prepare/nemotron_code.py --tokenizer=path/to/tokenizer.json --max_tokens=1_000_000_000

10.1 million documents, 16 billion tokens, 64 GB of shards: both files, v1 and the addition v1.1, as the paper counts them. CC BY 4.0.
https://huggingface.co/datasets/nvidia/Llama-Nemotron-Post-Training-Dataset (code)
"""

import _path  # noqa: F401

from configurator import configure
from prepare import knobs
from prepare.common import Dataset, prepare
from prepare.nemotron_science import text_of

DATASET = Dataset(
    'nemotron_code',
    ['hf://datasets/nvidia/Llama-Nemotron-Post-Training-Dataset@8e1e47a67ced79723ad0735efc5a45f8bb5aabd6/SFT/code/*.jsonl'],
    columns=['input', 'output'], documents=10.1e6, tokens=16e9, licence='CC BY 4.0')


if __name__ == '__main__':
    prepare(DATASET, text_of, configure(globals(), shared=knobs))
