"""Your own text or conversations become a source -> data/<source>/.

    python prepare/text.py --source=mydata --input='corpus/*.jsonl.gz' --tokenizer=tokenizer.json
    python prepare/text.py --source=mychats --input=chats.jsonl --column=messages \\
        --chat_template=chatml --tokenizer=tokenizer.json

Reads JSON lines (.jsonl, .ndjson, .jl, .json), tables with a header line (.csv, .tsv) and plain
text (.txt, .md), all of them also with .gz, .zst, .xz or .bz2, and parquet and Arrow files
(.parquet, .arrow), or a folder of them. Run it again after a kill, and it continues.
--max_tokens=1_000_000 makes a small sample. Then add the source to a run: `python train.py ...
--sources.mydata=0.3 --data_dir=data`. Expect about 3 million tokens per second and core.

The text of a record is its `column`. Fields of a table are taken as they are: NA is the text NA. A
plain text file is one document. One of more than 8 million characters becomes several, cut after a
paragraph. With a chat_template the column holds a list of messages with `role` and `content` (or
`from` and `value`), a field `tools` may describe tools, and the shards get masks. At the end the
script counts what it left out, changed or did not use. prepare/hub.py takes a dataset by its name
on the hub.
"""
import dataclasses

import _path  # noqa: F401  (import path)

from configurator import BadInput, configure, one_of
from prepare.common import Dataset, PrepareConfig, prepare

# -- knobs --
source = ''                      # name of the new source: the folder <out>/<source>
column = 'text'                  # field of a record or row that holds the text or the messages
chat_template: one_of('llama3', 'chatml', 'model') | None = None    # for conversations; model: that
                                 # of the tokenizer's folder. The tokenizer must have its special
                                 # tokens

DATASET = Dataset('text', files=[])

if __name__ == '__main__':
    config = configure(globals(), owners=(PrepareConfig,))
    if not source:
        raise BadInput(
            '--source is missing. Example: python prepare/text.py --source=mydata '
            "--input='*.jsonl.gz' --tokenizer=tokenizer.json")
    dataset = dataclasses.replace(DATASET, name=source, columns=(column,))
    prepare(dataset, config, chat_template)
