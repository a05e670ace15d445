"""The knobs that every dataset script has besides its own (the argument `shared` of the configurator)."""

# -- what every source has --
tokenizer = ''                   # tiktoken name, rank file, tokenizer.json, or a folder that holds one
input: str | None = None         # local files instead of the hub: file, glob or folder; several with commas between
revision: str | None = None      # another commit of the dataset on the hub than the script's
out = 'data'                     # folder of all sources
max_tokens: int | None = None    # training tokens to stop after; None: everything
shard_tokens = 100_000_000       # tokens after which a training shard is closed
val_fraction = 0.01              # share of the documents set aside for validation, by hash
probe_fraction = 0.005           # share set aside for probe sets (split probe/), by hash; prepare/probe.py chooses from it
skip_bad = False                 # count and list broken records instead of stopping at the first
workers: int | None = None       # tokenizing processes of this rank, 0: none but this one; None: one per core
rank: int | None = None          # this process among world_size; None: from torchrun's or SLURM's variables, else 0 of 1
world_size: int | None = None
