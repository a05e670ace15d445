"""The demo's data: real text that every Python installation has, nothing downloaded -> data/demo/{code,docs,math,noise,chat,reasoning}/.

    python prepare/demo.py          # `python train.py config/demo.py` does it on first use; about 20 seconds

code    source files of Python's standard library, their docstrings cut out
docs    Python's documentation topics, those docstrings, and the READMEs in installed packages' metadata
math    numpy's docstrings with numeric examples, and arithmetic and algebra problems with worked solutions (generated)
noise   documents of the other three, in no other source, with their tokens shuffled: a control that teaches nothing but
        token frequencies, and that a good re-weighting must learn to avoid
chat    conversations of one to four questions of that kind with short answers (generated), with loss masks
reasoning  the same, a few problems at once and the way to their answers between <think> and </think>

Documents are deduplicated, and split by their hash into train, val (5 %) and probe (3 %; not for noise). The tokenizer is a
byte-level BPE of 4,096 tokens, ChatML's among them, trained on the training text. The same installation gives the same bytes; another Python or
numpy version gives slightly other text.
"""
import ast
import hashlib
import importlib.metadata
import os
import pydoc_data.topics
import random
import sys
import sysconfig
import time

import numpy as np
import rustbpe
from tqdm import tqdm

if __name__ == '__main__':
    import _path  # noqa: F401

from configurator import configure
from lib.chat import encode_chat
from lib.tokenizer import LLAMA3_PATTERN, make_tokenizer
from prepare.common import check_space
from prepare.shards import PartWriter, finish_source, open_source, print_table

# -- knobs --
out = 'data/demo'                # folder of the demo's sources
vocab_size = 4096                # of the tokenizer, end-of-text token included
n_problems = 9000                # generated mathematics problems
n_chats = 3000                   # generated conversations, of each kind
seed = 1337                      # of the problems and the shuffling

SKIPPED = {'test', 'tests', 'idlelib', 'lib2to3', 'site-packages', 'dist-packages', 'pydoc_data', 'encodings', '__pycache__'}
MAX_CHARACTERS = {'code': 6_000_000, 'docs': 3_500_000, 'math': 3_500_000}
END = '<|endoftext|>'
SPECIAL = (END, '<|im_start|>', '<|im_end|>')
PATTERN = LLAMA3_PATTERN.replace(r'\p{N}{1,3}', r'\p{N}')       # digits one by one: arithmetic is learnt sooner


def python_files(folder):
    """(name, text) of every Python file below `folder`, in a fixed order, tests and tables of data left out."""
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - SKIPPED)
        for name in sorted(names):
            path = os.path.join(where, name)
            if name.endswith('.py') and os.path.getsize(path) < 200_000:
                with open(path, encoding='utf-8', errors='replace') as f:
                    yield os.path.relpath(path, folder), f.read()


def cut_docstrings(text):
    """(text without its docstrings, [(qualified name, docstring), ...])."""
    try:
        tree = ast.parse(text)
    except SyntaxError:             # a file for another Python version: left as it is
        return text, []
    lines, docstrings = text.split('\n'), []
    kept = [True] * len(lines)

    def visit(node, name):
        body = getattr(node, 'body', None)
        if not isinstance(body, list):
            return
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring is not None:
                docstrings.append((name, docstring))
                kept[body[0].lineno - 1:body[0].end_lineno] = [False] * (body[0].end_lineno - body[0].lineno + 1)
        for child in body:
            visit(child, f'{name}.{child.name}' if hasattr(child, 'name') else name)

    visit(tree, '')
    return '\n'.join(line for line, keep in zip(lines, kept) if keep), docstrings


def format_docstrings(module, docstrings):
    """A module's docstrings as one reference text."""
    return '\n\n'.join(f'{module}{name}\n{docstring}' for name, docstring in docstrings)


def readmes():
    """The long descriptions in installed packages' metadata, by package name."""
    for package in sorted(importlib.metadata.distributions(), key=lambda d: d.metadata['Name'] or ''):
        text = package.metadata.get_payload()
        if isinstance(text, str) and len(text) > 500:
            yield text


