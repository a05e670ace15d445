"""What a config.json of Hugging Face says about the network, and how ours is said in one.

`config_from_hf` contains what is special about each family, and `config_to_hf` writes the family
that computes the same. A config that needs anything else is refused with the name of the field.
"""

import functools
import inspect
import math

from configurator import BadInput, check_type, parse_knobs, read_source
from model import ModelConfig

FAMILIES = {
    'llama': 'LlamaForCausalLM',
    'qwen2': 'Qwen2ForCausalLM',
    'qwen3': 'Qwen3ForCausalLM',
    'qwen3_moe': 'Qwen3MoeForCausalLM',
    'mistral': 'MistralForCausalLM',
    'smollm3': 'SmolLM3ForCausalLM',
    'llama4_text': 'Llama4ForCausalLM',
    'mobilellm': 'MobileLLMForCausalLM',
}
# transformers has no MobileLLM. As a Llama it is the same network.
EXPORTED = tuple(family for family in FAMILIES if family != 'mobilellm')
# What transformers takes for a field that a config.json leaves out.
DEFAULTS = dict(rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=False)
FAMILY_DEFAULTS = {
    'llama': dict(max_position_embeddings=2048),
    'mistral': dict(max_position_embeddings=131072, sliding_window=4096),
    'qwen2': dict(max_position_embeddings=32768),
    'qwen3': dict(max_position_embeddings=32768, head_dim=128),
    'qwen3_moe': dict(
        max_position_embeddings=32768, num_experts_per_tok=8, moe_intermediate_size=768,
        norm_topk_prob=False, decoder_sparse_step=1),
    'smollm3': dict(
        max_position_embeddings=32768, rope_theta=2000000.0, tie_word_embeddings=True,
        no_rope_layer_interval=4),
    'llama4_text': dict(
        max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500000.0, head_dim=128,
        no_rope_layer_interval=4, interleave_moe_layer_step=1, attention_chunk_size=8192,
        use_qk_norm=True),
    'mobilellm': dict(max_position_embeddings=2048),
}
ORIGINAL = 'original_max_position_embeddings'
# Names of the dtypes that weights may have here.
DTYPES = ('float32', 'bfloat16', 'float16')
# Fields of a config.json with their types. SIZES must be at least 1 where they are given.
REQUIRED = ('vocab_size', 'num_hidden_layers', 'num_attention_heads', 'hidden_size',
            'intermediate_size')
SIZES = (*REQUIRED, 'num_key_value_heads', 'head_dim', 'max_position_embeddings',
         'intermediate_size_mlp', 'attention_chunk_size', 'no_rope_layer_interval',
         'sliding_window', 'moe_intermediate_size', 'decoder_sparse_step', ORIGINAL)
FIELDS = {name: 'int | None' for name in SIZES}
FIELDS |= dict.fromkeys(('num_experts', 'num_local_experts', 'num_experts_per_tok'), 'int | None')
FIELDS |= dict.fromkeys(
    ('rms_norm_eps', 'rope_theta', 'partial_rotary_factor', 'attention_dropout'), 'float | None')
FIELDS |= dict.fromkeys(('rope_scaling', 'rope_parameters'), 'dict | None')
FIELDS |= dict.fromkeys(
    ('layer_types', 'no_rope_layers', 'moe_layers', 'mlp_only_layers', 'architectures'),
    'list | None')
FIELDS |= dict.fromkeys(
    ('share_embedding', 'layer_sharing', 'use_qk_norm', 'norm_topk_prob'), 'bool | None')
FIELDS |= dict.fromkeys(('dtype', 'torch_dtype'), 'str | None')
FIELDS |= dict(tie_word_embeddings='bool', interleave_moe_layer_step='int')
FIELDS['pretraining_tp'] = 'int | None'     # transformers computes the same with any value
# Fields that other networks have, with the value that changes nothing. null changes nothing, too.
NEUTRAL = dict(
    attention_bias=False, mlp_bias=False, hidden_act='silu', quantization_config=None,
    use_sliding_window=False, rope_interleaved=False, attn_logit_softcapping=None,
    final_logit_softcapping=None, logit_scale=1.0, logits_scaling=1.0, embedding_multiplier=1.0,
    residual_multiplier=1.0, attention_multiplier=None, query_pre_attn_scalar=None, clip_qkv=None,
    alibi=False, parallel_attn=False, use_parallel_residual=False)
