"""Stack Exchange of RedPajama: questions with their answers -> data/stackexchange/.

    python prepare/stackexchange.py --tokenizer=tokenizer.json --max_tokens=1_000_000_000

29.2 million documents, 20 billion tokens, about 75 GB to read, 80 GB of shards. CC BY-SA. It is not
on the hub but one file on the server of its makers. It is read in ranges, and --revision has no
effect.
https://huggingface.co/datasets/togethercomputer/RedPajama-Data-1T (stackexchange)
"""
import _path  # noqa: F401  (import path)

from configurator import configure
from prepare.common import Dataset, PrepareConfig, prepare

URL = 'https://data.together.xyz/redpajama-data-1T/v1.0.0/stackexchange/stackexchange.jsonl'
DATASET = Dataset('stackexchange', [URL], documents=29.2e6, tokens=20e9, licence='CC BY-SA')

if __name__ == '__main__':
    prepare(DATASET, configure(globals(), owners=(PrepareConfig,)))
