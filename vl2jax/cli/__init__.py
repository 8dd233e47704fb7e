"""What the command lines share: flags, errors on one line, chat, files of requests, printing.

Imports `common`, `processing`, `parallel`, `model` and `inference`; only plans and
programs import it.  Start with `command.py`.
"""