# Keys of rope_parameters. `type` and `finetuned` are in older files.
ROPE_KEYS = {
    'rope_type', 'type', 'rope_theta', 'partial_rotary_factor', 'factor', 'low_freq_factor',
    'high_freq_factor', ORIGINAL, 'beta_fast', 'beta_slow', 'attention_factor', 'mscale',
    'mscale_all_dim', 'truncate', 'finetuned'}
MOST_LAYERS = 100_000


# -- from a config.json ----------------------------------------------------------------------------


def check_fields(hf, where):
    """Raises BadInput for a field of a config.json that has another type or cannot be right."""
    for name, wanted in FIELDS.items():
        if name not in hf:
            continue
        try:
            value = check_type(hf[name], wanted, None)
        except TypeError as error:
            raise BadInput(f'{where}: {name} {error}.') from None
        if name in REQUIRED and value is None:
            raise BadInput(f'{where}: {name} must be int, got NoneType None.')
        if name in SIZES and value is not None and value < 1:
            raise BadInput(f'{where}: {name} = {value} must be at least 1.')
    if hf.get('num_hidden_layers', 1) > MOST_LAYERS:
        raise BadInput(f'{where}: num_hidden_layers must be at most {MOST_LAYERS:,}.')
    for name in ('dtype', 'torch_dtype'):
        value = hf.get(name)
        if value is not None and value not in (*DTYPES, 'float64'):
            raise BadInput(f'{where}: {name} {value!r} is not supported; {", ".join(DTYPES)} are.')


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


def require(where, field, value, wanted):
    if value != wanted:
        raise BadInput(f'{where}: {field} = {value!r} is not supported, only {wanted!r}.')


def with_defaults(hf):
    """A config.json (dict) with what transformers takes for the fields that it leaves out."""
    return {**DEFAULTS, **FAMILY_DEFAULTS[hf['model_type']], **hf}


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
    hf = with_defaults(hf)
    check_network(hf, where)
    n_layer = hf['num_hidden_layers']
    n_head = hf['num_attention_heads']
    model = dict(vocab_size=hf['vocab_size'], n_layer=n_layer, n_embd=hf['hidden_size'])
    model |= dict(n_head=n_head, n_kv_head=hf.get('num_key_value_heads') or n_head)
    model |= dict(ffn_dim=hf['intermediate_size'], head_dim=hf.get('head_dim'))
    model['tie_embeddings'] = hf['tie_word_embeddings']
    model['norm_eps'] = positive(hf, 'rms_norm_eps', where)
    model |= dict(qkv_bias=family == 'qwen2', qk_norm=family in ('qwen3', 'qwen3_moe'))
    if family == 'qwen3':
        # This default does not follow from n_embd / n_head.
        model['head_dim'] = model['head_dim'] or 128
    elif family == 'qwen3_moe':
        model |= experts_from_hf(hf, where)
    elif family == 'smollm3':
        rotary = rotary_layers(hf, where)
        model['nope_layers'] = [i for i in range(n_layer) if not rotary[i]]
    elif family == 'mobilellm':
        if hf.get('share_embedding') is not None:
            model['tie_embeddings'] = hf['share_embedding']
        model['layer_repeat'] = 2 if hf.get('layer_sharing') else 1
    elif family == 'llama4_text':
        if not all(rotary_layers(hf, where)):
            raise BadInput(f'{where}: no_rope_layers must be 1 for all of the {n_layer} layers.')
        moe_layers = hf.get('moe_layers')
        if moe_layers is None:
            step = hf['interleave_moe_layer_step']
            moe_layers = list(range(step - 1, n_layer, step)) if step else []
        require(where, 'moe_layers', moe_layers, [])
        # In Llama 4 intermediate_size is the width of an expert. Dense layers have this one.
        model['ffn_dim'] = hf['intermediate_size_mlp']
        # Llama 4 norms after the rotation, and this network before it. Without a learned scale both
        # are the same, because a rotation keeps the norm.
        model |= dict(qk_norm=bool(hf['use_qk_norm']), qk_norm_weight=False)
    theta, scaling = rope_from_hf(hf, where)
    if family == 'llama4_text' and model['qk_norm'] and scales_attention(scaling):
        raise BadInput(
            f"{where}: rope_type 'yarn' with an attention_factor other than 1.0 is not supported "
            'for Llama 4 with use_qk_norm, whose norms come after the rotation and undo it.')
    architectures = hf.get('architectures') or [FAMILIES[family]]
    # The case differs in some files of the first Llama.
    if [str(name).lower() for name in architectures] != [FAMILIES[family].lower()]:
        raise BadInput(
            f'{where}: architectures = {architectures!r:.200} is not supported for model_type '
            f"'{family}', only {[FAMILIES[family]]}.")
    return make_config(dict(**model, rope_theta=theta, rope_scaling=scaling), where)


