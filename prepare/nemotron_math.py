"""Llama-Nemotron post-training data, math, as pre-training text -> data/nemotron_math/.

    python prepare/nemotron_math.py --tokenizer=tokenizer.json --max_tokens=1_000_000_000

22.1 million documents, 15 billion tokens, 60 GB of shards. Both files, v1 and the addition v1.1,
are read, as in the paper. CC BY 4.0.
https://huggingface.co/datasets/nvidia/Llama-Nemotron-Post-Training-Dataset (math)
"""
import _path  # noqa: F401  (import path)

from configurator import configure
from prepare.common import PrepareConfig, nemotron_dataset, prepare

DATASET = nemotron_dataset('math', documents=22.1e6, tokens=15e9)

if __name__ == '__main__':
    prepare(DATASET, configure(globals(), owners=(PrepareConfig,)))
