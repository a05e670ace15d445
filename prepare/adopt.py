"""Shards that llm.c or modded-nanogpt made (such as fineweb10B) become a source -> data/<source>/.

    python prepare/adopt.py --source=fineweb10B --input='fineweb10B/*.bin' --tokenizer=gpt2

A file with `val` in its name goes to val/, the others to train/. The script makes links and copies
nothing. It reads every token once, to check that ids and document boundaries are those of the
tokenizer. meta.json gets the counts, the hashes and the bytes of text.
"""
import glob
import hashlib
import os

import _path  # noqa: F401  (import path)

import numpy as np
from tqdm import tqdm

from configurator import BadInput, configure
from data import open_shard
from lib.tokenizer import load_tokenizer
from prepare.shards import finish_source, open_source, print_table

# -- knobs --
source = ''                      # name of the new source: the folder <out>/<source>
input = ''                       # the .bin files: a glob, or several with commas between
tokenizer = ''                   # that of the shards: name, rank file, tokenizer.json or folder
out = 'data'                     # folder of all sources


def describe(path, tokens, sizes, bos_id):
    """Returns the entries of meta.json for a shard. sizes: bytes of text of every token id.

    Raises BadInput for ids or document boundaries of another tokenizer.
    """
    documents = 0
    n_bytes = 0
    # sizes[part] takes 8 bytes a token, so a shard is counted in pieces.
    for part in np.array_split(tokens, max(1, len(tokens) // 2**24)):
        if len(part) and int(part.max()) >= len(sizes):
            raise BadInput(
                f'{path} holds token id {int(part.max())}, but the tokenizer has only '
                f'{len(sizes):,} tokens. The shard was made with another one.')
        documents += int((part == bos_id).sum())
        n_bytes += int(sizes[part].sum())
    if documents == 0:
        raise BadInput(
            f'{path}: the token that begins a document (id {bos_id}) never occurs. The shard was '
            'made with another tokenizer.')
    with open(path, 'rb') as f:
        digest = hashlib.file_digest(f, 'sha256').hexdigest()
    return dict(tokens=len(tokens), documents=documents, bytes=n_bytes, sha256=digest)


def adopt(folder, paths, made_with):
    """Makes the source `folder` from the shards. Returns the content of meta.json."""
    sizes = np.array(made_with.token_bytes())
    # The sizes notice another download in the same place, without reading the files.
    files = [[path, os.path.getsize(path)] for path in paths]
    settings = dict(dataset='adopted', files=files, tokenizer=made_with.fingerprint)
    meta = open_source(folder, settings)
    if meta is not None:
        print(f'{folder} is complete already. Delete it to make it again.')
        return meta
    shards = []
    for path in tqdm(paths, unit='shard'):
        name = os.path.basename(path)
        split = 'val' if 'val' in name else 'train'
        about = describe(path, open_shard(path), sizes, made_with.bos_id)
        shards.append(dict(file=f'{split}/{name}', split=split, **about))
    # Links are made after all checks, so that a shard of another tokenizer leaves no links.
    for path, shard in zip(paths, shards, strict=True):
        link = os.path.join(folder, shard['file'])
        os.makedirs(os.path.dirname(link), exist_ok=True)
        # A killed run may have made some of the links.
        if not os.path.islink(link):
            os.symlink(path, link)
    state = dict(shards=shards, counts={}, skipped=[])
    return finish_source(folder, made_with, settings, [state])


if __name__ == '__main__':
    for key, value in configure(globals()).items():
        if not value:
            raise BadInput(
                f'--{key} is missing. Example: python prepare/adopt.py --source=fineweb10B '
                "--input='fineweb10B/*.bin' --tokenizer=gpt2")
    paths = set()
    for part in input.split(','):
        paths.update(map(os.path.abspath, glob.glob(os.path.expanduser(part.strip()))))
    if not paths:
        raise BadInput(f"--input: '{input}' matches no file.")
    folder = os.path.join(out, source)
    meta = adopt(folder, sorted(paths), load_tokenizer(tokenizer))
    print_table({source: meta})
    if 'val' not in meta['splits']:
        print(
            "No file has 'val' in its name, and train.py needs validation: delete "
            f'{folder} and rename one.')
