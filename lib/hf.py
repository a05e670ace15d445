"""Weights, config and tokenizer from and to Hugging Face, without `transformers`.

    python tools/hf.py import --model=HuggingFaceTB/SmolLM2-135M --out=out/smollm2
    python tools/hf.py export --ckpt=out/run --out=out/run_hf

An imported folder looks like a run: it has ckpt/step_000000 and the tokenizer's files as they were.
train.py --init_from, tools/evaluate.py and tools/sample.py accept it. They accept a hub name and a
local folder in Hugging Face's layout just as well.

Supported families: Llama (2, 3, 3.1 and later, SmolLM2), Mistral (without a sliding window), Qwen2
and 2.5, Qwen3, Qwen3-MoE, SmolLM3, MobileLLM-R1 (the text model of Llama 4 without experts) and
MobileLLM (with or without shared layers). lib/families.py contains what is special about each.
"""

import dataclasses
import glob
import os
import shutil
import tempfile
from dataclasses import asdict

import torch
import torch.distributed as dist

from configurator import BadInput, read_json
from lib import checkpoint, model_files, storage
from lib.chat import JINJA, TEMPLATES, check_template
from lib.device import check_memory
from lib.families import (
    DTYPES,
    EXPORTED,
    FAMILIES,
    config_from_hf,
    config_to_hf,
    context_of,
    family_of,
    limit_of,
    make_config,
    rope_to_hf,
    why_not,
)
from lib.model_files import read_model_files, read_object
from lib.tokenizer import load_tokenizer, save_tokenizer_json, write_json
from model import GPT, count_parameters
from ops import moe, ranks

# Files beside the weights that are copied unchanged.
COMPANIONS = (*model_files.NAMES, 'tokenizer.json', 'tokenizer.model', 'vocab.json', 'merges.txt',
              'encoder.json', 'vocab.bpe', 'LICENSE')
# safetensors' names of the dtypes that weights may have. Others belong to quantized models.
FLOATS = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}
# Fields of a config.json that an export does not keep. Others say the same, or they are untrue now:
# the code that auto_map names is not copied.
STALE = ('torch_dtype', 'transformers_version', 'original_max_position_embeddings', 'auto_map')
SHARD_BYTES = 5 * 10**9     # largest safetensors file that an export writes
SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
EMBED = 'model.embed_tokens.weight'
LM_HEAD = 'lm_head.weight'
UNUSED = 'rotary_emb.inv_freq'      # in old files. The frequencies follow from the config
# Our module -> Hugging Face's. Llama 4 calls mlp feed_forward.
NAMES = {
    'embed': 'model.embed_tokens',
    'norm': 'model.norm',
    'lm_head': 'lm_head',
    'attn_norm': 'input_layernorm',
    'attn.wq': 'self_attn.q_proj',
    'attn.wk': 'self_attn.k_proj',
    'attn.wv': 'self_attn.v_proj',
    'attn.wo': 'self_attn.o_proj',
    'attn.q_norm': 'self_attn.q_norm',
    'attn.k_norm': 'self_attn.k_norm',
    'ffn_norm': 'post_attention_layernorm',
    'ffn.w_gate': 'mlp.gate_proj',
    'ffn.w_up': 'mlp.up_proj',
    'ffn.w_down': 'mlp.down_proj',
    'ffn.router': 'mlp.gate',
}
# Matrices of an expert, and where they stand in the stacked form that transformers 5 can write:
# (name, which half of its rows; None: all).
EXPERT_NAMES = {'w_gate': 'gate_proj', 'w_up': 'up_proj', 'w_down': 'down_proj'}
STACKED = {
    'w_gate': ('mlp.experts.gate_up_proj', 0), 'w_up': ('mlp.experts.gate_up_proj', 1),
    'w_down': ('mlp.experts.down_proj', None)}
# -- tensors ---------------------------------------------------------------------------------------


def hf_names(name, config, family):
    """The names of our parameter in files of a family: a list of lists.

    The outer list has one entry, or layer_repeat entries in an export. An inner list has one name,
    or one for each expert.
    """
    if not name.startswith('blocks.'):
        module, kind = name.rsplit('.', 1)
        return [[f'{NAMES[module]}.{kind}']]
    _, layer, module = name.split('.', 2)
    if module.startswith('ffn.experts.'):
        theirs = EXPERT_NAMES[module.removeprefix('ffn.experts.')]
        names = [f'mlp.experts.{i}.{theirs}.weight' for i in range(config.n_expert)]
    else:
        module, kind = module.rsplit('.', 1)
        names = [f'{NAMES[module]}.{kind}']
    if family == 'llama4_text':
        names = [name.replace('mlp.', 'feed_forward.') for name in names]
    # A file of MobileLLM has a shared layer once, a Llama that computes the same has it twice.
    repeat = 1 if family == 'mobilellm' else config.layer_repeat
    first = int(layer) * repeat
    return [[f'model.layers.{i}.{n}' for n in names] for i in range(first, first + repeat)]


