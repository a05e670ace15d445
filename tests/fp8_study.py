"""What products in fp8 cost in loss, on a CPU, which multiplies fp8 exactly but slowly.

    python prepare/demo.py --out=data/demo
    python tests/fp8_study.py --data=data/demo                      # minutes per seed
    python tests/fp8_study.py --model=HuggingFaceTB/SmolLM2-135M    # half a minute

1. --data: it trains a small model on the demo's sources in bf16, in bf16 from initial weights that
   are changed by a thousandth, and with the blocks' linear layers in fp8. The second shows how far
   apart equal runs end.
2. --model: it compares losses of a trained model on text, with blocks and logits in fp8, and the
   gradients of its output layer. The text is that of this project, code and prose.
"""
import os
import statistics

import numpy as np
import torch

if __name__ == '__main__':
    import _path  # noqa: F401

from configurator import BadInput, configure
from data import Source, batch_of
from lib.hf import open_model
from model import GPT, ModelConfig, init_weights
from ops import fp8
from tests.studies import ROOT, print_header, print_row

# -- knobs --
data = ''                           # folder of prepared sources: train on them
model = ''                          # trained model: measure it
steps = 400
seeds = [1, 2, 3]

SOURCES = ('code', 'docs', 'math')
ROWS, T = 8, 64
# Ids modulo this number keep the output layer small: most of the time goes to the blocks.
V = 512


def sources_of(split, seed):
    return [Source(data, name, split, T, seed) for name in SOURCES]


def read_batch(sources, step):
    """Batch number `step`: as many rows of every source as there is room for."""
    per_source = -(-ROWS // len(sources))
    rows = []
    for source in sources:
        rows.append(source.rows(np.arange(step * per_source, (step + 1) * per_source)))
    inputs, targets, _ = batch_of(torch.from_numpy(np.concatenate(rows)) % V)
    return inputs, targets


def loss_of(net, batch):
    with torch.autocast('cpu', torch.bfloat16):
        return net.loss(*batch)[0] / batch[1].numel()


def train(arm, seed):
    """Validation loss of a model that is trained in one of the three ways."""
    net = GPT(ModelConfig(
        vocab_size=V, n_layer=2, n_head=4, n_kv_head=2, n_embd=128, ffn_dim=352, rope_theta=1e4))
    init_weights(net, seed)
    if arm == 'bf16, changed':
        generator = torch.Generator().manual_seed(seed)
        for p in net.parameters():
            p.data.mul_(1 + 1e-3 * torch.randn(p.shape, generator=generator))
    if arm == 'fp8':
        fp8.convert_layers(net)
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    sources = sources_of('train', seed)
    for step in range(steps):
        optimizer.param_groups[0]['lr'] = 4e-3 * min(1, (step + 1) / 30) * (1 - 0.9 * step / steps)
        loss_of(net, read_batch(sources, step)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    validation = sources_of('val', 0)
    with torch.no_grad():
        return statistics.fmean(loss_of(net, read_batch(validation, i)).item() for i in range(32))


def print_training():
    print_header('seed', 'bf16', 'bf16, changed', 'fp8', 'changed - bf16', 'fp8 - bf16')
    for seed in seeds:
        bf16, changed, low = (train(arm, seed) for arm in ('bf16', 'bf16, changed', 'fp8'))
        differences = [f'{changed - bf16:+.3f}', f'{low - bf16:+.3f}']
        print_row(seed, *(f'{loss:.3f}' for loss in (bf16, changed, low)), *differences)


def rounded(x, dtype):
    """x as fp8 holds it, in fp32."""
    scale = fp8.find_scale(x, dtype)
    return fp8.scaled(x, scale, dtype).float() * scale


@torch.no_grad()
def print_model():
    net, tokenizer, _ = open_model(model, torch.device('cpu'), torch.float32)
    rows = []
    for name in ('README.md', 'docs/BENCHMARKS.md', 'LICENSE', 'train.py', 'model.py', 'kd.py'):
        with open(os.path.join(ROOT, name), encoding='utf-8') as f:
            rows.append(tokenizer.encode(f.read())[:257])
    inputs, targets, _ = batch_of(torch.tensor(rows, dtype=torch.int32))
    targets = targets.flatten()
    weight = net.output_weight
    low_weight = rounded(weight, fp8.FORWARD)

    def hidden():
        with torch.autocast('cpu', torch.bfloat16):
            return net(inputs).flatten(0, 1).bfloat16()                           # (N, C)

    def losses(h, weight):
        z = (h.float() @ weight.T).bfloat16().float()
        return torch.nn.functional.cross_entropy(z, targets, reduction='none')

    h = hidden()
    base = losses(h, weight.bfloat16().float())
    z = h.float() @ weight.T
    dz = z.softmax(1)
    dz[torch.arange(len(dz)), targets] -= 1
    low_h = rounded(h, fp8.FORWARD)
    found = {'logits in fp8': losses(low_h, low_weight)}
    fp8.convert_layers(net)
    h_of_fp8 = hidden()
    found['blocks in fp8'] = losses(h_of_fp8, weight.bfloat16().float())
    found['blocks and logits in fp8'] = losses(rounded(h_of_fp8, fp8.FORWARD), low_weight)
    print(f'{len(base):,} tokens, loss in bf16 {base.mean():.4f}')
    print_header('', 'change of the loss', 'standard error')
    for name, of_tokens in found.items():
        change = of_tokens - base
        print_row(name, f'{change.mean():+.4f}', f'{change.std() / len(change)**0.5:.4f}')
    print_header('gradient of the logits in', 'error of dh', 'error of dW', 'tail kept')
    tail = (dz > 0) & (dz < 1e-4)
    for dtype in (fp8.BACKWARD, fp8.FORWARD):
        low = rounded(dz, dtype)
        errors = []
        for got, truth in ((low @ low_weight, dz @ weight), (low.T @ low_h, dz.T @ h.float())):
            errors.append(f'{(got - truth).norm() / truth.norm():.3f}')
        print_row(dtype, *errors, f'{low[tail].sum() / dz[tail].sum():.3f}')


if __name__ == '__main__':
    configure(globals())
    torch.set_num_threads(1)
    if not (data or model):
        raise BadInput('nothing to do. Give --data, --model or both.')
    if data:
        print_training()
    if model:
        print_model()
