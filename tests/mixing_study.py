"""Do the mixing laws hold, and which method measures the matrix A that they predict?

    python tests/mixing_study.py --text=folder      # about two hours on two idle cores

This runs tools/sweep.py and tools/mixing_laws.py on real text, for the tables of docs/RESULTS.md.
Finished runs are kept. `folder` holds train/ and val/ with {code,math,web_edu}.jsonl.gz. A
byte-level BPE of 2,048 tokens is trained on the text. The model and its 300 steps of 1,024 tokens
are those of config/ablation/mixing.py. The design is the published one (arXiv:2411.05735):

- static law: 9 mixtures with every seed
- dynamic law: 9 parents, stopped half-way and continued for 100 steps by 9 mixtures each
- A*: the same continuations of a run of each method and seed
"""
import os

if __name__ == '__main__':
    import _path  # noqa: F401

from configurator import BadInput, configure
from tests.studies import run

# -- knobs --
text = ''                           # folder with train/*.jsonl.gz and val/
out = 'out/mixing_study'            # prepared data, runs and reports
seeds = [0, 1, 2, 3, 4]             # of initial weights and data order
parts = ['static', 'dynamic', 'aioli', 'skillit', 'doge', 'doremi']
jobs = 2                            # runs at the same time, of one thread each

SOURCES = ('code', 'math', 'web_edu')
VOCAB_SIZE = 2048
BREAK_STEP = 150                    # half of a run


def study(part, folder, seeds, options):
    """Runs one of `parts`. options: further arguments of the sweep, config files among them."""
    sweep = ['tools/sweep.py', 'mixture', '--dirichlet', '--n=9', f'--out={folder}', *options]
    if part == 'static':
        run(*sweep, f'--seeds={seeds}')
        run('tools/mixing_laws.py', 'fit-static', folder)
        return
    sweep.append(f'--break_step={BREAK_STEP}')
    children = os.path.join(folder, 'children')
    if part == 'dynamic':
        run(*sweep, f'--seeds={seeds[:1]}')
        run('tools/mixing_laws.py', 'fit-dynamic', children)
    else:
        run(*sweep, f'--seeds={seeds}', f'--method={part}')
        run('tools/mixing_laws.py', 'a-star', children)
        run('tools/mixing_laws.py', 'sim', children)


if __name__ == '__main__':
    configure(globals(), verbose=False)
    if not text:
        raise BadInput('--text is missing.')
    out = os.path.abspath(out)
    data = os.path.join(out, 'data')
    text = os.path.abspath(text)
    vocab = f'--vocab_size={VOCAB_SIZE}'
    run('prepare/folder.py', f'--input={text}', f'--sources={[*SOURCES]}', vocab, f'--out={data}')
    options = [f'--jobs={jobs}', '--threads=1', 'config/ablation/mixing.py', '--prepare=None']
    options += [f'--data_dir={data}', vocab, f'--sources={dict.fromkeys(SOURCES, 1.0)}']
    for part in parts:
        study(part, os.path.join(out, part), seeds, options)
