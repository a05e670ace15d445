"""Notices that a rank hangs, and ends the run with its name: a collective alone would wait in silence.

Every rank has a thread that tells torchrun's store where the rank is. When a rank has made no progress for `hang_timeout` seconds its thread looks at
what all have told: one that tells nothing any more is stopped or its machine is gone; one that came less far than the others, or stands
somewhere else in the code, is the one they wait for. All end with exit code 1, and `torchrun --max-restarts` brings the run back.
"""
import collections
import json
import os
import sys
import threading
import time

import torch.distributed as dist

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def is_restarted():
    """Whether a launcher has started this run again: torchrun after a failure, or SLURM after a requeue."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ('TORCHELASTIC_RESTART_COUNT', 'SLURM_RESTART_COUNT'))


def meeting_point(hosts=False):
    """The store that ranks meet at, its keys apart from those of attempts before: torchrun keeps one store over restarts, and a rank that finds the address
    of a dead one there does not start. hosts: this rank makes it, where the launcher has not."""
    hosted = os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'
    store = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=hosts and not hosted, wait_for_workers=False, multi_tenant=True)
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


class Watch:
    """`at` says where this rank is. Does nothing in a single process, or with timeout 0."""

    def __init__(self, rank, world_size, timeout):
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.beats, self.ticks, self.step, self.doing, self.since, self.patient = 0, 0, 0, 'starts', time.monotonic(), True
        self.main = threading.get_ident()
        if world_size > 1 and timeout:
            self.store = meeting_point()
            threading.Thread(target=self.run, daemon=True).start()
            threading.Thread(target=self.give_up, daemon=True).start()

    def at(self, step, doing, patient=False):
        """Progress. patient: what begins may take longer than the timeout."""
        self.step, self.doing, self.patient, self.since = step, doing, patient, time.monotonic()
        self.beats += 1

    def run(self):
        tick = min(10.0, self.timeout / 4)
        try:
            while True:
                self.tell()
                if self.is_overdue(0):
                    self.end(tick)
                time.sleep(tick)
        except dist.DistError:          # the launcher has ended, and its store: this rank is about to, or `give_up` sees to it
            return

    def is_overdue(self, grace):
        return not self.patient and time.monotonic() - self.since > self.timeout + grace

    def give_up(self):
        """For a store that hangs as well: without it a rank knows only where it is itself."""
        grace = 10 + 5 * min(10.0, self.timeout / 4)
        while not self.is_overdue(grace):
            time.sleep(1)
        print(f'\nerror: no progress for {time.monotonic() - self.since:.0f} s (hang_timeout = {self.timeout:g}), and the store that ranks tell their state does not '
              f'answer: its host, the first node or rank 0, hangs or is gone. Rank {self.rank} is at step {self.step}, {self.doing}, in {self.where()}. '
              'Go on with --resume=True.', file=sys.stderr, flush=True)
        os._exit(1)

    def tell(self):
        self.ticks += 1
        self.store.set(f'watch/{self.rank}', json.dumps(dict(
            ticks=self.ticks, beats=self.beats, step=self.step, doing=self.doing, where=self.where(), host=os.uname().nodename)))

    def where(self):
        """File and line of ours that the main thread is in, with the function that it called from there."""
        frame, called = sys._current_frames()[self.main], ''
        while frame is not None and not frame.f_code.co_filename.startswith(ROOT + os.sep):
            frame, called = frame.f_back, f' ({frame.f_code.co_name})'
        return 'unknown' if frame is None else f'{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}{called}'

    def told(self):
        return {r: json.loads(self.store.get(f'watch/{r}')) for r in range(self.world_size)}

    def end(self, tick):
        """One rank says what is wrong; all end."""
        if self.store.add('watch/reported', 1) > 1:
            for _ in range(4):                      # go on telling, or this rank would look stopped
                time.sleep(tick + 0.5)
                self.tell()
            os._exit(1)
        before = self.told()
        time.sleep(2 * tick + 1)
        self.tell()
        after = self.told()
        print(f'\nerror: no progress for {time.monotonic() - self.since:.0f} s (hang_timeout = {self.timeout:g}). {diagnose(before, after)} '
              'Go on with --resume=True; torchrun --max-restarts does so by itself.', file=sys.stderr, flush=True)
        os._exit(1)


def diagnose(before, after):
    """Which ranks hang, in words. before, after: what ranks have told, rank -> dict, some seconds apart."""
    silent = [r for r in after if after[r]['ticks'] == before[r]['ticks']]
    fewest = min(a['beats'] for a in after.values())
    behind = [r for r, a in after.items() if a['beats'] == fewest]
    if silent:
        suspects, what = silent, 'gives no sign of life: it was stopped, or its machine is gone'
    elif len(behind) < len(after):
        suspects, what = behind, 'came less far than the others'
    else:
        places = collections.Counter(a['where'] for a in after.values())
        rarest = min(places, key=places.get)
        suspects, what = [r for r, a in after.items() if a['where'] == rarest], 'stands somewhere else than the others'
        if len(places) == 1:
            return f"All ranks are at step {after[0]['step']}, {after[0]['doing']}, in {rarest}: the network between them hangs."
    others = next((a for r, a in after.items() if r not in suspects), None)
    return '; '.join(f"rank {r} on {after[r]['host']} {what}, at step {after[r]['step']}, {after[r]['doing']}, in {after[r]['where']}" for r in suspects[:8]) + (
        f'; and {len(suspects) - 8} more' if len(suspects) > 8 else '') + (f". The others are at step {others['step']}, {others['doing']}, in {others['where']}." if others else '.')
