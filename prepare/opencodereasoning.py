"""OpenCodeReasoning-2: programming problems with long answers in <think> spans -> data/opencodereasoning/.

    python prepare/opencodereasoning.py --tokenizer=path/to/tokenizer.json --max_tokens=1_000_000_000

2.57 million conversations in Python and C++, 49 GB to read, about 30 billion tokens. CC BY 4.0, the problems under their own
licences. The dataset holds answers only; a problem is named by dataset, split and row of four others (TACO, APPS, CodeContests,
codeforces), which are read first, from the hub or from --questions. An answer whose problem is empty there is left out.
https://huggingface.co/datasets/nvidia/OpenCodeReasoning-2
"""
import functools
import os

import _path  # noqa: F401

from configurator import BadInput, configure
from lib.reading import local_files, read_batches, records_of, remote_files
from prepare import knobs
from prepare.common import Dataset, prepare
from prepare.shards import read_json, write_json

# -- knobs --
chat_template = 'llama3'         # or chatml; the tokenizer must have its special tokens
questions: str | None = None     # folder with downloads of the four datasets, named as below; None: the hub

DATASET = Dataset(
    'opencodereasoning',
    ['hf://datasets/nvidia/OpenCodeReasoning-2@eadf535931451525f3e5621d0f960c240bc62fd9/train/*/*.parquet'],
    columns=['r1_generation', 'dataset', 'split', 'index'], documents=2.57e6, tokens=30e9, licence='CC BY 4.0, problems their own')
CODEFORCES = ['description', 'input_format', 'output_format', 'examples', 'note']
QUESTIONS = {   # (dataset, split) -> repository, files, columns
    **{('taco', s): ('BAAI/TACO', f'ALL/{s}-*.parquet', ['question']) for s in ('train', 'test')},
    **{('apps', s): ('codeparrot/apps', f'{s}.jsonl', ['question']) for s in ('train', 'test')},
    **{('code_contests', s): ('deepmind/code_contests', f'data/{s}-*.parquet', ['description']) for s in ('train', 'valid', 'test')},
    **{('open-r1/codeforces', s): ('open-r1/codeforces', f'data/{s}-*.parquet', CODEFORCES) for s in ('train', 'test')}}


def question_of(record):
    """The problem's text in one of the four datasets; codeforces' is put together from its fields."""
    if 'question' in record:
        return record['question']
    if 'input_format' not in record or not record['description']:
        return record['description'] or ''
    text = record['description']
    if record['input_format']:
        text += f"\n\nInput\n\n{record['input_format']}"
    if record['output_format']:
        text += f"\n\nOutput\n\n{record['output_format']}"
    for i, example in enumerate(record['examples'] or []):
        text += ('' if i else '\n\nExamples') + f"\n\nInput\n\n{example['input']}\n\nOutput\n\n{example['output']}"
    return text + (f"\n\nNote\n\n{record['note']}" if record['note'] else '')


def collect_questions(path):
    """Writes {'dataset/split': [problem of every row], 'commits': {...}} to `path`, unless it is there."""
    if os.path.isfile(path):
        return
    table = {'commits': {}}
    for (name, split), (repository, pattern, columns) in QUESTIONS.items():
        if questions is None:
            files, commits = remote_files([f'hf://datasets/{repository}/{pattern}'])
            table['commits'].update(commits)
        else:
            files = local_files(os.path.join(questions, repository, pattern))
        print(f'problems of {repository}, {split}: {len(files)} files')
        records = (r for f in sorted(files, key=lambda f: f.path) for batch in read_batches(f, columns) for _, r in records_of(batch))
        table[f'{name}/{split}'] = [question_of(record) for record in records]
    write_json(path, table)


@functools.cache
def load_questions(path):
    return read_json(path)


def messages_of(record, path):
    question = load_questions(path)[f"{record['dataset']}/{record['split']}"][int(record['index'])]
    if not question:
        return None
    return [dict(role='user', content=question), dict(role='assistant', content=record['r1_generation'])]


if __name__ == '__main__':
    settings = configure(globals(), shared=knobs)
    if questions is not None and not os.path.isdir(questions):
        raise BadInput(f"--questions: '{questions}' is no folder. It must hold BAAI/TACO, codeparrot/apps and so on.")
    table = os.path.join(out, 'opencodereasoning_questions.json')
    collect_questions(table)
    prepare(DATASET, functools.partial(messages_of, path=table), settings, chat_template)
