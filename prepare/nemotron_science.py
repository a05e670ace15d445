"""Llama-Nemotron post-training data, science: questions and answers as pre-training text -> data/nemotron_science/.

    python prepare/nemotron_science.py --tokenizer=path/to/tokenizer.json --max_tokens=1_000_000_000

708,920 documents, 2 billion tokens, 8 GB of shards. CC BY 4.0. prepare/nemotron_code.py and nemotron_math.py share its conversion.
https://huggingface.co/datasets/nvidia/Llama-Nemotron-Post-Training-Dataset (science)
"""
import re

if __name__ == '__main__':
    import _path  # noqa: F401

from configurator import configure
from prepare import knobs
from prepare.common import Dataset, prepare

DATASET = Dataset(
    'nemotron_science',
    ['hf://datasets/nvidia/Llama-Nemotron-Post-Training-Dataset@8e1e47a67ced79723ad0735efc5a45f8bb5aabd6/SFT/science/*.jsonl'],
    columns=['input', 'output'], documents=708_920, tokens=2e9, licence='CC BY 4.0')


TEMPLATE = re.compile(r'<\|start_header_id\|>(\w+)<\|end_header_id\|>\s*(.*?)<\|eot_id\|>', re.DOTALL)


def text_of(record):
    """What the user asked and the answer, a blank line between. Older files hold `input` as one string with Llama 3's marks."""
    turns = record['input']
    if isinstance(turns, str):
        turns = [dict(role=role, content=content) for role, content in TEMPLATE.findall(turns)] or [dict(role='user', content=turns)]
    asked = [turn['content'] for turn in turns if turn['role'] != 'system' and turn['content']]
    return '\n\n'.join([*asked, record['output'].removesuffix('<|eot_id|>')])


if __name__ == '__main__':
    prepare(DATASET, text_of, configure(globals(), shared=knobs))
