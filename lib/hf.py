"""Weights, config and tokenizer from and to Hugging Face, without `transformers`.

    python tools/hf.py import --model=HuggingFaceTB/SmolLM2-135M --out=out/smollm2      # from the hub, or a folder in its layout
    python tools/hf.py export --ckpt=out/run --out=out/run_hf                           # transformers and vLLM load the folder

An imported folder looks like a run's (ckpt/step_000000, and the tokenizer's files as they came), so train.py --init_from,
tools/evaluate.py and tools/sample.py take it, and they take a hub name or a local folder of Hugging Face's layout just as well.

Families: Llama (2, 3, 3.1 and later, SmolLM2), Qwen2 and 2.5, Qwen3, MobileLLM-R1 (dense Llama 4 text) and MobileLLM (with or
without layer sharing). What is special about each stands in `config_from_hf`; a config that asks for more is refused by name.
"""
import glob
import json
import math
import os
import shutil
import tempfile
from dataclasses import asdict

import torch

from configurator import BadInput, did_you_mean, read_json
from lib import checkpoint, storage
from lib.tokenizer import load_tokenizer, save_tokenizer_json, stop_ids
from model import GPT, ModelConfig
from ops import ranks

FAMILIES = {'llama': 'LlamaForCausalLM', 'qwen2': 'Qwen2ForCausalLM', 'qwen3': 'Qwen3ForCausalLM',
            'llama4_text': 'Llama4ForCausalLM', 'mobilellm': 'MobileLLMForCausalLM'}
# what stands beside the weights and is kept as it is; chat templates are in one of two places
COMPANIONS = ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json',
              'chat_template.jinja', 'tokenizer.model', 'vocab.json', 'merges.txt', 'LICENSE')
SHARD_BYTES = 5 * 10**9         # of a safetensors file that export writes
NAMES = {'attn_norm': 'input_layernorm', 'attn.wq': 'self_attn.q_proj', 'attn.wk': 'self_attn.k_proj', 'attn.wv': 'self_attn.v_proj',
         'attn.wo': 'self_attn.o_proj', 'attn.q_norm': 'self_attn.q_norm', 'attn.k_norm': 'self_attn.k_norm',
         'ffn_norm': 'post_attention_layernorm', 'ffn.w_gate': 'mlp.gate_proj', 'ffn.w_up': 'mlp.up_proj', 'ffn.w_down': 'mlp.down_proj'}
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


# -- config ------------------------------------------------------------------------------------------------------------

def config_from_hf(hf, where):
    """A config.json (dict) -> ModelConfig. BadInput names the field that this network cannot express."""
    family = hf.get('model_type')
    if family not in FAMILIES:
        raise BadInput(f"{where}: model_type '{family}' ({', '.join(hf.get('architectures') or [])}) is not supported; "
                       f'{", ".join(FAMILIES)} are.{did_you_mean(family or "", FAMILIES)}')

    def needs(field, value, *allowed):
        if value not in allowed:
            raise BadInput(f'{where}: {field} = {value!r} is not supported; this network has {field} = {allowed[0]!r} for {family}.')
    needs('hidden_act', hf.get('hidden_act', 'silu'), 'silu')
    needs('attention_bias', hf.get('attention_bias', False), False)
    needs('mlp_bias', hf.get('mlp_bias', False), False)
    needs('quantization_config', hf.get('quantization_config'), None)
    needs('use_sliding_window', hf.get('use_sliding_window', False), False)
    if family != 'llama4_text':
        needs('layer_types', [t for t in hf.get('layer_types') or [] if t != 'full_attention'][:1], [])
    layers, heads = hf['num_hidden_layers'], hf['num_attention_heads']
    model = dict(vocab_size=hf['vocab_size'], n_layer=layers, n_head=heads, n_kv_head=hf.get('num_key_value_heads') or heads,
                 n_embd=hf['hidden_size'], ffn_dim=hf['intermediate_size'], head_dim=hf.get('head_dim'),
                 tie_embeddings=hf.get('tie_word_embeddings', False), norm_eps=hf.get('rms_norm_eps', 1e-6),
                 qkv_bias=family == 'qwen2', qk_norm=family == 'qwen3')
    if family == 'qwen3' and model['head_dim'] is None:
        model['head_dim'] = 128
    if family == 'mobilellm':
        model.update(tie_embeddings=hf.get('share_embedding', model['tie_embeddings']),
                     layer_repeat=2 if hf.get('layer_sharing') else 1)
    if family == 'llama4_text':         # 1 in no_rope_layers means that the layer does have rotary positions
        interval, step = hf.get('no_rope_layer_interval', 4), hf.get('interleave_moe_layer_step', 1)
        rotary = (hf.get('no_rope_layers') or [int((i + 1) % interval != 0) for i in range(layers)])[:layers]
        needs('no_rope_layers', rotary, [1] * layers)
        moe = hf.get('moe_layers')
        needs('moe_layers', ([*range(step - 1, layers, step)] if step else []) if moe is None else moe, [])
        model.update(ffn_dim=hf['intermediate_size_mlp'], qk_norm=hf.get('use_qk_norm', True), qk_norm_weight=False,
                     norm_eps=hf.get('rms_norm_eps', 1e-5))
    theta, scaling = rope_from_hf(hf, where, 500000.0 if family == 'llama4_text' else 10000.0)
    return ModelConfig(**model, rope_theta=theta, rope_scaling=scaling)


