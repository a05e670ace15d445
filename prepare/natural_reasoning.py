"""NaturalReasoning: questions that need reasoning, with answers -> data/natural_reasoning/.

    python prepare/natural_reasoning.py --tokenizer=tokenizer.json --max_tokens=1_000_000_000

1.15 million documents, 1.8 billion tokens, 4.2 GB to read, 7 GB of shards. CC BY-NC 4.0: not for
commercial use. The answer is the first response, or the reference answer if there is no response. A
question without an answer is left out.
https://huggingface.co/datasets/facebook/natural_reasoning
"""
import _path  # noqa: F401  (import path)

from configurator import configure
from prepare.common import Dataset, PrepareConfig, prepare

REPO = 'hf://datasets/facebook/natural_reasoning@8c9292b8932b86f90360ca6b152c2e23ca9252ab'
FILES = [f'{REPO}/*.jsonl']


def text_of(record):
    answer = record.get('reference_answer')
    if record['responses']:
        answer = record['responses'][0]['response']
    return f"{record['question']}\n\n{answer}" if answer else None


CARD = dict(documents=1_145_824, tokens=1.8e9, licence='CC BY-NC 4.0')
DATASET = Dataset('natural_reasoning', FILES, ('question', 'responses'), text_of, **CARD)

if __name__ == '__main__':
    prepare(DATASET, configure(globals(), owners=(PrepareConfig,)))