def turn_pairs(name, tensor, config, family, to_ours):
    """Reorders the rows of wq and wk of Llama 4, and returns any other tensor unchanged."""
    # Llama 4 rotates neighbouring dimensions of a head, we rotate its halves.
    if family != 'llama4_text' or not name.endswith(('wq.weight', 'wk.weight')):
        return tensor
    pairs = (config.head_dim // 2, 2) if to_ours else (2, config.head_dim // 2)
    return tensor.view(-1, *pairs, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


def read_index(folder):
    """The file's name of every tensor, by a model's index. None: there is no index."""
    path = os.path.join(folder, INDEX)
    if not os.path.isfile(path):
        return None
    found = read_json(path)
    weight_map = found.get('weight_map') if isinstance(found, dict) else None
    names = set(weight_map.values()) if isinstance(weight_map, dict) else {None}
    # A name with a path could lead to any file of this machine.
    if not names or not all(isinstance(n, str) and os.path.basename(n) == n for n in names):
        raise BadInput(
            f'{path} has no weight_map of tensors to names of files beside it. Download it again.')
    missing = sorted(name for name in names if not os.path.isfile(os.path.join(folder, name)))
    if missing:
        raise BadInput(f'{folder}: {", ".join(missing)} is missing; the index {INDEX} names it.')
    return weight_map


@dataclasses.dataclass
class Stored:
    """A tensor in a safetensors file."""
    file: str           # its name in the folder
    shape: list
    dtype: str          # safetensors' name


def find_tensors(folder):
    """Returns ({name: Stored} of a model's tensors, the names of files that are passed over).

    The model is in the files of the index, else in model.safetensors, as in transformers, else in
    all safetensors files. Raises BadInput for a damaged file, if a tensor of the model is in two
    files of the folder, and if the index is not of these files.
    """
    from safetensors import SafetensorError, safe_open

    found = {}      # name -> Stored in each file that has it
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), '*.safetensors')))
    # A link may lead nowhere, because a download was not complete.
    paths = [path for path in paths if os.path.isfile(path)]
    files = [os.path.basename(path) for path in paths]
    for path, file in zip(paths, files, strict=True):
        try:
            with safe_open(path, framework='pt') as f:
                for name in f.keys():
                    # A slice gives shape and dtype without reading the tensor.
                    part = f.get_slice(name)
                    stored = Stored(file, list(part.get_shape()), part.get_dtype())
                    found.setdefault(name, []).append(stored)
        except SafetensorError as error:
            raise BadInput(f'{path} is damaged or cut off ({error}). Download it again.') from None
    weight_map = read_index(folder)
    if weight_map is not None:
        chosen = set(weight_map.values())
    else:
        chosen = {SINGLE} if SINGLE in files else set(files)
    tensors = {}
    for name, places in found.items():
        inside = [stored for stored in places if stored.file in chosen]
        if inside and len(places) > 1:
            several = [stored.file for stored in places]
            raise BadInput(
                f'{folder}: the tensor {name} is in two files, {several[0]} and {several[1]}. Only '
                'one of them is the model: move the other one out of the folder.')
        if inside:
            tensors[name] = inside[0]
    for name, file in (weight_map or {}).items():
        there = tensors[name].file if name in tensors else 'no file'
        if there != file:
            raise BadInput(
                f'{folder}: {INDEX} says that {name} is in {file}, but {there} has it. The index '
                'is not of these files: download all of them again.')
    return tensors, [file for file in files if file not in chosen]


class TensorReader:
    """Reads tensors of a folder by name. `tensors` is from `find_tensors`."""

    def __init__(self, folder, tensors):
        self.folder = folder
        self.tensors = tensors
        self.files = {}

    def read(self, name):
        from safetensors import safe_open

        file = self.tensors[name].file
        if file not in self.files:
            self.files[file] = safe_open(os.path.join(self.folder, file), framework='pt')
        return self.files[file].get_tensor(name)


