"""AlgebraicStack: mathematical code, from Agda to formal proofs -> data/algebraic_stack/.

    python prepare/algebraic_stack.py --tokenizer=tokenizer.json --max_tokens=1_000_000_000

3.4 million documents, 11 billion tokens, about 10 GB to read, 44 GB of shards. Each file keeps its
own licence.
https://huggingface.co/datasets/EleutherAI/proof-pile-2 (algebraic-stack)
"""
import _path  # noqa: F401  (import path)

from configurator import configure
from prepare.common import Dataset, PrepareConfig, prepare

REPO = 'hf://datasets/EleutherAI/proof-pile-2@901a9273a770e9d4138c5ddd91802f9c5c6cdc4b'
FILES = [f'{REPO}/algebraic-stack/train/*.jsonl.zst']
DATASET = Dataset(
    'algebraic_stack', FILES, documents=3.4e6, tokens=11e9, licence='that of each file')

if __name__ == '__main__':
    prepare(DATASET, configure(globals(), owners=(PrepareConfig,)))
