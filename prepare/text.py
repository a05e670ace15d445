"""Your own text, or conversations, become a source: JSONL (also .gz, .zst), parquet, plain text, or a folder of them -> data/<source>/.

    python prepare/text.py --source=mydata --input='corpus/*.jsonl.gz' --tokenizer=path/to/tokenizer.json
    python prepare/text.py --source=mychats --input=chats.jsonl --column=messages --chat_template=chatml --tokenizer=path/to/tokenizer.json

Run it again after a kill and it goes on. --max_tokens=1_000_000 gives a taste. Then add the source to a run:
`python train.py ... --sources.mydata=0.3 --data_dir=data`. Expect about 3 million tokens per second and core.
A record's text is its `column`; a plain text file is one document (above 8 million characters: several). With a chat_template the
column holds a list of messages with `role` and `content`, and the shards get masks.
"""
import dataclasses
import functools

import _path  # noqa: F401

from configurator import BadInput, configure
from prepare import knobs
from prepare.common import Dataset, prepare

# -- knobs --
source = ''                      # name of the new source: the folder <out>/<source>
column = 'text'                  # field of a JSONL record or parquet row that holds the text or the messages
chat_template: str | None = None     # of conversations: llama3 or chatml; the tokenizer must have its special tokens


DATASET = Dataset('text', files=[], columns=['text'])


def text_of(record, column='text'):
    return record[column]


if __name__ == '__main__':
    settings = configure(globals(), shared=knobs)
    if not source:
        raise BadInput("--source is missing. Example: python prepare/text.py --source=mydata --input='*.jsonl.gz' "
                       '--tokenizer=tokenizer.json')
    prepare(dataclasses.replace(DATASET, name=source, columns=[column]), functools.partial(text_of, column=column), settings,
            chat_template)
