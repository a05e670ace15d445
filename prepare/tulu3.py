"""Tulu 3, the mixture for OLMo 2 of February 2025: conversations for general SFT -> data/tulu3/.

    python prepare/tulu3.py --tokenizer=tokenizer.json --max_tokens=1_000_000_000

866,138 conversations, 0.6 billion tokens, 1.3 GB to read. Parts keep their own licences, some of
them not for commercial use. The newest commit is taken and recorded.
https://huggingface.co/datasets/allenai/tulu-3-sft-olmo-2-mixture-0225
"""
import _path  # noqa: F401  (import path)

from configurator import configure, one_of
from prepare.common import Dataset, PrepareConfig, prepare

# -- knobs --
chat_template: one_of('llama3', 'chatml', 'model') = 'llama3'    # the tokenizer must have its
                                 # special tokens. model: that of the tokenizer's folder

REPO = 'hf://datasets/allenai/tulu-3-sft-olmo-2-mixture-0225'
FILES = [f'{REPO}/data/*.parquet']
CARD = dict(documents=866_138, tokens=0.6e9, licence='none named; parts their own')
DATASET = Dataset('tulu3', FILES, ('messages',), **CARD)

if __name__ == '__main__':
    config = configure(globals(), owners=(PrepareConfig,))
    prepare(DATASET, config, chat_template)
