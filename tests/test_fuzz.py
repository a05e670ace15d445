"""Random mistakes: values of knobs, JSON files, shards, checkpoints and command lines.

Whatever happens must be a success, or an error for which `sentence_of` has a sentence and an exit
code. What was damaged must never pass unnoticed where hashes or sizes tell. hypothesis draws the
mistakes from fixed seeds, so that every run of the tests tries the same ones.
"""
import functools
import json
import math
import shutil
import string

from tests.conftest import need

need('hypothesis', 'orjson', 'isal', 'matplotlib')

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import configurator
import kd
from configurator import BadInput, configure_script, sentence_of
from data import Source, check_sample
from lib import checkpoint, hf, shards
from lib.log import read_metrics
from methods import selection
from tests.conftest import (
    ROOT,
    make_source,
    run_here,
    sign_again,
    train,
    train_command,
)
from tests.test_damage import describe_source
from tests.test_kd import spoilt, taught  # noqa: F401  (fixtures)
from tests.test_selection import scored  # noqa: F401  (a fixture)
from tools import runs

SOME = settings(
    max_examples=30, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck))
MANY = settings(SOME, max_examples=120)
FEW = settings(SOME, max_examples=12)

# -- what is drawn ---------------------------------------------------------------------------------

# No number is large and possible: a run with 10**5 layers would be built, and take an hour.
NUMBERS = st.sampled_from([
    -10**18, -1, 0, 1, 2, 3, 7, 64, 10**12, 2**64, 10**400, -0.5, 0.0, 0.3, 1.0, 1e-300, 1e300,
    float('inf'), float('-inf'), float('nan')])
WORDS = st.one_of(
    st.sampled_from(['', ' ', '.', '..', 'a', 'b', 'auto', 'None', '../a', '{', '\0', '-', 'é']),
    st.text(string.printable, max_size=8))
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
VALUES = st.one_of(
    LEAVES, st.lists(LEAVES, max_size=2),
    st.dictionaries(st.sampled_from(['a', 'b', 'm', '', 'x']), LEAVES, max_size=2))


def places_in(value, path=()):
    """The paths of all values within a JSON value: list of tuples of keys."""
    found = [path]
    inner = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        inner = enumerate(value[:3])
    for key, part in inner:
        found += places_in(part, (*path, key))
    return found


@st.composite
def changed_json(draw, text):
    """Draws the bytes of a JSON file (str) after a mistake."""
    kinds = ['cut', 'bytes', 'replace', 'replace', 'replace', 'remove', 'wrap']
    kind = draw(st.sampled_from(kinds))
    if kind == 'cut':
        return text[:draw(st.integers(0, len(text) - 2))].encode()
    if kind == 'bytes':
        at = draw(st.integers(0, len(text) - 1))
        return text[:at].encode() + draw(st.binary(min_size=1, max_size=4)) + text[at + 2:].encode()
    value = json.loads(text)
    if kind == 'wrap':
        return json.dumps(draw(st.sampled_from([[value], {'x': value}, None, 5, 'x']))).encode()
    path = draw(st.sampled_from(places_in(value)[1:]))
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    if kind == 'remove':
        del holder[path[-1]]
    else:
        holder[path[-1]] = draw(VALUES)
    return json.dumps(value).encode()


@st.composite
def changed_bytes(draw, content):
    """Draws the bytes of a file after damage that changes them."""
    kind = draw(st.sampled_from(['cut', 'flip', 'zeros', 'longer']))
    at = draw(st.integers(0, len(content) - 1))
    if kind == 'cut':
        return content[:at]
    if kind == 'longer':
        return content + draw(st.binary(min_size=1, max_size=9))
    end = min(len(content), at + draw(st.integers(1, 64)))
    new = bytes(end - at)
    if kind == 'flip' or content[at:end] == new:
        new = bytes(255 - byte for byte in content[at:end])
    return content[:at] + new + content[end:]