def stored_tie(folder, tensors):
    """Whether the files tie the output weight to the embedding: one of them is absent, or they are
    equal. None: the files do not have both names, or none."""
    if not {EMBED, LM_HEAD} <= tensors.keys():
        return None
    if tensors[EMBED].shape != tensors[LM_HEAD].shape:
        return False
    reader = TensorReader(folder, tensors)
    embed = reader.read(EMBED)
    lm_head = reader.read(LM_HEAD)
    dtype = torch.promote_types(embed.dtype, lm_head.dtype)
    return torch.equal(embed.to(dtype), lm_head.to(dtype))


def finite(tensor, dtype, what):
    """Returns a tensor in `dtype`. Raises BadInput if it then holds NaN or infinite values.

    what: the beginning of the sentence
    """
    cast = tensor.to(dtype)
    # Both are NaN if one value is.
    low, high = cast.aminmax()
    if not (low.isfinite() and high.isfinite()):
        if tensor.isfinite().all():
            raise BadInput(
                f'{what} reaches {tensor.abs().max().item():.3g}, which is beyond the range of '
                f'{dtype}. Set --dtype=bfloat16 or float32.')
        raise BadInput(f'{what} holds NaN or infinite values. Take weights that are intact.')
    return cast


def places_of(name, shape, config, family, tensors):
    """Where the files have our parameter: (names, shape of each, half of its rows or None)."""
    names = hf_names(name, config, family)[0]
    if '.experts.' not in name:
        return names, shape, None
    matrix = name.rsplit('.', 1)[1]
    theirs, half = STACKED[matrix]
    stacked = f'model.layers.{name.split(".")[1]}.{theirs}'
    if stacked in tensors:
        rows = shape[1] if half is None else 2 * shape[1]
        return [stacked], [shape[0], rows, shape[2]], half
    return names, shape[1:], None


@torch.no_grad()
def read_weights(folder, hf, model):
    """Copies the weights of a Hugging Face folder into `model` in place, whatever its sharding.

    Raises BadInput for missing, extra and misshapen tensors, for a damaged file and for values that
    are not finite in the dtype of the model.
    """
    family = hf['model_type']
    config = model.config
    tensors, _ = find_tensors(folder)
    if not tensors:
        raise BadInput(f'{folder}: there is no .safetensors file. Convert .bin and .pth files.')
    faults = []
    for name, stored in tensors.items():
        if stored.dtype not in FLOATS:
            faults.append(f'{name} has dtype {stored.dtype}')
    places = {}
    for name, parameter in model.named_parameters():
        shape = list(ranks.full_shape(model.layout, name, parameter))
        places[name] = places_of(name, shape, config, family, tensors)
    # A tied table may be stored under the name of the output weight.
    if config.tie_embeddings and EMBED not in tensors and LM_HEAD in tensors:
        places['embed.weight'] = ([LM_HEAD], *places['embed.weight'][1:])
    wanted = {}
    for names, shape, _ in places.values():
        wanted |= dict.fromkeys(names, shape)
    extra = {name for name in tensors.keys() - wanted.keys() if not name.endswith(UNUSED)}
    # Some files hold a tied table twice.
    if config.tie_embeddings:
        extra.discard(LM_HEAD)
    missing = wanted.keys() - tensors.keys()
    for kind, names in (('missing', missing), ('not known', extra)):
        if names:
            shown = sorted(names)[:5] + ['...'] * (len(names) > 5)
            faults.append(f'{kind}: {", ".join(shown)} ({len(names)})')
    if missing == {LM_HEAD}:
        faults.append(
            'tie_word_embeddings is false, so the output weight must be there. If it is the '
            'embedding, set tie_word_embeddings to true in config.json')
    for theirs, shape in wanted.items():
        if theirs in tensors and tensors[theirs].shape != shape:
            there = tensors[theirs].shape
            faults.append(f'{theirs} has shape {there}, the config asks for {shape}')
    if faults:
        faults = '; '.join(faults[:8])
        raise BadInput(f'{folder}: the tensors are not those of its config.json. {faults}.')
    # Nothing is copied before everything is checked. Every rank reads all and keeps its part.
    reader = TensorReader(folder, tensors)
    for name, parameter in model.named_parameters():
        names, _, half = places[name]
        parts = []
        for theirs in names:
            where = f'{folder}/{tensors[theirs].file}: {theirs}'
            parts.append(finite(reader.read(theirs), parameter.dtype, where))
        tensor = parts[0] if '.experts.' not in name or len(names) == 1 else torch.stack(parts)
        if half is not None:
            tensor = tensor.chunk(2, dim=1)[half]
        tensor = turn_pairs(name, tensor, config, family, to_ours=True)
        parameter.copy_(ranks.placed(model.layout, name, parameter, tensor))
    # The buffers are the experts' biases and loads, which these families do not have.
    for buffer in model.buffers():
        buffer.zero_()


