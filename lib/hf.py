"""Weights, config and tokenizer from and to Hugging Face, without `transformers`.

    python tools/hf.py import --model=HuggingFaceTB/SmolLM2-135M --out=out/smollm2
    python tools/hf.py export --ckpt=out/run --out=out/run_hf

An imported folder looks like a run: it has ckpt/step_000000 and the tokenizer's files as they were.
train.py --init_from, tools/evaluate.py and tools/sample.py accept it. They accept a hub name and a
local folder in Hugging Face's layout just as well.

Supported families: Llama (2, 3, 3.1 and later, SmolLM2), Qwen2 and 2.5, Qwen3, MobileLLM-R1 (the
text model of Llama 4 without experts) and MobileLLM (with or without shared layers).
`config_from_hf` contains what is special about each. A config that needs anything else is refused
with the name of the field.
"""

import functools
import glob
import inspect
import math
import os
import shutil
import tempfile
from dataclasses import asdict

import torch

from configurator import BadInput, check_type, parse_knobs, read_json, read_source
from lib import checkpoint, storage
from lib.chat import JINJA, check_template, read_template
from lib.device import check_memory
from lib.tokenizer import load_tokenizer, save_tokenizer_json, write_json
from model import GPT, ModelConfig, count_parameters
from ops import ranks

FAMILIES = {
    'llama': 'LlamaForCausalLM',
    'qwen2': 'Qwen2ForCausalLM',
    'qwen3': 'Qwen3ForCausalLM',
    'llama4_text': 'Llama4ForCausalLM',
    'mobilellm': 'MobileLLMForCausalLM',
}
# Files beside the weights that are copied unchanged. A chat template is in one of two of them.
COMPANIONS = (
    'tokenizer.json tokenizer_config.json special_tokens_map.json generation_config.json '
    'chat_template.jinja tokenizer.model vocab.json merges.txt LICENSE'
).split()
SHARD_BYTES = 5 * 10**9     # largest safetensors file that an export writes
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
}
ORIGINAL = 'original_max_position_embeddings'
ROPE_NAMES = {'type': 'rope_type', 'original_max_position': 'original_max_position_embeddings'}
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


# safetensors' names of the dtypes that weights may have. Others belong to quantized models.
FLOATS = ('F64', 'F32', 'F16', 'BF16')
# Fields of a config.json with their types. SIZES must be at least 1 where they are given.
SIZES = ('vocab_size', 'num_hidden_layers', 'num_attention_heads', 'hidden_size')
SIZES += ('intermediate_size', 'num_key_value_heads', 'head_dim', 'max_position_embeddings')
SIZES += ('intermediate_size_mlp', 'attention_chunk_size', 'no_rope_layer_interval')
FIELDS = {name: 'int | None' for name in SIZES}
FIELDS |= dict.fromkeys(('rms_norm_eps', 'rope_theta', 'partial_rotary_factor'), 'float | None')
FIELDS |= dict.fromkeys(('rope_scaling', 'rope_parameters'), 'dict | None')
FIELDS |= dict.fromkeys(('layer_types', 'no_rope_layers', 'moe_layers'), 'list | None')
FIELDS |= dict.fromkeys(('share_embedding', 'layer_sharing', 'use_qk_norm'), 'bool | None')
FIELDS |= dict(tie_word_embeddings='bool', interleave_moe_layer_step='int')
MOST_LAYERS = 100_000


# -- config ----------------------------------------------------------------------------------------


def check_fields(hf, where):
    """Raises BadInput for a field of a config.json that has another type or cannot be right."""
    for name, wanted in FIELDS.items():
        if name not in hf:
            continue
        try:
            value = check_type(hf[name], wanted, None)
        except TypeError as error:
            raise BadInput(f'{where}: {name} {error}.') from None
        if name in SIZES and value is not None and value < 1:
            raise BadInput(f'{where}: {name} = {value} must be at least 1.')
    if (hf.get('num_hidden_layers') or 1) > MOST_LAYERS:
        raise BadInput(f'{where}: num_hidden_layers must be at most {MOST_LAYERS:,}.')