def code_of(work):
    """Calls work(). Returns the exit code that a script would end with."""
    try:
        return work() or 0
    except SystemExit as stop:
        return stop.code or 0
    except BaseException as error:
        found = sentence_of(error)
        if found is None:
            raise
        assert len(found[0]) > 20, found
        return found[1]


# -- knobs and command lines -----------------------------------------------------------------------

TRAIN = str(ROOT / 'train.py')
KNOBS = configure_script(TRAIN, []).defaults
# Those that would write outside a test's folder, run another script, or compile.
HARMLESS = sorted(set(KNOBS) - {'out_dir', 'data_dir', 'prepare', 'compile', 'profile', 'dry_run'})


@pytest.fixture(scope='module', autouse=True)
def parsed_once():
    """Reads the knobs of every file once, which takes most of the time of `configure`."""
    patch = pytest.MonkeyPatch()
    parse = functools.cache(configurator.parse_knobs)
    patch.setattr(configurator, 'parse_knobs', lambda *arguments: dict(parse(*arguments)))
    yield
    patch.undo()


def argument(name, value):
    return f'--{name}={value}'


@MANY
@given(st.lists(st.one_of(
    st.builds(argument, st.sampled_from(sorted(KNOBS)), VALUES),
    st.builds(argument, WORDS, WORDS), st.sampled_from(['--', '-x', '=', '--=', 'x.py', '.'])),
    min_size=1, max_size=3))
def test_command_lines(argv):
    assert code_of(lambda: configure_script(TRAIN, argv) and 0) in (0, 2)


@SOME
@given(st.sampled_from(HARMLESS), VALUES)
def test_a_run_with_any_value_of_any_knob(tiny_source, name, value):
    knobs = {'max_steps': 1, 'eval_rows': 1, name: value}
    shutil.rmtree(tiny_source / 'run', ignore_errors=True)
    command = train_command(tiny_source / 'run', tiny_source / 'data', **knobs)
    code = code_of(lambda: run_here(command))
    assert code in (0, 1, 2)
    # A fault of the run is a loss that is not finite, and no mistake in a knob.
    is_finite = isinstance(value, (int, float)) and abs(value) < math.inf
    assert code != 1 or is_finite and name in (
        'learning_rate', 'weight_decay', 'norm_eps', 'adam_eps', 'rope_theta')


CONFIG_LINES = st.one_of(
    st.builds('{} = {!r}'.format, st.sampled_from(sorted(KNOBS)), VALUES),
    st.builds('{} = {}'.format, st.sampled_from(['_x', 'n_layer', 'sources', '1', 'é']), WORDS),
    st.sampled_from([
        'import os', 'raise SystemExit(0)', '1/0', 'sources["a"] = "x"', 'def f(): pass', 'exit()',
        'n_layer += None', '\0', 'x' * 5000, '(' * 300, 'del n_layer', 'import nothing_like_it']))


@MANY
@given(st.lists(CONFIG_LINES, min_size=1, max_size=3), st.sampled_from(['utf-8', 'utf-16']))
def test_config_files(tmp_path_factory, lines, encoding):
    path = tmp_path_factory.getbasetemp() / 'fuzz.py'
    path.write_bytes('\n'.join(lines).encode(encoding, 'surrogatepass'))
    assert code_of(lambda: configure_script(TRAIN, [str(path)]) and 0) in (0, 2)


SCRIPTS = (
    ('tools/report.py', ['{run}', '--out={run}/made']),
    ('tools/sweep.py', ['collect', '{run}', '--out={run}/made']),
    ('tools/mixing_laws.py', ['fit-static', '{run}']), ('tools/plan.py', []),
    ('tools/influence_tables.py', ['loo', '--ckpt={run}', '--out={run}/made']),
    ('tools/check.py', ['{run}']),
    ('prepare/text.py', ['--source=x', '--out={run}', '--input={run}/metrics.jsonl']),
    ('prepare/adopt.py', ['--out={run}', '--tokenizer=gpt']),
    ('prepare/folder.py', ['--out={run}']), ('prepare/probe.py', ['--out={run}']))


