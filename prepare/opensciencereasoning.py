"""OpenScienceReasoning-2: questions, long answers in <think> spans -> data/opensciencereasoning/.

    python prepare/opensciencereasoning.py --tokenizer=tokenizer.json --max_tokens=1_000_000_000

803,000 conversations, 15.7 GB to read, about 8 billion tokens. CC BY 4.0.
https://huggingface.co/datasets/nvidia/OpenScienceReasoning-2
"""
import _path  # noqa: F401  (import path)

from configurator import configure, one_of
from prepare.common import Dataset, PrepareConfig, conversation, prepare

# -- knobs --
chat_template: one_of('llama3', 'chatml', 'model') = 'llama3'    # the tokenizer must have its
                                 # special tokens. model: that of the tokenizer's folder

REPO = 'hf://datasets/nvidia/OpenScienceReasoning-2@174b02c9cdf231f220765b2a1d5ece4550921894'
FILES = [f'{REPO}/train/*.parquet']


def messages_of(record):
    return conversation(record['input'], record['output'])


CARD = dict(documents=803e3, tokens=8e9, licence='CC BY 4.0')
DATASET = Dataset('opensciencereasoning', FILES, ('input', 'output'), messages_of, **CARD)

if __name__ == '__main__':
    config = configure(globals(), owners=(PrepareConfig,))
    prepare(DATASET, config, chat_template)