def math_problem(rng):
    """One worked problem of a random kind, small numbers, one step a line."""
    a, b, c, d = (rng.randint(2, 60) for _ in range(4))
    x = rng.randint(-12, 12)
    thing, name = rng.choice(['apples', 'books', 'coins', 'pages', 'stamps']), rng.choice(['Ana', 'Ben', 'Chen', 'Dora', 'Emil'])
    kind = rng.randrange(8)
    if kind == 0:
        return (f'Problem: Compute {a} * {b} + {c}.\nSolution: First the product: {a} * {b} = {a * b}.\n'
                f'Then the sum: {a * b} + {c} = {a * b + c}.\nAnswer: {a * b + c}')
    if kind == 1:
        return (f'Problem: Solve {a}x + {b} = {a * x + b} for x.\nSolution: Subtract {b} from both sides: {a}x = {a * x}.\n'
                f'Divide both sides by {a}: x = {x}.\nCheck: {a} * {x} + {b} = {a * x + b}.\nAnswer: {x}')
    if kind == 2:
        p, q = rng.randint(-9, 9), rng.randint(-9, 9)
        return (f'Problem: Solve x^2 + ({-p - q})x + ({p * q}) = 0.\nSolution: Two numbers with sum {p + q} and product {p * q} '
                f'are {p} and {q}.\nSo (x - ({p}))(x - ({q})) = 0.\nAnswer: x = {p} or x = {q}')
    if kind == 3:
        return (f'Problem: {name} has {a} {thing}, buys {b} boxes of {c} {thing} each and gives away {d}. How many are left?\n'
                f'Solution: The boxes hold {b} * {c} = {b * c} {thing}.\nTogether that is {a} + {b * c} = {a + b * c}.\n'
                f'After giving away {d}: {a + b * c} - {d} = {a + b * c - d}.\nAnswer: {a + b * c - d}')
    if kind == 4:
        m, n = a * b, a * c
        steps, u, v = [], m, n
        while v:
            steps.append(f'{u} = {u // v} * {v} + {u % v}')
            u, v = v, u % v
        return (f'Problem: Find the greatest common divisor of {m} and {n}.\nSolution: By the Euclidean algorithm:\n'
                + '\n'.join(steps) + f'\nAnswer: {u}')
    if kind == 5:
        terms = [a + i * d for i in range(5)]
        return (f'Problem: The sequence {", ".join(map(str, terms[:4]))}, ... is arithmetic. Find term {c}.\n'
                f'Solution: The common difference is {terms[1]} - {terms[0]} = {d}.\nTerm n is {a} + (n - 1) * {d}.\n'
                f'Term {c} is {a} + {c - 1} * {d} = {a} + {(c - 1) * d} = {a + (c - 1) * d}.\nAnswer: {a + (c - 1) * d}')
    if kind == 6:
        y = rng.randint(-12, 12)
        return (f'Problem: Solve the system x + y = {x + y}, x - y = {x - y}.\nSolution: Add the equations: 2x = {2 * x}, so x = {x}.\n'
                f'Then y = {x + y} - ({x}) = {y}.\nAnswer: x = {x}, y = {y}')
    percent, whole = 5 * rng.randint(1, 19), 20 * rng.randint(2, 50)
    return (f'Problem: What is {percent}% of {whole}?\nSolution: 1% of {whole} is {whole} / 100 = {whole / 100:g}.\n'
            f'{percent}% is {percent} * {whole / 100:g} = {percent * whole // 100}.\nAnswer: {percent * whole // 100}')


