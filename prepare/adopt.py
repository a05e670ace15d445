"""Shards that llm.c or modded-nanogpt made (such as fineweb10B) become a source -> data/<source>/.

    python prepare/adopt.py --source=fineweb10B --input='fineweb10B/*.bin' --tokenizer=gpt2

A file goes to val/ if the word `val` or `validation` is in its name (fineweb_val_000.bin) or is the
name of its folder. The others go to train/. The script makes links and copies nothing. It reads
every token once, to check that ids and document boundaries are those of the tokenizer. meta.json
gets the counts, the hashes and the bytes of text.
"""
import glob
import os
import re

import numpy as np
from tqdm import tqdm

if __name__ == '__main__':
    import _path  # noqa: F401  (import path)

from configurator import BadInput, configure
from lib.reading import match_paths
from lib.shards import open_shard
from lib.tokenizer import load_tokenizer
from prepare import inputs
from prepare.shards import finish_source, lock, open_source, print_table, source_folder

# -- knobs --
source = ''                      # name of the new source: the folder <out>/<source>
input = ''                       # the .bin files: a glob, or several with commas between
tokenizer = ''                   # that of the shards: name, rank file, tokenizer.json or folder
out = 'data'                     # folder of all sources


def split_of(path):
    """Returns 'val' if `val` or `validation` is a word of the file's name or its folder's name."""
    # Digits, points, lines and dashes end a word, so retrieval_000.bin is for training.
    words = re.split(r'[\W\d_]+', os.path.basename(path).lower())
    folder = os.path.basename(os.path.dirname(path)).lower()
    return 'val' if {'val', 'validation'} & {*words, folder} else 'train'


def find_shards(pattern):
    """Returns {'split/name.bin' in the source: absolute path} for a glob, or several with commas.

    Raises BadInput if nothing matches, and for what is no file or has the name of another one.
    """
    paths = set()
    for part, found in match_paths(pattern):
        if not found:
            raise BadInput(f"--input: '{part}' matches no file.")
        paths.update(map(os.path.abspath, found))
    files = {}
    for path in sorted(paths):
        if os.path.isdir(path):
            raise BadInput(f"--input: {path} is a folder. Name its files: '{path}/*.bin'.")
        if not os.path.exists(path):
            raise BadInput(f'{path} is a link to {os.readlink(path)}, which does not exist.')
        if not path.endswith('.bin') or not os.path.isfile(path):
            raise BadInput(f'--input: {path} is no shard, which is a file with the ending .bin.')
        name = f'{split_of(path)}/{os.path.basename(path)}'
        if name in files:
            raise BadInput(
                f'{files[name]} and {path} would both be {name} in the source. Rename one of them, '
                'or adopt them as two sources.')
        files[name] = path
    return files


def describe(path, tokens, sizes, bos_id):
    """Returns counts of a shard for meta.json. sizes: bytes of text of every token id.

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
    return dict(tokens=len(tokens), documents=documents, bytes=n_bytes)


def check_links(folder, files):
    """Raises BadInput if a link of a complete source is another file than the one in `files`."""
    for name, path in files.items():
        link = os.path.join(folder, name)
        if os.path.realpath(link) != os.path.realpath(path):
            raise BadInput(
                f'{link} is not a link to {path}, but to {os.path.realpath(link)}. Delete {folder} '
                'to adopt these shards.')


def remove_links(folder):
    """Removes the links that a killed run has left, because training reads every shard."""
    for link in glob.glob(os.path.join(glob.escape(folder), '*', '*.bin')):
        if os.path.islink(link):
            os.remove(link)


def adopt(folder, files, made_with):
    """Makes the source `folder` of shards. Returns the content of meta.json.

    files: what find_shards returns
    Raises BadInput for shards of another format or tokenizer, and for a folder with other shards.
    """
    sizes = np.array(made_with.token_bytes())
    known = inputs.know(list(files.values()))
    content = [[name, known[path].sha256] for name, path in files.items()]
    settings = dict(dataset='adopted', files=content, tokenizer=made_with.fingerprint)
    with lock(folder, 'adopt'):
        meta = open_source(folder, settings)
        if meta is not None:
            check_links(folder, files)
            print(f'{folder} is complete already. Delete it to make it again.')
            return meta
        shards = []
        for name, path in tqdm(files.items(), unit='shard'):
            about = describe(path, open_shard(path), sizes, made_with.bos_id)
            split = name.partition('/')[0]
            shards.append(dict(file=name, split=split, sha256=known[path].sha256, **about))
        # Links are made after all checks, so that a shard of another tokenizer leaves no links.
        remove_links(folder)
        for name, path in files.items():
            link = os.path.join(folder, name)
            os.makedirs(os.path.dirname(link), exist_ok=True)
            os.symlink(path, link)
        state = dict(shards=shards, counts={}, examples={}, skipped=[])
        return finish_source(folder, made_with, settings, [state])


if __name__ == '__main__':
    for key, value in configure(globals()).items():
        if not value:
            raise BadInput(
                f'--{key} is missing. Example: python prepare/adopt.py --source=fineweb10B '
                "--input='fineweb10B/*.bin' --tokenizer=gpt2")
    folder = source_folder(out, source)
    meta = adopt(folder, find_shards(input), load_tokenizer(tokenizer))
    print_table({source: meta})
    if 'val' not in meta['splits']:
        print(
            "No file has the word 'val' in its name, and train.py needs validation: delete "
            f'{folder} and rename one.')