def positive(fields, name, where):
    """A number above 0 among the fields (dict). Raises BadInput, or KeyError if it is missing."""
    try:
        value = check_type(fields[name], 'float', None)
    except TypeError as error:
        raise BadInput(f'{where}: {name} {error}.') from None
    if not 0 < value < math.inf:
        raise BadInput(f'{where}: {name} = {value} must be a number above 0.')
    return value


@functools.cache
def model_types():
    """Name -> type of every field of ModelConfig."""
    path = inspect.getfile(ModelConfig)
    knobs = parse_knobs(read_source(path), path, 'ModelConfig')
    return {name: knob.type or 'str' for name, knob in knobs.items()}


def make_config(fields, where):
    """The ModelConfig with these fields (dict). Raises BadInput that names the file `where`."""
    types = model_types()
    for name, value in fields.items():
        if name not in types:
            raise BadInput(
                f"{where}: the model has the field '{name}', which this version does not know.")
        try:
            check_type(value, types[name], None)
        except TypeError as error:
            raise BadInput(f'{where}: {name} {error}.') from None
    try:
        return ModelConfig(**fields)
    except BadInput as error:
        raise BadInput(f'{where}: {error}') from None


def config_from_hf(hf, where):
    """Converts a config.json (dict) to a ModelConfig.

    Raises BadInput that names the field which this network cannot express, and KeyError for a
    missing field. where: the file's name for messages.
    """
    family = hf.get('model_type')
    check_fields(hf, where)
    if not isinstance(family, str) or family not in FAMILIES:
        known = ', '.join(FAMILIES)
        raise BadInput(f"{where}: model_type '{family}' is not supported; {known} are.")

    def require(field, value, wanted):
        if value != wanted:
            raise BadInput(f'{where}: {field} = {value!r} is not supported, only {wanted!r}.')

    is_llama4 = family == 'llama4_text'
    # These are also the defaults of transformers, so a field that is left out passes.
    fixed = dict(hidden_act='silu', attention_bias=False, mlp_bias=False)
    fixed |= dict(quantization_config=None, use_sliding_window=False)
    for field, wanted in fixed.items():
        require(field, hf.get(field, wanted), wanted)
    # The attention chunks of Llama 4 are no fault: within the context they are full attention.
    if not is_llama4:
        partial = [t for t in hf.get('layer_types') or [] if t != 'full_attention']
        require('layer_types', partial[:1], [])
    n_layer = hf['num_hidden_layers']
    n_head = hf['num_attention_heads']
    model = dict(vocab_size=hf['vocab_size'], n_layer=n_layer, n_embd=hf['hidden_size'])
    model |= dict(n_head=n_head, n_kv_head=hf.get('num_key_value_heads') or n_head)
    model |= dict(ffn_dim=hf['intermediate_size'], head_dim=hf.get('head_dim'))
    model['tie_embeddings'] = hf.get('tie_word_embeddings', False)
    # A wrong epsilon would load without an error, hence the default of each family.
    model['norm_eps'] = 1e-5 if is_llama4 else 1e-6
    if 'rms_norm_eps' in hf:
        model['norm_eps'] = positive(hf, 'rms_norm_eps', where)
    model |= dict(qkv_bias=family == 'qwen2', qk_norm=family == 'qwen3')
    # Qwen3's default does not follow from n_embd / n_head.
    if family == 'qwen3':
        model['head_dim'] = model['head_dim'] or 128
    if family == 'mobilellm':
        model['tie_embeddings'] = hf.get('share_embedding', model['tie_embeddings'])
        model['layer_repeat'] = 2 if hf.get('layer_sharing') else 1
    if is_llama4:
        # A 1 in no_rope_layers means that the layer does have rotary positions.
        interval = hf.get('no_rope_layer_interval', 4)
        rotary = hf.get('no_rope_layers') or [int((i + 1) % interval != 0) for i in range(n_layer)]
        if rotary[:n_layer] != [1] * n_layer:
            raise BadInput(f'{where}: no_rope_layers must be 1 for all of the {n_layer} layers.')
        moe_layers = hf.get('moe_layers')
        if moe_layers is None:
            step = hf.get('interleave_moe_layer_step', 1)
            moe_layers = list(range(step - 1, n_layer, step)) if step else []
        require('moe_layers', moe_layers, [])
        # In Llama 4 intermediate_size is the width of an expert. Dense layers have this one.
        model['ffn_dim'] = hf['intermediate_size_mlp']
        # Llama 4 norms after the rotation, and this network before it. Without a learned scale both
        # are the same, because a rotation keeps the norm.
        model |= dict(qk_norm=hf.get('use_qk_norm', True), qk_norm_weight=False)
    theta, scaling = rope_from_hf(hf, where, 500000.0 if is_llama4 else 10000.0)
    return make_config(dict(**model, rope_theta=theta, rope_scaling=scaling), where)