def tensors_of(model, family):
    """The tensors of an export in their order: list of (their name, our name, tensor)."""
    config = model.config
    found = []
    for name, parameter in model.named_parameters():
        for names in hf_names(name, config, family):
            parts = parameter.detach().unbind() if '.experts.' in name else [parameter.detach()]
            found += [(n, name, part) for n, part in zip(names, parts, strict=True)]
    # A norm with weights of 1 is the same as a norm without weights.
    if family.startswith('qwen3') and not config.qk_norm_weight:
        for i in range(config.n_layer * config.layer_repeat):
            for kind in ('q_norm', 'k_norm'):
                name = f'model.layers.{i}.self_attn.{kind}.weight'
                found.append((name, name, torch.ones(config.head_dim)))
    return found


def write_weights(folder, model, family, dtype):
    """Writes safetensors files of at most SHARD_BYTES or one tensor, and an index if several."""
    from safetensors.torch import save_file

    # A file's name contains the number of files, so all tensors are assigned before one is written.
    shards = [[]]
    shard_bytes = 0
    total_bytes = 0
    for theirs, name, tensor in tensors_of(model, family):
        n_bytes = tensor.numel() * dtype.itemsize
        if shards[-1] and shard_bytes + n_bytes > SHARD_BYTES:
            shards.append([])
            shard_bytes = 0
        shards[-1].append((theirs, name, tensor))
        shard_bytes += n_bytes
        total_bytes += n_bytes
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = SINGLE
        if len(shards) > 1:
            file = f'model-{i:05d}-of-{len(shards):05d}.safetensors'
        tensors = {}
        for theirs, name, tensor in shard:
            # safetensors refuses tensors that share memory, as repeated layers do.
            tensor = turn_pairs(name, tensor, model.config, family, to_ours=False)
            tensors[theirs] = tensor.to(dtype).contiguous().clone()
        save_file(tensors, os.path.join(folder, file), metadata={'format': 'pt'})
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = dict(metadata=dict(total_size=total_bytes), weight_map=weight_map)
        write_json(os.path.join(folder, INDEX), index, indent=2)


# -- models of any kind ----------------------------------------------------------------------------


def find_folder(name, revision=None, weights=True):
    """The folder itself, or that of a hub model (owner/name), downloaded into the hub's cache.

    weights=False downloads everything else. Raises BadInput if there is no such folder or model.
    """
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    from lib.reading import reaching

    try:
        validate_repo_id(name)
        # A mistyped local path must not become a request to the hub.
        if name.count('/') != 1 or os.path.isdir(name.split('/')[0]):
            raise HFValidationError
    except HFValidationError:
        raise BadInput(f"'{name}' is neither a folder here nor a model on the hub.") from None
    patterns = ['config.json', *COMPANIONS, f'{model_files.TEMPLATE_FOLDER}/*.jinja']
    if weights:
        patterns += ['*.safetensors', '*.safetensors.index.json']
    with reaching(name, kind='', or_local='Or give a downloaded folder.'):
        # The same weights again, in the form of Mistral's own code.
        return snapshot_download(
            name, revision=revision, allow_patterns=patterns,
            ignore_patterns=['consolidated*.safetensors*'])


def as_stored(folder, model):
    """Returns (ModelConfig, notes): the model of a config.json, tied as its tensors are."""
    tensors, passed_over = find_tensors(folder)
    notes = []
    if passed_over:
        notes.append(
            f'{folder}: {", ".join(passed_over)} is not part of the model and is passed over.')
    if model.tie_embeddings and stored_tie(folder, tensors) is False:
        model = dataclasses.replace(model, tie_embeddings=False)
        notes.append(
            f'{folder}: config.json ties the output weight to the embedding, but the files hold '
            f'another {LM_HEAD}. The model is loaded untied (tie_embeddings = False), as '
            'transformers does it.')
    return model, notes