def check_network(hf, where):
    """Raises BadInput for a field with which the model is another network than ours."""
    family = hf['model_type']
    for field, wanted in NEUTRAL.items():
        # null would switch the activation off.
        if hf.get(field) is not None or field == 'hidden_act':
            require(where, field, hf.get(field, wanted), wanted)
    # Within the context, the attention chunks of Llama 4 are full attention.
    allowed = ('full_attention', 'chunked_attention')[: 1 + (family == 'llama4_text')]
    partial = [t for t in hf.get('layer_types') or [] if t not in allowed]
    require(where, 'layer_types', partial[:1], [])
    window = hf.get('sliding_window')
    # The others say by use_sliding_window, which must be off, whether they have one.
    is_off = family not in ('mistral', 'llama') or hf.get('use_sliding_window') is False
    if window is not None and not is_off and window < context_of(hf):
        raise BadInput(
            f'{where}: sliding_window = {window} is not supported, because it is shorter than the '
            f'context (max_position_embeddings = {context_of(hf)}). null is, and the context.')


def rotary_layers(hf, where):
    """Whether each layer has rotary positions, from the misleading no_rope_layers: list of 0, 1."""
    n_layer = hf['num_hidden_layers']
    # A 1 in no_rope_layers means that the layer does have rotary positions.
    rotary = hf.get('no_rope_layers')
    if not rotary:
        interval = hf['no_rope_layer_interval'] or 4
        return [int((i + 1) % interval != 0) for i in range(n_layer)]
    if len(rotary) < n_layer or not all(value in (0, 1) for value in rotary):
        raise BadInput(
            f'{where}: no_rope_layers must have a 0 or a 1 for each of the {n_layer} layers.')
    return [int(value) for value in rotary[:n_layer]]


def experts_from_hf(hf, where):
    """The fields of ModelConfig about the experts of a Qwen3-MoE."""
    n_layer = hf['num_hidden_layers']
    # transformers 5 writes num_local_experts for num_experts.
    n_expert = hf.get('num_experts')
    if hf.get('num_local_experts') is not None:
        n_expert = hf['num_local_experts']
    n_active = hf['num_experts_per_tok']
    step = hf['decoder_sparse_step'] or 1
    dense = hf.get('mlp_only_layers') or []
    sparse = [i for i in range(n_layer) if (i + 1) % step == 0 and i not in dense]
    if n_expert is None:
        n_expert = 128      # the default of transformers
    if not n_expert or not sparse:
        return {}
    if sparse != list(range(sparse[0], n_layer)):
        raise BadInput(
            f'{where}: decoder_sparse_step = {step} and mlp_only_layers = {dense} are not '
            'supported, only dense layers before all layers with experts.')
    # This network divides the weights of the chosen experts by their sum, if there are several.
    require(where, 'norm_topk_prob', bool(hf['norm_topk_prob']), (n_active or 0) > 1)
    return dict(
        n_expert=n_expert, n_expert_active=n_active, n_dense_layer=sparse[0],
        expert_ffn_dim=hf['moe_intermediate_size'], expert_score='softmax')


