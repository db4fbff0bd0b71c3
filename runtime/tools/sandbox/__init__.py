"""A process for code that nobody has read: no network, no files but its own, bounded memory, time and threads.

Its modules import the standard library only, because they run in the new process before the code does.
"""
