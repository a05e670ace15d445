"""NaturalReasoning: questions that need reasoning, each with a model's answer -> data/natural_reasoning/.

    python prepare/natural_reasoning.py --tokenizer=path/to/tokenizer.json --max_tokens=1_000_000_000

1.15 million documents, 1.8 billion tokens, 4.2 GB to read, 7 GB of shards. CC BY-NC 4.0: not for commercial use.
The answer is the first response, or the reference answer where there is none; a question without any is left out.
https://huggingface.co/datasets/facebook/natural_reasoning
"""

import _path  # noqa: F401

from configurator import configure
from prepare import knobs
from prepare.common import Dataset, prepare

DATASET = Dataset(
    'natural_reasoning',
    ['hf://datasets/facebook/natural_reasoning@8c9292b8932b86f90360ca6b152c2e23ca9252ab/*.jsonl'],
    columns=['question', 'responses'], documents=1_145_824, tokens=1.8e9, licence='CC BY-NC 4.0')


def text_of(record):
    answer = record['responses'][0]['response'] if record['responses'] else record.get('reference_answer')
    return f"{record['question']}\n\n{answer}" if answer else None


if __name__ == '__main__':
    prepare(DATASET, text_of, configure(globals(), shared=knobs))