@SOME
@given(st.sampled_from(SCRIPTS), st.lists(st.builds(
    argument, st.sampled_from([
        'seed', 'limit', 'n', 'jobs', 'rows', 'probe', 'without', 'samples', 'tokenizer', 'source',
        'sources', 'max_tokens', 'val_fraction', 'workers', 'at', 'law', 'groups', 'x']),
    VALUES), max_size=2))
def test_command_lines_of_scripts(finished, tmp_path_factory, script, arguments):
    path, own = script
    folder = tmp_path_factory.mktemp('script')
    shutil.copytree(finished, folder / 'run')
    own = [part.format(run=folder / 'run') for part in own]
    assert code_of(lambda: run_here([path, *own, *arguments])) in (0, 1, 2)


# -- files -----------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def tiny_source(tmp_path_factory):
    """A folder with the sources data/a and data/b, which have a meta.json."""
    folder = tmp_path_factory.mktemp('fuzz')
    for name in 'ab':
        make_source(folder / 'data', name, n_tokens=400)
        describe_source(folder / 'data' / name)
    return folder


@pytest.fixture(scope='module')
def finished(tmp_path_factory, tiny_source):
    """A run of 8 steps with two checkpoints."""
    folder = tmp_path_factory.mktemp('finished') / 'run'
    train(folder, tiny_source / 'data', max_steps=8, schedule='constant')
    return folder


@MANY
@given(choices=st.data())
def test_meta_json(tiny_source, choices):
    path = tiny_source / 'data/a/meta.json'
    intact = path.read_text()
    try:
        path.write_bytes(choices.draw(changed_json(intact)))

        def look():
            source = Source(tiny_source / 'data', 'a', 'train', 16, vocab_size=64)
            check_sample([source], 0)
            assert source.rows([0, 1]).shape == (2, 17)

        assert code_of(look) in (0, 2)
    finally:
        path.write_text(intact)


@MANY
@given(choices=st.data())
def test_damaged_shards_never_pass(tiny_source, choices):
    paths = sorted((tiny_source / 'data/a/train').glob('*.bin'))
    path = choices.draw(st.sampled_from(paths))
    intact = path.read_bytes()
    try:
        path.write_bytes(choices.draw(changed_bytes(intact)))
        shards.open_file.cache_clear()
        with pytest.raises(BadInput, match=path.name):
            check_sample([Source(tiny_source / 'data', 'a', 'train', 16)], 0)
    finally:
        path.write_bytes(intact)


@MANY
@given(choices=st.data())
def test_damaged_checkpoints_never_pass(finished, choices):
    folder = finished / 'ckpt/step_000008'
    path = choices.draw(st.sampled_from(sorted(folder.iterdir())))
    intact = path.read_bytes()
    damaged = choices.draw(changed_bytes(intact))
    try:
        path.write_bytes(damaged)
        if path.name == 'manifest.json':
            # Its JSON may say the same after all, for example with a space more.
            found = code_of(lambda: checkpoint.find_checkpoint(str(finished)) and 0)
            assert found == 0
        else:
            assert checkpoint.find_checkpoint(str(finished)).endswith('step_000004')
    finally:
        path.write_bytes(intact)


@MANY
@given(choices=st.data())
def test_damaged_metadata_is_not_opened(finished, choices):
    folder = finished / 'ckpt/step_000004'
    path = folder / '.metadata'
    intact = path.read_bytes()
    try:
        path.write_bytes(choices.draw(changed_bytes(intact)))
        assert code_of(lambda: checkpoint.read_metadata(str(folder)) and 0) in (0, 2)
    finally:
        path.write_bytes(intact)


