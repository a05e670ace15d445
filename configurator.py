"""Config files and --key=value override the knobs of a script. A mistake is an error, never a
guess.

A script assigns its knobs as plain lower-case globals at its top and then calls
`configure(globals())`:

    learning_rate: at_least(0.0) = 4e-3      # peak learning rate
    max_tokens: int | None = None            # stop after this many tokens. None: max_steps decides

`python train.py config/model/smollm2_135m.py config/stage2.py --max_steps=5000
--sources.code=0.5` applies config files and overrides from left to right. A config file is
Python that assigns some of those names. It may read the current value of any knob, import
modules, and keep helpers under names that begin with `_`.

A knob is declared once, in the file that reads it. Other files than the script declare theirs
as the fields of a dataclass, and the script names these classes: `configure(globals(),
owners=(ModelConfig, InfluenceConfig))`. Their values are in the returned config, and
`pick(ModelConfig, config)` makes an instance.

The type of a knob is its annotation, or the type of its default. `at_least`, `between` and
`one_of` also limit the value. A knob that may be None says so in its annotation. A name that
nothing declares is an error that suggests the nearest match, and so is a value of another type
or outside its range. `--help` is made from the comments.

This file also holds what every script needs: the errors `BadInput` and `RunFault`, the hook
that prints them as one sentence, and `read_json`.
"""
import ast
import copy
import difflib
import errno
import io
import json
import math
import os
import re
import sys
import tokenize
import types
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Literal

# -- errors that a user can mend -------------------------------------------------------------------


class BadInput(ValueError):
    """A user's mistake in config or data. Scripts print the message and exit with code 2."""


class RunFault(RuntimeError):
    """A fault during a run, such as a NaN loss. Scripts print the message and exit with code 1."""


