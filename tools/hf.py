"""Converts models from and to the Hugging Face format.

    python tools/hf.py import --model=HuggingFaceTB/SmolLM2-135M --out=out/smollm2
    python tools/hf.py export --ckpt=out/run --out=out/run_hf

`import` takes a hub name or a folder and writes a folder that looks like a run. `export` writes a
folder for transformers and vLLM. The work is done in lib/hf.py.
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
dtype: one_of('auto', 'float32', 'bfloat16', 'float16') = 'auto'    # export: of the weights;
                                        # auto: float32 for our runs, else as imported
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
        warn_unused(arguments, ('ckpt', 'dtype', 'chat_template'), 'with import')
        if os.path.isdir(model):
            warn_unused(arguments, ['revision'], 'for a folder')
        import_model(model, revision, out)
    else:
        warn_unused(arguments, ('model', 'revision'), 'with export')
        export_model(ckpt, out, dtype, chat_template)
