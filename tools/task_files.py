"""YAML files of benchmarks: whether their form is right, and whether they run code of their author.

lm-eval imports functions while it reads a task's YAML, and its Jinja templates may call anything.
`check_task` reads the file before lm-eval does, and runs nothing of it. lm-eval's own tasks are not
checked: they are part of the installed package.
"""

import os
from dataclasses import fields

import lm_eval.api.metrics  # noqa: F401  (it fills metric_registry)
import yaml
from jinja2 import Environment, TemplateSyntaxError, nodes
from lm_eval.api.group import GroupConfig
from lm_eval.api.registry import aggregation_registry, metric_registry
from lm_eval.api.task import ALL_OUTPUT_TYPES, TaskConfig

from configurator import BadInput, did_you_mean, read_source

LM_EVAL = os.path.dirname(os.path.realpath(lm_eval.__file__))
KNOWN = {f.name for kind in (TaskConfig, GroupConfig) for f in fields(kind)}
KNOWN |= {'group', 'class', 'include', 'task_list'}
# Field -> the YAML type of its value. The others may have several types.
TEXT, INT, LIST, MAPPING = 'str', 'int', 'seq', 'map'
TYPES = dict.fromkeys(('dataset_path', 'dataset_name', 'output_type', 'group'), TEXT)
TYPES |= dict.fromkeys(('training_split', 'validation_split', 'test_split', 'fewshot_split'), TEXT)
TYPES |= dict(dataset_kwargs=MAPPING, generation_kwargs=MAPPING, num_fewshot=INT, repeats=INT)
TYPES |= dict(metric_list=LIST, filter_list=LIST)
ENTRIES = dict(metric_list='metric', filter_list='name')     # list -> what every entry must have
PLAIN = ('str', 'int', 'float', 'bool', 'null', 'timestamp', 'seq', 'map', 'merge')
MOST_NODES = 100_000        # of a file, with its aliases written out

# Fields whose text is a Jinja template. What a template may consist of without --allow_code:
TEMPLATES = ('doc_to_text', 'doc_to_target', 'doc_to_choice', 'doc_to_image', 'doc_to_audio')
TEMPLATES += ('description', 'gen_prefix', 'doc_to_decontamination_query')
NODES = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.Const, nodes.Name, nodes.Getitem,
    nodes.Getattr, nodes.Slice, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.If,
    nodes.CondExpr, nodes.For, nodes.Assign, nodes.Test, nodes.Compare, nodes.Operand, nodes.And,
    nodes.Or, nodes.Not, nodes.Neg, nodes.Add, nodes.Sub, nodes.Concat, nodes.Keyword, nodes.Call,
    nodes.Filter,
)
METHODS = (
    'capitalize count endswith find get index isdigit items join keys lower lstrip partition '
    'removeprefix removesuffix replace rpartition rsplit rstrip split splitlines startswith strip '
    'title upper values zfill'
).split()
FILTERS = (
    'abs capitalize count d default e escape first float int items join last length list lower max '
    'min regex_replace replace reverse round safe sort string sum title trim unique upper wordcount'
).split()


def line_of(node):
    return node.start_mark.line + 1


def kind_of(node):
    """'str', 'map' and so on, or the name of a tag that is not YAML's own."""
    return node.tag.removeprefix('tag:yaml.org,2002:')


def read_nodes(path):
    """The mapping in a YAML file as a yaml.Node. Nothing is constructed. Raises BadInput."""
    try:
        root = yaml.compose(read_source(path), Loader=yaml.SafeLoader)
        size = 0 if root is None else count_nodes(root, {})
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        reason = ' '.join(str(error).split())[:300]
        raise BadInput(f'{path} is no valid YAML: {reason}.') from None
    if size > MOST_NODES:
        raise BadInput(
            f'{path} has {size:,} values when its aliases are written out (inf: one contains '
            f'itself). {MOST_NODES:,} are allowed.')
    if root is None or kind_of(root) != MAPPING:
        raise BadInput(f'{path} is no task of lm-eval: it must be a mapping with a field `task`.')
    return root