def rope_from_hf(hf, where, default_theta):
    """(rope_theta, rope_scaling) of a config.json in the form of transformers 4 (two fields) or 5 (rope_parameters)."""
    rope = {**(hf.get('rope_scaling') or {}), **(hf.get('rope_parameters') or {})}
    theta = float(rope.get('rope_theta', hf.get('rope_theta', default_theta)))
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if rope.get('partial_rotary_factor', hf.get('partial_rotary_factor', 1.0)) != 1.0:
        raise BadInput(f'{where}: partial_rotary_factor is not supported; all dimensions of a head rotate here.')
    if kind == 'default':
        return theta, None
    original = rope.get('original_max_position_embeddings', hf.get('max_position_embeddings'))
    if kind == 'linear':
        return theta, dict(type='linear', factor=float(rope['factor']))
    if kind == 'llama3':
        return theta, dict(type='llama3', factor=float(rope['factor']), low_freq_factor=float(rope['low_freq_factor']),
                           high_freq_factor=float(rope['high_freq_factor']), original_max_position=original)
    if kind == 'yarn' and rope.get('truncate', True):
        def magnitude(weight):
            return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0
        factor = float(rope.get('factor') or hf['max_position_embeddings'] / original)
        attention = rope.get('attention_factor')
        if attention is None:
            both = rope.get('mscale') and rope.get('mscale_all_dim')
            attention = magnitude(rope['mscale']) / magnitude(rope['mscale_all_dim']) if both else magnitude(1)
        return theta, dict(type='yarn', factor=factor, original_max_position=original, beta_fast=float(rope.get('beta_fast') or 32),
                           beta_slow=float(rope.get('beta_slow') or 1), attention_factor=float(attention))
    raise BadInput(f"{where}: rope_type '{kind}' is not supported; default, linear, llama3 and (truncated) yarn are.")


def context_of(hf):
    """Tokens that the model of a config.json was made for."""
    limit = hf.get('max_position_embeddings', 2048)
    return min(limit, hf.get('attention_chunk_size') or limit) if hf['model_type'] == 'llama4_text' else limit


def config_to_hf(config, context, tokenizer, dtype):
    """ModelConfig -> the config.json (dict) of the family that computes the same."""
    c = config
    if c.n_expert:
        raise BadInput('mixtures of experts cannot be exported: no family of Hugging Face that is known here computes the same.')
    family = ('qwen3' if c.qk_norm_weight else 'llama4_text') if c.qk_norm else 'qwen2' if c.qkv_bias else 'llama'
    if c.qk_norm and c.qkv_bias:
        raise BadInput('no family of Hugging Face has both qk_norm and qkv_bias, so this model cannot be exported.')
    hf = dict(architectures=[FAMILIES[family]], model_type=family, vocab_size=c.vocab_size, hidden_size=c.n_embd,
              intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layer * c.layer_repeat, num_attention_heads=c.n_head,
              num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, hidden_act='silu', max_position_embeddings=context,
              rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, rope_scaling=None, tie_word_embeddings=c.tie_embeddings,
              attention_bias=False, attention_dropout=0.0, initializer_range=0.02, use_cache=True, torch_dtype=dtype)
    if family == 'qwen2':
        del hf['attention_bias']
        if c.head_dim * c.n_head != c.n_embd:
            raise BadInput(f'Qwen2 has no head_dim other than n_embd / n_head, so this model (head_dim = {c.head_dim}) cannot be exported.')
    if family == 'llama':
        hf['mlp_bias'] = False
    if family == 'llama4_text':
        hf.update(intermediate_size_mlp=c.ffn_dim, use_qk_norm=True, no_rope_layers=[1] * c.n_layer * c.layer_repeat, moe_layers=[],
                  interleave_moe_layer_step=0, num_local_experts=0, num_experts_per_tok=0, attn_temperature_tuning=False,
                  attention_chunk_size=context)
    if c.rope_scaling is not None:
        scaling = {'type': 'llama3', **c.rope_scaling}
        hf['rope_scaling'] = {{'type': 'rope_type', 'original_max_position': 'original_max_position_embeddings'}.get(k, k): v
                              for k, v in scaling.items()}
    if tokenizer is not None:
        hf.update(bos_token_id=tokenizer.bos_id, eos_token_id=stop_ids(tokenizer))
    return hf


