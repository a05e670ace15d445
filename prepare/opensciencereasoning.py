"""OpenScienceReasoning-2: questions of science with long answers in <think> spans -> data/opensciencereasoning/.

    python prepare/opensciencereasoning.py --tokenizer=path/to/tokenizer.json --max_tokens=1_000_000_000

803,000 conversations, 15.7 GB to read, about 8 billion tokens. CC BY 4.0.
https://huggingface.co/datasets/nvidia/OpenScienceReasoning-2
"""

import _path  # noqa: F401

from configurator import configure
from prepare import knobs
from prepare.common import Dataset, prepare

# -- knobs --
chat_template = 'llama3'          # or chatml; the tokenizer must have its special tokens

DATASET = Dataset(
    'opensciencereasoning',
    ['hf://datasets/nvidia/OpenScienceReasoning-2@174b02c9cdf231f220765b2a1d5ece4550921894/train/*.parquet'],
    columns=['input', 'output'], documents=803e3, tokens=8e9, licence='CC BY 4.0')


def messages_of(record):
    return [dict(role='user', content=record['input']), dict(role='assistant', content=record['output'])]


if __name__ == '__main__':
    prepare(DATASET, messages_of, configure(globals(), shared=knobs), chat_template)
