"""ClimbMix: web text, clustered and mixed by search; of nanochat's speedrun -> data/climbmix/.

    python prepare/climbmix.py --tokenizer=tokenizer.json --max_tokens=1_000_000_000

553 million documents, 400 billion tokens (GPT-2), about 600 GB to read, 1.6 TB of shards: set
--max_tokens. These are 6,543 shuffled files of text that the maker of nanochat made of NVIDIA's
Nemotron-ClimbMix. Its licence is CC BY-NC 4.0: not for commercial use. (The card of the shuffled
copy says MIT, but the text is NVIDIA's.) Diao et al. 2025 (arXiv 2504.13161).
https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle
"""
import _path  # noqa: F401  (import path)

from configurator import configure
from prepare.common import Dataset, PrepareConfig, prepare

REPO = 'hf://datasets/karpathy/climbmix-400b-shuffle@915333b4f8b8684f39aeaafea600fea6f43fb703'
FILES = [f'{REPO}/shard_*.parquet']
LICENCE = "CC BY-NC 4.0 of NVIDIA's original: not for commercial use"
DATASET = Dataset('climbmix', FILES, documents=553e6, tokens=4e11, licence=LICENCE)

if __name__ == '__main__':
    prepare(DATASET, configure(globals(), owners=(PrepareConfig,)))
