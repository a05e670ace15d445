"""How long a run is, and how many micro-steps a step has."""
import math

from configurator import BadInput


def count_micro_steps(config, n_data):
    """Micro-steps of a step (grad_accum). n_data: ranks that have rows of their own."""
    batch_tokens = config['total_batch_tokens']
    micro_tokens = config['batch_size'] * config['block_size'] * n_data
    if batch_tokens % micro_tokens:
        nearest = max(1, round(batch_tokens / micro_tokens)) * micro_tokens
        raise BadInput(
            f'total_batch_tokens = {batch_tokens:,} is not a multiple of batch_size * block_size * '
            f"(ranks / tp) = {config['batch_size']} * {config['block_size']} * {n_data} = "
            f'{micro_tokens:,}. Try {nearest}.')
    return batch_tokens // micro_tokens


def count_steps(config, n_rows):
    """Optimizer steps of a run: the smallest number that max_steps, max_tokens or epochs asks for.

    config  train.py's knobs
    n_rows  rows of all sources, None: unknown, and epochs are ignored
    Returns None when nothing limits the run. Raises BadInput when there is no step.
    """
    batch = config['total_batch_tokens']
    asked = [config['max_steps']]
    if config['max_tokens'] is not None:
        asked.append(-(-config['max_tokens'] // batch))
    if config['epochs'] is not None and n_rows:
        asked.append(math.ceil(config['epochs'] * n_rows / (batch // config['block_size'])))
    # epochs alone cannot be turned into steps without the data (a dry run): then nothing limits it.
    n_steps = min((n for n in asked if n is not None), default=None)
    if n_steps is not None and n_steps < 1:
        raise BadInput(
            f"max_steps = {config['max_steps']}, max_tokens = {config['max_tokens']}, epochs = "
            f"{config['epochs']} give {n_steps} steps; at least 1 is needed.")
    return n_steps
