"""OpenMathReasoning: problems with long solutions in <think> spans -> data/openmathreasoning/.

    python prepare/openmathreasoning.py --tokenizer=tokenizer.json --max_tokens=1_000_000_000

3.2 million conversations, 72 GB of text, about 22 billion tokens. CC BY 4.0. The newest commit is
taken and recorded.
https://huggingface.co/datasets/nvidia/OpenMathReasoning (cot)
"""
import _path  # noqa: F401  (import path)

from configurator import configure, one_of
from prepare.common import Dataset, PrepareConfig, conversation, prepare

# -- knobs --
chat_template: one_of('llama3', 'chatml', 'model') = 'llama3'    # the tokenizer must have its
                                 # special tokens. model: that of the tokenizer's folder

REPO = 'hf://datasets/nvidia/OpenMathReasoning'
FILES = [f'{REPO}/data/cot-*.parquet']


def messages_of(record):
    return conversation(record['problem'], record['generated_solution'])


COLUMNS = ('problem', 'generated_solution')
CARD = dict(documents=3_201_061, tokens=22e9, licence='CC BY 4.0')
DATASET = Dataset('openmathreasoning', FILES, COLUMNS, messages_of, **CARD)

if __name__ == '__main__':
    config = configure(globals(), owners=(PrepareConfig,))
    prepare(DATASET, config, chat_template)