def find_model(path, revision=None, weights=True):
    """Describes a run, checkpoint, imported folder, Hugging Face folder or hub name: a dict.

    folder        where the tokenizer is
    files         ModelFiles: what the files beside the weights say
    checkpoint    folder of a DCP checkpoint, or None
    state         its state.json, or {}
    hf            the config.json of Hugging Face's model, or None. In a run it is that of the model
                  which it started from
    model         ModelConfig. Tied as the weights are, whatever config.json says
    context       tokens
    limit         tokens beyond which it is another model, see `limit_of`. None: there are none
    notes         sentences for the user about its weights. `load_weights` prints them
    tokenizer     Tokenizer, or the BadInput that says why there is none
    fingerprint   of the tokenizer. None: unknown
    weights=False downloads no weights. Raises BadInput if there is no model.
    """
    folder = path if storage.is_remote(path) else find_folder(path, revision, weights)
    manifest = os.path.join(folder, 'manifest.json')
    config_file = os.path.join(folder, 'config.json')
    found = None
    # A checkpoint folder has a manifest, a run has checkpoints.
    if storage.is_folder(os.path.join(folder, 'ckpt')) or storage.is_file(manifest):
        found = checkpoint.find_checkpoint(folder)
    if found is not None:
        state = checkpoint.read_state(found)
        if storage.is_remote(found):
            run = os.path.dirname(os.path.dirname(found))
            folder = storage.download(run, tempfile.mkdtemp())
        else:
            folder = os.path.dirname(os.path.dirname(os.path.abspath(found)))
        hf = state.get('hf')
        notes = []
        try:
            model = make_config(dict(state['model']), found)
            context = state.get('context') or state['config']['block_size']
            limit = None if hf is None else limit_of(hf)
        except (KeyError, TypeError, AttributeError) as error:
            raise BadInput(
                f'{found}/state.json does not describe a model ({type(error).__name__}: {error}). '
                'It is damaged: take another checkpoint.'
            ) from None
    elif os.path.isfile(config_file) and 'model_type' in read_object(config_file):
        state = {}
        hf = read_object(config_file)
        try:
            model = config_from_hf(hf, f'{path}/config.json')
        except KeyError as error:
            raise BadInput(f'{path}/config.json has no field {error}.') from None
        model, notes = as_stored(folder, model)
        context = context_of(hf)
        limit = limit_of(hf)
    else:
        raise BadInput(f"'{path}' has neither a complete checkpoint nor a model's config.json.")
    # A run that was trained with longer texts than that attends to all of them.
    if limit is not None and limit < context:
        limit = None
    about = dict(folder=folder, checkpoint=found, state=state, hf=hf, model=model, context=context)
    about |= dict(files=read_model_files(folder), limit=limit, notes=notes)
    about['fingerprint'] = state.get('tokenizer')
    # A model without a usable tokenizer can still be trained.
    try:
        tokenizer = load_tokenizer(folder)
        if about['fingerprint'] not in (None, tokenizer.fingerprint):
            raise BadInput(
                f"the tokenizer in {folder} ({tokenizer.fingerprint}) is not the one that the "
                f"model was trained with ({about['fingerprint']}). Restore it.")
        about['fingerprint'] = tokenizer.fingerprint
        # In our shards BOS follows the end of a document. A model from elsewhere does without.
        if found is not None and hf is None and tokenizer.bos_id not in tokenizer.stop_ids:
            tokenizer.stop_ids.append(tokenizer.bos_id)
        if tokenizer.vocab_size > model.vocab_size:
            raise BadInput(
                f'{path}: the tokenizer has {tokenizer.vocab_size:,} tokens, the model '
                f'{model.vocab_size:,}: they do not belong together.'
            )
    except BadInput as error:
        tokenizer = error
        # A file that is cut off is no reason to train without it.
        path = os.path.join(folder, 'tokenizer.json')
        if os.path.isfile(path):
            read_object(path)
    return {**about, 'tokenizer': tokenizer}


