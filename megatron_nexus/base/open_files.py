"""The limit of open files: raised above the 1024 that most processes start with."""

import resource

OTHER_FILES = 512
"""Files of libraries, shared memory and checkpoints, which callers do not count."""


def allow_open_files(count: int) -> None:
    """Raise this process's limit so that it can open `count` more files or connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
