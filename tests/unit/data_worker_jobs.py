"""Jobs for worker processes, in a module that is soon imported by them."""

import os
import signal
import sys
import time

from simpo_megatron.data.store.workers import map_in_processes


def prepare(number):
    global prepared
    prepared = number


def describe(first, last):
    return f"file:{first} to {last}"


def double_but_of_9(item):
    if item == 9:
        raise ValueError("nine")
    return prepared * item


def double_but_killed_by_9(item):
    if item == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return prepared * item


def is_loaded(module):
    return module in sys.modules


def say_and_sleep(item):
    print("asleep", flush=True)
    time.sleep(600)


def mapped(work, num_items=20, num_workers=2):
    items = iter(range(num_items))
    return map_in_processes(work, items, num_workers=num_workers, prepare=prepare, arguments=(2,), describe=describe)
