"""A folder of texts becomes sources with a common small tokenizer, for the studies (config/study).

    python prepare/folder.py --input=folder --out=data/study     # 66 MB of text in half a minute

`input` holds train/<source>.jsonl.gz and val/<source>.jsonl.gz, and probes/<domain>.jsonl.gz if
there are probe sets. Every record has a field `text`. The other formats of prepare/text.py work as
well. The tokenizer is a byte-level BPE that is trained on the training text, unless one is named.
Sources that exist already and were made in the same way are kept.
"""
import glob
import itertools
import os

import _path  # noqa: F401  (import path)

from tqdm import tqdm

from configurator import BadInput, configure
from lib.reading import read_texts
from lib.tokenizer import load_tokenizer
from prepare.common import train_tokenizer
from prepare.shards import encode_text, open_source, write_source

# -- knobs --
input = ''                       # folder with train/, val/ and perhaps probes/
out = 'data/study'               # folder of the sources and of probe/
sources: list[str] = []          # names. []: every file in train/
tokenizer = ''                   # tiktoken name, rank file, tokenizer.json, or folder with one.
                                 # '': one is trained
vocab_size = 2048                # of a trained tokenizer


def names_in(folder):
    """Returns the sorted names of the files in a folder, without their endings."""
    return sorted(os.path.basename(p).split('.')[0] for p in glob.glob(f'{glob.escape(folder)}/*'))


if __name__ == '__main__':
    configure(globals())
    sources = sources or names_in(f'{input}/train')
    if not input or not sources:
        raise BadInput(f"--input='{input}' has no train/<source>.jsonl.gz in it.")
    domains = names_in(f'{input}/probes')
    if tokenizer:
        encoder = load_tokenizer(tokenizer)
    else:
        texts = [read_texts(f'{input}/train/{name}.*') for name in sources]
        encoder = train_tokenizer(itertools.chain(*texts), vocab_size)
    settings = dict(made_by='prepare/folder.py', tokenizer=encoder.fingerprint)
    inputs = {name: {'train': f'train/{name}', 'val': f'val/{name}'} for name in sources}
    for domain in domains:
        inputs[f'probe/{domain}'] = {'probe': f'probes/{domain}'}
    for name, stems in tqdm(inputs.items(), desc='sources', unit='source'):
        folder = os.path.join(out, name)
        if open_source(folder, settings) is not None:
            continue
        splits = {}
        for split, stem in stems.items():
            texts = read_texts(f'{input}/{stem}.*')
            splits[split] = (encode_text(encoder, text) for text in texts)
        write_source(folder, encoder, settings, splits)
    print(
        f'{len(sources)} sources and {len(domains)} probe sets in {out}, {encoder.vocab_size} '
        'tokens')
