"""What a process of another user of this host can do. Needs root."""

import os


def try_as(user, action):
    """Has a child that is `user`, with no group but its own, call `action`. 0: it returned true; 1: it did not, or
    raised; 2: the child could not become that user."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            status = 1
            status = 0 if action() else 1
        finally:
            os._exit(status)  # the child is no test
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