def rope_from_hf(hf, where, default_theta):
    """Returns (rope_theta, rope_scaling) of a config.json."""
    # transformers 4 writes two fields, transformers 5 rope_parameters.
    rope = {**(hf.get('rope_scaling') or {}), **(hf.get('rope_parameters') or {})}
    theta = positive({'rope_theta': default_theta, **hf, **rope}, 'rope_theta', where)
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if rope.get('partial_rotary_factor', hf.get('partial_rotary_factor', 1.0)) != 1.0:
        raise BadInput(f'{where}: partial_rotary_factor is not supported, only 1.0.')
    if kind == 'default':
        return theta, None
    original = rope.get('original_max_position_embeddings', hf.get('max_position_embeddings'))
    scaling = dict(type=kind)
    if kind == 'linear':
        scaling['factor'] = positive(rope, 'factor', where)
    elif kind == 'llama3':
        for name in ('factor', 'low_freq_factor', 'high_freq_factor'):
            scaling[name] = positive(rope, name, where)
        positive(dict(original_max_position_embeddings=original), ORIGINAL, where)
        scaling['original_max_position'] = original
    elif kind == 'yarn' and rope.get('truncate', True):
        positive(dict(original_max_position_embeddings=original), ORIGINAL, where)
        # Fields of 0 and null have these defaults as well.
        given = {name: value for name, value in rope.items() if value}
        defaults = dict(beta_fast=32, beta_slow=1)
        if 'factor' not in given:
            defaults['factor'] = positive(hf, 'max_position_embeddings', where) / original
        given = {**defaults, **given}
        factor = positive(given, 'factor', where)
        scaling |= dict(factor=factor, original_max_position=original)
        for name in ('beta_fast', 'beta_slow'):
            scaling[name] = positive(given, name, where)
        for name in ('attention_factor', 'mscale', 'mscale_all_dim'):
            if name in given:
                positive(given, name, where)
        scaling['attention_factor'] = float(yarn_attention_factor(rope, factor))
    else:
        known = 'default, linear, llama3 and (truncated) yarn'
        raise BadInput(f"{where}: rope_type '{kind}' is not supported; {known} are.")
    return theta, scaling


def yarn_attention_factor(rope, factor):
    """What YaRN multiplies the queries and keys by. Peng et al. 2023 (arXiv:2309.00071), 3.4."""

    def magnitude(weight):
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if rope.get('attention_factor') is not None:
        return rope['attention_factor']
    if rope.get('mscale') and rope.get('mscale_all_dim'):
        return magnitude(rope['mscale']) / magnitude(rope['mscale_all_dim'])
    return magnitude(1)


