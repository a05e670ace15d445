"""Puts the project's folder first on the import path, and this folder last. Installs the hook that
prints errors as one sentence.

A script imports this module first, because Ctrl-C may come while it imports torch. Python puts the
folder of a script first. There its files would hide installed packages of the same name. It stays
on the path, because a worker process imports the script, and so this module, again.
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))

others = [folder for folder in sys.path if os.path.abspath(folder) != HERE]
sys.path[:] = [os.path.dirname(HERE), *others, HERE]

from configurator import install_hook  # noqa: E402  (found by the line above)

install_hook()
