"""Runs benchmarks with lm-eval, and scores any text in bits per byte.

    python tools/evaluate.py --ckpt=out/run --tasks=core --limit=200
    python tools/evaluate.py --ckpt=HuggingFaceTB/SmolLM2-135M --tasks=arc_easy,my_task.yaml
    python tools/evaluate.py --ckpt=out/run --tasks=core --compare=out/other/eval.json
    python tools/evaluate.py --ckpt=out/run --bpb=data/finemath,book.txt
    torchrun --standalone --nproc_per_node=8 tools/evaluate.py --ckpt=out/run --tasks=core

ckpt is a run, a checkpoint, an imported folder, a Hugging Face folder or a hub name. The task sets
are `core` (the tables of MobileLLM-R1) and `bitdistill`. Other names are tasks, groups and tags of
lm-eval, or paths of YAML files. `-name` leaves a task out.

The results go to a JSON file: for every task its version, shots, metrics with standard errors,
number of documents, seconds, and the score of every document. --compare pairs these scores, which
resolves far smaller differences between two models than their standard errors do.
"""

import os
import sys
import time
from importlib.metadata import version

if __name__ == '__main__':
    import _path  # noqa: F401  (puts the project's folder on the import path)

import torch

from configurator import BadInput, at_least, configure, one_of
from lib import hf
from lib.chat import find_template
from lib.device import leave_ranks, pick_dtype, start_ranks, tune_malloc
from lib.reading import match_paths
from tools import benchmarks
from tools.commands import warn_unused

# -- knobs --
ckpt = ''                               # run, checkpoint, imported folder, Hugging Face folder or
                                        # hub name
tasks = ''                              # comma-separated: core, bitdistill, tasks and groups of
                                        # lm-eval, YAML paths; -name leaves one out
bpb = ''                                # bits per byte of these, comma-separated: files of text,
                                        # or folders of sources (their val shards)
column = 'text'                         # bpb: field of a record that holds its text
limit: at_least(1) | None = None        # documents per task; None: all
num_fewshot: at_least(0) | None = None  # shots; None: those of the set, or the task's own
context: at_least(1) | None = None      # tokens that the model may see; None: all it was
                                        # made for
chat_template: str | None = None        # ask in conversations: auto (the model's own template),
                                        # llama3 or chatml; None: plain text
allow_code = False                      # let tasks such as humaneval run code that the model wrote
batch_tokens: at_least(1) | None = None # padded tokens of a forward pass;
                                        # None: 65536 on CUDA, elsewhere 4096
out: str | None = None                  # file of results; None: eval.json in the run's folder
compare: str | None = None              # another run's folder or file of results to compare with
device: one_of('auto', 'cpu', 'cuda', 'mps') = 'auto'   # auto: a GPU when there is one
dtype: one_of('auto', 'float32', 'bfloat16') = 'auto'       # of weights and computation


if __name__ == '__main__':
    configure(globals(), verbose=False)
    if not ckpt or not (tasks or bpb):
        raise BadInput('name a model and what to score: --ckpt=out/run --tasks=core or --bpb=file.')
    names = [name.strip() for name in tasks.split(',') if name.strip()]
    texts = [what for what, _ in match_paths(bpb) if what]
    if not names and not texts:
        raise BadInput('tasks and bpb hold no name: give --tasks=core or --bpb=file.')
    if not names:
        unused = ('num_fewshot', 'chat_template', 'allow_code')
        warn_unused(sys.argv[1:], unused, 'without --tasks')
    if not texts:
        warn_unused(sys.argv[1:], ['column'], 'without --bpb')
    tune_malloc()
    rank, _, here = start_ranks(device, unfit=None)
    is_master = rank == 0
    precision, reason = pick_dtype(dtype, here)
    baseline = benchmarks.read_results(compare) if compare is not None else None
    path = benchmarks.results_path(ckpt, out)
    if allow_code:
        os.environ['HF_ALLOW_CODE_EVAL'] = '1'
    # All tasks are loaded before the first one runs, so a mistake shows at once.
    loaded = benchmarks.load_tasks(names, num_fewshot, allow_code)
    model, tokenizer, about = hf.open_model(ckpt, here, precision)
    length = context or about['context']
    hf.check_context(about, length)
    if length > about['context'] and is_master:
        print(f'context: the model was made for {about["context"]:,} tokens; more may be worse.')
    template = None
    if chat_template is not None:
        template = find_template(about['folder'], tokenizer, chat_template)
    if batch_tokens is None:
        batch_tokens = 65536 if here.type == 'cuda' else 4096
    scorer = benchmarks.Scorer(model, tokenizer, length, batch_tokens, template=template)
    settings = dict(model=about['checkpoint'] or about['folder'], limit=limit)
    settings |= dict(chat_template=chat_template, dtype=str(precision), context=length)
    settings |= dict(date=time.strftime('%Y-%m-%d %H:%M'))
    settings |= dict(lm_eval=version('lm_eval'), torch=torch.__version__)

    def keep(results):
        if is_master:
            benchmarks.write_results(path, results, settings)

    start = time.perf_counter()
    results = {}
    for what in texts:
        documents = benchmarks.read_documents(what, tokenizer, column, limit)
        results[f'bpb {what}'] = benchmarks.bits_per_byte(scorer, documents)
    # Results are written after every task, so a crash loses only one.
    keep(results)
    results |= benchmarks.run_tasks(scorer, loaded, limit, allow_code, keep)
    seconds = time.perf_counter() - start
    if is_master:
        benchmarks.print_results(results)
        print(f'\n{scorer.n_scored:,} tokens scored on this rank in {seconds:.1f} s')
        print(f'computed in {precision} ({reason})')
        if scorer.n_cut:
            print(f'{scorer.n_cut:,} requests were too long and lost their beginning')
        print(f'results: {path}')
    if is_master and baseline is not None:
        benchmarks.print_differences(benchmarks.compare_results(results, baseline))
    leave_ranks(0)
