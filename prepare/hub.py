"""Any dataset of the Hugging Face hub becomes a source, by its name -> data/<source>/.

    python prepare/hub.py --dataset=HuggingFaceFW/fineweb --config=sample-10BT --split=train \\
        --column=text --tokenizer=tokenizer.json --max_tokens=1_000_000_000
    python prepare/hub.py --dataset=HuggingFaceTB/smoltalk --config=all --column=messages \\
        --chat_template=chatml --tokenizer=tokenizer.json
    python prepare/hub.py --dataset=folder --tokenizer=tokenizer.json    # a local copy

The package `datasets` streams it, so a dataset has the configs, splits, rows and columns that
`load_dataset(..., streaming=True)` gives. No code of a dataset is run. The commit is looked up
once, and a source that is continued keeps it. Splits, masks, limits, ranks and kills are as in
prepare/text.py. The parts are the files of the dataset, in the order of their hashed names.

The scripts of single datasets and prepare/text.py read the same files with a reader of their own,
which takes less CPU time (docs/BENCHMARKS.md). A folder that `save_to_disk` wrote is for
prepare/text.py, too.
"""
import os
import re

import _path  # noqa: F401  (import path)

from configurator import BadInput, configure, one_of
from lib.streaming import Stream, find_commit, find_shards, read_shard
from prepare import shards
from prepare.common import Dataset, PrepareConfig, prepare

# -- knobs --
dataset = ''                     # id on the hub, owner/name, or a local folder
config = ''                      # a dataset's config (subset). '': its default, or the only one
split = 'train'                  # split of the dataset. The source has splits of its own
column = 'text'                  # field of a row that holds the text or the messages
chat_template: one_of('llama3', 'chatml', 'model') | None = None    # for conversations, as in
                                 # prepare/text.py
source = ''                      # name of the new source. '': <name> or <name>_<config>


def main(knobs):
    name = knobs['dataset'].removeprefix('https://huggingface.co/datasets/').strip('/')
    folder = os.path.abspath(os.path.expanduser(knobs['dataset']))
    is_local = os.path.isdir(folder)
    stem = os.path.basename(folder if is_local else name)
    if knobs['config']:
        stem += f"_{knobs['config']}"
    source = knobs['source'] or re.sub(r'[^\w.-]+', '_', stem).lstrip('._-')
    columns = (knobs['column'],)
    is_chat = knobs['chat_template'] is not None
    settings = dict(config=knobs['config'], split=knobs['split'], reader='datasets')
    if is_local:
        if knobs['revision'] is not None:
            raise BadInput(f'--revision is a commit on the hub, and {folder} is a local folder.')
        if {'state.json', 'dataset_dict.json'} & {*os.listdir(folder)}:
            raise BadInput(
                f'{folder} was written by save_to_disk. Use prepare/text.py --input={folder}.')
        stream = Stream(folder, '', knobs['config'], knobs['split'], columns, is_chat)
        made = Dataset(source, [], columns, more_settings=settings)
        prepare(made, knobs, knobs['chat_template'], (find_shards(stream), {}), read_shard)
        return
    if not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', name):
        raise BadInput(
            f"dataset = '{knobs['dataset']}' is neither a folder nor the id of a dataset on the "
            'hub, as in HuggingFaceFW/fineweb.')
    # A source that is continued keeps its commit.
    revision = knobs['revision']
    begun = shards.settings_of(shards.source_folder(knobs['out'], source)) or {}
    if revision is None:
        revision = begun.get('commits', {}).get(name)
    commit, licence = find_commit(name, revision)
    stream = Stream(name, commit, knobs['config'], knobs['split'], columns, is_chat)
    made = Dataset(
        source, [f'hf://datasets/{name}'], columns, licence=licence, more_settings=settings)
    prepare(made, knobs, knobs['chat_template'], (find_shards(stream), {name: commit}), read_shard)


if __name__ == '__main__':
    knobs = configure(globals(), owners=(PrepareConfig,))
    if not dataset:
        raise BadInput(
            '--dataset is missing. Example: python prepare/hub.py --dataset=HuggingFaceFW/fineweb '
            '--config=sample-10BT --tokenizer=tokenizer.json')
    if knobs['input'] is not None:
        raise BadInput('--input is for other scripts. Here --dataset names the folder.')
    main(knobs)
