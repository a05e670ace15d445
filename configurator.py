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
import atexit
import copy
import difflib
import errno
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import time
import tokenize
import types
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Literal

# -- errors that a user can mend -------------------------------------------------------------------


class BadInput(ValueError):
    """A user's mistake in config or data. Scripts print the message and exit with code 2."""


class RunFault(RuntimeError):
    """A fault during a run, such as a NaN loss. Scripts print the message and exit with code 1."""


# Faults of the machine while it runs. Every other OSError with a path is a mistake in that path.
MACHINE_FAULTS = (
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENOMEM)


def sentence_of(error):
    """Returns (message, exit code) for an exception that a user can mend, None for a bug of ours.

    2: a mistake in config, data or a path. 1: a fault while running. 128 + signal: an interruption,
    whose message is short or ''.
    """
    if isinstance(error, BadInput):
        return str(error), 2
    if isinstance(error, RunFault):
        return str(error), 1
    if isinstance(error, KeyboardInterrupt):
        return 'interrupted.', 128 + signal.SIGINT
    if isinstance(error, BrokenPipeError):
        return '', 128 + signal.SIGPIPE
    text = str(error)
    first_line = text.strip().partition('\n')[0][:200]
    name = type(error).__name__
    if isinstance(error, MemoryError) or 'OutOfMemory' in name or 'DefaultCPUAllocator' in text:
        return (
            f'out of memory ({first_line}). Use a smaller model, batch_size or block_size, or '
            'more ranks. `train.py --dry_run=True` estimates what a run needs.'), 1
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f'{error.strerror} while writing {error.filename or "a file"}. Free some space. Files '
            'that were complete before are intact.'), 1
    if isinstance(error, OSError) and error.errno == errno.EBADF and error.filename is None:
        return 'stdout or stderr cannot be written to. Look at how they are redirected.', 1
    if isinstance(error, OSError) and error.errno in MACHINE_FAULTS:
        return f'{error.filename or "a file"}: {error.strerror}. Run again when it is mended.', 1
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return (
            f"'{os.fsdecode(error.filename)}' cannot be read or written: {error.strerror}. Give "
            'another path, or change what is there.'), 2
    is_lost = name in ('DistBackendError', 'DistNetworkError', 'DistStoreError')
    if is_lost or type(error) is RuntimeError and 'gloo' in text:
        return (
            f'the connection to another rank broke ({first_line}). That rank ended or was killed. '
            'Its own message, if there is one, says why. Continue with --resume=True.'), 1
    return None


def report_error(kind, error, traceback):
    """sys.excepthook that prints one sentence for what `sentence_of` knows, and exits by its code.

    Every other exception is a bug of ours and keeps its traceback.
    """
    found = sentence_of(error)
    flush_or_drop(sys.stdout, OSError)
    if found is None:
        sys.__excepthook__(kind, error, traceback)
        return
    message, code = found
    if message:
        print_once(f'error: {message}')
    flush_or_drop(sys.stderr, OSError)
    raise SystemExit(code)


def say(sentence):
    """Prints a line to stderr, or to stdout if stderr takes nothing (full disk, closed pipe)."""
    for stream in (sys.stderr, sys.stdout):
        try:
            print(f'\n{sentence}', file=stream, flush=True)
            return
        except OSError:
            drop(stream)


def print_once(sentence):
    """Prints an error to stderr, once for all ranks of a node that report the same.

    torchrun ends with 70 lines of its own, the last of which quote the file that it names in
    TORCHELASTIC_ERROR_FILE. The sentence goes there, so that it comes last, unless torchrun will
    restart the ranks and not quote it.
    """
    is_parallel = os.environ.get('WORLD_SIZE', '1') != '1'
    rank = f"[rank {os.environ.get('RANK')}] " if is_parallel else ''
    path = os.environ.get('TORCHELASTIC_ERROR_FILE')
    if not path:
        say(rank + sentence)
        return
    # The ranks of a node have a common folder, and only one of them can create a file in it.
    digest = hashlib.sha256(sentence.encode()).hexdigest()[:16]
    try:
        open(os.path.join(os.path.dirname(os.path.dirname(path)), digest), 'x').close()
    except FileExistsError:
        return
    except OSError:
        path = None         # torchrun's folder is gone or full
    restarts = os.environ.get('TORCHELASTIC_RESTART_COUNT')
    if path is not None and restarts == os.environ.get('TORCHELASTIC_MAX_RESTARTS'):
        about = dict(timestamp=str(int(time.time())), py_callstack=rank + sentence)
        try:
            with open(path, 'w', encoding='utf-8') as f:
                json.dump(dict(message=dict(message=sentence, extraInfo=about)), f)
            return
        except OSError:
            pass            # printed below
    say(rank + sentence)


