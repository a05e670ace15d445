"""FineWeb-Edu: web pages of educational value -> data/fineweb_edu/.

    python prepare/fineweb_edu.py --tokenizer=path/to/tokenizer.json --max_tokens=1_000_000_000

1.3 billion documents, 1.3 trillion tokens (GPT-2), about 4 TB to read and 5 TB of shards; --sample=100BT reads one of the
samples that its authors drew (10BT, 100BT, 350BT). ODC-By.
https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu
"""

import _path  # noqa: F401

from configurator import BadInput, configure
from prepare import knobs
from prepare.common import Dataset, prepare

# -- knobs --
sample: str | None = None        # 10BT, 100BT or 350BT: a sample of about that many tokens; None: all

REPOSITORY = 'hf://datasets/HuggingFaceFW/fineweb-edu@3c452cb1c31a957685cf2699bfd051afacd37422'
SAMPLES = {None: ('data/*/*.parquet', 1.28e9, 1.3e12), '10BT': ('sample/10BT/*.parquet', 9.7e6, 1e10),
           '100BT': ('sample/100BT/*.parquet', 97e6, 1e11), '350BT': ('sample/350BT/*.parquet', 340e6, 3.5e11)}


def dataset_of(sample):
    files, documents, tokens = SAMPLES[sample]
    return Dataset('fineweb_edu', [f'{REPOSITORY}/{files}'], columns=['text'], documents=documents, tokens=tokens, licence='ODC-By')


DATASET = dataset_of(None)


def text_of(record):
    return record['text']


if __name__ == '__main__':
    settings = configure(globals(), shared=knobs)
    if sample not in SAMPLES:
        raise BadInput(f"sample = '{sample}' must be 10BT, 100BT, 350BT or None.")
    prepare(dataset_of(sample), text_of, settings)
