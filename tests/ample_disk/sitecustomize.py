"""On PYTHONPATH of the hub's tests: their datasets are small, but announce the size of the real ones, for which a machine need not have room."""
import collections
import shutil

shutil.disk_usage = lambda path: collections.namedtuple('usage', 'total used free')(2**50, 0, 2**50)