def drop(stream):
    """Sends what stdout or stderr did not take nowhere. Python would try again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def flush_or_drop(stream, faults=BrokenPipeError):
    """Flushes stdout or stderr. What a reader that has closed the pipe did not take is dropped."""
    try:
        stream.flush()
    except faults:
        drop(stream)


def flush_at_end():
    if sys.stdout.closed:
        return
    try:
        flush_or_drop(sys.stdout)
    except OSError as error:            # a full disk. Python would end with code 0 or 120
        drop(sys.stdout)
        say(f'error: the output is not complete: {error.strerror}.')
        os._exit(1)


def open_streams():
    """Gives a process that was started without stdin, stdout or stderr (`>&-`) an empty one.

    Otherwise the next file that is opened gets the number of the stream, and what libraries print
    is written into that file. What the encoding of a stream lacks is printed as an escape.
    """
    for number, name, mode in ((0, 'stdin', 'r'), (1, 'stdout', 'w'), (2, 'stderr', 'w')):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)      # it gets the lowest free number, which is this one
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding='utf-8'))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == 'strict':
            stream.reconfigure(errors='backslashreplace')


def install_hook():
    """Makes `report_error` the hook for exceptions.

    A script calls it before it imports torch, because Ctrl-C may come in these seconds, too.
    """
    open_streams()
    sys.excepthook = report_error
    atexit.unregister(flush_at_end)
    atexit.register(flush_at_end)


def did_you_mean(name, known):
    """Returns " Did you mean 'x'?" for the nearest of the known names, or '' if none is near.

    Near are names with which it shares three quarters of the letters in order, names of the same
    letters, and names that go on with an underscore ('batch' and 'batch_size'). Of paths the last
    part is compared.
    """

    def nearness(other):
        asked = os.path.basename(name).lower()
        offered = os.path.basename(other).lower()
        ratio = difflib.SequenceMatcher(None, asked, offered).ratio()
        swapped = sorted(asked) == sorted(offered)
        longer = asked and offered.startswith(f'{asked}_')
        return max(ratio, 0.75) if swapped or longer else ratio

    # A hidden file is nobody's config, and the same name would be no help.
    offered = [k for k in known if k != name and not os.path.basename(k).startswith('.')]
    nearest = max(offered, key=nearness, default=None)
    if nearest is None or nearness(nearest) < 0.75:
        return ''
    return f" Did you mean '{nearest}'?"


def parse_json(content, path):
    """Returns the value of JSON text (bytes). Raises BadInput, which names `path`, if it fails."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:       # a UnicodeDecodeError is a ValueError
        raise BadInput(
            f'{path} is no valid JSON ({error}). It was cut off or damaged: restore or delete it.'
        ) from None


def read_json(path):
    """Returns the content of a JSON file. Raises BadInput if it is missing or no valid JSON."""
    try:
        with open(path, 'rb') as f:
            return parse_json(f.read(), path)
    except FileNotFoundError:
        raise BadInput(f'{path} does not exist.') from None


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
    try:
        with open(path, encoding='utf-8') as f:
            return f.read()
    except UnicodeDecodeError as error:
        raise BadInput(f'{path} is not UTF-8 text ({error}). Save it as UTF-8.') from None


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
            try:
                return float(value)
            except OverflowError:       # an int of more than 308 digits
                break
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
    names = value if isinstance(value, dict) else (value,)
    if any(isinstance(text, str) and '\0' in text for text in names):
        raise BadInput(f'{where}{name} = {value!r} holds a zero byte, which no name or path has.')
    if knob.choices and value not in knob.choices:
        raise BadInput(f"{where}{name} = '{value}' must be one of {', '.join(knob.choices)}.")
    inside = value.values() if isinstance(value, dict) else value
    for number in inside if isinstance(value, (dict, list, tuple)) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise BadInput(f'{where}{name} = {value} must be finite.')
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
    if not path.endswith('.py'):
        raise BadInput(
            f"config file '{path}' does not end in .py. Config files are Python that sets knobs.")
    source = read_source(path)
    # A copy, because a file may change a dict in place, and the defaults must stay as they are.
    scope = {**copy.deepcopy(values), '__file__': path}
    before = {**values, '__file__': path}
    try:
        tree = ast.parse(source, path)
        exec(compile(tree, path, 'exec'), scope)
    except (Exception, SystemExit) as error:    # the user's code, which may raise anything
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


class Config(dict):
    """Knobs by name, as `configure` resolved them. `defaults` has their default values."""

    def __init__(self, values, defaults):
        super().__init__(values)
        self.defaults = defaults


def configure(scope, argv=None, verbose=None, owners=()):
    """Overrides the knobs in `scope`, a script's globals(), from config files and --key=value.

    argv     list of str. None: sys.argv[1:]
    verbose  print what differs from the defaults. None: on rank 0 only (environment variable RANK)
    owners   dataclasses whose fields are knobs of the script as well. Their values are only in
             the result
    Returns the resolved Config, name -> value, in the order of declaration, and installs
    `report_error` as sys.excepthook. Raises BadInput for an unknown name, a wrong type, a value
    outside its limits, or a config file that is missing or fails. `--help` exits with code 0.
    """
    # Installed first, so that a mistake in the arguments is already printed as one sentence.
    install_hook()
    knobs = knobs_of(scope, owners)
    values = {name: knob.default for name, knob in knobs.items()}
    origin = {}
    script = os.path.basename(scope['__file__'])
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print_help(script, scope.get('__doc__'), knobs)
        sys.stdout.flush()          # `--help | head` closes the pipe
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

    if verbose or verbose is None and os.environ.get('RANK', '0') == '0':
        changed = [name for name in knobs if values[name] != knobs[name].default]
        print(
            f'config: {len(knobs)} knobs, {len(changed)} differ from the defaults of {script}'
            + (':' if changed else ''))
        for name in changed:
            default = knobs[name].default
            print(f'  {name} = {values[name]!r}    (default {default!r}; {origin[name]})')
    return Config(values, {name: knob.default for name, knob in knobs.items()})


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
