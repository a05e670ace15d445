"""arXiv papers of RedPajama: LaTeX without preambles and bibliographies -> data/arxiv/.

    python prepare/arxiv.py --tokenizer=tokenizer.json --max_tokens=1_000_000_000

1.5 million documents, 28 billion tokens, 30 GB to read, 112 GB of shards. The files are the copy
that Proof-Pile-2 keeps on the hub. RedPajama itself hosts the same text elsewhere.
https://huggingface.co/datasets/EleutherAI/proof-pile-2 (arxiv)
"""
import _path  # noqa: F401  (import path)

from configurator import configure
from prepare.common import Dataset, PrepareConfig, prepare

REPO = 'hf://datasets/EleutherAI/proof-pile-2@901a9273a770e9d4138c5ddd91802f9c5c6cdc4b'
FILES = [f'{REPO}/arxiv/train/*.jsonl.zst']
DATASET = Dataset('arxiv', FILES, documents=1.5e6, tokens=28e9, licence="arXiv's terms")

if __name__ == '__main__':
    prepare(DATASET, configure(globals(), owners=(PrepareConfig,)))
