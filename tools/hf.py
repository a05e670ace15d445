"""Converts models from and to the Hugging Face format.

    python tools/hf.py import --model=HuggingFaceTB/SmolLM2-135M --out=out/smollm2
    python tools/hf.py export --ckpt=out/run --out=out/run_hf
    python tools/hf.py export --ckpt=out/run --out=out/run_hf --family=llama4_text

`import` takes a hub name or a folder and writes a folder that looks like a run. `export` writes a
folder in the layout of transformers. The work is done in lib/hf.py.

A run that started from a model of Hugging Face (init_from) is exported in the family of that model,
with its fields. Any other one is exported in the first of llama, qwen2, qwen3, smollm3 and
qwen3_moe that computes the same. MobileLLM-R1's norms of queries and keys have no weights. As a
Qwen3 they are written with weights of 1, which more programs can read than the llama4_text of the
published models.
"""

import os

import _path  # noqa: F401  (puts the project's folder on the import path)

from configurator import BadInput, configure, one_of
from lib.hf import export_model, import_model
from tools.commands import read_command, warn_unused

# -- knobs of the command line --
model = ''                              # import: hub name or folder
revision: str | None = None             # import: branch, tag or commit of a hub name
ckpt = ''                               # export: run folder, checkpoint or imported folder
out = ''                                # folder to write
dtype: one_of('auto', 'float32', 'bfloat16', 'float16') = 'auto'    # of the weights; auto: that of
                                        # the files, or of the import; float32 for our runs
family: one_of(
    'auto', 'llama', 'qwen2', 'qwen3', 'qwen3_moe', 'mistral', 'smollm3', 'llama4_text') = 'auto'
                                        # export: model_type to write; auto: see above
chat_template: one_of('llama3', 'chatml') | None = None     # export: the template to write as
                                        # chat_template.jinja

if __name__ == '__main__':
    command, arguments = read_command(('import', 'export'))
    configure(globals(), arguments, verbose=False)
    source = model if command == 'import' else ckpt
    if not (source and out):
        raise BadInput(
            'Use `tools/hf.py import --model=... --out=...` or '
            '`tools/hf.py export --ckpt=... --out=...`.'
        )
    if command == 'import':
        warn_unused(arguments, ('ckpt', 'family', 'chat_template'), 'with import')
        if os.path.isdir(model):
            warn_unused(arguments, ['revision'], 'for a folder')
        import_model(model, revision, out, dtype)
    else:
        warn_unused(arguments, ('model', 'revision'), 'with export')
        export_model(ckpt, out, dtype, chat_template, family)