def load_weights(about, model):
    """Loads the weights of `find_model`'s dict into `model` in place, whatever its sharding."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        for note in about['notes']:
            print(note)
    if about['checkpoint'] is not None:
        checkpoint.load_weights(about['checkpoint'], model)
    else:
        read_weights(about['folder'], about['hf'], model)


def load_model(about, device, dtype):
    """Makes the frozen GPT of `find_model`'s dict on a device, with its weights in `dtype`.

    Raises BadInput if its weights do not fit into the memory of the device.
    """
    n_bytes = count_parameters(about['model'])['total'] * dtype.itemsize
    name = about['checkpoint'] or about['folder']
    check_memory(n_bytes, torch.device(device), f"the model '{name}' in {dtype}")
    # On the meta device the weights take no memory in fp32 before they are converted.
    with torch.device('meta'):
        model = GPT(about['model'])
    model = model.frozen(dtype).to_empty(device=device)
    load_weights(about, model)
    return model


def start_from(path, model, fingerprint):
    """Copies the weights of another run or model into `model` in place (init_from).

    fingerprint: of the shards' tokenizer. None: unknown. Returns find_model's dict.
    Raises BadInput if it is another model (rope_theta may differ) or has another tokenizer.
    """
    about = find_model(path)
    theirs = asdict(about['model'])
    # A stage with a longer context may change rope_theta, which no tensor depends on.
    ours = {**asdict(model.config), 'rope_theta': theirs['rope_theta']}
    checkpoint.check_same_model(path, theirs, ours)
    if fingerprint is not None and about['fingerprint'] not in (None, fingerprint):
        raise BadInput(
            f"init_from = '{path}' has another tokenizer ({about['fingerprint']}) than these "
            f'shards ({fingerprint}). Prepare the sources with its tokenizer.'
        )
    load_weights(about, model)
    return about


def check_context(about, n_tokens):
    """Raises BadInput if find_model's model computes something else with so many tokens."""
    if about['limit'] is not None and n_tokens > about['limit']:
        raise BadInput(
            f"{n_tokens:,} tokens are more than the {about['limit']:,} that the model "
            f"'{about['checkpoint'] or about['folder']}' can look at (attention_chunk_size or "
            'sliding_window of its config.json). Beyond them it is computed with full attention '
            'here, which is another model.')


def open_model(path, device, dtype, needs_tokenizer=True):
    """Opens a model for evaluation or generation: (GPT, Tokenizer, find_model's dict)."""
    about = find_model(path)
    if needs_tokenizer and isinstance(about['tokenizer'], BadInput):
        raise BadInput(f"no usable tokenizer for '{path}': {about['tokenizer']}")
    return load_model(about, device, dtype).eval(), about['tokenizer'], about


# -- import and export -----------------------------------------------------------------------------


def copy_companions(source, target):
    """Copies the files that describe how a model is used, and writes down what config.json says."""
    os.makedirs(target, exist_ok=True)
    paths = [os.path.join(source, name) for name in COMPANIONS]
    templates = os.path.join(source, model_files.TEMPLATE_FOLDER)
    paths += glob.glob(os.path.join(glob.escape(templates), '*.jinja'))
    for path in paths:
        if os.path.isfile(path):
            copy = os.path.join(target, os.path.relpath(path, source))
            os.makedirs(os.path.dirname(copy), exist_ok=True)
            shutil.copyfile(path, copy)
    files = read_model_files(source)
    # config.json is not copied, because that of a run is another one.
    if files.config is not None:
        ids = {}
        for key in ('bos_token_id', 'eos_token_id', 'pad_token_id'):
            if files.config.get(key) is not None:
                ids[key] = files.config[key]
        add_generation_ids(target, ids)


def add_generation_ids(folder, ids, replaced=()):
    """Writes token ids (dict) that generation_config.json lacks, or that are to be replaced."""
    path = os.path.join(folder, 'generation_config.json')
    there = read_object(path)
    new = {}
    for key, value in ids.items():
        if there.get(key) is None or key in replaced:
            new[key] = value
    if new:
        write_json(path, {**there, **new}, indent=2)


def write_template(folder, name, source=''):
    """Makes a chat template that of the model in a folder: one of ours, or `model`, that of source.

    source: the folder of a model, or of conversations that were made with its template
    Raises BadInput if it has none.
    """
    text = JINJA[name] if name in JINJA else read_model_files(source).template
    if text is None:
        raise BadInput(
            f'{source} has lost chat_template.jinja, the template that its conversations were made '
            'with. Restore it, or prepare the source again.')
    with open(os.path.join(folder, 'chat_template.jinja'), 'w', encoding='utf-8') as f:
        f.write(text)