def collect_documents():
    """domain -> list of texts, before deduplication."""
    documents = {'code': [], 'docs': list(pydoc_data.topics.topics.values()), 'math': []}
    for path, text in python_files(sysconfig.get_paths()['stdlib']):
        code, docstrings = cut_docstrings(text)
        documents['code'].append(code)
        documents['docs'].append(format_docstrings(path[:-3].replace(os.sep, '.'), docstrings))
    documents['docs'] += readmes()
    for path, text in python_files(os.path.dirname(np.__file__)):
        for name, docstring in cut_docstrings(text)[1]:
            if '>>>' in docstring:
                documents['math'].append(f'numpy.{path[:-3].replace(os.sep, ".")}{name}\n{docstring}')
    rng = random.Random(seed)
    for _ in range(n_problems // 10):            # ten to a document, so that a window holds several
        documents['math'].append('\n\n'.join(math_problem(rng) for _ in range(10)))
    return documents


def split_documents(documents):
    """domain -> split -> texts. Equal documents are kept once; the hash of a document decides where it goes, noise included."""
    seen, splits = set(), {domain: {'train': [], 'val': [], 'probe': []} for domain in (*documents, 'noise')}
    for domain, texts in documents.items():
        hashed = sorted((hashlib.sha256(text.encode()).hexdigest(), text) for text in texts if len(text) > 200)
        size = 0
        for digest, text in hashed:
            if digest in seen or size > MAX_CHARACTERS[domain]:
                continue
            seen.add(digest)
            size += len(text)
            share = int(digest[-8:], 16) / 2**32
            if share < 0.10:
                splits['noise']['val' if share < 0.01 else 'train'].append(text)
            else:
                splits[domain]['val' if share < 0.15 else 'probe' if share < 0.18 else 'train'].append(text)
    return splits


def conversation(rng, with_thoughts):
    """Messages: one to four problems of `math_problem`, each asked and answered in turn, or all at once with the way to the answers."""
    problems = []
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 4])):
        question, rest = math_problem(rng).removeprefix('Problem: ').split('\nSolution: ')
        problems.append((question, *rest.split('\nAnswer: ')))
    if not with_thoughts:
        return [dict(role=role, content=content) for question, _, answer in problems
                for role, content in (('user', question), ('assistant', f'The answer is {answer}.'))]
    thoughts = '\n\n'.join(way for _, way, _ in problems)
    return [dict(role='user', content='\n'.join(question for question, _, _ in problems)),
            dict(role='assistant', content=f'<think>\n{thoughts}\n</think>\n\n' + '\n'.join(f'The answer is {a}.' for _, _, a in problems))]


def chats(domain):
    """split -> conversations, all different; the hash of one decides where it goes."""
    rng, splits, seen = random.Random(f'{seed} {domain}'), {'train': [], 'val': []}, set()
    while len(seen) < n_chats:
        messages = conversation(rng, domain == 'reasoning')
        digest = hashlib.sha256(repr(messages).encode()).digest()
        if digest not in seen:
            seen.add(digest)
            splits['val' if digest[0] < 13 else 'train'].append(messages)
    return splits


def train_tokenizer(texts, vocab_size):
    """A byte-level BPE of `vocab_size` tokens, the last of them special."""
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(iter(texts), vocab_size - len(SPECIAL), pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
    return make_tokenizer('demo', ranks, PATTERN, {name: len(ranks) + i for i, name in enumerate(SPECIAL)}, END)


def encode_conversation(tokenizer, messages):
    """(ids, bytes of text, mask) for PartWriter.add."""
    ids, mask = encode_chat(tokenizer, messages, 'chatml')
    return ids, sum(len(m['content'].encode()) for m in messages), mask


def main():
    start = time.monotonic()
    splits = split_documents(collect_documents())
    check_space(out, sum(len(text) for parts in splits.values() for texts in parts.values() for text in texts))
    tokenizer = train_tokenizer([text for domain in MAX_CHARACTERS for text in splits[domain]['train']], vocab_size)
    settings = dict(dataset='python standard library', revision=sys.version.split()[0], numpy=np.__version__,
                    vocab_size=vocab_size, n_problems=n_problems, n_chats=n_chats, seed=seed, tokenizer=tokenizer.fingerprint)
    splits |= {domain: chats(domain) for domain in ('chat', 'reasoning')}
    shuffler = np.random.default_rng(seed)
    metas = {}
    for domain in tqdm(splits, desc='demo data', unit='source'):
        folder = os.path.join(out, domain)
        metas[domain] = open_source(folder, settings)
        if metas[domain] is not None:
            continue
        PartWriter(folder, 0, tokenizer.vocab_size).delete()       # of a run that was cut off: a second's work, made anew
        writer = PartWriter(folder, 0, tokenizer.vocab_size)
        for split, texts in splits[domain].items():
            for text in texts:
                if isinstance(text, list):
                    writer.add(split, *encode_conversation(tokenizer, text))
                    continue
                ids = tokenizer.encode_document(text)
                if domain == 'noise':
                    ids = shuffler.permutation(ids)
                writer.add(split, np.concatenate(([tokenizer.bos_id], ids)), len(text.encode()))
        writer.commit(1, 0, done=True)
        metas[domain] = finish_source(folder, tokenizer, settings, [writer.state])
    print_table(metas, time.monotonic() - start)


if __name__ == '__main__':
    configure(globals())
    main()
