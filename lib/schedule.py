"""How long a run is, how many micro-steps a step has, and the learning rate at every step."""
import math

from configurator import BadInput


def count_micro_steps(batch_tokens, batch_size, block_size, n_data):
    """Micro-steps of a step (grad_accum): batch_tokens over those that n_data ranks take at once, batch_size rows of block_size each."""
    micro_tokens = batch_size * block_size * n_data
    if batch_tokens % micro_tokens:
        raise BadInput(f'total_batch_tokens = {batch_tokens:,} is not a multiple of batch_size * block_size * (ranks / tp) = {batch_size} * {block_size} * '
                       f'{n_data} = {micro_tokens:,}. Try {max(1, round(batch_tokens / micro_tokens)) * micro_tokens}.')
    return batch_tokens // micro_tokens


def count_steps(config, n_rows):
    """Optimizer steps of the run, the fewest that a knob of train.py asks for. n_rows: of all sources, None: not known (and epochs do not count).

    BadInput when there is none.
    """
    max_steps, max_tokens, epochs, batch = (config[name] for name in ('max_steps', 'max_tokens', 'epochs', 'total_batch_tokens'))
    asked = (max_steps, max_tokens and -(-max_tokens // batch), epochs and n_rows and math.ceil(epochs * n_rows / (batch // config['block_size'])))
    n_steps = min((n for n in asked if n is not None), default=None)
    if n_steps is not None and n_steps < 1:
        raise BadInput(f'max_steps = {max_steps}, max_tokens = {max_tokens}, epochs = {epochs} give {n_steps} steps; at least 1 is needed.')
    return n_steps


def learning_rate_at(step, config, n_steps, n_warmup):
    """Linear warm-up from 0, then the schedule of train.py's knobs down to min_lr_frac * learning_rate at n_steps."""
    peak, kind, low = config['learning_rate'], config['schedule'], config['min_lr_frac']
    if step < n_warmup:
        return peak * (step + 1) / n_warmup
    done = (step - n_warmup) / max(1, n_steps - n_warmup)
    if kind == 'linear':
        share = 1 - done
    elif kind == 'cosine':
        share = 0.5 * (1 + math.cos(math.pi * done))
    elif kind == 'wsd':
        share = min(1.0, (1 - done) / config['decay_frac'])
    else:
        return peak
    return peak * (low + (1 - low) * share)
