"""What the command lines share: flags, errors on one line, chat, files of requests, printing.

Nothing in the library imports it but `plan`.  Start with `command.py`.
"""
