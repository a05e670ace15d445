"""FineWeb-Edu: web pages of educational value -> data/fineweb_edu/.

    python prepare/fineweb_edu.py --tokenizer=tokenizer.json --max_tokens=1_000_000_000

1.3 billion documents, 1.3 trillion tokens (GPT-2), about 4 TB to read and 5 TB of shards.
--sample=100BT reads one of the samples that its authors drew (10BT, 100BT, 350BT). ODC-By.
https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu
"""
import _path  # noqa: F401  (import path)

from configurator import configure, one_of
from prepare.common import Dataset, PrepareConfig, prepare

# -- knobs --
sample: one_of('10BT', '100BT', '350BT') | None = None   # about that many tokens. None: all

REPO = 'hf://datasets/HuggingFaceFW/fineweb-edu@3c452cb1c31a957685cf2699bfd051afacd37422'
SAMPLES = {     # documents, tokens
    None: (1.28e9, 1.3e12),
    '10BT': (9.7e6, 1e10),
    '100BT': (97e6, 1e11),
    '350BT': (340e6, 3.5e11)}


def dataset_of(sample):
    documents, tokens = SAMPLES[sample]
    folder = 'data/*' if sample is None else f'sample/{sample}'
    return Dataset(
        'fineweb_edu', [f'{REPO}/{folder}/*.parquet'], documents=documents, tokens=tokens,
        licence='ODC-By')


DATASET = dataset_of(None)

if __name__ == '__main__':
    config = configure(globals(), owners=(PrepareConfig,))
    prepare(dataset_of(sample), config)
