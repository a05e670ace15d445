"""Shards that llm.c or modded-nanogpt made (fineweb10B and the like) become a source as they are -> data/<source>/.

    python prepare/adopt.py --source=fineweb10B --input='fineweb10B/*.bin' --tokenizer=gpt2

A file with `val` in its name goes to val/, the others to train/; links are made, nothing is copied. Every token is read once:
counts, hashes, bytes of text and a check that the ids and the document boundaries are this tokenizer's go into meta.json.
"""
import glob
import hashlib
import os

import _path  # noqa: F401

import numpy as np
from tqdm import tqdm

from configurator import BadInput, configure
from data import open_shard
from lib.tokenizer import load_tokenizer
from prepare.shards import finish_source, open_source, print_table

# -- knobs --
source = ''                      # name of the new source: the folder <out>/<source>
input = ''                       # the .bin files: a glob, or several with commas between
tokenizer = ''                   # the tokenizer they were made with: tiktoken name, rank file, tokenizer.json or folder
out = 'data'                     # folder of all sources


def describe(path, tokens, sizes, bos_id):
    """What meta.json says of a shard. sizes: bytes of text per token id. BadInput for ids or boundaries of another tokenizer."""
    documents = n_bytes = 0
    for part in np.array_split(tokens, max(1, len(tokens) // 2**24)):
        if len(part) and int(part.max()) >= len(sizes):
            raise BadInput(f'{path} holds token id {int(part.max())}, the tokenizer has {len(sizes):,} tokens: it was made with another.')
        documents += int((part == bos_id).sum())
        n_bytes += int(sizes[part].sum())
    if documents == 0:
        raise BadInput(f'{path}: the token that begins a document (id {bos_id}) never occurs. It was made with another tokenizer.')
    with open(path, 'rb') as f:
        return dict(tokens=len(tokens), documents=documents, bytes=n_bytes, sha256=hashlib.file_digest(f, 'sha256').hexdigest())


if __name__ == '__main__':
    configure(globals())
    for _name in ('source', 'input', 'tokenizer'):
        if not globals()[_name]:
            raise BadInput(f"--{_name} is missing. Example: python prepare/adopt.py --source=fineweb10B --input='fineweb10B/*.bin' "
                           '--tokenizer=gpt2')
    paths = sorted({os.path.abspath(path) for part in input.split(',') for path in glob.glob(os.path.expanduser(part.strip()))})
    if not paths:
        raise BadInput(f"--input: '{input}' matches no file.")
    made_with = load_tokenizer(tokenizer)
    folder = os.path.join(out, source)
    settings = dict(dataset='adopted', files=[[path, os.path.getsize(path)] for path in paths], tokenizer=made_with.fingerprint)
    meta = open_source(folder, settings)
    if meta is None:
        sizes, shards = np.array(made_with.token_bytes()), []
        with tqdm(paths, unit='shard') as bar:
            for path in bar:
                split = 'val' if 'val' in os.path.basename(path) else 'train'
                shards.append(dict(file=f'{split}/{os.path.basename(path)}', split=split,
                                   **describe(path, open_shard(path), sizes, made_with.bos_id)))
        for path, shard in zip(paths, shards):
            link = os.path.join(folder, shard['file'])
            os.makedirs(os.path.dirname(link), exist_ok=True)
            if not os.path.islink(link):
                os.symlink(path, link)
        meta = finish_source(folder, made_with, settings, [dict(shards=shards, counts={}, skipped=[])])
    else:
        print(f'{folder} is complete already; delete it to make it anew.')
    print_table({source: meta})
    if 'val' not in meta['splits']:
        print(f"No file has 'val' in its name, and train.py needs validation: delete {folder} and rename one.")
