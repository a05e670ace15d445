"""Puts the project's folder on the import path in place of this one, for scripts that run from here."""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))

sys.path[:] = [os.path.dirname(HERE)] + [folder for folder in sys.path if os.path.abspath(folder) != HERE]
