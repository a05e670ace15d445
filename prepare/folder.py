"""A folder of texts becomes sources with a common small tokenizer, for the studies (config/study).

    python prepare/folder.py --input=folder --out=data/study     # 66 MB of text in half a minute

`input` holds train/<source>.jsonl.gz and val/<source>.jsonl.gz, and probes/<domain>.jsonl.gz if
there are probe sets. Every record has a field `text`. The other formats of prepare/text.py work as
well. The tokenizer is a byte-level BPE that is trained on the training text, unless one is named.
Sources that exist already and were made of the same files in the same way are kept.
"""
import collections
import glob
import itertools
import os

import _path  # noqa: F401  (import path)

from tqdm import tqdm

from configurator import BadInput, at_least, configure
from lib.reading import check_kind, local_files, split_packing, texts_in
from lib.tokenizer import load_tokenizer
from prepare import inputs
from prepare.common import train_tokenizer
from prepare.shards import encode_text, open_source, source_folder, write_source

# -- knobs --
input = ''                       # folder with train/, val/ and perhaps probes/
out = 'data/study'               # folder of the sources and of probe/
sources: list[str] = []          # names. []: every file in train/
tokenizer = ''                   # tiktoken name, rank file, tokenizer.json, or folder with one.
                                 # '': one is trained
vocab_size: at_least(259) | None = None     # of a trained tokenizer. None: 2048


def files_in(folder):
    """Returns {name without endings: [File]} of the files in a folder, {} if there is none.

    Raises BadInput for a file that cannot be read, and for one that is there packed and unpacked.
    """
    files = collections.defaultdict(list)
    seen = {}
    for path in sorted(glob.glob(f'{glob.escape(folder)}/*')):
        check_kind(path)
        name = os.path.basename(path)
        stem = os.path.splitext(split_packing(name)[0])[0]
        if stem in seen:
            raise BadInput(f'{path} and {seen[stem]} have the same name. Remove one of them.')
        seen[stem] = path
        files[name.split('.')[0]] += local_files(path)
    return dict(sorted(files.items()))


def main(input, out, names, tokenizer, vocab_size):
    """Makes the sources `names` (all of train/ if it is empty) and all probe sets."""
    found = {split: files_in(os.path.join(input, split)) for split in ('train', 'val', 'probes')}
    if not input or not found['train']:
        raise BadInput(f"--input='{input}' has no train/<source>.jsonl.gz in it.")
    names = names or list(found['train'])
    for name in names:
        for split in ('train', 'val'):
            if name not in found[split]:
                raise BadInput(
                    f"--input='{input}' has no {split}/{name}.jsonl.gz. It has "
                    f'{", ".join(found[split]) or "nothing"} in {split}/.')
    made_of = {name: {split: found[split][name] for split in ('train', 'val')} for name in names}
    folders = {name: source_folder(out, name, '--sources') for name in names}
    for domain, files in found['probes'].items():
        made_of[f'probe/{domain}'] = dict(probe=files)
        folders[f'probe/{domain}'] = source_folder(os.path.join(out, 'probe'), domain, 'probes/')
    if tokenizer:
        encoder = load_tokenizer(tokenizer)
    else:
        texts = [texts_in(found['train'][name]) for name in names]
        encoder = train_tokenizer(itertools.chain(*texts), vocab_size or 2048)
    for name, splits in tqdm(made_of.items(), desc='sources', unit='source'):
        content = {split: inputs.fingerprint(inputs.with_content(files)[0])
                   for split, files in splits.items()}
        settings = dict(
            made_by='prepare/folder.py', files=content, tokenizer=encoder.fingerprint)
        if open_source(folders[name], settings) is not None:
            continue
        documents = {}
        for split, files in splits.items():
            documents[split] = (encode_text(encoder, text) for text in texts_in(files))
        write_source(folders[name], encoder, settings, documents)
    print(
        f'{len(names)} sources and {len(found["probes"])} probe sets in {out}, '
        f'{encoder.vocab_size} tokens')


if __name__ == '__main__':
    configure(globals())
    if tokenizer and vocab_size is not None:
        raise BadInput('vocab_size is that of a trained tokenizer: leave it out with --tokenizer.')
    main(input, out, sources, tokenizer, vocab_size)
