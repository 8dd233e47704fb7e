"""What the command lines share: flags, errors on one line, chat, files of requests, printing.

Imports everything to its left; in the library only `plan` imports it.  Start with `command.py`.
"""
