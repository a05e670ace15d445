"""OpenWebMath: web pages with mathematics, LaTeX kept -> data/openwebmath/.

    python prepare/openwebmath.py --tokenizer=tokenizer.json --max_tokens=1_000_000_000

6.3 million documents, 14.7 billion tokens, 27 GB to read, 59 GB of shards. ODC-By. The newest
commit is taken and recorded.
https://huggingface.co/datasets/open-web-math/open-web-math
"""
import _path  # noqa: F401  (import path)

from configurator import configure
from prepare.common import Dataset, PrepareConfig, prepare

REPO = 'hf://datasets/open-web-math/open-web-math'
FILES = [f'{REPO}/data/*.parquet']
DATASET = Dataset('openwebmath', FILES, documents=6.3e6, tokens=14.7e9, licence='ODC-By')

if __name__ == '__main__':
    prepare(DATASET, configure(globals(), owners=(PrepareConfig,)))
