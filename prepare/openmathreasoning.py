"""OpenMathReasoning: problems of mathematics with long solutions in <think> spans -> data/openmathreasoning/.

    python prepare/openmathreasoning.py --tokenizer=path/to/tokenizer.json --max_tokens=1_000_000_000

3.2 million conversations, 72 GB of text, about 22 billion tokens. CC BY 4.0. The newest commit is taken and recorded.
https://huggingface.co/datasets/nvidia/OpenMathReasoning (cot)
"""

import _path  # noqa: F401

from configurator import configure
from prepare import knobs
from prepare.common import Dataset, prepare

# -- knobs --
chat_template = 'llama3'          # or chatml; the tokenizer must have its special tokens

DATASET = Dataset(
    'openmathreasoning',
    ['hf://datasets/nvidia/OpenMathReasoning/data/cot-*.parquet'],
    columns=['problem', 'generated_solution'], documents=3_201_061, tokens=22e9, licence='CC BY 4.0')


def messages_of(record):
    return [dict(role='user', content=record['problem']), dict(role='assistant', content=record['generated_solution'])]


if __name__ == '__main__':
    prepare(DATASET, messages_of, configure(globals(), shared=knobs), chat_template)
