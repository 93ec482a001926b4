"""A job that worker processes can import: it prints, and says where it ran."""

import os


def pid(job):
    if job["fails"]:
        raise ValueError("what a host says")
    print("what a host prints")
    return {"pid": os.getpid()}