def children(node):
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def count_nodes(node, sizes):
    """The number of values below a node, with aliases written out. sizes: of the nodes so far."""
    if id(node) not in sizes:
        # An alias may lead back to the value that it is in.
        sizes[id(node)] = float('inf')
        sizes[id(node)] = 1 + sum(count_nodes(child, sizes) for child in children(node))
    return sizes[id(node)]


# -- code ------------------------------------------------------------------------------------------


def fault_of_template(text):
    """(line in the text, what is not plain) of a Jinja template. None: it is plain.

    Plain are fields of a document, constants, conditions, loops, METHODS and FILTERS.
    Raises TemplateSyntaxError.
    """
    for node in Environment().parse(text).find_all(nodes.Node):
        what = None
        if isinstance(node, nodes.Getattr) and node.attr.startswith('_'):
            what = f"reads the private attribute '{node.attr}'"
        elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
            if str(node.arg.value).startswith('_'):
                what = f"reads the private attribute '{node.arg.value}'"
        elif isinstance(node, nodes.Call):
            called = getattr(node.node, 'attr', getattr(node.node, 'name', 'the result of a call'))
            is_method = isinstance(node.node, nodes.Getattr) and called in METHODS
            is_range = isinstance(node.node, nodes.Name) and called == 'range'
            if not is_method and not is_range:
                what = f"calls '{called}'"
        elif isinstance(node, nodes.Filter) and node.name not in FILTERS:
            what = f"uses the filter '{node.name}'"
        elif isinstance(node, nodes.Expr | nodes.Stmt) and not isinstance(node, NODES):
            what = f'has a part of kind {type(node).__name__}'
        if what:
            return node.lineno, what
    return None


def check_template(node, path):
    """Raises BadInput if the text of a YAML node is a template that is wrong or not plain."""
    line = line_of(node)

    def line_within(number):
        # The text of a block begins on the line after its mark.
        return line + number if node.style == '|' else line

    try:
        found = fault_of_template(node.value)
    except (TemplateSyntaxError, RecursionError) as error:
        number = getattr(error, 'lineno', 1)
        raise BadInput(f'{path}:{line_within(number)}: the template is wrong: {error}') from None
    if found:
        refuse(path, line_within(found[0]), f'the template {found[1]}, which can run code')


def refuse(path, line, what):
    raise BadInput(
        f'{path}:{line}: {what}. Read the file, and give tools/evaluate.py --allow_code=True if '
        'you trust its author.')


def check_code(root, path):
    """Raises BadInput with the line of what runs code or may do so when the task is used."""
    waiting = [(root, False)]
    seen = set()
    while waiting:
        node, is_template = waiting.pop()
        # An aliased text may be a template in one place and none in another.
        if (id(node), is_template) in seen:
            continue
        seen.add((id(node), is_template))
        if node.tag == '!function':
            refuse(path, line_of(node), f'!function {node.value} runs Python of its author')
        if is_template and kind_of(node) == TEXT:
            check_template(node, path)
        if not isinstance(node, yaml.MappingNode):
            waiting += [(child, is_template) for child in children(node)]
            continue
        for key, value in node.value:
            check_field(key.value, value, path)
            waiting += [(key, False), (value, is_template or key.value in TEMPLATES)]


def check_field(name, node, path):
    """Raises BadInput if a field of a task makes lm-eval or datasets run code from elsewhere."""
    value = node.value
    what = None
    if name in ('trust_remote_code', 'hf_evaluate') and str(value).lower() not in ('false', 'no'):
        what = f'{name} runs code from the hub'
    elif name == 'metric' and kind_of(node) == TEXT and value not in metric_registry:
        near = did_you_mean(value, metric_registry)
        what = f"metric '{value}' is none of lm-eval's, so its code comes from the hub.{near}"
    elif name == 'use_prompt' and not str(value).startswith('qa-basic:'):
        what = f"use_prompt '{value}' is a template of another file"
    elif name == 'dataset_path' and isinstance(value, str):
        script = os.path.join(value, os.path.basename(os.path.normpath(value)) + '.py')
        if value.endswith('.py') or os.path.isfile(script):
            what = f"dataset_path '{value}' is a Python script"
    if what:
        refuse(path, line_of(node), what)


