"""Benchmarks with the field's own code (lm-eval), and bits per byte of any text.

    python tools/evaluate.py --ckpt=out/run --tasks=core --limit=200
    python tools/evaluate.py --ckpt=HuggingFaceTB/SmolLM2-135M --tasks=arc_easy,my_task.yaml --compare=out/run/eval.json
    python tools/evaluate.py --ckpt=out/run --bpb=data/finemath            # or a text, .jsonl, .jsonl.gz or parquet file
    torchrun --standalone --nproc_per_node=8 tools/evaluate.py --ckpt=out/run --tasks=core

ckpt is a run, a checkpoint, an imported folder, a Hugging Face folder or a hub name. Task sets: `core` (MobileLLM-R1's tables)
and `bitdistill`; any task, group or tag of lm-eval and any path of a task's YAML besides; `-name` leaves one out. Results go to
a JSON file: for every task its version, shots, metrics with standard errors, number of documents, seconds and the score of every
single document, by which --compare tells a difference between two models far better than their standard errors could.
"""
import os
import time
from importlib.metadata import version

import torch

if __name__ == '__main__':
    import _path  # noqa: F401

from configurator import BadInput, configure
from lib import hf
from lib.chat import find_template
from lib.device import leave_ranks, pick_dtype, start_ranks, tune_malloc
from tools.benchmarks import (
    Scorer,
    bits_per_byte,
    compare_results,
    load_tasks,
    print_results,
    read_documents,
    read_results,
    results_path,
    run_tasks,
    write_results,
)

# -- knobs --
ckpt = ''                               # run, checkpoint, imported folder, Hugging Face folder or hub name
tasks = ''                              # with commas: core, bitdistill, lm-eval's tasks and groups, YAML paths; -name leaves one out
bpb = ''                                # bits per byte of these, with commas: text files, or folders of sources (their val shards)
column = 'text'                         # bpb: field of a record that holds its text
limit: int | None = None                # documents per task; None: all
num_fewshot: int | None = None          # shots; None: those of the set, or the task's own
context: int | None = None              # tokens that the model may see; None: what it was trained for
chat_template: str | None = None        # prompts as conversations: auto (the model's own) | llama3 | chatml; None: plain text
allow_code = False                      # let tasks such as humaneval run code that the model wrote
batch_tokens: int | None = None         # padded tokens of a forward pass; None: 4096 on a CPU, 65536 on a GPU
out: str | None = None                  # file of results; None: eval.json in the run's folder
compare: str | None = None              # another run's folder or file of results: print the differences
device = 'auto'                         # auto | cpu | cuda
dtype = 'auto'                          # auto | float32 | bfloat16: of the weights and the computation


def main():
    if not ckpt or not (tasks or bpb):
        raise BadInput('say which model and what: --ckpt=out/run --tasks=core, or --bpb=file.')
    tune_malloc()
    rank, _, on = start_ranks(device)
    precision, reason = pick_dtype(dtype, on)
    others = read_results(compare) if compare is not None else None
    path = results_path(ckpt, out)
    if allow_code:
        os.environ['HF_ALLOW_CODE_EVAL'] = '1'
    names = [name.strip() for name in tasks.split(',') if name.strip()]
    loaded = load_tasks(names, num_fewshot, allow_code)        # all of them before the first is run
    model, tokenizer, about = hf.open_model(ckpt, on, precision)
    length = context or about['context']
    if length > about['context'] and rank == 0:
        print(f'context: {length:,} is more than the {about["context"]:,} tokens that the model was made for; quality may suffer.')
    template = find_template(about['folder'], tokenizer, chat_template) if chat_template is not None else None
    scorer = Scorer(model, tokenizer, about['add_bos'], about['prefix_id'], length, on,
                    batch_tokens or (65536 if on.type == 'cuda' else 4096), template=template)
    settings = dict(model=about['checkpoint'] or about['folder'], limit=limit, chat_template=chat_template, dtype=str(precision),
                    context=length, date=time.strftime('%Y-%m-%d %H:%M'), lm_eval=version('lm_eval'), torch=torch.__version__)

    def keep(results):
        if rank == 0:
            write_results(path, results, settings)
    start = time.perf_counter()
    results = {f'bpb {what}': bits_per_byte(scorer, read_documents(what, tokenizer, column, limit)) for what in bpb.split(',') if what}
    keep(results)
    results |= run_tasks(scorer, loaded, limit, allow_code, keep)
    seconds = time.perf_counter() - start
    if rank == 0:
        print_results(results)
        n_scored = f'{scorer.n_scored:,} tokens scored on this rank, ' if scorer.n_scored else ''
        print(f'\n{n_scored}{seconds:.1f} s in all, {precision} ({reason})'
              + (f'; {scorer.n_cut:,} requests were longer than the context of {length:,} and lost their beginning' if scorer.n_cut else ''))
        print(f'results: {path}')
    if rank == 0 and others is not None:
        print(f'\n{"task":<28}{"metric":<24}{"here":>9}{"there":>9}{"difference":>12}{"stderr":>9}')
        for name, metric, x, y, delta, error, how in compare_results(results, others):
            print(f'{name:<28.28}{metric:<24.24}{x:>9.4f}{y:>9.4f}{delta:>+12.4f}' + (f'{error:>9.4f}  {how}' if error is not None else ''))
    leave_ranks(0)


if __name__ == '__main__':
    config = configure(globals(), verbose=False)
    main()
