"""Your own text becomes a source: JSONL (also .gz, .zst), parquet, plain text, or a folder of them -> data/<source>/.

    python prepare/text.py --source=mydata --input='corpus/*.jsonl.gz' --tokenizer=path/to/tokenizer.json

Run it again after a kill and it goes on. --max_tokens=1_000_000 gives a taste. Then add the source to a run:
`python train.py ... --sources.mydata=0.3 --data_dir=data`. Expect about 3 million tokens per second and core.
"""
import os
import sys

from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))       # the project's own folder

from configurator import BadInput, configure
from prepare.common import check_space, find_files, print_table, read_documents, stopwatch, write_source

# -- knobs --
source = ''                      # name of the new source: the folder <out>/<source>
input = ''                       # file, glob or folder; several with commas between
column = 'text'                  # field of a JSONL record or parquet row that holds the text
tokenizer = ''                   # tiktoken name, rank file, tokenizer.json, or a folder that holds one
out = 'data'                     # folder of all sources
max_tokens: int | None = None    # training tokens to stop after; None: everything
shard_tokens = 100_000_000       # tokens of a training shard
val_fraction = 0.01              # share of the documents set aside for validation, by hash
workers: int | None = None       # tokenizing processes; None: one per core

if __name__ == '__main__':
    configure(globals())
    for _name in ('source', 'input', 'tokenizer'):
        if not globals()[_name]:
            raise BadInput(f"--{_name} is missing. Example: python prepare/text.py --source=mydata --input='*.jsonl.gz' "
                           '--tokenizer=tokenizer.json')
    files = find_files(input)
    n_bytes = sum(os.path.getsize(path) for path in files)
    packed = 3 if any(path.endswith(('.gz', '.zst', '.parquet')) for path in files) else 1      # text is 3 times its .gz
    print(f'{source}: {len(files)} files, {n_bytes / 2**20:,.1f} MiB')
    estimate = n_bytes * packed        # a token is about 4 bytes of text and at most 4 bytes of shard
    check_space(os.path.join(out, source), min(estimate, max_tokens * 4) if max_tokens else estimate)
    seconds = stopwatch()
    settings = dict(dataset=[[os.path.basename(path), os.path.getsize(path)] for path in files], column=column)
    with tqdm(total=n_bytes if packed == 1 else None, unit='char', unit_scale=True, desc=source) as bar:
        writer = write_source(os.path.join(out, source), read_documents(files, column), tokenizer, settings, max_tokens,
                              shard_tokens, val_fraction, workers or os.cpu_count(), bar.update)
    print_table([writer], seconds())
    if writer.n_tokens('val') == 0:
        print(f'No document fell into validation, which train.py needs: delete {writer.folder} and raise --val_fraction.')
