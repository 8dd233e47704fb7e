"""Code of the command lines: flags, one-line errors, output, chat, and files of requests.

Imports `common`, `processing`, `data`, `parallel`, `ops`, `model` and `inference`.  Only the
planner and the programs import it.  Start with `command.py`.
"""