def context_of(hf):
    """The context, in tokens, that the model of a config.json was made for."""
    limit = hf.get('max_position_embeddings') or 2048
    if hf['model_type'] == 'llama4_text':
        return min(limit, hf.get('attention_chunk_size') or limit)
    return limit


def config_to_hf(config, context, tokenizer, dtype):
    """Converts a ModelConfig to the config.json (dict) of the family that computes the same.

    context: in tokens; tokenizer: Tokenizer or None; dtype: name of the weights' dtype.
    Raises BadInput if no family does.
    """
    c = config
    if c.n_expert:
        raise BadInput('a mixture of experts cannot be exported: no supported family computes it.')
    if c.qk_norm and c.qkv_bias:
        raise BadInput('a model with qk_norm and qkv_bias cannot be exported: no family has both.')
    if c.qk_norm:
        family = 'qwen3' if c.qk_norm_weight else 'llama4_text'
    else:
        family = 'qwen2' if c.qkv_bias else 'llama'
    # No exported family repeats layers, so a repeated layer is written several times.
    n_layer = c.n_layer * c.layer_repeat
    hf = dict(architectures=[FAMILIES[family]], model_type=family, vocab_size=c.vocab_size)
    hf |= dict(hidden_size=c.n_embd, intermediate_size=c.ffn_dim, num_hidden_layers=n_layer)
    hf |= dict(num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim)
    hf |= dict(hidden_act='silu', max_position_embeddings=context, rms_norm_eps=c.norm_eps)
    hf |= dict(rope_theta=c.rope_theta, rope_scaling=None, tie_word_embeddings=c.tie_embeddings)
    hf |= dict(attention_bias=False, attention_dropout=0.0, initializer_range=0.02)
    hf |= dict(use_cache=True, torch_dtype=dtype)
    if family == 'qwen2':
        del hf['attention_bias']
        if c.head_dim * c.n_head != c.n_embd:
            raise BadInput('qkv_bias cannot be exported with head_dim other than n_embd / n_head.')
    elif family == 'llama':
        hf['mlp_bias'] = False
    elif family == 'llama4_text':
        hf |= dict(intermediate_size_mlp=c.ffn_dim, use_qk_norm=True, no_rope_layers=[1] * n_layer)
        hf |= dict(moe_layers=[], interleave_moe_layer_step=0, num_local_experts=0)
        hf |= dict(num_experts_per_tok=0, attn_temperature_tuning=False)
        # A chunk as long as the context makes Llama 4's chunked layers full attention.
        hf |= dict(attention_chunk_size=context)
    if c.rope_scaling is not None:
        scaling = {'type': 'llama3', **c.rope_scaling}
        hf['rope_scaling'] = {ROPE_NAMES.get(key, key): value for key, value in scaling.items()}
    if tokenizer is not None:
        hf |= dict(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.stop_ids)
    return hf


# -- tensors ---------------------------------------------------------------------------------------


def hf_names(name, config, family):
    """The names of our parameter in a file of that family: one, or layer_repeat in an export."""
    module, kind = name.rsplit('.', 1)
    if not name.startswith('blocks.'):
        return [f'{NAMES[module]}.{kind}']
    _, layer, module = module.split('.', 2)
    theirs = NAMES[module]
    if family == 'llama4_text':
        theirs = theirs.replace('mlp.', 'feed_forward.')
    # A file of MobileLLM has a shared layer once, a Llama that computes the same has it twice.
    repeat = 1 if family == 'mobilellm' else config.layer_repeat
    first = int(layer) * repeat
    return [f'model.layers.{i}.{theirs}.{kind}' for i in range(first, first + repeat)]


