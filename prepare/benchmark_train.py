"""The training sets of eight benchmarks as question and answer -> data/benchmark_train/.

    python prepare/benchmark_train.py --tokenizer=path/to/tokenizer.json

TriviaQA, OpenBookQA, NQ-open, PIQA, GSM8K, BoolQ, ARC-Easy and ARC-Challenge: about 218,000 documents, 10 million tokens. A model
that is trained on them is no longer a zero-shot model on their test sets. Each keeps its own licence.
https://huggingface.co/datasets/allenai/ai2_arc and the others named below
"""

import _path  # noqa: F401

from configurator import configure
from prepare import knobs
from prepare.common import Dataset, prepare

HUB = 'hf://datasets/'
DATASET = Dataset('benchmark_train', [
    HUB + 'mandarjoshi/trivia_qa@0f7faf33a3908546c6fd5b73a660e0f8ff173c2f/unfiltered.nocontext/train-*.parquet',
    HUB + 'allenai/openbookqa@388097ea7776314e93a529163e0fea805b8a6454/main/train-*.parquet',
    HUB + 'google-research-datasets/nq_open@5dd9790a83002ad084ddeb7c420dc716852c6f28/nq_open/train-*.parquet',
    HUB + 'baber/piqa@142f6d7367fd9877f0fb3b5734ea6a545f54cdd1/**/train*.parquet',
    HUB + 'openai/gsm8k@740312add88f781978c0658806c59bc2815b9866/main/train-*.parquet',
    HUB + 'google/boolq/data/train-*.parquet',
    HUB + 'allenai/ai2_arc@210d026faf9955653af8916fad021475a3f00453/ARC-Easy/train-*.parquet',
    HUB + 'allenai/ai2_arc@210d026faf9955653af8916fad021475a3f00453/ARC-Challenge/train-*.parquet',
], columns=[], documents=218e3, tokens=10e6, licence='that of each')


def text_of(record):
    """Question and answer as the evaluation harness writes them; the columns tell which set a record is from."""
    if 'goal' in record:                                        # PIQA
        return f"Question: {record['goal']}\nAnswer: {record[('sol1', 'sol2')[record['label']]]}"
    if 'passage' in record:                                     # BoolQ
        return f"{record['passage']}\nQuestion: {record['question']}?\nAnswer: {'yes' if record['answer'] else 'no'}"
    if 'choices' in record:                                     # ARC, OpenBookQA
        choices = dict(zip(record['choices']['label'], record['choices']['text']))
        return f"Question: {record.get('question') or record['question_stem']}\nAnswer: {choices[record['answerKey']]}"
    answer = record['answer']                                   # GSM8K: str, NQ-open: list, TriviaQA: dict
    answer = answer['value'] if isinstance(answer, dict) else answer if isinstance(answer, str) else answer[0]
    return f"Question: {record['question']}\nAnswer: {answer}"


if __name__ == '__main__':
    prepare(DATASET, text_of, configure(globals(), shared=knobs))
