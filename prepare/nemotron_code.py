"""Llama-Nemotron post-training data, code, as pre-training text -> data/nemotron_code/.

    python prepare/nemotron_code.py --tokenizer=tokenizer.json --max_tokens=1_000_000_000

10.1 million documents, 16 billion tokens, 64 GB of shards. Both files, v1 and the addition v1.1,
are read, as in the paper. CC BY 4.0.
https://huggingface.co/datasets/nvidia/Llama-Nemotron-Post-Training-Dataset (code)
"""
import _path  # noqa: F401  (import path)

from configurator import configure
from prepare.common import PrepareConfig, nemotron_dataset, prepare

DATASET = nemotron_dataset('code', documents=10.1e6, tokens=16e9)

if __name__ == '__main__':
    prepare(DATASET, configure(globals(), owners=(PrepareConfig,)))
