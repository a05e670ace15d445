"""StarCoder data: code in 86 languages, notebooks, issues and commits -> data/starcoder/.

    python prepare/starcoder.py --tokenizer=tokenizer.json --max_tokens=1_000_000_000

207 million documents, about 250 billion tokens, 311 GB to read, 1 TB of shards. Gated: accept the
terms on its page first. The marks for repository, file name and stars before a file are cut off.
Each file keeps its own licence.
https://huggingface.co/datasets/bigcode/starcoderdata
"""
import re

import _path  # noqa: F401  (import path)

from configurator import configure
from prepare.common import Dataset, PrepareConfig, prepare

REPO = 'hf://datasets/bigcode/starcoderdata@9fc30b578cedaec69e47302df72cf00feed7c8c4'
FILES = [f'{REPO}/*/*.parquet']
MARKS = re.compile(r'(?:<(?:reponame|filename|gh_stars)>[^<\n]*)+\n?')


def text_of(record):
    mark = MARKS.match(record['content'])
    return record['content'][mark.end():] if mark else record['content']


CARD = dict(documents=206.6e6, tokens=250e9, licence='that of each file (The Stack v1.2 terms)')
DATASET = Dataset('starcoder', FILES, ('content',), text_of, **CARD)

if __name__ == '__main__':
    prepare(DATASET, configure(globals(), owners=(PrepareConfig,)))
