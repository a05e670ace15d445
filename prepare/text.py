"""Your own text or conversations become a source -> data/<source>/.

    python prepare/text.py --source=mydata --input='corpus/*.jsonl.gz' --tokenizer=tokenizer.json
    python prepare/text.py --source=mychats --input=chats.jsonl --column=messages \\
        --chat_template=chatml --tokenizer=tokenizer.json

Reads JSON lines (.jsonl, .ndjson, .jl, .json), plain text (.txt, .md), both also with .gz or .zst,
parquet, or a folder of them. Run it again after a kill, and it continues. --max_tokens=1_000_000
makes a small sample. Then add the source to a run: `python train.py ... --sources.mydata=0.3
--data_dir=data`. Expect about 3 million tokens per second and core. The text of a record is its
`column`. A plain text file is one document, or several if it has more than 8 million characters.
With a chat_template the column holds a list of messages with `role` and `content`, and the shards
get masks.
"""
import dataclasses

import _path  # noqa: F401  (import path)

from configurator import BadInput, configure, one_of
from prepare.common import Dataset, PrepareConfig, prepare

# -- knobs --
source = ''                      # name of the new source: the folder <out>/<source>
column = 'text'                  # field of a record or row that holds the text or the messages
chat_template: one_of('llama3', 'chatml') | None = None      # for conversations. The tokenizer must
                                                             # have its special tokens

DATASET = Dataset('text', files=[])

if __name__ == '__main__':
    config = configure(globals(), owners=(PrepareConfig,))
    if not source:
        raise BadInput(
            '--source is missing. Example: python prepare/text.py --source=mydata '
            "--input='*.jsonl.gz' --tokenizer=tokenizer.json")
    dataset = dataclasses.replace(DATASET, name=source, columns=(column,))
    prepare(dataset, config, chat_template)