def dtype_of(about, dtype):
    """Returns (name of the dtype to store a model of Hugging Face in, sentences about it).

    dtype: the name that the user asks for; 'auto': that of the files
    """
    kinds = {}      # dtype -> names of the tensors
    for name, stored in find_tensors(about['folder'])[0].items():
        if not name.endswith(UNUSED):
            kinds.setdefault(FLOATS.get(stored.dtype, stored.dtype), []).append(name)
    there = []
    for kind, names in sorted(kinds.items()):
        there.append(f'{kind} ({len(names)} tensors, such as {names[0]})')
    there = ' and '.join(there if len(kinds) > 1 else kinds)
    said = about['hf'].get('dtype') or about['hf'].get('torch_dtype')
    if dtype != 'auto':
        if list(kinds) == [dtype]:
            return dtype, []
        return dtype, [f'the files hold {there}: the weights are converted to {dtype}, as asked.']
    if there not in DTYPES:
        return 'float32', [f'the files hold {there}: all weights are stored in float32.']
    if said not in (None, there):
        return there, [f'config.json says {said}, but the files hold {there}, and it is kept.']
    return there, []


def import_model(name, revision, out, dtype='auto'):
    """Converts a Hugging Face model to a folder like a run's.

    dtype: of the weights. 'auto': that of the files, or float32 for files with several.
    """
    if os.path.exists(os.path.join(out, 'ckpt')):
        raise BadInput(f"out '{out}' already holds a model. Choose another --out.")
    about = find_model(name, revision)
    if about['checkpoint'] is not None:
        raise BadInput(f"'{name}' is a run already: all scripts accept it as it is.")
    hf = about['hf']
    dtype, notes = dtype_of(about, dtype)
    if hf.get('attention_dropout'):
        notes.append(
            f'attention_dropout = {hf["attention_dropout"]} is not applied: training here has no '
            'dropout.')
    model = load_model(about, 'cpu', getattr(torch, dtype))
    copy_companions(about['folder'], out)
    config = asdict(about['model'])
    context = about['context']
    tokenizer = about['tokenizer']
    if isinstance(tokenizer, BadInput):
        fingerprint = None
        notes.append(
            f'no tokenizer, so the model can be trained but cannot write text: {tokenizer}')
    else:
        fingerprint = tokenizer.fingerprint
        # A rank file has any name.
        for path in (tokenizer.path, f'{tokenizer.path}.json'):
            if os.path.isfile(path):
                shutil.copyfile(path, os.path.join(out, os.path.basename(path)))
        notes.append(f'tokenizer: {tokenizer.vocab_size:,} tokens, fingerprint {fingerprint}')
    # config=None marks an import. check_resumable refuses to resume it.
    state = dict(model=config, config=None, tokenizer=fingerprint, context=context)
    state |= dict(hf=hf, dtype=dtype)
    checkpoint.Checkpointer(out, 0, False).save(0, model, [], state)
    size = f'{sum(p.numel() for p in model.parameters()):,} parameters in {dtype}'
    print(f'{name}: {hf["model_type"]}, {size}, context of {context:,} tokens -> {out}')
    print('\n'.join(notes))
    print('to continue training, use a config/model file with')
    for key, value in config.items():
        if about['model'].n_expert or not ('expert' in key or 'dense' in key):
            print(f'    {key} = {value!r}')


def is_still(config, hf, where):
    """Whether a model of ours is that of a config.json (dict), apart from what a stage may change.
    """
    origin = dataclasses.replace(
        config_from_hf(hf, where), rope_theta=config.rope_theta, rope_scaling=config.rope_scaling,
        tie_embeddings=config.tie_embeddings)
    return not checkpoint.differences(asdict(origin), asdict(config))


def exported_config(about, family):
    """The config.json (dict) of an export, without dtype and ids of tokens.

    family: as the knob of tools/hf.py. Raises BadInput if it cannot express the model.
    """
    config = about['model']
    hf = about['hf']
    context = about['context']
    if hf is not None and not is_still(config, hf, about['checkpoint']):
        hf = None
    theirs = None if hf is None else hf['model_type']
    if family == 'auto':
        family = theirs if theirs in EXPORTED else family_of(config)
    if family == theirs:
        # The model keeps all of its fields.
        fields = {key: value for key, value in hf.items() if key not in STALE}
        if context > context_of(hf):
            for name in ('max_position_embeddings', 'attention_chunk_size', 'sliding_window'):
                if fields.get(name) is not None:
                    fields[name] = max(context, fields[name])
    else:
        fault = why_not(config, family)
        if fault:
            raise BadInput(
                f'the model cannot be exported as {family} ({FAMILIES[family]}): {fault}.')
        fields = config_to_hf(config, family, context)
    return {**fields, **rope_to_hf(config), 'tie_word_embeddings': config.tie_embeddings}


