"""The device of a run, its dtype, and how its ranks meet and part."""
import contextlib
import ctypes
import datetime
import os
import platform
import re
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

from configurator import BadInput, RunFault, one_of, report_error
from ops.attention import use as use_attention
from ops.kernels import use as use_kernels

GIB = 2**30


@dataclass
class Gpu:
    """A kind of GPU, by the maker's data sheet."""
    flops: float                    # peak of dense bf16 products without sparsity, FLOP/s
    memory: float | None = None     # bytes
    near: float = 25e9              # bytes/s to a GPU of the same node, one way
    far: float = 12e9               # bytes/s to a GPU of another node


# The name up to a '-' is matched with the device's name, and the first match counts. tools/plan.py
# plans for those with a memory: they have NVLink, and a network card of 200 or 400 Gbit/s per GPU.
GPUS = {
    'H200': Gpu(989e12, 141 * GIB, 450e9, 50e9),
    'H100 PCIe': Gpu(756e12),
    'H100': Gpu(989e12, 80 * GIB, 450e9, 50e9),
    'GH200': Gpu(989e12, None, 450e9, 50e9),
    'B200': Gpu(2250e12, 180 * GIB, 900e9, 50e9),
    'A100-40GB': Gpu(312e12, 40 * GIB, 300e9, 25e9),
    'A100-80GB': Gpu(312e12, 80 * GIB, 300e9, 25e9),
    'L40S': Gpu(362e12),
    'L4': Gpu(121e12),
    'A10G': Gpu(125e12),
    'A6000': Gpu(155e12),
    'RTX 4090': Gpu(165e12),
    'RTX 3090': Gpu(71e12),
    'V100': Gpu(125e12),
    'T4': Gpu(65e12)}


NEEDS_FP64 = "needs sums in fp64, which Apple's GPUs do not have"
ONE_PROCESS = "Apple's GPUs work in one process only"


@dataclass
class DeviceConfig:
    """Knobs of the device."""
    device: one_of('auto', 'cpu', 'cuda', 'mps') = 'auto'       # mps: Apple's GPU. auto: a GPU when
                                # there is one
    dtype: one_of('auto', 'float32', 'bfloat16') = 'auto'       # of matrix products; weights are
                                # fp32. auto: bfloat16 where the hardware gains by it
    kernels: one_of('auto', 'triton', 'torch') = 'auto'         # torch: the reference functions.
                                # auto: Triton on CUDA, except in layers inside torch.compile
    attention: one_of('auto', 'cudnn', 'flash', 'fa3', 'fa4') = 'auto'      # kernels on CUDA. fa3
                                # and fa4 are the packages flash-attn-3 and flash-attn-4. auto:
                                # cuDNN on Hopper and Blackwell, else flash 2
    fp8: bool = False               # linear layers of attention and feed-forward networks multiply
                                # in fp8, with one scale per matrix: for models of a width of at
                                # least 1536 with compiled blocks, on GPUs like the H100


@dataclass
class Run:
    """Where this process runs: its rank, its device, and the dtype of its products."""
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    description: str = ''           # dtype with its reason and kernels, for the first lines
    layout: object = None           # ranks.Layout, None for a single process
    data_rank: int = 0              # rank among the ranks that have rows of their own
    n_data: int = 1                 # number of these ranks
    compile_blocks: bool = False

    def __post_init__(self):
        self.is_master = self.rank == 0
        # the context of forward passes
        self.autocast = contextlib.nullcontext()
        if self.dtype != torch.float32:
            self.autocast = torch.autocast(self.device.type, self.dtype)

    def join(self, layout):
        """Takes this process's place in a ranks.Layout (None: a single process)."""
        self.layout = layout
        if layout is not None:
            self.data_rank = layout.data_rank
            self.n_data = layout.n_data


def start(config):
    """Joins the ranks and picks device, dtype and kernels by the knobs in `config`: Run.

    config: the knobs of DeviceConfig and of ModelConfig
    """
    keeps_memory = tune_malloc()
    unfit = unfit_for_mps(config)
    rank, world_size, device = start_ranks(config['device'], unfit=unfit)
    dtype, reason = pick_dtype(config['dtype'], device)
    description = f'{dtype} ({reason}), kernels: {use_kernels(config["kernels"], device)}'
    head_dim = config['head_dim'] or config['n_embd'] // config['n_head']
    attention = use_attention(config['attention'], device, dtype, head_dim)
    if device.type == 'cuda':
        description += f', attention: {attention}'
    if device.type == 'cpu' and config['device'] == 'auto' and torch.backends.mps.is_available():
        description += f", not Apple's GPU ({unfit or ONE_PROCESS})"
    if keeps_memory and device.type == 'cpu':
        description += ', malloc keeps freed memory'
    return Run(rank, world_size, device, dtype, description)


# -- ranks -----------------------------------------------------------------------------------------


def is_restarted():
    """Whether a launcher (torchrun or SLURM) has restarted this run after a failure."""
    names = ('TORCHELASTIC_RESTART_COUNT', 'SLURM_RESTART_COUNT')
    return any(os.environ.get(name, '0') not in ('', '0') for name in names)