# -- tensors -----------------------------------------------------------------------------------------------------------

def hf_names(name, config, family):
    """The names under which our parameter stands in a file of that family: one, or layer_repeat of them in an export."""
    if not name.startswith('blocks.'):
        return [{'embed.weight': 'model.embed_tokens.weight', 'norm.weight': 'model.norm.weight'}.get(name, name)]
    _, layer, rest = name.split('.', 2)
    module, kind = rest.rsplit('.', 1)
    theirs = NAMES[module].replace('mlp.', 'feed_forward.') if family == 'llama4_text' else NAMES[module]
    repeat = config.layer_repeat if family != 'mobilellm' else 1
    return [f'model.layers.{int(layer) * repeat + r}.{theirs}.{kind}' for r in range(repeat)]


def turn_pairs(name, tensor, config, family, to_ours):
    """Llama 4 rotates neighbouring dimensions of a head, we rotate halves: the rows of wq and wk change places."""
    if family != 'llama4_text' or not name.endswith(('wq.weight', 'wk.weight')):
        return tensor
    shape = (-1, config.head_dim // 2, 2) if to_ours else (-1, 2, config.head_dim // 2)
    return tensor.view(*shape, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


def safetensors_files(folder):
    """Path of every safetensors file of a model folder. BadInput when there are none, or one that the index names is missing."""
    index = os.path.join(folder, 'model.safetensors.index.json')
    if os.path.isfile(index):
        files = sorted({os.path.join(folder, name) for name in read_json(index)['weight_map'].values()})
    else:
        files = sorted(glob.glob(os.path.join(folder, '*.safetensors')))
    missing = [path for path in files if not os.path.isfile(path)]
    if missing or not files:
        raise BadInput(f'{folder}: ' + (f'{", ".join(map(os.path.basename, missing))} is missing; the index names it.' if missing else
                                        'there is no .safetensors file. (A .bin or .pth file must be converted to safetensors first.)'))
    return files


@torch.no_grad()
def read_weights(folder, hf, model):
    """Copies the weights of a Hugging Face folder into `model` in place, tensor by tensor.

    The model may be sharded by FSDP2 (every rank reads and keeps its part) and of any dtype. BadInput for missing and extra
    tensors, another shape and a damaged file; nothing has been copied then.
    """
    from safetensors import SafetensorError, safe_open
    family, config = hf['model_type'], model.config
    wanted = {hf_names(name, config, family)[0]: (name, parameter)
              for name, parameter in model.named_parameters()}
    found = {}
    for path in safetensors_files(folder):
        try:
            with safe_open(path, framework='pt') as f:
                found |= {name: (path, tuple(f.get_slice(name).get_shape())) for name in f.keys()}
        except SafetensorError as error:
            raise BadInput(f'{path} is damaged or cut off ({error}). Download it again.') from None
    spare = {name for name in found if name.endswith('rotary_emb.inv_freq') or config.tie_embeddings and name == 'lm_head.weight'}
    faults = [f'{kind}: {", ".join(sorted(names)[:5])}{" ..." if len(names) > 5 else ""} ({len(names)})' for kind, names in (
        ('missing', wanted.keys() - found.keys()), ('not known', found.keys() - wanted.keys() - spare)) if names]
    faults += [f'{name} has shape {list(found[name][1])}, the config asks for {list(ranks.full_shape(model.layout, ours, parameter))}'
               for name, (ours, parameter) in wanted.items() if name in found and found[name][1] != tuple(ranks.full_shape(model.layout, ours, parameter))]
    if faults:
        raise BadInput(f'{folder}: the tensors are not those of its config.json. ' + '; '.join(faults[:8]) + '.')
    for path in sorted({path for path, _ in found.values()}):
        with safe_open(path, framework='pt') as f:
            for theirs in f.keys():
                if theirs in wanted:
                    name, parameter = wanted[theirs]
                    tensor = turn_pairs(name, f.get_tensor(theirs), config, family, to_ours=True)
                    parameter.copy_(ranks.placed(model.layout, name, parameter, tensor))


def write_weights(folder, model, family, dtype):
    """Writes the weights as safetensors files of at most SHARD_BYTES (or one tensor), with an index when there are several."""
    from safetensors.torch import save_file
    shards, sizes = [{}], 0
    for name, parameter in model.named_parameters():
        for theirs in hf_names(name, model.config, family):
            n_bytes = parameter.numel() * dtype.itemsize
            if shards[-1] and sum(p.numel() for _, p in shards[-1].values()) * dtype.itemsize + n_bytes > SHARD_BYTES:
                shards.append({})
            shards[-1][theirs] = (name, parameter)
            sizes += n_bytes
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        path = 'model.safetensors' if len(shards) == 1 else f'model-{i:05d}-of-{len(shards):05d}.safetensors'
        tensors = {theirs: turn_pairs(name, p.detach(), model.config, family, to_ours=False).to(dtype).contiguous().clone()
                   for theirs, (name, p) in shard.items()}
        save_file(tensors, os.path.join(folder, path), metadata={'format': 'pt'})
        weight_map |= dict.fromkeys(tensors, path)
    if len(shards) > 1:
        write_json(os.path.join(folder, 'model.safetensors.index.json'), dict(metadata=dict(total_size=sizes), weight_map=weight_map))


def write_json(path, content):
    with open(path, 'w', encoding='utf-8') as f:
        json.dump(content, f, indent=2, ensure_ascii=False)


# -- models of any kind ------------------------------------------------------------------------------------------------

def find_folder(name, revision=None, weights=True):
    """A local folder as it is; a hub name (owner/name) is downloaded into Hugging Face's cache. Returns the folder."""
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    from lib.reading import reaching
    try:
        validate_repo_id(name)
        if name.count('/') != 1 or os.path.isdir(name.split('/')[0]):
            raise HFValidationError
    except HFValidationError:
        raise BadInput(f"'{name}' is neither a folder here nor a model of the hub (owner/name).") from None
    with reaching(name, kind='', or_local='Or give a downloaded folder.'):
        return snapshot_download(name, revision=revision, allow_patterns=['config.json', *COMPANIONS] + (
            ['*.safetensors', '*.safetensors.index.json'] if weights else []))


def find_model(path, revision=None, weights=True):
    """What a run folder, a checkpoint, an imported folder, a Hugging Face folder or a hub name holds: a dict. weights=False: none are downloaded.

    folder (where the tokenizer is), checkpoint (DCP folder) or None, hf (its config.json) or None, model (ModelConfig), context
    (tokens), tokenizer (Tokenizer, or the BadInput that says why there is none), fingerprint (of the tokenizer, None: unknown),
    add_bos (whether text begins with BOS), prefix_id (the token before a text without context).
    """
    folder = path if storage.is_remote(path) else find_folder(path, revision, weights)
    is_ours = storage.is_folder(os.path.join(folder, 'ckpt')) or storage.is_file(os.path.join(folder, 'manifest.json'))
    found = checkpoint.find_checkpoint(folder) if is_ours else None
    if found is not None:
        state = checkpoint.read_state(found)
        run = os.path.dirname(os.path.dirname(found if storage.is_remote(found) else os.path.abspath(found)))
        about = dict(folder=storage.download(run, tempfile.mkdtemp() if storage.is_remote(run) else None), checkpoint=found, hf=state.get('hf'), state=state,
                     model=ModelConfig(**state['model']), context=state.get('context') or state['config']['block_size'])
    elif os.path.isfile(os.path.join(folder, 'config.json')) and 'model_type' in read_json(os.path.join(folder, 'config.json')):
        hf = read_json(os.path.join(folder, 'config.json'))
        try:
            about = dict(folder=folder, checkpoint=None, hf=hf, model=config_from_hf(hf, f'{path}/config.json'), context=context_of(hf))
        except KeyError as error:
            raise BadInput(f'{path}/config.json has no field {error}, which a {hf["model_type"]} model needs.') from None
    else:
        raise BadInput(f"'{path}' holds neither a complete checkpoint (ckpt/) nor a Hugging Face model (config.json with model_type).")
    about['fingerprint'] = about['state']['tokenizer'] if found is not None else None
    try:
        about['tokenizer'] = load_tokenizer(about['folder'])
        about['fingerprint'] = about['tokenizer'].fingerprint
        about['add_bos'], about['prefix_id'] = adds_bos(about['folder']), prefix_id(about['folder'], about['tokenizer'])
        if about['tokenizer'].vocab_size > about['model'].vocab_size:
            raise BadInput(f'{path}: the tokenizer has {about["tokenizer"].vocab_size:,} tokens, the model {about["model"].vocab_size:,}: '
                           'they do not belong together.')
    except BadInput as error:
        about['tokenizer'] = error
    return about


def adds_bos(folder):
    """Whether text is to begin with BOS: so it is in our own runs, and where an imported tokenizer.json puts it there."""
    path = os.path.join(folder, 'tokenizer.json')
    if not os.path.isfile(path):
        return True
    post = read_json(path).get('post_processor') or {}
    return any('SpecialToken' in piece for step in post.get('processors', [post]) for piece in (step.get('single') or [])[:1])


def prefix_id(folder, tokenizer):
    """The token before a text that has no context, as lm-eval takes it: tokenizer_config.json's BOS, else its EOS, else ours."""
    path = os.path.join(folder, 'tokenizer_config.json')
    names = read_json(path) if os.path.isfile(path) else {}
    for name in (names.get('bos_token'), names.get('eos_token')):
        name = name['content'] if isinstance(name, dict) else name
        if name in tokenizer.encoding._special_tokens:
            return tokenizer.encoding._special_tokens[name]
    return tokenizer.bos_id


def load_weights(about, model):
    """The weights of what find_model found, into `model` in place (sharded or not, any dtype)."""
    if about['checkpoint'] is not None:
        checkpoint.load_weights(about['checkpoint'], model)
    else:
        read_weights(about['folder'], about['hf'], model)


def start_from(path, model, fingerprint):
    """init_from: the weights of another run or model into `model`, in place. fingerprint: of the shards' tokenizer, None: unknown. Returns where they are.

    BadInput when it is another model (rope_theta may differ), or of another tokenizer.
    """
    about = find_model(path)
    checkpoint.check_same_model(path, asdict(about['model']), {**asdict(model.config), 'rope_theta': about['model'].rope_theta})
    if fingerprint is not None and about['fingerprint'] not in (None, fingerprint):
        raise BadInput(f"init_from = '{path}' has another tokenizer ({about['fingerprint']}) than these shards ({fingerprint}). Prepare the sources "
                       'with its tokenizer.')
    load_weights(about, model)
    return about['checkpoint'] or about['folder']


def open_model(path, device, dtype, needs_tokenizer=True):
    """A model for evaluation or generation: (GPT in eval mode on the device, Tokenizer, find_model's dict)."""
    about = find_model(path)
    if needs_tokenizer and isinstance(about['tokenizer'], BadInput):
        raise BadInput(f"no usable tokenizer for '{path}': {about['tokenizer']}")
    with torch.device('meta'):
        model = GPT(about['model'])
    model = model.frozen(dtype).to_empty(device=device).eval()
    load_weights(about, model)
    return model, about['tokenizer'], about


# -- import and export -------------------------------------------------------------------------------------------------

def import_model(name, revision, out):
    """A Hugging Face model -> a folder like a run's, weights in their own dtype."""
    if os.path.exists(os.path.join(out, 'ckpt')):
        raise BadInput(f"out '{out}' already holds a model. Choose another --out.")
    about = find_model(name, revision)
    if about['checkpoint'] is not None:
        raise BadInput(f"'{name}' is a folder of this project already; train.py, tools/evaluate.py and tools/sample.py take it as it is.")
    hf = about['hf']
    dtype = hf.get('dtype', hf.get('torch_dtype')) or 'float32'
    if dtype not in DTYPES:
        raise BadInput(f"{name}/config.json: dtype '{dtype}' is not supported; {', '.join(DTYPES)} are.")
    with torch.device('meta'):
        model = GPT(about['model'])
    model = model.to(DTYPES[dtype]).to_empty(device='cpu')
    read_weights(about['folder'], hf, model)
    os.makedirs(out, exist_ok=True)
    for file in COMPANIONS:
        if os.path.isfile(os.path.join(about['folder'], file)):
            shutil.copyfile(os.path.join(about['folder'], file), os.path.join(out, file))
    usable = not isinstance(about['tokenizer'], BadInput)
    checkpoint.Checkpointer(out, 0, False).save(0, model, [], dict(
        model=asdict(about['model']), config=None, tokenizer=about['tokenizer'].fingerprint if usable else None,
        context=about['context'], hf=hf, dtype=dtype))
    n = sum(p.numel() for p in model.parameters())
    print(f'{name}: {hf["model_type"]}, {n:,} parameters in {dtype}, context of {about["context"]:,} tokens -> {out}')
    print(f'tokenizer: {about["tokenizer"].vocab_size:,} tokens, fingerprint {about["tokenizer"].fingerprint}' if usable else
          f'no tokenizer (the weights can be trained on, text cannot be made): {about["tokenizer"]}')
    print('to train on: a config/model file with\n' + ''.join(
        f'    {key} = {value!r}\n' for key, value in asdict(about['model']).items() if 'expert' not in key and 'dense' not in key))


def export_model(path, out, dtype, template):
    """A run, a checkpoint or an imported folder -> a folder that transformers and vLLM load."""
    from lib.chat import JINJA, check_template
    about = find_model(path)
    if about['checkpoint'] is None:
        raise BadInput(f"'{path}' is a Hugging Face model already.")
    if os.path.exists(out) and os.listdir(out):
        raise BadInput(f"out '{out}' is not empty. Choose another --out.")
    if dtype not in ('auto', *DTYPES):
        raise BadInput(f"dtype = '{dtype}' must be auto or one of {', '.join(DTYPES)}.")
    dtype = about['state'].get('dtype', 'float32') if dtype == 'auto' else dtype
    tokenizer = None if isinstance(about['tokenizer'], BadInput) else about['tokenizer']
    if template is not None and tokenizer is None:
        raise BadInput(f"chat_template = '{template}' needs a tokenizer: {about['tokenizer']}")
    if template is not None:
        check_template(tokenizer, template)
    with torch.device('meta'):
        model = GPT(about['model'])
    model = model.to(DTYPES[dtype]).to_empty(device='cpu')
    load_weights(about, model)
    hf, context = about['hf'], about['context']
    if hf is None or hf['model_type'] == 'mobilellm':           # transformers knows no MobileLLM; as a Llama it is the same network
        hf = config_to_hf(about['model'], context, tokenizer, dtype)
    os.makedirs(out, exist_ok=True)
    write_weights(out, model, hf['model_type'], DTYPES[dtype])
    write_json(os.path.join(out, 'config.json'), {**hf, 'dtype' if 'dtype' in hf else 'torch_dtype': dtype})
    for file in COMPANIONS:
        if os.path.isfile(os.path.join(about['folder'], file)):
            shutil.copyfile(os.path.join(about['folder'], file), os.path.join(out, file))
    if tokenizer is not None and not os.path.isfile(os.path.join(out, 'tokenizer.json')):
        save_tokenizer_json(out, tokenizer, about['add_bos'], context)
    if tokenizer is not None and not os.path.isfile(os.path.join(out, 'generation_config.json')):
        write_json(os.path.join(out, 'generation_config.json'), dict(bos_token_id=tokenizer.bos_id, eos_token_id=stop_ids(tokenizer)))
    if template is not None:
        with open(os.path.join(out, 'chat_template.jinja'), 'w', encoding='utf-8') as f:
            f.write(JINJA[template])
    print(f'{about["checkpoint"]} -> {out}: {hf["architectures"][0]}, {dtype}'
          + ('' if about['model'].layer_repeat == 1 else f'; every layer stands {about["model"].layer_repeat} times in it')
          + ('' if tokenizer is not None else f'; no tokenizer: {about["tokenizer"]}'))
