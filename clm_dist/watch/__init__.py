"""What keeps a process of a run honest from the outside: signals heard, life shown, failures named. No torch.

All of it happens in one thread a process, so that it works while the main thread waits inside a collective.
"""
