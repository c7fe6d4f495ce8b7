"""Open files: more than the 1024 that most processes begin with, as far as the system allows."""

import resource

OTHER_FILES = 512
"""Those of libraries, shared memory and checkpoints, beside what a caller counts."""


def allow_open_files(count: int) -> None:
    """Let this process have `count` files or connections open, beside others, or as many as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
