"""One rank that begins to unlearn where the disk has no room for the reference model's logits."""

import sys

from megatron_nexus.base.durable import require_space
from megatron_nexus.errors import CheckpointError
from megatron_nexus.training import reference
from tests.training import resume_worker

if __name__ == "__main__":
    reference.require_space = lambda folder, needed_bytes: require_space(folder, 10**18)
    resume_worker.call_in_fork = lambda function, *arguments: function(*arguments)  # its error is seen here
    try:
        resume_worker.main()
    except CheckpointError as error:
        assert "cannot keep the reference model's logits" in str(error), error
        assert "rank" in str(error) and "make room" in str(error), error
        sys.exit(0)
    sys.exit("the run began")
