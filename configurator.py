"""Config files and --key=value override a script's globals; a mistake is an error, never a guess.

A script assigns its knobs as plain lower-case globals at its top and then calls `configure(globals())`:

    learning_rate = 4e-3               # peak learning rate
    max_tokens: int | None = None      # stop after this many tokens; None: max_steps decides

`python train.py config/model/smollm2_135m.py config/stage2.py --max_steps=5000 --sources.code=0.5` then applies files
and overrides from left to right. A config file is Python that assigns some of those names; it may read the current
value of any knob, import modules, and keep helpers under names that begin with `_`. A name that the script does not
define is an error with the nearest match; so is a value of another type. A knob's type is its annotation, or else the
type of its default; a knob that may be None must be annotated. `--help` is made from the script's own comments.

Also here, because every script needs them: `BadInput` and `RunFault`, the two kinds of failure that are the user's to
mend, and the hook that prints them as one sentence (exit code 2 and 1). Anything else keeps its traceback: it is ours.
"""
import ast
import copy
import difflib
import errno
import io
import json
import os
import sys
import tokenize
import types


class BadInput(ValueError):
    """A user's mistake in config or data. Scripts print the message alone and exit with code 2."""


class RunFault(RuntimeError):
    """A fault while running (NaN loss, disk full). Scripts print the message alone and exit with code 1."""


