"""A folder of texts becomes sources that share a small tokenizer, trained on them: what the studies (config/study) run on.

    python prepare/folder.py --input=folder --out=data/study            # 66 MB of text in half a minute

`input` holds train/<source>.jsonl.gz (also .jsonl, .parquet, anything that prepare/text.py reads), val/ and, where there are probe sets,
probes/<domain>.jsonl.gz, each record with a field `text`. The tokenizer is a byte-level BPE, trained on the training text of `sources`, unless one is named.
Sources that are there already, made in the same way, stay as they are.
"""
import glob
import os

import _path  # noqa: F401

import numpy as np
from tqdm import tqdm

from configurator import BadInput, configure
from lib.reading import local_files, read_batches, records_of
from lib.tokenizer import load_tokenizer
from prepare.demo import train_tokenizer
from prepare.shards import PartWriter, finish_source, open_source

# -- knobs --
input = ''                       # folder with train/, val/ and perhaps probes/
out = 'data/study'               # folder of the sources and of probe/
sources: list[str] = []          # names; []: every file in train/
tokenizer = ''                   # tiktoken name, rank file, tokenizer.json, or a folder that holds one; '': one is trained
vocab_size = 2048                # of one that is trained


def documents(folder, split, name):
    """Texts of <folder>/<split>/<name>.*"""
    for file in local_files(os.path.join(folder, split, f'{name}.*')):
        for batch in read_batches(file, ['text']):
            yield from (record['text'] for _, record in records_of(batch))


def write(folder, tokenizer, settings, splits):
    """One source: splits is name -> texts."""
    if open_source(folder, settings) is not None:
        return
    PartWriter(folder, 0, tokenizer.vocab_size).delete()       # of a run that was cut off
    writer = PartWriter(folder, 0, tokenizer.vocab_size)
    for split, texts in splits.items():
        for text in texts:
            writer.add(split, np.concatenate(([tokenizer.bos_id], tokenizer.encode_document(text))), len(text.encode()))
    writer.commit(1, 0, done=True)
    finish_source(folder, tokenizer, settings, [writer.state])


def main():
    names = sources or sorted(os.path.basename(path).split('.')[0] for path in glob.glob(os.path.join(glob.escape(input), 'train', '*')))
    if not input or not names:
        raise BadInput(f"--input='{input}' has no train/<source>.jsonl.gz in it.")
    domains = sorted(os.path.basename(path).split('.')[0] for path in glob.glob(os.path.join(glob.escape(input), 'probes', '*')))
    encoder = load_tokenizer(tokenizer) if tokenizer else train_tokenizer([text for name in names for text in documents(input, 'train', name)], vocab_size)
    settings = dict(made_by='prepare/folder.py', tokenizer=encoder.fingerprint)
    for name in tqdm(names, desc='sources', unit='source'):
        write(os.path.join(out, name), encoder, settings, {split: documents(input, split, name) for split in ('train', 'val')})
    for domain in domains:
        write(os.path.join(out, 'probe', domain), encoder, settings, dict(probe=documents(input, 'probes', domain)))
    print(f'{len(names)} sources and {len(domains)} probe sets in {out}, {encoder.vocab_size} tokens')


if __name__ == '__main__':
    configure(globals())
    main()
