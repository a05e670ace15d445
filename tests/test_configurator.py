import pytest

import configurator
from configurator import BadInput

SCRIPT = '''"""A script."""
import os
# -- input --
out_dir = 'out'                # where it goes
steps: int | None = None       # how many; None: all
rate = 0.1                     # speed
n = 3                          # a number
flag = False                   # on or off
sources: dict[str, float] = {'a': 1.0}    # mixture
name: str | None = None        # a name
_hidden = 1
config = configure(globals())
after = 2
'''


@pytest.fixture
def script(tmp_path):
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT)

    def run(*argv, verbose=False):
        scope = dict(
            __file__=str(path),
            __doc__='A script.',
            out_dir='out',
            steps=None,
            rate=0.1,
            n=3,
            flag=False,
            sources={'a': 1.0},
            name=None,
        )
        config = configurator.configure(scope, list(argv), verbose=verbose)
        assert all(scope[key] == value for key, value in config.items())
        return config

    return run


def config_file(tmp_path, text, name='c.py'):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_files_and_overrides_apply_left_to_right(script, tmp_path):
    a, b = (
        config_file(tmp_path, 'n = 10\nrate = 1.0\n', 'a.py'),
        config_file(tmp_path, '_k = 2\nn = n * _k\nimport math\n', 'b.py'),
    )
    assert script(a, b)['n'] == 20
    assert script(a, b, '--n=5')['n'] == 5
    assert script('--n=5', a)['n'] == 10


def test_a_dict_changed_in_place_is_checked_and_leaves_the_defaults(script, tmp_path, capsys):
    config = script(config_file(tmp_path, "sources['b'] = 2\n"), verbose=True)
    assert (
        config['sources'] == {'a': 1.0, 'b': 2.0}
        and "default {'a': 1.0}" in capsys.readouterr().out
    )
    with pytest.raises(BadInput, match=r'dict\[str, float\]'):
        script(config_file(tmp_path, "sources['b'] = 'x'\n"))


def test_values_are_read_as_their_type(script):
    config = script(
        '--rate=1',
        '--n=1e3',
        '--flag=true',
        '--steps=7',
        '--out_dir=123',
        '--name=None',
        '--sources.b=2',
        '--sources.a=0.5',
    )
    assert (config['rate'], type(config['rate'])) == (1.0, float)
    assert (config['n'], type(config['n'])) == (1000, int)
    assert (
        config['flag'] is True
        and config['steps'] == 7
        and config['out_dir'] == '123'
        and config['name'] is None
    )
    assert config['sources'] == {'a': 0.5, 'b': 2.0}
    assert script("--sources={'x': 1}")['sources'] == {'x': 1.0}


@pytest.mark.parametrize(
    'argument, parts',
    [
        ('--rat=1', ["unknown name 'rat'", "'rate'"]),
        ('--n=1.5', ['n must be int', '1.5']),
        ('--n=True', ['n must be int']),
        ('--n=many', ['n must be int', "'many'"]),
        ('--n=None', ['n must be int']),
        ('--flag=1', ['flag must be bool']),
        ('--rate=fast', ['rate must be float']),
        ('--steps=x', ['int | None']),
        ('--flag', ['--flag=True']),
        ('--n.x=1', ['no dict']),
        ('--sources.a=much', ['dict[str, float]']),
        ('--after=1', ["unknown name 'after'"]),
        ('--_hidden=1', ['unknown name']),
        ('missing.py', ['missing.py', 'does not exist']),
    ],
)
def test_mistakes_on_the_command_line_are_errors(script, argument, parts):
    with pytest.raises(BadInput) as error:
        script(argument)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    'text, parts',
    [
        ('n = 4\nwarmup = 3\nrates = 2\n', [':2', "unknown name 'warmup'"]),
        ('rates = 2\n', ["'rate'"]),
        ('n = "x"\n', [':1', 'n must be int']),
        ('n = 1 +\n', [':1', 'SyntaxError']),
        ('n = 1\nrate = undefined\n', [':2', 'NameError']),
        ('def helper():\n    pass\n', ["unknown name 'helper'"]),
    ],
)
def test_mistakes_in_a_file_are_errors_with_their_line(script, tmp_path, text, parts):
    with pytest.raises(BadInput) as error:
        script(config_file(tmp_path, text))
    for part in parts:
        assert part in str(error.value)


def test_values_outside_their_limits_name_their_place(tmp_path):
    path = config_file(tmp_path, SCRIPT.replace('n = 3 ', 'n: at_least(2) = 3 '), 'limits.py')
    scope = dict(
        __file__=path, out_dir='out', steps=None, rate=0.1, n=3, flag=False, sources={'a': 1.0},
        name=None)
    low = config_file(tmp_path, 'flag = True\nn = 1\n')
    with pytest.raises(BadInput, match=r'c\.py:2: n = 1 must be at least 2\.'):
        configurator.configure(scope, [low], verbose=False)
    with pytest.raises(BadInput, match='--n=0: n = 0 must be at least 2'):
        configurator.configure(scope, ['--n=0'], verbose=False)
    assert configurator.configure(scope, [low, '--n=2'], verbose=False)['n'] == 2


def test_help_shows_every_knob_with_default_and_comment(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script('--help')
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for part in (
        '--rate=0.1',
        'speed',
        '--steps=None (int | None)',
        'how many; None: all',
        'A script.',
        '\ninput',
    ):
        assert part in out
    assert 'hidden' not in out and 'after' not in out


def test_differences_from_the_defaults_are_printed_with_their_origin(script, tmp_path, capsys):
    path = config_file(tmp_path, 'n = 4\n')
    script(path, '--rate=0.2', verbose=True)
    out = capsys.readouterr().out
    assert f'n = 4    (default 3; {path}:1)' in out and 'rate = 0.2' in out and 'flag' not in out
