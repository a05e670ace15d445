"""How long a run is, and its learning rate at every step."""
import math


def count_steps(config, n_rows):
    """Optimizer steps of the run, the fewest that a knob of train.py asks for. n_rows: of all sources, None: not known (and epochs do not count)."""
    max_steps, max_tokens, epochs, batch = (config[name] for name in ('max_steps', 'max_tokens', 'epochs', 'total_batch_tokens'))
    asked = (max_steps, max_tokens and -(-max_tokens // batch), epochs and n_rows and math.ceil(epochs * n_rows / (batch // config['block_size'])))
    return min((n for n in asked if n is not None), default=None)


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
