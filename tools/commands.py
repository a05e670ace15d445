"""What the commands of this folder do with their command line, and the tables that they print."""

import sys

from configurator import BadInput, did_you_mean


def read_command(commands):
    """Returns (command, the arguments after it): 'grid' and ['--jobs=2'] for `grid --jobs=2`.

    Without a command the arguments are --help. Raises BadInput for an unknown command.
    """
    argv = sys.argv[1:] or ['--help']
    if argv[0] in ('--help', '-h'):
        return '', argv
    if argv[0] not in commands:
        raise BadInput(
            f"unknown command '{argv[0]}'.{did_you_mean(argv[0], commands)} Commands are "
            f'{", ".join(commands)}.')
    return argv[0], argv[1:]


def warn_unused(arguments, names, why):
    """Prints a warning for each of the knobs `names` that the arguments set. why: 'without --chat'.

    It is for knobs that have no effect with the other arguments.
    """
    given = {a.lstrip('-').partition('=')[0].partition('.')[0] for a in arguments if '=' in a}
    for name in names:
        if name in given:
            print(f'warning: --{name} has no effect {why}.', file=sys.stderr)


def print_table(header, rows):
    """Prints a table. Floats have four digits, and None is printed as n/a."""
    texts = [header]
    for row in rows:
        row = [f'{x:.4f}' if isinstance(x, float) else x for x in row]
        texts.append(['n/a' if x is None else str(x) for x in row])
    widths = [max(len(x) for x in column) for column in zip(*texts, strict=True)]
    for row in texts:
        print('  '.join(x.ljust(width) for x, width in zip(row, widths, strict=True)).rstrip())


def check_text(name, text):
    """Raises BadInput if text from the command line or the terminal was not valid UTF-8."""
    # Python keeps the bytes that it cannot decode as surrogates, which no tokenizer takes.
    try:
        text.encode('utf-8')
    except UnicodeEncodeError as error:
        raise BadInput(
            f'{name} is not valid UTF-8 text: character {error.start + 1} is the byte '
            f'0x{ord(text[error.start]) & 0xff:02x}. Write it as UTF-8.') from None