def report_error(kind, error, traceback):
    """sys.excepthook: one sentence for BadInput (exit 2), RunFault, a full disk and a lost rank (exit 1); a traceback for the rest."""
    sys.stdout.flush()
    rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get('WORLD_SIZE', 1)) > 1 else ''
    if issubclass(kind, (BadInput, RunFault)):
        print(f'\n{rank}error: {error}', file=sys.stderr, flush=True)
        raise SystemExit(2 if issubclass(kind, BadInput) else 1)
    if issubclass(kind, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        print(f'{rank}error: {error.strerror} while writing {error.filename or "a file"}. '
              'Free some space; what was complete before is intact.', file=sys.stderr, flush=True)
        raise SystemExit(1)
    if kind.__name__ in ('DistBackendError', 'DistNetworkError', 'DistStoreError') or kind is RuntimeError and 'gloo' in str(error):
        print(f'\n{rank}error: the connection to another rank broke ({str(error).strip().splitlines()[0][:200]}): it ended or was killed, and has said why '
              'itself if it could. Go on with --resume=True.', file=sys.stderr, flush=True)
        raise SystemExit(1)
    sys.__excepthook__(kind, error, traceback)


def read_json(path):
    """Returns the content of a JSON file. Raises BadInput when the file is missing or holds no valid JSON."""
    try:
        with open(path, encoding='utf-8') as f:
            return json.load(f)
    except FileNotFoundError:
        raise BadInput(f'{path} does not exist.') from None
    except ValueError as error:
        raise BadInput(f'{path} is no valid JSON: {error}.') from None


def did_you_mean(name, known):
    """' Did you mean 'x'?' for the nearest of the known names, or ''."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ''


def parse_knobs(source, filename):
    """Reads a script's text and returns its knobs in order: name -> dict(type=str, comment=str, heading=str).

    Knobs are the module-level assignments to public lower-case names above the call of `configure(...)`. The type is the
    text of the annotation ('int | None'), or '' when there is none. Headings are comment lines '# -- like this --'.
    """
    tree, lines = ast.parse(source, filename), source.split('\n')
    comments = {token.start[0]: token for token in tokenize.generate_tokens(io.StringIO(source).readline)
                if token.type == tokenize.COMMENT}
    knobs, heading, last_line = {}, '', 0
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.Expr)) and 'configure(' in '\n'.join(lines[node.lineno - 1:node.end_lineno]).split('#')[0]:
            break
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name, annotation = node.target.id, ast.unparse(node.annotation)
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name, annotation = node.targets[0].id, ''
        else:
            continue
        if name.startswith('_') or name != name.lower():
            continue
        for line in range(last_line + 1, node.lineno):
            if line in comments and comments[line].string.startswith('# -- '):
                heading = comments[line].string.strip('# -')
        comment = comments[node.end_lineno].string.lstrip('# ') if node.end_lineno in comments else ''
        line = node.end_lineno + 1         # a comment that goes on alone on the following lines belongs to the knob
        while line in comments and comments[line].line.strip().startswith('#') and comments[line].start[1] > 0:
            comment += ' ' + comments[line].string.lstrip('# ')
            line += 1
        knobs[name] = dict(type=annotation, comment=comment, heading=heading)
        last_line = node.end_lineno
    return knobs


def check_type(value, annotation, default):
    """Returns `value` as the knob's type, or raises TypeError with a phrase that says which type is wanted.

    annotation  text such as 'int | None', 'dict[str, float]', 'list[str]'; '' means the type of `default`
    An int is fine where a float stands, and a whole float (1e9) where an int stands; a bool is neither.
    """
    wanted = annotation or type(default).__name__
    for kind in (part.strip() for part in wanted.split('|')):
        base, _, inside = kind.rstrip(']').partition('[')
        if base == 'None' and value is None:
            return None
        if base == 'bool' and isinstance(value, bool):
            return value
        if base == 'int' and not isinstance(value, bool) and (
                isinstance(value, int) or isinstance(value, float) and value.is_integer()):
            return int(value)
        if base == 'float' and not isinstance(value, bool) and isinstance(value, (int, float)):
            return float(value)
        if base == 'str' and isinstance(value, str):
            return value
        if base in ('list', 'tuple') and isinstance(value, (list, tuple)):
            return type(default)(value) if isinstance(default, (list, tuple)) else list(value)
        if base == 'dict' and isinstance(value, dict):
            if not inside:
                return value
            key_type, value_type = (part.strip() for part in inside.split(','))
            try:
                return {check_type(k, key_type, None): check_type(v, value_type, None) for k, v in value.items()}
            except TypeError:
                pass            # falls through to the error below, which names the whole type
    raise TypeError(f'must be {wanted}, got {type(value).__name__} {value!r}')


def parse_literal(text, annotation, default):
    """A command-line value: the text itself where only a str fits, else a Python literal ('1e-3', '{...}', 'None')."""
    wanted = annotation or type(default).__name__
    lowered = text.strip().lower()
    if 'bool' in wanted and lowered in ('true', 'false'):
        return lowered == 'true'
    if 'None' in wanted and lowered == 'none':
        return None
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return text if 'str' == wanted.replace('None', '').strip(' |') and not isinstance(value, str) else value


def run_config_file(path, values, knobs):
    """Runs one config file over the current values. Returns [(name, value, 'path:line')]; raises BadInput."""
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or '.'
        names = [os.path.join(folder, n) for n in os.listdir(folder)] if os.path.isdir(folder) else []
        raise BadInput(f"config file '{path}' does not exist.{did_you_mean(path, [os.path.normpath(n) for n in names])} "
                       'Arguments are config files or --key=value.')
    with open(path, encoding='utf-8') as f:
        source = f.read()
    scope = {**copy.deepcopy(values), '__file__': path}
    before = {**values, '__file__': path}
    try:
        tree = ast.parse(source, path)
        exec(compile(tree, path, 'exec'), scope)
    except Exception as error:          # a config is the user's own code: whatever it raises is named with its line
        line = getattr(error, 'lineno', None)
        traceback = error.__traceback__
        while traceback is not None:
            if traceback.tb_frame.f_code.co_filename == path:
                line = traceback.tb_lineno
            traceback = traceback.tb_next
        raise BadInput(f'{path}:{line}: {type(error).__name__}: {error}') from None
    lines = {n.id: n.lineno for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    found = []
    for name, value in scope.items():
        if name.startswith('_') or isinstance(value, types.ModuleType):
            continue
        if name in before and name not in lines and value == before[name]:      # a dict may have been changed in place
            continue
        where = f'{path}:{lines.get(name, 1)}'
        if name not in knobs:
            raise BadInput(f"{where}: unknown name '{name}'.{did_you_mean(name, knobs)}")
        found.append((name, value, where))
    return found


def check_values(config, allowed, bounds):
    """BadInput when a knob has a value that is not among those allowed (name -> tuple), or outside its bounds (name -> (low, high)); None passes."""
    for name, values in allowed.items():
        if config[name] not in values:
            raise BadInput(f"{name} = '{config[name]}' must be one of {', '.join(values)}.")
    for name, (low, high) in bounds.items():
        if config[name] is not None and not low <= config[name] <= high:
            raise BadInput(f'{name} = {config[name]} must be at least {low:g}' + (f' and at most {high:g}.' if high < float('inf') else '.'))


def print_help(script, doc, knobs, defaults):
    """Prints the script's docstring and every knob with its default and its comment."""
    print((doc or '').strip(), '\n')
    print(f'usage: python {script} [config/file.py ...] [--key=value ...] [--dict.key=value ...]')
    heading = None
    for name, knob in knobs.items():
        if knob['heading'] != heading:
            heading = knob['heading']
            print(f'\n{heading}')
        kind = f" ({knob['type']})" if knob['type'] else ''
        print(f'  --{name}={defaults[name]!r}{kind}')
        if knob['comment']:
            print(f"        {knob['comment']}")


def configure(scope, argv=None, verbose=None, shared=None):
    """Overrides the knobs in `scope` (a script's globals()) from config files and --key=value in `argv`.

    argv     list of str; None means sys.argv[1:]
    verbose  print what differs from the defaults; None means on rank 0 only (environment variable RANK)
    shared   a module whose knobs are the script's as well, after its own; they get into `scope`, too
    Returns the resolved config, name -> value, in the script's order, and installs `report_error` as the excepthook.
    Raises BadInput for an unknown name, a wrong type, or a config file that is missing or fails. `--help` exits 0.
    """
    sys.excepthook = report_error
    script = scope['__file__']
    with open(script, encoding='utf-8') as f:
        knobs = parse_knobs(f.read(), script)
    defaults = {name: scope[name] for name in knobs}
    if shared is not None:
        with open(shared.__file__, encoding='utf-8') as f:
            knobs = {**parse_knobs(f.read(), shared.__file__), **knobs}
        defaults.update({name: getattr(shared, name) for name in knobs if name not in defaults})
    values, origin = dict(defaults), {}
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print_help(os.path.basename(script), scope.get('__doc__'), knobs, defaults)
        raise SystemExit(0)

    def assign(name, value, where):
        try:
            values[name] = check_type(value, knobs[name]['type'], defaults[name])
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
        if name not in knobs:
            raise BadInput(f"command line: unknown name '{name}'.{did_you_mean(name, knobs)} --help lists all.")
        if not equals:
            raise BadInput(f"command line: '{argument}' has no value. Write --{key}=value"
                           + (f', for example --{key}=True.' if isinstance(defaults[name], bool) else '.'))
        if not dot:
            assign(name, parse_literal(text, knobs[name]['type'], defaults[name]), f'command line: {argument}')
        elif not isinstance(values[name], dict):
            raise BadInput(f"command line: '{argument}': {name} is no dict, so it has no entry '{entry}'.")
        else:
            assign(name, {**values[name], entry: parse_literal(text, '', None)}, f'command line: {argument}')
    scope.update(values)

    if verbose or verbose is None and int(os.environ.get('RANK', 0)) == 0:
        changed = [name for name in knobs if values[name] != defaults[name]]
        print(f'config: {len(knobs)} knobs, {len(changed)} differ from the defaults of {os.path.basename(script)}'
              + (':' if changed else ''))
        for name in changed:
            print(f'  {name} = {values[name]!r}    (default {defaults[name]!r}; {origin[name]})')
    return values
