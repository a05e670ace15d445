"""The demo's data: real text that every Python installation has -> data/demo/<source>/.

    python prepare/demo.py      # config/demo.py runs this on first use. It takes about 20 seconds

code       source files of Python's standard library, without their docstrings
docs       Python's documentation topics, those docstrings, and the READMEs in the metadata of the
           installed packages
math       numpy's docstrings with numeric examples, and generated arithmetic and algebra problems
           with worked solutions
noise      documents of the other three, in no other source, with their tokens shuffled: a control
           that teaches only token frequencies, which a good re-weighting must learn to avoid
chat       generated conversations of one to four such problems with short answers and loss masks
reasoning  the same with several problems at once, and their solutions in <think> spans

Documents are deduplicated. Their hash decides between train, val (5 %) and probe (3 %, not for
noise). The tokenizer is a byte-level BPE of 4,096 tokens, trained on the training text, that has
the tokens of ChatML. Nothing is downloaded. The same installation gives the same bytes, and another
version of Python or numpy gives slightly different text.
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
from tqdm import tqdm

if __name__ == '__main__':
    import _path  # noqa: F401  (import path)

from configurator import at_least, configure
from lib.chat import encode_chat
from prepare.common import check_space, conversation, train_tokenizer
from prepare.shards import (
    encode_text,
    open_source,
    print_table,
    source_folder,
    write_source,
)

# -- knobs --
out = 'data/demo'                # folder of the demo's sources
vocab_size: at_least(259) = 4096     # of the tokenizer, including its three special tokens
n_problems: at_least(0) = 9000   # generated mathematical problems
n_chats: at_least(1) = 3000      # generated conversations of each kind
seed: at_least(0) = 1337         # of the problems and of the shuffling

SKIPPED = {
    'test', 'tests', 'idlelib', 'lib2to3', 'site-packages', 'dist-packages', 'pydoc_data',
    'encodings', '__pycache__'}
MAX_CHARACTERS = {'code': 6_000_000, 'docs': 3_500_000, 'math': 3_500_000}

# -- text of the installation ----------------------------------------------------------------------


def python_files(folder):
    """Yields (module name, text) of the Python files below a folder, without tests and tables."""
    for where, folders, names in os.walk(folder):
        # os.walk goes into what is left in this list. File systems list folders in different
        # orders.
        folders[:] = sorted(set(folders) - SKIPPED)
        for name in sorted(names):
            path = os.path.join(where, name)
            # The limit of the size leaves out generated tables.
            if name.endswith('.py') and os.path.getsize(path) < 200_000:
                module = os.path.relpath(path, folder).removesuffix('.py').replace(os.sep, '.')
                # A single file in another encoding must not stop the demo.
                with open(path, encoding='utf-8', errors='replace') as f:
                    yield module, f.read()


def cut_docstrings(text):
    """Returns (text without its docstrings, [(qualified name, docstring), ...])."""
    try:
        tree = ast.parse(text)
    except SyntaxError:             # a file for another Python version stays as it is
        return text, []
    lines = text.split('\n')
    docstrings = []

    def visit(node, name):
        body = getattr(node, 'body', None)
        if not isinstance(body, list):
            return
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring is not None:
                docstrings.append((name, docstring))
                # Lines are marked and removed later, because the tree still counts them. A body
                # that was only a docstring ends up empty, which is no fault: the code is never run.
                for i in range(body[0].lineno - 1, body[0].end_lineno):
                    lines[i] = None
        for child in body:
            visit(child, f'{name}.{child.name}' if hasattr(child, 'name') else name)

    visit(tree, '')
    return '\n'.join(line for line in lines if line is not None), docstrings


def readmes():
    """Yields the long descriptions in the metadata of the installed packages, by package name."""
    packages = importlib.metadata.distributions()
    for package in sorted(packages, key=lambda p: p.metadata['Name'] or ''):
        text = package.metadata.get_payload()
        if isinstance(text, str) and len(text) > 500:
            yield text


# -- generated text --------------------------------------------------------------------------------


def math_problem(rng):
    """Returns a random (question, solution, answer) with small numbers, one step a line."""
    a, b, c, d = (rng.randint(2, 60) for _ in range(4))
    # The solution is drawn and the equation made from it, so that answers are whole numbers.
    x = rng.randint(-12, 12)
    thing = rng.choice(['apples', 'books', 'coins', 'pages', 'stamps'])
    name = rng.choice(['Ana', 'Ben', 'Chen', 'Dora', 'Emil'])
    kind = rng.randrange(8)
    if kind == 0:
        answer = a * b + c
        question = f'Compute {a} * {b} + {c}.'
        steps = [f'First the product: {a} * {b} = {a * b}.']
        steps += [f'Then the sum: {a * b} + {c} = {answer}.']
    elif kind == 1:
        answer = x
        question = f'Solve {a}x + {b} = {a * x + b} for x.'
        steps = [f'Subtract {b} from both sides: {a}x = {a * x}.']
        steps += [f'Divide both sides by {a}: x = {x}.']
        steps += [f'Check: {a} * {x} + {b} = {a * x + b}.']
    elif kind == 2:
        p = rng.randint(-9, 9)
        q = rng.randint(-9, 9)
        answer = f'x = {p} or x = {q}'
        question = f'Solve x^2 + ({-p - q})x + ({p * q}) = 0.'
        steps = [f'Two numbers with sum {p + q} and product {p * q} are {p} and {q}.']
        steps += [f'So (x - ({p}))(x - ({q})) = 0.']
    elif kind == 3:
        answer = a + b * c - d
        question = f'{name} has {a} {thing}, buys {b} boxes of {c} {thing} each and gives away {d}.'
        question += ' How many are left?'
        steps = [f'The boxes hold {b} * {c} = {b * c} {thing}.']
        steps += [f'Together that is {a} + {b * c} = {a + b * c}.']
        steps += [f'After giving away {d}: {a + b * c} - {d} = {answer}.']
    elif kind == 4:
        u = a * b
        v = a * c
        question = f'Find the greatest common divisor of {u} and {v}.'
        steps = ['By the Euclidean algorithm:']
        while v:
            steps += [f'{u} = {u // v} * {v} + {u % v}']
            u, v = v, u % v
        answer = u
    elif kind == 5:
        answer = a + (c - 1) * d
        question = f'The sequence {a}, {a + d}, {a + 2 * d}, {a + 3 * d}, ... is arithmetic.'
        question += f' Find term {c}.'
        steps = [f'The common difference is {a + d} - {a} = {d}.']
        steps += [f'Term n is {a} + (n - 1) * {d}.']
        steps += [f'Term {c} is {a} + {c - 1} * {d} = {a} + {(c - 1) * d} = {answer}.']
    elif kind == 6:
        y = rng.randint(-12, 12)
        answer = f'x = {x}, y = {y}'
        question = f'Solve the system x + y = {x + y}, x - y = {x - y}.'
        steps = [f'Add the equations: 2x = {2 * x}, so x = {x}.']
        steps += [f'Then y = {x + y} - ({x}) = {y}.']
    else:
        # With multiples of 5 and of 20 the answer is a whole number.
        percent = 5 * rng.randint(1, 19)
        whole = 20 * rng.randint(2, 50)
        answer = percent * whole // 100
        question = f'What is {percent}% of {whole}?'
        steps = [f'1% of {whole} is {whole} / 100 = {whole / 100:g}.']
        steps += [f'{percent}% is {percent} * {whole / 100:g} = {answer}.']
    return question, '\n'.join(steps), str(answer)


def math_text(rng):
    question, solution, answer = math_problem(rng)
    return f'Problem: {question}\nSolution: {solution}\nAnswer: {answer}'


def math_conversation(rng, with_thoughts):
    """Returns the messages of a conversation about one to four problems.

    with_thoughts  all problems are asked at once, and their solutions stand in a <think> span
    """
    n_problems = rng.choice([1, 1, 1, 2, 2, 3, 4])
    problems = [math_problem(rng) for _ in range(n_problems)]
    questions, solutions, answers = zip(*problems, strict=True)
    answers = [f'The answer is {answer}.' for answer in answers]
    if with_thoughts:
        thoughts = '\n\n'.join(solutions)
        answer = f'<think>\n{thoughts}\n</think>\n\n' + '\n'.join(answers)
        return conversation('\n'.join(questions), answer)
    messages = []
    for question, answer in zip(questions, answers, strict=True):
        messages += conversation(question, answer)
    return messages


# -- the sources -----------------------------------------------------------------------------------


def collect_documents(n_problems, seed):
    """Returns a dict domain -> list of texts, before deduplication."""
    documents = {'code': [], 'docs': list(pydoc_data.topics.topics.values()), 'math': []}
    for module, text in python_files(sysconfig.get_paths()['stdlib']):
        # Left in the code, this prose would make the domains code and docs more alike.
        code, docstrings = cut_docstrings(text)
        documents['code'].append(code)
        reference = [f'{module}{name}\n{docstring}' for name, docstring in docstrings]
        documents['docs'].append('\n\n'.join(reference))
    documents['docs'] += readmes()
    for module, text in python_files(os.path.dirname(np.__file__)):
        for name, docstring in cut_docstrings(text)[1]:
            if '>>>' in docstring:
                documents['math'].append(f'numpy.{module}{name}\n{docstring}')
    rng = random.Random(seed)
    for _ in range(n_problems // 10):            # ten in a document, so that a window holds several
        documents['math'].append('\n\n'.join(math_text(rng) for _ in range(10)))
    return documents


def split_documents(documents):
    """Returns a dict domain -> split -> texts, with the noise.

    Equal documents are kept once. The hash of a document decides where it goes.
    """
    seen = set()
    splits = {domain: dict(train=[], val=[], probe=[]) for domain in (*documents, 'noise')}
    for domain, texts in documents.items():
        size = 0
        hashed = [(hashlib.sha256(text.encode()).hexdigest(), text) for text in texts]
        # In the order of hashes MAX_CHARACTERS drops a random sample and not the last folders.
        for digest, text in sorted(hashed):
            if len(text) <= 200 or digest in seen or size > MAX_CHARACTERS[domain]:
                continue
            seen.add(digest)
            size += len(text)
            # The end of the hash: by its beginning MAX_CHARACTERS already chose the documents.
            share = int(digest[-8:], 16) / 2**32
            into = 'noise' if share < 0.10 else domain
            if share < 0.01 or 0.10 <= share < 0.15:
                splits[into]['val'].append(text)
            elif 0.15 <= share < 0.18:
                splits[into]['probe'].append(text)
            else:
                splits[into]['train'].append(text)
    return splits


def chats(domain, n_chats, seed):
    """Returns a dict split -> different conversations. Their hash decides where they go."""
    # With the same generator both domains would begin with the same problems.
    rng = random.Random(f'{seed} {domain}')
    splits = {'train': [], 'val': []}
    seen = set()
    while len(seen) < n_chats:
        messages = math_conversation(rng, domain == 'reasoning')
        digest = hashlib.sha256(repr(messages).encode()).digest()
        if digest not in seen:
            seen.add(digest)
            # 13 of the 256 values of a byte are 5 %.
            splits['val' if digest[0] < 13 else 'train'].append(messages)
    return splits


def encoded(tokenizer, documents, shuffler=None):
    """Yields the arguments of PartWriter.add for texts or conversations.

    shuffler  random generator that shuffles the tokens of a text; None: they keep their order
    """
    for document in documents:
        if isinstance(document, list):
            ids, mask = encode_chat(tokenizer, document, 'chatml')
            yield ids, sum(len(m['content'].encode()) for m in document), mask
            continue
        ids, n_bytes = encode_text(tokenizer, document)
        if shuffler is not None:
            # BOS stays in front, because it separates documents.
            ids[1:] = shuffler.permutation(ids[1:])
        yield ids, n_bytes


def main(out, vocab_size, n_problems, n_chats, seed):
    start = time.monotonic()
    documents = collect_documents(n_problems, seed)
    # Packages that were installed since then may have brought other text.
    content = hashlib.sha256(repr(documents).encode(errors='surrogatepass')).hexdigest()
    splits = split_documents(documents)
    n_characters = 0
    for parts in splits.values():
        for texts in parts.values():
            n_characters += sum(map(len, texts))
    check_space(out, n_characters)
    # Held-out text is left out: the tokenizer would compress it better than unseen text.
    texts = [text for domain in MAX_CHARACTERS for text in splits[domain]['train']]
    tokenizer = train_tokenizer(texts, vocab_size)
    settings = dict(
        dataset='python standard library', revision=sys.version.split()[0], numpy=np.__version__,
        vocab_size=vocab_size, n_problems=n_problems, n_chats=n_chats, seed=seed,
        content=content, tokenizer=tokenizer.fingerprint)
    for domain in ('chat', 'reasoning'):
        splits[domain] = chats(domain, n_chats, seed)
    shuffler = np.random.default_rng(seed)
    metas = {}
    for domain, parts in tqdm(splits.items(), desc='demo data', unit='source'):
        folder = source_folder(out, domain)
        metas[domain] = open_source(folder, settings)
        if metas[domain] is None:
            documents = {}
            for split, texts in parts.items():
                by = shuffler if domain == 'noise' else None
                documents[split] = encoded(tokenizer, texts, by)
            metas[domain] = write_source(folder, tokenizer, settings, documents)
    print_table(metas, time.monotonic() - start)


if __name__ == '__main__':
    main(**configure(globals()))
