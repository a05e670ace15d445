"""Matrix products in fp8 (8-bit floating point), for wide models on GPUs that have them.

Micikevicius et al. 2022 (arXiv:2209.05433): activations and weights are e4m3 (4 bits of exponent,
3 of mantissa), gradients e5m2. Every matrix has one scale, which maps its largest element to the
largest number of the format and is computed anew for every product (tensorwise dynamic scaling).
Master weights, their gradients and all sums stay in fp32, results are in bf16.

`convert` changes the linear layers of attention and feed-forward networks. Embeddings, the output
layer, routers and experts stay as they are. Names of parameters, checkpoints and hooks stay, too.

Logits in fp8 would raise the loss of SmolLM2-135M by 0.056 (standard error 0.010), more than all of
its blocks (0.037, 0.008), by tests/fp8_study.py. The output layer's two other products would bear
it (their errors are 5 and 4 %), but two more passes over the logits would cost most of the gain.

Letters in shape comments: N tokens, I and O inputs and outputs of a linear layer.
"""
import torch
import torch.nn as nn

from configurator import BadInput
from ops.moe import MixtureOfExperts

FORWARD = torch.float8_e4m3fn       # largest number 448
BACKWARD = torch.float8_e5m2        # largest number 57344; 3e-10 of it is not zero yet
LEAST_WIDTH = 1536


def check_device(device):
    """Raises BadInput if `device` has no products in fp8."""
    reason = None
    if not hasattr(torch, '_scaled_mm'):
        reason = 'a torch with products in fp8 (2.5 or later)'
    elif device.type != 'cuda' or torch.version.hip is not None:
        reason = f"an NVIDIA GPU, and this run is on '{device.type}'"
    elif torch.cuda.get_device_capability(device) < (8, 9):
        capability = '.'.join(str(n) for n in torch.cuda.get_device_capability(device))
        reason = (
            'a GPU of compute capability 8.9 (RTX 4090, L4) or later (H100: 9.0), and '
            f'{torch.cuda.get_device_name(device)} has {capability}')
    if reason:
        raise BadInput(f'fp8 = True needs {reason}. Leave it out.')


def check(config, device):
    """Raises BadInput if fp8 cannot run with train.py's knobs `config`, or would be no gain.

    Published runs with one scale per matrix lost speed at a width of 768 and gained 17 % at 1664
    (nanochat, dev/LOG.md).
    """
    check_device(device)
    if config['dtype'] == 'float32':
        raise BadInput("fp8 = True gives results in bfloat16. Use dtype=bfloat16 or auto.")
    if config['tp'] > 1:
        raise BadInput(f"fp8 = True does not work with tp = {config['tp']}. Use tp=1.")
    if config['n_embd'] < LEAST_WIDTH:
        raise BadInput(
            f"fp8 = True would be slower than bfloat16 at n_embd = {config['n_embd']}: below "
            f'{LEAST_WIDTH}, scaling costs more than the products gain. Leave it out.')
    head_dim = config['head_dim'] or config['n_embd'] // config['n_head']
    widths = {
        'n_embd': config['n_embd'], 'ffn_dim': config['ffn_dim'],
        'n_head * head_dim': config['n_head'] * head_dim,
        'n_kv_head * head_dim': config['n_kv_head'] * head_dim}
    for name, width in widths.items():
        if width % 16:
            raise BadInput(f'fp8 = True needs multiples of 16, and {name} = {width}.')


def convert(model, device):
    """Makes the linear layers of a GPT's blocks multiply in fp8, in place. Returns their number.

    Call it before torch.compile, activation checkpointing and FSDP. Raises BadInput if `device`
    has no fp8.
    """
    check_device(device)
    return convert_layers(model)


def convert_layers(model):
    """As `convert`, on any device: torch's CPU build has slow products in fp8."""
    n_converted = 0
    for block in model.blocks:
        parts = [block.attn]
        if not isinstance(block.ffn, MixtureOfExperts):
            parts.append(block.ffn)
        for part in parts:
            for layer in part.children():
                if type(layer) is nn.Linear:
                    # The module stays, with its parameters and hooks. Only its forward changes.
                    layer.__class__ = Fp8Linear
                    n_converted += 1
    return n_converted


def find_scale(x, dtype):
    """The number by which x is divided before it becomes dtype: () fp32.

    A NaN or infinity in x makes it NaN or infinite, and with it all of a product.
    """
    largest = x.abs().amax().float()
    # Zeros need a scale, too. The gradients of a mean over a million tokens are far above 1e-30.
    return largest.clamp(min=1e-30) / torch.finfo(dtype).max


def scaled(x, scale, dtype):
    """x / scale in an fp8 dtype, contiguous."""
    return (x.float() / scale).to(dtype).contiguous()


def by_columns(x):
    """The same matrix, column after column in memory: what the second operand has to be."""
    return x.T.contiguous().T


class Fp8Product(torch.autograd.Function):
    """x @ weight.T and both gradients, with operands in fp8."""

    @staticmethod
    def forward(ctx, x, weight):
        """x (N, I) bf16, weight (O, I) fp32 or bf16 -> (N, O) bf16.

        I, O and, for the weight's gradient, N are multiples of 16.
        """
        x_scale = find_scale(x, FORWARD)
        weight_scale = find_scale(weight, FORWARD)
        x8 = scaled(x, x_scale, FORWARD)
        # The weight itself is kept for the backward, because FSDP frees and gathers it. A copy in
        # fp8 would stay in memory.
        ctx.save_for_backward(x8, x_scale, weight, weight_scale)
        weight8 = scaled(weight, weight_scale, FORWARD)
        # Fast sums have fewer bits. Gradients, which are sums over more terms, need them.
        return torch._scaled_mm(
            x8, weight8.T, x_scale, weight_scale, out_dtype=torch.bfloat16, use_fast_accum=True)

    @staticmethod
    def backward(ctx, g):
        """g (N, O) bf16. Returns the gradients by x in bf16 and by the weight in its dtype."""
        x8, x_scale, weight, weight_scale = ctx.saved_tensors
        g_scale = find_scale(g, BACKWARD)
        g8 = scaled(g, g_scale, BACKWARD)
        dx = None
        dweight = None
        if ctx.needs_input_grad[0]:
            weight8 = scaled(weight, weight_scale, FORWARD)
            dx = torch._scaled_mm(
                g8, by_columns(weight8), g_scale, weight_scale, out_dtype=torch.bfloat16)
        if ctx.needs_input_grad[1]:
            dweight = torch._scaled_mm(
                g8.T.contiguous(), by_columns(x8), g_scale, x_scale, out_dtype=weight.dtype)
        return dx, dweight


class Fp8Linear(nn.Linear):
    """A linear layer that multiplies in fp8. Its result is bf16."""

    def forward(self, x):
        """x (..., I) -> (..., O) bf16. in_features and out_features are multiples of 16."""
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16)
        N = len(rows)
        # The weight's gradient is a sum over the tokens, in steps of 16.
        missing = -N % 16 if torch.is_grad_enabled() else 0
        if missing:
            rows = nn.functional.pad(rows, (0, 0, 0, missing))
        y = Fp8Product.apply(rows, self.weight)
        if missing:
            y = y[:N]
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)