def token_ids(about, template):
    """The ids of bos, eos (all that end a text) and pad of an export: a dict, without unknown ones.

    template: name of the chat template to write, or None
    """
    tokenizer = about['tokenizer']
    files = about['files']
    ids = {}
    stop_ids = list(files.eos_ids)
    if not isinstance(tokenizer, BadInput):
        special = tokenizer.special_tokens
        stop_ids = stop_ids or list(tokenizer.stop_ids)
        if template is None:
            template = next((name for name, text in JINJA.items() if text == files.template), None)
        if template is not None:
            # A model that was trained on our template ends its turns with this token.
            stop_ids += [special[name] for name in TEMPLATES[template][2]]
        bos_id = tokenizer.bos_id
        # Some models have no BOS. Ours is then what begins a document.
        if files.describes_tokens:
            bos_id = special.get(files.tokens.get('bos_token'))
        ids['bos_token_id'] = bos_id
        ids['pad_token_id'] = special.get(files.tokens.get('pad_token'))
    stop_ids = list(dict.fromkeys(stop_ids))
    ids['eos_token_id'] = stop_ids[0] if len(stop_ids) == 1 else stop_ids or None
    return {key: value for key, value in ids.items() if value is not None}


def check_export(about, model, dtype):
    """Raises BadInput if the weights are not finite in `dtype`, or need what no family has."""
    for name, parameter in model.named_parameters():
        low, high = parameter.aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise BadInput(
                f'{about["checkpoint"]}: {name} holds NaN, infinite values, or values beyond the '
                f'range of {dtype}. Set another --dtype, or take another checkpoint.')
    if any(layer.bias.any() for layer in moe.layers(model)):
        raise BadInput(
            f'{about["checkpoint"]}: the routers have biases that balance the experts, which no '
            'supported family has. Train with balance_rate=0 to export such a model.')


def export_model(path, out, dtype, template, family='auto'):
    """Converts a run, checkpoint or imported folder to one that transformers loads.

    dtype: of the weights, 'auto' for that of an imported model, else float32.
    template: name of the chat template to write, or None.
    family: model_type to write, see README. 'auto': that of the model which a run started from,
    else the first that fits. Raises BadInput if it cannot express the model.
    """
    about = find_model(path)
    if about['checkpoint'] is None:
        raise BadInput(f"'{path}' is a Hugging Face model already.")
    if os.path.exists(out) and os.listdir(out):
        raise BadInput(f"out '{out}' is not empty. Choose another --out.")
    if dtype == 'auto':
        dtype = about['state'].get('dtype', 'float32')
    if dtype not in DTYPES:
        raise BadInput(f"dtype = '{dtype}' must be auto or one of {', '.join(DTYPES)}.")
    if family not in ('auto', *EXPORTED):
        raise BadInput(f"family = '{family}' must be auto or one of {', '.join(EXPORTED)}.")
    tokenizer = about['tokenizer']
    if isinstance(tokenizer, BadInput):
        tokenizer = None
    if template is not None and tokenizer is None:
        raise BadInput(f"chat_template = '{template}' needs a tokenizer: {about['tokenizer']}")
    if template is not None:
        check_template(tokenizer, template)
    hf = exported_config(about, family)
    model = load_model(about, 'cpu', getattr(torch, dtype))
    check_export(about, model, dtype)
    ids = token_ids(about, template)
    copy_companions(about['folder'], out)
    write_weights(out, model, hf['model_type'], getattr(torch, dtype))
    new_ids = {key: value for key, value in ids.items() if hf.get(key) is None}
    write_json(os.path.join(out, 'config.json'), {**hf, **new_ids, 'dtype': dtype}, indent=2)
    # A copied tokenizer.json stays, because ours is only a reconstruction of it.
    if tokenizer is not None and not os.path.isfile(os.path.join(out, 'tokenizer.json')):
        save_tokenizer_json(out, tokenizer, about['context'])
    if template is not None:
        write_template(out, template)
    # The ids of eos are those of the file, and perhaps that of our template.
    add_generation_ids(out, ids, ('eos_token_id',))
    notes = ''
    if about['model'].layer_repeat > 1:
        notes += f'; every layer is written {about["model"].layer_repeat} times'
    if tokenizer is None:
        notes += f'; no tokenizer: {about["tokenizer"]}'
    print(f'{about["checkpoint"]} -> {out}: {hf["architectures"][0]}, {dtype}{notes}')