def scales_attention(scaling):
    """Whether a rope_scaling of ours also scales queries and keys, as YaRN does."""
    return scaling is not None and scaling.get('attention_factor', 1.0) != 1.0


def rope_from_hf(hf, where):
    """Returns (rope_theta, rope_scaling) of a config.json with defaults."""
    # transformers 4 writes two fields, transformers 5 rope_parameters. Files that have both forms
    # must say the same in both, because readers differ in what they take.
    forms = [hf[name] for name in ('rope_scaling', 'rope_parameters') if hf.get(name)] or [{}]
    found = [rope_of_form(hf, rope, where) for rope in forms]
    if found[0] != found[-1]:
        raise BadInput(
            f'{where}: rope_scaling and rope_parameters contradict each other: (theta, scaling) '
            f'are {found[0]} and {found[1]}. Delete the wrong one.')
    return found[0]


def rope_of_form(hf, rope, where):
    for key, value in rope.items():
        if key not in ROPE_KEYS and value is not None:
            raise BadInput(
                f'{where}: {key!r} in the parameters of the rotary positions is not supported.')
    theta = positive({**hf, **rope}, 'rope_theta', where)
    kind = rope.get('rope_type', rope.get('type', 'default'))
    for fields in (rope, hf):
        if fields.get('partial_rotary_factor') not in (None, 1.0):
            raise BadInput(f'{where}: partial_rotary_factor is not supported, only 1.0.')
    if kind == 'default':
        return theta, None
    # A field outside of rope_parameters counts more, as in transformers.
    original = rope.get(ORIGINAL, hf['max_position_embeddings'])
    if hf.get(ORIGINAL) is not None:
        original = hf[ORIGINAL]
    scaling = dict(type=kind)
    if kind == 'linear':
        scaling['factor'] = positive(rope, 'factor', where)
    elif kind == 'llama3':
        for name in ('factor', 'low_freq_factor', 'high_freq_factor'):
            scaling[name] = positive(rope, name, where)
        positive({ORIGINAL: original}, ORIGINAL, where)
        scaling['original_max_position'] = original
    elif kind == 'yarn' and rope.get('truncate', True):
        positive({ORIGINAL: original}, ORIGINAL, where)
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


def limit_of(hf):
    """The tokens up to which full attention, as here, is the attention of the model of a
    config.json: the length of Llama 4's chunks or of a sliding window. None: any number."""
    hf = with_defaults(hf)
    if hf['model_type'] == 'llama4_text':
        layer_types = hf.get('layer_types') or ['chunked_attention']
        return hf['attention_chunk_size'] if 'chunked_attention' in layer_types else None
    return hf['sliding_window'] if hf['model_type'] == 'mistral' else None


def context_of(hf):
    """The context, in tokens, that the model of a config.json was made for."""
    hf = with_defaults(hf)
    context = hf['max_position_embeddings'] or 2048
    if hf['model_type'] == 'llama4_text':
        return min(context, limit_of(hf) or context)
    return context


# -- to a config.json ------------------------------------------------------------------------------


def why_not(config, family):
    """What of a model a family of Hugging Face cannot express, as a phrase; '' if it can."""
    c = config
    if c.n_expert and family != 'qwen3_moe':
        return 'it has no experts (n_expert)'
    if c.n_expert and (c.expert_score != 'softmax' or c.n_shared_expert or c.layer_repeat > 1):
        return (
            'its experts have softmax scores (expert_score), none is shared (n_shared_expert), and '
            'no layer is repeated (layer_repeat)')
    if not c.n_expert and family == 'qwen3_moe':
        return 'it has experts (n_expert)'
    if c.qkv_bias != (family == 'qwen2'):
        has = 'biases' if family == 'qwen2' else 'no biases'
        return f'its queries, keys and values have {has} (qkv_bias)'
    if c.qk_norm and not family.startswith(('qwen3', 'llama4')):
        return 'it has no norms of queries and keys (qk_norm)'
    if c.qk_norm and c.qk_norm_weight and family == 'llama4_text':
        return 'its norms of queries and keys have no weights (qk_norm_weight)'
    if c.qk_norm and scales_attention(c.rope_scaling) and family == 'llama4_text':
        return 'its norms of queries and keys undo the attention_factor of rope_scaling'
    if not c.qk_norm and family.startswith('qwen3'):
        return 'it has norms of queries and keys (qk_norm)'
    if c.nope_layers and family != 'smollm3':
        return 'all of its layers have rotary positions (nope_layers)'
    if family == 'qwen2' and c.head_dim * c.n_head != c.n_embd:
        return 'its heads have the width n_embd / n_head (head_dim)'
    return ''


