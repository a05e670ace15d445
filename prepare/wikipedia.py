"""English and simple Wikipedia, as cleaned for OLMo 2 -> data/wikipedia/.

    python prepare/wikipedia.py --tokenizer=tokenizer.json --max_tokens=1_000_000_000

6.2 million documents, 3.7 billion tokens, 16 GB of text, 15 GB of shards. ODC-By, text CC BY-SA.
https://huggingface.co/datasets/allenai/dolmino-mix-1124 (wiki)
"""
import _path  # noqa: F401  (import path)

from configurator import configure
from prepare.common import Dataset, PrepareConfig, prepare

REPO = 'hf://datasets/allenai/dolmino-mix-1124@a319f19eef1e257417b11ea8c30da266ae175557'
FILES = [f'{REPO}/data/wiki/*.json.gz']
DATASET = Dataset(
    'wikipedia', FILES, documents=6.17e6, tokens=3.7e9, licence='ODC-By, text CC BY-SA')

if __name__ == '__main__':
    prepare(DATASET, configure(globals(), owners=(PrepareConfig,)))
