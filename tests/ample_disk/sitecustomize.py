"""Reports a disk with plenty of room. The hub's tests put this folder on PYTHONPATH.

Their datasets are small but announce the size of the real ones, which may not fit on the machine.
"""
import collections
import shutil

shutil.disk_usage = lambda path: collections.namedtuple('usage', 'total used free')(2**50, 0, 2**50)