def meeting_point(hosts=False):
    """The store where ranks meet. hosts: this rank creates it, unless the launcher has.

    torchrun keeps one store over restarts, and a rank that finds the address of a dead rank there
    does not start. So the keys of every attempt have a prefix of their own.
    """
    is_hosted = os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'
    store = dist.TCPStore(
        os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']),
        is_master=hosts and not is_hosted, wait_for_workers=False, multi_tenant=True)
    attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)
    return dist.PrefixStore(f'attempt_{attempt}', store)


def environment_number(name, default=0):
    """The number in an environment variable of a launcher; default where it is not set or empty.

    Raises BadInput for anything but a whole number that can be a count of ranks, or a port.
    """
    value = os.environ.get(name) or str(default)
    most = 65535 if name == 'MASTER_PORT' else 10**7
    if not value.isdecimal() or int(value) > most:
        raise BadInput(
            f"the environment variable {name} = '{value}' must be a number from 0 to {most}.")
    return int(value)


def launched_ranks(join):
    """(rank, world size) of a process that a launcher has started, by its environment."""
    needed = ['RANK', 'WORLD_SIZE']
    if join:
        needed += ['MASTER_ADDR', 'MASTER_PORT']
    missing = [name for name in needed if not os.environ.get(name)]
    if missing:
        raise BadInput(
            f'the environment sets RANK but not {", ".join(missing)}. Start the ranks with '
            'torchrun, or unset RANK for a single process.')
    numbers = {}
    for name in needed:
        if name != 'MASTER_ADDR':
            numbers[name] = environment_number(name)
    if not numbers['RANK'] < numbers['WORLD_SIZE']:
        raise BadInput(
            f"RANK = {numbers['RANK']} must be below WORLD_SIZE = {numbers['WORLD_SIZE']}.")
    return numbers['RANK'], numbers['WORLD_SIZE']


def unfit_for_mps(config):
    """What in train.py's knobs keeps a run from Apple's GPUs, as text, or None."""
    needs = dict(
        mixture=config['mixture'] in ('influence', 'doge', 'doremi'),
        presence=config['presence'] != 'off', select=config['select'] == 'online',
        teacher=config['teacher'] is not None, kd_cache=config['kd_cache'] is not None,
        n_expert=config['n_expert'] > 0)
    for name, needed in needs.items():
        if needed:
            return f'{name} = {config[name]!r} {NEEDS_FP64}'
    return None


def pick_kind(device, unfit):
    """'cpu', 'cuda' or 'mps'. The arguments are those of `start_ranks`."""
    if device == 'cuda' and not torch.cuda.is_available():
        raise BadInput("device = 'cuda', but torch finds no CUDA device. Use device=cpu or auto.")
    if device == 'cpu':
        return 'cpu'
    if torch.cuda.is_available() and device != 'mps':
        return 'cuda'
    if 'RANK' in os.environ:
        unfit = unfit or ONE_PROCESS
    if device == 'mps' and not torch.backends.mps.is_available():
        raise BadInput("device = 'mps', but torch finds no Apple GPU. Use device=cpu or auto.")
    if device == 'mps' and unfit:
        raise BadInput(f"device = 'mps', but {unfit}. Use device=cpu.")
    return 'cpu' if unfit or not torch.backends.mps.is_available() else 'mps'


def start_ranks(device, join=True, unfit=f'this command {NEEDS_FP64}'):
    """Joins torchrun's process group, if there is one. Returns (rank, world_size, torch.device).

    device  'auto' (a GPU when there is one), 'cpu', 'cuda' or 'mps'
    join    False: only reads rank and world size. A plain `python` has no process group in any case
    unfit   why Apple's GPUs cannot be used: 'mps' is an error then, and 'auto' passes them over.
            None: they can
    """
    kind = pick_kind(device, unfit)
    if 'RANK' not in os.environ:
        return 0, 1, torch.device(kind)
    rank, world_size = launched_ranks(join)
    here = torch.device('cpu')
    if kind == 'cuda':
        n_devices = torch.cuda.device_count()
        local_rank = environment_number('LOCAL_RANK', rank % n_devices)
        if local_rank >= n_devices:
            raise BadInput(
                f'LOCAL_RANK = {local_rank}, and this machine shows {n_devices} GPU(s). Start one '
                'rank per GPU (--nproc_per_node), or look at CUDA_VISIBLE_DEVICES.')
        here = torch.device('cuda', local_rank)
        torch.cuda.set_device(here)
    if join:
        # lib/watch.py ends a run that hangs. A short timeout here would end one whose rank 0
        # prepares data for hours while the others wait.
        dist.init_process_group(
            'cpu:gloo,cuda:nccl' if kind == 'cuda' else 'gloo', rank=rank, world_size=world_size,
            store=meeting_point(hosts=rank == 0), timeout=datetime.timedelta(days=1))
        # init_process_group wraps the hook in one that would hide our messages.
        sys.excepthook = report_error
    return rank, world_size, here