# -- form ------------------------------------------------------------------------------------------


def check_tags(root, path):
    """Raises BadInput for tags that lm-eval does not know, such as !!python/object."""
    waiting = [root]
    seen = set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.tag != '!function' and kind_of(node) not in PLAIN:
            raise BadInput(f'{path}:{line_of(node)}: the tag {node.tag} is not supported.')
        waiting += children(node)


def read_fields(path, allow_code, above=()):
    """The fields of a YAML file and of those that it includes: name -> (yaml.Node, 'path:line').

    above: the files that include this one. Raises BadInput, also for code unless allow_code.
    """
    root = read_nodes(path)
    check_tags(root, path)
    if not allow_code and not os.path.realpath(path).startswith(LM_EVAL + os.sep):
        check_code(root, path)
    own = {str(key.value): (value, f'{path}:{line_of(key)}') for key, value in root.value}
    found = {}
    if 'include' in own:
        node, where = own.pop('include')
        # As in lm-eval, a link is followed before the folder is taken.
        above = (*above, os.path.realpath(path))
        for part in node.value if kind_of(node) == LIST else [node]:
            file = os.path.join(os.path.dirname(above[-1]), str(part.value))
            if not os.path.isfile(file):
                raise BadInput(f"{where}: include: there is no file '{file}'.")
            if os.path.realpath(file) in above:
                raise BadInput(f"{where}: '{file}' includes itself.")
            found |= read_fields(file, allow_code, above)
    return found | own


def check_entry(entry, name, where):
    """Raises BadInput if an entry (yaml.Node) of the list `name` lacks what lm-eval needs."""
    values = {}
    if kind_of(entry) == MAPPING:
        values = {key.value: value for key, value in entry.value}
    if ENTRIES[name] not in values and '<<' not in values:
        raise BadInput(f'{where}: every entry of {name} needs a field `{ENTRIES[name]}`.')
    way = values.get('aggregation')
    # lm-eval would fail only after all documents were scored.
    if way is not None and kind_of(way) == TEXT and way.value not in aggregation_registry:
        known = ', '.join(sorted(aggregation_registry))
        raise BadInput(f"{where}: aggregation '{way.value}' must be one of {known}.")


def check_task(path, allow_code):
    """Raises BadInput unless a YAML file, with all that it includes, is a task or group of lm-eval.

    Without allow_code it is also an error if it runs code of its author. Nothing of it is run here.
    """
    found = read_fields(path, allow_code)
    if 'task' not in found and 'group' not in found:
        raise BadInput(f'{path} names neither a `task` nor a `group`.')
    # A task in Python takes any field.
    if 'class' in found:
        return
    is_group = 'group' in found
    for name, (node, where) in found.items():
        if name not in KNOWN and name != '<<':
            raise BadInput(f"{where}: unknown field '{name}'.{did_you_mean(name, KNOWN)}")
        kind = kind_of(node)
        wanted = TYPES.get(name, LIST if is_group else TEXT) if name == 'task' else TYPES.get(name)
        if wanted and kind not in (wanted, 'null', '!function'):
            raise BadInput(f'{where}: {name} must be of YAML type {wanted}, it is of type {kind}.')
        if name == 'output_type' and node.value not in ALL_OUTPUT_TYPES:
            known = ', '.join(ALL_OUTPUT_TYPES)
            raise BadInput(f"{where}: output_type '{node.value}' must be one of {known}.")
        if kind == LIST and name in ENTRIES:
            for entry in node.value:
                check_entry(entry, name, where)
    if is_group or '<<' in found:
        return
    has_data = 'dataset_path' in found or 'custom_dataset' in found
    if not has_data or not found.keys() & {'test_split', 'validation_split'}:
        raise BadInput(f'{path} needs a dataset_path, and a test_split or a validation_split.')
