"""Ends a run in which a rank hangs, and names that rank. A collective alone would wait in silence.

torch's own means do not name it: a process group's timeout only says which collective was late, and
a GPU's host waits for the device and not in a call that could raise. So every rank has a thread
that writes to torchrun's store where the rank is. When a rank has made no progress for
`hang_timeout` seconds, its thread compares what all ranks have written. A rank that writes nothing
any more was stopped, or its machine is gone. Otherwise the others wait for the rank that came less
far, or that is somewhere else in the code. All ranks end with exit code 1, and `torchrun
--max-restarts` restarts them.
"""
import collections
import json
import os
import sys
import threading
import time

import torch.distributed as dist

from lib.device import meeting_point

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# What a rank does, in the order in which it comes within a step.
PHASES = (
    'starts', 'begins', 'saves', 'evaluates', 'runs benchmarks', 'measures for the mixture',
    'reads its rows', 'trains', 'ends')
PATIENT = ('starts', 'runs benchmarks')         # what may take longer than the timeout


class Watch:
    """Set `at` to (step, one of PHASES) whenever the rank makes progress.

    It does nothing in a single process, or with a timeout of 0.
    """

    def __init__(self, rank, world_size, timeout_s):
        self.rank = rank
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.at = (0, 'starts')
        self.seen = None            # the `at` of the last look
        self.ticks = 0              # how often this rank has written to the store
        self.since = time.monotonic()
        self.main = threading.get_ident()
        if world_size > 1 and timeout_s:
            self.tick_s = min(10.0, timeout_s / 4)
            # A connection of its own: the main thread may hold another while it hangs.
            self.store = meeting_point()
            threading.Thread(target=self.run, daemon=True).start()
            threading.Thread(target=self.give_up, daemon=True).start()

    def run(self):
        try:
            while True:
                self.write()
                if self.is_overdue(0):
                    self.end()
                time.sleep(self.tick_s)
        except dist.DistError:
            # The launcher has ended, and its store with it. This rank ends soon, or `give_up` ends
            # it.
            return

    def is_overdue(self, grace_s):
        if self.at is not self.seen:
            self.seen = self.at
            self.since = time.monotonic()
        waited_s = time.monotonic() - self.since
        return self.at[1] not in PATIENT and waited_s > self.timeout_s + grace_s

    def give_up(self):
        """Ends this rank when the store hangs as well, so that it only knows its own place."""
        while not self.is_overdue(10 + 5 * self.tick_s):
            time.sleep(1)
        step, doing = self.at
        self.fail(
            'The store that the ranks write to does not answer: its host, the first node or rank '
            f'0, hangs or is gone. Rank {self.rank} is at step {step}, {doing}, in {self.place()}. '
            'Continue with --resume=True.')

    def fail(self, reason):
        print(
            f'\nerror: no progress for {time.monotonic() - self.since:.0f} s (hang_timeout = '
            f'{self.timeout_s:g}). {reason}', file=sys.stderr, flush=True)
        os._exit(1)

    def write(self):
        self.is_overdue(0)          # looks at `at`
        self.ticks += 1
        step, doing = self.at
        self.store.set(f'watch/{self.rank}', json.dumps(dict(
            ticks=self.ticks, step=step, doing=doing, place=self.place(),
            host=os.uname().nodename)))

    def place(self):
        """Our file and line where the main thread is, and the function that it called there."""
        frame = sys._current_frames()[self.main]
        called = ''
        while frame is not None and not frame.f_code.co_filename.startswith(ROOT + os.sep):
            called = f' ({frame.f_code.co_name})'
            frame = frame.f_back
        if frame is None:
            return 'unknown'
        return f'{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}{called}'

    def read_all(self):
        return {r: json.loads(self.store.get(f'watch/{r}')) for r in range(self.world_size)}

    def end(self):
        """One rank reports which rank hangs. All end."""
        if self.store.add('watch/reported', 1) > 1:
            for _ in range(4):                      # keep writing, or this rank would look stopped
                time.sleep(self.tick_s + 0.5)
                self.write()
            os._exit(1)
        # Two looks: a rank whose ticks stand still in between writes nothing any more.
        before = self.read_all()
        time.sleep(2 * self.tick_s + 1)
        self.write()
        self.fail(
            f'{diagnose(before, self.read_all())} Continue with --resume=True; torchrun '
            '--max-restarts does so by itself.')


def diagnose(before, after):
    """Says which ranks hang. before, after: rank -> what it wrote, some seconds apart."""
    silent = [r for r in after if after[r]['ticks'] == before[r]['ticks']]
    progress = {r: (entry['step'], PHASES.index(entry['doing'])) for r, entry in after.items()}
    behind = [r for r in after if progress[r] == min(progress.values())]
    places = collections.Counter(entry['place'] for entry in after.values())
    rarest = min(places, key=places.get)
    if silent:
        suspects = silent
        fault = 'gives no sign of life: it was stopped, or its machine is gone'
    elif len(behind) < len(after):
        suspects = behind
        fault = 'came less far than the others'
    elif len(places) > 1:
        suspects = [r for r in after if after[r]['place'] == rarest]
        fault = 'is somewhere else than the others'
    else:
        step, doing = after[0]['step'], after[0]['doing']
        return (
            f'All ranks are at step {step}, {doing}, in {rarest}: the network between them hangs.')

    def where(entry):
        return f"at step {entry['step']}, {entry['doing']}, in {entry['place']}"

    parts = []
    for r in suspects[:8]:
        parts.append(f"rank {r} on {after[r]['host']} {fault}, {where(after[r])}")
    if len(suspects) > 8:
        parts.append(f'and {len(suspects) - 8} more')
    text = '; '.join(parts) + '.'
    others = [entry for r, entry in after.items() if r not in suspects]
    if others:
        text += f' The others are {where(others[0])}.'
    return text
