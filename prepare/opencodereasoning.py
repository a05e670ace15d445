"""OpenCodeReasoning-2: problems with long answers in <think> spans -> data/opencodereasoning/.

    python prepare/opencodereasoning.py --tokenizer=tokenizer.json --max_tokens=1_000_000_000

2.57 million conversations in Python and C++, 49 GB to read, about 30 billion tokens. CC BY 4.0, the
problems under their own licences. The dataset only holds answers. It names a problem by dataset,
split and row of four other datasets (TACO, APPS, CodeContests, codeforces). These are read first,
from the hub or from --questions. An answer is left out if its problem is empty there.
https://huggingface.co/datasets/nvidia/OpenCodeReasoning-2
"""
import dataclasses
import functools
import os

import _path  # noqa: F401  (import path)

from configurator import BadInput, configure, one_of, read_json
from lib.reading import local_files, records_in, remote_files
from prepare import inputs
from prepare.common import Dataset, PrepareConfig, conversation, prepare
from prepare.shards import lock, source_folder, write_json

# -- knobs --
chat_template: one_of('llama3', 'chatml', 'model') = 'llama3'    # the tokenizer must have its
                                 # special tokens. model: that of the tokenizer's folder
questions: str | None = None     # folder with downloads of the four datasets, named as below. None:
                                 # the hub

DESCRIPTION = 'description'
CODEFORCES = 'description input_format output_format examples note'
QUESTIONS = (   # dataset, splits, files, columns
    ('taco', 'train test', 'BAAI/TACO/ALL/{}-*.parquet', 'question'),
    ('apps', 'train test', 'codeparrot/apps/{}.jsonl', 'question'),
    ('code_contests', 'train valid test', 'deepmind/code_contests/data/{}-*.parquet', DESCRIPTION),
    ('open-r1/codeforces', 'train test', 'open-r1/codeforces/data/{}-*.parquet', CODEFORCES))


def question_of(record):
    """Returns the text of a problem. For codeforces it is put together from several fields."""
    if 'question' in record:
        return record['question']
    text = record['description'] or ''
    if 'input_format' not in record or not text:
        return text
    if record['input_format']:
        text += f"\n\nInput\n\n{record['input_format']}"
    if record['output_format']:
        text += f"\n\nOutput\n\n{record['output_format']}"
    if record['examples']:
        text += '\n\nExamples'
    for example in record['examples'] or []:
        text += f"\n\nInput\n\n{example['input']}\n\nOutput\n\n{example['output']}"
    if record['note']:
        text += f"\n\nNote\n\n{record['note']}"
    return text


def find_questions(folder):
    """Returns ({(dataset, split): (Files in order, columns)}, commits). folder: --questions."""
    found = {}
    commits = {}
    for dataset, splits, pattern, columns in QUESTIONS:
        for split in splits.split():
            name = pattern.format(split)
            if folder is None:
                files, of_these = remote_files([f'hf://datasets/{name}'])
                commits.update(of_these)
            else:
                files = local_files(os.path.join(folder, name))
            print(f'problems in {name}: {len(files)} files')
            # An answer names the row of its problem, so the order of the files matters.
            files = sorted(files, key=lambda file: file.path)
            found[dataset, split] = (files, columns.split())
    return found, commits


def collect_questions(found):
    """Returns {'dataset/split': [problem of every row]}. found: as of find_questions.

    Raises BadInput for a record without the fields of a problem.
    """
    table = {}
    for (dataset, split), (files, columns) in found.items():
        problems = table[f'{dataset}/{split}'] = []
        for where, record in records_in(files, columns):
            try:
                problems.append(question_of(record))
            except (KeyError, TypeError) as error:
                raise BadInput(
                    f'{where}: no problem ({type(error).__name__}: {error}). A problem has the '
                    f'fields {", ".join(columns)}.') from None
    return table


def make_questions(path, folder):
    """Writes the table of all problems to `path` unless it is there. Returns its sha256.

    folder: --questions. If its files have changed since the table was written, it is written again.
    """
    # All ranks start at once. The first one writes the table.
    with lock(os.path.splitext(path)[0], 'source', wait=True):
        content = None
        if folder is not None:
            found, _ = find_questions(folder)
            files = [file for files, _ in found.values() for file in files]
            content = inputs.fingerprint(inputs.with_content(files)[0])
        old = read_json(path) if os.path.isfile(path) else None
        if old is not None and (not isinstance(old, dict) or 'content' not in old):
            raise BadInput(f'{path} is of an older version or damaged. Delete it.')
        if old is None or content is not None and old['content'] != content:
            commits = {}
            if folder is None:
                found, commits = find_questions(None)
            write_json(path, dict(collect_questions(found), content=content, commits=commits))
        return inputs.know([path])[path].sha256


@functools.cache
def load_questions(path):
    # Cached, so that a worker reads the table once and not for every record.
    return read_json(path)


def messages_of(record, path):
    table = load_questions(path)[f"{record['dataset']}/{record['split']}"]
    question = table[int(record['index'])]
    return conversation(question, record['r1_generation']) if question else None


REPO = 'hf://datasets/nvidia/OpenCodeReasoning-2@eadf535931451525f3e5621d0f960c240bc62fd9'
FILES = [f'{REPO}/train/*/*.parquet']
COLUMNS = ('r1_generation', 'dataset', 'split', 'index')
CARD = dict(documents=2.57e6, tokens=30e9, licence='CC BY 4.0, problems their own')
DATASET = Dataset('opencodereasoning', FILES, COLUMNS, **CARD)

if __name__ == '__main__':
    config = configure(globals(), owners=(PrepareConfig,))
    if questions is not None and not os.path.isdir(questions):
        raise BadInput(
            f"--questions: '{questions}' is no folder. It must hold BAAI/TACO, codeparrot/apps and "
            'so on.')
    path = source_folder(config['out'], 'opencodereasoning_questions.json')
    # Every batch carries `convert` to a worker, so it has the path and not the large table.
    convert = functools.partial(messages_of, path=path)
    settings = dict(questions=make_questions(path, questions))
    dataset = dataclasses.replace(DATASET, convert=convert, more_settings=settings)
    prepare(dataset, config, chat_template)
