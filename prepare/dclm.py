"""DCLM-Baseline: filtered Common Crawl -> data/dclm/.

    python prepare/dclm.py --tokenizer=tokenizer.json --max_tokens=1_000_000_000

3 billion documents, 4 trillion tokens (GPT-NeoX), some 7 TB to read, 16 TB of shards: set
--max_tokens. CC BY 4.0. The newest commit is taken and recorded.
https://huggingface.co/datasets/mlfoundations/dclm-baseline-1.0-parquet
"""
import _path  # noqa: F401  (import path)

from configurator import configure
from prepare.common import Dataset, PrepareConfig, prepare

REPO = 'hf://datasets/mlfoundations/dclm-baseline-1.0-parquet'
FILES = [f'{REPO}/filtered/**/*.parquet']
DATASET = Dataset('dclm', FILES, documents=3e9, tokens=4e12, licence='CC BY 4.0')

if __name__ == '__main__':
    prepare(DATASET, configure(globals(), owners=(PrepareConfig,)))