@FEW
@given(choices=st.data())
def test_a_state_that_was_changed(tmp_path_factory, finished, tiny_source, choices):
    run = shutil.copytree(finished, tmp_path_factory.mktemp('state') / 'run')
    path = run / 'ckpt/step_000008/state.json'
    path.write_bytes(choices.draw(changed_json(path.read_text())))
    sign_again(path.parent)
    command = train_command(
        run, tiny_source / 'data', resume=True, max_steps=9, schedule='constant')
    assert code_of(lambda: run_here(command)) in (0, 2)
    assert code_of(lambda: hf.find_model(str(run)) and 0) in (0, 2)


@MANY
@given(choices=st.data())
def test_the_log_and_config_of_a_run(tmp_path_factory, finished, choices):
    run = tmp_path_factory.mktemp('log')
    for name in ('config.json', 'metrics.jsonl'):
        shutil.copy(finished / name, run / name)
    path = run / choices.draw(st.sampled_from(['config.json', 'metrics.jsonl']))
    if path.name == 'config.json':
        path.write_bytes(choices.draw(changed_json(path.read_text())))
    else:
        lines = path.read_text().splitlines()
        at = choices.draw(st.integers(0, len(lines) - 1))
        line = choices.draw(changed_json(lines[at]))
        content = [part.encode() for part in lines]
        path.write_bytes(b'\n'.join([*content[:at], line, *content[at + 1:]]))
    assert code_of(lambda: read_metrics(run) and 0) in (0, 2)
    assert code_of(lambda: runs.read_run(str(run)) and 0) in (0, 2)


@SOME
@given(choices=st.data())
def test_models_of_others(tmp_path_factory, choices):
    folder = tmp_path_factory.mktemp('model')
    config = dict(
        model_type='llama', vocab_size=97, hidden_size=32, intermediate_size=48, rms_norm_eps=1e-5,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=64, tie_word_embeddings=False, torch_dtype='float32',
        rope_scaling=dict(
            rope_type='llama3', factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32), eos_token_id=[1, 2])
    (folder / 'config.json').write_bytes(choices.draw(changed_json(json.dumps(config))))
    for name in ('generation_config.json', 'tokenizer_config.json', 'model.safetensors.index.json'):
        (folder / name).write_bytes(choices.draw(changed_json('{"weight_map": {"a": "b"}}')))
    code = code_of(lambda: hf.open_model(
        str(folder), torch.device('cpu'), torch.float32, needs_tokenizer=False) and 0)
    assert code == 2


@MANY
@given(choices=st.data())
def test_caches(spoilt, choices):           # noqa: F811
    data_dir, folder = spoilt
    path = choices.draw(st.sampled_from(sorted(folder.glob('[!.]*'))))
    intact = path.read_bytes()
    try:
        if path.suffix == '.json':
            path.write_bytes(choices.draw(changed_json(intact.decode())))
        else:
            path.write_bytes(choices.draw(changed_bytes(intact)))
        config = {**KNOBS, 'data_dir': str(data_dir), 'kd_cache': 'x', 'vocab_size': 64}
        config |= dict(block_size=16, kd_temperature=1.0)
        source = Source(data_dir, 'a', 'train', 16)
        code = code_of(lambda: kd.Cache(config, source, None) and 0)
        assert code == 2 or path.suffix == '.json' and code == 0
    finally:
        path.write_bytes(intact)


@MANY
@given(choices=st.data())
def test_scores(scored, choices):           # noqa: F811
    source, folder = scored
    path = choices.draw(st.sampled_from(sorted(p for p in folder.glob('[!.]*') if p.is_file())))
    intact = path.read_bytes()
    try:
        if path.suffix == '.json':
            path.write_bytes(choices.draw(changed_json(intact.decode())))
        else:
            path.write_bytes(choices.draw(changed_bytes(intact)))
        code = code_of(lambda: selection.read_scores(str(folder), source) and 0)
        assert code == 2 or path.suffix == '.json' and code == 0
    finally:
        path.write_bytes(intact)
