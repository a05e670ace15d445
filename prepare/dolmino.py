"""Dolmino, the mid-training mix of OLMo 2, one subset at a time -> data/dolmino_<subset>/.

    python prepare/dolmino.py --tokenizer=tokenizer.json --subset=math --max_tokens=1_000_000_000

Tokens: dclm 752B, flan 17B, pes2o 58.6B, wiki 3.7B, stackexchange 1.26B, math 10.7B. ODC-By; parts
keep their own licences. The test split of GSM8K, which is among the math files, is left out.
https://huggingface.co/datasets/allenai/dolmino-mix-1124
"""
import _path  # noqa: F401  (import path)

from configurator import configure, one_of
from prepare.common import Dataset, PrepareConfig, prepare

# -- knobs --
subset: one_of('dclm', 'flan', 'pes2o', 'wiki', 'stackexchange', 'math') = ''    # part of the mix

REPO = 'hf://datasets/allenai/dolmino-mix-1124@a319f19eef1e257417b11ea8c30da266ae175557/data'
MATH = (
    'codesearchnet-owmfilter/**/*.jsonl*', 'dolmino_math_synth/**/*.jsonl*',
    'gsm8k/*/train/*.jsonl*', 'mathcoder2-synthmath/**/*.jsonl*', 'metamath-owmfilter/*.jsonl*',
    'tinyGSM-MIND/**/*.jsonl*', 'tulu_math/**/*.jsonl*')
SUBSETS = {     # files, documents, tokens
    'dclm': (['dclm/*/*.json.zst'], 606e6, 752e9),
    'flan': (['flan/*.json.gz'], 57.3e6, 17e9),
    'pes2o': (['pes2o/*.json.gz'], 38.8e6, 58.6e9),
    'wiki': (['wiki/*.json.gz'], 6.17e6, 3.7e9),
    'stackexchange': (['stackexchange/*.json.gz'], 2.48e6, 1.26e9),
    'math': ([f'math/{name}' for name in MATH], 21e6, 10.7e9)}


def dataset_of(subset):
    names, documents, tokens = SUBSETS[subset]
    files = [f'{REPO}/{name}' for name in names]
    return Dataset(
        f'dolmino_{subset}', files, documents=documents, tokens=tokens,
        licence='ODC-By, parts their own')


if __name__ == '__main__':
    config = configure(globals(), owners=(PrepareConfig,))
    prepare(dataset_of(subset), config)
