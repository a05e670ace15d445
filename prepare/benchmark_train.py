"""The training sets of eight benchmarks as questions and answers -> data/benchmark_train/.

    python prepare/benchmark_train.py --tokenizer=tokenizer.json

TriviaQA, OpenBookQA, NQ-open, PIQA, GSM8K, BoolQ, ARC-Easy and ARC-Challenge: about 218,000
documents, 10 million tokens. A model that was trained on them is no longer a zero-shot model on
their test sets. Each set keeps its own licence.
https://huggingface.co/datasets/allenai/ai2_arc and the others named below
"""
import _path  # noqa: F401  (import path)

from configurator import configure
from prepare.common import Dataset, PrepareConfig, prepare

HUB = 'hf://datasets'
TRIVIA_QA = f'{HUB}/mandarjoshi/trivia_qa@0f7faf33a3908546c6fd5b73a660e0f8ff173c2f'
OPENBOOKQA = f'{HUB}/allenai/openbookqa@388097ea7776314e93a529163e0fea805b8a6454'
NQ_OPEN = f'{HUB}/google-research-datasets/nq_open@5dd9790a83002ad084ddeb7c420dc716852c6f28'
PIQA = f'{HUB}/baber/piqa@142f6d7367fd9877f0fb3b5734ea6a545f54cdd1'
GSM8K = f'{HUB}/openai/gsm8k@740312add88f781978c0658806c59bc2815b9866'
ARC = f'{HUB}/allenai/ai2_arc@210d026faf9955653af8916fad021475a3f00453'
FILES = [
    f'{TRIVIA_QA}/unfiltered.nocontext/train-*.parquet',
    f'{OPENBOOKQA}/main/train-*.parquet',
    f'{NQ_OPEN}/nq_open/train-*.parquet',
    f'{PIQA}/**/train*.parquet',
    f'{GSM8K}/main/train-*.parquet',
    f'{HUB}/google/boolq/data/train-*.parquet',
    f'{ARC}/ARC-Easy/train-*.parquet',
    f'{ARC}/ARC-Challenge/train-*.parquet']


def text_of(record):
    """Question and answer as in the evaluation harness. The columns tell the sets apart."""
    if 'goal' in record:                            # PIQA
        question = record['goal']
        answer = record['sol2' if record['label'] else 'sol1']
    elif 'choices' in record:                       # ARC and OpenBookQA
        question = record.get('question') or record['question_stem']
        choices = record['choices']
        answer = choices['text'][choices['label'].index(record['answerKey'])]
    else:
        question = record['question']
        answer = record['answer']                   # a str in GSM8K
    if 'passage' in record:                         # BoolQ
        return f"{record['passage']}\nQuestion: {question}?\nAnswer: {'yes' if answer else 'no'}"
    if isinstance(answer, dict):                    # TriviaQA
        answer = answer['value']
    elif isinstance(answer, list):                  # NQ-open
        answer = answer[0]
    return f'Question: {question}\nAnswer: {answer}'


CARD = dict(documents=218e3, tokens=10e6, licence='that of each')
DATASET = Dataset('benchmark_train', FILES, (), text_of, **CARD)

if __name__ == '__main__':
    prepare(DATASET, configure(globals(), owners=(PrepareConfig,)))
