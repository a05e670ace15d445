"""FineMath 3+: mathematical web pages with a quality score of at least 3 -> data/finemath/.

    python prepare/finemath.py --tokenizer=tokenizer.json --max_tokens=1_000_000_000

21.4 million documents, 34 billion tokens, 65 GB to read, 136 GB of shards with a vocabulary above
65,536. ODC-By.
https://huggingface.co/datasets/HuggingFaceTB/finemath
"""
import _path  # noqa: F401  (import path)

from configurator import configure
from prepare.common import Dataset, PrepareConfig, prepare

REPO = 'hf://datasets/HuggingFaceTB/finemath@e92b25a616738fe95dc186b64dfb19f9c8525594'
FILES = [f'{REPO}/finemath-3plus/*.parquet']
DATASET = Dataset('finemath', FILES, documents=21.4e6, tokens=34e9, licence='ODC-By')

if __name__ == '__main__':
    prepare(DATASET, configure(globals(), owners=(PrepareConfig,)))
