"""An Ethernet switch in user space that delays each frame and drops some: switch.py DELAY_S LOSS TAP...

TAP are descriptors of TAP devices. SIGUSR1 has it print how many frames it has seen and dropped.
"""

import heapq
import os
import random
import select
import signal
import sys
import time

LARGEST_FRAME = 65_536
BROADCAST_BIT = 1


def main() -> None:
    """Forward frames until this process is killed."""
    delay_s, loss, taps = float(sys.argv[1]), float(sys.argv[2]), [int(word) for word in sys.argv[3:]]
    chance = random.Random(0)
    ports: dict[bytes, int] = {}  # by Ethernet address
    waiting: list[tuple[float, int, int, bytes]] = []  # due, number, from, frame
    seen = dropped = 0
    signal.signal(signal.SIGUSR1, lambda number, frame: print(seen, dropped, flush=True))
    print("ready", flush=True)
    while True:
        pause_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for tap in select.select(taps, [], [], pause_s)[0]:
            try:
                frame = os.read(tap, LARGEST_FRAME)
            except BlockingIOError:
                continue
            except OSError:  # its link is down
                taps.remove(tap)
                continue
            seen += 1
            ports[frame[6:12]] = tap
            if chance.random() < loss:
                dropped += 1
            else:
                heapq.heappush(waiting, (time.monotonic() + delay_s, seen, tap, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, source, frame = heapq.heappop(waiting)
            known = ports.get(frame[:6]) if not frame[0] & BROADCAST_BIT else None
            for tap in [known] if known is not None else [tap for tap in taps if tap != source]:
                try:
                    os.write(tap, frame)
                except OSError:  # its link is down, or its queue is full: lost
                    continue


if __name__ == "__main__":
    main()