def turn_pairs(name, tensor, config, family, to_ours):
    """Reorders the rows of wq and wk of Llama 4, and returns any other tensor unchanged."""
    # Llama 4 rotates neighbouring dimensions of a head, we rotate its halves.
    if family != 'llama4_text' or not name.endswith(('wq.weight', 'wk.weight')):
        return tensor
    pairs = (config.head_dim // 2, 2) if to_ours else (2, config.head_dim // 2)
    return tensor.view(-1, *pairs, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


def safetensors_files(folder):
    """The paths of a model's safetensors files. Raises BadInput if any or all are missing."""
    index = os.path.join(folder, 'model.safetensors.index.json')
    if os.path.isfile(index):
        found = read_json(index)
        weight_map = found.get('weight_map') if isinstance(found, dict) else None
        names = set(weight_map.values()) if isinstance(weight_map, dict) else {None}
        # A name with a path could lead to any file of this machine.
        if not all(isinstance(name, str) and os.path.basename(name) == name for name in names):
            raise BadInput(
                f'{index} has no weight_map of tensors to names of files beside it. Download it '
                'again.')
        files = sorted(os.path.join(folder, name) for name in names)
    else:
        files = sorted(glob.glob(os.path.join(folder, '*.safetensors')))
    missing = [os.path.basename(path) for path in files if not os.path.isfile(path)]
    if missing:
        raise BadInput(f'{folder}: {", ".join(missing)} is missing; the index names it.')
    if not files:
        raise BadInput(f'{folder}: there is no .safetensors file. Convert .bin and .pth files.')
    return files


@torch.no_grad()
def read_weights(folder, hf, model):
    """Copies the weights of a Hugging Face folder into `model` in place, whatever its sharding.

    Raises BadInput for missing, extra and misshapen tensors and for a damaged file.
    """
    from safetensors import SafetensorError, safe_open

    family = hf['model_type']
    config = model.config
    files = safetensors_files(folder)
    shapes = {}
    faults = []
    for path in files:
        try:
            with safe_open(path, framework='pt') as f:
                for name in f.keys():
                    if name in shapes:
                        faults.append(f'{name} is in two files')
                    # A slice gives shape and dtype without reading the tensor.
                    part = f.get_slice(name)
                    shapes[name] = list(part.get_shape())
                    if part.get_dtype() not in FLOATS:
                        faults.append(f'{name} has dtype {part.get_dtype()}')
        except SafetensorError as error:
            raise BadInput(f'{path} is damaged or cut off ({error}). Download it again.') from None
    wanted = {}
    for name, parameter in model.named_parameters():
        wanted[hf_names(name, config, family)[0]] = (name, parameter)
    # Old files also store the rotary frequencies, which follow from the config.
    extra = {n for n in shapes.keys() - wanted.keys() if not n.endswith('rotary_emb.inv_freq')}
    # Some files hold a tied table twice.
    if config.tie_embeddings:
        extra.discard('lm_head.weight')
    for kind, names in (('missing', wanted.keys() - shapes.keys()), ('not known', extra)):
        if names:
            shown = sorted(names)[:5] + ['...'] * (len(names) > 5)
            faults.append(f'{kind}: {", ".join(shown)} ({len(names)})')
    for theirs, (name, parameter) in wanted.items():
        shape = list(ranks.full_shape(model.layout, name, parameter))
        if shapes.get(theirs, shape) != shape:
            faults.append(f'{theirs} has shape {shapes[theirs]}, the config asks for {shape}')
    if faults:
        faults = '; '.join(faults[:8])
        raise BadInput(f'{folder}: the tensors are not those of its config.json. {faults}.')
    # Nothing is copied before everything is checked. Every rank reads all and keeps its part.
    for path in files:
        with safe_open(path, framework='pt') as f:
            for theirs in f.keys():
                if theirs in wanted:
                    name, parameter = wanted[theirs]
                    tensor = turn_pairs(name, f.get_tensor(theirs), config, family, to_ours=True)
                    parameter.copy_(ranks.placed(model.layout, name, parameter, tensor))


def write_weights(folder, model, family, dtype):
    """Writes safetensors files of at most SHARD_BYTES or one tensor, and an index if several."""
    from safetensors.torch import save_file

    # A file's name contains the number of files, so all tensors are assigned before one is written.
    shards = [{}]
    shard_bytes = 0
    total_bytes = 0
    for name, parameter in model.named_parameters():
        n_bytes = parameter.numel() * dtype.itemsize
        for theirs in hf_names(name, model.config, family):
            if shards[-1] and shard_bytes + n_bytes > SHARD_BYTES:
                shards.append({})
                shard_bytes = 0
            shards[-1][theirs] = (name, parameter)
            shard_bytes += n_bytes
            total_bytes += n_bytes
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = 'model.safetensors'
        if len(shards) > 1:
            file = f'model-{i:05d}-of-{len(shards):05d}.safetensors'
        tensors = {}
        for theirs, (name, parameter) in shard.items():
            # safetensors refuses tensors that share memory, as repeated layers do.
            tensor = turn_pairs(name, parameter.detach(), model.config, family, to_ours=False)
            tensors[theirs] = tensor.to(dtype).contiguous().clone()
        save_file(tensors, os.path.join(folder, file), metadata={'format': 'pt'})
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = dict(metadata=dict(total_size=total_bytes), weight_map=weight_map)
        write_json(os.path.join(folder, 'model.safetensors.index.json'), index, indent=2)


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
    patterns = ['config.json', *COMPANIONS]
    if weights:
        patterns += ['*.safetensors', '*.safetensors.index.json']
    with reaching(name, kind='', or_local='Or give a downloaded folder.'):
        return snapshot_download(name, revision=revision, allow_patterns=patterns)


def read_object(path):
    """The dict in a JSON file. Raises BadInput if it holds something else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise BadInput(f'{path} is no JSON object. Download it again, or restore it.')
    return content


def check_companions(folder):
    """Raises BadInput if a file that describes how the model is used is damaged."""
    for name in ('tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json'):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            read_object(path)
    config = os.path.join(folder, 'tokenizer_config.json')
    if os.path.isfile(config):
        read_template(config)


def find_model(path, revision=None, weights=True):
    """Describes a run, checkpoint, imported folder, Hugging Face folder or hub name: a dict.

    folder        where the tokenizer is
    checkpoint    folder of a DCP checkpoint, or None
    state         its state.json, or {}
    hf            the config.json of Hugging Face's model, or None
    model         ModelConfig
    context       tokens
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
        try:
            model = make_config(dict(state['model']), found)
            context = state.get('context') or state['config']['block_size']
        except (KeyError, TypeError) as error:
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
        context = context_of(hf)
    else:
        raise BadInput(f"'{path}' has neither a complete checkpoint nor a model's config.json.")
    check_companions(folder)
    about = dict(folder=folder, checkpoint=found, state=state, hf=hf, model=model, context=context)
    about['fingerprint'] = state.get('tokenizer')
    # A model without a usable tokenizer can still be trained.
    try:
        tokenizer = load_tokenizer(folder)
        if about['fingerprint'] not in (None, tokenizer.fingerprint):
            raise BadInput(
                f"the tokenizer in {folder} ({tokenizer.fingerprint}) is not the one that the "
                f"model was trained with ({about['fingerprint']}). Restore it.")
        about['fingerprint'] = tokenizer.fingerprint
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

    fingerprint: of the shards' tokenizer. None: unknown. Returns the path of the weights.
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
    return about['checkpoint'] or about['folder']


def open_model(path, device, dtype, needs_tokenizer=True):
    """Opens a model for evaluation or generation: (GPT, Tokenizer, find_model's dict)."""
    about = find_model(path)
    if needs_tokenizer and isinstance(about['tokenizer'], BadInput):
        raise BadInput(f"no usable tokenizer for '{path}': {about['tokenizer']}")
    return load_model(about, device, dtype).eval(), about['tokenizer'], about


# -- import and export -----------------------------------------------------------------------------


def copy_companions(source, target):
    os.makedirs(target, exist_ok=True)
    for name in COMPANIONS:
        if os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(target, name))


def import_model(name, revision, out):
    """Converts a Hugging Face model to a folder like a run's, with the weights in their dtype."""
    if os.path.exists(os.path.join(out, 'ckpt')):
        raise BadInput(f"out '{out}' already holds a model. Choose another --out.")
    about = find_model(name, revision)
    if about['checkpoint'] is not None:
        raise BadInput(f"'{name}' is a run already: all scripts accept it as it is.")
    hf = about['hf']
    dtype = hf.get('dtype', hf.get('torch_dtype')) or 'float32'
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadInput(f"{name}: dtype {dtype!r} is not supported; {', '.join(DTYPES)} are.")
    model = load_model(about, 'cpu', DTYPES[dtype])
    copy_companions(about['folder'], out)
    config = asdict(about['model'])
    context = about['context']
    tokenizer = about['tokenizer']
    if isinstance(tokenizer, BadInput):
        fingerprint = None
        note = f'no tokenizer, so the model can be trained but cannot write text: {tokenizer}'
    else:
        fingerprint = tokenizer.fingerprint
        note = f'tokenizer: {tokenizer.vocab_size:,} tokens, fingerprint {fingerprint}'
    # config=None marks an import. check_resumable refuses to resume it.
    state = dict(model=config, config=None, tokenizer=fingerprint, context=context)
    state |= dict(hf=hf, dtype=dtype)
    checkpoint.Checkpointer(out, 0, False).save(0, model, [], state)
    size = f'{sum(p.numel() for p in model.parameters()):,} parameters in {dtype}'
    print(f'{name}: {hf["model_type"]}, {size}, context of {context:,} tokens -> {out}\n{note}')
    print('to continue training, use a config/model file with')
    for key, value in config.items():
        if 'expert' not in key and 'dense' not in key:
            print(f'    {key} = {value!r}')


def export_model(path, out, dtype, template):
    """Converts a run, checkpoint or imported folder to one that transformers and vLLM load.

    dtype: of the weights, 'auto' for that of an imported model, else float32.
    template: name of the chat template to write, or None.
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
    tokenizer = about['tokenizer']
    if isinstance(tokenizer, BadInput):
        tokenizer = None
    if template is not None and tokenizer is None:
        raise BadInput(f"chat_template = '{template}' needs a tokenizer: {about['tokenizer']}")
    if template is not None:
        check_template(tokenizer, template)
    model = load_model(about, 'cpu', DTYPES[dtype])
    hf = about['hf']
    # transformers has no MobileLLM. As a Llama it is the same network.
    if hf is None or hf['model_type'] == 'mobilellm':
        hf = config_to_hf(about['model'], about['context'], tokenizer, dtype)
    copy_companions(about['folder'], out)
    write_weights(out, model, hf['model_type'], DTYPES[dtype])
    dtype_field = 'dtype' if 'dtype' in hf else 'torch_dtype'
    write_json(os.path.join(out, 'config.json'), {**hf, dtype_field: dtype}, indent=2)
    generation = os.path.join(out, 'generation_config.json')
    if tokenizer is not None:
        # A copied tokenizer.json stays, because ours is only a reconstruction of it.
        if not os.path.isfile(os.path.join(out, 'tokenizer.json')):
            save_tokenizer_json(out, tokenizer, about['context'])
        if not os.path.isfile(generation):
            ids = dict(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.stop_ids)
            write_json(generation, ids, indent=2)
    if template is not None:
        with open(os.path.join(out, 'chat_template.jinja'), 'w', encoding='utf-8') as f:
            f.write(JINJA[template])
    notes = ''
    if about['model'].layer_repeat > 1:
        notes += f'; every layer is written {about["model"].layer_repeat} times'
    if tokenizer is None:
        notes += f'; no tokenizer: {about["tokenizer"]}'
    print(f'{about["checkpoint"]} -> {out}: {hf["architectures"][0]}, {dtype}{notes}')
