"""The write process, with a fault at its n-th operation on the disk: KIND N MARK DESCRIPTOR.

KIND is `error`: the disk is full; `end`: the process is killed; `kill`: with the one that trains. The file MARK tells
that it came to that.
"""

import errno
import functools
import os
import signal
import sys
from pathlib import Path

from shardtune.checkpoint import files, write_process

kind, number, mark, descriptor = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
done = 0


def with_fault(operation):
    @functools.wraps(operation)
    def counted(*arguments, **options):
        global done
        done += 1
        if done == number:
            mark.write_text(operation.__name__)
            if kind == "error":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
            if kind == "kill":
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        return operation(*arguments, **options)

    return counted


for name in ("create", "write", "cut", "flush", "rename", "exchange"):
    setattr(files, name, with_fault(getattr(files, name)))
os.unlink, os.rmdir = with_fault(os.unlink), with_fault(os.rmdir)  # of which `files.remove` consists

sys.argv[1:] = [descriptor]
write_process.main()
