"""Do the mixing laws hold, and which method measures what they say? tools/sweep.py and tools/mixing_laws.py on real text; the tables of docs/RESULTS.md.

    python tests/mixing_study.py --text=folder            # about two hours on two idle cores; a part that is there is not made again

`folder` holds train/ and val/ with {code,math,web_edu}.jsonl.gz. A byte-level BPE of 2,048 tokens is trained on the text; the model and its 300
steps of 1,024 tokens are config/ablation/mixing.py. As published (arXiv:2411.05735): 9 mixtures with every seed for the static law; 9 parents,
stopped half-way and continued for 100 steps by 9 mixtures each, for the dynamic law; for A* the same children of a run of each method and seed.
"""
import os

from configurator import BadInput, configure
from tests.studies import run

# -- knobs --
text = ''                        # folder with train/*.jsonl.gz and val/
out = 'out/mixing_study'         # prepared data, runs and reports
seeds = [0, 1, 2, 3, 4]          # of initial weights and data order
parts = ['static', 'dynamic', 'aioli', 'skillit', 'doge', 'doremi']
jobs = 2                         # runs at the same time, of one thread each
configure(globals(), verbose=False)

SOURCES = ('code', 'math', 'web_edu')
BREAK_STEP, VOCAB_SIZE = 150, 2048


def study(part, config):
    folder = os.path.join(out, part)
    sweep = ['tools/sweep.py', 'mixture', '--dirichlet', '--n=9', f'--jobs={jobs}', '--threads=1', f'--out={folder}', *config]
    if part == 'static':
        run(*sweep, f'--seeds={seeds}')
        run('tools/mixing_laws.py', 'fit-static', folder)
    elif part == 'dynamic':
        run(*sweep, f'--seeds={seeds[:1]}', f'--break_step={BREAK_STEP}')
        run('tools/mixing_laws.py', 'fit-dynamic', os.path.join(folder, 'children'))
    else:
        run(*sweep, f'--seeds={seeds}', f'--break_step={BREAK_STEP}', f'--method={part}')
        run('tools/mixing_laws.py', 'a-star', os.path.join(folder, 'children'))
        run('tools/mixing_laws.py', 'sim', os.path.join(folder, 'children'))


if __name__ == '__main__':
    if not text:
        raise BadInput('--text is missing.')
    out = os.path.abspath(out)
    run('prepare/folder.py', f'--input={os.path.abspath(text)}', f'--sources={list(SOURCES)}', f'--vocab_size={VOCAB_SIZE}', f"--out={os.path.join(out, 'data')}")
    for part in parts:
        study(part, ['config/ablation/mixing.py', '--prepare=None', f"--data_dir={os.path.join(out, 'data')}", f'--vocab_size={VOCAB_SIZE}',
                     f'--sources={dict.fromkeys(SOURCES, 1.0)}'])