def report_error(kind, error, traceback):
    """sys.excepthook that prints one sentence for the faults that a user can mend.

    BadInput exits with code 2. RunFault, a full disk and a lost connection between ranks exit with
    code 1. Every other exception is a bug of ours and keeps its traceback.
    """
    sys.stdout.flush()
    is_parallel = int(os.environ.get('WORLD_SIZE', 1)) > 1
    rank = f"[rank {os.environ['RANK']}] " if is_parallel else ''
    if issubclass(kind, (BadInput, RunFault)):
        print(f'\n{rank}error: {error}', file=sys.stderr, flush=True)
        raise SystemExit(2 if issubclass(kind, BadInput) else 1)
    if issubclass(kind, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        print(
            f'{rank}error: {error.strerror} while writing {error.filename or "a file"}. Free some '
            'space. Files that were complete before are intact.', file=sys.stderr, flush=True)
        raise SystemExit(1)
    lost = kind.__name__ in ('DistBackendError', 'DistNetworkError', 'DistStoreError')
    if lost or kind is RuntimeError and 'gloo' in str(error):
        reason = str(error).strip().splitlines()[0][:200]
        print(
            f'\n{rank}error: the connection to another rank broke ({reason}). That rank ended or '
            'was killed. Its own message, if there is one, says why. Continue with --resume=True.',
            file=sys.stderr, flush=True)
        raise SystemExit(1)
    sys.__excepthook__(kind, error, traceback)


def did_you_mean(name, known):
    """Returns " Did you mean 'x'?" for the nearest of the known names, or ''."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ''


def read_json(path):
    """Returns the content of a JSON file. Raises BadInput if it is missing or no valid JSON."""
    try:
        with open(path, encoding='utf-8') as f:
            return json.load(f)
    except FileNotFoundError:
        raise BadInput(f'{path} does not exist.') from None
    except ValueError as error:
        raise BadInput(f'{path} is no valid JSON: {error}.') from None


# -- types of knobs with limits --------------------------------------------------------------------
# These are annotations. `configure` reads them from the source text, together with the comments.


def at_least(low):
    """A number of low's type that is not smaller than low."""
    return Annotated[type(low), low, math.inf]


def between(low, high):
    """A number of low's type from low to high, both included."""
    return Annotated[type(low), low, high]


def one_of(*choices):
    """One of several strings."""
    return Literal[choices]


# -- declarations ----------------------------------------------------------------------------------


@dataclass
class Knob:
    """What the source says about a knob."""
    type: str = ''              # as check_type reads it, for example 'int | None'
    default: object = None
    comment: str = ''
    heading: str = ''           # '# -- like this --' in a script, or the class that owns the knob
    choices: tuple = ()         # allowed strings; (): all
    low: float = -math.inf
    high: float = math.inf


def limits_of(annotation):
    """Reads the limits in an annotation (an ast node or None): dict(type, choices, low, high)."""
    # Read from the source, because `at_least(1) | None` keeps no bound that typing would show.
    found = dict(type='', choices=(), low=-math.inf, high=math.inf)
    if annotation is None:
        return found
    is_optional = isinstance(annotation, ast.BinOp) and ast.unparse(annotation.right) == 'None'
    inner = annotation.left if is_optional else annotation
    name = ast.unparse(inner.func) if isinstance(inner, ast.Call) else ''
    if name not in ('at_least', 'between', 'one_of'):
        return {**found, 'type': ast.unparse(annotation)}
    arguments = tuple(ast.literal_eval(a) for a in inner.args)
    if name == 'one_of':
        found['choices'] = arguments
    else:
        found['low'] = arguments[0]
        found['high'] = arguments[1] if name == 'between' else math.inf
    found['type'] = type(arguments[0]).__name__ + (' | None' if is_optional else '')
    return found


def parse_knobs(source, filename, owner=None):
    """Reads the knobs that a file declares, in order: dict name -> Knob (without the default).

    source    text of the file
    owner     name of a dataclass in it whose fields are the knobs. None: the knobs are the
              assignments to public lower-case names above the call of `configure(...)`
    """
    # Python drops comments when it parses, so they are read by the tokenizer, line by line.
    tree = ast.parse(source, filename)
    lines = source.split('\n')
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token
    body = tree.body
    heading = ''
    if owner is not None:
        [body] = [n.body for n in body if isinstance(n, ast.ClassDef) and n.name == owner]
        project = os.path.dirname(os.path.abspath(__file__))
        heading = f'{owner} ({os.path.relpath(filename, project)})'
    knobs = {}
    last_line = 0
    for node in body:
        text = '\n'.join(lines[node.lineno - 1:node.end_lineno])
        is_statement = isinstance(node, (ast.Assign, ast.Expr))
        if owner is None and is_statement and 'configure(' in text.split('#')[0]:
            break
        annotation = None
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name, annotation = node.target.id, node.annotation
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
        else:
            continue
        if name.startswith('_') or name != name.lower():
            continue
        for line in range(last_line + 1, node.lineno):
            if line in comments and comments[line].string.startswith('# -- '):
                heading = comments[line].string.strip('# -')
        comment = ''
        if node.end_lineno in comments:
            comment = comments[node.end_lineno].string.lstrip('# ')
        # An indented comment that stands alone on the following lines continues the knob's comment.
        line = node.end_lineno + 1
        while line in comments and re.match(r' {5,}#', comments[line].line):
            comment += ' ' + comments[line].string.lstrip('# ')
            line += 1
        knobs[name] = Knob(comment=comment, heading=heading, **limits_of(annotation))
        last_line = node.end_lineno
    return knobs


def read_source(path):
    with open(path, encoding='utf-8') as f:
        return f.read()


def knobs_of(scope, owners):
    """All knobs of a script and of its owners: dict name -> Knob.

    Raises BadInput for a name that is declared twice.
    """
    script = scope['__file__']
    knobs = parse_knobs(read_source(script), script)
    for name, knob in knobs.items():
        knob.default = scope[name]
    for owner in owners:
        path = sys.modules[owner.__module__].__file__
        own = parse_knobs(read_source(path), path, owner.__name__)
        defaults = {field.name: field for field in fields(owner)}
        for name, knob in own.items():
            if name in knobs:
                other = knobs[name].heading or script
                raise BadInput(
                    f"the knob '{name}' of {knob.heading} is also declared in {other}. "
                    'Rename one of them.')
            knob.default = defaults[name].default
            if knob.default is MISSING:
                knob.default = defaults[name].default_factory()
            knobs[name] = knob
    return knobs


def pick(owner, config):
    """Makes an instance of a dataclass from the entries of a config that are its fields."""
    return owner(**{field.name: config[field.name] for field in fields(owner)})


# -- values ----------------------------------------------------------------------------------------


def check_type(value, wanted, default):
    """Returns `value` as the knob's type. Raises TypeError with a phrase that names the type.

    wanted  text such as 'int | None', 'dict[str, float]', 'list[str]'
    An int is accepted for a float, and a whole float (1e9) for an int. A bool is neither.
    """
    for kind in wanted.split('|'):
        base, _, inside = kind.strip().rstrip(']').partition('[')
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if base == 'None' and value is None:
            return None
        if base == 'bool' and isinstance(value, bool):
            return value
        if base == 'int' and is_number and (isinstance(value, int) or value.is_integer()):
            return int(value)
        if base == 'float' and is_number:
            return float(value)
        if base == 'str' and isinstance(value, str):
            return value
        if base in ('list', 'tuple') and isinstance(value, (list, tuple)):
            return type(default)(value) if isinstance(default, (list, tuple)) else list(value)
        if base == 'dict' and isinstance(value, dict):
            if not inside:
                return value
            key_type, value_type = inside.split(',')
            try:
                return {
                    check_type(k, key_type, None): check_type(v, value_type, None)
                    for k, v in value.items()}
            except TypeError:
                pass            # the error below names the type of the whole dict
    raise TypeError(f'must be {wanted}, got {type(value).__name__} {value!r}')


def check_limits(name, value, knob, where):
    """Raises BadInput if a value is not among a knob's choices or is out of range. None passes.

    where: 'path:line: ' or the argument that set the value, '' for a default
    """
    if value is None:
        return
    if knob.choices and value not in knob.choices:
        raise BadInput(f"{where}{name} = '{value}' must be one of {', '.join(knob.choices)}.")
    if isinstance(value, (int, float)) and not knob.low <= value <= knob.high:
        most = f' and at most {knob.high:g}' if knob.high < math.inf else ''
        raise BadInput(f'{where}{name} = {value} must be at least {knob.low:g}{most}.')


def parse_literal(text, wanted):
    """A value from the command line: the text itself for a str, else a Python literal."""
    lowered = text.strip().lower()
    if 'bool' in wanted and lowered in ('true', 'false'):
        return lowered == 'true'
    if 'None' in wanted and lowered == 'none':
        return None
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    only_text = wanted.replace('None', '').strip(' |') == 'str'
    return text if only_text and not isinstance(value, str) else value


def run_config_file(path, values, knobs):
    """Runs a config file over the current values. Returns [(name, value, 'path:line')].

    Raises BadInput if the file does not exist, fails, or assigns an unknown name.
    """
    project = os.path.dirname(os.path.abspath(__file__))
    if not os.path.isfile(path) and os.path.isfile(os.path.join(project, path)):
        path = os.path.join(project, path)      # the script was started from another folder
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or '.'
        there = os.listdir(folder) if os.path.isdir(folder) else []
        paths = [os.path.normpath(os.path.join(folder, name)) for name in there]
        raise BadInput(
            f"config file '{path}' does not exist.{did_you_mean(path, paths)} "
            'Arguments are config files or --key=value.')
    source = read_source(path)
    # A copy, because a file may change a dict in place, and the defaults must stay as they are.
    scope = {**copy.deepcopy(values), '__file__': path}
    before = {**values, '__file__': path}
    try:
        tree = ast.parse(source, path)
        exec(compile(tree, path, 'exec'), scope)
    except Exception as error:          # the file is the user's code, which may raise anything
        line = getattr(error, 'lineno', None)
        traceback = error.__traceback__
        while traceback is not None:
            if traceback.tb_frame.f_code.co_filename == path:
                line = traceback.tb_lineno
            traceback = traceback.tb_next
        raise BadInput(f'{path}:{line}: {type(error).__name__}: {error}') from None
    # The line of each assignment, for the message about a mistake in it.
    lines = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            lines[node.id] = node.lineno
    found = []
    for name, value in scope.items():
        if name.startswith('_') or isinstance(value, types.ModuleType):
            continue
        # A dict may have been changed in place, so a value counts even without an assignment.
        if name in before and name not in lines and value == before[name]:
            continue
        where = f'{path}:{lines.get(name, 1)}'
        if name not in knobs:
            raise BadInput(f"{where}: unknown name '{name}'.{did_you_mean(name, knobs)}")
        found.append((name, value, where))
    return found


# -- the command line ------------------------------------------------------------------------------


def print_help(script, doc, knobs):
    """Prints the script's docstring and every knob with default and comment, by owner."""
    print((doc or '').strip(), '\n')
    print(f'usage: python {script} [config/file.py ...] [--key=value ...] [--dict.key=value ...]')
    heading = None
    for name, knob in knobs.items():
        if knob.heading != heading:
            heading = knob.heading
            print(f'\n{heading}')
        kind = f' ({" | ".join(knob.choices) or knob.type})' if knob.choices or knob.type else ''
        print(f'  --{name}={knob.default!r}{kind}')
        if knob.comment:
            print(f'        {knob.comment}')


def configure(scope, argv=None, verbose=None, owners=()):
    """Overrides the knobs in `scope`, a script's globals(), from config files and --key=value.

    argv     list of str. None: sys.argv[1:]
    verbose  print what differs from the defaults. None: on rank 0 only (environment variable RANK)
    owners   dataclasses whose fields are knobs of the script as well. Their values are only in
             the result
    Returns the resolved config, name -> value, in the order of declaration, and installs
    `report_error` as sys.excepthook. Raises BadInput for an unknown name, a wrong type, a value
    outside its limits, or a config file that is missing or fails. `--help` exits with code 0.
    """
    # Installed first, so that a mistake in the arguments is already printed as one sentence.
    sys.excepthook = report_error
    knobs = knobs_of(scope, owners)
    values = {name: knob.default for name, knob in knobs.items()}
    origin = {}
    script = os.path.basename(scope['__file__'])
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print_help(script, scope.get('__doc__'), knobs)
        raise SystemExit(0)

    def type_of(name):
        return knobs[name].type or type(knobs[name].default).__name__

    def assign(name, value, where):
        try:
            values[name] = check_type(value, type_of(name), knobs[name].default)
        except TypeError as error:
            raise BadInput(f'{where}: {name} {error}.') from None
        origin[name] = where

    for argument in argv:
        if not argument.startswith('-'):
            for name, value, where in run_config_file(argument, values, knobs):
                assign(name, value, where)
            continue
        key, equals, text = argument.lstrip('-').partition('=')
        name, dot, entry = key.partition('.')
        where = f'command line: {argument}'
        if name not in knobs:
            raise BadInput(
                f"command line: unknown name '{name}'.{did_you_mean(name, knobs)} "
                '--help lists all.')
        if not equals:
            example = f', for example --{key}=True' if isinstance(knobs[name].default, bool) else ''
            raise BadInput(
                f"command line: '{argument}' has no value. Write --{key}=value{example}.")
        if not dot:
            assign(name, parse_literal(text, type_of(name)), where)
        elif not isinstance(values[name], dict):
            raise BadInput(
                f"command line: '{argument}': {name} is no dict, so it has no entry '{entry}'.")
        else:
            assign(name, {**values[name], entry: parse_literal(text, '')}, where)
    # Limits are checked at the end: a later argument may correct an earlier one.
    for name, knob in knobs.items():
        where = f'{origin[name]}: ' if name in origin else ''
        check_limits(name, values[name], knob, where)
        if name in scope:
            scope[name] = values[name]

    if verbose or verbose is None and int(os.environ.get('RANK', 0)) == 0:
        changed = [name for name in knobs if values[name] != knobs[name].default]
        print(
            f'config: {len(knobs)} knobs, {len(changed)} differ from the defaults of {script}'
            + (':' if changed else ''))
        for name in changed:
            default = knobs[name].default
            print(f'  {name} = {values[name]!r}    (default {default!r}; {origin[name]})')
    return values


def configure_script(path, argv):
    """Returns the config that another script would have with the arguments `argv`.

    The script is not run. Only its imports and its knobs are executed, which stand above the call
    of `configure(...)`.
    Raises BadInput for arguments that the script would not take.
    """
    source = read_source(path)
    tree = ast.parse(source, path)
    top = []
    for node in tree.body:
        call = node.value if isinstance(node, (ast.Assign, ast.Expr)) else None
        if isinstance(call, ast.Call) and ast.unparse(call.func) == 'configure':
            break
        top.append(node)
    else:
        raise ValueError(f'{path} does not call configure(...)')
    # Another name than '__main__', so that nothing of the script starts.
    scope = {'__file__': path, '__name__': 'configured'}
    exec(compile(ast.Module(top, []), path, 'exec'), scope)
    owners = ()
    for keyword in call.keywords:
        if keyword.arg == 'owners':
            owners = eval(compile(ast.Expression(keyword.value), path, 'eval'), scope)
    return configure(scope, argv, verbose=False, owners=owners)


def split_arguments(scope, argv):
    """Splits argv into the arguments that set a knob of this script and all others: two lists."""
    # Two scripts may share a name, such as --seed. The first one's own knob comes first.
    own = parse_knobs(read_source(scope['__file__']), scope['__file__'])
    mine = []
    theirs = []
    for argument in argv:
        name = argument[2:].partition('=')[0].partition('.')[0]
        is_mine = argument.startswith('--') and name in own
        (mine if is_mine else theirs).append(argument)
    return mine, theirs
