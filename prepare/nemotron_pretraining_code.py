"""Nemotron-Pretraining-Code v1, its synthetic part -> data/nemotron_pretraining_code/.

    python prepare/nemotron_pretraining_code.py --tokenizer=tokenizer.json --max_tokens=100_000_000

About 175 billion tokens. Gated by hand: ask on its page first. NVIDIA's agreement for model
training. The other part, Nemotron-Code-Metadata, is not read. It has no text, only repositories and
commits to fetch from GitHub (747 billion tokens).
https://huggingface.co/datasets/nvidia/Nemotron-Pretraining-Code-v1
"""
import _path  # noqa: F401  (import path)

from configurator import configure
from prepare.common import Dataset, PrepareConfig, prepare

REPO = 'hf://datasets/nvidia/Nemotron-Pretraining-Code-v1'
FILES = [f'{REPO}/Synthetic-Code/*.parquet']
CARD = dict(documents=259e6, tokens=175e9, licence='NVIDIA Data Agreement for Model Training')
DATASET = Dataset('nemotron_pretraining_code', FILES, **CARD)

if __name__ == '__main__':
    prepare(DATASET, configure(globals(), owners=(PrepareConfig,)))
