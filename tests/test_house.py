"""The structure of the code: who imports whom, the size of what a reader holds at once, and where
knobs stand.
"""
import ast
import re
import sys

import pytest

from configurator import configure_script, knobs_of
from tests.conftest import ROOT, run

# From the bottom up. A file imports files of its own layer or of lower ones.
LAYERS = [
    ['configurator'], ['lib.shards'], ['ops', 'data'], ['model'], ['lib'],
    ['influence', 'kd', 'prepare'], ['methods'], ['tools'], ['train']]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def rank_of(module):
    """Layer of a module: its own, or that of its folder."""
    return RANK.get(module, RANK[module.split('.')[0]])


def modules():
    """Every file of the project without its tests: dict module name ('lib.log') -> path."""
    found = {}
    for path in sorted([*ROOT.glob('*.py'), *ROOT.glob('[!.]*/*.py')]):
        relative = path.relative_to(ROOT)
        if relative.parts[0] not in ('tests', 'config', 'data', 'out', 'venv'):
            name = '.'.join(relative.with_suffix('').parts)
            found[name.removesuffix('.__init__')] = path
    return found


def imports_of(path, known):
    """Modules of the project that a file imports: list of (name, whether at the top of the
    file).
    """
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
            # `from lib import log` imports the module lib.log.
            submodules = [f'{node.module}.{alias.name}' for alias in node.names]
            if any(name in known for name in submodules):
                names = [name if name in known else node.module for name in submodules]
        found += [(name, node in tree.body) for name in names if name in known]
    return found


def test_imports_never_point_upwards():
    known = modules()
    faults = []
    for name, path in known.items():
        for target, at_top in imports_of(path, known):
            other = target.split('.')[0]
            is_lazy_tool = name == 'train' and other == 'tools' and not at_top
            is_above = rank_of(target) > rank_of(name)
            if is_above or other == 'train' or name == 'train' and other == 'tools':
                if not is_lazy_tool:
                    faults.append(f'{name} imports {target}')
    assert not faults


def test_imports_have_no_circles():
    known = modules()
    graph = {}
    for name, path in known.items():
        graph[name] = {target for target, _ in imports_of(path, known)}
    done = set()

    def visit(name, path):
        assert name not in path, ' -> '.join([*path, name])
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def is_kernel(function):
    """Whether a function is a Triton kernel, an operator that launches one, or an autograd rule."""
    decorators = ' '.join(ast.unparse(d) for d in function.decorator_list)
    return 'jit' in decorators or 'custom_op' in decorators or 'staticmethod' in decorators


# What train.py imports, and pytest. No test runs without these.
BASE = {
    'torch', 'numpy', 'fsspec', 'tqdm', 'tiktoken', 'tiktoken_ext', 'tokenizers', 'pytest', '_path'}


def packages_of(path, known, seen):
    """Packages of others that must be installed for a file to be imported: a set of names.

    known  dict module name -> path, of this project and its tests
    seen   dict module name -> such a set, of modules that have been looked at
    """
    found = set()
    needed = set()          # what `need` of tests/conftest.py has made sure of
    for node in ast.parse(path.read_text()).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f'{node.module}.{alias.name}' for alias in node.names]
            names = [name for name in names if name in known] or [node.module]
        elif isinstance(node, ast.Expr) and ast.unparse(node).startswith('need('):
            needed |= {argument.value.split('.')[0] for argument in node.value.args}
        for name in names:
            package = name.split('.')[0]
            if name in known:
                if name not in seen:
                    seen[name] = packages_of(known[name], known, seen)
                found |= seen[name]
            elif package not in sys.stdlib_module_names:
                found.add(package)
    return found - needed


def test_a_test_file_skips_where_a_package_is_missing():
    """`pytest -m gpu` collects every file, and must do so where only the packages of a run are."""
    known = modules()
    seen = {}
    for path in (ROOT / 'tests').glob('*.py'):
        known[f'tests.{path.stem}'] = path
    assert packages_of(ROOT / 'train.py', known, seen) <= BASE
    faults = []
    for name, path in known.items():
        if name.startswith('tests.test_') or name == 'tests.conftest':
            missing = packages_of(path, known, seen) - BASE
            faults += [f'{name}: {package}' for package in sorted(missing)]
    assert not faults


def test_functions_have_at_most_seven_parameters():
    """Triton kernels and keyword options of public functions aside: a default makes an option."""
    faults = []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not is_kernel(node):
                required = [a.arg for a in node.args.args if a.arg not in ('self', 'ctx', 'cls')]
                required = required[:len(required) - len(node.args.defaults)]
                if len(required) > 7:
                    faults.append(f'{name}.{node.name}: {len(required)}')
    assert not faults


def test_the_top_level_is_the_card():
    names = {path.name for path in ROOT.glob('*.py')}
    assert names == {'train.py', 'model.py', 'data.py', 'influence.py', 'kd.py', 'configurator.py'}


def test_every_knob_is_declared_once_and_described(tmp_path):
    config = configure_script(str(ROOT / 'train.py'), [])
    top = (ROOT / 'train.py').read_text().split('configure(globals()')[0]
    own = re.findall(r'^(\w+)(?:: [^=]+)? = ', top, re.M)
    own.remove('config')
    assert len(own) <= 52 and set(own) < set(config)
    done = run([sys.executable, 'train.py', '--help'])
    for name in config:
        assert done.stdout.count(f'  --{name}=') == 1, name
    for owner in ('ModelConfig (model.py)', 'DistillConfig (kd.py)'):
        assert owner in done.stdout


def test_a_name_with_two_owners_is_an_error(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text('n_layer = 3\nconfig = configure(globals())\n')
    from configurator import BadInput
    from model import ModelConfig
    with pytest.raises(BadInput, match="'n_layer' of ModelConfig .* is also declared in"):
        knobs_of(dict(__file__=str(script), n_layer=3), (ModelConfig,))


def test_imports_have_no_effect_on_torch_or_warnings():
    # From the lowest module up, so that the one with an effect is named.
    names = ['ops.kernels', 'ops.attention', 'data', 'lib.parallel', 'lib.checkpoint', 'kd']
    names.append('methods')
    code = (
        'import importlib, sys, warnings\n'
        'import torch, torch.distributed.checkpoint, torch.utils.checkpoint\n'
        'from torch.utils.checkpoint import SAC_IGNORED_OPS as ignored\n'
        'def state(): return (torch.get_num_threads(), torch.get_default_dtype(), len(ignored), '
        'sys.path[:],\n    torch.backends.cuda.matmul.allow_tf32, len(warnings.filters))\n'
        f'for module in {names}:\n'
        '    before = state()\n'
        '    importlib.import_module(module)\n'
        '    assert state() == before, (module, before, state())\n')
    done = run([sys.executable, '-c', code])
    assert done.returncode == 0, done.stderr


def test_preparation_does_not_wait_for_torch():
    # Every worker process imports it anew.
    code = 'import sys, prepare.common, prepare.shards\nassert "torch" not in sys.modules'
    done = run([sys.executable, '-c', code])
    assert done.returncode == 0, done.stderr
