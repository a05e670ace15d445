"""peS2o v2: full texts and abstracts of scientific papers -> data/pes2o/.

    python prepare/pes2o.py --tokenizer=tokenizer.json --max_tokens=1_000_000_000

39 million documents, 42 billion words, about 60 billion tokens, 100 GB to read, 240 GB of shards.
ODC-By. The newest commit is taken and recorded.
https://huggingface.co/datasets/allenai/peS2o
"""
import _path  # noqa: F401  (import path)

from configurator import configure
from prepare.common import Dataset, PrepareConfig, prepare

REPO = 'hf://datasets/allenai/peS2o'
FILES = [f'{REPO}/data/v2/train-*.json.gz']
DATASET = Dataset('pes2o', FILES, documents=38.97e6, tokens=60e9, licence='ODC-By')

if __name__ == '__main__':
    prepare(DATASET, configure(globals(), owners=(PrepareConfig,)))
