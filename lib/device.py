"""What several scripts share: the device and its dtype, ranks, peak FLOPs, memory settings, reading the metrics."""
import ctypes
import datetime
import json
import os
import platform
import re
import sys

import torch
import torch.distributed as dist

from configurator import BadInput, report_error
from lib.watch import meeting_point

# dense bf16 peaks without sparsity, FLOP/s, from the makers' data sheets; matched against the device's name, first hit wins
PEAK_FLOPS = {'H200': 989e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'GH200': 989e12, 'B200': 2250e12, 'A100': 312e12,
              'L40S': 362e12, 'L4': 121e12, 'A10G': 125e12, 'A6000': 155e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12,
              'V100': 125e12, 'T4': 65e12}


rows_group = None       # the ranks that have rows of their own, where others beside them have the same (tensor parallelism); None: all


def start_ranks(device, join=True):
    """Joins torchrun's process group, if there is one (not with join=False). Returns (rank, world_size, torch.device).

    device: 'auto' (CUDA when there is one), 'cpu' or 'cuda'. A plain `python` has no process group at all.
    """
    if device not in ('auto', 'cpu', 'cuda'):
        raise BadInput(f"device = '{device}' must be auto, cpu or cuda.")
    if device == 'cuda' and not torch.cuda.is_available():
        raise BadInput("device = 'cuda', but torch finds no CUDA device here. Use device=cpu or auto.")
    kind = 'cuda' if device != 'cpu' and torch.cuda.is_available() else 'cpu'
    if 'RANK' not in os.environ:
        return 0, 1, torch.device(kind)
    here = torch.device('cpu') if kind == 'cpu' else torch.device('cuda', int(os.environ.get('LOCAL_RANK') or int(os.environ['RANK']) % torch.cuda.device_count()))
    if kind == 'cuda':
        torch.cuda.set_device(here)
    if join:        # lib/watch.py ends what hangs; rank 0 may prepare data for hours while the others wait
        dist.init_process_group('cpu:gloo,cuda:nccl' if kind == 'cuda' else 'gloo', timeout=datetime.timedelta(days=1), rank=int(os.environ['RANK']),
                                world_size=int(os.environ['WORLD_SIZE']), store=meeting_point(hosts=os.environ['RANK'] == '0'))
        sys.excepthook = report_error       # init_process_group wraps the hook in one that would swallow our message
    return int(os.environ['RANK']), int(os.environ['WORLD_SIZE']), here


def leave_ranks(code):
    """Ends the process. A rank skips Python's teardown: it aborts (one run in ten) when a thread of gloo lets go of a tensor then."""
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def all_reduce_sum(values, everywhere=False):
    """Sums a list of numbers over the ranks that have rows of their own (everywhere: over all): list of float (fp64 inside).

    By the hosts: numbers that are on a GPU are waited for.
    """
    if not dist.is_initialized():
        return [float(v) for v in values]
    total = torch.tensor([float(v) for v in values], dtype=torch.float64)
    dist.all_reduce(total, group=None if everywhere else rows_group)
    return total.tolist()


def barrier():
    if dist.is_initialized():
        dist.barrier()


def cpu_flags():
    """The processor's feature flags (Linux on x86), else an empty set."""
    try:
        with open('/proc/cpuinfo', encoding='ascii', errors='replace') as f:
            return next((set(line.split()) for line in f if line.startswith('flags')), set())
    except OSError:
        return set()


def pick_dtype(dtype, device):
    """Returns (torch dtype for autocast or fp32, the reason as text). 'auto' takes bf16 where the hardware gains by it."""
    named = {'float32': torch.float32, 'bfloat16': torch.bfloat16}
    if dtype in named:
        return named[dtype], 'as asked'
    if dtype != 'auto':
        raise BadInput(f"dtype = '{dtype}' must be auto, float32 or bfloat16.")
    if device.type == 'cuda':
        capable = torch.cuda.get_device_capability(device)[0] >= 8
        return (torch.bfloat16, 'tensor cores') if capable else (torch.float32, 'this GPU has no bf16 tensor cores')
    for flag in ('amx_bf16', 'avx512_bf16'):
        if flag in cpu_flags():
            return torch.bfloat16, f'this CPU has {flag}'
    return torch.float32, 'this CPU has no bf16 instructions'


def peak_flops(device):
    """Dense bf16 peak of the device in FLOP/s, None when it is not in the table: then no MFU is shown."""
    if device.type != 'cuda':
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if re.search(rf'\b{key}\b', name)), None)


def device_name(device):
    """A GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{platform.processor() or platform.machine()} CPU'


def tune_malloc():
    """Keeps glibc from handing every large buffer back to the system: page faults were 15 to 20 % of the
    step of a 4M-parameter model on two Zen 5 cores (3468 to 4045 tokens/s in fp32, 4911 to 6078 in bf16).

    Does nothing where there is no glibc (returns False). M_MMAP_MAX = 0, M_TRIM_THRESHOLD = 2 GB, M_TOP_PAD = 64 MB.
    """
    if platform.libc_ver()[0] != 'glibc':
        return False
    libc = ctypes.CDLL('libc.so.6')
    return all([libc.mallopt(parameter, value) for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26))])


def read_metrics(out_dir):
    """The records of a run's metrics.jsonl, [] when there is none. A torn last line (a killed run) is left out."""
    path = os.path.join(out_dir, 'metrics.jsonl')
    if not os.path.isfile(path):
        return []
    with open(path, encoding='utf-8') as f:
        return [json.loads(line) for line in f.read().split('\n')[:-1]]      # what follows the last newline is '' or torn
