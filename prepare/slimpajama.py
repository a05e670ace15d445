"""SlimPajama: RedPajama cleaned and deduplicated -> data/slimpajama/.

    python prepare/slimpajama.py --tokenizer=tokenizer.json --max_tokens=1_000_000_000

590 million documents, 627 billion tokens (GPT-NeoX), 895 GB to read, 2.5 TB of shards. Each part
keeps its own licence. The part RedPajamaBook is left out, since its makers withdrew it.
The dataset has been missing from the hub since February 2026, apart from short returns. --input
takes a copy. Without one prepare/dclm.py or prepare/fineweb_edu.py stands in: web pages, as four
fifths of SlimPajama are.
https://huggingface.co/datasets/cerebras/SlimPajama-627B
"""
import _path  # noqa: F401  (import path)

from configurator import configure
from prepare.common import Dataset, PrepareConfig, prepare

REPO = 'hf://datasets/cerebras/SlimPajama-627B@2d0accdd58c5d5511943ca1f5ff0e3eb5e293543'
FILES = [f'{REPO}/train/chunk*/*.jsonl.zst']


def text_of(record):
    is_book = record['meta']['redpajama_set_name'] == 'RedPajamaBook'
    return None if is_book else record['text']


CARD = dict(documents=590e6, tokens=627e9, licence='that of each part')
GONE = (
    'is not on the hub: it has been missing since February 2026, apart from short returns. If you '
    'have a copy, give it with --input. Otherwise prepare/dclm.py or prepare/fineweb_edu.py stands '
    'in: prepare one of them, and name it in place of slimpajama in `sources`.')
DATASET = Dataset('slimpajama', FILES, ('text', 'meta'), text_of, gone=GONE, **CARD)

if __name__ == '__main__':
    prepare(DATASET, configure(globals(), owners=(PrepareConfig,)))