def family_of(config):
    """The family of Hugging Face that a model of ours is exported as."""
    if config.n_expert:
        return 'qwen3_moe'
    if config.nope_layers:
        return 'smollm3'
    if config.qk_norm:
        return 'qwen3'
    return 'qwen2' if config.qkv_bias else 'llama'


def rope_to_hf(config):
    """The fields of a config.json about rotary positions, in the forms of transformers 5 and 4.

    transformers 5 reads and writes rope_parameters. Readers of the older form would take their
    default of rope_theta, without a word, if it were missing.
    """
    rope = dict(rope_theta=config.rope_theta, rope_type='default')
    names = dict(type='rope_type', original_max_position=ORIGINAL)
    if config.rope_scaling is not None:
        scaling = {'type': 'llama3', **config.rope_scaling}
        rope |= {names.get(key, key): value for key, value in scaling.items()}
    older = {key: value for key, value in rope.items() if key != 'rope_theta'}
    return dict(
        rope_parameters=rope, rope_theta=config.rope_theta,
        rope_scaling=None if config.rope_scaling is None else older)


def config_to_hf(config, family, context):
    """Converts a ModelConfig to the config.json (dict) of a family that computes the same.

    context: in tokens
    """
    c = config
    # No exported family repeats layers, so a repeated layer is written several times.
    n_layer = c.n_layer * c.layer_repeat
    hf = dict(architectures=[FAMILIES[family]], model_type=family, vocab_size=c.vocab_size)
    hf |= dict(hidden_size=c.n_embd, intermediate_size=c.ffn_dim, num_hidden_layers=n_layer)
    hf |= dict(num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim)
    hf |= dict(hidden_act='silu', max_position_embeddings=context, rms_norm_eps=c.norm_eps)
    hf |= dict(attention_dropout=0.0, initializer_range=0.02, use_cache=True)
    # transformers would put the ids of the published models here.
    hf |= dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    if family not in ('qwen2', 'mistral'):
        hf['attention_bias'] = False
    if family in ('llama', 'smollm3'):
        hf['mlp_bias'] = False
    if family == 'mistral':
        hf['sliding_window'] = None
    elif family == 'smollm3':
        nope = [i * c.layer_repeat + j for i in c.nope_layers or [] for j in range(c.layer_repeat)]
        hf['no_rope_layers'] = [int(i not in nope) for i in range(n_layer)]
        hf |= dict(use_sliding_window=False, sliding_window=None)
    elif family == 'qwen3_moe':
        # transformers 5 writes num_local_experts, and older readers know num_experts.
        hf |= dict(num_experts=c.n_expert, num_local_experts=c.n_expert)
        hf |= dict(num_experts_per_tok=c.n_expert_active, moe_intermediate_size=c.expert_ffn_dim)
        hf |= dict(decoder_sparse_step=1, mlp_only_layers=list(range(c.n_dense_layer)))
        # A single weight is not divided by the sum of the weights, see ops/moe.py.
        hf['norm_topk_prob'] = c.n_expert_active > 1
    elif family == 'llama4_text':
        hf |= dict(intermediate_size_mlp=c.ffn_dim, use_qk_norm=c.qk_norm)
        hf |= dict(moe_layers=[], interleave_moe_layer_step=0, num_local_experts=0)
        hf |= dict(num_experts_per_tok=0, attn_temperature_tuning=False)
        # A chunk as long as the context makes Llama 4's chunked layers full attention.
        hf |= dict(no_rope_layers=[1] * n_layer, attention_chunk_size=context)
    return hf
