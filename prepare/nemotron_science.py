"""Llama-Nemotron post-training data, science, as pre-training text -> data/nemotron_science/.

    python prepare/nemotron_science.py --tokenizer=tokenizer.json --max_tokens=1_000_000_000

708,920 documents, 2 billion tokens, 8 GB of shards. CC BY 4.0.
https://huggingface.co/datasets/nvidia/Llama-Nemotron-Post-Training-Dataset (science)
"""
import _path  # noqa: F401  (import path)

from configurator import configure
from prepare.common import PrepareConfig, nemotron_dataset, prepare

DATASET = nemotron_dataset('science', documents=708_920, tokens=2e9)

if __name__ == '__main__':
    prepare(DATASET, configure(globals(), owners=(PrepareConfig,)))
