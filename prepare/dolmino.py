"""Dolmino, the mid-training mix of OLMo 2, a subset at a time -> data/dolmino_<subset>/.

    python prepare/dolmino.py --tokenizer=path/to/tokenizer.json --max_tokens=1_000_000_000

Tokens: dclm 752B, flan 17B, pes2o 58.6B, wiki 3.7B, stackexchange 1.26B, math 10.7B. ODC-By; parts keep their own licences.
The test split of GSM8K, which lies among the math files, is left out.
https://huggingface.co/datasets/allenai/dolmino-mix-1124
"""

import _path  # noqa: F401

from configurator import BadInput, configure
from prepare import knobs
from prepare.common import Dataset, prepare

# -- knobs --
subset = ''                      # dclm, flan, pes2o, wiki, stackexchange or math

REPOSITORY = 'hf://datasets/allenai/dolmino-mix-1124@a319f19eef1e257417b11ea8c30da266ae175557'
SUBSETS = {     # files, documents, tokens
    'dclm': (['data/dclm/*/*.json.zst'], 606e6, 752e9),
    'flan': (['data/flan/*.json.gz'], 57.3e6, 17e9),
    'pes2o': (['data/pes2o/*.json.gz'], 38.8e6, 58.6e9),
    'wiki': (['data/wiki/*.json.gz'], 6.17e6, 3.7e9),
    'stackexchange': (['data/stackexchange/*.json.gz'], 2.48e6, 1.26e9),
    'math': (['data/math/codesearchnet-owmfilter/**/*.jsonl*', 'data/math/dolmino_math_synth/**/*.jsonl*',
              'data/math/gsm8k/*/train/*.jsonl*', 'data/math/mathcoder2-synthmath/**/*.jsonl*',
              'data/math/metamath-owmfilter/*.jsonl*', 'data/math/tinyGSM-MIND/**/*.jsonl*', 'data/math/tulu_math/**/*.jsonl*'],
             21e6, 10.7e9)}


def dataset_of(subset):
    files, documents, tokens = SUBSETS[subset]
    return Dataset(f'dolmino_{subset}', [f'{REPOSITORY}/{name}' for name in files], columns=['text'], documents=documents,
                   tokens=tokens, licence='ODC-By, parts their own')


def text_of(record):
    return record['text']


if __name__ == '__main__':
    settings = configure(globals(), shared=knobs)
    if subset not in SUBSETS:
        raise BadInput(f"subset = '{subset}' must be one of {', '.join(SUBSETS)}.")
    prepare(dataset_of(subset), text_of, settings)