def leave_ranks(code):
    """Ends the process with an exit code.

    With several ranks it skips Python's teardown: one run in ten aborts there, when a thread of
    gloo frees a tensor.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def on_master(work):
    """Calls work() on rank 0. All ranks return its result, or raise the user's error in it."""
    found = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            found = work()
        except (BadInput, RunFault, OSError) as error:
            found = error
    if dist.is_initialized():
        # An error is sent, too. If rank 0 raised it here, the others would wait for it.
        box = [found]
        dist.broadcast_object_list(box, 0)
        found = box[0]
    try:
        if isinstance(found, Exception):
            raise found
        return found
    finally:
        del found           # an error and the frame that it refers to would keep each other


def barrier():
    """Waits for all ranks."""
    if dist.is_initialized():
        dist.barrier()


# -- hardware --------------------------------------------------------------------------------------


def cpu_flags():
    """The processor's feature flags (Linux on x86), elsewhere an empty set."""
    try:
        with open('/proc/cpuinfo', encoding='ascii', errors='replace') as f:
            return next((set(line.split()) for line in f if line.startswith('flags')), set())
    except OSError:
        return set()


def pick_dtype(dtype, device):
    """Returns (torch dtype, reason as text). 'auto' takes bf16 where the hardware gains by it."""
    named = {'float32': torch.float32, 'bfloat16': torch.bfloat16}
    if dtype == 'bfloat16' and device.type == 'mps':
        if not torch.backends.mps.is_macos_or_newer(14, 0):
            raise BadInput("dtype = 'bfloat16' on Apple's GPUs needs macOS 14. Use float32.")
    if dtype in named:
        return named[dtype], 'as asked'
    if dtype != 'auto':
        raise BadInput(f"dtype = '{dtype}' must be auto, float32 or bfloat16.")
    if device.type == 'cuda':
        if torch.cuda.get_device_capability(device)[0] >= 8:
            return torch.bfloat16, 'tensor cores'
        return torch.float32, 'this GPU has no bf16 tensor cores'
    if device.type == 'mps':
        return torch.float32, "bfloat16 has not been measured on Apple's GPUs"
    for flag in ('amx_bf16', 'avx512_bf16'):
        if flag in cpu_flags():
            return torch.bfloat16, f'this CPU has {flag}'
    return torch.float32, 'this CPU has no bf16 instructions'


def sum_dtype(device):
    """The dtype of sums over many tokens: fp64, or fp32 on Apple's GPUs, which have no fp64."""
    return torch.float32 if device.type == 'mps' else torch.float64


def find_gpu(device):
    """The entry of GPUS for a CUDA device, or None."""
    name = torch.cuda.get_device_name(device)
    for kind, gpu in GPUS.items():
        if re.search(rf'\b{kind.split("-")[0]}\b', name):
            return gpu
    return None


def peak_flops(device):
    """Dense bf16 peak of the device in FLOP/s, None when it is not in the table."""
    gpu = find_gpu(device) if device.type == 'cuda' else None
    return None if gpu is None else gpu.flops


def device_name(device):
    """The name of the GPU or of the processor."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    if device.type == 'mps':
        return 'Apple GPU'
    return f'{platform.processor() or platform.machine()} CPU'


def memory_of(device):
    """Bytes of memory of the GPU, or of this machine with its swap, within the container's limit.

    None where the system does not say it.
    """
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == 'mps':
        return torch.mps.recommended_max_memory()
    found = []
    try:
        with open('/proc/meminfo', encoding='ascii') as f:
            kib = {line.split(':')[0]: int(line.split()[1]) for line in f}
        found.append((kib['MemTotal'] + kib.get('SwapTotal', 0)) * 1024)
        with open('/sys/fs/cgroup/memory.max', encoding='ascii') as f:
            found.append(int(f.read()))
    except (OSError, ValueError, KeyError):     # another system, or no limit ('max')
        pass
    return min(found, default=None)


def check_memory(needed, device, what):
    """Raises BadInput if `needed` bytes cannot fit into the memory of the device at all.

    what: what needs them, as the beginning of the sentence
    """
    there = memory_of(device)
    if there is not None and needed > there:
        raise BadInput(
            f'{what} needs {needed / GIB:,.1f} GiB, and {device_name(device)} has '
            f'{there / GIB:,.1f} GiB. Take a smaller model, bfloat16, more ranks or a larger '
            'machine. `train.py ... --dry_run=True` shows where the memory goes.')


def tune_malloc():
    """Makes glibc keep large buffers that are freed. Returns False where there is no glibc.

    Without it, page faults took 15 to 20 % of a step of a 4M-parameter model on two Zen 5 cores:
    3468 against 4045 tokens/s in fp32, 4911 against 6078 in bf16.
    """
    if platform.libc_ver()[0] != 'glibc':
        return False
    libc = ctypes.CDLL('libc.so.6')
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    settings = ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 2**26))
    return all([libc.mallopt(parameter, value) for parameter, value in settings])
