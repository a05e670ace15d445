"""Llama-Nemotron post-training data, math: questions and answers as pre-training text -> data/nemotron_math/.

    python prepare/nemotron_math.py --tokenizer=path/to/tokenizer.json --max_tokens=1_000_000_000

22.1 million documents, 15 billion tokens, 60 GB of shards: both files, v1 and the addition v1.1, as the paper counts them. CC BY 4.0.
https://huggingface.co/datasets/nvidia/Llama-Nemotron-Post-Training-Dataset (math)
"""

import _path  # noqa: F401

from configurator import configure
from prepare import knobs
from prepare.common import Dataset, prepare
from prepare.nemotron_science import text_of

DATASET = Dataset(
    'nemotron_math',
    ['hf://datasets/nvidia/Llama-Nemotron-Post-Training-Dataset@8e1e47a67ced79723ad0735efc5a45f8bb5aabd6/SFT/math/*.jsonl'],
    columns=['input', 'output'], documents=22.1e6, tokens=15e9, licence='CC BY 4.0')


if __name__ == '__main__':
    prepare(DATASET, text_of, configure(globals(), shared=knobs))
