"""Converts models from and to the Hugging Face format.

    python tools/hf.py import --model=HuggingFaceTB/SmolLM2-135M --out=out/smollm2
    python tools/hf.py export --ckpt=out/run --out=out/run_hf

`import` takes a hub name or a folder and writes a folder that looks like a run. `export` writes a
folder for transformers and vLLM. The work is done in lib/hf.py.
"""

import sys

import _path  # noqa: F401  (puts the project's folder on the import path)

from configurator import BadInput, configure
from lib.hf import export_model, import_model

# -- knobs of the command line --
model = ''                              # import: hub name or folder
revision: str | None = None             # import: branch, tag or commit of a hub name
ckpt = ''                               # export: run folder, checkpoint or imported folder
out = ''                                # folder to write
dtype = 'auto'                          # export: float32, bfloat16 or float16;
                                        # auto: float32 for our runs, else as imported
chat_template: str | None = None        # export: llama3 or chatml, written as chat_template.jinja

if __name__ == '__main__':
    argv = sys.argv[1:] or ['--help']
    command = argv[0]
    is_known = command in ('import', 'export')
    configure(globals(), argv[1:] if is_known else argv, verbose=False)
    source = model if command == 'import' else ckpt
    if not (is_known and source and out):
        raise BadInput(
            'Use `tools/hf.py import --model=... --out=...` or '
            '`tools/hf.py export --ckpt=... --out=...`.'
        )
    if command == 'import':
        import_model(model, revision, out)
    else:
        export_model(ckpt, out, dtype, chat_template)
